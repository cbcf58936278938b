"""A small picture of a latent in a few milliseconds: each pixel a linear function of sixteen channels, without a VAE.

Most of what a VAE's decoder does with a latent of 8x8 pixels is linear: their mean colour is nearly a weighted sum of
the channels. The weights for FLUX.1's VAE are ComfyUI's (`comfy/latent_formats.py`, class Flux, `latent_rgb_factors`
and `latent_rgb_factors_bias`), which many previewers share; they apply to latents as the transformer sees them. Those
for the demo model were fitted by scripts/fit_peek.py, four pixels for each latent instead of one.

Pillow computes it: its ImageMath multiplies and adds whole planes of floats, which is some sixty times as fast as a
loop and needs neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxsplit import durable
from fluxsplit.latents import LatentFile
from fluxsplit.metadata import ImageRecord, encode_png, png_text_chunks
from fluxsplit.models import DEMO_FILE
from fluxsplit.recipe import LATENT_CHANNELS, WeightsStamp

if TYPE_CHECKING:
    from PIL.Image import Image

LIVE_NAME = "peek.png"
"""What `sample --peek-steps` writes again after each step."""
SUFFIX = ".peek.png"
SHRINK = 4
"""A preview has a quarter of the picture's sides."""
_LATENT_PX = 8 // SHRINK


@dataclass(frozen=True, slots=True)
class PeekMap:
    """Red, green and blue in -1..1 of cells x cells pixels a latent: weights * (latent - shift) * scaling + bias."""

    name: str
    cells: int
    weights: tuple[tuple[float, ...], ...]
    """One row of 16 for each colour of each cell; cells from left to right, then down."""
    bias: tuple[float, ...]
    scaling: float
    shift: float


def _columns(factors: tuple[tuple[float, float, float], ...]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row[colour] for row in factors) for colour in range(3))


FLUX = PeekMap(
    "linear map of FLUX.1's latents",
    1,
    _columns(
        (
            (-0.0346, 0.0244, 0.0681),
            (0.0034, 0.0210, 0.0687),
            (0.0275, -0.0668, -0.0433),
            (-0.0174, 0.0160, 0.0617),
            (0.0859, 0.0721, 0.0329),
            (0.0004, 0.0383, 0.0115),
            (0.0405, 0.0861, 0.0915),
            (-0.0236, -0.0185, -0.0259),
            (-0.0245, 0.0250, 0.1180),
            (0.1008, 0.0755, -0.0421),
            (-0.0515, 0.0201, 0.0011),
            (0.0428, -0.0012, -0.0036),
            (0.0817, 0.0765, 0.0749),
            (-0.1264, -0.0522, -0.1103),
            (-0.0280, -0.0881, -0.0499),
            (-0.1262, -0.0982, -0.0778),
        )
    ),
    (-0.0329, -0.0718, -0.0851),
    0.3611,
    0.1159,
)


def demo_map() -> PeekMap:
    """The map of the demo model's latents."""
    from fluxsplit import peek_demo  # noqa: PLC0415 - 200 numbers, seldom needed

    name = "linear map of the demo model's latents"
    return PeekMap(name, peek_demo.CELLS, peek_demo.WEIGHTS, peek_demo.BIAS, peek_demo.SCALING, peek_demo.SHIFT)


def map_for(transformer: str) -> PeekMap:
    """The map for latents of the transformer in the file of that name; FLUX.1's but for the demo model."""
    return demo_map() if transformer == DEMO_FILE else FLUX


def draw(payload: bytes, height: int, width: int, peek_map: PeekMap) -> Image:
    """The preview, RGB [height * 2, width * 2], of VAE-space fp32 latents [16, height, width]."""
    from PIL import Image as PillowImage  # noqa: PLC0415 - 60 ms, only where pictures are made

    cells = [_cell(payload, height, width, peek_map, place) for place in range(peek_map.cells**2)]
    whole = cells[0] if len(cells) == 1 else _woven(cells, peek_map.cells)
    return whole.resize((width * _LATENT_PX, height * _LATENT_PX), PillowImage.Resampling.BICUBIC)


def _cell(payload: bytes, height: int, width: int, peek_map: PeekMap, place: int) -> Image:
    """One pixel of every latent, RGB [height, width]."""
    from PIL import Image as PillowImage  # noqa: PLC0415
    from PIL import ImageMath  # noqa: PLC0415

    plane_bytes = 4 * height * width
    planes = {
        f"c{channel}": PillowImage.frombuffer(
            "F",
            (width, height),
            payload[channel * plane_bytes : (channel + 1) * plane_bytes],
            "raw",
            "F;32F",
            0,
            1,
        )
        for channel in range(LATENT_CHANNELS)
    }
    levels = []
    for colour in range(3):
        row, bias = peek_map.weights[3 * place + colour], peek_map.bias[3 * place + colour]
        offset = 127.5 * (1 + bias - sum(row) * peek_map.shift * peek_map.scaling) + 0.5
        factors = [127.5 * weight * peek_map.scaling for weight in row]
        total = ImageMath.lambda_eval(_weighted(factors, offset), **planes)
        levels.append(total.convert("L"))  # clips to 0..255 and rounds down
    return PillowImage.merge("RGB", levels)


def _weighted(factors: list[float], offset: float) -> Callable[[dict[str, Any]], Any]:
    """The sum of the planes c0, c1, ..., each times its factor, and the offset."""
    return lambda planes: sum((planes[f"c{channel}"] * factor for channel, factor in enumerate(factors)), offset)


def _woven(cells: list[Image], side: int) -> Image:
    """Pixels of side x side pictures next to each other."""
    from PIL import Image as PillowImage  # noqa: PLC0415

    width, height = cells[0].size
    whole = PillowImage.new("RGB", (width * side, height * side))
    for place, cell in enumerate(cells):
        down, right = divmod(place, side)
        on = (bytes(right) + b"\xff" + bytes(side - right - 1)) * width
        off = bytes(width * side)
        rows = b"".join(on if row == down else off for row in range(side)) * height
        mask = PillowImage.frombytes("L", whole.size, rows)
        whole.paste(cell.resize(whole.size, PillowImage.Resampling.NEAREST), (0, 0), mask)
    return whole


def png(latent: LatentFile) -> bytes:
    """A PNG of the preview that carries the latent's recipe, as a decoded picture does."""
    peek_map = map_for(latent.recipe.transformer.name if latent.recipe else "")
    image = draw(latent.payload, *latent.shape[2:], peek_map)
    record = ImageRecord(latent.recipe, latent.payload_sha256, WeightsStamp(peek_map.name))
    return encode_png(image.tobytes(), *image.size, png_text_chunks(record, latent.foreign))


def write_peek(latent: LatentFile, folder: Path, stem: str, overwrite: bool = False) -> Path:
    """Write the preview as `stem.peek.png`, or the next free name if another is there; returns its path.

    Raises FluxsplitError.
    """
    if overwrite:
        return durable.replace(folder / (stem + SUFFIX), png(latent))
    return durable.write_once(folder, stem, SUFFIX, png(latent))


def write_live(payload: bytes, height: int, width: int, transformer: str, folder: Path, said: str) -> None:
    """Write the preview of a picture that is still being made, in place of the last one; `said` is its comment."""
    image = draw(payload, height, width, map_for(transformer))
    durable.replace(folder / LIVE_NAME, encode_png(image.tobytes(), *image.size, {"Comment": said}))
