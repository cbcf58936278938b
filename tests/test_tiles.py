"""Cuts into tiles: everything is covered, weights add up to one, origins keep to the multiple."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxsplit.tiles import SMALLEST_TILE_PX, Span, cut, largest_tile, smaller_tile


def weights(span: Span) -> dict[int, float]:
    """How much of each pixel the tile gives, by the rule that the room's essay states."""
    given = {}
    for place in range(span.keep_start, span.keep_stop):
        weight = 1.0
        if place - span.keep_start < span.fade_in:
            weight = (place - span.keep_start + 0.5) / span.fade_in
        if span.keep_stop - place <= span.fade_out:
            weight = (span.keep_stop - place - 0.5) / span.fade_out
        given[place] = weight
    return given


@given(st.integers(1, 3000), st.integers(8, 400), st.integers(2, 80), st.sampled_from([1, 2, 4, 8, 32]))
def test_every_pixel_is_given_once_in_all(length: int, tile: int, overlap: int, multiple: int) -> None:
    spans = cut(length, tile, overlap, multiple)
    assert spans[0].start == 0 and spans[-1].stop == length
    sizes = [span.stop - span.start for span in spans]
    assert len(set(sizes[:-1])) <= 1 and 0 <= sizes[-1] - sizes[0] < multiple
    total = dict.fromkeys(range(length), 0.0)
    for span in spans:
        assert span.start % multiple == 0 and (span.stop % multiple == 0 or span.stop == length)
        assert span.start <= span.keep_start < span.keep_stop <= span.stop
        assert span.fade_in + span.fade_out <= span.keep_stop - span.keep_start
        for place, weight in weights(span).items():
            total[place] += weight
    assert all(abs(weight - 1) < 1e-9 for weight in total.values())


@given(st.integers(200, 3000), st.sampled_from([256, 384, 512]), st.sampled_from([1, 2, 4]))
def test_a_quarter_of_the_overlap_at_each_edge_is_thrown_away(length: int, tile: int, multiple: int) -> None:
    length -= length % multiple
    for before, after in pairwise(cut(length, tile, 64, multiple)):
        assert before.stop - after.start >= 64
        assert before.stop - before.keep_stop >= 15 and after.keep_start - after.start >= 15
        assert before.fade_out == after.fade_in == 32


def test_what_fits_is_one_tile() -> None:
    assert cut(100, 100, 64) == cut(100, 500, 64) == [Span(0, 100, 0, 100, 0, 0)]


def test_a_tile_as_large_as_the_budget_holds() -> None:
    assert largest_tile(1000, 1000, 10.0, 10_000_000) == 0
    assert largest_tile(1000, 1000, 10.0, 9_999_999, 4) == 996
    assert largest_tile(1000, 1000, 10.0, 0) == SMALLEST_TILE_PX


@pytest.mark.parametrize(("tile", "halves"), [(0, [400, 200, 100, 0]), (512, [256, 128, 64, 0]), (5000, [400])])
def test_halves_down_to_the_smallest(tile: int, halves: list[int]) -> None:
    for half in halves:
        tile = smaller_tile(800, 600, tile)
        assert tile == half
