"""How a rerender starts: what it keeps of the picture that it was made from, as its recipe tells it.

| keep | noise | latent at the first step |
|---|---|---|
| `seed` | the seed's, of the new size (there is no `Start`) | noise alone |
| `noise` | coupled with the preview's | noise alone |
| `image` | the seed's, of the new size | (1 - strength) * enlarged preview + strength * noise |
| `composition` | coupled with the preview's | the same |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fluxsplit.errors import FluxsplitError

KEEPS = ("seed", "noise", "image", "composition")
FITS = ("stretch", "centre")
MAX_GRIDS = 8
MIN_STRENGTH = 0.01
_HEX = set("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class NoiseGrid:
    """The noise of one picture on the way: drawn from its seed at its size."""

    seed: int
    width: int
    """Pixels; a multiple of 8."""
    height: int
    noise_index: int = 0
    fit: str = "stretch"
    """How it is laid on the next grid: one of `FITS`."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a rerender kept. Everything in it decides pixels."""

    keep: str
    """`noise`, `image` or `composition`."""
    noise: tuple[NoiseGrid, ...]
    """The pictures whose noise this one's is coupled with, the first preview first; empty where it is fresh."""
    strength: float
    """Sigma of the first step, 0..1; 1 for `noise`."""
    fit: str = "stretch"
    """How the preview's latent is laid on the new grid."""
    low_frequency_guidance: float = 0.0
    """0..1: how far the first quarter of the steps is moved towards the preview, half as far in the second."""
    latent_sha256: str = ""
    """Of the preview's latent (fp32 payload, VAE space); empty for `noise`."""

    def __post_init__(self) -> None:
        _check(self.keep in KEEPS[1:], f"keep {self.keep!r} is not one of {', '.join(KEEPS[1:])}")
        _check(self.fit in FITS, f"fit {self.fit!r} is not one of {', '.join(FITS)}")
        _check(MIN_STRENGTH <= self.strength <= 1, f"strength {self.strength} is outside {MIN_STRENGTH}..1")
        _check(0 <= self.low_frequency_guidance <= 1, f"weight {self.low_frequency_guidance} is outside 0..1")
        _check(len(self.noise) <= MAX_GRIDS, f"{len(self.noise)} grids of noise are over {MAX_GRIDS}")
        _check(bool(self.noise) == (self.keep != "image"), f"keep {self.keep} has {len(self.noise)} grids of noise")
        _check(bool(self.latent_sha256) == (self.keep != "noise"), f"keep {self.keep} does not fit its latent")
        _check(self.keep != "noise" or self.strength == 1, f"keep noise starts at 1, not {self.strength}")
        for grid in self.noise:
            sides = all(16 <= side <= 16384 and side % 8 == 0 for side in (grid.width, grid.height))
            _check(sides, f"noise of {grid.width}x{grid.height} pixels is out of range or not a multiple of 8")
            _check(0 <= grid.seed < 1 << 64 and 0 <= grid.noise_index < 10_000, f"seed {grid.seed} is out of range")
            _check(grid.fit in FITS, f"fit {grid.fit!r} is not one of {', '.join(FITS)}")


def start_from_object(value: Any) -> Start:
    """The start in a parsed JSON object from a stranger; raises FluxsplitError."""
    types = {"keep": str, "strength": float, "fit": str, "low_frequency_guidance": float, "latent_sha256": str}
    table = _table(value, {**types, "noise": list})
    if table["latent_sha256"] and (len(table["latent_sha256"]) != 64 or set(table["latent_sha256"]) - _HEX):
        raise FluxsplitError("its start has no proper latent_sha256")
    grid_types = {"seed": int, "width": int, "height": int, "noise_index": int, "fit": str}
    grids = tuple(NoiseGrid(**_table(grid, grid_types)) for grid in table.pop("noise")[: MAX_GRIDS + 1])
    return Start(noise=grids, **table)


def _table(value: Any, types: dict[str, type]) -> dict[str, Any]:
    """`value` if it is an object of exactly these fields and types; a whole number may stand for a float."""
    if not isinstance(value, dict) or set(value) != set(types):
        raise FluxsplitError("recipe field start has unknown or missing fields")
    for name, kind in types.items():
        if type(value[name]) is not kind and not (kind is float and type(value[name]) is int):
            raise FluxsplitError(f"recipe field start has {name} {str(value[name])[:80]!r}")
    return {name: float(value[name]) if kind is float else value[name] for name, kind in types.items()}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise FluxsplitError(message)
