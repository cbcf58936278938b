"""Makes weight files with random values in the true layouts and, if asked, at the true size.

    python scripts/synthetic_checkpoint.py schnell-fp8.safetensors              # 11.9 GB, transformer only
    python scripts/synthetic_checkpoint.py aio.safetensors --all-in-one         # 17 GB with T5, CLIP and VAE
    python scripts/synthetic_checkpoint.py short.safetensors --depth 2+4        # 1.3 GB, full width
    python scripts/synthetic_checkpoint.py tiny.safetensors --tiny --dtype bf16

What loading, streaming and memory tests need is the shape of the real thing; published weights are not needed for
that. Values are normal with a spread of 1 / sqrt(inputs), so that activations stay in range.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

Shapes = dict[str, tuple[int, ...]]
DTYPES = {
    "fp32": ("F32", torch.float32),
    "fp16": ("F16", torch.float16),
    "bf16": ("BF16", torch.bfloat16),
    "e4m3": ("F8_E4M3", torch.float8_e4m3fn),
    "e5m2": ("F8_E5M2", torch.float8_e5m2),
}
POOL_VALUES = 1 << 24


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Everything that the sizes of a Flux.1 model's tensors follow from; the defaults are the real ones."""

    hidden: int = 3072
    head: int = 128
    double_blocks: int = 19
    single_blocks: int = 38
    channels: int = 64
    context: int = 4096
    pooled: int = 768
    t5_vocabulary: int = 32128
    t5_blocks: int = 24
    t5_heads: int = 64
    t5_inner: int = 4096
    t5_ff: int = 10240
    clip_vocabulary: int = 49408
    clip_positions: int = 77
    clip_blocks: int = 12
    clip_ff: int = 3072
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)
    vae_blocks: int = 2
    dev: bool = False


TINY = Dimensions(
    hidden=64, head=32, double_blocks=2, single_blocks=3, context=48, pooled=24,
    t5_vocabulary=32128, t5_blocks=2, t5_heads=3, t5_inner=24, t5_ff=40,
    clip_vocabulary=49408, clip_blocks=2, clip_ff=32, vae_widths=(32, 32, 64, 64), vae_blocks=1,
)  # fmt: skip


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def flux_shapes(d: Dimensions) -> Shapes:
    """Tensors of a transformer in BFL's names (black-forest-labs/flux `src/flux/model.py`, `modules/layers.py`)."""
    h = d.hidden
    shapes = {**_linear("img_in", h, d.channels), **_linear("txt_in", h, d.context)}
    embedders = {"time_in": 256, "vector_in": d.pooled, **({"guidance_in": 256} if d.dev else {})}
    for name, width in embedders.items():
        shapes |= _linear(f"{name}.in_layer", h, width) | _linear(f"{name}.out_layer", h, h)
    for i in range(d.double_blocks):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= _linear(f"{block}_attn.qkv", 3 * h, h) | _linear(f"{block}_attn.proj", h, h)
            shapes |= {f"{block}_attn.norm.{n}_norm.scale": (d.head,) for n in ("query", "key")}
            shapes |= _linear(f"{block}_mlp.0", 4 * h, h) | _linear(f"{block}_mlp.2", h, 4 * h)
            shapes |= _linear(f"{block}_mod.lin", 6 * h, h)
    for i in range(d.single_blocks):
        block = f"single_blocks.{i}"
        shapes |= _linear(f"{block}.linear1", 7 * h, h) | _linear(f"{block}.linear2", h, 5 * h)
        shapes |= {f"{block}.norm.{n}_norm.scale": (d.head,) for n in ("query", "key")}
        shapes |= _linear(f"{block}.modulation.lin", 3 * h, h)
    shapes |= _linear("final_layer.linear", d.channels, h) | _linear("final_layer.adaLN_modulation.1", 2 * h, h)
    return shapes


def t5_shapes(d: Dimensions) -> Shapes:
    """Tensors of a T5 encoder in transformers' names."""
    shapes: Shapes = {"shared.weight": (d.t5_vocabulary, d.context)}
    for i in range(d.t5_blocks):
        attention, ff = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{n}.weight": (d.t5_inner, d.context) for n in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (d.context, d.t5_inner)
        if i == 0:
            shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (32, d.t5_heads)
        shapes |= {f"{ff}.DenseReluDense.{n}.weight": (d.t5_ff, d.context) for n in ("wi_0", "wi_1")}
        shapes[f"{ff}.DenseReluDense.wo.weight"] = (d.context, d.t5_ff)
        shapes |= {f"{layer}.layer_norm.weight": (d.context,) for layer in (attention, ff)}
    return shapes | {"encoder.final_layer_norm.weight": (d.context,)}


def clip_shapes(d: Dimensions) -> Shapes:
    """Tensors of a CLIP text model in transformers' names before 5.6, which are those of ComfyUI's files."""
    width = d.pooled
    shapes: Shapes = {
        "text_model.embeddings.token_embedding.weight": (d.clip_vocabulary, width),
        "text_model.embeddings.position_embedding.weight": (d.clip_positions, width),
    }
    for i in range(d.clip_blocks):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", width, width)
        shapes |= _linear(f"{layer}.mlp.fc1", d.clip_ff, width) | _linear(f"{layer}.mlp.fc2", width, d.clip_ff)
        shapes |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
    return shapes | _norm("text_model.final_layer_norm", width)


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _conv(name: str, outputs: int, inputs: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def _resnet(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", inputs) | _conv(f"{name}.conv1", outputs, inputs)
    shapes |= _norm(f"{name}.norm2", outputs) | _conv(f"{name}.conv2", outputs, outputs)
    return shapes | (_conv(f"{name}.nin_shortcut", outputs, inputs, 1) if inputs != outputs else {})


def _mid(name: str, width: int) -> Shapes:
    shapes = _resnet(f"{name}.block_1", width, width) | _resnet(f"{name}.block_2", width, width)
    shapes |= _norm(f"{name}.attn_1.norm", width)
    for leaf in ("q", "k", "v", "proj_out"):
        shapes |= _conv(f"{name}.attn_1.{leaf}", width, width, 1)
    return shapes


def vae_shapes(d: Dimensions) -> Shapes:
    """Tensors of a VAE in BFL's names (black-forest-labs/flux `src/flux/modules/autoencoder.py`)."""
    widths = d.vae_widths
    shapes = _conv("encoder.conv_in", widths[0], 3) | _mid("encoder.mid", widths[-1])
    shapes |= _norm("encoder.norm_out", widths[-1]) | _conv("encoder.conv_out", 32, widths[-1])
    inputs = widths[0]
    for level, width in enumerate(widths):
        for i in range(d.vae_blocks):
            shapes |= _resnet(f"encoder.down.{level}.block.{i}", inputs, width)
            inputs = width
        if level < len(widths) - 1:
            shapes |= _conv(f"encoder.down.{level}.downsample.conv", width, width)
    shapes |= _conv("decoder.conv_in", widths[-1], 16) | _mid("decoder.mid", widths[-1])
    shapes |= _norm("decoder.norm_out", widths[0]) | _conv("decoder.conv_out", 3, widths[0])
    inputs = widths[-1]
    for level in reversed(range(len(widths))):
        for i in range(d.vae_blocks + 1):
            shapes |= _resnet(f"decoder.up.{level}.block.{i}", inputs, widths[level])
            inputs = widths[level]
        if level:
            shapes |= _conv(f"decoder.up.{level}.upsample.conv", widths[level], widths[level])
    return shapes


PREFIXES = {
    "transformer": "model.diffusion_model.",
    "t5": "text_encoders.t5xxl.transformer.",
    "clip": "text_encoders.clip_l.transformer.",
    "vae": "vae.",
}
SHAPES = {"transformer": flux_shapes, "t5": t5_shapes, "clip": clip_shapes, "vae": vae_shapes}


class Values:
    """Endless normal values, drawn once per spread and dtype and read round a pool."""

    def __init__(self, seed: int, pool_values: int = POOL_VALUES) -> None:
        self._pool = torch.randn(pool_values, generator=torch.Generator().manual_seed(seed))
        self._cast: dict[tuple[float, torch.dtype], torch.Tensor] = {}
        self._at = 0

    def chunks(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[bytes]:
        """The bytes of one tensor, piece by piece."""
        left = math.prod(shape)
        if len(shape) == 1:  # norms near 1, biases near 0
            centre = 0.0 if name.endswith("bias") else 1.0
            self._at = 0 if self._at + left > len(self._pool) else self._at
            values = centre + 0.02 * self._pool[self._at : self._at + left]
            self._at += left
            yield values.to(dtype).view(torch.uint8).numpy().tobytes()
            return
        spread = 0.02 if "embed" in name or "shared" in name else 1 / math.sqrt(math.prod(shape[1:]))
        pool = self._cast.setdefault((spread, dtype), (self._pool * spread).to(dtype).view(torch.uint8))
        size = dtype.itemsize
        while left:
            self._at %= len(self._pool)
            count = min(left, len(self._pool) - self._at)
            yield pool[self._at * size : (self._at + count) * size].numpy().tobytes()
            self._at += count
            left -= count


def write(path: Path, shapes: Shapes, dtype: str, metadata: dict[str, str] | None = None, seed: int = 0) -> None:
    """Write a safetensors file of random tensors; matrices in `dtype`, the rest too unless that is float8 (bf16)."""
    code, torch_dtype = DTYPES[dtype]
    plain = ("BF16", torch.bfloat16) if torch_dtype.itemsize == 1 else (code, torch_dtype)
    kinds = {name: (code, torch_dtype) if len(shape) == 2 else plain for name, shape in shapes.items()}
    small = sum(math.prod(shape) for shape in shapes.values()) < POOL_VALUES
    values = Values(seed, POOL_VALUES if not small else 1 << 16)
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name in sorted(shapes):
        size = math.prod(shapes[name]) * kinds[name][1].itemsize
        header[name] = {"dtype": kinds[name][0], "shape": shapes[name], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(shapes):
            file.writelines(values.chunks(name, shapes[name], kinds[name][1]))


def all_in_one_shapes(d: Dimensions, parts: Iterable[str] = PREFIXES) -> Shapes:
    """Tensors of a ComfyUI all-in-one file."""
    return {PREFIXES[part] + name: shape for part in parts for name, shape in SHAPES[part](d).items()}


def depth(text: str) -> tuple[int, int]:
    """Numbers of double and single blocks in `2+4`."""
    doubles, _, singles = text.partition("+")
    if not (doubles.isdigit() and singles.isdigit() and int(doubles) and int(singles)):
        raise argparse.ArgumentTypeError(f"{text!r} is not written as 2+4")
    return int(doubles), int(singles)


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--all-in-one", action="store_true", help="with T5, CLIP and VAE, under ComfyUI's prefixes")
    parser.add_argument("--part", choices=list(SHAPES), default="transformer")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--depth", type=depth, help="transformer blocks, as 2+4: double + single; 19+38 is Flux.1")
    parser.add_argument("--dev", action="store_true", help="with the guidance embedder")
    parser.add_argument("--dtype", choices=list(DTYPES), default="e4m3")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    base = TINY if args.tiny else Dimensions()
    doubles, singles = args.depth or (base.double_blocks, base.single_blocks)
    dimensions = replace(base, dev=args.dev, double_blocks=doubles, single_blocks=singles)
    shapes = all_in_one_shapes(dimensions) if args.all_in_one else SHAPES[args.part](dimensions)
    config = {"clip": {"num_attention_heads": 2}, "transformer": {"axes_dims_rope": [8, 12, 12]}}
    write(args.path, shapes, args.dtype, {"fluxsplit.config": json.dumps(config)} if args.tiny else None, args.seed)
    print(f"{args.path}: {args.path.stat().st_size:,} bytes, {len(shapes)} tensors")


if __name__ == "__main__":
    main()
