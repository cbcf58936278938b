"""What was made before is known by its recipe, whatever a job leaves to the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from samples import make_recipe

from fluxsplit.already_made import Renderer, renderer_of
from fluxsplit.jobs import ImageJob
from fluxsplit.models import demo_files
from fluxsplit.recipe import Recipe, WeightsStamp
from fluxsplit.start import NoiseGrid, Start

SHA = "ab" * 32
STAMP = WeightsStamp("flux1-schnell.safetensors", SHA)
START = Start("noise", (NoiseGrid(7, 64, 48),), 1.0)
SCHNELL = Renderer(STAMP, "schnell", {}, "auto")
DEV = replace(SCHNELL, variant="dev")
JOB = ImageJob("a fox", "", 7, 64, 48, start=START)


def recipe(**changes: Any) -> Recipe:
    made: dict[str, Any] = {
        "prompt": "a fox", "negative": "", "seed": 7, "width": 64, "height": 48, "steps": 4, "sampler": "euler",
        "sigmas": (1.0, 0.75, 0.5, 0.25, 0.0), "scheduler": "simple", "shift": None, "guidance": None, "cfg": 1.0,
        "noise_index": 0, "variant": "schnell", "transformer": STAMP, "start": START, "dtype": "bf16", "device": "cpu",
    }  # fmt: skip
    return replace(make_recipe(), **(made | changes))


def test_defaults_of_the_model_are_resolved() -> None:
    assert SCHNELL.made(recipe(), JOB)
    assert SCHNELL.made(recipe(), replace(JOB, steps=4, conditioning="x", stem="y"))
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


def test_another_model_dtype_or_device_makes_another_picture() -> None:
    assert replace(SCHNELL, stamp=replace(STAMP, sha256="")).made(recipe(), JOB), "not hashed yet"
    assert not replace(SCHNELL, stamp=replace(STAMP, sha256="cd" * 32)).made(recipe(), JOB)
    assert not replace(SCHNELL, stamp=replace(STAMP, name="other")).made(recipe(), JOB)
    assert replace(SCHNELL, dtype="bf16").made(recipe(), JOB)
    assert not replace(SCHNELL, dtype="fp32").made(recipe(), JOB)
    assert replace(SCHNELL, device="cpu").made(recipe(), JOB)
    assert not replace(SCHNELL, device="cuda:0").made(recipe(), JOB)
    assert replace(SCHNELL, device="cuda:0").made(recipe(device="NVIDIA"), JOB)


def test_what_renders_is_told_by_its_file(tmp_path: Path) -> None:
    found = renderer_of(demo_files().transformer, "auto", "cpu")
    assert (found.stamp.name, found.variant, found.device) == ("flux-demo.safetensors", "schnell", "cpu")
    assert found.config["sampling"]["steps"] > 0
