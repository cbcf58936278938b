"""What a plan has to know of a transformer: sizes of its blocks and of the rest, read from the file's header."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fluxsplit.checkpoint import Part, Source

MODULATION = ("norm.linear", "norm1.linear", "norm1_context.linear")
"""The matrices of diffusers' blocks, single and double, that are needed before the first step only (`modulation`)."""
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
FLUX_HEAD = 128


@dataclass(frozen=True, slots=True)
class Block:
    """One block as the file's header shows it."""

    name: str
    """`double 3`, `single 17`."""
    bytes: int
    """Of its matrices, as stored."""
    elements: int
    """Stored as float8, to be expanded at each use."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a plan has to know of a transformer; all from its header."""

    blocks: tuple[Block, ...]
    hidden: int
    head: int
    small_bytes: int
    """Matrices outside the blocks, as stored."""
    small_elements: int
    """Biases and norms, held in the compute dtype."""
    modulation_bytes: int
    """Of `MODULATION`, as stored; no part of the blocks' own."""
    modulation_block_bytes: int
    """Of the block that has most of them."""
    modulation_outputs: int
    """What all of them give for one embedding, in values."""
    largest_elements: int
    """Of the largest matrix that has to be expanded; 0 where all are stored in the compute dtype."""


def read_model(part: Part, dtype: str) -> Model:
    """The sizes of a transformer that is computed in `dtype` (fp32, bf16 or fp16)."""
    found: dict[tuple[str, int], list[Source]] = {}
    once: dict[str, list[Source]] = {}
    rest: list[Source] = []
    for name, source in part.sources.items():
        stack, _, after = name.partition(".")
        number, _, inside = after.partition(".")
        if stack not in ("transformer_blocks", "single_transformer_blocks") or not _is_matrix(source):
            rest.append(source)
        elif inside.removesuffix(".weight") in MODULATION:
            once.setdefault(f"{stack}.{number}", []).append(source)
        else:
            found.setdefault((stack, int(number)), []).append(source)
    keys = sorted(found, key=lambda key: (key[0] != "transformer_blocks", key[1]))
    blocks = tuple(_block(key, found[key]) for key in keys)
    once_bytes = [sum(map(stored_bytes, sources)) for sources in once.values()]
    once_outputs = sum(source.shape[0] for sources in once.values() for source in sources)
    in_blocks = (source for sources in (*found.values(), *once.values()) for source in sources)
    expanded = [source for source in in_blocks if _is_expanded(source, dtype)]
    return Model(
        blocks,
        hidden=part.shape("x_embedder.weight")[0],
        head=_head(part),
        small_bytes=sum(stored_bytes(source) for source in rest if _is_matrix(source)),
        small_elements=sum(math.prod(source.shape) for source in part.sources.values() if not _is_matrix(source)),
        modulation_bytes=sum(once_bytes),
        modulation_block_bytes=max(once_bytes, default=0),
        modulation_outputs=once_outputs,
        largest_elements=max((math.prod(source.shape) for source in expanded), default=0),
    )


def _block(key: tuple[str, int], sources: list[Source]) -> Block:
    elements = sum(math.prod(source.shape) for source in sources if source.dtype in _FLOAT8)
    kind = "double" if key[0] == "transformer_blocks" else "single"
    return Block(f"{kind} {key[1]}", sum(stored_bytes(source) for source in sources), elements)


def _head(part: Part) -> int:
    """Width of an attention head; a file that does not tell is refused when it is loaded."""
    source = part.sources.get("transformer_blocks.0.attn.norm_q.weight")
    return source.shape[0] if source is not None and source.shape else FLUX_HEAD


def _is_matrix(source: Source) -> bool:
    return len(source.shape) == 2


def _is_expanded(source: Source, dtype: str) -> bool:
    return source.dtype.lower() != dtype.replace("fp", "f") or source.scale is not None


def stored_bytes(source: Source) -> int:
    """Bytes of a parameter in its file."""
    return math.prod(source.shape) * _BYTES.get(source.dtype, 1)
