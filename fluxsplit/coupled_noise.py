"""Noise of a new size whose low frequencies are those of a preview's noise, and which is white nevertheless.

The coefficients of white Gaussian noise in an orthonormal basis are independent unit Gaussians, on any grid. So
noise for H x W is made of the preview's h x w coefficients in the low corner and fresh unit Gaussians everywhere
else, transformed back: exactly white and Gaussian for every ratio, whole, fractional or rectangular, larger or
smaller. Enlarging noise by pixels (nearest, bilinear) is not: neighbours then hang together.

A start from it lies on the trajectory that made the preview: lifted to the new grid with amplitude
r = sqrt(HW / hw), the low band of (1 - s) * enlarged + s * noise is r (1 - s) x0 + s e, a multiple of the
preview's own path (1 - sigma) x0 + sigma e at s = r sigma / (1 + (r - 1) sigma).
"""

from __future__ import annotations

import hashlib
from itertools import pairwise

import torch

from fluxsplit.cosine_basis import coefficients, frame_size, grid, low_corner, planes
from fluxsplit.noise import LATENT_CHANNELS, initial_noise
from fluxsplit.recipe import VAE_FACTOR
from fluxsplit.start import NoiseGrid


def coupled_noise(noise: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """White noise [1, C, H, W], fp32, with the low frequencies of `noise` [1, C, h, w].

    `fresh` [1, C, H, W] are unit Gaussians that stand in no relation to `noise`: the coefficients above its band.
    """
    if noise.shape == fresh.shape:
        return noise.clone()
    spectrum = fresh.double().clone()
    rows, columns = low_corner(noise, fresh)
    spectrum[..., rows, columns] = coefficients(noise)[..., rows, columns]
    return planes(spectrum).float()


def noise_in_frame(noise: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """`noise` [1, C, h, w] in the middle of the fresh noise [1, C, H, W] of a larger grid."""
    framed = fresh.clone()
    top, left = (fresh.shape[-2] - noise.shape[-2]) // 2, (fresh.shape[-1] - noise.shape[-1]) // 2
    framed[..., top : top + noise.shape[-2], left : left + noise.shape[-1]] = noise
    return framed


def noise_of_grids(grids: tuple[NoiseGrid, ...]) -> torch.Tensor:
    """The noise [1, 16, H, W] of the last grid, coupled with that of each grid before it; fp32 on the CPU."""
    first = grids[0]
    noise = initial_noise(first.seed, first.height // VAE_FACTOR, first.width // VAE_FACTOR, first.noise_index)
    for before, place in pairwise(grids):
        height, width = place.height // VAE_FACTOR, place.width // VAE_FACTOR
        if before.fit == "centre":
            frame = frame_size(grid(noise), (height, width))
            noise = noise_in_frame(noise, _fresh(place, "frame", *frame))
        noise = coupled_noise(noise, _fresh(place, "detail", height, width))
    return noise


def _fresh(place: NoiseGrid, purpose: str, height: int, width: int) -> torch.Tensor:
    """Unit Gaussians [1, 16, height, width] that the recipe fixes.

    Not drawn from the seed itself: the preview's noise is the beginning of that stream, and what is drawn from it
    again would be no independent numbers. Seeds of torch's CPU generator count modulo 2^32.
    """
    text = f"fluxsplit {purpose} {place.seed} {place.noise_index} {place.width}x{place.height}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, LATENT_CHANNELS, height, width, generator=generator, dtype=torch.float32)
