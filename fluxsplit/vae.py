"""A VAE's weights, and pictures from latents and latents from pictures with them, in strips or in tiles.

Weights stay in the mapped file; a pass over the picture expands those of its one layer and drops them again, so that
the VAE costs no memory of its own and any dtype can be computed in without loading anything twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fluxsplit import fp8
from fluxsplit.checkpoint import Part
from fluxsplit.decode_plan import VaePlan
from fluxsplit.device import DTYPES, exact_fp32
from fluxsplit.errors import FluxsplitError
from fluxsplit.group_norm import NotFinite
from fluxsplit.strips import Sink, Strips
from fluxsplit.vae_passes import Pass, VaeShape, parameter_shapes, passes_of_decoder, passes_of_encoder
from fluxsplit.weights import WeightFiles

LATENT_CHANNELS = 16
NORM_GROUPS = 32

Advance = Callable[[float], None]


def _no_news(share: float) -> None:
    """Nobody wants to know how far it is."""


@dataclass(frozen=True, slots=True)
class Vae:
    """The weights of an AutoencoderKL, checked."""

    part: Part
    files: WeightFiles
    shape: VaeShape
    device: torch.device

    def parameter(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A parameter on the device in `dtype`; raises FluxsplitError where it is not finite."""
        source = self.part.sources[name]
        stored, scale = self.files.stored(source).to(self.device), self.files.scale(source) or 1.0
        is_float8 = stored.dtype in fp8.FLOAT8
        damaged = is_float8 and fp8.has_nonfinite(stored)
        value = fp8.expand(stored, dtype, scale) if is_float8 else stored.to(dtype)
        if damaged or not bool(value.isfinite().all()):  # too large for 16 bits, or NaN in fp32 too
            kind = FluxsplitError if damaged or dtype == torch.float32 else NotFinite
            raise kind(f"the VAE's {name} holds NaN or infinity", "the file is damaged; download it again")
        return value if is_float8 or scale == 1.0 else value * scale

    def decoder_passes(self, height: int, width: int) -> tuple[Pass, ...]:
        """Passes that decode latents of this height and width."""
        return passes_of_decoder(self.shape, height, width)

    def encoder_passes(self, height: int, width: int) -> tuple[Pass, ...]:
        """Passes that encode a picture of this height and width in pixels."""
        return passes_of_encoder(self.shape, height, width)

    @torch.inference_mode()
    def decode_rows(
        self, latents: torch.Tensor, plan: VaePlan, sink: Sink, advance: Advance = _no_news, folder: str = ""
    ) -> None:
        """VAE-space latents [1, 16, h, w] → rows [n, 8 w, 3] of the picture in -1..1, top down, to `sink`.

        Raises NotFinite.
        """
        dtype = DTYPES[plan.dtype]
        latents = latents.to(self.device, dtype)
        if "post_quant_conv.weight" in self.part.sources:
            latents = self._pointwise("post_quant_conv", latents, dtype)
        self._run(
            "latents", latents[0].permute(1, 2, 0), self.decoder_passes(*latents.shape[2:]), plan, sink, advance, folder
        )

    def decode(
        self, latents: torch.Tensor, plan: VaePlan, advance: Advance = _no_news, folder: str = ""
    ) -> torch.Tensor:
        """VAE-space latents [1, 16, h, w] → RGB [8 h, 8 w, 3], uint8 on the CPU.

        Rounded down, as ComfyUI writes PNGs (`nodes.py`, SaveImage). Raises NotFinite, never returns a black picture.
        """
        height, width = (side * self.shape.factor for side in latents.shape[2:])
        picture = torch.empty((height, width, 3), dtype=torch.uint8)

        def keep(start: int, rows: torch.Tensor) -> None:
            picture[start : start + len(rows)].copy_(levels(rows))

        self.decode_rows(latents, plan, keep, advance, folder)
        return picture

    @torch.inference_mode()
    def encode(
        self, pixels: torch.Tensor, plan: VaePlan, advance: Advance = _no_news, folder: str = ""
    ) -> torch.Tensor:
        """RGB [8 h, 8 w, 3] uint8 → VAE-space latents [1, 16, h, w] fp32 on the CPU: the mean of the distribution.

        The mean and not a sample, so that the same picture always gives the same latents, as in ComfyUI's VAEEncode.
        Raises NotFinite.
        """
        dtype = DTYPES[plan.dtype]
        passes = self.encoder_passes(*pixels.shape[:2])
        moments = torch.empty((passes[-1].out_height, passes[-1].out_width, passes[-1].outputs), device=self.device)

        def keep(start: int, rows: torch.Tensor) -> None:
            moments[start : start + len(rows)].copy_(rows)

        self._run("image", pixels, passes, plan, keep, advance, folder)
        planar = moments.permute(2, 0, 1)[None]
        if "quant_conv.weight" in self.part.sources:
            planar = self._pointwise("quant_conv", planar.to(dtype), dtype).float()
        return finite(planar[:, : self.shape.latent_channels]).cpu().contiguous()

    def _run(
        self,
        name: str,
        rows: torch.Tensor,
        passes: tuple[Pass, ...],
        plan: VaePlan,
        sink: Sink,
        advance: Advance,
        folder: str,
    ) -> None:
        """Carry out passes over what is in the plane `name` at first, [H, W, C]; uint8 becomes -1..1."""
        dtype = DTYPES[plan.dtype]

        def layer(name: str) -> torch.Tensor:
            return self.parameter(name, dtype)

        with contextlib.closing(Strips(plan, dtype, self.device, self.shape.groups, layer, folder)) as strips:
            plane = strips.plane(*rows.shape)
            for start, piece in plane.pieces(0, len(rows)):
                part = rows[start : start + len(piece)]
                piece.copy_(part.float() / 127.5 - 1 if part.dtype == torch.uint8 else part)
            strips.take(name, plane, None)
            strips.run(passes, sink, advance)

    def _pointwise(self, layer: str, planar: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight, bias = (self.parameter(f"{layer}.{leaf}", dtype) for leaf in ("weight", "bias"))
        return F.conv2d(planar, weight, bias)


def load_vae(part: Part, files: WeightFiles, device: torch.device) -> Vae:
    """The VAE in `part`; raises FluxsplitError where its parameters are not those of a 16-channel AutoencoderKL."""
    exact_fp32()
    for path in {source.path for source in part.sources.values()}:
        files.open(path)  # now, so that what is done to it from now on is noticed
    shape = _shape(part)
    wanted = parameter_shapes((*passes_of_decoder(shape, 8, 8), *passes_of_encoder(shape, 64, 64)))
    channels = shape.latent_channels
    for name, count in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if f"{name}.weight" in part.sources:
            wanted |= {f"{name}.weight": (count, count, 1, 1), f"{name}.bias": (count,)}
    missing, extra = sorted(wanted.keys() - part.sources.keys()), sorted(part.sources.keys() - wanted.keys())
    for what, names in (("missing", missing), ("left over", extra)):
        if names:
            raise FluxsplitError(
                f"the VAE's weights do not fill the model: {len(names)} {what} ({', '.join(names[:3])})",
                "the file is incomplete or of another model",
            )
    for name, sides in wanted.items():
        if _significant(part.shape(name)) != _significant(sides):
            raise FluxsplitError(f"the VAE's {name} is {list(part.shape(name))}, expected {list(sides)}")
    return Vae(part, files, shape, device)


def levels(rows: torch.Tensor) -> torch.Tensor:
    """Values in -1..1 → 0..255 in uint8, rounded down; raises NotFinite."""
    return ((finite(rows.float()) + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8)


def finite(values: torch.Tensor) -> torch.Tensor:
    """The values; raises NotFinite where one is NaN or infinite."""
    if not bool(values.isfinite().all()):
        raise NotFinite("the VAE's result holds NaN or infinity")
    return values


def _shape(part: Part) -> VaeShape:
    channels = part.shape("decoder.conv_in.weight")[1]
    if channels != LATENT_CHANNELS:
        raise FluxsplitError(f"this VAE has {channels} latent channels, Flux's has {LATENT_CHANNELS}")
    levels = part.count("encoder.down_blocks.%d.")
    widths = tuple(part.shape(f"encoder.down_blocks.{i}.resnets.0.conv2.weight")[0] for i in range(levels))
    groups = int(part.config.get("norm_num_groups", NORM_GROUPS))
    if not widths or groups < 1 or any(width % groups for width in widths):
        raise FluxsplitError(f"this VAE's widths {list(widths)} do not divide into {groups} groups")
    attention = "decoder.mid_block.attentions.0.to_q.weight" in part.sources
    return VaeShape(widths, part.count("encoder.down_blocks.0.resnets.%d."), groups, attention, channels)


def _significant(shape: tuple[int, ...]) -> tuple[int, ...]:
    """1x1 convolutions may stand for matrices: trailing sides of 1 do not count."""
    sides = list(shape)
    while sides and sides[-1] == 1:
        sides.pop()
    return tuple(sides)
