"""Names of weights in the layouts found in the wild, mapped to the names of diffusers' and transformers' modules.

One vocabulary is used everywhere else: diffusers' for the transformer and the VAE, transformers' for T5 and
CLIP. A foreign name maps to one or more parameters, each of which is the whole tensor or a run of its rows:
Black Forest Labs fuse q, k and v (and in single blocks the MLP too) into one matrix, row-major, so each part is a
contiguous view. Conventions: black-forest-labs/flux `src/flux/model.py` and `modules/layers.py`;
CompVis' autoencoder (`modules/autoencoder.py`); diffusers `loaders/single_file_utils.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """One parameter that a foreign tensor fills: its name and, for a fused tensor, which rows.

    `rows` are in units of the transformer's hidden size; None means every row. `swap_halves`: the two halves of the
    rows are exchanged.
    """

    name: str
    rows: tuple[int, int] | None = None
    swap_halves: bool = False


_EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_DOUBLE_FUSED = {
    "img_attn.qkv": (("attn.to_q", (0, 1)), ("attn.to_k", (1, 2)), ("attn.to_v", (2, 3))),
    "txt_attn.qkv": (("attn.add_q_proj", (0, 1)), ("attn.add_k_proj", (1, 2)), ("attn.add_v_proj", (2, 3))),
}
_SINGLE = {
    "modulation.lin": "norm.linear",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
    "linear2": "proj_out",
}
_SINGLE_FUSED = {
    "linear1": (("attn.to_q", (0, 1)), ("attn.to_k", (1, 2)), ("attn.to_v", (2, 3)), ("proj_mlp", (3, 7))),
}


def _leaf(name: str) -> tuple[str, str]:
    """Split `a.b.weight` into `a.b` and `weight`; BFL calls the weight of an RMS norm `scale`."""
    stem, _, leaf = name.rpartition(".")
    return stem, "weight" if leaf == "scale" else leaf


def transformer_targets(name: str) -> tuple[Target, ...]:
    """The parameters of diffusers' FluxTransformer2DModel that BFL's tensor `name` fills; empty if unknown."""
    stem, leaf = _leaf(name)
    if leaf not in ("weight", "bias"):
        return ()
    if stem in _EMBEDDERS:
        return (Target(f"{_EMBEDDERS[stem]}.{leaf}"),)
    if stem == "final_layer.adaLN_modulation.1":
        # BFL stores (shift, scale), diffusers' AdaLayerNormContinuous wants (scale, shift).
        return (Target(f"norm_out.linear.{leaf}", swap_halves=True),)
    match = re.fullmatch(r"(double|single)_blocks\.(\d{1,4})\.(.+)", stem)
    if not match:
        return ()
    kind, index, rest = match.groups()
    return _block_targets(kind, index, rest, leaf)


def _block_targets(kind: str, index: str, rest: str, leaf: str) -> tuple[Target, ...]:
    block = f"transformer_blocks.{index}" if kind == "double" else f"single_transformer_blocks.{index}"
    plain, fused = (_DOUBLE, _DOUBLE_FUSED) if kind == "double" else (_SINGLE, _SINGLE_FUSED)
    if rest in plain:
        return (Target(f"{block}.{plain[rest]}.{leaf}"),)
    return tuple(Target(f"{block}.{part}.{leaf}", rows) for part, rows in fused.get(rest, ()))


_VAE_RULES = (
    (r"\.down\.(\d)\.block\.(\d)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d)\.downsample\.conv\.", r".down_blocks.\1.downsamplers.0.conv."),
    (r"\.up\.(\d)\.upsample\.conv\.", r".up.\1.upsamplers.0.conv."),
    (r"\.up\.(\d)\.block\.(\d)\.", r".up.\1.resnets.\2."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
)


def vae_target(name: str, levels: int) -> str:
    """diffusers' AutoencoderKL name of CompVis' VAE tensor `name`, for a VAE of `levels` resolutions.

    The decoder's levels are numbered from the picture in the one and from the latent in the other.
    """
    for pattern, replacement in _VAE_RULES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"\.up\.(\d)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", name)
