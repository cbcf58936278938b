"""What decoding in diffusers' overlapped tiles takes, so that a tile that does not fit is told before it is computed.

Measured as bytes for each pixel of a tile, since at the picture's own resolution a tile is at its largest
(scripts/bench_decode.py --cases tiles-512 tiles-1024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fluxsplit.decode_plan import DTYPE_BYTES
from fluxsplit.errors import DoesNotFit
from fluxsplit.memory import DeviceInfo
from fluxsplit.recipe import VAE_FACTOR

PIXEL_BYTES = {"cpu": {4: 4000, 2: 2100}, "card": {4: 4000, 2: 3200}}
"""By the size of a value."""
LIBRARIES_BYTES = 100_000_000
LARGER = 4 / 3
"""Of a tile's rows and columns diffusers keeps three quarters; those of all tiles are together before they are cut."""


@dataclass(frozen=True, slots=True)
class TilePlan:
    """How one picture is decoded in tiles."""

    dtype: str
    tile: int
    """Side in pixels."""
    peak_bytes: int

    def text(self) -> str:
        """One line for people."""
        return f"{self.dtype}, in tiles of {self.tile} pixels, peak {self.peak_bytes / 1e9:.2f} GB"


def plan_tiles(
    size: tuple[int, int], tile: int, dtype: str, parameters: int, device: DeviceInfo, budget_bytes: int
) -> TilePlan:
    """The plan for a picture of this width and height in pixels, by a VAE of so many parameters.

    Raises DoesNotFit where the budget is too small for such tiles.
    """
    item = DTYPE_BYTES[dtype]
    pixel_bytes = PIXEL_BYTES["cpu" if device.kind == "cpu" else "card"][item]
    picture = math.prod(size) * 3 * item
    fixed = LIBRARIES_BYTES + parameters * item + math.ceil(picture * (LARGER**2 + 1))
    area = math.prod(min(side, tile) for side in size)
    peak = fixed + area * pixel_bytes
    if peak > budget_bytes:
        side = math.isqrt(max(0, budget_bytes - fixed) // pixel_bytes) // VAE_FACTOR * VAE_FACTOR
        smaller = f"give --tile {side}, or " if side >= 64 else ""
        raise DoesNotFit(
            f"tiles of {tile} pixels need {peak / 1e6:,.0f} MB for {size[0]}x{size[1]} in {dtype}, "
            f"and {budget_bytes / 1e6:,.0f} MB may be used",
            f"{smaller}leave out --tile: strips need less and are exact",
        )
    return TilePlan(dtype, tile, peak)
