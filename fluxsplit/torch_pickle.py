"""The few pickle instructions that describe tensors, interpreted without unpickling: no import, no call.

`torch.save` writes a pickle (protocol 2) in which a tensor is `torch._utils._rebuild_tensor_v2` applied to a
storage, an offset, a shape and strides, and a storage is a persistent id
`("storage", torch.FloatStorage, key, device, count)` whose bytes lie beside the pickle
(pytorch/torch/serialization.py). A pickle is a program for a stack machine. The machine here knows tables,
lists, tuples, numbers, text and that one application; a name such as `os.system` stays a name, and everything
else is an error. Keys of tables are text only, so that no hash of a hostile nesting is ever taken.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, BinaryIO

from fluxsplit.errors import FluxsplitError

_FLOATS = {"torch FloatStorage": "F32", "torch HalfStorage": "F16", "torch BFloat16Storage": "BF16"}
_OTHERS = {
    "torch DoubleStorage": "F64",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}
_REBUILD = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED = "collections OrderedDict"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a pickle of some purpose may hold, and how much of it."""

    what: str
    """The thing that is read, for messages: `no latent needs os.system`."""
    pickle_bytes: int
    opcodes: int
    memo: int
    storages: dict[str, str]
    """dtype by the name of its storage class."""
    names: tuple[str, ...]
    """Globals, apart from those of torch's storages, that may be named."""


LATENT = Grammar("latent", 2 << 20, 20_000, 10_000, _FLOATS, (_REBUILD, _ORDERED))
WEIGHTS = Grammar("weight file", 16 << 20, 1_000_000, 500_000, _FLOATS | _OTHERS, (_REBUILD, _PARAMETER, _ORDERED))
"""A network of 700 tensors takes some 30,000 instructions."""


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as the pickle describes it; its values are in record `data/<key>`."""

    dtype: str
    """As safetensors names it: F32, F16, BF16; in weight files also F64, I64, ..."""
    key: str
    storage_count: int
    """Elements that the storage claims to have."""
    offset: int
    """Elements before the first one of this tensor."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Name:
    """A global that the pickle names; never looked up."""

    text: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    count: int


@dataclass(slots=True)
class _Machine:
    """The stack, the marks on it, and the memo."""

    grammar: Grammar
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop(self) -> Any:
        if not self.stack or (self.marks and self.marks[-1] >= len(self.stack)):
            raise FluxsplitError("its pickle takes more values than it has")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise FluxsplitError("its pickle lacks a mark")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def push_tuple(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))


def load(data: bytes, grammar: Grammar = LATENT) -> Any:
    """What the pickle holds: dicts, lists, tuples, text, numbers and `PickledTensor`.

    Raises FluxsplitError for anything else, and for more than `grammar` allows.
    """
    if len(data) > grammar.pickle_bytes:
        raise FluxsplitError(f"its pickle has {len(data)} bytes, at most {grammar.pickle_bytes} are read")
    return load_next(BytesIO(data), grammar)


def load_next(stream: BinaryIO, grammar: Grammar) -> Any:
    """What the next pickle in `stream` holds, which is left after its end; as `load`."""
    import pickletools  # noqa: PLC0415 - 10 ms that most commands need not spend

    machine = _Machine(grammar)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number >= grammar.opcodes:
                raise FluxsplitError(f"its pickle has over {grammar.opcodes} instructions")
            if opcode.name == "STOP":
                break
            step = _STEPS.get(opcode.name)
            if step is None:
                raise FluxsplitError(f"its pickle uses {opcode.name}, which no {grammar.what} needs")
            step(machine, argument)
        result = machine.pop()
    except (ValueError, OverflowError, IndexError, struct.error) as error:
        raise FluxsplitError(f"its pickle cannot be read: {str(error)[:100]}") from None
    if machine.stack or machine.marks:
        raise FluxsplitError("its pickle leaves values behind")
    return result


def _push(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _global(machine: _Machine, argument: Any) -> None:
    if argument not in machine.grammar.names and not str(argument).startswith("torch "):
        name = str(argument)[:80].replace(" ", ".")
        what = machine.grammar.what
        raise FluxsplitError(f"its pickle asks for {name!r}, which no {what} needs", "do not trust this file")
    machine.stack.append(_Name(argument))


def _put(machine: _Machine, argument: Any) -> None:
    if argument >= machine.grammar.memo or not machine.stack:
        raise FluxsplitError("its pickle remembers too much")
    machine.memo[argument] = machine.stack[-1]


def _get(machine: _Machine, argument: Any) -> None:
    if argument not in machine.memo:
        raise FluxsplitError("its pickle recalls what it never had")
    machine.stack.append(machine.memo[argument])


def _mark(machine: _Machine, _: Any) -> None:
    machine.marks.append(len(machine.stack))


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1] if machine.stack else None
    if type(target) is not list:
        raise FluxsplitError("its pickle appends to what is no list")
    target.extend(items)


def _set(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1] if machine.stack else None
    if type(target) is not dict or len(items) % 2:
        raise FluxsplitError("its pickle fills what is no table")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise FluxsplitError(f"its table has a key that is no text but {type(key).__name__}")
        if key in target:
            raise FluxsplitError(f"its table names {key[:80]!r} twice")
        target[key] = value


def _set_one(machine: _Machine, _: Any) -> None:
    value = machine.pop()
    _set(machine, [machine.pop(), value])


def _persistent_id(machine: _Machine, _: Any) -> None:
    match machine.pop():
        case ("storage", _Name(text=kind), str(key), str(), int(count)) if key.isascii() and key.isdecimal():
            pass
        case ("storage", _Name(text=kind), str(key), str(), int(count), None) if key.isascii() and key.isdecimal():
            pass  # before torch 1.6
        case _:
            raise FluxsplitError("its pickle refers to something that is no storage")
    if kind not in machine.grammar.storages:
        dtype = kind.removeprefix("torch ").removesuffix("Storage")
        raise FluxsplitError(f"its tensor is {dtype[:40]!r}", "save it as fp32, fp16 or bf16")
    machine.stack.append(_Storage(machine.grammar.storages[kind], key, count))


def _are_counts(values: tuple[Any, ...]) -> bool:
    return len(values) <= 8 and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    match function, arguments:
        case _Name(text="collections OrderedDict"), ():
            machine.stack.append({})
        case (
            _Name(text="torch._utils _rebuild_tensor_v2"),
            (_Storage() as storage, int(offset), tuple(shape), tuple(stride), bool(), dict(), *_),
        ) if _are_counts((offset, storage.count)) and _are_counts(shape) and _are_counts(stride):
            tensor = PickledTensor(storage.dtype, storage.key, storage.count, offset, shape, stride)
            machine.stack.append(tensor)
        case _Name(text="torch._utils _rebuild_parameter"), (PickledTensor() as tensor, bool(), dict()):
            machine.stack.append(tensor)
        case _:
            raise FluxsplitError("its pickle calls something that makes no tensor", "do not trust this file")


def _build(machine: _Machine, _: Any) -> None:
    """The attributes of a table, `_metadata` in every state dict: forgotten."""
    machine.pop()
    target = machine.stack[-1] if machine.stack else None
    if machine.grammar is LATENT or type(target) is not dict:
        raise FluxsplitError(f"its pickle uses BUILD, which no {machine.grammar.what} needs")


def _nothing(machine: _Machine, _: Any) -> None:
    pass


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _nothing,
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "BININT": _push,
    "BININT1": _push,
    "BININT2": _push,
    "LONG1": _push,
    "BINFLOAT": _push,
    "BINUNICODE": _push,
    "GLOBAL": _global,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "MARK": _mark,
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "APPEND": lambda machine, _: _append(machine, [machine.pop()]),
    "APPENDS": lambda machine, _: _append(machine, machine.pop_to_mark()),
    "SETITEM": _set_one,
    "SETITEMS": lambda machine, _: _set(machine, machine.pop_to_mark()),
    "BINPERSID": _persistent_id,
    "REDUCE": _reduce,
    "BUILD": _build,
}


def dump(table: dict[str, str | PickledTensor]) -> bytes:
    """A pickle of `table` as `torch.save` would write it (protocol 2, contiguous fp32 tensors on the CPU)."""
    parts = [b"\x80\x02}("]
    for name, value in table.items():
        parts += [_text(name), _tensor(value) if isinstance(value, PickledTensor) else _text(value)]
    return b"".join([*parts, b"u."])


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


def _tensor(tensor: PickledTensor) -> bytes:
    count = _int(tensor.storage_count)
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(tensor.key) + _text("cpu") + count + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = storage + _int(tensor.offset) + _ints(tensor.shape) + _ints(tensor.stride) + b"\x89" + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
