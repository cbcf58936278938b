"""Several pictures in one pass over the weights: each has the bits that it has alone, whatever its neighbours do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import make_recipe
from small_flux import by_seed, image, sample, write_conditioning, write_flux

from fluxsplit.jobs import ImageJob
from fluxsplit.stage_sample import _stem
from fluxsplit.transformer import Flux, Forward


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    return [write_conditioning(tmp_path / f"text-{n}", n, 5 + n) for n in range(3)]


def pictures(texts: list[str]) -> list[ImageJob]:
    """Of every size, length, sampler and kind of guidance."""
    return [
        image(texts[0], 1, steps=3),
        image(texts[1], 2, (64, 72), steps=1),
        image(texts[2], 3, (40, 56), steps=2, sampler="heun", scheduler="normal"),
        image(texts[0], 4, steps=4, sampler="dpmpp_2m", scheduler="beta"),
        image(texts[1], 5, (48, 32), steps=2, cfg=2.5, negative="no", negative_conditioning=texts[2]),
        image(texts[2], 6, sigmas=(0.9, 0.3, 0.0), steps=None),
    ]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dev", [False, True])
def test_every_picture_has_the_bits_of_its_single_run(tmp_path: Path, texts: list[str], dtype: str, dev: bool) -> None:
    flux = write_flux(tmp_path / "flux.safetensors", dev=dev)
    images = pictures(texts)
    _, recorder = sample(flux, images, tmp_path / "together", dtype)
    together = by_seed(recorder)
    assert sorted(together) == [1, 2, 3, 4, 5, 6]
    for one in images:
        (alone,), _ = sample(flux, [one], tmp_path / "alone", dtype)
        assert torch.equal(together[one.seed], alone), one
    assert len({latent.sum().item() for latent in together.values()}) == 6


def test_the_shorter_ones_are_written_first_and_progress_counts_them_all(tmp_path: Path, texts: list[str]) -> None:
    flux = write_flux(tmp_path / "flux.safetensors")
    _, recorder = sample(flux, [image(texts[0], 1, steps=3), image(texts[1], 2, steps=1)], tmp_path / "out")
    assert [result["recipe"]["seed"] for result in recorder.of("result")] == [2, 1]
    steps = recorder.of("step")
    assert [(step["step"], step["steps"], step["together"]) for step in steps] == [(2, 4, 2), (3, 4, 2), (4, 4, 2)]


def test_a_picture_that_cannot_begin_leaves_the_others(tmp_path: Path, texts: list[str]) -> None:
    flux = write_flux(tmp_path / "flux.safetensors")
    save_file({"t5": torch.zeros(1, 4, 8), "pooled": torch.zeros(1, 8)}, tmp_path / "foreign")
    images = [image(texts[0], 1), image(str(tmp_path / "foreign"), 2), image(texts[1], 3)]
    latents, recorder = sample(flux, images, tmp_path / "out")
    assert len(latents) == 2
    (failed,) = recorder.of("failed")
    assert failed["item"].startswith("seed 2") and "encoders of another model" in failed["hint"]


def test_a_picture_that_is_not_finite_is_named_with_its_block_and_the_rest_go_on(
    tmp_path: Path, texts: list[str]
) -> None:
    """Conditioning of 1e5 times the usual size leaves fp16's range; the block is where it first did."""
    flux = write_flux(tmp_path / "flux.safetensors")
    huge = load_file(texts[1])
    huge["t5"] *= 3e4
    save_file(huge, tmp_path / "huge")
    images = [image(texts[0], 1, steps=2), image(str(tmp_path / "huge"), 2, steps=2), image(texts[2], 3, steps=2)]
    _, recorder = sample(flux, images, tmp_path / "out", "fp16")
    (failed,) = recorder.of("failed")
    assert failed["item"].startswith("seed 2")
    assert failed["message"].startswith("step 1 of 2 gave NaN or infinity in fp16, first in ")
    assert "bf16" in failed["hint"]
    (alone,), _ = sample(flux, images[:1], tmp_path / "alone", "fp16")
    got = by_seed(recorder)
    assert sorted(got) == [1, 3] and torch.equal(got[1], alone)


@pytest.mark.parametrize("number", range(5))
def test_the_block_where_it_began_is_found(tmp_path: Path, number: int) -> None:
    from fluxsplit import checkpoint
    from fluxsplit.conditioning import read_conditioning
    from fluxsplit.weights import WeightFiles

    path = write_flux(tmp_path / "flux.safetensors")
    flux = Flux(checkpoint.part(path, "transformer"), WeightFiles(), torch.float32, torch.device("cpu"))
    text = read_conditioning(write_conditioning(tmp_path / "text", 0))
    forward = Forward(torch.randn(1, 16, 6, 4), 1.0, text, None)
    assert flux.first_nonfinite(forward) == ""
    block = flux.blocks[number]
    norm = block.norm1 if number < 2 else block.norm
    norm.linear._linear[0].bias.fill_(float("nan"))
    names = ["double block 0", "double block 1", "single block 0", "single block 1", "single block 2"]
    assert flux.first_nonfinite(forward) == names[number]


def test_names_keep_the_letters_of_a_prompt() -> None:
    prompts = ("A fox, snow!", "кот на крыше", "红色", "ünï_x", "!?")
    ends = [_stem(make_recipe(prompt=prompt)).split("-", 3)[3] for prompt in prompts]
    assert ends == ["a-fox-snow", "кот-на-крыше", "红色", "ünï-x", "empty"]
