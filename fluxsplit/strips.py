"""A VAE's passes carried out strip by strip: the picture that the whole network gives, to rounding.

A 3x3 convolution needs one row above and one below a strip. The rows it shares with the next strip stay in the window,
normalised and activated already, so that nothing is computed twice. `group_norm` has the statistics of whole planes,
`convolution` what an enlargement and a convolution are together.

Attention over the middle plane (one head as wide as the plane, 512 in FLUX.1's) is products and a softmax over chunks
of queries and, where all keys' scores would be too large, blocks of keys merged by running maximum and sum (Milakov and
Gimelshein, arXiv 1805.02867). Fused kernels are never used: they refuse a head of 512 or are wrong on some AMD builds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from fluxsplit.convolution import convolve, phase_kernels
from fluxsplit.decode_plan import VaePlan, attention_tokens, strip_rows
from fluxsplit.group_norm import Affine, Moments
from fluxsplit.memory import PINNED_SHARE, free_ram_bytes
from fluxsplit.planes import Home, Plane, give_back_freed, sent
from fluxsplit.vae_attention import BlockedAttention
from fluxsplit.vae_passes import Pass

TRIM_STRIPS = 8
"""glibc leaves a hole for every strip, just too small for the next: 0.2 GB by the end of a pass of 4096 rows."""

Layer = Callable[[str], torch.Tensor]
Sink = Callable[[int, torch.Tensor], None]


class Window:
    """The rows of a plane that a strip needs, normalised, with zeros round the picture; slides downwards."""

    def __init__(
        self, plane: Plane, rows: int, dtype: torch.dtype, device: torch.device, affine: Affine | None
    ) -> None:
        self._plane, self._affine = plane, affine
        self._buffer = torch.empty((rows, plane.width, plane.channels), dtype=dtype, device=device)
        self._start = self._stop = -1

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop [n, W, C]; those outside the picture are zero. `start` may not go back."""
        kept = max(0, self._stop - start)
        moved = start - self._start
        for i in range(kept if moved else 0):  # one by one, since they may overlap
            self._buffer[i].copy_(self._buffer[i + moved])
        self._fill(start, start + kept, stop)
        self._start, self._stop = start, stop
        return self._buffer[: stop - start]

    def _fill(self, start: int, at: int, stop: int) -> None:
        first, last = max(at, 0), min(stop, self._plane.height)
        self._buffer[at - start : first - start].zero_()
        for row, piece in self._plane.pieces(first, last):
            out = self._buffer[row - start : row - start + len(piece)]
            if self._affine is None:
                out.copy_(sent(piece, out.device))
            else:
                self._affine.into(piece, out)
        self._buffer[last - start : stop - start].zero_()


class Strips:
    """Carries out passes over named planes."""

    def __init__(
        self, plan: VaePlan, dtype: torch.dtype, device: torch.device, groups: int, layer: Layer, folder: str
    ) -> None:
        """`layer` gives a parameter by name, in the dtype and on the device; `folder` is for planes on disk."""
        self._plan, self._dtype, self._device, self._groups = plan, dtype, device, groups
        self._layer = layer
        self._home = Home(
            plan.home,
            device,
            folder=folder,
            block_bytes=plan.block_bytes,
            kept_blocks=plan.kept_blocks,
            pin_bytes=int(free_ram_bytes() * PINNED_SHARE) if plan.home == "ram" else 0,
        )
        self.planes: dict[str, Plane] = {}
        self._moments: dict[str, Moments] = {}

    def run(self, passes: tuple[Pass, ...], sink: Sink, advance: Callable[[float], None]) -> None:
        """Carry out all passes; the last one's rows [n, W, C] go to `sink` with their first row's number.

        `advance` is told the share of the work that is done. Raises NotFinite.
        """
        total = sum(one.operations for one in passes)
        done = 0.0
        for one in passes:
            carry_out = {"conv": self._conv, "up": self._up, "down": self._down, "attention": self._attention}[one.kind]
            target = _Target(self, one, sink if one is passes[-1] else None)
            for number, share in enumerate(carry_out(one, target), 1):
                advance((done + share * one.operations) / total)
                if number % TRIM_STRIPS == 0:
                    give_back_freed()
            target.finish()
            give_back_freed()
            done += one.operations
        advance(1.0)

    def close(self) -> None:
        """Let go of the memory of planes."""
        self._home.close()

    def plane(self, height: int, width: int, channels: int) -> Plane:
        """A new plane where the plan wants it."""
        return Plane((height, width, channels), self._dtype, self._home)

    def moments(self, channels: int) -> Moments:
        """New statistics."""
        return Moments(channels, self._device)

    def take(self, name: str, plane: Plane, moments: Moments | None) -> None:
        """Put a plane in a name's place."""
        self.planes[name] = plane
        if moments is not None:
            self._moments[name] = moments

    def _window(self, one: Pass, rows: int) -> Window:
        return Window(self.planes[one.source], rows, self._dtype, self._device, self._affine(one))

    def _affine(self, one: Pass) -> Affine | None:
        if not one.norm:
            return None
        weight, bias = self._layer(f"{one.norm}.weight"), self._layer(f"{one.norm}.bias")
        scale, shift = self._moments[one.source].affine(weight, bias, self._groups)
        return Affine(scale, shift, activated=one.kind != "attention")

    def _conv(self, one: Pass, target: _Target) -> Iterator[float]:
        source, rows = self.planes[one.source], strip_rows(one, self._plan.strip_bytes)
        window = self._window(one, rows + 2)
        weight, bias = self._kernel(one.weights), self._layer(f"{one.weights}.bias")
        straight = (self._kernel(one.shortcut), self._layer(f"{one.shortcut}.bias")) if one.shortcut else None
        for start in range(0, one.height, rows):
            stop = min(start + rows, one.height)
            if straight is not None:
                for row, piece in source.pieces(start, stop):
                    target.shortcut(row, convolve(sent(piece, self._device), *straight))
            target.put(start, convolve(window.rows(start - 1, stop + 1), weight, bias, padding=(0, 1)))
            if one.last_use:
                source.release(stop)
            yield stop / one.height

    def _up(self, one: Pass, target: _Target) -> Iterator[float]:
        source, rows = self.planes[one.source], strip_rows(one, self._plan.strip_bytes)
        window = self._window(one, rows + 2)
        bias = self._layer(f"{one.weights}.bias").repeat(2)
        above, below = phase_kernels(self._layer(f"{one.weights}.weight"))
        for start in range(0, one.height, rows):
            stop = min(start + rows, one.height)
            near = window.rows(start - 1, stop + 1)
            out = near.new_empty((2 * (stop - start), 2 * one.width, one.outputs))
            for parity, weight in enumerate((above, below)):
                both = convolve(near[parity : parity + stop - start + 1], weight, bias, padding=(0, 1))
                out[parity::2, 0::2].copy_(both[:, :-1, : one.outputs])
                out[parity::2, 1::2].copy_(both[:, 1:, one.outputs :])
                del both
            target.put(2 * start, out)
            source.release(stop - 1)
            yield stop / one.height

    def _down(self, one: Pass, target: _Target) -> Iterator[float]:
        """Stride 2 with a column of zeros at the right and a row at the bottom, none at the left and the top."""
        source, rows = self.planes[one.source], strip_rows(one, self._plan.strip_bytes)
        window = self._window(one, 2 * rows + 1)
        weight, bias = self._kernel(one.weights), self._layer(f"{one.weights}.bias")
        for start in range(0, one.out_height, rows):
            stop = min(start + rows, one.out_height)
            near = F.pad(window.rows(2 * start, 2 * stop + 1), (0, 0, 0, 1))  # [n, W + 1, C]
            target.put(start, convolve(near, weight, bias, stride=2))
            source.release(2 * stop)
            yield stop / one.out_height

    def _attention(self, one: Pass, target: _Target) -> Iterator[float]:
        """x + out(softmax(q k^T / sqrt(C)) v), q, k and v being linear in the normalised x (diffusers `Attention`)."""
        affine = self._affine(one)
        assert affine is not None
        queries, keys = attention_tokens(one, self._dtype.itemsize, self._plan.strip_bytes)
        queries, attention = max(1, queries // one.width), BlockedAttention(self._dtype, self._device, keys)
        projected = [self.plane(one.height, one.width, one.inputs) for _ in range(2)]
        for start in range(0, one.height, queries):
            stop = min(start + queries, one.height)
            tokens = self._tokens(one, affine, start, stop)
            for plane, name in zip(projected, ("to_k", "to_v"), strict=True):
                _write(plane, start, self._linear(one, name, tokens).view(stop - start, one.width, -1))
            yield 0.0
        for start in range(0, one.height, queries):
            stop = min(start + queries, one.height)
            query = self._linear(one, "to_q", self._tokens(one, affine, start, stop))
            seen = attention.means(query, *projected)
            target.put(start, self._linear(one, "to_out.0", seen.to(self._dtype)).view(stop - start, one.width, -1))
            yield stop / one.height
        for plane in projected:
            plane.close()

    def _tokens(self, one: Pass, affine: Affine, start: int, stop: int) -> torch.Tensor:
        rows = torch.empty((stop - start, one.width, one.inputs), dtype=self._dtype, device=self._device)
        for row, piece in self.planes[one.source].pieces(start, stop):
            affine.into(piece, rows[row - start : row - start + len(piece)])
        return rows.view(-1, one.inputs)

    def _linear(self, one: Pass, name: str, tokens: torch.Tensor) -> torch.Tensor:
        weight = self._layer(f"{one.weights}.{name}.weight").view(one.outputs, one.inputs)
        return F.linear(tokens, weight, self._layer(f"{one.weights}.{name}.bias"))

    def _kernel(self, layer: str) -> torch.Tensor:
        weight = self._layer(f"{layer}.weight")
        return weight if torch.version.hip else weight.contiguous(memory_format=torch.channels_last)


class _Target:
    """Where a pass's rows go: a new plane, one that they are added to, or the sink."""

    def __init__(self, strips: Strips, one: Pass, sink: Sink | None) -> None:
        self._strips, self._one, self._sink = strips, one, sink
        self._made: Plane | None = None
        self._short: Plane | None = None
        if sink is None:
            size = (one.out_height, one.out_width, one.outputs)
            self._made = strips.planes[one.target] if one.adds else strips.plane(*size)
            self._short = strips.plane(*size) if one.shortcut else None
        self._moments = strips.moments(one.outputs) if one.measured else None

    def put(self, start: int, rows: torch.Tensor) -> None:
        """Rows from `start` on, in order; `rows` may be changed."""
        if self._sink is not None:
            self._sink(start, rows)
            return
        assert self._made is not None
        for row, piece in self._made.pieces(start, start + len(rows)):
            part = rows[row - start : row - start + len(piece)]
            if self._one.adds:
                part.add_(sent(piece, part.device))
            _store(piece, part)
            if self._moments is not None:
                self._moments.update(part)

    def shortcut(self, start: int, rows: torch.Tensor) -> None:
        """Rows that the residual is added to later."""
        assert self._short is not None
        _write(self._short, start, rows)

    def finish(self) -> None:
        """The source gives back what is left of it, and the planes get their names."""
        if self._one.last_use:
            self._strips.planes.pop(self._one.source).close()
        if self._made is not None:
            self._strips.take(self._one.target, self._made, self._moments)
        if self._short is not None:
            self._strips.take("x", self._short, None)


def _write(plane: Plane, start: int, rows: torch.Tensor) -> None:
    for row, piece in plane.pieces(start, start + len(rows)):
        _store(piece, rows[row - start : row - start + len(piece)])


def _store(piece: torch.Tensor, rows: torch.Tensor) -> None:
    """Rows to their place in a plane, likewise."""
    piece.copy_(rows, non_blocking=piece.device != rows.device and piece.is_pinned())
