"""Modulations computed before the steps: the bits of those computed within, and every matrix used once for each."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_card import Card
from small_flux import by_seed, image, sample, write_conditioning, write_flux

from fluxsplit import checkpoint, fp8
from fluxsplit.conditioning import Conditioning, read_conditioning
from fluxsplit.loading import EveryBlockThere
from fluxsplit.model_sizes import MODULATION
from fluxsplit.modulation import Modulations
from fluxsplit.stored_layers import Scratch, StoredLinear
from fluxsplit.streaming import Streaming, layout
from fluxsplit.transformer import Flux, Forward
from fluxsplit.weights import WeightFiles

DOUBLES, SINGLES, STEPS = 2, 3, 3
MATRICES = 2 * DOUBLES + SINGLES


@pytest.fixture
def text(tmp_path: Path) -> Conditioning:
    return read_conditioning(write_conditioning(tmp_path / "text", 0))


def load(path: Path, dtype: torch.dtype, device: str = "cpu") -> tuple[Flux, WeightFiles]:
    files = WeightFiles()
    return Flux(checkpoint.part(path, "transformer"), files, dtype, torch.device(device)), files


def forwards(text: Conditioning, guidance: float | None) -> list[Forward]:
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(1, 16, 6 + n, 4, generator=generator) for n in range(3)]
    return [Forward(one, 0.9 - n / 10, text, guidance) for n, one in enumerate(latents)]


def times(asked: list[Forward]) -> list[tuple[float, float | None, torch.Tensor]]:
    return [(one.sigma, one.guidance, one.conditioning.pooled) for one in asked]


def is_modulation(name: str) -> bool:
    return name.startswith(("transformer_blocks", "single_transformer_blocks")) and name.endswith(MODULATION)


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the matrices in the order in which they were multiplied with."""
    seen: list[str] = []
    each = StoredLinear.each

    def noting(self: StoredLinear, xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        seen.append(self.name)
        return each(self, xs)

    monkeypatch.setattr(StoredLinear, "each", noting)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", ["e4m3", "bf16"])
@pytest.mark.parametrize("dev", [False, True])
def test_prepared_forwards_have_the_bits_of_others(
    tmp_path: Path, text: Conditioning, dtype: torch.dtype, stored: str, dev: bool, uses: list[str]
) -> None:
    flux, _ = load(write_flux(tmp_path / "flux", stored, dev=dev), dtype)
    asked = forwards(text, 3.5 if dev else None)
    wanted = flux.velocities(asked)
    assert Counter(map(is_modulation, uses))[True] == MATRICES * len(asked)
    flux.prepare(times(asked), EveryBlockThere())
    uses.clear()
    got = flux.velocities(asked)
    assert not any(map(is_modulation, uses))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert len({velocity.sum().item() for velocity in got}) == len(asked)


def test_they_may_be_brought_in_and_leave_nothing_behind(
    tmp_path: Path, text: Conditioning, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card: through pieces into slots, of which nothing is held afterwards."""
    Card(monkeypatch, at_once=True)
    flux, files = load(write_flux(tmp_path / "flux"), torch.float32)
    asked = forwards(text, None)
    wanted = flux.velocities(asked)
    places = [place for matrices in flux.modulations.matrices for place in layout(matrices).places]
    loader = Streaming(flux.modulations.matrices, files, flux.device, as_card=True, piece_bytes=1000)
    ring = weakref.ref(loader._ring._memory)
    flux.prepare(times(asked), loader)
    assert all(place.linear.stored.data_ptr() != place.mapped.data_ptr() for place in places)
    loader.close()
    assert all(place.linear.stored is place.mapped for place in places)
    del loader
    gc.collect()
    assert ring() is None
    assert all(torch.equal(a, b) for a, b in zip(flux.velocities(asked), wanted, strict=True))


def test_what_was_not_prepared_is_computed_all_the_same(tmp_path: Path, text: Conditioning) -> None:
    flux, _ = load(write_flux(tmp_path / "flux"), torch.float32)
    asked = forwards(text, None)
    wanted = flux.velocities(asked)
    other = Conditioning(text.t5, text.pooled + 1)
    changed = flux.velocities([Forward(asked[0].latents, asked[0].sigma, other, None)])
    assert not torch.equal(changed[0], wanted[0])
    flux.prepare(times(asked[1:]), EveryBlockThere())
    assert all(torch.equal(a, b) for a, b in zip(flux.velocities(asked), wanted, strict=True))
    assert torch.equal(flux.velocities([Forward(asked[0].latents, asked[0].sigma, other, None)])[0], changed[0])
    flux.prepare([], EveryBlockThere())
    assert all(torch.equal(a, b) for a, b in zip(flux.velocities(asked), wanted, strict=True))


def test_what_is_known_is_not_computed_again(tmp_path: Path, text: Conditioning, uses: list[str]) -> None:
    flux, _ = load(write_flux(tmp_path / "flux"), torch.float32)
    asked = forwards(text, None)
    wanted = flux.velocities(asked)
    flux.prepare(times(asked[1:]), EveryBlockThere())
    assert flux.is_prepared(times(asked[1:])) and not flux.is_prepared(times(asked))
    given: list[int] = []
    each = StoredLinear.each

    def counting(self: StoredLinear, xs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        given.append(len(xs))
        return each(self, xs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredLinear, "each", counting)
        flux.modulations.compute({key: torch.zeros(1, 1) for key in flux.modulations._known}, EveryBlockThere())
        assert not given
    flux.prepare(times(asked), EveryBlockThere())
    uses.clear()
    assert all(torch.equal(a, b) for a, b in zip(flux.velocities(asked), wanted, strict=True))
    assert not any(map(is_modulation, uses))


def test_pictures_of_the_same_steps_and_text_are_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, text = write_flux(tmp_path / "flux"), write_conditioning(tmp_path / "text", 0)
    monkeypatch.setattr("fluxsplit.stage_sample.PREPARED_TOGETHER", 1)
    seen: list[int] = []
    compute = Modulations.compute
    monkeypatch.setattr(Modulations, "compute", lambda *given: (seen.append(1), compute(*given)))
    sample(path, [image(text, seed, steps=2) for seed in range(5)], tmp_path / "out")
    assert len(seen) == 1


def test_no_block_holds_its_modulation_matrices(tmp_path: Path) -> None:
    flux, _ = load(write_flux(tmp_path / "flux"), torch.float32)
    names = [place.linear.name for block in flux.blocks for place in layout(block).places]
    apart = [place.linear.name for matrices in flux.modulations.matrices for place in layout(matrices).places]
    assert not any(map(is_modulation, names)) and all(map(is_modulation, apart))
    assert len(names) == DOUBLES * 12 + SINGLES * 5 and len(apart) == MATRICES


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_a_stage_uses_each_matrix_once_for_all_noise_levels_and_pictures(
    tmp_path: Path, sampler: str, uses: list[str]
) -> None:
    """All of them before the first block of the first step, whatever the sampler asks in between."""
    texts = [write_conditioning(tmp_path / f"text-{n}", n) for n in range(2)]
    images = [image(texts[n], n + 1, steps=STEPS, sampler=sampler) for n in range(2)]
    images.append(image(texts[0], 3, steps=STEPS, sampler=sampler, cfg=2.0, negative_conditioning=texts[1]))
    sample(write_flux(tmp_path / "flux"), images, tmp_path / "out")
    modulations = [number for number, name in enumerate(uses) if is_modulation(name)]
    assert len(modulations) == MATRICES
    inside = next(n for n, name in enumerate(uses) if name.startswith("transformer_blocks") and not is_modulation(name))
    assert modulations[-1] < inside


@pytest.mark.parametrize("rows", [None, 7])
def test_one_expansion_serves_many_with_the_bits_of_each(monkeypatch: pytest.MonkeyPatch, rows: int | None) -> None:
    codes = torch.randint(0, 0x70, (24, 48), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scratch = Scratch() if rows is None else Scratch(rows * 48 * 2)
    linear = StoredLinear("a", codes, 0.5, torch.randn(24).bfloat16(), scratch=scratch)
    xs = [torch.randn(1, 48).bfloat16() for _ in range(5)]
    alone = [linear(x) for x in xs]
    expanded: list[int] = []
    into = fp8.expand_into

    def counting(codes: torch.Tensor, *more: Any) -> None:
        expanded.append(codes.numel())
        into(codes, *more)

    monkeypatch.setattr(fp8, "expand_into", counting)
    assert all(map(torch.equal, linear.each(xs), alone))
    assert sum(expanded) == codes.numel()


def test_many_pictures_are_prepared_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, text = write_flux(tmp_path / "flux"), write_conditioning(tmp_path / "text", 0)
    images = [image(text, seed, steps=1 + seed) for seed in range(5)]
    _, recorder = sample(path, images, tmp_path / "together")
    monkeypatch.setattr("fluxsplit.stage_sample.PREPARED_TOGETHER", 2)
    prepared: list[int] = []
    prepare = Flux.prepare

    def noting(self: Flux, asked: Any, loader: Any) -> None:
        prepared.append(len(list(asked)))
        prepare(self, asked, loader)

    monkeypatch.setattr(Flux, "prepare", noting)
    _, again = sample(path, images, tmp_path / "again", plan={"together": 1})
    assert prepared == [3, 7, 5]
    wanted, got = by_seed(recorder), by_seed(again)
    assert all(torch.equal(wanted[seed], got[seed]) for seed in range(5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_card_prepared_forwards_have_the_bits_of_others(
    tmp_path: Path, text: Conditioning, dtype: torch.dtype
) -> None:
    flux, files = load(write_flux(tmp_path / "flux"), dtype, "cuda:0")
    asked = forwards(text, None)
    wanted = flux.velocities(asked)
    loader = Streaming(flux.modulations.matrices, files, flux.device)
    flux.prepare(times(asked), loader)
    loader.close()
    assert all(torch.equal(a, b) for a, b in zip(flux.velocities(asked), wanted, strict=True))
