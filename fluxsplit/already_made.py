"""Whether a picture that is asked for was made before, so that a command that is given again goes on instead of over.

A recipe has resolved what a job may leave to the model, so that here the same rules are applied once more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxsplit import defaults
from fluxsplit.checkpoint import describe, part, variant_of
from fluxsplit.errors import FluxsplitError
from fluxsplit.fingerprint import remembered_sha256, stamp_of
from fluxsplit.jobs import ImageJob
from fluxsplit.latents import SUFFIXES, read_latent
from fluxsplit.recipe import Recipe, WeightsStamp


@dataclass(frozen=True, slots=True)
class Renderer:
    """A transformer, and what it computes in and on, as far as they decide a picture."""

    stamp: WeightsStamp
    """Without SHA-256 where the file has not been hashed yet."""
    variant: str
    config: dict[str, Any]
    dtype: str
    """`auto` for whichever."""
    device: str = "auto"
    """What was asked for; a card's pictures are not a CPU's."""

    def made(self, recipe: Recipe, image: ImageJob) -> bool:
        """Whether this recipe is that of what the job asks for."""
        return (
            self._is_ours(recipe)
            and all(getattr(recipe, name) == getattr(image, name) for name in _SAME)
            and recipe.guidance == (image.guidance if image.guidance is not None else self._guidance)
            and self._has_levels(recipe, image)
        )

    @property
    def _guidance(self) -> float | None:
        return defaults.guidance_of(self.variant)

    def _is_ours(self, recipe: Recipe) -> bool:
        theirs, hashes = recipe.transformer, (recipe.transformer.sha256, self.stamp.sha256)
        return (
            theirs.name == self.stamp.name
            and ("" in hashes or hashes[0] == hashes[1])
            and self.dtype in ("auto", recipe.dtype)
            and (self.device == "auto" or (self.device == "cpu") == (recipe.device == "cpu"))
        )

    def _has_levels(self, recipe: Recipe, image: ImageJob) -> bool:
        if given := image.sigmas or image.recorded_sigmas:
            return recipe.sigmas == given
        shift = image.shift
        if shift is None:
            shift = defaults.shift_of(self.variant, self.config, image.width, image.height)
        alike = shift == recipe.shift or (
            shift is not None and recipe.shift is not None and math.isclose(shift, recipe.shift, abs_tol=1e-9)
        )
        steps = image.steps or defaults.steps_of(self.variant, self.config)
        return alike and (recipe.scheduler, recipe.steps) == (image.scheduler, steps)


_SAME = ("prompt", "negative", "seed", "width", "height", "cfg", "sampler", "noise_index", "start")


def made_in(folder: Path, images: Sequence[ImageJob], renderer: Renderer) -> dict[int, Path]:
    """Latents of a folder that are what jobs ask for, by the number of the job; each for one job."""
    found: dict[int, Path] = {}
    if not folder.is_dir():
        return found
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in SUFFIXES.values() and (recipe := _recipe_of(file)) is not None:
            number = next(
                (n for n, image in enumerate(images) if n not in found and renderer.made(recipe, image)), None
            )
            if number is not None:
                found[number] = file
    return found


def _recipe_of(file: Path) -> Recipe | None:
    with suppress(FluxsplitError):
        return read_latent(file).recipe
    return None


def renderer_of(transformer: str, dtype: str, device: str) -> Renderer:
    """What renders with this file, or folder of files; nothing is hashed for it."""
    stamp = stamp_of(transformer, remembered_sha256(transformer) or "")
    variant = variant_of(part(transformer, "transformer"))
    return Renderer(stamp, variant, describe(transformer).config, dtype, device)
