"""What a rerender kept, in the recipe and in the picture's record: read back exactly, or refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from fluxsplit.errors import FluxsplitError
from fluxsplit.jobs import ImageJob, ModelFiles, SampleJob, job_from_json, job_to_json
from fluxsplit.metadata import ImageRecord, parameters_text, record_from_json
from fluxsplit.recipe import Parent, Recipe, WeightsStamp
from fluxsplit.start import NoiseGrid, Start, start_from_object

SHA = "ab" * 32
START = Start(
    "composition", (NoiseGrid(7, 512, 512), NoiseGrid(2**64 - 1, 576, 472, 3, "centre")), 0.9, "stretch", 0.5, SHA
)
STAMP = WeightsStamp("x.safetensors", SHA)
PLAIN = Recipe(
    prompt="a fox", seed=7, width=1152, height=944, steps=2, sigmas=(0.9, 0.45, 0.0), sampler="euler",
    scheduler="simple", shift=None, guidance=None, cfg=1.0, negative="", noise_index=0, variant="schnell",
    transformer=STAMP, text_encoder=STAMP, clip=STAMP, dtype="fp32", device="cpu",
)  # fmt: skip


def test_a_recipe_with_a_start_reads_back_exactly() -> None:
    recipe = replace(PLAIN, start=START)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert "Denoising strength: 0.9" in parameters_text(recipe)


def test_a_recipe_without_one_is_written_as_before() -> None:
    assert "start" not in json.loads(PLAIN.to_json()) and Recipe.from_json(PLAIN.to_json()) == PLAIN


def test_a_record_names_its_parent_and_older_ones_read_as_none() -> None:
    record = ImageRecord(PLAIN, SHA, STAMP, parent=Parent("0007.png", SHA))
    assert record_from_json(record.to_json()) == record
    bare = replace(record, parent=None)
    assert "parent" not in json.loads(bare.to_json()) and record_from_json(bare.to_json()) == bare


@pytest.mark.parametrize(
    "parent", [{}, {"name": "x"}, {"name": "", "latent_sha256": SHA}, {"name": "x", "latent_sha256": "zz"}, [], None, 3]
)
def test_a_parent_that_is_none_of_ours_is_refused(parent: Any) -> None:
    table = json.loads(ImageRecord(PLAIN, SHA, STAMP).to_json())
    with pytest.raises(FluxsplitError):
        record_from_json(json.dumps({**table, "parent": parent}))


@pytest.mark.parametrize(
    "change",
    [
        {"keep": "seed"},
        {"keep": 3},
        {"fit": "crop"},
        {"strength": 1.5},
        {"strength": 0},
        {"strength": "0.9"},
        {"strength": True},
        {"low_frequency_guidance": -1},
        {"latent_sha256": "AB" * 32},
        {"latent_sha256": ""},
        {"noise": []},
        {"noise": {}},
        {"noise": [asdict(NoiseGrid(7, 512, 512))] * 9},
        {"noise": [{**asdict(NoiseGrid(7, 512, 512)), "width": 510}]},
        {"noise": [{**asdict(NoiseGrid(7, 512, 512)), "seed": 2**64}]},
        {"noise": [{**asdict(NoiseGrid(7, 512, 512)), "seed": 7.0}]},
        {"noise": [{"seed": 7}]},
        {"more": 1},
    ],
)
def test_a_start_that_could_not_have_been_written_is_refused(change: dict[str, Any]) -> None:
    table = json.loads(replace(PLAIN, start=START).to_json())
    assert start_from_object(table["start"]) == START
    with pytest.raises(FluxsplitError):
        Recipe.from_json(json.dumps({**table, "start": {**table["start"], **change}}))


def test_a_start_crosses_to_the_stage() -> None:
    image = ImageJob("a", "c", 7, 64, 64, start=START, start_latent="x.pt", recorded_sigmas=(1.0, 0.0))
    job = SampleJob((image, replace(image, start=None)), ModelFiles("m"), "out", "pt", "auto", "cpu")
    assert job_from_json("sample", job_to_json(job)) == job
