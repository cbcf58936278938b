"""Convolutions of a VAE's rows; a 3x3 after an enlargement as four 2x2 of the small plane.

Nearest-neighbour enlargement followed by a 3x3 convolution only ever sees 2x2 different pixels, so that it is four 2x2
convolutions of the small plane, one for each parity of row and column, whose weights are sums of the 3x3's: 4 instead
of 9 products for each output. The two parities of a column share one call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def convolve(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: tuple[int, int] = (0, 0), stride: int = 1
) -> torch.Tensor:
    """Rows [n, W, C] → [n', W', O].

    Channels last all the way, except on HIP: MIOpen has no good kernels for it on RDNA2, so rows are laid out as
    [C, n, W] for the call there.
    """
    planar = rows.permute(2, 0, 1)[None]  # [1, C, n, W]
    if torch.version.hip:
        planar = planar.contiguous()
    return F.conv2d(planar, weight, bias, stride=stride, padding=padding)[0].permute(1, 2, 0)


def phase_kernels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A 3x3 kernel [O, C, 3, 3] after nearest-2x as 2x2 kernels [2 O, C, 2, 2], for even and for odd rows.

    The first half of the outputs is for even columns. Even rows see rows (i - 1, i, i) of the small plane, odd ones
    (i, i, i + 1); columns likewise. Summed in fp32, one tap at a time.
    """
    outputs, inputs = weight.shape[:2]
    layout = torch.contiguous_format if torch.version.hip else torch.channels_last
    seen = (((0,), (1, 2)), ((0, 1), (2,)))  # by parity: which of the three taps meet in each of the two
    halves = []
    for rows in seen:
        half = torch.empty((2 * outputs, inputs, 2, 2), dtype=weight.dtype, device=weight.device, memory_format=layout)
        for parity, columns in enumerate(seen):
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                taps = [weight[:, :, r, c].float() for r in rows[i] for c in columns[j]]
                half[parity * outputs : (parity + 1) * outputs, :, i, j] = torch.stack(taps).sum(0)
        halves.append(half)
    return halves[0], halves[1]
