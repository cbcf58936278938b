"""Weight files that are not float Flux.1, told by their keys so that the message can name them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from fluxsplit.errors import FluxsplitError

_HINT = "use a FLUX.1 schnell or dev file in fp8 (e4m3fn or e5m2), fp16, bf16 or fp32"

# Part of a key → what the model is. The first that matches names it.
_FOREIGN = (
    ("distilled_guidance_layer.", "Chroma"),
    ("double_stream_modulation_img.", "FLUX.2"),
    ("txt_in.individual_token_refiner.", "HunyuanVideo"),
    ("joint_blocks.0.", "Stable Diffusion 3"),
    ("input_blocks.0.", "Stable Diffusion 1, 2 or XL"),
    ("down_blocks.0.resnets.0.time_emb_proj.", "Stable Diffusion 1, 2 or XL"),
    ("cap_embedder.", "Lumina or Z-Image"),
    ("img_in.proj.", "HunyuanVideo"),
    ("transformer_blocks.0.attn.add_k_proj.lora", "a LoRA"),
    ("lora_unet_", "a LoRA"),
    (".lora_", "a LoRA"),
    ("controlnet_", "a ControlNet"),
    ("text_encoders.gemma", "a model with a Gemma text encoder"),
    ("blocks.0.cross_attn.", "Wan or Cosmos"),
)
# End or part of a key → the quantisation it belongs to.
_QUANTISATIONS = (
    (".quant_state.bitsandbytes__nf4", "bitsandbytes NF4"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes FP4"),
    (".absmax", "bitsandbytes NF4"),
    (".quant_map", "bitsandbytes NF4"),
    (".weight_scale_2", "nvfp4"),
    (".pre_quant_scale", "nvfp4"),
    (".qweight", "SVDQuant, AWQ or GPTQ int4"),
    (".wscales", "SVDQuant int4 (Nunchaku)"),
    (".SCB", "bitsandbytes int8"),
)


def refuse_quantisation(path: str | Path, name: str, dtype: str) -> None:
    """Raise FluxsplitError if tensor `name` belongs to a quantisation that is not plain or scaled float8."""
    for mark, what in _QUANTISATIONS:
        if mark in name:
            raise FluxsplitError(f"{Path(path).name} is quantised as {what} ({name}), which is not supported", _HINT)
    if dtype in ("I8", "U8", "F4", "F8_E8M0", "I32"):
        raise FluxsplitError(f"{Path(path).name} stores {name} as {dtype}, a quantisation that is not supported", _HINT)


def refuse_foreign(path: str | Path, names: Iterable[str]) -> NoReturn:
    """Raise FluxsplitError that says which model the keys belong to, as far as they tell."""
    keys, name = sorted(names), Path(path).absolute().name
    for mark, what in _QUANTISATIONS:
        if any(mark in key for key in keys):
            raise FluxsplitError(f"{name} is quantised as {what}, which is not supported", _HINT)
    for mark, what in _FOREIGN:
        if any(mark in key for key in keys):
            raise FluxsplitError(f"{name} is {what}, not FLUX.1", _HINT)
    shown = ", ".join(keys[:3]) or "none"
    raise FluxsplitError(f"{name} is not a FLUX.1 weight file; its first tensors are {shown}", _HINT)
