"""Tiny weight files for the tests of light rooms: real headers, all values zero, written without torch."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1}
Shapes = dict[str, tuple[int, ...]]


def write(path: Path, shapes: Shapes, dtype: str = "BF16", metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file with tensors of these shapes; its data is a hole in the file."""
    table: dict[str, object] = {"__metadata__": metadata or {}}
    end = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path


def transformer(width: int = 4096, pooled: int = 768, dev: bool = False) -> Shapes:
    """The tensors of a BFL transformer by which it is told, and those that give its widths."""
    shapes = {
        "img_in.weight": (64, 64),
        "txt_in.weight": (64, width),
        "vector_in.in_layer.weight": (64, pooled),
        "double_blocks.0.img_attn.norm.key_norm.scale": (32,),
    }
    return shapes | ({"guidance_in.in_layer.weight": (64, 256)} if dev else {})


def t5(width: int = 4096) -> Shapes:
    """A T5 encoder."""
    return {
        "shared.weight": (10, width),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 2),
    }


def clip(width: int = 768) -> Shapes:
    """A CLIP text model."""
    return {"text_model.embeddings.position_embedding.weight": (77, width)}


def vae(channels: int = 16) -> Shapes:
    """A VAE decoder."""
    return {"decoder.conv_in.weight": (8, channels, 3, 3)}


def prefixed(**parts: Shapes) -> Shapes:
    """A ComfyUI all-in-one file of parts named transformer, t5, clip and vae."""
    prefixes = {
        "transformer": "model.diffusion_model.",
        "t5": "text_encoders.t5xxl.transformer.",
        "clip": "text_encoders.clip_l.transformer.",
        "vae": "vae.",
    }
    return {prefixes[kind] + name: shape for kind, shapes in parts.items() for name, shape in shapes.items()}


def all_in_one(dev: bool = False) -> Shapes:
    """A ComfyUI all-in-one file with every part."""
    return prefixed(transformer=transformer(dev=dev), t5=t5(), clip=clip(), vae=vae())


def tokenizers(folder: Path) -> Path:
    """A folder as `--tokenizers` takes it."""
    for name in ("t5xxl/tokenizer.json", "clip_l/vocab.json", "clip_l/merges.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder
