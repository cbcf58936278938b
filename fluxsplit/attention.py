"""Attention of Flux's blocks: on no card a score matrix, and positions turned in a third of the memory traffic.

torch's scaled_dot_product_attention is the quickest where it is fused (flash, memory-efficient). On RDNA2 it is not:
there it forms the scores of all queries with all keys, for 24 heads of 4760 tokens 1.1 GB in fp16, several times over
and in fp32. But a row of scores needs nothing of the other rows. So there the queries go through in chunks: a product
with all keys, a softmax, a product with the values, all of them kernels that every card has and is quick at. The
scores of one chunk and their softmax are all that exists at a time; how many rows a chunk has is the plan's to say.

In fp16 the queries are scaled before the product, so that scores stay where fp16 is fine. bf16 has too few digits for
scores: they are formed in fp32 there. The softmax accumulates in fp32 in either case.

A CPU with instructions for bf16 but none for whole tiles of it takes the same way, head by head, since torch's fused
kernel multiplies there as slowly as in fp32. Products of bf16 give bf16 there, which is too few digits for scores; so
each comes as two of them: what the product rounds to, and how much that is off, which a second product that subtracts
the first gives. Together they have 16 digits, and twice two products are still quicker than one in fp32.

Rotary position embedding turns pairs of neighbouring channels: a product of complex numbers. Written so it is three
passes over the heads where sums of products are eight, which on a card is felt, and the same to the last bits.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
_PROBE_TOKENS, _PROBE_HEADS = 80, 2
_PROBE_ERROR = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""What a fused kernel may be off for values of spread 1; a wrong kernel is off by as much as the values."""
_SCORE_BYTES, _MIN_ROWS, _MAX_ROWS = 4 << 20, 64, 512
"""Of one head's scores in fp32, which are to stay in the cache, and bounds for how many rows of them that may be."""


def attend_in_chunks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunk: int) -> torch.Tensor:
    """softmax(query keyᵀ / √D) value for `chunk` queries at a time: all [B, L, H, D] in one dtype, the result as well.

    Largest at any time are the scores [B, H, chunk, L] and their softmax. Raises ValueError for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"a chunk of {chunk} queries")
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    wide = torch.float32 if query.dtype == torch.bfloat16 else query.dtype
    keys = key.to(wide).permute(0, 2, 3, 1)  # [B, H, D, L]
    values = value.transpose(1, 2)  # [B, H, L, D]
    scale = 1 / math.sqrt(query.shape[-1])
    for start in range(0, query.shape[1], chunk):
        rows = query[:, start : start + chunk].to(wide).mul(scale).transpose(1, 2)  # [B, H, rows, D]
        shares = torch.softmax(rows @ keys, dim=-1)
        out[:, start : start + chunk] = (shares.to(value.dtype) @ values).transpose(1, 2)
    return out


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(query keyᵀ / √D) value, all [B, L, H, D] in one dtype, the result as well, in the quickest way here."""
    if query.dtype == torch.bfloat16 and query.device.type == "cpu" and has_quick_bf16_products_only():
        return attend_by_heads(query, key, value)
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return mixed.transpose(1, 2)


def attend_by_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`attend` by products of bf16, a head and some rows of its scores at a time: all bf16 [B, L, H, D]."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    batch, tokens, heads, width = query.shape
    rows = min(tokens, max(_MIN_ROWS, min(_MAX_ROWS, _SCORE_BYTES // (4 * tokens))))
    narrow, wide = (query.new_empty(2, rows, tokens, dtype=dtype) for dtype in (query.dtype, torch.float32))
    for one, head in itertools.product(range(batch), range(heads)):
        keys, values = key[one, :, head].t(), value[one, :, head]
        for start in range(0, tokens, rows):
            queries = query[one, start : start + rows, head]
            rounded, off, scores, shares = (both[: len(queries)] for both in (*narrow, *wide))
            scores_of(queries, keys, rounded, off, scores).mul_(1 / math.sqrt(width))
            torch.softmax(scores, dim=-1, out=shares)
            out[one, start : start + rows, head] = rounded.copy_(shares) @ values
    return out


def scores_of(
    queries: torch.Tensor, keys: torch.Tensor, rounded: torch.Tensor, off: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    """queries [n, D] times keys [D, m], both bf16, to 16 digits in `scores` [n, m] fp32, which is returned.

    `rounded` and `off`, bf16 [n, m], hold the two products that it is the sum of.
    """
    torch.mm(queries, keys, out=rounded)
    torch.addmm(rounded, queries, keys, beta=-1, out=off)
    return scores.copy_(rounded).add_(off)


@functools.cache
def has_quick_bf16_products_only() -> bool:
    """Whether this CPU multiplies bf16 quickly and torch's fused attention does not, which it does with AMX."""
    quick = torch.cpu._is_avx512_bf16_supported() and torch.backends.mkldnn.is_available()
    return quick and not torch.cpu._is_amx_tile_supported() and _subtracts_before_rounding()


def _subtracts_before_rounding() -> bool:
    """Whether a product of bf16 from which another is subtracted is rounded only then: tried, not taken for granted."""
    random = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_PROBE_TOKENS, 128, generator=random).to(torch.bfloat16) for _ in range(2))
    exact, rounded = left.float() @ right.float().T, left @ right.T
    off = torch.addmm(rounded, left, right.T, beta=-1)
    return bool((rounded.float() + off - exact).abs().max() < exact.abs().max() / 2**15)


@functools.cache
def has_fused_attention(device: torch.device, dtype: torch.dtype, head: int) -> bool:
    """Whether torch computes heads of width `head` without a score matrix here, and rightly: tried, not looked up.

    Some builds for AMD cards refuse, some give wrong values (TheRock#6561).
    """
    random = torch.Generator().manual_seed(0)
    shape = (1, _PROBE_HEADS, _PROBE_TOKENS, head)
    query, key, value = (torch.randn(shape, generator=random).to(dtype).float() for _ in range(3))
    try:
        with sdpa_kernel(_FUSED):
            got = F.scaled_dot_product_attention(
                query.to(device, dtype), key.to(device, dtype), value.to(device, dtype)
            )
    except RuntimeError:  # no kernel among these
        return False
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(query, key, value)
    error = (got.float().cpu() - wanted).abs().max()
    return bool(error <= _PROBE_ERROR[dtype])


class BlockAttention:
    """Attention of a Flux block, single or double, for diffusers' FluxAttention."""

    def __init__(self, chunk: int | None) -> None:
        """`chunk` queries at a time; None leaves it to torch."""
        self.chunk = chunk

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [B, N, C], encoder_hidden_states [B, T, C] or None → the same shapes. Takes no mask.

        image_rotary_emb is what `rotations` gives for all T + N tokens, the text's first.
        """
        if attention_mask is not None:
            raise ValueError("Flux's attention has no mask")
        text, tokens = encoder_hidden_states, 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        query = self._gathered(attn, hidden_states, text, ("to_q", "add_q_proj"), ("norm_q", "norm_added_q"))
        query = _rotate(query, image_rotary_emb)
        key = self._gathered(attn, hidden_states, text, ("to_k", "add_k_proj"), ("norm_k", "norm_added_k"))
        key = _rotate(key, image_rotary_emb)
        value = self._gathered(attn, hidden_states, text, ("to_v", "add_v_proj"), ("", ""))
        mixed = self._attend(query, key, value).flatten(2)
        if text is None:
            return mixed
        del query, key, value
        image_out: torch.Tensor = attn.to_out[0](mixed[:, tokens:].contiguous())
        return image_out, attn.to_add_out(mixed[:, :tokens].contiguous())

    def _gathered(
        self,
        attn: Any,
        image: torch.Tensor,
        text: torch.Tensor | None,
        projections: tuple[str, str],
        norms: tuple[str, str],
    ) -> torch.Tensor:
        """Heads [B, T + N, H, D] of both streams, projected and, where a norm is named, normalised."""
        parts: list[torch.Tensor] = []
        for states, projection, norm in zip((image, text), projections, norms, strict=True):
            if states is not None:
                heads: torch.Tensor = getattr(attn, projection)(states).unflatten(-1, (-1, attn.head_dim))
                parts.insert(0, getattr(attn, norm)(heads) if norm else heads)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.chunk is not None:
            return attend_in_chunks(query, key, value, self.chunk)
        return attend(query, key, value)


def use_attention(module: nn.Module, chunk: int | None) -> None:
    """Have every FluxAttention inside `module` compute `chunk` queries at a time; None leaves that to torch."""
    for child in module.modules():
        set_processor: Any = getattr(child, "set_processor", None)
        if set_processor is not None and hasattr(child, "norm_q"):
            set_processor(BlockAttention(chunk))


def rotations(cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Cosines and sines [L, D], each twice in a row as diffusers' FluxPosEmbed gives them → complex64 [L, D/2]."""
    return torch.complex(cosines[:, 0::2].float(), sines[:, 0::2].float())


def _rotate(x: torch.Tensor, turns: torch.Tensor | None) -> torch.Tensor:
    """Rotary position embedding of pairs of neighbouring channels (Su et al., arXiv 2104.09864), in fp32.

    x [B, L, H, D] is not needed afterwards; turns complex [L, D/2].
    """
    if turns is None:
        return x
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs.mul_(turns[None, :, None, :])).flatten(-2).to(x.dtype)
