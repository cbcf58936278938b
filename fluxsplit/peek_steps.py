"""What a picture looks like while it is sampled: the latent that each step expects at its end, drawn to one file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from fluxsplit.errors import FluxsplitError
from fluxsplit.latent_space import LatentSpace
from fluxsplit.peek import write_live
from fluxsplit.recipe import Recipe


class LivePeek:
    """Writes the preview of the first of the pictures that are sampled together, after each of its steps."""

    def __init__(self, folder: str, transformer: str, space: LatentSpace, recipes: Mapping[int, Recipe]) -> None:
        self._folder, self._transformer, self._space = Path(folder), Path(transformer).name, space
        self._recipes = recipes

    def show(self, number: int, step: int, clean: torch.Tensor) -> None:
        """`clean` is [1, 16, h, w] in model space; a preview that cannot be written is no reason to stop."""
        if number != min(self._recipes):
            return
        vae_space = self._space.to_vae(clean.float()).cpu().contiguous()
        height, width = vae_space.shape[2:]
        payload = vae_space.view(torch.uint8).numpy().tobytes()
        recipe = self._recipes[number]
        said = f"step {step} of {recipe.steps}, seed {recipe.seed}"
        with suppress(FluxsplitError):
            write_live(payload, height, width, self._transformer, self._folder, said)
