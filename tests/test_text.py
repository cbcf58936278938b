"""T5's blocks come and go: the same bits as with all of them there, each brought in once for all prompts."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save as save_safetensors

import synthetic_checkpoint
from fluxsplit import checkpoint, fp8, job_plan, stage_text, text
from fluxsplit.conditioning import Conditioning, read_conditioning
from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.held_memory import CARD_BASE_BYTES
from fluxsplit.jobs import ImageJob, SampleJob, TextJob
from fluxsplit.memory import DeviceInfo
from fluxsplit.models import demo_files
from fluxsplit.read_ahead import ReadAhead
from fluxsplit.stage_text import _check
from fluxsplit.stored_layers import StoredLinear
from fluxsplit.streaming import Streaming, layout
from fluxsplit.text import MAX_TOKENS, T5, T5Tokens
from fluxsplit.text_plan import plan_text
from fluxsplit.weights import WeightFiles

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "a (blue:1.4) square above it", "", "a red circle")


@pytest.fixture(scope="module")
def t5_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t5") / "t5.safetensors"
    synthetic_checkpoint.write(path, synthetic_checkpoint.t5_shapes(synthetic_checkpoint.TINY), "e4m3")
    return path


def encoder(path: Path, device: torch.device = CPU) -> tuple[T5, WeightFiles]:
    files, part = WeightFiles(), checkpoint.part(path, "t5")
    return T5(part, T5Tokens(part, demo_files().t5_tokenizer), files, device), files


class Counting:
    """Notes which blocks are brought in, in order."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    @contextlib.contextmanager
    def brought_in(self, number: int) -> Iterator[None]:
        self.numbers.append(number)
        yield


def test_prompts_together_have_the_bits_of_each_alone(t5_file: Path) -> None:
    together, _ = encoder(t5_file)
    counting = Counting()
    together.loader = counting
    states = together.encode(PROMPTS)
    assert counting.numbers == [0, 1]
    for prompt, state in zip(PROMPTS, states, strict=True):
        alone, _ = encoder(t5_file)
        assert state.shape == (1, 256, 48) and state.dtype == torch.float32
        assert torch.equal(alone.encode([prompt])[0], state)
    assert not torch.equal(states[0], states[1])


def test_our_forward_is_that_of_transformers(t5_file: Path) -> None:
    t5, _ = encoder(t5_file)
    ids = tuple(token.id for token in t5._tokens.of(PROMPTS[0]))
    t5._model.set_input_embeddings(t5._model.shared)
    with torch.inference_mode():
        theirs = t5._model(input_ids=torch.tensor([ids])).last_hidden_state
    assert torch.equal(t5.encode([PROMPTS[0]])[0], theirs)


@pytest.mark.parametrize("how", ["given back", "kept", "slots", "one slot"])
def test_streamed_equals_resident(t5_file: Path, how: str) -> None:
    resident, _ = encoder(t5_file)
    t5, files = encoder(t5_file)
    if "slot" in how:
        slots = 1 if how == "one slot" else 2
        t5.loader = loader = Streaming(t5.blocks, files, CPU, slots=slots, ahead=slots > 1)
    else:
        streamed = frozenset({0, 1} if how == "given back" else ())
        t5.loader = loader = ReadAhead(t5.blocks, files, streamed, lambda count: None)
    told: list[tuple[int, int]] = []
    states = t5.encode(PROMPTS, lambda done, total: told.append((done, total)))
    loader.close()
    assert told == [(1, 2), (2, 2)]
    assert all(map(torch.equal, states, resident.encode(PROMPTS)))


def test_of_the_embedding_table_only_rows_are_expanded(t5_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    expand, into = fp8.expand, fp8.expand_into
    monkeypatch.setattr(fp8, "expand", lambda codes, *more: (sizes.append(codes.numel()), expand(codes, *more))[1])
    monkeypatch.setattr(fp8, "expand_into", lambda codes, *more: (sizes.append(codes.numel()), into(codes, *more))[1])
    encoder(t5_file)[0].encode(PROMPTS[:1])
    assert 256 * 48 in sizes  # a row for each token
    assert max(sizes) == 256 * 256 * 3 < 32128 * 48  # the bias of every pair of tokens, for three heads


def test_matrices_come_in_pieces_of_rows(t5_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoder(t5_file)[0].encode(PROMPTS)
    monkeypatch.setattr(text, "SCRATCH_BYTES", 7 * 48 * 4)  # seven rows of most, of 24 and 40
    t5, _ = encoder(t5_file)
    sizes: list[int] = []
    into = fp8.expand_into
    monkeypatch.setattr(fp8, "expand_into", lambda codes, *more: (sizes.append(codes.numel()), into(codes, *more))[1])
    for own, wanted in zip(t5.encode(PROMPTS), whole, strict=True):
        assert torch.allclose(own, wanted, rtol=0, atol=1e-5)
    assert {7 * 48, 24 % 7 * 48, 8 * 40} <= set(sizes)
    linears = [child for child in t5._model.modules() if isinstance(child, StoredLinear)]
    assert {child._scratch._bytes.numel() for child in linears} <= {7 * 48 * 4}


def test_an_encoding_that_is_not_finite_is_not_handed_on() -> None:
    """Nor kept: it would be found again for the same prompt."""
    job = TextJob(("x",), ("out",), "models/t5.safetensors", "models/clip.safetensors", "", "", "cpu")
    fine, broken = torch.ones(1, 4, 8), torch.full((1, 8), torch.nan)
    _check(Conditioning(fine, torch.ones(1, 8)), job)
    for t5, pooled, name in ((fine, broken, "clip"), (fine * torch.inf, torch.ones(1, 8), "t5")):
        with pytest.raises(FluxsplitError, match=f"the text encoder in {name}.safetensors gives NaN"):
            _check(Conditioning(t5, pooled), job)


def test_a_prompt_of_too_many_tokens_is_refused(t5_file: Path) -> None:
    with pytest.raises(FluxsplitError, match=f"the most is {MAX_TOKENS}"):
        encoder(t5_file)[0].encode(["red " * (MAX_TOKENS + 1)])


@pytest.mark.gpu
def test_streamed_on_a_card(t5_file: Path) -> None:
    card = torch.device("cuda")
    t5, files = encoder(t5_file, card)
    t5.loader = loader = Streaming(t5.blocks, files, card)
    resident, _ = encoder(t5_file)
    for own, wanted in zip(t5.encode(PROMPTS), resident.encode(PROMPTS), strict=True):
        assert torch.allclose(own.cpu(), wanted, rtol=0, atol=1e-3)
    loader.close()


def test_what_encoding_takes_of_a_card_is_planned(t5_file: Path) -> None:
    """The slots are as large as the largest block is stored; CLIP is there when T5 is gone."""
    t5, clip = checkpoint.part(t5_file, "t5"), checkpoint.part(demo_files().clip, "clip")
    plan = plan_text(t5, clip, [256])
    blocks = encoder(t5_file)[0].blocks
    aligned = 4096  # each matrix begins at a multiple of 256
    assert plan.slot_bytes + aligned >= max(layout(block).bytes for block in blocks) > 0
    assert plan.peak_bytes == CARD_BASE_BYTES + max(plan.t5_bytes, plan.clip_bytes)
    assert plan_text(t5, clip, [256, 256]).t5_bytes - plan.t5_bytes == 4 * 256 * t5.shape("shared.weight")[1]
    assert plan_text(t5, clip, [2048]).t5_bytes > 10 * plan_text(t5, clip, [512]).t5_bytes - 10 * plan.t5_bytes


class Told(list[dict[str, Any]]):
    def send(self, event: str, **fields: Any) -> None:
        self.append({"event": event, **fields})


@pytest.mark.parametrize(("vram", "kind"), [("2G", "cuda"), ("100M", "cpu")])
def test_text_goes_to_the_cpu_where_a_card_has_no_room(
    t5_file: Path, vram: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = DeviceInfo("cuda", "a card", 4 * 10**9, 8 * 10**9)
    kept: list[int] = []
    monkeypatch.setattr(stage_text, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(stage_text, "device_info", lambda device: card)
    monkeypatch.setattr(stage_text, "keep_within", lambda budget, device: kept.append(budget))
    plan = plan_text(checkpoint.part(t5_file, "t5"), checkpoint.part(demo_files().clip, "clip"), [256])
    told = Told()
    device = stage_text._device(_job(t5_file, vram=vram), plan, told)  # type: ignore[arg-type]
    assert device.type == kind
    if kind == "cuda":
        assert kept == [2 * 10**9] and told == [
            {"event": "plan", "text": plan.text(), "smaller": {"device": "cpu", "then": None}}
        ]
    else:
        assert not kept and "text is encoded on the CPU" in told[0]["text"] and "0.10 GB of a card" in told[0]["text"]


def _job(t5_file: Path, **changes: Any) -> TextJob:
    demo = demo_files()
    return TextJob(("a",), ("",), str(t5_file), demo.clip, demo.t5_tokenizer, demo.clip_tokenizer, "auto", **changes)


def test_nothing_is_encoded_for_what_would_not_fit(tmp_path: Path) -> None:
    demo, output = demo_files(), tmp_path / "out.safetensors"
    image = ImageJob("a", str(output), 1, 256, 256)
    files = (demo.text_encoder, demo.clip, demo.t5_tokenizer, demo.clip_tokenizer)
    for vram, fits in (("20M", False), ("auto", True)):
        then = SampleJob((image,), demo, str(tmp_path), "pt", "auto", "cpu", vram=vram)
        job, told = TextJob(("a",), (str(output),), *files, "cpu", then=then), Told()
        if not fits:
            with pytest.raises(UsageError, match=r"256x256 needs at least .* the budget is 20 MB"):
                stage_text.run(job, told)  # type: ignore[arg-type]
            assert not told and not output.exists()
        else:
            stage_text.run(job, told)  # type: ignore[arg-type]
    assert output.is_file()


def test_what_fits_once_the_text_is_encoded_is_not_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAM that the text stage has is the sample stage's afterwards."""
    info, mine_bytes = job_plan.device_info(torch.device("cpu")), psutil.Process().memory_info().rss
    image = ImageJob("a", "", 1, 256, 256)
    job = SampleJob((image,), demo_files(), str(tmp_path), "pt", "auto", "cpu")
    monkeypatch.setattr(job_plan, "device_info", lambda device: replace(info, free_bytes=700_000_000 - mine_bytes))
    job_plan.check_fits(replace(job, vram="500M"))
    with pytest.raises(UsageError, match=r"--vram 800M is more than"):
        job_plan.check_fits(replace(job, vram="800M"))
    card = replace(info, kind="cuda", unified=False, free_bytes=2_000_000_000)
    monkeypatch.setattr(job_plan, "device_info", lambda device: card)
    job_plan.check_fits(replace(job, vram="2000M"))
    with pytest.raises(UsageError, match=r"--vram 2001M is more than"):  # of which RAM is no part
        job_plan.check_fits(replace(job, vram="2001M"))


@pytest.mark.parametrize("part", ["t5", "clip"])
def test_no_text_is_kept_of_an_encoder_that_changes_meanwhile(part: str, tmp_path: Path) -> None:
    demo, files = demo_files(), {}
    for name in ("t5", "clip"):
        files[name] = Path(shutil.copy(demo.transformer, tmp_path / f"{name}.safetensors"))

    class Damaging(Told):
        def send(self, event: str, **fields: Any) -> None:
            super().send(event, **fields)
            if event == "text" and fields["done"] == 1:  # CLIP is about to begin
                with files[part].open("r+b") as stream:
                    stream.seek(-8, os.SEEK_END)
                    stream.write(bytes(8))

    output = tmp_path / "out.safetensors"
    job = TextJob(
        ("a",), (str(output),), str(files["t5"]), str(files["clip"]), demo.t5_tokenizer, demo.clip_tokenizer, "cpu"
    )
    with pytest.raises(FluxsplitError, match="was changed during the run"):
        stage_text.run(job, Damaging())  # type: ignore[arg-type]
    assert not output.exists()


@pytest.mark.gpu
def test_on_a_card_text_stays_within_its_plan(t5_file: Path, tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    told = Told()
    job = replace(_job(t5_file, vram="2G"), device="cuda:0", outputs=(str(tmp_path / "out.safetensors"),))
    try:
        stage_text.run(job, told)  # type: ignore[arg-type]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    plan = plan_text(checkpoint.part(t5_file, "t5"), checkpoint.part(job.clip, "clip"), [256])
    assert [event["text"] for event in told if event["event"] == "plan"] == [plan.text()]
    assert 0 < torch.cuda.max_memory_reserved() <= plan.peak_bytes
    assert (tmp_path / "out.safetensors").is_file()


def test_a_conditioning_may_be_stored_in_any_dtype_that_fp32_holds(tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    for dtype in (torch.float8_e4m3fn, torch.float16, torch.float64):
        file.write_bytes(save_safetensors({"t5": torch.ones(1, 2, 4).to(dtype), "pooled": torch.ones(1, 3)}))
        assert torch.equal(read_conditioning(str(file)).t5, torch.ones(1, 2, 4))
    file.write_bytes(
        save_safetensors({"t5": torch.full((1, 2, 4), 1e300, dtype=torch.float64), "pooled": torch.ones(1, 3)})
    )
    with pytest.raises(FluxsplitError, match="t5 holds NaN or infinity"):
        read_conditioning(str(file))
