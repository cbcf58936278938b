"""Pixels → more pixels, by any single-image network that spandrel knows, whole or in blended tiles.

How large a tile may be is known before the first is computed (`alive_bytes`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fluxsplit.alive_bytes import peak_pixel_bytes
from fluxsplit.device import DTYPE_NAMES, exact_fp32
from fluxsplit.errors import FluxsplitError, OutOfMemory, UsageError, is_out_of_memory
from fluxsplit.spandrel_network import alignment_of, build_network
from fluxsplit.state_dict import read_state_dict
from fluxsplit.tiles import OVERLAP_PX, Span, cut, smaller_tile

WORKSPACE = {"cpu": 2.2, "cuda": 1.5}
"""What is taken with what convolution libraries want, as a multiple of the tensors alive. On a CPU oneDNN keeps its own
copies of input and output (scripts/bench_upscale.py); small networks stayed within a card's on an H200."""
PICTURE_BYTES, RESULT_BYTES = 32, 10
"""Of a pixel: three channels as they came and twice in fp32, the second time mirrored at the ends; of one of the result
three channels as levels, as Pillow's, and compressed."""
TileDone = Callable[[int, int], None]
StoredWeights = dict[str, torch.Tensor]


class NotFinite(FluxsplitError):
    """The network gave NaN or infinity."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a picture is cut: side of the square tiles, 0 for none, and by how much they overlap, in pixels."""

    tile: int
    overlap: int = OVERLAP_PX


class Upscaler:
    """A network with its weights, that maps RGB [3, H, W] in 0..1 to [3, scale * H, scale * W]."""

    def __init__(self, path: str | Path, dtype: torch.dtype, device: torch.device) -> None:
        """Read and build; raises FluxsplitError where the file holds no network that enlarges single pictures."""
        exact_fp32()
        self.name = Path(path).name
        self._network = build_network(self.name, read_state_dict(path))
        self.scale: int = self._network.scale
        self.multiple: int = self._network.size_requirements.multiple_of
        """Of a picture's sides; where it is none, the picture is mirrored at its end."""
        self.alignment = alignment_of(self._network)
        """Of the origins of tiles."""
        self.architecture: str = self._network.architecture.name
        self.tiles_itself: bool = self._network.tiling.name == "INTERNAL"
        self.pixel_bytes = peak_pixel_bytes(self._network)
        """What it holds at its peak for each pixel that goes in, computing in fp32."""
        self._weights: StoredWeights = dict(self._network.model.state_dict())
        self._finite = True
        self._network.model.register_forward_hook(self._look)
        self.dtype, self.device = dtype, device
        self.compute_in(dtype)

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether the architecture works in `dtype`."""
        known = {torch.float16: self._network.supports_half, torch.bfloat16: self._network.supports_bfloat16}
        return bool(known.get(dtype, True))

    def compute_in(self, dtype: torch.dtype) -> None:
        """Cast the weights; raises UsageError where the architecture does not work in `dtype`."""
        if not self.supports(dtype):
            raise UsageError(f"{self.architecture} does not work in {DTYPE_NAMES[dtype]}", "use --dtype fp32")
        self._network.model.to(device=self.device, dtype=dtype)
        cast = {
            name: value.to(self.device, dtype if value.is_floating_point() else value.dtype)
            for name, value in self._weights.items()
        }
        self._network.model.load_state_dict(cast, assign=True)  # from fp32 each time: what fp16 lost would stay lost
        self._network.model.requires_grad_(False)
        self.dtype = dtype

    def planned_bytes(self, width: int, height: int) -> float:
        """What computing a tile of this size takes beside the weights, in the present dtype."""
        return width * height * self.pixel_bytes * self.dtype.itemsize / 4 * WORKSPACE[self.device.type]

    def picture_bytes(self, width: int, height: int) -> int:
        """RAM for the picture itself while it is enlarged: as it came, in fp32, enlarged, and as a file."""
        return width * height * (PICTURE_BYTES + RESULT_BYTES * self.scale**2)

    @torch.inference_mode()
    def apply(self, pixels: torch.Tensor) -> torch.Tensor:
        """fp32 [3, h, w] on the CPU → fp32 [3, scale * h, scale * w] on the CPU; raises NotFinite.

        A network of one channel is given red, green and blue one after the other.
        """
        self._finite = True
        channels = self._network.input_channels
        moved = pixels.to(self.device, self.dtype)
        parts = [self._network(part[None])[0] for part in moved.split(channels)]
        if not self._finite:
            raise NotFinite(f"{self.name} gave NaN or infinity in {DTYPE_NAMES[self.dtype]}", "use --dtype fp32")
        return torch.cat(parts).float().cpu()

    def _look(self, module: Any, arguments: Any, output: torch.Tensor) -> None:
        """Before spandrel clamps it to 0..1, which makes a white pixel of infinity."""
        self._finite = self._finite and bool(output.isfinite().all())


def enlarge(network: Upscaler, pixels: torch.Tensor, tiling: Tiling, on_tile: TileDone) -> torch.Tensor:
    """RGB fp32 [3, H, W] in 0..1 → uint8 [scale * H, scale * W, 3].

    A tile that does not fit into memory is halved and the picture begun again; a result that is not finite is
    computed again in fp32. Raises OutOfMemory where the smallest tile does not fit either, NotFinite where fp32
    does not help.
    """
    height, width = (side * network.scale for side in pixels.shape[1:])
    levels = torch.empty((height, width, 3), dtype=torch.uint8)
    while True:
        try:
            start = 0
            for strip in enlarged_strips(network, pixels, tiling, on_tile):
                stop = start + strip.shape[1]
                levels[start:stop] = _levels(strip).permute(1, 2, 0)
                start = stop
            return levels
        except NotFinite:
            if network.dtype == torch.float32:
                raise
            network.compute_in(torch.float32)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            tiling = _after_out_of_memory(network, pixels, tiling, error)
        _give_back(network.device)


def _after_out_of_memory(network: Upscaler, pixels: torch.Tensor, tiling: Tiling, error: BaseException) -> Tiling:
    height, width = pixels.shape[1:]
    tile = 0 if network.tiles_itself else smaller_tile(width, height, tiling.tile)
    if not tile:
        tried = f"{tiling.tile or max(width, height)} pixels"
        raise OutOfMemory(
            f"{network.name} does not fit into memory with tiles of {tried}: {str(error).splitlines()[0][:200]}",
            "close other programs, or use --device cpu",
        ) from None
    return Tiling(tile, tiling.overlap)


def _levels(strip: torch.Tensor) -> torch.Tensor:
    """0..1 → 0..255, to the nearest: rounding down, as ComfyUI does, would darken the picture a second time."""
    return (strip * 255).round_().to(torch.uint8)


def enlarged_strips(
    network: Upscaler, pixels: torch.Tensor, tiling: Tiling, on_tile: TileDone
) -> Iterator[torch.Tensor]:
    """The enlarged picture from top to bottom as fp32 [3, rows, scale * W] in 0..1, each strip as soon as it is final.

    Only one row of tiles is held in fp32.
    """
    height, width = pixels.shape[1:]
    if _in_one_piece(network, width, height, tiling):
        yield network.apply(pixels)
        on_tile(1, 1)
        return
    padded = _padded(pixels, network.multiple)
    rows, columns = (cut(side, tiling.tile, tiling.overlap, network.alignment) for side in padded.shape[1:])
    scale, total = network.scale, len(rows) * len(columns)
    carried = torch.zeros(3, 0, padded.shape[2] * scale)
    for number, row in enumerate(rows):
        strip = torch.zeros(3, (row.keep_stop - row.keep_start) * scale, padded.shape[2] * scale)
        strip[:, : carried.shape[1]] = carried
        for place, column in enumerate(columns):
            tile = network.apply(padded[:, row.start : row.stop, column.start : column.stop].contiguous())
            kept = _faded(_kept(tile, row, column, scale), row, column, scale)
            strip[:, :, column.keep_start * scale : column.keep_stop * scale] += kept
            on_tile(number * len(columns) + place + 1, total)
        final = strip.shape[1] - row.fade_out * scale
        carried = strip[:, final:]
        last = min(final, height * scale - row.keep_start * scale)
        yield strip[:, :last, : width * scale]


def tile_count(network: Upscaler, width: int, height: int, tiling: Tiling) -> int:
    """How many tiles a picture of this size is enlarged in."""
    if _in_one_piece(network, width, height, tiling):
        return 1
    padded = (side + -side % network.multiple for side in (width, height))
    return math.prod(len(cut(side, tiling.tile, tiling.overlap, network.alignment)) for side in padded)


def _in_one_piece(network: Upscaler, width: int, height: int, tiling: Tiling) -> bool:
    return network.tiles_itself or not tiling.tile or max(height, width) <= tiling.tile


def _kept(tile: torch.Tensor, row: Span, column: Span, scale: int) -> torch.Tensor:
    top, bottom = (row.keep_start - row.start) * scale, (row.keep_stop - row.start) * scale
    left, right = (column.keep_start - column.start) * scale, (column.keep_stop - column.start) * scale
    return tile[:, top:bottom, left:right]


def _faded(kept: torch.Tensor, row: Span, column: Span, scale: int) -> torch.Tensor:
    return kept * _weights(row, scale)[None, :, None] * _weights(column, scale)[None, None, :]


def _weights(span: Span, scale: int) -> torch.Tensor:
    """How much of each kept pixel is used, [keep_stop - keep_start, times scale]."""
    weights = torch.ones((span.keep_stop - span.keep_start) * scale)
    for fade, rising in ((span.fade_in * scale, True), (span.fade_out * scale, False)):
        if fade:
            ramp = (torch.arange(fade) + 0.5) / fade
            if rising:
                weights[:fade] = ramp
            else:
                weights[-fade:] = 1 - ramp
    return weights


def _padded(pixels: torch.Tensor, multiple: int) -> torch.Tensor:
    """Right and bottom mirrored up to the multiple, as spandrel does with a whole picture (`size_req.py`)."""
    height, width = pixels.shape[1:]
    more_rows, more_columns = -height % multiple, -width % multiple
    mirrored = (0, min(more_columns, width - 1), 0, min(more_rows, height - 1))
    padded = F.pad(pixels[None], mirrored, "reflect")
    rest = (0, more_columns - mirrored[1], 0, more_rows - mirrored[3])
    return F.pad(padded, rest, "replicate")[0]


def _give_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
