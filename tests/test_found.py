"""What a file says of how it was made, by fluxsplit and by every other tool."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from samples import SHAPE, make_payload, make_recipe

from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.found import read_found
from fluxsplit.found_text import as_form, facts_of
from fluxsplit.latents import write_latent
from fluxsplit.metadata import ImageRecord, encode_png, png_text_chunks
from fluxsplit.recipe import LATENT_FORMATS, WeightsStamp
from fluxsplit.start import NoiseGrid, Start

PIXELS = bytes(32 * 16 * 3)


def test_our_own_pictures(tmp_path: Path) -> None:
    recipe = make_recipe(negative="blur", noise_index=2, shift=1.15)
    record = ImageRecord(recipe, "ab" * 32, WeightsStamp("ae"))
    (tmp_path / "x").write_bytes(encode_png(PIXELS, 32, 16, png_text_chunks(record)))
    found = read_found(tmp_path / "x")
    assert found.recipe == recipe
    assert (found.tool, found.container, found.noise_source) == ("fluxsplit", "PNG", "cpu")
    assert (found.prompt, found.negative, found.seed, found.noise_index) == ("a fox, snow", "blur", 1234567890, 2)
    assert (found.sigmas, found.shift) == (recipe.sigmas, 1.15)
    assert (found.width, found.height, found.picture_width, found.picture_height) == (32, 16, 32, 16)
    assert not found.notes + found.warnings


def test_a_command_says_where_it_is_not_enough(tmp_path: Path) -> None:
    """A rerender that kept something of another picture is no picture of one `sample` command."""
    start = Start("composition", (NoiseGrid(7, 32, 16),), 0.8, latent_sha256="ab" * 32)
    for name, recipe in (("plain", make_recipe()), ("kept", make_recipe(start=start))):
        path = write_latent(tmp_path, name, make_payload(), SHAPE, recipe)
        lines = as_form(read_found(path), "cli", name).splitlines()
        assert lines[-1].startswith("fluxsplit sample")
        assert len(lines) == (2 if recipe.start else 1)
        assert ("start" in dict(facts_of(read_found(path)))) == bool(recipe.start)
    assert lines[0].startswith("# keeps the composition of another picture") and "rerender --from" in lines[0]


def test_the_command_of_the_demo_models_picture_names_it(tmp_path: Path) -> None:
    recipe = make_recipe()
    for name, word in (("flux-demo.safetensors", "--model demo "), (recipe.transformer.name, recipe.transformer.name)):
        of_it = replace(recipe, transformer=replace(recipe.transformer, name=name))
        path = write_latent(tmp_path, name, make_payload(), SHAPE, of_it)
        assert word in as_form(read_found(path), "cli", name)


@pytest.mark.parametrize("format", LATENT_FORMATS)
def test_our_own_latents(tmp_path: Path, format: str) -> None:
    path = write_latent(tmp_path, "x", make_payload(), SHAPE, make_recipe(), format=format)
    found = read_found(path)
    assert found.recipe == make_recipe()
    assert (found.container, found.picture_width, found.picture_height) == ("latent", 32, 16)


def test_absent_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_found(tmp_path / "x")
    with pytest.raises(FluxsplitError):
        read_found(tmp_path)
    (tmp_path / "x").write_bytes(b"hello, this is text")
    with pytest.raises(FluxsplitError, match="no latent"):
        read_found(tmp_path / "x")
