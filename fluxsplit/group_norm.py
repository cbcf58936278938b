"""GroupNorm of a plane of which only strips are there: statistics merged over all of them, applied to each.

A GroupNorm needs the mean and variance of the whole plane. They are gathered while the plane is written: each row's by
two passes in fp32 while it is in the cache, rows and strips merged in fp64 (Chan, Golub and LeVeque 1979). Tiles, which
normalise each by its own statistics, are what makes tiled decoding drift in tone; strips do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fluxsplit.errors import FluxsplitError
from fluxsplit.planes import sent

EPSILON = 1e-6
"""Of every GroupNorm in the VAE (diffusers `vae.py`)."""


class NotFinite(FluxsplitError):
    """An activation is NaN or infinite: 16 bits were not enough, or the latents are not of this VAE."""


class Moments:
    """Count, mean and sum of squared deviations of each channel, over all rows seen so far, in fp64."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self._count = 0
        self._mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._mean)

    def update(self, rows: torch.Tensor) -> None:
        """Take in rows [n, W, C]."""
        wide = rows.float()
        means = wide.mean(1, keepdim=True)  # [n, 1, C]
        deviations = torch.sub(wide, means) if wide is rows else wide.sub_(means)
        squares = deviations.mul_(deviations).sum(1).double()  # [n, C]
        means = means[:, 0].double()
        mean = means.mean(0)
        self._merge(
            rows.shape[0] * rows.shape[1], mean, squares.sum(0) + rows.shape[1] * (means - mean).square().sum(0)
        )

    def _merge(self, count: int, mean: torch.Tensor, squares: torch.Tensor) -> None:
        total = self._count + count
        delta = mean - self._mean
        self._mean = self._mean + delta * (count / total)
        self._squares = self._squares + squares + delta.square() * (self._count * count / total)
        self._count = total

    def affine(self, weight: torch.Tensor, bias: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift [C] in fp32, such that GroupNorm is x * scale + shift; raises NotFinite."""
        means = self._mean.view(groups, -1)
        mean = means.mean(1, keepdim=True)
        squares = self._squares.view(groups, -1).sum(1) + self._count * (means - mean).square().sum(1)
        variance = squares / (self._count * means.shape[1])
        if not bool(variance.isfinite().all()):
            raise NotFinite("the VAE's activations are NaN or infinite")
        scale = weight.double() * (variance + EPSILON).rsqrt().repeat_interleave(means.shape[1])
        shift = bias.double() - scale * mean.expand_as(means).reshape(-1)
        return scale.float(), shift.float()


@dataclass(frozen=True, slots=True)
class Affine:
    """A GroupNorm whose statistics are known."""

    scale: torch.Tensor
    """fp32 [C]."""
    shift: torch.Tensor
    activated: bool = True
    """Whether SiLU follows."""

    def into(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Write silu(rows * scale + shift) to `out`; computed in fp32, rounded once."""
        wide = out if out.dtype == torch.float32 else torch.empty(out.shape, device=out.device)
        if rows.dtype == torch.float32 and rows.device != wide.device:
            rows = wide.copy_(rows, non_blocking=rows.is_pinned())
        elif rows.dtype != torch.float32:  # crosses the bus in 16 bits, and is widened on the other side
            rows = wide.copy_(sent(rows, wide.device))
        torch.addcmul(self.shift, rows, self.scale, out=wide)
        if self.activated:
            F.silu(wide, inplace=True)
        if wide is not out:
            out.copy_(wide)
