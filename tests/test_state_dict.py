"""Weight files of small networks: what torch wrote reads back exactly; what is hostile is refused and runs nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fluxsplit.errors import FluxsplitError, ModelFileMissing
from fluxsplit.spandrel_network import DTYPES
from fluxsplit.state_dict import StateDict, read_state_dict

STATE = {
    "body.0.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "body.0.bias": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "body.1.scale": torch.tensor(3.0, dtype=torch.bfloat16),
    "body.1.index": torch.tensor([[1, -2]], dtype=torch.int64),
    "body.1.mask": torch.tensor([True, False]),
}


def values(state: StateDict) -> dict[str, torch.Tensor]:
    return {
        name: torch.frombuffer(bytearray(tensor.data), dtype=DTYPES[tensor.dtype]).view(tensor.shape)
        for name, tensor in state.items()
    }


def saved(table: Any, new: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(table, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def read(folder: Path, data: bytes) -> StateDict:
    file = folder / "x.pth"
    file.write_bytes(data)
    return read_state_dict(file)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("wrap", ["", "params_ema", "params", "state_dict", "anything"])
def test_what_torch_saved(tmp_path: Path, new: bool, wrap: str) -> None:
    state = values(read(tmp_path, saved({wrap: STATE} if wrap else STATE, new)))
    assert state.keys() == STATE.keys()
    for name, value in state.items():
        assert value.dtype == STATE[name].dtype and torch.equal(value, STATE[name])


@pytest.mark.parametrize("new", [True, False])
def test_a_modules_own_state(tmp_path: Path, new: bool) -> None:
    """It carries `_metadata`, which the pickle sets by BUILD."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = values(read(tmp_path, saved({"params": module.state_dict(), "epoch": 3, "loss": [0.5, None]}, new)))
    for name, value in module.state_dict().items():
        assert torch.equal(state[name], value)


def test_the_averaged_weights_go_before_the_last(tmp_path: Path) -> None:
    table = {"params": {"a": torch.zeros(1)}, "params_ema": {"a": torch.ones(1)}}
    assert values(read(tmp_path, saved(table)))["a"].item() == 1


def test_parts_of_a_shared_storage(tmp_path: Path) -> None:
    both = torch.arange(4.0)
    for new in (True, False):
        state = values(read(tmp_path, saved({"a": both[:2], "b": both[2:]}, new)))
        assert state["a"].tolist() == [0, 1] and state["b"].tolist() == [2, 3]


def test_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    state = values(read_state_dict(tmp_path / "x.safetensors"))
    assert all(torch.equal(state[name], value) for name, value in STATE.items())


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFileMissing, match="does not exist"):
        read_state_dict(tmp_path / "x.pth")


class Runs:
    """A thing whose pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def zipped(pickled: bytes, extra: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", **(extra or {})}.items():
            archive.writestr(f"x/{name}", data)
    return buffer.getvalue()


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data and len(old) == len(new)
    return data.replace(old, new)


def inner_pickle(data: bytes) -> bytes:
    """The pickle of a file, without the storages beside it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))


def scripted() -> bytes:
    return zipped(pickle.dumps({}, 2), {"constants.pkl": b"", "code/x.py": b""})


def old_with_count(count: int) -> bytes:
    data = saved({"a": torch.ones(3)}, new=False)
    place = len(data) - 12 - 8
    assert data[place : place + 8] == struct.pack("<Q", 3)
    return data[:place] + struct.pack("<Q", count) + data[place + 8 :]


def circular() -> bytes:
    table: dict[str, Any] = {"a": torch.ones(1)}
    table["params"] = table
    return saved(table, new=False)


def of_shape(*shape: int) -> bytes:
    """A tensor that claims a shape, with the strides of a contiguous one, on a storage of four elements."""
    return saved({"a": torch.empty(4).as_strided(shape, [0] * len(shape))})


def stored_header(table: dict[str, Any], payload: bytes = b"") -> bytes:
    header = json.dumps(table).encode()
    return struct.pack("<Q", len(header)) + header + payload


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "runs a command": (lambda: saved({"a": Runs(os.system, "touch ran")}), "asks for|calls"),
    "runs a command, old": (lambda: saved({"a": Runs(os.system, "touch ran")}, new=False), "asks for|calls"),
    "evaluates": (lambda: saved({"a": Runs(eval, "open('ran', 'w')")}), "asks for|calls"),
    "eight gigabytes of zeros": (lambda: zipped(pickle.dumps(Runs(bytearray, 8 << 30), 2)), "asks for"),
    "hidden in a module": (lambda: saved({"a": Runs(__import__, "os")}), "asks for|calls"),
    "a program": (scripted, "TorchScript"),
    "deflated": (lambda: zipped(pickle.dumps({"a": "x" * 9999}, 2), method=zipfile.ZIP_DEFLATED), "compressed"),
    "a bare pickle": (lambda: pickle.dumps(STATE["body.0.weight"].tolist()), "neither"),
    "not a table": (lambda: saved([1, 2, 3]), "list"),
    "no tensors": (lambda: saved({"a": 1}), "no tensors"),
    "empty": (lambda: b"", "neither"),
    "a storage that is missing": (lambda: zipped(inner_pickle(saved({"a": torch.ones(1)}))), "missing"),
    "a storage that is too small": (
        lambda: replaced(saved({"a": torch.ones(77)}), b"cpuq\x06KMt", b"cpuq\x06KNt"), "damaged|claims"
    ),
    "terabytes by strides": (lambda: of_shape(1 << 20, 1 << 20), "together|contiguous"),
    "shared until it is large": (
        lambda: saved({str(n): shared for shared in [torch.ones(5000)] for n in range(100)}), "together"
    ),
    "shared until it is large, old": (
        lambda: saved({str(n): shared for shared in [torch.ones(5000)] for n in range(100)}, new=False), "together"
    ),
    "an empty tensor of great width": (lambda: saved({"a": torch.empty(0, 1 << 40)}), "empty"),
    "a billion layers": (lambda: saved({"body.999999999.weight": torch.ones(1)}), "layers"),
    "a number with zeros before it": (lambda: saved({"body.000000123456.weight": torch.ones(1)}), "layers"),
    "a name of a megabyte": (lambda: saved({"a" * 1_000_000: torch.ones(1)}), "layers"),
    "complex": (lambda: saved({"a": torch.ones(1, dtype=torch.complex64)}), "Complex"),
    "float8": (lambda: saved({"a": torch.ones(1).to(torch.float8_e4m3fn)}), "asks for"),
    "a whole module": (lambda: saved(torch.nn.Linear(2, 2)), "asks for"),
    "circular": (circular, "no tensors|dict|table"),
    "old, a storage beyond the end": (lambda: old_with_count(1 << 60), "truncated"),
    "old, another count": (lambda: old_with_count(2), "claims"),
    "old, cut short": (lambda: saved(STATE, new=False)[:-5], "truncated"),
    "old, cut in its pickle": (lambda: saved(STATE, new=False)[:200], "pickle"),
    "old, big-endian": (
        lambda: replaced(saved(STATE, new=False), b"little_endianq\x02\x88", b"little_endianq\x02\x89"), "big-endian"
    ),
    "cut short": (lambda: saved(STATE)[:-5], "truncated"),
    "a flipped bit": (lambda: replaced(saved({"a": torch.full((9,), 7.0)}), b"\0\0\xe0@" * 9, b"\0\0\xe1@" * 9), "CRC"),
    "safetensors, a byte missing": (
        lambda: stored_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"123"), "truncated"
    ),
    "safetensors, float8": (
        lambda: stored_header({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}, b"1"), "F8_E4M3"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_and_run_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, words = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        data = make()
    tracemalloc.start()
    try:
        if name == "circular":  # a table within itself holds one honest tensor
            assert read(tmp_path, data).keys() <= {"a"}
        else:
            with pytest.raises(FluxsplitError, match=words):
                read(tmp_path, data)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < (64 << 20) + 4 * len(data)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("new", [True, False])
def test_no_cut_and_no_changed_byte_ends_in_anything_but_our_error(tmp_path: Path, new: bool) -> None:
    data = saved(OrderedDict(a=torch.ones(2, 3), b=torch.zeros(4, dtype=torch.int64)), new)
    for place in range(0, len(data), 7):
        for bad in (data[:place], data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :]):
            try:
                state = read(tmp_path, bad)
            except (FluxsplitError, ModelFileMissing):
                continue
            assert all(len(tensor.data) < 100 for tensor in state.values())
