"""A block of Flux over one picture's states, in place, with about half as much alive as in diffusers' own forward.

diffusers makes a new tensor at every operation and keeps most of them to the block's end. A single block is then as
wide as fifteen times its states: the MLP's four before GELU and its four after, all of it once more with the attention
beside it, and what the sums are made of. Here the same operations on the same values are written where there is
memory already: the output of attention and of the MLP into one tensor from the start, GELU into its own input, gate
and sum into the states themselves. Eight times the states are alive at the widest. On a small card the rest is worth
some blocks more that stay, or a larger picture.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from fluxsplit.gelu import gelu_
from fluxsplit.stored_layers import StoredLinear

FP16_LIMIT = 65504
"""Flux's states grow out of fp16. diffusers clips all of them at the end of single blocks, only the text at that of
double ones; here they are clipped wherever something is added to them."""


def through_double(block: Any, image: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, rope: torch.Tensor) -> None:
    """Put image [1, N, D] and text [1, T, D] through diffusers' FluxTransformerBlock, in place.

    temb [1, D]; rope is what `attention.rotations` gives for T + N tokens.
    """
    image_in, image_gate, *image_mlp = block.norm1(image, emb=temb)
    text_in, text_gate, *text_mlp = block.norm1_context(text, emb=temb)
    image_out, text_out = block.attn(hidden_states=image_in, encoder_hidden_states=text_in, image_rotary_emb=rope)
    del image_in, text_in
    _add(image, image_out, image_gate)
    _add(text, text_out, text_gate)
    del image_out, text_out
    _mlp(image, block.norm2, block.ff, *image_mlp)
    _mlp(text, block.norm2_context, block.ff_context, *text_mlp)


def through_single(block: Any, states: torch.Tensor, temb: torch.Tensor, rope: torch.Tensor) -> None:
    """Put states [1, T + N, D], the text's first, through diffusers' FluxSingleTransformerBlock, in place."""
    given, gate = block.norm(states, emb=temb)
    attended = block.attn(hidden_states=given, image_rotary_emb=rope)
    width = attended.shape[-1]
    both = given.new_empty(*given.shape[:-1], width + block.mlp_hidden_dim)
    both[..., :width] = attended
    del attended
    hidden = both[..., width:]
    cast(StoredLinear, block.proj_mlp).into(given, hidden)
    del given
    gelu_(hidden)
    _add(states, block.proj_out(both), gate)


def _mlp(
    states: torch.Tensor, norm: nn.Module, feed: Any, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor
) -> None:
    """A double block's second half, for either stream; shift, scale and gate [1, D]."""
    given = norm(states).mul_(1 + scale[:, None]).add_(shift[:, None])
    hidden = feed.net[0].proj(given)
    del given
    _add(states, feed.net[2](gelu_(hidden)), gate)


def _add(states: torch.Tensor, made: torch.Tensor, gate: torch.Tensor) -> None:
    """Gate what was made and add it to the states; `made` is not needed afterwards."""
    states.add_(made.mul_(gate[:, None]))
    if states.dtype == torch.float16:
        states.clip_(-FP16_LIMIT, FP16_LIMIT)
