"""What encoding prompts takes of a card, worked out from the weight files' headers before anything is loaded.

T5 comes block by block through two slots, a piece of a matrix expanded to fp32 at a time; when it is gone CLIP, which
is small, comes whole, in fp32. The larger of the two is what is needed. Where it is not there, a CPU does it as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fluxsplit.checkpoint import Part
from fluxsplit.held_memory import CARD_BASE_BYTES
from fluxsplit.model_sizes import stored_bytes

SCRATCH_BYTES = 8 << 20
"""Of a matrix expanded to fp32 at once; T5-XXL's largest would be 168 MB, a quarter of what encoding needs."""
SLOTS = 2


@dataclass(frozen=True, slots=True)
class TextPlan:
    """Bytes of a card's memory, in fp32 what is computed."""

    slot_bytes: int
    """Of each of the two, for T5's blocks as they are stored."""
    t5_bytes: int
    """All that there is while T5 is at work, without the base."""
    clip_bytes: int
    peak_bytes: int

    def text(self) -> str:
        """One line for people."""
        return f"T5 through {SLOTS} slots of {self.slot_bytes / 1e6:.0f} MB, peak {self.peak_bytes / 1e9:.2f} GB"


def plan_text(t5: Part, clip: Part, lengths: Sequence[int]) -> TextPlan:
    """The plan for prompts of so many T5 tokens each; raises FluxsplitError where a file lacks what T5 has."""
    blocks = t5.count("encoder.block.%d.")
    slot = max((_block_bytes(t5, number) for number in range(blocks)), default=0)
    clip_bytes = sum(4 * math.prod(source.shape) for source in clip.sources.values())
    states = 4 * sum(lengths) * t5.shape("shared.weight")[1]
    biases = 4 * _heads(t5) * sum(length**2 for length in set(lengths))  # kept from the first block for all
    t5_bytes = SLOTS * slot + SCRATCH_BYTES + states + biases + _activation_bytes(t5, max(lengths, default=0))
    return TextPlan(slot, t5_bytes, clip_bytes, CARD_BASE_BYTES + max(t5_bytes, clip_bytes))


def _block_bytes(part: Part, number: int) -> int:
    start = f"encoder.block.{number}."
    return sum(stored_bytes(source) for name, source in part.sources.items() if name.startswith(start))


def _activation_bytes(part: Part, tokens: int) -> int:
    """In fp32, of one prompt: states, heads and the gated layer, and the scores, with their bias, and their softmax."""
    layer = "encoder.block.0.layer"
    width = part.shape("shared.weight")[1]
    inner = part.shape(f"{layer}.0.SelfAttention.q.weight")[0]
    hidden = part.shape(f"{layer}.1.DenseReluDense.wi_0.weight")[0]
    return 4 * tokens * (6 * width + 4 * inner + 4 * hidden) + 4 * 3 * _heads(part) * tokens**2


def _heads(part: Part) -> int:
    return part.shape("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")[1]
