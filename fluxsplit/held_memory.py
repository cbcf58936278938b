"""What a sample run holds besides its blocks: libraries, the matrix that is multiplied with, activations, states.

Activations are modelled as bytes for each token and hidden channel, fitted to measured peaks; see
`scripts/bench_plan.py` for how well that holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluxsplit.memory import DeviceInfo
from fluxsplit.model_sizes import Model
from fluxsplit.work import PREPARED_TOGETHER, Work

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
CPU_PIECE_BYTES = 6 << 20
"""Of a matrix a CPU expands at once, so that it is in the cache still when it is multiplied with."""
CPU_BASE_BYTES = 435_000_000
"""Anonymous memory of a stage besides its matrices and activations: the interpreter, torch and diffusers."""
PACKED = {4: 1.2, 2: 1.4}
"""Memory of the matrix that a CPU multiplies with, in matrices: products pack a part of it anew; fitted."""
CARD_BASE_BYTES = 95_000_000
"""Of the allocator on a card: libraries' workspaces, and some more: where the budget is a little short, the allocator
gives memory back and takes it again in every step, which takes longer."""
SCORE_VALUE_BYTES = {"fp32": 4, "bf16": 4, "fp16": 2}
"""Of a score in attention by chunks, which `attention` forms in fp32 where the dtype has too few digits."""
SCORE_BYTES = 256_000_000
"""Largest piece of a score matrix where attention is computed in chunks of queries."""
_ACTIVATION = {4: 58.0, 2: 32.0}
"""Bytes for each token and hidden channel that a forward holds at its widest on a CPU, by the compute dtype's size."""
_TILES_ACTIVATION, TILES_BASE_BYTES = 16.0, 25_000_000
"""More of both where a CPU multiplies 16 bits by tiles; measured with 320 to 4,352 tokens, a tenth more or less."""
_CARD_ACTIVATION, _CARD_FORWARD_BYTES = {4: 44.2, 2: 22.1}, {4: 60_000_000, 2: 30_000_000}
"""The same on a card, and what it reserves besides, however few tokens: what its allocator reserved on an H200 in bf16,
with 512, 1,280, 4,504, 9,472 and 16,640 tokens, less what else was there; 14 of the 22 bytes are alive at once. fp32 is
taken as twice that."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a run holds besides blocks; the fields are those of `MemoryPlan`."""

    base_bytes: int
    scratch_bytes: int
    activation_bytes: int
    state_bytes: int
    query_chunk: int | None
    before_bytes: int
    """Two blocks' modulation matrices, which are on a card before the first step, instead of activations."""

    @property
    def bytes(self) -> int:
        """At the worst moment."""
        return self.base_bytes + self.scratch_bytes + max(self.activation_bytes + self.state_bytes, self.before_bytes)


def held_memory(model: Model, work: Work, device: DeviceInfo, dtype: str, together: int, tokens: Sequence[int]) -> Held:
    """`tokens` of each picture, the largest first."""
    size, on_cpu = DTYPE_BYTES[dtype], device.kind == "cpu"
    by_tiles = on_cpu and device.tile_products and size == 2
    chunk = _query_chunk(model, tokens[0], dtype, device)
    state = work.forwards * sum(_state_bytes(model, count, size) for count in tokens[:together])
    # of every step on a CPU, where RAM is what is planned; of the step that is computed on a card
    kept = work.times * min(work.texts, max(together, PREPARED_TOGETHER))
    state += (kept if on_cpu else work.forwards * together) * model.modulation_outputs * size
    base = CPU_BASE_BYTES + by_tiles * TILES_BASE_BYTES if on_cpu else CARD_BASE_BYTES + model.small_bytes
    widest = _CARD_ACTIVATION[size] if not on_cpu else _ACTIVATION[size] + by_tiles * _TILES_ACTIVATION
    besides = 0 if on_cpu else _CARD_FORWARD_BYTES[size]
    return Held(
        base_bytes=base + model.small_elements * size,
        scratch_bytes=_scratch_bytes(model, size, on_cpu),
        activation_bytes=besides + _activation_bytes(model, tokens[0], dtype, chunk, widest),
        state_bytes=state,
        query_chunk=chunk,
        before_bytes=0 if on_cpu else 2 * model.modulation_block_bytes,
    )


def _scratch_bytes(model: Model, size: int, on_cpu: bool) -> int:
    largest_bytes = model.largest_elements * size
    return int(min(largest_bytes, CPU_PIECE_BYTES) * PACKED[size]) if on_cpu else largest_bytes


def _activation_bytes(model: Model, tokens: int, dtype: str, chunk: int | None, widest: float) -> int:
    held = int(tokens * model.hidden * widest)
    if chunk is None:
        return held
    widened = tokens * model.hidden * SCORE_VALUE_BYTES[dtype] if dtype == "bf16" else 0  # the keys
    return held + widened + 3 * chunk * tokens * (model.hidden // model.head) * SCORE_VALUE_BYTES[dtype]


def _state_bytes(model: Model, tokens: int, size: int) -> int:
    """Image and text states in the compute dtype, and the fp32 cosines and sines of their positions."""
    return tokens * (model.hidden * size + 4 * model.head)


def _query_chunk(model: Model, tokens: int, dtype: str, device: DeviceInfo) -> int | None:
    """Rows of the score matrix at once, in multiples of 64, where no fused kernel keeps it to itself."""
    if device.fused_attention:
        return None
    row_bytes = tokens * (model.hidden // model.head) * SCORE_VALUE_BYTES[dtype]
    return max(64, min(tokens, SCORE_BYTES // row_bytes // 64 * 64))
