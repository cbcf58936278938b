"""How a picture is cut into overlapping tiles for a network, and how the tiles are blended: arithmetic on lengths.

A convolution sees zeros beyond the edge of its tile where the whole picture would have gone on, so the pixels near
an inner edge come out wrong. Tiles therefore overlap, the outer quarter of each overlap is thrown away, and across
its middle half one tile fades into the next, linearly. The two weights of a pixel add up to one, so that nothing
has to be divided afterwards, and along both axes the weights are multiplied.

    tile i    |--------------------------\\____|
    tile i+1                       |____/--------------------------|
                                   |  overlap  |

Tiles of one cut have one size (but for the last, which may be a little longer), because libraries search anew for the
fastest convolution at every new size, and begin at multiples of what the network asks for: one that folds 2x2 pixels
into channels pairs them wrongly from an odd origin.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

OVERLAP_PX = 64
"""The zeros at an edge are felt 18 (Compact, 16 layers) to 350 pixels (RRDB, 23 blocks) away, ever more faintly;
docs/upscaling.md has what 64 leaves of it."""
SMALLEST_TILE_PX = 64


@dataclass(frozen=True, slots=True)
class Span:
    """One tile along one axis, in pixels of the picture that goes in."""

    start: int
    stop: int
    """The network reads start..stop."""
    keep_start: int
    keep_stop: int
    """Of what it makes, keep_start..keep_stop is used."""
    fade_in: int
    """Pixels after keep_start across which it fades in; 0 at the picture's edge."""
    fade_out: int
    """Pixels before keep_stop across which it fades out."""


def cut(length: int, tile: int, overlap: int, multiple: int = 1) -> list[Span]:
    """Spans of equal size, at most `tile` rounded up to `multiple`, that cover 0..length and begin at its multiples.

    Neighbours overlap by at least `overlap`, of which no more is used than a quarter of a tile. A tile has eight
    multiples at least. Where `length` is no multiple, the last span is longer by what is left of it.
    """
    tile = max(8, -(-tile // multiple)) * multiple
    if tile >= length:
        return [Span(0, length, 0, length, 0, 0)]
    overlap = max(1, min(overlap, tile // 4))
    shared = overlap + multiple - 1  # since origins are rounded down
    count = -(-(length - shared) // (tile - shared))
    even = -(-(length + (count - 1) * shared) // count)
    tile = -(-even // multiple) * multiple
    starts = [(number * (length - tile)) // (count - 1) // multiple * multiple for number in range(count)]
    step = min(after - before for before, after in itertools.pairwise(starts))
    fade = max(1, min(overlap // 2, step))  # no more than two tiles fade at the same place
    fades = [(before + after + tile - fade) // 2 for before, after in itertools.pairwise(starts)]
    spans = []
    for number, start in enumerate(starts):
        keep_start = fades[number - 1] if number else 0
        keep_stop = fades[number] + fade if number < count - 1 else length
        is_last = number == count - 1
        stop = length if is_last else start + tile
        spans.append(Span(start, stop, keep_start, keep_stop, fade if number else 0, 0 if is_last else fade))
    return spans


def largest_tile(width: int, height: int, pixel_bytes: float, budget_bytes: int, multiple: int = 1) -> int:
    """The side of the largest square tile that the budget holds, or 0 where it holds the whole picture.

    `pixel_bytes` is what the network holds at its peak for each pixel that goes in. Where not even the smallest tile
    fits, that one's side: `smallest_bytes` is for whoever wants to know before.
    """
    if width * height * pixel_bytes <= budget_bytes:
        return 0
    side = math.isqrt(max(0, int(budget_bytes / pixel_bytes))) // multiple * multiple
    return max(SMALLEST_TILE_PX, side)


def smallest_bytes(width: int, height: int, pixel_bytes: float) -> int:
    """What the smallest tile of a picture takes."""
    return math.ceil(min(width, SMALLEST_TILE_PX) * min(height, SMALLEST_TILE_PX) * pixel_bytes)


def smaller_tile(width: int, height: int, tile: int) -> int:
    """The tile to try after memory ran out: half of what was tried; 0 where that would be too small."""
    side = min(tile or max(width, height), max(width, height)) // 2
    return side if side >= SMALLEST_TILE_PX else 0
