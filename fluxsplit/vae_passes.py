"""How a VAE goes over a picture in strips: its passes in order.

A VAE is a list of passes. Each reads one stored activation ("plane") row by row and writes another, so that only
planes and one strip's work are ever in memory, never a layer's temporaries at full size.

`strips` carries the passes out and `decode_plan` adds them up: one list for both, so that the plan cannot describe
another computation than the one that runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class VaeShape:
    """What the sizes of a VAE's layers follow from; the defaults are FLUX.1's."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    """Channels by level, the picture's own resolution first."""
    blocks: int = 2
    """Residual blocks for each level of the encoder; the decoder has one more."""
    groups: int = 32
    attention: bool = True
    latent_channels: int = 16

    @property
    def factor(self) -> int:
        """Pixels for one latent, each way."""
        return int(2 ** (len(self.widths) - 1))


@dataclass(frozen=True, slots=True)
class Pass:
    """One walk over a plane: normalise and activate, convolve, write or add."""

    kind: str
    """`conv` 3x3; `up` nearest 2x and 3x3; `down` 3x3 with stride 2; `attention`."""
    weights: str
    """Name of the layer in diffusers' vocabulary."""
    source: str
    target: str
    inputs: int
    outputs: int
    height: int
    """Rows of the source."""
    width: int
    norm: str = ""
    """GroupNorm and SiLU before the convolution (GroupNorm alone before the attention); empty for none."""
    adds: bool = False
    """The result is added to what the target holds: the end of a residual block."""
    shortcut: str = ""
    """A 1x1 convolution of the source, whose result the plane `x` holds afterwards."""
    last_use: bool = False
    """Nobody reads the source again, so that its rows are given back on the way."""
    measured: bool = False
    """Whoever reads the target next normalises it, so that its statistics are taken while it is written."""

    @property
    def out_height(self) -> int:
        """Rows of the target."""
        return {"up": self.height * 2, "down": self.height // 2}.get(self.kind, self.height)

    @property
    def out_width(self) -> int:
        """Columns of the target."""
        return {"up": self.width * 2, "down": self.width // 2}.get(self.kind, self.width)

    @property
    def operations(self) -> float:
        """Multiplications, for the progress bar."""
        if self.kind == "attention":
            return (4.0 * self.inputs + 2.0 * self.height * self.width) * self.inputs * self.height * self.width
        taps = {"up": 4, "conv": 9, "down": 9}[self.kind]
        each = self.inputs * self.outputs * (taps + bool(self.shortcut))
        return float(each * self.out_height * self.out_width)


def passes_of_decoder(shape: VaeShape, height: int, width: int) -> tuple[Pass, ...]:
    """The decoder's passes, from the plane `latents` [height, width, 16] to `image` (diffusers `vae.py`, Decoder)."""
    widest = shape.widths[-1]
    first = Pass("conv", "decoder.conv_in", "latents", "x", shape.latent_channels, widest, height, width)
    passes = [replace(first, last_use=True), *_mid(shape, "decoder", height, width)]
    inputs = widest
    for level, channels in enumerate(reversed(shape.widths)):
        block = f"decoder.up_blocks.{level}"
        for i in range(shape.blocks + 1):
            passes += _resnet(f"{block}.resnets.{i}", inputs, channels, height, width)
            inputs = channels
        if level < len(shape.widths) - 1:
            name = f"{block}.upsamplers.0.conv"
            passes.append(Pass("up", name, "x", "x", channels, channels, height, width, last_use=True))
            height, width = 2 * height, 2 * width
    last = Pass("conv", "decoder.conv_out", "x", "image", inputs, 3, height, width, "decoder.conv_norm_out")
    return _with_measures([*passes, replace(last, last_use=True)])


def passes_of_encoder(shape: VaeShape, height: int, width: int) -> tuple[Pass, ...]:
    """The encoder's passes, from the plane `image` [height, width, 3] to `moments` (diffusers `vae.py`, Encoder)."""
    inputs = shape.widths[0]
    first = Pass("conv", "encoder.conv_in", "image", "x", 3, inputs, height, width)
    passes = [replace(first, last_use=True)]
    for level, channels in enumerate(shape.widths):
        block = f"encoder.down_blocks.{level}"
        for i in range(shape.blocks):
            passes += _resnet(f"{block}.resnets.{i}", inputs, channels, height, width)
            inputs = channels
        if level < len(shape.widths) - 1:
            name = f"{block}.downsamplers.0.conv"
            passes.append(Pass("down", name, "x", "x", channels, channels, height, width, last_use=True))
            height, width = height // 2, width // 2
    moments = 2 * shape.latent_channels
    last = Pass("conv", "encoder.conv_out", "x", "moments", inputs, moments, height, width, "encoder.conv_norm_out")
    return _with_measures([*passes, *_mid(shape, "encoder", height, width), replace(last, last_use=True)])


def _mid(shape: VaeShape, side: str, height: int, width: int) -> Iterator[Pass]:
    """The middle: a residual block, the attention if there is one, a residual block."""
    channels = shape.widths[-1]
    yield from _resnet(f"{side}.mid_block.resnets.0", channels, channels, height, width)
    if shape.attention:
        name = f"{side}.mid_block.attentions.0"
        norm = f"{name}.group_norm"
        yield Pass("attention", name, "x", "x", channels, channels, height, width, norm, adds=True)
    yield from _resnet(f"{side}.mid_block.resnets.1", channels, channels, height, width)


def _resnet(name: str, inputs: int, outputs: int, height: int, width: int) -> tuple[Pass, Pass]:
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), x through a 1x1 convolution where the width changes."""
    shortcut = "" if inputs == outputs else f"{name}.conv_shortcut"
    first = Pass("conv", f"{name}.conv1", "x", "h", inputs, outputs, height, width, f"{name}.norm1")
    second = Pass("conv", f"{name}.conv2", "h", "x", outputs, outputs, height, width, f"{name}.norm2", adds=True)
    return replace(first, shortcut=shortcut, last_use=bool(shortcut)), replace(second, last_use=True)


def _with_measures(passes: list[Pass]) -> tuple[Pass, ...]:
    """Mark the passes whose result is normalised by whoever reads it next."""
    marked = []
    for i, one in enumerate(passes):
        readers = (later for later in passes[i + 1 :] if later.source == one.target)
        marked.append(replace(one, measured=bool(reader.norm) if (reader := next(readers, None)) else False))
    return tuple(marked)


def parameter_shapes(passes: Iterable[Pass]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter that the passes use."""
    shapes: dict[str, tuple[int, ...]] = {}
    for one in passes:
        layers: dict[str, tuple[int, ...]] = {one.norm: (one.inputs,)}
        if one.kind == "attention":
            parts = ("to_q", "to_k", "to_v", "to_out.0")
            layers |= {f"{one.weights}.{part}": (one.outputs, one.inputs) for part in parts}
        else:
            layers[one.weights] = (one.outputs, one.inputs, 3, 3)
            layers[one.shortcut] = (one.outputs, one.inputs, 1, 1)
        for layer, shape in layers.items():
            if layer:
                shapes |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
    return shapes
