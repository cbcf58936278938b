"""float8 codes to 16 or 32 bit floats: exact, and fast where torch's own cast is not.

torch's CPU cast from float8 goes value by value. The same can be done with whole-vector integer operations,
because a float8 is a short float whose fields only have to be moved into place:

    e4m3fn  s eeee mmm     sign-extend the byte into the wider integer, shift left until the mantissa sits at
    e5m2    s eeeee mm     the top of the wider mantissa, mask off the copies of the sign that landed in the
                           exponent, read the bits as a float, and multiply by the power of two that is the
                           difference of the exponent biases.

Every finite code comes out exactly, subnormals too (they are subnormal in the wider format until the
multiplication; a CPU that flushes denormals would lose them, hence `self_test`). NaN and infinity come out as
ordinary numbers, so weights that hold such codes are refused (`has_nonfinite`).
"""

from __future__ import annotations

import torch

CHUNK_ELEMENTS = 1 << 18
"""Elements expanded at a time, so that the four passes over them stay in the cache."""

_SIGNED = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# (float8 dtype, wider dtype) → shift left, mask (as a signed integer), power of two.
_MOVES = {
    (torch.float8_e4m3fn, torch.float32): (20, 0x87F00000 - (1 << 32), 120),
    (torch.float8_e4m3fn, torch.bfloat16): (4, 0x87F0 - (1 << 16), 120),
    (torch.float8_e4m3fn, torch.float16): (7, 0xBF80 - (1 << 16), 8),
    (torch.float8_e5m2, torch.float32): (21, 0x8FE00000 - (1 << 32), 112),
    (torch.float8_e5m2, torch.bfloat16): (5, 0x8FE0 - (1 << 16), 112),
    (torch.float8_e5m2, torch.float16): (8, 0xFF00 - (1 << 16), 0),
}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def expand(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`codes` (float8, any shape, contiguous) as a new tensor of `dtype` (fp32, bf16 or fp16) on the same device.

    Exact for finite codes; check `has_nonfinite` once before.
    """
    if codes.device.type != "cpu":
        return codes.to(dtype)
    shift, mask, power = _MOVES[codes.dtype, dtype]
    out = torch.empty(codes.shape, dtype=dtype)
    bytes_in = codes.view(torch.int8).view(-1)
    floats_out = out.view(-1)
    bits_out = floats_out.view(_SIGNED[dtype])
    for start in range(0, bytes_in.numel(), CHUNK_ELEMENTS):
        stop = start + CHUNK_ELEMENTS
        bits = bits_out[start:stop]
        bits.copy_(bytes_in[start:stop]).bitwise_left_shift_(shift).bitwise_and_(mask)
        if power:
            floats_out[start:stop].mul_(2.0**power)
    return out


def has_nonfinite(codes: torch.Tensor) -> bool:
    """Whether a float8 tensor holds NaN or, in e5m2, infinity."""
    magnitude = codes.view(torch.uint8).bitwise_and(0x7F)
    limit = 0x7F if codes.dtype == torch.float8_e4m3fn else 0x7C
    return bool(magnitude.numel()) and int(magnitude.max()) >= limit


def self_test(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `expand` gives every finite code of both formats exactly, on this device and in this dtype."""
    for float8 in FLOAT8:
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(float8)
        exact = codes.to(torch.float32)
        finite = exact.isfinite()
        got = expand(codes.to(device), dtype).cpu().to(torch.float32)
        if not torch.equal(got[finite], exact[finite]):
            return False
    return True
