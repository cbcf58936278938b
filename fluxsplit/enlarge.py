"""A preview's latent on another grid, in the basis in which its noise is carried over too."""

from __future__ import annotations

import math

import torch

from fluxsplit.cosine_basis import coefficients, frame_size, framed, grid, low_corner, planes


def enlarged(latents: torch.Tensor, height: int, width: int, fit: str = "stretch") -> torch.Tensor:
    """Latents [1, C, h, w] → [1, C, height, width], fp32; also smaller ones.

    `stretch` pulls the picture to the new ratio; `centre` puts it into the middle of it and repeats its edge
    around. Amplitudes grow with sqrt(HW / hw), so that values stay what they were.
    """
    if fit == "centre":
        latents = framed(latents, *frame_size(grid(latents), (height, width)))
    if latents.shape[-2:] == (height, width):
        return latents.float().clone()
    small = coefficients(latents)
    spectrum = torch.zeros(*latents.shape[:-2], height, width, dtype=torch.float64)
    rows, columns = low_corner(small, spectrum)
    spectrum[..., rows, columns] = small[..., rows, columns]
    return (planes(spectrum) * math.sqrt(height * width / math.prod(latents.shape[-2:]))).float()
