"""Flux: diffusers' modules built on the meta device, filled from the file, and one forward of them.

The modules are diffusers'; the forward over them is ours, for three reasons. The timestep is embedded from its
fp32 value, as ComfyUI does, where diffusers rounds it to the compute dtype first. Odd latents are padded round
and cropped. And the order in which blocks are brought in belongs to whoever loads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fluxsplit.attention import rotations, use_attention
from fluxsplit.blocks import through_double, through_single
from fluxsplit.checkpoint import Part, variant_of
from fluxsplit.conditioning import Conditioning
from fluxsplit.diffusers_models import FluxTransformer2DModel, FluxTransformerBlock
from fluxsplit.errors import FluxsplitError
from fluxsplit.held_memory import CPU_PIECE_BYTES
from fluxsplit.loading import EveryBlockThere, Loader
from fluxsplit.modulation import Modulations, Rows
from fluxsplit.modulation import key as time_key
from fluxsplit.stored_layers import fill
from fluxsplit.weights import WeightFiles

PATCH = 2
LATENT_CHANNELS = 16
FLUX_AXES = (16, 56, 56)
"""RoPE dimensions of (unused, row, column) in Flux.1, for heads of 128 (BFL `src/flux/util.py`)."""
_CHANNELS = {384: "FLUX.1 Fill", 128: "FLUX.1 Depth or Canny (control)"}


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """One forward of the transformer."""

    latents: torch.Tensor
    """[1, 16, h, w], model space, any float dtype and device."""
    sigma: float
    """0..1."""
    conditioning: Conditioning
    guidance: float | None
    """For dev; None for schnell."""


@dataclass(slots=True, eq=False)
class _Stream:
    """One forward on its way through the blocks."""

    image: torch.Tensor  # [1, N, D]
    text: torch.Tensor  # [1, T, D]
    temb: torch.Tensor  # [1, D]
    rope: torch.Tensor  # complex64 [T + N, head / 2]
    grid: tuple[int, int]  # rows and columns of tokens
    latent_size: tuple[int, int]  # height and width before padding
    modulations: list[Rows] | None  # of every block, where they were computed before
    joined: torch.Tensor | None = None  # [1, T + N, D], where both are one

    def through(self, block: torch.nn.Module) -> None:
        """Text and image stay apart in double blocks, and are two views of one tensor from the first single one on."""
        if isinstance(block, FluxTransformerBlock):
            through_double(block, self.image, self.text, self.temb, self.rope)
            return
        if self.joined is None:
            tokens, self.joined = self.text.shape[1], torch.cat([self.text, self.image], dim=1)
            self.text, self.image = self.joined[:, :tokens], self.joined[:, tokens:]
        through_single(block, self.joined, self.temb, self.rope)

    def is_finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in (self.image, self.text, self.temb))


class Flux:
    """A Flux.1 transformer with its weights, predicting the velocity of a latent."""

    def __init__(self, part: Part, files: WeightFiles, dtype: torch.dtype, device: torch.device) -> None:
        """Build from `part` (kind `transformer`); raises FluxsplitError unless it is a text-to-image Flux.1."""
        self.dtype, self.device = dtype, device
        self.variant = variant_of(part)
        self._short_side_tokens = int(part.config.get("rope_short_side_tokens", 0))
        with torch.device("meta"):
            self.module = FluxTransformer2DModel(**_dimensions(part))
        fill(self.module, part, files, dtype, device, CPU_PIECE_BYTES if device.type == "cpu" else None)
        use_attention(self.module, None)
        self.blocks = (*self.module.transformer_blocks, *self.module.single_transformer_blocks)
        self.modulations = Modulations(self.blocks)
        self.loader: Loader = EveryBlockThere()

    def is_prepared(self, times: Iterable[tuple[float, float | None, torch.Tensor]]) -> bool:
        """Whether `prepare` would have nothing to compute for these."""
        return self.modulations.knows(time_key(*time) for time in times)

    @torch.inference_mode()
    def prepare(self, times: Iterable[tuple[float, float | None, torch.Tensor]], loader: Loader) -> None:
        """Compute the modulations of forwards to come, given by sigma, guidance and pooled text [1, 768].

        `loader` brings in `modulations.matrices`. A forward that was not prepared computes its own.
        """
        different = {time_key(*time): time for time in times}
        self.modulations.compute({key: self._embed_time(*time) for key, time in different.items()}, loader)

    @torch.inference_mode()
    def velocities(self, forwards: Sequence[Forward]) -> list[torch.Tensor]:
        """For each forward noise - image as predicted, fp32 [1, 16, h, w] on the device, in one pass over the blocks.

        Every block is applied to each in turn, a batch of one, before the next block is brought in.
        """
        streams = [self._begin(forward) for forward in forwards]
        for number in range(len(self.blocks)):
            with self.loader.brought_in(number):
                for stream in streams:
                    self._through(stream, number)
        return [self._end(stream) for stream in streams]

    @torch.inference_mode()
    def first_nonfinite(self, forward: Forward) -> str:
        """The first place where a forward holds NaN or infinity, for people; empty where it does nowhere."""
        stream = self._begin(forward)
        if not stream.is_finite():
            return "the embedding of latent, text or timestep"
        doubles, place = len(self.module.transformer_blocks), ""
        for number in range(len(self.blocks)):  # to the end, as whoever brings them in counts on it
            with self.loader.brought_in(number):
                self._through(stream, number)
            if not place and not stream.is_finite():
                kind, index = ("double", number) if number < doubles else ("single", number - doubles)
                place = f"{kind} block {index}"
        return place or ("" if bool(self._end(stream).isfinite().all()) else "the final layer")

    def _begin(self, forward: Forward) -> _Stream:
        """Odd sides are padded round to even and the result is cropped (ComfyUI `comfy/ldm/flux/model.py`)."""
        height, width = forward.latents.shape[-2:]
        padded = F.pad(forward.latents, (0, width % PATCH, 0, height % PATCH), mode="circular")
        module = self.module
        image = module.x_embedder(pack(padded).to(self.device, self.dtype))
        text = module.context_embedder(forward.conditioning.t5.to(self.device, self.dtype))
        temb = self._embed_time(forward.sigma, forward.guidance, forward.conditioning.pooled)
        rows, columns = padded.shape[-2] // PATCH, padded.shape[-1] // PATCH
        rope = rotations(*module.pos_embed(self._ids(text.shape[1], rows, columns)))
        known = self.modulations.of(time_key(forward.sigma, forward.guidance, forward.conditioning.pooled), self.device)
        return _Stream(image, text, temb, rope, (rows, columns), (height, width), known)

    def _through(self, stream: _Stream, number: int) -> None:
        self.modulations.give(number, None if stream.modulations is None else stream.modulations[number])
        stream.through(self.blocks[number])

    def _end(self, stream: _Stream) -> torch.Tensor:
        output = self.module.proj_out(self.module.norm_out(stream.image, stream.temb))  # [1, N, 64]
        height, width = stream.latent_size
        return unpack(output.float(), *stream.grid)[..., :height, :width]

    def _embed_time(self, sigma: float, guidance: float | None, pooled: torch.Tensor) -> torch.Tensor:
        embed = self.module.time_text_embed
        timestep = torch.tensor([sigma], dtype=torch.float32, device=self.device) * 1000
        temb = embed.timestep_embedder(embed.time_proj(timestep).to(self.dtype))
        if self.variant == "dev" and guidance is not None:
            # ComfyUI rounds the guidance to the compute dtype before it multiplies: 3.5 is 3504 in bf16.
            scaled = torch.tensor([guidance], dtype=self.dtype, device=self.device) * 1000
            temb = temb + embed.guidance_embedder(embed.time_proj(scaled).to(self.dtype))
        with_text: torch.Tensor = temb + embed.text_embedder(pooled.to(self.device, self.dtype))
        return with_text

    def _ids(self, text_tokens: int, rows: int, columns: int) -> torch.Tensor:
        """Position of every token [T + N, 3] as (0, row, column); text tokens all sit at 0 (BFL `sampling.py`).

        A model trained with position interpolation (Chen et al., arXiv 2306.15595) has the shorter side span the
        same range at every size; Flux itself counts tokens.
        """
        step = self._short_side_tokens / min(rows, columns) if self._short_side_tokens else 1.0
        ids = torch.zeros(text_tokens + rows * columns, 3, device=self.device)
        grid = torch.arange(rows * columns, device=self.device)
        ids[text_tokens:, 1] = (grid // columns) * step
        ids[text_tokens:, 2] = (grid % columns) * step
        return ids


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents [1, C, h, w] → tokens [1, h/2 * w/2, C * 4], channel slowest (BFL `sampling.py`)."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Tokens [1, rows * columns, C * 4] → latents [1, C, 2 * rows, 2 * columns]; undoes `pack`."""
    patches = tokens.view(tokens.shape[0], rows, columns, -1, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, rows * PATCH, columns * PATCH)


def _dimensions(part: Part) -> dict[str, object]:
    """FluxTransformer2DModel's arguments, read from the tensors' shapes and, for RoPE, from the config."""
    hidden, channels = part.shape("x_embedder.weight")[:2]
    if channels != LATENT_CHANNELS * PATCH * PATCH:
        what = _CHANNELS.get(channels, f"a Flux with {channels} input channels")
        raise FluxsplitError(f"this is {what}; only text-to-image FLUX.1 (64 input channels) is supported")
    head = part.shape("transformer_blocks.0.attn.norm_q.weight")[0]
    mlp = part.shape("transformer_blocks.0.ff.net.0.proj.weight")[0]
    if hidden % head or mlp != 4 * hidden:
        raise FluxsplitError(
            f"hidden size {hidden} with heads of {head} and an MLP of {mlp} is not a Flux.1 transformer"
        )
    axes = tuple(int(axis) for axis in part.config.get("axes_dims_rope", FLUX_AXES))
    if sum(axes) != head or len(axes) != 3 or any(axis % 2 for axis in axes):
        raise FluxsplitError(
            f"RoPE axes {axes} do not make up heads of {head}",
            "a transformer that is not of Flux.1's size names its axes under the metadata key fluxsplit.config",
        )
    return {
        "in_channels": channels,
        "num_layers": part.count("transformer_blocks.%d."),
        "num_single_layers": part.count("single_transformer_blocks.%d."),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": part.shape("context_embedder.weight")[1],
        "pooled_projection_dim": part.shape("time_text_embed.text_embedder.linear_1.weight")[1],
        "guidance_embeds": variant_of(part) == "dev",
        "axes_dims_rope": axes,
    }
