"""What every block is modulated by in every step, computed before the first: a quarter of the weights is needed once.

A block shifts, scales and gates its activations by vectors that its adaLN matrices make of the timestep, the guidance
and the pooled text (Peebles and Xie, arXiv 2212.09748). They see one row each and no picture, and the steps' noise
levels are known before. But in FLUX.1 they are 27 % of all parameters, 3.2 of 11.9 GB in float8, and would be kept or
moved, and expanded, in every step. So each is brought in and expanded once, applied to the embeddings of all steps of
the pictures to come, one row at a time, which gives the bits that it would give within the step, and is gone. What is
kept is 1.1 million values for each step of a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from fluxsplit.loading import Loader
from fluxsplit.model_sizes import MODULATION
from fluxsplit.stored_layers import StoredLinear

Key = tuple[float, float | None, bytes]
"""Noise level, guidance, and the bytes of the pooled text: all that an embedding of time depends on."""
Rows = tuple[torch.Tensor, ...]
"""What the matrices of one block give, each [1, n]."""


def key(sigma: float, guidance: float | None, pooled: torch.Tensor) -> Key:
    """The key of an embedding; pooled [1, 768] in any dtype."""
    return sigma, guidance, pooled.detach().cpu().float().contiguous().numpy().tobytes()


class Modulator(nn.Module):
    """Stands where a block has an adaLN matrix, and SiLU before it; gives what was computed before, else computes."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self._linear = (linear,)  # in a tuple it is no part of the block, which is brought in without it
        self.given: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, D], the embedding → [1, n]."""
        if self.given is not None:
            return self.given
        rows: torch.Tensor = self._linear[0](F.silu(x))
        return rows


class Modulations:
    """The adaLN matrices of a transformer's blocks, taken out of them, and what they gave."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.matrices: list[nn.ModuleList] = []
        """Of each block those that it had, to be brought in as blocks are."""
        self._places: list[list[Modulator]] = []
        self._known: dict[Key, list[Rows]] = {}
        for block in blocks:
            named = dict(block.named_modules())
            linears = [(name, named[name]) for name in MODULATION if name in named]
            places = [Modulator(linear) for _, linear in linears]
            for (name, _), place in zip(linears, places, strict=True):
                block.set_submodule(name, place)
                block.set_submodule(name.replace("linear", "silu"), nn.Identity())
            self._places.append(places)
            self.matrices.append(nn.ModuleList(linear for _, linear in linears))

    def compute(self, embeddings: Mapping[Key, torch.Tensor], loader: Loader) -> None:
        """Compute for `embeddings`, each [1, D], what is not known, in one pass over `matrices`; forget all others."""
        fresh = {key: list[Rows]() for key in embeddings if key not in self._known}
        self._known = {key: self._known[key] for key in embeddings if key in self._known} | fresh
        if not fresh:
            return
        activated = [F.silu(embeddings[key]) for key in fresh]
        for number, matrices in enumerate(self.matrices):
            linears = cast(Iterable[StoredLinear], matrices)
            with loader.brought_in(number):
                made = [torch.cat(linear.each(activated)).cpu() for linear in linears]
            for row, rows in enumerate(fresh.values()):
                rows.append(tuple(part[row : row + 1] for part in made))

    def knows(self, keys: Iterable[Key]) -> bool:
        """Whether there is nothing to compute for these."""
        return all(key in self._known for key in keys)

    def of(self, key: Key, device: torch.device) -> list[Rows] | None:
        """Every block's rows on the device; None where they were not computed before."""
        known = self._known.get(key)
        if known is None or device.type == "cpu":
            return known
        parts = [part for rows in known for part in rows]
        there = iter(torch.cat(parts, dim=1).to(device).split([part.shape[1] for part in parts], dim=1))
        return [tuple(next(there) for _ in rows) for rows in known]

    def give(self, number: int, rows: Iterable[torch.Tensor] | None) -> None:
        """Have block `number` be modulated by these; by None have it compute its own."""
        places = self._places[number]
        every: Iterable[torch.Tensor | None] = [None] * len(places) if rows is None else rows
        for place, given in zip(places, every, strict=True):
            place.given = given
