"""Attention in chunks of queries against torch's own, in diffusers' blocks, and that no score matrix comes to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_flux
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fluxsplit import attention, job_plan
from fluxsplit.attention import (
    BlockAttention,
    attend,
    attend_by_heads,
    attend_in_chunks,
    has_fused_attention,
    rotations,
    use_attention,
)

HEADS, HEAD = 4, 128
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
CPU = torch.device("cpu")


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def heads_of(tokens: int, dtype: torch.dtype, seed: int = 0, spread: float = 1.0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(1, tokens, HEADS, HEAD, generator=random) * spread).to(dtype) for _ in range(3)]


def exactly(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    wide = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*wide).transpose(1, 2)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 64, 150, 1000])
def test_chunks_give_what_exact_attention_gives(dtype: torch.dtype, chunk: int) -> None:
    tensors = heads_of(150, dtype)
    got = attend_in_chunks(*tensors, chunk)
    assert got.dtype == dtype and got.shape == tensors[0].shape
    assert (got.double() - exactly(*tensors)).abs().max() < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_no_worse_than_torchs_own(dtype: torch.dtype) -> None:
    tensors = heads_of(200, dtype, seed=1, spread=2.0)  # scores of spread 45: nearly one-hot
    exact = exactly(*tensors)
    theirs = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in tensors)).transpose(1, 2)
    error, own = (theirs.double() - exact).abs().mean(), (attend_in_chunks(*tensors, 33).double() - exact).abs().mean()
    assert own < (10 if dtype == torch.float16 else 1.5) * error + 1e-9  # fp16 scores are rounded to fp16


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("rows", [7, 64, 512])
def test_heads_one_by_one_are_as_exact_as_torchs_own(spread: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MIN_ROWS", rows)
    monkeypatch.setattr(attention, "_MAX_ROWS", rows)
    tensors = [torch.cat([one, one.flip(1) / 2]) for one in heads_of(150, torch.bfloat16, seed=2, spread=spread)]
    got, exact = attend_by_heads(*tensors), exactly(*tensors)
    theirs = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in tensors)).transpose(1, 2)
    assert got.shape == exact.shape and got.dtype == torch.bfloat16 and got.is_contiguous()
    assert (got.double() - exact).abs().mean() < 1.5 * (theirs.double() - exact).abs().mean()


@pytest.mark.skipif(not attention.has_quick_bf16_products_only(), reason="heads come one by one on other CPUs")
def test_scores_have_twice_the_digits_of_bf16() -> None:
    """Rounded to bf16, these scores of 90 differ by 0.5 at least, and shares of e to that."""
    tensors = heads_of(64, torch.bfloat16, seed=3, spread=3.0)
    error = (attend_by_heads(*tensors).double() - exactly(*tensors)).abs().mean()
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
    coarse = torch.softmax((query @ key.mT).float() / HEAD**0.5, dim=-1).to(torch.bfloat16) @ value
    assert error < (coarse.transpose(1, 2).double() - exactly(*tensors)).abs().mean() / 3


def test_products_that_are_rounded_too_early_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "addmm", lambda rounded, left, right, beta: left @ right + beta * rounded)
    assert not attention._subtracts_before_rounding()


def test_heads_come_one_by_one_where_only_that_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = heads_of(20, torch.bfloat16)
    taken: list[bool] = []
    monkeypatch.setattr(attention, "attend_by_heads", lambda *heads: (taken.append(True), attend_by_heads(*heads))[1])
    for quick in (False, True):
        monkeypatch.setattr(attention, "has_quick_bf16_products_only", lambda quick=quick: quick)
        attend(*tensors)
        attend(*(tensor.float() for tensor in tensors))
        assert len(taken) == int(quick)


def test_rows_do_not_depend_on_the_chunk() -> None:
    tensors = heads_of(96, torch.float32)
    assert torch.allclose(attend_in_chunks(*tensors, 96), attend_in_chunks(*tensors, 32), rtol=0, atol=1e-6)


def test_the_score_matrix_is_not_materialised() -> None:
    tokens, chunk = 600, 50
    tensors = heads_of(tokens, torch.float32)
    with LargestTensor() as largest:
        attend_in_chunks(*tensors, chunk)
    assert largest.elements == max(HEADS * chunk * tokens, tensors[0].numel())
    with LargestTensor() as largest:
        attend_in_chunks(*tensors, tokens)
    assert largest.elements == HEADS * tokens * tokens  # the mode does see it where it is


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk of 0"):
        attend_in_chunks(*heads_of(8, torch.float32), 0)


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("chunk", [None, 9])
def test_a_block_gives_what_diffusers_processor_gives(double: bool, chunk: int | None) -> None:
    torch.manual_seed(0)
    width = HEADS * HEAD
    more = {"added_kv_proj_dim": width, "context_pre_only": False} if double else {"pre_only": True}
    block = FluxAttention(width, HEADS, HEAD, bias=True, out_dim=width, eps=1e-6, **more).eval()
    image, text = torch.randn(1, 40, width), torch.randn(1, 12, width) if double else None
    angles = torch.randn(52 if double else 40, HEAD // 2).repeat_interleave(2, dim=1)
    rope = (angles.cos(), angles.sin())
    before = image.clone(), None if text is None else text.clone()
    with torch.inference_mode():
        wanted = block(hidden_states=image, encoder_hidden_states=text, image_rotary_emb=rope)
        use_attention(block, chunk)
        assert isinstance(block.processor, BlockAttention)
        got = block(hidden_states=image, encoder_hidden_states=text, image_rotary_emb=rotations(*rope))
    assert torch.equal(image, before[0]) and (text is None or torch.equal(text, before[1]))
    for own, theirs in zip(got if double else [got], wanted if double else [wanted], strict=True):
        assert own.shape == theirs.shape
        assert torch.allclose(own, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_has_fused_attention(dtype: torch.dtype) -> None:
    assert has_fused_attention(CPU, dtype, 128)


def test_a_wrong_kernel_is_not_taken_nor_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    true, factors = F.scaled_dot_product_attention, iter([1.5, 1.0])  # the kernel's answer, the exact one
    probe = has_fused_attention.__wrapped__
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *heads: true(*heads) * next(factors))
    assert not probe(CPU, torch.float32, 128)
    monkeypatch.undo()
    monkeypatch.setattr("fluxsplit.attention._FUSED", [SDPBackend.CUDNN_ATTENTION])
    assert not probe(CPU, torch.float32, 128)


def test_without_a_fused_kernel_the_stage_computes_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small_flux.write_flux(tmp_path / "flux.safetensors")
    image = small_flux.image(small_flux.write_conditioning(tmp_path / "c.safetensors", 1))
    (fused,), told = small_flux.sample(path, [image], tmp_path / "fused")
    assert told.of("plan")[0]["query_chunk"] is None
    monkeypatch.setattr(job_plan, "has_fused_attention", lambda *arguments: False)
    seen: list[int] = []
    monkeypatch.setattr(
        attention,
        "attend_in_chunks",
        lambda *heads: (seen.append(heads[-1]), attend_in_chunks(*heads))[1],
    )
    (chunked,), told = small_flux.sample(path, [image], tmp_path / "chunked", plan={"query_chunk": 4})
    assert seen == [4] * 2 * (2 + 3)  # two steps through two double and three single blocks
    assert torch.allclose(chunked, fused, rtol=0, atol=1e-4) and not torch.equal(chunked, fused)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_chunks_on_a_card(dtype: torch.dtype) -> None:
    tensors = [tensor.cuda() for tensor in heads_of(1000, dtype)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = attend_in_chunks(*tensors, 100)
    grown = torch.cuda.max_memory_allocated() - before
    assert (got.double() - exactly(*tensors)).abs().max() < BOUND[dtype]
    assert grown < HEADS * 1000 * 1000 * 4 + 64 * 2**20  # a fp32 score matrix and cuBLAS's workspace
