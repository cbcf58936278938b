"""The zip container that `torch.save` writes, read and written without torch.

The records are `<stem>/data.pkl`, `<stem>/data/<key>` for each storage, `<stem>/version` and `<stem>/byteorder`,
all stored, never deflated (pytorch/caffe2/serialize/inline_container.cc). A file is believed only within
limits: few records, none compressed or encrypted, CRC right, sizes as claimed. So no file takes more memory
than it has bytes, which `torch.load(weights_only=True)` does not promise.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fluxsplit import torch_pickle
from fluxsplit.errors import FluxsplitError
from fluxsplit.torch_pickle import LATENT, WEIGHTS, Grammar, PickledTensor

if TYPE_CHECKING:
    from zipfile import ZipFile, ZipInfo

ZIP_MAGIC = b"PK\x03\x04"
MAX_FILE_BYTES = 320 << 20
"""The latent of a picture of 16384 x 16384 pixels has 256 MiB."""
BYTES_BY_DTYPE = {"F32": 4, "F16": 2, "BF16": 2}
ITEM_BYTES = BYTES_BY_DTYPE | {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ALIGNMENT = 64
_STEM = "archive"


@dataclass(frozen=True, slots=True)
class FileLimits:
    """What a zip file by `torch.save` of some purpose may hold."""

    grammar: Grammar
    file_bytes: int
    records: int
    directory_bytes: int


LATENT_FILE = FileLimits(LATENT, MAX_FILE_BYTES, records=64, directory_bytes=64 << 10)
WEIGHT_FILE = FileLimits(WEIGHTS, 1 << 30, records=20_000, directory_bytes=4 << 20)
Choice = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A contiguous tensor: its dtype (F32, F16, BF16, ...), its shape and its little-endian bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_torch_file(path: Path, wanted: tuple[str, ...]) -> dict[str, Tensor | str]:
    """Texts and tensors of a latent by `torch.save`, those named in `wanted`; a bare tensor gets the first name.

    Raises FluxsplitError; its message does not name the file.
    """

    def choose(table: Any) -> dict[str, Any]:
        if isinstance(table, PickledTensor):
            table = {wanted[0]: table}
        if not isinstance(table, dict):
            raise FluxsplitError(f"it holds a {type(table).__name__}, not a tensor or a table of tensors")
        return {name: table[name] for name in wanted if name in table}

    return read_chosen(path, choose, LATENT_FILE)


def read_chosen(path: Path, choose: Choice, limits: FileLimits) -> dict[str, Tensor | str]:
    """The texts and tensors that `choose` takes, by name, from what the file's pickle holds.

    Raises FluxsplitError; its message does not name the file.
    """
    import zipfile  # noqa: PLC0415 - 20 ms that most commands need not spend
    import zlib  # noqa: PLC0415

    try:
        with path.open("rb") as file:
            _check_directory(file, limits)
            with zipfile.ZipFile(file) as archive:
                return _read(archive, choose, limits)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise FluxsplitError(f"its zip container is damaged: {str(error)[:100]}", "copy or make it again") from None
    except ValueError as error:
        raise FluxsplitError(f"its zip container cannot be read: {str(error)[:100]}") from None


def _check_directory(file: BinaryIO, limits: FileLimits) -> None:
    """Refuse a list of records too long to be read, before `zipfile` reads it."""
    what = limits.grammar.what
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes > limits.file_bytes:
        raise FluxsplitError(f"it has {size_bytes} bytes, no {what} has over {limits.file_bytes}")
    file.seek(max(0, size_bytes - 98))
    tail = file.read(98)
    if tail[-22:-18] != b"PK\x05\x06":
        raise FluxsplitError("it is truncated: the list of records at its end is missing", "copy or make it again")
    records, directory_bytes = struct.unpack("<HI", tail[-12:-6])
    if tail[-42:-38] == b"PK\x06\x07":  # a zip64 locator, and before it the zip64 record of 56 bytes
        if tail[:4] != b"PK\x06\x06":
            raise FluxsplitError("its zip container is damaged: the zip64 record is missing")
        records, directory_bytes = struct.unpack("<QQ", tail[32:48])
    if records > limits.records or directory_bytes > limits.directory_bytes:
        raise FluxsplitError(f"it lists {records} records in {directory_bytes} bytes, more than any {what}")
    file.seek(0)


def _read(archive: ZipFile, choose: Choice, limits: FileLimits) -> dict[str, Tensor | str]:
    records = _records(archive)
    what = limits.grammar.what
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise FluxsplitError("it is a zip file, but not one by torch.save", f"name a {what}")
    stem = pickles[0].removesuffix("data.pkl")
    if stem + "constants.pkl" in records or any(name.startswith(stem + "code/") for name in records):
        raise FluxsplitError(f"it is a TorchScript program, not a {what}", "do not trust this file")
    if stem + "byteorder" in records and _bytes(archive, records[stem + "byteorder"], 16) != b"little":
        raise FluxsplitError("it was saved on a big-endian machine", "save it as safetensors there")
    pickled = _bytes(archive, records[pickles[0]], limits.grammar.pickle_bytes)
    chosen = choose(torch_pickle.load(pickled, limits.grammar))
    check_total(chosen, sum(record.file_size for record in records.values()))
    return {name: _value(archive, records, stem, value, limits) for name, value in chosen.items()}


def check_total(chosen: dict[str, Any], held_bytes: int) -> None:
    """Refuse tensors that share storages until they are larger together than the file."""
    tensors = [value for value in chosen.values() if isinstance(value, PickledTensor)]
    total_bytes = sum(math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] for tensor in tensors)
    if total_bytes > held_bytes:
        raise FluxsplitError(f"its tensors have {total_bytes} bytes together, the file has {held_bytes}")


def _records(archive: ZipFile) -> dict[str, ZipInfo]:
    records = {record.filename: record for record in archive.infolist()}
    if len(records) != len(archive.infolist()):
        raise FluxsplitError("its zip container has two records of one name")
    for record in records.values():
        shown = f"its record {record.filename[:80]!r}"
        if record.compress_type != 0 or record.file_size != record.compress_size:
            raise FluxsplitError(f"{shown} is compressed", "torch.save writes none such; do not trust this file")
        if record.flag_bits & 1:
            raise FluxsplitError(f"{shown} is encrypted")
    return records


def _bytes(archive: ZipFile, record: ZipInfo, limit: int) -> bytes:
    """The record's bytes; `zipfile` checks their CRC."""
    if record.file_size > limit:
        raise FluxsplitError(f"its record {record.filename[:80]!r} claims {record.file_size} bytes, over {limit}")
    data = archive.read(record)
    if len(data) != record.file_size:
        raise FluxsplitError(f"its record {record.filename[:80]!r} is cut short")
    return data


def _value(archive: ZipFile, records: dict[str, ZipInfo], stem: str, value: Any, limits: FileLimits) -> Tensor | str:
    if isinstance(value, str):
        return value
    if not isinstance(value, PickledTensor):
        raise FluxsplitError(f"it holds a {type(value).__name__} where a tensor belongs")
    record = records.get(f"{stem}data/{value.key}")
    if record is None:
        raise FluxsplitError(f"its storage {value.key[:20]} is missing")
    item_bytes = ITEM_BYTES[value.dtype]
    if record.file_size != value.storage_count * item_bytes:
        raise FluxsplitError(f"its storage claims {value.storage_count * item_bytes} bytes and has {record.file_size}")
    check_view(value)
    return cut_out(value, _bytes(archive, record, limits.file_bytes))


def check_view(value: PickledTensor) -> None:
    """Refuse a tensor that is no contiguous part of its storage."""
    if value.offset + math.prod(value.shape) > value.storage_count or not _is_contiguous(value):
        raise FluxsplitError(
            f"its tensor of shape {list(value.shape)} and strides {list(value.stride)} is no contiguous part of its "
            f"storage of {value.storage_count} elements",
            "save `tensor.contiguous().clone()`",
        )


def cut_out(value: PickledTensor, storage: bytes) -> Tensor:
    """A tensor, checked by `check_view`, out of the bytes of its storage."""
    item_bytes = ITEM_BYTES[value.dtype]
    start, length = value.offset * item_bytes, math.prod(value.shape) * item_bytes
    return Tensor(value.dtype, value.shape, storage if length == len(storage) else storage[start : start + length])


def _is_contiguous(tensor: PickledTensor) -> bool:
    if len(tensor.shape) != len(tensor.stride):
        return False
    if 0 in tensor.shape:
        return True  # of nothing, whatever the strides
    expected = 1
    for side, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if side != 1 and stride != expected:
            return False
        expected *= side
    return True


def torch_file_bytes(tensor_name: str, shape: tuple[int, ...], payload: bytes, texts: dict[str, str]) -> memoryview:
    """A file that `torch.load(weights_only=True)` reads as a dict of one fp32 tensor and some texts.

    `payload` is little-endian fp32 in C order. Tensor bytes start at a multiple of 64, as torch's own do, so
    that `mmap=True` works too.
    """
    import zipfile  # noqa: PLC0415

    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    tensor = PickledTensor("F32", "0", math.prod(shape), 0, shape, stride)
    table: dict[str, str | PickledTensor] = {"format": texts["format"], tensor_name: tensor, **texts}
    records = {"data.pkl": torch_pickle.dump(table), "byteorder": b"little", "data/0": payload, "version": b"3\n"}
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name, data in records.items():
            info = zipfile.ZipInfo(f"{_STEM}/{name}", (1980, 1, 1, 0, 0, 0))
            data_start = buffer.tell() + 30 + len(info.filename) + 4
            padding = -data_start % _ALIGNMENT
            info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
            archive.writestr(info, data)
    return buffer.getbuffer()
