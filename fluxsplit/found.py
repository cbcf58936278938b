"""Recipes of any tool, found in pictures and latents: containers told by content, one reader for each tool."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.found_recipe import FoundRecipe, found_of_recipe
from fluxsplit.latents import read_latents
from fluxsplit.metadata import RECORD_KEY, record_from_json
from fluxsplit.png_text import SIGNATURE, PngText, read_png
from fluxsplit.recipe import VAE_FACTOR

__all__ = ["FoundRecipe", "read_found"]


def read_found(path: str | Path) -> FoundRecipe:
    """What the picture or latent at `path` says of how it was made; `tool` is None where it says nothing.

    Raises UsageError where there is no such file, and FluxsplitError where it is damaged, hostile, or neither a
    picture nor a latent.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise FluxsplitError(f"cannot read {path}: {error.strerror}") from error
    if start.startswith(SIGNATURE):
        return _in_png(path, read_png(path))
    return _in_latent(path)


def _in_png(path: Path, png: PngText) -> FoundRecipe:
    found = FoundRecipe()
    if RECORD_KEY in png.texts:
        try:
            record = record_from_json(png.texts[RECORD_KEY])
        except FluxsplitError as error:
            raise FluxsplitError(f"{path.name} is refused: {error.message}", error.hint) from None
        if record.recipe is not None:
            found = found_of_recipe(record.recipe)
    return replace(found, container="PNG", picture_width=png.width, picture_height=png.height)


def _in_latent(path: Path) -> FoundRecipe:
    """Of a batch, what its pictures have in common: the first one's noise index stands for all."""
    first = read_latents(path)[0]
    found = FoundRecipe() if first.recipe is None else found_of_recipe(first.recipe)
    height, width = (side * VAE_FACTOR for side in first.shape[2:])
    return replace(found, container="latent", picture_width=width, picture_height=height)
