"""x times a matrix of float8 codes, in bf16 on a processor with tiles (AMX), without the expanded matrix in between.

torch's product wants the matrix in bf16, which is expanded into memory first and arranged anew for the tiles by the
library then. Both take as long as multiplying for the few hundred tokens of a preview. `tile_kernel` does all three
at once. It is compiled where llvmlite (the extra `cpu`) is installed and the processor has tiles; elsewhere, and where
it fails its test, nothing here is used.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fluxsplit import compiled_expansion
from fluxsplit.fp8 import CACHE_LINE_BYTES
from fluxsplit.machine_code import NOT_TO_BE_HAD, compiled, has_features, pieces_of, share_out

MIN_SIDE = 2048
"""A model whose matrices are narrower is quick in any way, and need not wait for the kernel to be compiled."""
MAX_TOKENS = 512
"""Multiplied with at a time. With more, too few inputs would fit into the cache."""
MIN_ROWS, MAX_ROWS = 128, 1024
"""Multiplied with at a time, as for each such piece its first rows are expanded beside nothing, and sums are kept."""
CACHED_BYTES = 1 << 20
"""Of x, of the 2 MB that the second-level cache of each core of these processors has."""
_PAIR = 32
"""The kernel's step, in rows, tokens and inputs."""


@dataclass(frozen=True, slots=True)
class _Kernel:
    pack: Callable[..., None]
    multiply: Callable[..., None]
    packed_bytes: Callable[[int, int], int]
    work_bytes: Callable[[int, int, int], int]


def multiplies(codes: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `multiply_into` takes codes [rows, inputs] and x [tokens, inputs]; compiles the kernel at first."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == codes.device.type == "cpu"
        and x.shape[0] > 0
        and max(codes.shape) >= MIN_SIDE
        and not (codes.shape[0] % _PAIR or codes.shape[1] % _PAIR)
        and codes.is_contiguous()
        and x.stride(1) == 1
        and codes.dtype in compiled_expansion.FORMATS
        and _kernel(codes.dtype) is not None
    )


def multiply_into(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    room: Callable[[int], torch.Tensor],
) -> None:
    """out [tokens, rows] = x [tokens, inputs] codes^T scale + bias [rows], as many threads as torch has at it.

    x, bias and out are bf16; rows of x and of out may be columns of wider tensors. Sums are kept in fp32, in an order
    that does not depend on tokens or threads, multiplied with the scale then, and rounded once. `room` gives so many
    bytes, a uint8 tensor that begins with a line of the cache and is free until this returns. Raises ValueError for
    what `multiplies` says no to, or what does not fit together, since the kernel reads and writes by address.
    """
    tokens, (rows, inputs) = x.shape[0], codes.shape
    fits = x.shape[1] == inputs and out.shape == (tokens, rows) and out.stride(1) == 1
    alike = all(each.dtype == x.dtype and each.device == x.device for each in (out, bias) if each is not None)
    if not (fits and alike and multiplies(codes, x) and (bias is None or bias.shape == (rows,))):
        raise ValueError(f"{list(x.shape)} {x.dtype} by {list(codes.shape)} {codes.dtype} into {list(out.shape)}")
    kernel = _kernel(codes.dtype)
    assert kernel is not None
    offsets = torch.zeros(rows, dtype=x.dtype) if bias is None else bias.contiguous()
    for piece, piece_out in zip(*(whole.tensor_split(-(-tokens // MAX_TOKENS)) for whole in (x, out)), strict=True):
        _multiply(kernel, piece, codes, scale, offsets, piece_out, room, _depth(piece.shape[0], inputs))


def _multiply(
    kernel: _Kernel,
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: float,
    bias: torch.Tensor,
    out: torch.Tensor,
    room: Callable[[int], torch.Tensor],
    depth: int,
) -> None:
    (tokens, inputs), rows, threads = x.shape, codes.shape[0], torch.get_num_threads()
    row_pieces = pieces_of(rows, threads, _PAIR, MIN_ROWS, MAX_ROWS)
    threads = min(threads, len(row_pieces))
    packed_bytes = kernel.packed_bytes(tokens, inputs)
    # sums are kept between depths only
    most_rows = max(last - first for first, last in row_pieces) if depth < inputs else 0
    work_bytes = kernel.work_bytes(most_rows, tokens, depth)
    wanted_bytes = packed_bytes + work_bytes * threads
    memory = room(wanted_bytes)
    packed = memory.data_ptr()
    if memory.numel() < wanted_bytes or not memory.is_contiguous() or packed % CACHE_LINE_BYTES:
        raise ValueError(f"{memory.numel()} bytes of room at {packed:#x}, where {wanted_bytes} are needed")

    def pack(_: int, first: int, last: int) -> None:
        there = packed + kernel.packed_bytes(first, inputs)
        kernel.pack(x[first:].data_ptr(), there, last - first, inputs, x.stride(0) * x.itemsize)

    def multiply(thread: int, first: int, last: int) -> None:
        kernel.multiply(
            codes[first:].data_ptr(),
            packed,
            bias[first:].data_ptr(),
            out[:, first:].data_ptr(),
            packed + packed_bytes + work_bytes * thread,
            last - first,
            tokens,
            inputs,
            out.stride(0) * out.itemsize,
            depth,
            scale,
        )

    share_out(pack, pieces_of(tokens, threads, _PAIR, _PAIR, MAX_TOKENS), threads)
    share_out(multiply, row_pieces, threads)


def _depth(tokens: int, inputs: int) -> int:
    """Inputs at a time: parts of one length, of which x has as much as fits into the cache."""
    parts = -(-inputs * -(-tokens // _PAIR) * _PAIR * 2 // CACHED_BYTES)
    return -(-inputs // parts // _PAIR) * _PAIR


@functools.cache
def _kernel(float8: torch.dtype) -> _Kernel | None:
    """The kernel for a format, tried; None where it cannot be had."""
    # elsewhere a process need not ask for tiles, or asks in another way
    if sys.platform != "linux" or not torch.cpu._is_amx_tile_supported() or not torch.cpu._init_amx():
        return None
    try:
        kernel = _compiled(float8)
    except NOT_TO_BE_HAD:
        return None
    return kernel if _is_exact(kernel, float8) else None


def _compiled(float8: torch.dtype) -> _Kernel:
    from fluxsplit import tile_kernel  # noqa: PLC0415  (imports llvmlite, which may not be there)

    if not has_features("amx-tile", "amx-bf16"):
        raise RuntimeError("LLVM knows of no tiles of bf16 here")
    address, count = ctypes.c_void_p, ctypes.c_int64
    made = compiled(
        tile_kernel.source(),
        compiled_expansion.source(float8, torch.bfloat16, exact=True),
        pack=(address, address, count, count, count),
        multiply=(*[address] * 5, *[count] * 5, ctypes.c_float),
    )
    return _Kernel(made["pack"], made["multiply"], tile_kernel.packed_bytes, tile_kernel.work_bytes)


def _is_exact(kernel: _Kernel, float8: torch.dtype) -> bool:
    """Whether whole numbers, whose sums are the same in any order, are multiplied without an error."""
    random = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=random).float()

    for tokens, rows, inputs, depth in ((37, 96, 160, 160), (37, 96, 160, 64), (16, 32, 32, 32)):
        x, matrix, bias = whole(tokens, inputs), whole(rows, inputs), whole(rows)
        wanted = (x @ matrix.t() * 0.5 + bias).bfloat16()
        out = torch.empty_like(wanted)
        _multiply(kernel, x.bfloat16(), matrix.to(float8), 0.5, bias.bfloat16(), out, _new_room, depth)
        if not torch.equal(out, wanted):
            return False
    return True


def _new_room(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)
