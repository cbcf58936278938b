"""Where a picture's sampling starts: noise, or a preview noised to some sigma, and what holds it to the preview."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fluxsplit.cosine_basis import frame_size, grid
from fluxsplit.coupled_noise import noise_of_grids
from fluxsplit.enlarge import enlarged
from fluxsplit.errors import FluxsplitError
from fluxsplit.latent_space import LatentSpace
from fluxsplit.latents import LatentFile
from fluxsplit.low_frequency_guidance import guidance_towards
from fluxsplit.noise import initial_noise
from fluxsplit.recipe import VAE_FACTOR, Recipe
from fluxsplit.start import NoiseGrid, Start

Guide = Callable[[torch.Tensor, float], torch.Tensor]
"""(predicted clean latent [1, 16, H, W], sigma) → the one to go on with."""


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """The sampler's first latent."""

    latents: torch.Tensor
    """fp32 [1, 16, H, W], model space, at the recipe's first sigma."""
    guide: Guide | None = None
    """What corrects every prediction; None for nothing."""


def starting_point(recipe: Recipe, preview: LatentFile | None, space: LatentSpace) -> StartingPoint:
    """Where the recipe starts; `preview` is the latent that its start names, where it names one.

    Raises FluxsplitError where it is another latent.
    """
    start, sigma = recipe.start, recipe.sigmas[0]
    height, width = recipe.height // VAE_FACTOR, recipe.width // VAE_FACTOR
    if start is None or not start.noise:
        noise = initial_noise(recipe.seed, height, width, recipe.noise_index)
    else:
        noise = noise_of_grids((*start.noise, grid_of(recipe)))
    if start is None or start.keep == "noise":
        return StartingPoint(noise * sigma)
    clean = space.to_model(_tensor(preview, start))
    large = enlarged(clean, height, width, start.fit)
    guide = None
    if start.low_frequency_guidance:
        band = frame_size(grid(clean), (height, width)) if start.fit == "centre" else grid(clean)
        guide = guidance_towards(large, band, recipe.sigmas, start.low_frequency_guidance)
    return StartingPoint((1 - sigma) * large + sigma * noise, guide)


def grid_of(recipe: Recipe) -> NoiseGrid:
    """The noise that a recipe's own seed draws at its own size."""
    return NoiseGrid(recipe.seed, recipe.width, recipe.height, recipe.noise_index)


def _tensor(preview: LatentFile | None, start: Start) -> torch.Tensor:
    if preview is None or preview.payload_sha256 != start.latent_sha256:
        found = "none" if preview is None else f"one with SHA-256 {preview.payload_sha256[:12]}"
        raise FluxsplitError(
            f"the recipe starts from a latent with SHA-256 {start.latent_sha256[:12]}, given is {found}",
            "render from the preview again",
        )
    return torch.frombuffer(bytearray(preview.payload), dtype=torch.float32).view(preview.shape)
