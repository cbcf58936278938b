"""The header of a safetensors file, checked before a byte of it is believed.

A safetensors file is 8 bytes of header length (little-endian), that much JSON, and the tensors' bytes. The
header names each tensor's dtype, shape and byte range; the ranges must fill the rest of the file exactly,
without overlap, hole or remainder (https://github.com/huggingface/safetensors, "Format"). The reader of the
safetensors library checks that too, but takes the last of duplicate keys and spends gigabytes on headers of
millions of empty tensors or dimensions; those are refused here. Tensor data is never read.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fluxsplit.errors import FluxsplitError, ModelFileMissing
from fluxsplit.recipe import strict_json

METADATA_KEY = "__metadata__"
DOWNLOAD_AGAIN = "download it again"
BITS_BY_DTYPE = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_TENSOR_KEYS = {"dtype", "shape", "data_offsets"}
_OTHER_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`"),
    (b"<!doctype", "a web page, not weights", "download it again; the site may want a login"),
    (b"<html", "a web page, not weights", "download it again; the site may want a login"),
    (b"gguf", "a GGUF file, not safetensors", "use a safetensors file in fp8, fp16, bf16 or fp32"),
    (b"pk\x03\x04", "a zip or PyTorch file, not safetensors", "use the safetensors version of it"),
)


class NoSafetensors(FluxsplitError):
    """A file that does not even begin as one."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest header that is read."""

    header_bytes: int
    tensors: int
    dimensions: int = 8


WEIGHT_LIMITS = Limits(header_bytes=8 << 20, tensors=20_000)
"""Flux all-in-one files have some 1,500 tensors and 0.2 MB of header. 8 MiB of hostile JSON stay below 256 MB
of memory and 5 seconds; the 100 MB that the format allows would not."""
LATENT_LIMITS = Limits(header_bytes=4 << 20, tensors=8)
"""ComfyUI keeps the whole workflow in the header of a `.latent`."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor, as the header describes it."""

    name: str
    dtype: str
    """As in the file: F32, F16, BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says it holds."""

    path: str
    size_bytes: int
    data_start: int
    """Byte offset in the file at which the header ends."""
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | Path, limits: Limits = WEIGHT_LIMITS) -> Header:
    """The header of the safetensors file at `path`.

    Raises ModelFileMissing where there is no such file, and FluxsplitError for a file that is not safetensors,
    is truncated or otherwise contradicts itself, or goes over `limits`.
    """
    try:
        with Path(path).open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            raw = _raw_header(file, Path(path).name, size_bytes, limits)
    except FileNotFoundError:
        raise ModelFileMissing(f"{path} does not exist") from None
    except OSError as error:
        raise FluxsplitError(f"cannot read {path}: {error.strerror}") from error
    name = Path(path).name
    try:
        table = strict_json(raw.decode("utf-8"))
    except (UnicodeDecodeError, FluxsplitError) as error:
        raise FluxsplitError(f"{name} has a damaged safetensors header: {error}", DOWNLOAD_AGAIN) from None
    if not isinstance(table, dict):
        raise FluxsplitError(f"{name} has a damaged safetensors header: not a JSON object", DOWNLOAD_AGAIN)
    metadata = _metadata(name, table.pop(METADATA_KEY, {}))
    if len(table) > limits.tensors:
        raise FluxsplitError(f"{name} holds {len(table)} tensors, at most {limits.tensors} are read")
    data_start = 8 + len(raw)
    tensors = {key: _tensor(name, key, value, data_start, limits) for key, value in table.items()}
    _check_ranges(name, list(tensors.values()), data_start, size_bytes)
    return Header(str(path), size_bytes, data_start, tensors, metadata)


def _raw_header(file: BinaryIO, name: str, size_bytes: int, limits: Limits) -> bytes:
    """The header's JSON; nothing is read before its length is known to be sane."""
    start = file.read(32)
    for magic, what, hint in _OTHER_KINDS:
        if start.lower().startswith(magic):
            raise FluxsplitError(f"{name} is {what}", hint)
    if len(start) < 10:
        raise NoSafetensors(f"{name} is no safetensors file: it has {size_bytes} bytes", DOWNLOAD_AGAIN)
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{":
        raise NoSafetensors(f"{name} is no safetensors file: it starts with {start[:12]!r}")
    if length > limits.header_bytes:
        raise FluxsplitError(f"{name} claims a header of {length} bytes, at most {limits.header_bytes} are read")
    if 8 + length > size_bytes:
        raise _truncated(name, size_bytes, 8 + length, "at least ")
    file.seek(8)
    raw = file.read(length)
    if len(raw) != length:
        raise _truncated(name, 8 + len(raw), 8 + length, "at least ")
    return raw


def _truncated(name: str, found_bytes: int, expected_bytes: int, least: str = "") -> FluxsplitError:
    return FluxsplitError(
        f"{name} is truncated: it has {found_bytes} bytes, its header says {least}{expected_bytes}", DOWNLOAD_AGAIN
    )


def _metadata(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FluxsplitError(f"{name} has damaged metadata: not a table of strings")
    try:
        "".join(value.values()).encode("utf-8")
    except UnicodeEncodeError:
        raise FluxsplitError(f"{name} has damaged metadata: a character that is no Unicode text") from None
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _tensor(name: str, key: str, value: Any, data_start: int, limits: Limits) -> TensorInfo:
    """The checked entry of one tensor; its byte range is as large as its dtype and shape need."""
    shown = f"{name}: tensor {key[:80]!r}"
    if not isinstance(value, dict) or set(value) != _TENSOR_KEYS:
        raise FluxsplitError(f"{shown} is not described by dtype, shape and data_offsets", DOWNLOAD_AGAIN)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS_BY_DTYPE:
        raise FluxsplitError(f"{shown} has dtype {str(dtype)[:20]!r}, which is not known")
    if not isinstance(shape, list) or len(shape) > limits.dimensions or not all(map(_is_count, shape)):
        dimensions = f"{len(shape)} dimensions" if isinstance(shape, list) else "no list"
        raise FluxsplitError(f"{shown} has an impossible shape ({dimensions}, at most {limits.dimensions} are read)")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise FluxsplitError(f"{shown} has impossible data_offsets {str(offsets)[:60]}", DOWNLOAD_AGAIN)
    start, end = offsets
    bits = math.prod(shape) * BITS_BY_DTYPE[dtype]
    if bits % 8 or end - start != bits // 8:
        needs = f"{dtype} of shape {'x'.join(map(str, shape)) or 'scalar'} needs {bits / 8:.15g}"
        raise FluxsplitError(f"{shown} has {end - start} bytes, {needs}", DOWNLOAD_AGAIN)
    return TensorInfo(key, dtype, tuple(shape), data_start + start, data_start + end)


def _check_ranges(name: str, tensors: list[TensorInfo], data_start: int, size_bytes: int) -> None:
    """Refuse byte ranges that overlap, leave a hole, or do not end where the file ends."""
    reached = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != reached:
            what = "overlaps the tensor before it" if tensor.start < reached else "leaves a hole before it"
            raise FluxsplitError(f"{name}: tensor {tensor.name[:80]!r} {what}", DOWNLOAD_AGAIN)
        reached = tensor.end
    if reached > size_bytes:
        raise _truncated(name, size_bytes, reached)
    if reached < size_bytes:
        raise FluxsplitError(
            f"{name} has {size_bytes - reached} bytes after its last tensor: {size_bytes} bytes, its header says "
            f"{reached}",
            DOWNLOAD_AGAIN,
        )
