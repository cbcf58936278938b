"""float8 codes to 16 or 32 bit floats: exact on every code, and fast where torch's own cast is not.

torch's CPU cast from float8 goes value by value. Where llvmlite is installed, one compiled loop takes its place for
fp32 and bf16 (`compiled_expansion`). Elsewhere the same can be done with torch's integer operations on whole vectors,
because a float8 is a short half-precision number whose fields only have to be moved into place:

    e4m3fn  s eeee mmm    sign-extend the byte to 16 bits, shift left by 7: the mantissa sits at the top of fp16's,
                          the exponent in the lower four of its five bits. Mask off the copy of the sign in the
                          fifth, read the bits as fp16, and multiply by 2^8, the difference of the exponent biases.
    e5m2    s eeeee mm    shift left by 8: that is fp16 already.

Going by fp16 also for fp32 and bf16 is on purpose. The shorter way, straight into the fields of a bf16, makes
codes with a zero exponent denormal in fp32 until the multiplication, which costs half of the speed and is lost
where a process flushes denormals; fp16 to fp32 is one instruction that knows neither trouble. From fp32 to bf16 nothing
need be rounded, as no float8 has more than four digits: the upper half of the bits is taken, by a cast from 32 to 16
bit integers of the same buffer seen two bytes later. The passes go over pieces that stay in the cache, and write into
buffers that are there already.

A scale is multiplied in the same pass, in fp32 and rounded once, which is what torch's multiplication of a 16 bit
tensor by a number gives. NaN and infinity come out as ordinary numbers, so weights that hold such codes are to be
refused (`has_nonfinite`). No device is trusted: the first use on each expands all 256 codes and compares, and falls
back to a table where the fast way errs.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fluxsplit import compiled_expansion
from fluxsplit.compiled_expansion import MAX_SHARES, adds_no_digits
from fluxsplit.errors import FluxsplitError

CHUNK_ELEMENTS = 1 << 18
"""Elements that a thread expands at a time, so that the passes over them stay in its core's cache."""
CACHE_LINE_BYTES = 64
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CHEAP_SCALE = {torch.float8_e4m3fn: 2.0**-8, torch.float8_e5m2: 1.0}
"""By this torch's passes are the fewest: what the fields say once they are in place. A compiled loop is as fast."""

_FIRST_NONFINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C}
# float8 dtype → factor that shifts left, mask (None: nothing to mask), fp16 bits → value. Tensors, as a Python number
# is made into one at each use, which for pieces of this size is felt.
_MOVES = {
    torch.float8_e4m3fn: (
        torch.tensor(1 << 7, dtype=torch.int16),
        torch.tensor(0xBF80 - (1 << 16), dtype=torch.int16),
        1 / CHEAP_SCALE[torch.float8_e4m3fn],
    ),
    torch.float8_e5m2: (torch.tensor(1 << 8, dtype=torch.int16), None, 1 / CHEAP_SCALE[torch.float8_e5m2]),
}
_Method = Callable[[torch.Tensor, torch.Tensor, float], None]
"""Takes flat codes, a flat output of as many elements, and the scale."""


def expand_into(codes: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> None:
    """Write `codes` (float8, contiguous) times `scale` into `out` (fp32, bf16 or fp16, contiguous, as many elements).

    Both on the same device; nothing is allocated there. Exact for finite codes, rounded once if scaled; check
    `has_nonfinite` once before. Raises FluxsplitError where the device expands float8 wrongly in every way.
    """
    method = _method(codes.device, codes.dtype, out.dtype)
    if method is None:
        raise FluxsplitError(f"{codes.device} does not expand {codes.dtype} exactly to {out.dtype}", "try --dtype fp32")
    method(codes.view(-1), out.view(-1), scale)


def expand(codes: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """`expand_into` a new tensor of the same shape and device."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    expand_into(codes, out, scale)
    return out


def has_nonfinite(codes: torch.Tensor) -> bool:
    """Whether a float8 tensor holds NaN or, in e5m2, infinity; ten times faster than expanding it.

    The codes that are not finite are the largest of either sign: as signed bytes the largest positive ones, as
    unsigned bytes the largest of all.
    """
    first = _FIRST_NONFINITE[codes.dtype]
    # a card is asked once, as every answer has it wait
    piece_elements = CHUNK_ELEMENTS if codes.device.type == "cpu" else max(1, codes.numel())
    for piece in codes.view(torch.int8).view(-1).split(piece_elements):
        if piece.numel() and (piece.amax() >= first or piece.view(torch.uint8).amax() >= first | 0x80):
            return True
    return False


def self_test(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether some method gives every finite code of both formats exactly, on this device and in this dtype."""
    return all(_method(device, float8, dtype) for float8 in FLOAT8)


@functools.cache
def _method(device: torch.device, float8: torch.dtype, dtype: torch.dtype) -> _Method | None:
    """The first method that is exact here: tried once for each device and pair of dtypes."""
    on_cpu: tuple[_Method, ...] = (compiled_expansion.expand_into, _by_integers)
    for method in (*(on_cpu if device.type == "cpu" else (_by_cast,)), _by_table):
        if is_exact(method, device, float8, dtype):
            return method
    return None


def is_exact(method: _Method, device: torch.device, float8: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a method gives what torch's cast on the CPU gives, on all finite codes, in vectors and their tails.

    On a CPU also where a scale has it round; on a card the scale is torch's own multiplication.
    """
    scales = (1.0, 0.7) if device.type == "cpu" else (1.0,)
    for count, scale in itertools.product((5 * 256, 5 * 256 - 1), scales):
        codes = torch.arange(count, dtype=torch.int32).to(torch.uint8).view(float8)
        wanted = codes.to(torch.float32).mul(scale).to(dtype)
        out = torch.empty(codes.shape, dtype=dtype, device=device)
        try:
            method(codes.to(device), out, scale)
        except (RuntimeError, NotImplementedError) as error:  # as DirectML, which has no float8 at all
            if "no kernel image" in str(error) or "invalid device function" in str(error):
                raise FluxsplitError(
                    f"torch {torch.__version__} was not built for this card ({device})",
                    "install a torch build that has it (see the README), or use --device cpu",
                ) from error
            return False
        finite = wanted.isfinite()
        if not torch.equal(out.cpu()[finite], wanted[finite]):
            return False
    return True


def _by_integers(codes: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    left, mask, power = _MOVES[codes.dtype]
    power *= scale
    factor = None if power == 1.0 else torch.tensor(power, dtype=torch.float32)
    takes_upper = out.dtype == torch.bfloat16 and adds_no_digits(power)
    seen, whole = out.view(torch.int16) if takes_upper else out, _scratch()
    count = whole.half.numel()
    for piece, piece_out in zip(codes.view(torch.int8).split(count), seen.split(count), strict=True):
        room = whole.first(piece.numel())
        half, bits = (piece_out, piece_out.view(torch.int16)) if out.dtype == torch.float16 else (room.half, room.bits)
        bits.copy_(piece).mul_(left)
        if mask is not None:
            bits.bitwise_and_(mask)
        single = room.single if out.dtype == torch.bfloat16 else piece_out
        if single is not half:
            single.copy_(half)
        if factor is not None:
            single.mul_(factor)
        if single is not piece_out:
            piece_out.copy_(room.upper if takes_upper else single)


def _by_cast(codes: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    out.copy_(codes)
    if scale != 1.0:
        out.mul_(scale)


def _by_table(codes: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    table = _table(codes.device, codes.dtype, out.dtype)
    for piece, piece_out in zip(codes.view(torch.uint8).split(CHUNK_ELEMENTS), out.split(CHUNK_ELEMENTS), strict=True):
        torch.index_select(table, 0, piece.to(torch.int32), out=piece_out)
    if scale != 1.0:
        out.mul_(scale)


@functools.cache
def _table(device: torch.device, float8: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """All 256 codes in `dtype` [256], cast on the CPU."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(float8)
    with torch.inference_mode(False):
        return codes.to(torch.float32).to(dtype).to(device)


@dataclass(frozen=True, slots=True, eq=False)
class _Scratch:
    """Where a thread expands a piece."""

    bits: torch.Tensor  # int16 [n]
    half: torch.Tensor  # fp16 [n], the same bytes
    single: torch.Tensor  # fp32 [n]
    upper: torch.Tensor  # int32 [n]: the lower half of each is the upper half of a `single`, on a little-endian machine

    def first(self, count: int) -> _Scratch:
        """The room of the first `count` elements."""
        if count == self.half.numel():
            return self
        return _Scratch(self.bits[:count], self.half[:count], self.single[:count], self.upper[:count])


_buffers = threading.local()


def _scratch() -> _Scratch:
    """Each thread's room for a piece, made once; usable in and out of inference mode."""
    if not hasattr(_buffers, "room"):
        with torch.inference_mode(False):
            _buffers.room = _new_scratch()
    room: _Scratch = _buffers.room
    return room


def _new_scratch() -> _Scratch:
    """`single` begins with a line of the cache; torch's views would not have `upper` begin in the middle of a value."""
    count = CHUNK_ELEMENTS * min(MAX_SHARES, torch.get_num_threads())
    memory = bytearray(4 * count + 2 * CACHE_LINE_BYTES)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % CACHE_LINE_BYTES
    single = torch.frombuffer(memory, dtype=torch.float32, count=count, offset=start)
    upper = torch.frombuffer(memory, dtype=torch.int32, count=count, offset=start + 2)
    bits = torch.empty(count, dtype=torch.int16)
    return _Scratch(bits, bits.view(torch.float16), single, upper)
