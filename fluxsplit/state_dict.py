"""The tensors of a small network's weight file, `.safetensors` or `.pth`, read without torch and without unpickling.

Upscalers are published as `.pth`: a pickle that may be a table of tensors, or such a table under `params_ema`,
`params` or `state_dict`. torch has written two containers for it: a zip file, and before version 1.6 a row of
pickles followed by the storages (pytorch/torch/serialization.py, `_legacy_save`). Both are interpreted here by
`torch_pickle`, which names nothing and calls nothing; what a file is, its content says, not its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from fluxsplit import torch_pickle
from fluxsplit.errors import FluxsplitError, ModelFileMissing
from fluxsplit.safetensor_header import Limits, read_header
from fluxsplit.torch_file import (
    ITEM_BYTES,
    WEIGHT_FILE,
    ZIP_MAGIC,
    Tensor,
    check_total,
    check_view,
    cut_out,
    read_chosen,
)
from fluxsplit.torch_pickle import WEIGHTS, PickledTensor

StateDict = dict[str, Tensor]
SUFFIXES = (".pth", ".safetensors", ".sft", ".pt")
OLD_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
OLD_TORCH_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
MAX_FILE_BYTES = WEIGHT_FILE.file_bytes
MAX_TENSORS = 20_000
MAX_LAYER = 2000
"""Highest number in a name: a network is built with as many layers as the highest number says."""
MAX_EMPTY_SIDE = 4096
"""Of a tensor without elements, which costs no bytes and may claim any shape."""
_LIMITS = Limits(header_bytes=4 << 20, tensors=MAX_TENSORS)
_WRAPPERS = ("params_ema", "params-ema", "params", "model_state_dict", "state_dict", "model", "net")
_NUMBER = re.compile(r"\d+", re.ASCII)


def read_state_dict(path: str | Path) -> StateDict:
    """The tensors in the file at `path`, by name, those of `params_ema` or its like where it has one.

    Raises ModelFileMissing where there is no such file, FluxsplitError where it holds anything but tensors that it
    has room for, under names that a network of sane size has.
    """
    path = Path(path)
    try:
        state = _container(path)(path)
        _check(state)
    except FileNotFoundError:
        raise ModelFileMissing(f"{path} does not exist") from None
    except OSError as error:
        raise FluxsplitError(f"cannot read {path}: {error.strerror}") from error
    except FluxsplitError as error:
        raise _refused(path, error) from None
    return state


def check_container(path: Path) -> None:
    """Refuse, by its first bytes, a file that cannot hold tensors; raises FluxsplitError."""
    try:
        _container(path)
    except FluxsplitError as error:
        raise _refused(path, error) from None


def _refused(path: Path, error: FluxsplitError) -> FluxsplitError:
    return FluxsplitError(f"{path.name} is refused: {error.message}", error.hint)


def _container(path: Path) -> Callable[[Path], StateDict]:
    """Who reads such a file."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(ZIP_MAGIC):
        return _read_zip
    if start.startswith(OLD_TORCH_START):
        return _read_old
    if start[8:9] == b"{":
        return _read_safetensors
    raise FluxsplitError("it is neither safetensors nor a file by torch.save", "name a .safetensors or .pth file")


def _read_zip(path: Path) -> StateDict:
    chosen = read_chosen(path, unwrapped, WEIGHT_FILE)
    return {name: tensor for name, tensor in chosen.items() if isinstance(tensor, Tensor)}


def unwrapped(table: Any) -> dict[str, Any]:
    """The table of tensors in what a pickle holds: itself, or the one under the name that training scripts use."""
    for _ in range(3):
        if not isinstance(table, dict):
            raise FluxsplitError(f"it holds a {type(table).__name__}, not a table of tensors")
        inner = next((table[name] for name in _WRAPPERS if isinstance(table.get(name), dict)), None)
        if inner is None and len(table) == 1:
            inner = next(iter(table.values()))
        if not isinstance(inner, dict):
            break
        table = inner
    tensors = {name: value for name, value in table.items() if isinstance(value, PickledTensor)}
    if not tensors:
        raise FluxsplitError("it holds no tensors")
    return tensors


def _read_old(path: Path) -> StateDict:
    """A file by torch before 1.6: magic, version, machine, table and list of storages as pickles, then storages."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise FluxsplitError(f"it has {path.stat().st_size} bytes, at most {MAX_FILE_BYTES} are read")
    data = path.read_bytes()
    stream = BytesIO(data[: WEIGHTS.pickle_bytes])
    magic, version, machine, table, keys = (torch_pickle.load_next(stream, WEIGHTS) for _ in range(5))
    if magic != OLD_TORCH_MAGIC or version != 1001 or not isinstance(machine, dict):
        raise FluxsplitError(f"it is in version {str(version)[:20]} of the old torch format, which is not known")
    if machine.get("little_endian") is not True:
        raise FluxsplitError("it was saved on a big-endian machine", "save it as safetensors there")
    chosen = unwrapped(table)
    check_total(chosen, len(data))
    places = _old_storages(data, stream.tell(), keys, table)
    state: StateDict = {}
    for name, value in chosen.items():
        if value.key not in places:
            raise FluxsplitError(f"its storage {value.key[:20]} is missing")
        start, count = places[value.key]
        if count != value.storage_count:
            raise FluxsplitError(f"its storage claims {value.storage_count} elements and has {count}")
        check_view(value)
        state[name] = cut_out(value, data[start : start + count * ITEM_BYTES[value.dtype]])
    return state


def _old_storages(data: bytes, start: int, keys: Any, table: Any) -> dict[str, tuple[int, int]]:
    """Where in the file each storage begins and how many elements it has; each is led by its count, in 8 bytes."""
    dtypes: dict[str, str] = {}
    for tensor in _all_tensors(table):
        if dtypes.setdefault(tensor.key, tensor.dtype) != tensor.dtype:
            raise FluxsplitError(f"its storage {tensor.key[:20]} has two dtypes")
    places: dict[str, tuple[int, int]] = {}
    for key in keys if isinstance(keys, list) else [None]:
        if not isinstance(key, str) or key not in dtypes or key in places:
            raise FluxsplitError("its list of storages is damaged")
        count = int.from_bytes(data[start : start + 8], "little")
        start += 8
        size_bytes = count * ITEM_BYTES[dtypes[key]]
        if start + size_bytes > len(data):
            raise FluxsplitError(f"it is truncated: it has {len(data)} bytes and storages up to {start + size_bytes}")
        places[key] = (start, count)
        start += size_bytes
    return places


def _all_tensors(value: Any) -> list[PickledTensor]:
    """The tensors in nested tables and lists; each container is entered once, since a memo may make them circular."""
    found: list[PickledTensor] = []
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, PickledTensor):
            found.append(item)
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item
    return found


def _read_safetensors(path: Path) -> StateDict:
    header = read_header(path, _LIMITS)
    if header.size_bytes > MAX_FILE_BYTES:
        raise FluxsplitError(f"it has {header.size_bytes} bytes, at most {MAX_FILE_BYTES} are read")
    state: StateDict = {}
    with path.open("rb") as file:
        for name, info in header.tensors.items():
            if info.dtype not in ITEM_BYTES:
                raise FluxsplitError(f"its tensor {name[:80]!r} is {info.dtype}", "save it as fp32, fp16 or bf16")
            file.seek(info.start)
            data = file.read(info.end - info.start)
            if len(data) != info.end - info.start:
                raise FluxsplitError("it became shorter while it was read")
            state[name] = Tensor(info.dtype, info.shape, data)
    return state


def _check(state: StateDict) -> None:
    """Refuse names and shapes from which a network of absurd size would be built."""
    if len(state) > MAX_TENSORS:
        raise FluxsplitError(f"it holds {len(state)} tensors, at most {MAX_TENSORS} are read")
    for name, tensor in state.items():
        numbers = _NUMBER.findall(name)
        if len(name) > 500 or any(len(number) > 4 or int(number) > MAX_LAYER for number in numbers):
            raise FluxsplitError(f"its tensor {name[:80]!r} counts layers beyond {MAX_LAYER}")
        if 0 in tensor.shape and max(tensor.shape) > MAX_EMPTY_SIDE:
            raise FluxsplitError(f"its tensor {name[:80]!r} of shape {list(tensor.shape)} is empty")
