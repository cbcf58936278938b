"""GELU in place; on a CPU, of values of 16 bits, looked up in a table of all 65,536 of them that torch has filled.

torch computes a hyperbolic tangent in fp32 for each of them, which takes a fifteenth of a step where products are
quick. Whatever is computed of 16 bits can be looked up instead: 128 KB that stay in a core's second-level cache, and
since values are near 0, mostly the same few KB of them, which stay in the first. The bits are those that torch gives
where it has whole vectors of values; its way with single ones differs in a few of them. The loop over values is LLVM's
(`machine_code`), since torch looks up by indices of eight bytes only.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from fluxsplit.machine_code import NOT_TO_BE_HAD, compiled, pieces_of, share_out

MIN_ELEMENTS = 1 << 18
"""Fewer are computed in less than a millisecond, and a small model need not wait for the loop to be compiled."""
SHARE_ELEMENTS, MAX_THREADS = 1 << 17, 8
"""A thread is not woken for less, nor are more woken: with that many torch, whose threads are awake, is as quick."""
_LOOP = """
define void @look_up(ptr noalias readonly %table, ptr noalias %values, i64 %rows, i64 %columns, i64 %row_bytes) {
start:
  br label %row
row:
  %number = phi i64 [0, %start], [%number.following, %row.end]
  %row.at = mul i64 %number, %row_bytes
  %row.values = getelementptr i8, ptr %values, i64 %row.at
  br label %next
next:
  %at = phi i64 [0, %row], [%following, %next]
  %place = getelementptr i16, ptr %row.values, i64 %at
  %value = load i16, ptr %place
  %index = zext i16 %value to i64
  %entry = getelementptr i16, ptr %table, i64 %index
  %found = load i16, ptr %entry
  store i16 %found, ptr %place
  %following = add nuw i64 %at, 1
  %more = icmp ult i64 %following, %columns
  br i1 %more, label %next, label %row.end
row.end:
  %number.following = add nuw i64 %number, 1
  %more.rows = icmp ult i64 %number.following, %rows
  br i1 %more.rows, label %row, label %end
end:
  ret void
}
"""
_Loop = Callable[[int, int, int, int, int], None]
"""Takes the addresses of the table and of the values, how many rows and columns there are, and how far apart rows."""
_ARGUMENTS = (ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3)


def gelu_(x: torch.Tensor) -> torch.Tensor:
    """GELU by tanh (Hendrycks and Gimpel, arXiv 1606.08415) of x [..., rows, width], in place, by all threads of torch.

    x may be columns of a wider tensor. Returns x.
    """
    loop = _loop() if _is_worth_it(x) else None
    if loop is None:
        return _computed_(x)
    flat, table = x.view(x.shape[-2:]), _table(x.dtype)
    rows, columns = flat.shape
    threads = max(1, min(torch.get_num_threads(), MAX_THREADS, x.numel() // SHARE_ELEMENTS))

    def look_up(_: int, first: int, last: int) -> None:
        loop(table.data_ptr(), flat[first:].data_ptr(), last - first, columns, flat.stride(0) * flat.itemsize)

    share_out(look_up, pieces_of(rows, threads, 1, -(-SHARE_ELEMENTS // columns), rows), threads)
    return x


def _is_worth_it(x: torch.Tensor) -> bool:
    """Also whether it is rows of one tensor, equally far apart."""
    # first, as a card's host has no time to lose
    if x.device.type != "cpu" or x.itemsize != 2 or x.numel() < MIN_ELEMENTS:
        return False
    return x.stride(-1) == 1 and x.shape[:-2].numel() == 1


def _computed_(x: torch.Tensor) -> torch.Tensor:
    """By torch, which has it in place, but not among its public names."""
    activated: torch.Tensor = torch.ops.aten.gelu_(x, approximate="tanh")
    return activated


@functools.cache
def _table(dtype: torch.dtype) -> torch.Tensor:
    """GELU of everything that 16 bits can be, at the place that they are as a number."""
    with torch.inference_mode(False):
        return _computed_(torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).clone())


@functools.cache
def _loop() -> _Loop | None:
    """None where it cannot be had."""
    try:
        return compiled(_LOOP, look_up=_ARGUMENTS)["look_up"]
    except NOT_TO_BE_HAD:
        return None
