"""What the header of a conditioning file says: of which prompt it was made, how long it is, for which model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fluxsplit.arguments import check_prompt
from fluxsplit.checkpoint import Part
from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.jobs import absolute
from fluxsplit.safetensor_header import Header, read_header

_WIDTHS = {"t5": "context_embedder.weight", "pooled": "time_text_embed.text_embedder.linear_1.weight"}
"""Of a transformer, the matrix whose rows are as long as a vector of this tensor."""


def saved(name: str, cfg: float) -> tuple[str, str]:
    """The absolute path of what `--conditioning` names, and the prompt that it says it was made of, empty for none.

    Raises UsageError where there is no such file, or a negative prompt would have to be encoded; FluxsplitError where
    the file is no conditioning.
    """
    file = Path(name).expanduser()
    if cfg != 1:
        raise UsageError(
            f"--cfg {cfg:g} needs the text encoders for its negative prompt, which --conditioning does without",
            "give --cfg 1, or the text encoders instead of --conditioning",
        )
    if not file.is_file():
        raise UsageError(f"--conditioning {file}: there is no such file", "make one with --save-conditioning")
    metadata = _header(file).metadata
    with suppress(ValueError, RecursionError):
        prompt = json.loads(metadata.get("prompt", '""'))
        return absolute(file), check_prompt(prompt) if isinstance(prompt, str) else ""
    return absolute(file), ""


def check_prompt_is(made_of: str, prompt: str, file: str, hint: str) -> None:
    """Raise UsageError where a conditioning was made of another prompt than this one."""
    if made_of and made_of != prompt:
        raise UsageError(f"{Path(file).name} was made of the prompt {made_of[:60]!r}, not of {prompt[:60]!r}", hint)


def length_of(file: str) -> int | None:
    """How many tokens the prompt has for T5; None for what is not there or no conditioning."""
    with suppress(FluxsplitError, ValueError):
        _, tokens, _ = _header(Path(file)).tensors["t5"].shape
        return tokens
    return None


def check_file(file: str, transformer: Part) -> None:
    """`check_shapes` of a file, by its header."""
    tensors = _header(Path(file)).tensors
    check_shapes(Path(file).name, tensors["t5"].shape, tensors["pooled"].shape, transformer)


def check_shapes(name: str, t5: Sequence[int], pooled: Sequence[int], transformer: Part) -> None:
    """Raise FluxsplitError where tensors of these shapes are no conditioning, or not one for this transformer."""
    if (len(t5), len(pooled)) != (3, 2) or (t5[0], pooled[0]) != (1, 1) or 0 in (*t5, *pooled):
        found = {"t5": list(t5), "pooled": list(pooled)}
        raise FluxsplitError(f"{name} holds {found}", "a conditioning holds t5 [1, T, D] and pooled [1, P]")
    for tensor, shape in (("t5", t5), ("pooled", pooled)):
        width = transformer.shape(_WIDTHS[tensor])[1]
        if shape[-1] != width:
            raise FluxsplitError(
                f"{name}: {tensor} is {list(shape)}, this transformer takes a width of {width}",
                "it was made with text encoders of another model",
            )


def _header(file: Path) -> Header:
    header = read_header(file)
    if not set(_WIDTHS) <= set(header.tensors):
        held = ", ".join(name[:40] for name in list(header.tensors)[:4])
        raise FluxsplitError(f"{file.name} holds {held or 'nothing'}", "a conditioning holds t5 and pooled")
    return header
