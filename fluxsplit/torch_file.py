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
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fluxsplit import torch_pickle
from fluxsplit.errors import FluxsplitError
from fluxsplit.torch_pickle import MAX_PICKLE_BYTES, PickledTensor

if TYPE_CHECKING:
    from zipfile import ZipFile, ZipInfo

ZIP_MAGIC = b"PK\x03\x04"
MAX_FILE_BYTES = 320 << 20
"""The latent of a picture of 16384 x 16384 pixels has 256 MiB."""
MAX_RECORDS = 64
MAX_DIRECTORY_BYTES = 64 << 10
BYTES_BY_DTYPE = {"F32": 4, "F16": 2, "BF16": 2}
_ALIGNMENT = 64
_STEM = "archive"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A contiguous tensor: its dtype (F32, F16, BF16), its shape and its little-endian bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_torch_file(path: Path, wanted: tuple[str, ...]) -> dict[str, Tensor | str]:
    """Texts and tensors of a file by `torch.save`, those named in `wanted`; a bare tensor gets the first name.

    Raises FluxsplitError; its message does not name the file.
    """
    import zipfile  # noqa: PLC0415 - 20 ms that most commands need not spend
    import zlib  # noqa: PLC0415

    try:
        with path.open("rb") as file:
            _check_directory(file)
            with zipfile.ZipFile(file) as archive:
                return _read(archive, wanted)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise FluxsplitError(f"its zip container is damaged: {str(error)[:100]}", "copy or make it again") from None
    except ValueError as error:
        raise FluxsplitError(f"its zip container cannot be read: {str(error)[:100]}") from None


def _check_directory(file: BinaryIO) -> None:
    """Refuse a list of records too long to be read, before `zipfile` reads it."""
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes > MAX_FILE_BYTES:
        raise FluxsplitError(f"it has {size_bytes} bytes, no latent has over {MAX_FILE_BYTES}")
    file.seek(max(0, size_bytes - 98))
    tail = file.read(98)
    if tail[-22:-18] != b"PK\x05\x06":
        raise FluxsplitError("it is truncated: the list of records at its end is missing", "copy or make it again")
    records, directory_bytes = struct.unpack("<HI", tail[-12:-6])
    if tail[-42:-38] == b"PK\x06\x07":  # a zip64 locator, and before it the zip64 record of 56 bytes
        if tail[:4] != b"PK\x06\x06":
            raise FluxsplitError("its zip container is damaged: the zip64 record is missing")
        records, directory_bytes = struct.unpack("<QQ", tail[32:48])
    if records > MAX_RECORDS or directory_bytes > MAX_DIRECTORY_BYTES:
        raise FluxsplitError(f"it lists {records} records in {directory_bytes} bytes, a latent has less than ten")
    file.seek(0)


def _read(archive: ZipFile, wanted: tuple[str, ...]) -> dict[str, Tensor | str]:
    records = _records(archive)
    pickles = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise FluxsplitError("it is a zip file, but not one by torch.save", "name a latent file")
    stem = pickles[0].removesuffix("data.pkl")
    if stem + "constants.pkl" in records or any(name.startswith(stem + "code/") for name in records):
        raise FluxsplitError("it is a TorchScript program, not a latent", "do not trust this file")
    if stem + "byteorder" in records and _bytes(archive, records[stem + "byteorder"], 16) != b"little":
        raise FluxsplitError("it was saved on a big-endian machine", "save it as safetensors there")
    table = torch_pickle.load(_bytes(archive, records[pickles[0]], MAX_PICKLE_BYTES))
    if isinstance(table, PickledTensor):
        table = {wanted[0]: table}
    if not isinstance(table, dict):
        raise FluxsplitError(f"it holds a {type(table).__name__}, not a tensor or a table of tensors")
    return {name: _value(archive, records, stem, table[name]) for name in wanted if name in table}


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


def _value(archive: ZipFile, records: dict[str, ZipInfo], stem: str, value: Any) -> Tensor | str:
    if isinstance(value, str):
        return value
    if not isinstance(value, PickledTensor):
        raise FluxsplitError(f"it holds a {type(value).__name__} where a tensor belongs")
    record = records.get(f"{stem}data/{value.key}")
    if record is None:
        raise FluxsplitError(f"its storage {value.key[:20]} is missing")
    item_bytes = BYTES_BY_DTYPE[value.dtype]
    if record.file_size != value.storage_count * item_bytes:
        raise FluxsplitError(f"its storage claims {value.storage_count * item_bytes} bytes and has {record.file_size}")
    count = math.prod(value.shape)
    if value.offset + count > value.storage_count or not _is_contiguous(value):
        raise FluxsplitError(
            f"its tensor of shape {list(value.shape)} and strides {list(value.stride)} is no contiguous part of its "
            f"storage of {value.storage_count} elements",
            "save `latents.contiguous().clone()`",
        )
    data = _bytes(archive, record, MAX_FILE_BYTES)
    start, length = value.offset * item_bytes, count * item_bytes
    return Tensor(value.dtype, value.shape, data if length == len(data) else data[start : start + length])


def _is_contiguous(tensor: PickledTensor) -> bool:
    if len(tensor.shape) != len(tensor.stride):
        return False
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
