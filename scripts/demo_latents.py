"""The latent space of the demo model: sixteen cosine coefficients of every 8x8 block.

A learned latent space costs training time twice: once for the autoencoder, once because the flow
model has to learn its folds. Flat shapes need neither. The latents are a fixed linear projection
(the block's mean colour, its slopes, and a few curvatures); the autoencoder's encoder is taught to
produce it and its decoder to draw crisp edges from it. So pictures can be modelled before the
autoencoder exists.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from shapes import Array

BLOCK = 8
CHANNELS = 16
SCALING_FACTOR = 0.5
SHIFT_FACTOR = 0.1

# (rows' frequency, columns' frequency, weights of R, G, B, gain to the wanted spread)
_RGB = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
_LUMA = (0.4, 0.4, 0.2)
_CHROMA = (0.5, 0.0, -0.5)
_TERMS = (
    *((0, 0, weights, 1.25) for weights in _RGB),
    *((1, 0, weights, 4.5) for weights in _RGB),
    *((0, 1, weights, 4.5) for weights in _RGB),
    *((1, 1, weights, 7.0) for weights in _RGB),
    (2, 0, _LUMA, 9.0),
    (0, 2, _LUMA, 9.0),
    (2, 0, _CHROMA, 12.0),
    (0, 2, _CHROMA, 12.0),
)


@cache
def _basis() -> tuple[Array, Array]:
    """Analysis [192, 16] and least-squares synthesis [16, 192] matrices."""
    places = (2 * np.arange(BLOCK) + 1) * np.pi / (2 * BLOCK)
    columns = []
    for row, column, weights, gain in _TERMS:
        wave = np.outer(np.cos(row * places), np.cos(column * places))
        wave = wave / (wave**2).sum()
        columns.append(gain * (wave[..., None] * np.asarray(weights)).reshape(-1))
    analysis = np.stack(columns, axis=1)
    synthesis = np.linalg.pinv(analysis)
    return analysis.astype(np.float32), synthesis.astype(np.float32)


def project(image: Array) -> Array:
    """A picture [H, W, 3] as flow-space latents [16, H/8, W/8]."""
    height, width = image.shape[0] // BLOCK, image.shape[1] // BLOCK
    blocks = image.reshape(height, BLOCK, width, BLOCK, 3).transpose(0, 2, 1, 3, 4)
    return (blocks.reshape(height, width, -1) @ _basis()[0]).transpose(2, 0, 1)


def project_batch(images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] as flow-space latents [B, 16, H/8, W/8]."""
    batch, _, height, width = images.shape
    blocks = images.reshape(batch, 3, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    blocks = blocks.permute(0, 2, 4, 3, 5, 1).flatten(3)
    analysis = torch.from_numpy(_basis()[0]).to(images)
    return (blocks @ analysis).permute(0, 3, 1, 2)


def unproject(latents: Array) -> Array:
    """Flow-space latents [16, h, w] as the soft picture [H, W, 3] they determine."""
    _, height, width = latents.shape
    blocks = latents.transpose(1, 2, 0) @ _basis()[1]
    blocks = blocks.reshape(height, width, BLOCK, BLOCK, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(blocks.reshape(height * BLOCK, width * BLOCK, 3))


def to_vae(latents: Tensor) -> Tensor:
    """Flow-space latents as the autoencoder's own."""
    return latents / SCALING_FACTOR + SHIFT_FACTOR


def from_vae(latents: Tensor) -> Tensor:
    """The autoencoder's latents as the flow's."""
    return (latents - SHIFT_FACTOR) * SCALING_FACTOR


def pack(latents: Array) -> Array:
    """Latents [16, h, w] as tokens [h/2 * w/2, 64], 2x2 latent pixels each, channel first."""
    channels, height, width = latents.shape
    parts = latents.reshape(channels, height // 2, 2, width // 2, 2).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(parts.reshape(height // 2 * width // 2, channels * 4))


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens [B, rows * columns, 64] as latents [B, 16, 2 rows, 2 columns]."""
    parts = tokens.reshape(len(tokens), rows, columns, CHANNELS, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return parts.reshape(len(tokens), CHANNELS, 2 * rows, 2 * columns)


def image_ids(rows: int, columns: int, short_side_tokens: int) -> Tensor:
    """RoPE ids [rows * columns, 3]; scaled so that the shorter side spans `short_side_tokens`.

    With 0 they are Flux's plain indices.
    """
    scale = short_side_tokens / min(rows, columns) if short_side_tokens else 1.0
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None] * scale
    ids[..., 2] = torch.arange(columns)[None, :] * scale
    return ids.reshape(-1, 3)
