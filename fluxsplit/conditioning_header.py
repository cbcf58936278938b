"""A conditioning file without torch: of which prompt it was made, how long it is, for which model, its hash."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fluxsplit.arguments import check_prompt
from fluxsplit.checkpoint import Part
from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.jobs import absolute
from fluxsplit.safetensor_header import Header, read_header

MAX_FILE_BYTES = 256 << 20
_WIDTHS = {"t5": "context_embedder.weight", "pooled": "time_text_embed.text_embedder.linear_1.weight"}
"""Of a transformer, the matrix whose rows are as long as a vector of this tensor."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What `--conditioning` names."""

    path: str
    """Absolute."""
    prompt: str
    """That it says it was made of; empty where it says none."""
    sha256: str
    """Of its tensors, whatever metadata is beside them."""


def saved(name: str, cfg: float) -> Saved:
    """What `--conditioning` names.

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
        what = "it is a folder" if file.is_dir() else "there is no such file"
        raise UsageError(f"--conditioning {file}: {what}", "make one with --save-conditioning")
    prompt, size_bytes = prompt_of(file), file.stat().st_size
    if size_bytes > MAX_FILE_BYTES:
        raise FluxsplitError(f"{file.name} is {size_bytes} bytes, too large for a conditioning")
    return Saved(absolute(file), prompt, payload_sha256(file.read_bytes()))


def prompt_of(file: Path) -> str:
    """The prompt that a file says it was made of, empty where it says none; FluxsplitError where it is another kind."""
    metadata = _header(file).metadata
    with suppress(ValueError, RecursionError):
        prompt = json.loads(metadata.get("prompt", '""'))
        return check_prompt(prompt) if isinstance(prompt, str) else ""
    return ""


def payload_sha256(raw: bytes) -> str:
    """Hex SHA-256 of what follows the header of a safetensors file."""
    return hashlib.sha256(memoryview(raw)[8 + struct.unpack_from("<Q", raw)[0] :]).hexdigest()


def check_prompt_is(saved: Saved, prompt: str, hint: str) -> list[str]:
    """Raise UsageError where a conditioning was made of another prompt; returns what is to be told where none knows."""
    name = Path(saved.path).name
    if saved.prompt and saved.prompt != prompt:
        raise UsageError(f"{name} was made of the prompt {saved.prompt[:60]!r}, not of {prompt[:60]!r}", hint)
    return [] if saved.prompt or not prompt else [f"{name} does not say its prompt; it is taken for {prompt[:60]!r}"]


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
        held = ", ".join(dict.fromkeys(name[:40] for name in list(header.tensors)[:4]))
        raise FluxsplitError(f"{file.name} holds {held or 'nothing'}", "a conditioning holds t5 and pooled")
    return header
