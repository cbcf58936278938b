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
from fluxsplit.conditioning_cache import Encoders
from fluxsplit.errors import FluxsplitError
from fluxsplit.fingerprint import stamp_of, weights_sha256
from fluxsplit.jobs import ImageJob, ModelFiles
from fluxsplit.latents import SUFFIXES, read_latent
from fluxsplit.places import is_hidden
from fluxsplit.recipe import Recipe, WeightsStamp


@dataclass(frozen=True, slots=True)
class Renderer:
    """The weights, and what is computed in and on, as far as they decide a picture."""

    files: ModelFiles
    encoders: Encoders | None
    """What encoded the prompts, where the files do not say it."""
    variant: str
    config: dict[str, Any]
    dtype: str
    """`auto` for whichever."""
    device: str = "auto"
    """What was asked for; a card's pictures are not a CPU's."""

    def made(self, recipe: Recipe, image: ImageJob) -> bool:
        """Whether this recipe is that of what the job asks for. Weights are hashed where all else is the same."""
        return (
            (recipe.conditioning_sha256 or "") == image.conditioning_sha256
            and all(getattr(recipe, name) == getattr(image, name) for name in _SAME)
            and recipe.guidance == (defaults.guidance_of(self.variant) if image.guidance is None else image.guidance)
            and self._has_levels(recipe, image)
            and self.dtype in ("auto", recipe.dtype)
            and (self.device == "auto" or (self.device == "cpu") == (recipe.device == "cpu"))
            and self._has_weights(recipe, bool(image.conditioning_sha256))
        )

    def _has_weights(self, recipe: Recipe, of_conditioning: bool) -> bool:
        if not _is_of(recipe.transformer, self.files.transformer):
            return False
        if of_conditioning:
            return True
        if self.encoders is not None:
            return (recipe.text_encoder, recipe.clip) == (self.encoders.text_encoder, self.encoders.clip)
        return _is_of(recipe.text_encoder, self.files.text_encoder) and _is_of(recipe.clip, self.files.clip)

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


def made_in(folder: Path, images: Sequence[ImageJob], renderer: Renderer) -> dict[int, tuple[Path, Recipe]]:
    """Latents of a folder that are what jobs ask for, by the number of the job; each for one job."""
    found: dict[int, tuple[Path, Recipe]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not is_hidden(file) and file.suffix.lower() in SUFFIXES.values() and (recipe := recipe_of(file)) is not None:
            fitting = (number for number, image in enumerate(images) if renderer.made(recipe, image))
            number = next((number for number in fitting if number not in found), None)
            if number is not None:
                found[number] = file, recipe
    return found


def recipe_of(latent: Path) -> Recipe | None:
    """What a latent file says of itself; None where it says nothing, is damaged or is not there."""
    with suppress(FluxsplitError):
        return read_latent(latent).recipe
    return None


def _is_of(stamp: WeightsStamp, path: str) -> bool:
    """Whether a stamp is that of these weights."""
    return stamp.name == stamp_of(path, "").name and stamp.sha256 in ("", weights_sha256(path))


def renderer_of(files: ModelFiles, encoders: Encoders | None, dtype: str, device: str) -> Renderer:
    """What renders with these files."""
    variant = variant_of(part(files.transformer, "transformer"))
    return Renderer(files, encoders, variant, describe(files.transformer).config, dtype, device)
