"""Small recipes, latents and hostile files that several tests share."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from array import array
from pathlib import Path
from typing import Any

from fluxsplit import torch_pickle
from fluxsplit.recipe import Recipe, WeightsStamp
from fluxsplit.torch_file import torch_file_bytes

SHAPE = (1, 16, 2, 4)
COUNT = 128


def make_recipe(**changes: Any) -> Recipe:
    """A recipe for a picture of 32 x 16 pixels."""
    values: dict[str, Any] = {
        "prompt": "a fox, snow",
        "seed": 1234567890,
        "width": 32,
        "height": 16,
        "steps": 4,
        "sigmas": (1.0, 0.75, 0.5, 0.1 + 0.2, 0.0),
        "sampler": "euler",
        "scheduler": "simple",
        "shift": None,
        "guidance": 3.5,
        "cfg": 1.0,
        "negative": "",
        "noise_index": 0,
        "variant": "schnell",
        "transformer": WeightsStamp("flux1-schnell-fp8-e4m3fn.safetensors", "bbdfba27fe" + "0" * 54),
        "text_encoder": WeightsStamp("t5xxl_fp8.safetensors"),
        "clip": WeightsStamp("clip_l.safetensors"),
        "dtype": "bf16",
        "device": "cpu",
        "versions": {"fluxsplit": "0.1.0", "torch": "2.10"},
        "created": "2025-01-01T00:00:00Z",
    }
    return Recipe(**{**values, **changes})


def make_payload(count: int = COUNT) -> bytes:
    """Little-endian fp32 values that are exact in bf16 and fp16 too."""
    return array("f", [(i % 64 - 32) / 8 for i in range(count)]).tobytes()


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of that header (an object, or raw JSON) and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def tensor_entry(shape: tuple[int, ...], start: int = 0, end: int | None = None, dtype: str = "F32") -> dict[str, Any]:
    """A header entry; the end is computed for fp32."""
    size = 4
    for side in shape:
        size *= side
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + size if end is None else end]}


def torch_zip(
    pickled: bytes, records: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED, stem: str = "archive"
) -> bytes:
    """A zip in the layout of torch.save with any pickle and records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in {"data.pkl": pickled, "version": b"3\n", **(records or {})}.items():
            archive.writestr(f"{stem}/{name}", data)
    return buffer.getvalue()


def tensor_pickle(shape: tuple[int, ...], stride: tuple[int, ...], count: int, offset: int = 0) -> bytes:
    """A pickle of `{"latents": tensor}` with any claims about the tensor."""

    def integer(value: int) -> bytes:
        raw = value.to_bytes(16, "little")
        return b"\x8a\x10" + raw

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    text = torch_pickle._text
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + integer(count) + b"tQ"
    arguments = storage + integer(offset) + integers(shape) + integers(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02}" + text("latents") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRs."


class _Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _good_pt() -> bytearray:
    texts = {"format": "fluxsplit-latent-1", "recipe": make_recipe().to_json(), "sha256": "0" * 64}
    return bytearray(torch_file_bytes("latents", SHAPE, make_payload(), texts))


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO(b""))
    return buffer.getvalue()


def _zip64_claim(data: bytes) -> bytes:
    """A zip whose zip64 record claims 2^40 records, while the plain end claims none."""
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1 << 40, 1 << 40, 1 << 40, 0)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, len(data), 1)
    return data + record + locator + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0, 0, 0, 0, 0)


def _many_records() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(5000):
            archive.writestr(f"archive/{number}", b"")
    return buffer.getvalue()


def _twice(name: str) -> bytes:
    raw = torch_zip(torch_pickle.dump({}), {"data/0": b"", "data/1": b""})
    return raw.replace(b"archive/data/1", b"archive/" + name.encode())


@functools.cache
def hostile_pt() -> dict[str, bytes]:
    """Files that pretend to be `.pt` latents; the reader must refuse each, quickly and in little memory."""
    payload = make_payload()
    good_pickle = tensor_pickle(SHAPE, (128, 8, 4, 1), COUNT)
    flipped, short = _good_pt(), _good_pt()
    flipped[flipped.index(payload) + 5] ^= 1
    nested = b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."
    doubled = b"\x80\x02}N" + b"q\x00h\x00\x86" * 64 + b"Ns."
    storage = {"data/0": payload}
    return {
        "os.system": torch_zip(pickle.dumps(_Runs(os.system, "touch /tmp/owned"), 2)),
        "eval": torch_zip(pickle.dumps({"latents": _Runs(eval, "1+1")}, 2)),
        "getattr by protocol 4": torch_zip(pickle.dumps(_Runs(getattr, "", "upper"), 4)),
        "torch.load as a name": torch_zip(b"\x80\x02ctorch\nload\nX\x01\0\0\0x\x85R."),
        "OrderedDict with arguments": torch_zip(b"\x80\x02ccollections\nOrderedDict\n]\x85R."),
        "bytearray of 8 GB": torch_zip(b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R."),
        "memo of 4 billion": torch_zip(b"\x80\x02Nr\xff\xff\xff\xff."),
        "nested marks": torch_zip(nested),
        "hash of a doubled tuple": torch_zip(doubled),
        "text of 4 GB": torch_zip(b"\x80\x02X\xff\xff\xff\xffabc."),
        "long pickle": torch_zip(b"\x80\x02" + b"N0" * (2 << 20)),
        "million instructions": torch_zip(b"\x80\x02" + b"N" * 1_000_000 + b"."),
        "no stop": torch_zip(b"\x80\x02}"),
        "nothing to pop": torch_zip(b"\x80\x02."),
        "pickle of a list": torch_zip(b"\x80\x02]."),
        "TorchScript": torch_zip(good_pickle, {**storage, "constants.pkl": b"", "code/a.py": b""}),
        "legacy tar": _tar(),
        "legacy pickle": b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"\x80\x02M\xe9\x03.",
        "storage of 1 TB": torch_zip(tensor_pickle(SHAPE, (128, 8, 4, 1), 1 << 38), storage),
        "stride 0, 4 TB": torch_zip(tensor_pickle((1, 16, 1 << 18, 1 << 18), (0, 0, 0, 0), COUNT), storage),
        "transposed": torch_zip(tensor_pickle(SHAPE, (128, 8, 1, 2), COUNT), storage),
        "offset over the end": torch_zip(tensor_pickle(SHAPE, (128, 8, 4, 1), COUNT, 1), storage),
        "shape of 2^127": torch_zip(tensor_pickle((1 << 100, 16, 2, 4), (128, 8, 4, 1), COUNT), storage),
        "storage missing": torch_zip(good_pickle),
        "deflated": torch_zip(good_pickle, storage, zipfile.ZIP_DEFLATED),
        "deflated pickle bomb": torch_zip(b"\x80\x02" + b"N" * (64 << 20), None, zipfile.ZIP_DEFLATED),
        "deflated storage bomb": torch_zip(good_pickle, {"data/0": bytes(64 << 20)}, zipfile.ZIP_DEFLATED),
        "big-endian": torch_zip(good_pickle, {**storage, "byteorder": b"big"}),
        "flipped bit": bytes(flipped),
        "truncated": bytes(short[: len(short) // 2]),
        "last byte gone": bytes(short[:-1]),
        "wrong sha256": bytes(short),
        "two of a name": _twice("data/0"),
        "5000 records": _many_records(),
        "zip64 claim": _zip64_claim(torch_zip(good_pickle, storage)),
        "plain zip": torch_zip(b"", None, stem="a/b"),
        "4 channels": torch_zip(tensor_pickle((1, 4, 8, 4), (128, 32, 4, 1), COUNT), storage),
        "packed": torch_zip(tensor_pickle((1, 2, 64), (128, 64, 1), COUNT), storage),
        "NaN": torch_zip(good_pickle, {"data/0": payload[:-4] + struct.pack("<f", float("nan"))}),
        "+inf and -inf": torch_zip(good_pickle, {"data/0": struct.pack("<2f", 1e999, -1e999) + payload[8:]}),
        "empty": b"",
        "PK only": b"PK\x03\x04",
    }


@functools.cache
def hostile_safetensors() -> dict[str, bytes]:
    """Files that pretend to be safetensors latents."""
    payload = make_payload()
    size = len(payload)
    good = tensor_entry(SHAPE)
    entry = json.dumps(good)
    ones = [1] * 5_000_000
    nan = struct.pack("<f", float("nan"))
    return {
        "duplicate tensor": safetensors_bytes(f'{{"latents": {entry}, "latents": {entry}}}'.encode(), payload),
        "duplicate metadata": safetensors_bytes(
            f'{{"__metadata__": {{"a": "1", "a": "2"}}, "latents": {entry}}}'.encode(), payload
        ),
        "5 million dimensions": safetensors_bytes(
            {"latents": {"dtype": "F32", "shape": ones, "data_offsets": [0, 4]}}, b"\0\0\0\0"
        ),
        "90 MB header": safetensors_bytes(b"{" + b" " * (90 << 20) + b"}"),
        "header of 2^63": safetensors_bytes(b"{}", b"", 1 << 63),
        "header over the end": safetensors_bytes(b"{}", b"", 4000),
        "60000 tensors": safetensors_bytes({str(i): tensor_entry((0,)) for i in range(60_000)}),
        "truncated": safetensors_bytes({"latents": good}, payload[:-1]),
        "trailing": safetensors_bytes({"latents": good}, payload + b"x"),
        "hole": safetensors_bytes({"latents": tensor_entry(SHAPE, 8)}, payload + bytes(8)),
        "overlap": safetensors_bytes({"a": tensor_entry(SHAPE), "latents": tensor_entry(SHAPE, 4)}, payload + bytes(4)),
        "size is not shape": safetensors_bytes({"latents": tensor_entry(SHAPE, 0, size - 4)}, payload[:-4]),
        "shape overflow": safetensors_bytes({"latents": tensor_entry((1 << 32, 1 << 32), 0, 0)}),
        "negative shape": safetensors_bytes({"latents": tensor_entry((-1, -128), 0, size)}, payload),
        "shape of true": safetensors_bytes({"latents": {**good, "shape": [True, 16, 2, 4]}}, payload),
        "backward offsets": safetensors_bytes({"latents": tensor_entry((1,), 8, 4)}, bytes(8)),
        "unknown dtype": safetensors_bytes({"latents": tensor_entry(SHAPE, 0, None, "F33")}, payload),
        "integer latents": safetensors_bytes({"latents": tensor_entry(SHAPE, 0, None, "I32")}, payload),
        "unknown key": safetensors_bytes({"latents": {**good, "more": 1}}, payload),
        "path and escape": safetensors_bytes({"../../etc/x\x1b[2J": tensor_entry((5,), 0, 4)}, bytes(4)),
        "surrogate": safetensors_bytes(
            f'{{"__metadata__": {{"prompt": "\\ud800"}}, "latents": {entry}}}'.encode(), payload
        ),
        "not UTF-8": safetensors_bytes(b'{"\xff": 1}'),
        "nested JSON": safetensors_bytes(b'{"a":' + b"[" * 1_000_000),
        "NaN in JSON": safetensors_bytes(b'{"a": NaN}'),
        "5000 digits": safetensors_bytes(b'{"a": ' + b"9" * 5000 + b"}"),
        "list": safetensors_bytes(b"[]      "),
        "metadata of numbers": safetensors_bytes({"__metadata__": {"a": 1}, "latents": good}, payload),
        "empty objects": safetensors_bytes(b'{"a":[' + b"{}," * 1_300_000 + b"{}]}"),
        "SD1 .latent": safetensors_bytes({"latent_tensor": good}, payload),
        "4 channels": safetensors_bytes({"latents": tensor_entry((1, 4, 8, 4))}, payload),
        "no such tensor": safetensors_bytes({"weight": good}, payload),
        "NaN": safetensors_bytes({"latents": good}, payload[:-4] + nan),
        "wrong sha256": safetensors_bytes({"__metadata__": {"fluxsplit.sha256": "0" * 64}, "latents": good}, payload),
        "no sha256": safetensors_bytes({"__metadata__": {"format": "fluxsplit-latent-1"}, "latents": good}, payload),
        "newer format": safetensors_bytes({"__metadata__": {"format": "fluxsplit-latent-9"}, "latents": good}, payload),
        "recipe is a list": safetensors_bytes({"__metadata__": {"fluxsplit.recipe": "[]"}, "latents": good}, payload),
        "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "web page": b"<!DOCTYPE html><html></html>",
        "GGUF": b"GGUF\x03\0\0\0" + bytes(40),
    }


def write_all(folder: Path, files: dict[str, bytes]) -> list[Path]:
    """The files under names that say nothing of their kind."""
    paths = []
    for number, data in enumerate(files.values()):
        paths.append(folder / f"file-{number}")
        paths[-1].write_bytes(data)
    return paths
