"""The orthonormal DCT-II basis, in which a small grid is the low corner of a large one.

Let D be the orthonormal DCT-II matrix of size n: row k is the cosine with k half periods over the grid. A plane
[h, w] has the coefficients D_h x D_w^T, and back. The cosine k, j means the same pattern on every grid, so a plane
is enlarged by putting its coefficients into the low corner of a larger plane of coefficients, and reduced by
cutting the corner out. D is orthonormal: lengths are kept, and white noise has white coefficients on any grid.

All of it is matrix products in fp64: a latent of 1152x944 pixels takes milliseconds, and fp32 results do not
depend on how a library orders its sums.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

Grid = tuple[int, int]
"""Height and width."""


def grid(planes: torch.Tensor) -> Grid:
    """The grid of planes [..., h, w]."""
    return planes.shape[-2], planes.shape[-1]


@lru_cache(maxsize=16)
def dct_matrix(size: int) -> torch.Tensor:
    """D [size, size], fp64, orthonormal: D[k, i] = c_k cos(pi k (i + 1/2) / size)."""
    index = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * index[:, None] * (index[None, :] + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def coefficients(planes: torch.Tensor) -> torch.Tensor:
    """Planes [..., h, w] → their coefficients [..., h, w], fp64."""
    height, width = planes.shape[-2:]
    return dct_matrix(height) @ planes.double() @ dct_matrix(width).T


def planes(coefficients: torch.Tensor) -> torch.Tensor:
    """Coefficients [..., h, w] → the planes [..., h, w], fp64; undoes `coefficients`."""
    height, width = coefficients.shape[-2:]
    return dct_matrix(height).T @ coefficients.double() @ dct_matrix(width)


def low_corner(small: torch.Tensor, large: torch.Tensor) -> tuple[slice, slice]:
    """The part of `large` [..., H, W] that `small` [..., h, w] fills: all they have in common."""
    return slice(min(small.shape[-2], large.shape[-2])), slice(min(small.shape[-1], large.shape[-1]))


def frame_size(old: Grid, new: Grid) -> Grid:
    """The smallest grid of the new ratio, at the old scale, that holds the old grid whole."""
    scale = min(new[0] / old[0], new[1] / old[1])
    return max(old[0], round(new[0] / scale)), max(old[1], round(new[1] / scale))


def framed(planes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Planes [B, C, h, w] in the middle of [B, C, height, width]; the rim repeats their edge."""
    top, left = (height - planes.shape[-2]) // 2, (width - planes.shape[-1]) // 2
    bottom, right = height - planes.shape[-2] - top, width - planes.shape[-1] - left
    return F.pad(planes, (left, right, top, bottom), mode="replicate")
