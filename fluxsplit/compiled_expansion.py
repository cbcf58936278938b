"""float8 to bf16 and fp32 on a CPU in one pass over the codes, by a loop that LLVM compiles for this very processor.

torch's operations, of which `fp8` otherwise strings five together, each read and write a whole piece. Where the
products are quick, that is what a step waits for. One loop over the codes does the same in registers, about three
times as fast, and needs no compiler where it is installed: llvmlite (the extra `cpu`) brings LLVM along, and the loop
is made in a fortieth of a second. Without llvmlite nothing here is used.

The loop computes in fp32, for either format alike. Of a code without its sign the bits are moved to where fp32 has
its exponent and mantissa, and the difference of the biases is added: right for normal numbers. A code with a zero
exponent is a small whole number of equal steps, so that number is converted and multiplied by the step. Nowhere is a
denormal of fp32 formed, so that none can be lost. Then comes the scale. A bf16 is the upper half of the bits, rounded
to the nearest one and to even (IEEE 754) unless the scale is a power of two, with which every product is a bf16.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fluxsplit.machine_code import NOT_TO_BE_HAD, compiled, run_side_by_side

SHARE_ELEMENTS = 1 << 18
"""A thread is not woken for less: it would take as long to wake."""
MAX_SHARES = 4
"""Threads that share a piece: at its end they wait for one another, which many do for longer."""
_Loop = Callable[[int, int, int, float], None]
"""Takes the addresses of codes and output, how many there are, and the scale."""
_ARGUMENTS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float)


@dataclass(frozen=True, slots=True)
class _Format:
    """Where a float8 has what (arXiv 2209.05433)."""

    mantissa_bits: int
    bias: int


FORMATS = {torch.float8_e4m3fn: _Format(3, 7), torch.float8_e5m2: _Format(2, 15)}
_FP32_MANTISSA_BITS, _FP32_BIAS = 23, 127
# what is made of %bits, those of the scaled value in fp32
_STORE_FP32 = """
  %at.out = getelementptr i32, ptr %out, i64 %at
  store i32 %bits, ptr %at.out"""
_ROUND = """
  %upper.odd = lshr i32 %bits, 16
  %odd = and i32 %upper.odd, 1
  %half = add nuw nsw i32 %odd, 32767
  %nearest = add i32 %bits, %half"""
_STORE_BF16 = """
  %upper = lshr i32 {bits}, 16
  %short = trunc i32 %upper to i16
  %at.out = getelementptr i16, ptr %out, i64 %at
  store i16 %short, ptr %at.out"""
_LOOP = """
define void @expand(ptr noalias %codes, ptr noalias %out, i64 %count, float %scale) {{
start:
  br label %next
next:
  %at = phi i64 [0, %start], [%following, %next]
  %at.code = getelementptr i8, ptr %codes, i64 %at
  %byte = load i8, ptr %at.code
  %code = zext i8 %byte to i32
  %size = and i32 %code, 127
  %moved = shl i32 %size, {shift}
  %biased = add i32 %moved, {rebias}
  %normal = bitcast i32 %biased to float
  %steps = uitofp i32 %size to float
  %small = fmul float %steps, {step}
  %is.normal = icmp ugt i32 %size, {largest_small}
  %unsigned = select i1 %is.normal, float %normal, float %small
  %scaled = fmul float %unsigned, %scale
  %scaled.bits = bitcast float %scaled to i32
  %sign.below = and i32 %code, 128
  %sign = shl i32 %sign.below, 24
  %bits = xor i32 %scaled.bits, %sign{store}
  %following = add nuw i64 %at, 1
  %more = icmp ult i64 %following, %count
  br i1 %more, label %next, label %end
end:
  ret void
}}
"""


def expand_into(codes: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    """Write flat float8 `codes` times `scale` into flat `out` (bf16 or fp32), both contiguous, apart and on the CPU.

    By as many threads as torch has, four at most. Exact for finite codes; rounded once if scaled. Raises
    NotImplementedError for another dtype, and where there is no llvmlite or LLVM cannot compile for this processor;
    ValueError for other tensors, since the loop writes by address.
    """
    loop = _loop(codes.dtype, out.dtype, out.dtype == torch.float32 or adds_no_digits(scale))
    if loop is None:
        raise NotImplementedError(f"no compiled expansion of {codes.dtype} to {out.dtype}")
    count = codes.numel()
    if not (codes.is_contiguous() and out.is_contiguous() and out.numel() == count):
        raise ValueError(f"{list(codes.shape)} codes into {list(out.shape)}, or one of them is not contiguous")
    share = -(-count // max(1, min(MAX_SHARES, torch.get_num_threads(), count // SHARE_ELEMENTS)))
    if not share:
        return

    def run(codes: torch.Tensor, out: torch.Tensor) -> None:
        loop(codes.data_ptr(), out.data_ptr(), codes.numel(), scale)

    run_side_by_side(run, zip(codes.split(share), out.split(share), strict=True))


def adds_no_digits(factor: float) -> bool:
    """Whether every code times `factor`, a power of two then, is a bf16."""
    fraction, exponent = math.frexp(factor)
    return fraction == 0.5 and abs(exponent) < 64


@functools.cache
def _loop(float8: torch.dtype, dtype: torch.dtype, exact: bool) -> _Loop | None:
    """The loop for a pair of dtypes; `exact` where nothing need be rounded. None where it cannot be had."""
    if float8 not in FORMATS or dtype not in (torch.bfloat16, torch.float32):
        return None
    try:
        return compiled(source(float8, dtype, exact=exact), expand=_ARGUMENTS)["expand"]
    except NOT_TO_BE_HAD:
        return None


def source(float8: torch.dtype, dtype: torch.dtype, *, exact: bool) -> str:
    """The loop in LLVM's language, `expand(codes, out, count, scale)`; `exact` where nothing need be rounded.

    Raises KeyError for another format.
    """
    fields = FORMATS[float8]
    if dtype == torch.float32:
        store = _STORE_FP32
    else:
        store = _STORE_BF16.format(bits="%bits") if exact else _ROUND + _STORE_BF16.format(bits="%nearest")
    return _LOOP.format(
        shift=_FP32_MANTISSA_BITS - fields.mantissa_bits,
        rebias=(_FP32_BIAS - fields.bias) << _FP32_MANTISSA_BITS,
        step=_constant(2.0 ** (1 - fields.bias - fields.mantissa_bits)),
        largest_small=(1 << fields.mantissa_bits) - 1,
        store=store,
    )


def _constant(value: float) -> str:
    """A number as LLVM wants it of a float: the bits that it has as a double."""
    return f"0x{struct.pack('>d', value).hex().upper()}"
