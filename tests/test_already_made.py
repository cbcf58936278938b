"""What was made before is known by its recipe, whatever a job leaves to the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import make_recipe

from fluxsplit.already_made import Renderer, renderer_of
from fluxsplit.conditioning_cache import Encoders
from fluxsplit.fingerprint import weights_stamp
from fluxsplit.jobs import ImageJob
from fluxsplit.models import demo_files
from fluxsplit.recipe import Recipe, WeightsStamp
from fluxsplit.start import NoiseGrid, Start

DEMO = demo_files()
STAMP = weights_stamp(DEMO.transformer)
START = Start("noise", (NoiseGrid(7, 64, 48),), 1.0)
SCHNELL = Renderer(DEMO, None, "schnell", {}, "auto")
DEV = replace(SCHNELL, variant="dev")
JOB = ImageJob("a fox", "", 7, 64, 48, start=START)


def recipe(**changes: Any) -> Recipe:
    made: dict[str, Any] = {
        "prompt": "a fox", "negative": "", "seed": 7, "width": 64, "height": 48, "steps": 4, "sampler": "euler",
        "sigmas": (1.0, 0.75, 0.5, 0.25, 0.0), "scheduler": "simple", "shift": None, "guidance": None, "cfg": 1.0,
        "noise_index": 0, "variant": "schnell", "transformer": STAMP, "text_encoder": STAMP, "clip": STAMP,
        "start": START, "dtype": "bf16", "device": "cpu",
    }  # fmt: skip
    return replace(make_recipe(), **(made | changes))


def test_defaults_of_the_model_are_resolved() -> None:
    assert SCHNELL.made(recipe(), JOB)
    assert SCHNELL.made(recipe(), replace(JOB, steps=4, stem="y"))
    dev = recipe(variant="dev", steps=20, sigmas=tuple(1 - n / 20 for n in range(21)), guidance=3.5, shift=0.5)
    assert DEV.made(dev, replace(JOB, shift=0.5)) and not DEV.made(dev, JOB), "by resolution it would be another shift"
    assert not DEV.made(dev, replace(JOB, shift=0.5, guidance=4.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a dog"},
        {"negative": "cats"},
        {"seed": 8},
        {"width": 72},
        {"steps": 5},
        {"sampler": "heun"},
        {"scheduler": "beta"},
        {"shift": 1.15},
        {"cfg": 2.0},
        {"noise_index": 1},
        {"start": None},
        {"start": replace(START, fit="centre")},
        {"sigmas": (1.0, 0.75, 0.5, 0.2, 0.0)},
        {"recorded_sigmas": (1.0, 0.75, 0.5, 0.2, 0.0)},
    ],
)
def test_whatever_is_asked_for_otherwise_is_another_picture(changes: dict[str, Any]) -> None:
    assert not SCHNELL.made(recipe(), replace(JOB, **changes))


def test_given_levels_count_and_not_where_they_came_from() -> None:
    levels = (1.0, 0.75, 0.5, 0.25, 0.0)
    assert SCHNELL.made(recipe(scheduler="custom"), replace(JOB, sigmas=levels))
    assert SCHNELL.made(recipe(), replace(JOB, recorded_sigmas=levels, scheduler="beta"))


def test_a_file_of_conditioning_is_known_by_its_hash() -> None:
    """Whatever text encoders are at hand, of which such a picture's recipe knows nothing."""
    asked = replace(JOB, conditioning="x", conditioning_sha256="a" * 64)
    of_file = recipe(conditioning_sha256="a" * 64, text_encoder=WeightsStamp(""), clip=WeightsStamp(""))
    assert SCHNELL.made(of_file, asked)
    assert not SCHNELL.made(recipe(), asked) and not SCHNELL.made(of_file, JOB)
    assert not SCHNELL.made(of_file, replace(asked, conditioning_sha256="b" * 64))
    assert not SCHNELL.made(replace(of_file, transformer=WeightsStamp("other.safetensors")), asked)


@pytest.mark.parametrize("weights", ["transformer", "text_encoder", "clip"])
def test_other_weights_make_another_picture(weights: str, tmp_path: Path) -> None:
    """Also those of the same name that nobody has hashed yet."""
    assert SCHNELL.made(recipe(**{weights: replace(STAMP, sha256="")}), JOB), "the recipe does not say"
    assert not SCHNELL.made(recipe(**{weights: replace(STAMP, name="other")}), JOB)
    other = tmp_path / Path(DEMO.transformer).name
    data = bytearray(Path(DEMO.transformer).read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    assert not replace(SCHNELL, files=replace(DEMO, **{weights: str(other)})).made(recipe(), JOB)


def test_encoders_that_a_recipe_names_count_where_there_are_no_files() -> None:
    files = replace(DEMO, text_encoder="", clip="")
    cached = replace(SCHNELL, files=files, encoders=Encoders(STAMP, STAMP, "t"))
    assert cached.made(recipe(), JOB) and not cached.made(recipe(clip=replace(STAMP, name="other")), JOB)


def test_another_dtype_or_device_makes_another_picture() -> None:
    assert replace(SCHNELL, dtype="bf16").made(recipe(), JOB)
    assert not replace(SCHNELL, dtype="fp32").made(recipe(), JOB)
    assert replace(SCHNELL, device="cpu").made(recipe(), JOB)
    assert not replace(SCHNELL, device="cuda:0").made(recipe(), JOB)
    assert replace(SCHNELL, device="cuda:0").made(recipe(device="NVIDIA"), JOB)


def test_what_renders_is_told_by_its_files() -> None:
    found = renderer_of(DEMO, None, "auto", "cpu")
    assert (found.variant, found.device) == ("schnell", "cpu") and found.config["sampling"]["steps"] > 0
