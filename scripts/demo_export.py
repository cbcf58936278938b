"""Export the demo model as one file in the layout of a ComfyUI all-in-one checkpoint.

`model.diffusion_model.` holds Black Forest Labs' names, `vae.` the LDM autoencoder's, and
`text_encoders.` those of transformers. What tensors cannot tell goes to the metadata.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from demo_check import load_flow
from demo_flow import FlowConfig
from demo_latents import SCALING_FACTOR, SHIFT_FACTOR
from demo_text import T5_LENGTH, Tokenizers, load_encoders
from demo_vae import GROUPS, WIDTHS, load_vae

State = dict[str, Tensor]

TOP_NAMES = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
}
DOUBLE_NAMES: dict[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
DOUBLE_SCALES = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE_NAMES: dict[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
SINGLE_SCALES = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
VAE_LEVELS = len(WIDTHS)


def _block(
    state: State,
    source: str,
    target: str,
    names: dict[str, tuple[str, ...]],
    scales: dict[str, str],
) -> State:
    block = {}
    for name, parts in names.items():
        for kind in ("weight", "bias"):
            tensors = [state.pop(f"{source}.{part}.{kind}") for part in parts]
            block[f"{target}.{name}.{kind}"] = torch.cat(tensors)
    for name, part in scales.items():
        block[f"{target}.{name}.scale"] = state.pop(f"{source}.{part}.weight")
    return block


def transformer_tensors(source: State, config: FlowConfig) -> State:
    """Diffusers' transformer state under Black Forest Labs' names."""
    state, named = dict(source), {}
    for target, name in TOP_NAMES.items():
        for kind in ("weight", "bias"):
            named[f"{target}.{kind}"] = state.pop(f"{name}.{kind}")
    for kind in ("weight", "bias"):
        scale, shift = state.pop(f"norm_out.linear.{kind}").chunk(2)
        named[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    for index in range(config.double_blocks):
        source_name, target = f"transformer_blocks.{index}", f"double_blocks.{index}"
        named |= _block(state, source_name, target, DOUBLE_NAMES, DOUBLE_SCALES)
    for index in range(config.single_blocks):
        source_name, target = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
        named |= _block(state, source_name, target, SINGLE_NAMES, SINGLE_SCALES)
    if state:
        raise ValueError(f"transformer tensors without a name: {', '.join(sorted(state))}")
    return named


def vae_tensors(source: State) -> State:
    """Diffusers' autoencoder state under the LDM autoencoder's names."""

    def up(match: re.Match[str]) -> str:
        return f"decoder.up.{VAE_LEVELS - 1 - int(match[1])}."

    rules: tuple[tuple[str, str], ...] = (
        (r"encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1."),
        (r"mid_block\.resnets\.0\.", "mid.block_1."),
        (r"mid_block\.resnets\.1\.", "mid.block_2."),
        (r"\.resnets\.(\d+)\.", r".block.\1."),
        (r"\.downsamplers\.0\.", ".downsample."),
        (r"\.upsamplers\.0\.", ".upsample."),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    )
    named = {}
    for name, tensor in source.items():
        target = re.sub(r"decoder\.up_blocks\.(\d+)\.", up, name)
        for pattern, replacement in rules:
            target = re.sub(pattern, replacement, target)
        named[target] = tensor
    return named


def _cast(state: State, prefix: str, matrices: torch.dtype, rest: torch.dtype) -> State:
    return {
        f"{prefix}{name}": tensor.to(matrices if tensor.ndim == 2 else rest).contiguous()
        for name, tensor in state.items()
    }


def description(config: FlowConfig, tokenizers: Tokenizers, shift: float) -> dict[str, object]:
    """Everything the tensors cannot tell."""
    return {
        "name": "fluxsplit demo (shapes)",
        "clip": {
            "num_attention_heads": 4,
            "eos_token_id": tokenizers.clip_eos,
            "hidden_act": "quick_gelu",
        },
        "t5": {"num_heads": 4, "d_kv": 24, "min_length": T5_LENGTH},
        "transformer": {
            "axes_dims_rope": list(config.axes_dims_rope),
            "rope_short_side_tokens": config.rope_short_side_tokens,
        },
        "vae": {
            "scaling_factor": SCALING_FACTOR,
            "shift_factor": SHIFT_FACTOR,
            "norm_num_groups": GROUPS,
        },
        "sampling": {"shift": shift, "shift_tokens": 64, "steps": 4},
        "lowercase": True,
    }


def export(work: Path, demo: Path, dtype: str, shift: float) -> str:
    """Write the demo model, or with `fp32` its unquantised twin into the work folder."""
    tokenizers = Tokenizers(demo / "tokenizers")
    model, config = load_flow(work)
    t5, clip = load_encoders(work, tokenizers)
    exact = dtype == "fp32"
    matrices = torch.float32 if exact else torch.float8_e4m3fn
    vector, text, image = (torch.float32,) * 3 if exact else (torch.bfloat16, torch.bfloat16, torch.float16)
    flow = transformer_tensors(model.state_dict(), config)
    tensors = _cast(flow, "model.diffusion_model.", matrices, vector)
    clip_state = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in clip.state_dict().items()
        if not name.endswith("position_ids")
    }
    tensors |= _cast(clip_state, "text_encoders.clip_l.transformer.", text, text)
    t5_state = {k: v for k, v in t5.state_dict().items() if k != "encoder.embed_tokens.weight"}
    tensors |= _cast(t5_state, "text_encoders.t5xxl.transformer.", text, text)
    tensors |= _cast(vae_tensors(load_vae(work).state_dict()), "vae.", image, image)
    path = work / "flux-demo-fp32.safetensors" if exact else demo / "flux-demo.safetensors"
    partial = path.with_suffix(".partial")
    metadata = {"fluxsplit.config": json.dumps(description(config, tokenizers, shift))}
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)
    return f"{path} {path.stat().st_size / 1e6:.2f} MB"
