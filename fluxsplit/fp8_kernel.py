"""float8 to 16 or 32 bits on a card, by a kernel compiled at run time: what it reads and writes is all it costs.

torch's own cast on a card looks up the dtype of every value it loads, one byte at a time, and so reaches a fifth of the
memory's speed (an H200, torch 2.11): a fifth of a step that is computed quickly. Here a thread takes 16 codes at once.
Moved to the fields of an fp32, a code is its value times a power of two, also where it is denormal; one multiplication
takes that away, and nothing is rounded. The compiler is the one that CUDA and ROCm bring along (NVRTC, hipRTC), through
torch. Where that is not to be had, or errs, `fp8` takes another way.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

CODES, THREADS = 16, 256
"""Codes of a thread, threads of a block."""

_FROM = {
    torch.float8_e4m3fn: {"SHIFT": "20", "POWER": "0x7B800000u", "HALF_SHIFT": "7"},  # 2^120: 127 - 7
    torch.float8_e5m2: {"SHIFT": "21", "POWER": "0x77800000u", "HALF_SHIFT": "8"},  # 2^112: 127 - 15
}
_TO = {torch.bfloat16: "single(c) >> 16", torch.float16: "half(c)", torch.float32: "single(c)"}
_SOURCE = """
static __device__ __forceinline__ unsigned int single(unsigned int c) {
    unsigned int bits = (c & 0x80u) << 24 | (c & 0x7Fu) << SHIFT;
    return __float_as_uint(__uint_as_float(bits) * __uint_as_float(POWER));
}
static __device__ __forceinline__ unsigned int half(unsigned int c) {
    if (HALF_SHIFT == 8) return c << 8;
    unsigned int bits = single(c);
    unsigned int sign = bits >> 16 & 0x8000u;
    return (c & 0x7Fu) ? sign | ((bits >> 13 & 0x3FFFFu) - (112u << 10)) : sign;
}
static __device__ __forceinline__ unsigned int value(unsigned int c) { return VALUE; }
extern "C" __global__ void expand(const uint4* codes, uint4* out, int groups) {
    int group = blockIdx.x * blockDim.x + threadIdx.x;
    if (group >= groups) return;
    uint4 four = codes[group];
    unsigned int words[4] = {four.x, four.y, four.z, four.w};
    uint4* to = out + (long long)group * WIDTH;
#pragma unroll
    for (int k = 0; k < WIDTH; k++) {
        unsigned int made[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (WIDTH == 4) {
                made[j] = value(words[k] >> (8 * j) & 0xFFu);
            } else {
                unsigned int pair = words[2 * k + j / 2] >> (16 * (j % 2));
                made[j] = value(pair & 0xFFu) | value(pair >> 8 & 0xFFu) << 16;
            }
        }
        to[k] = make_uint4(made[0], made[1], made[2], made[3]);
    }
}
"""


def by_kernel(codes: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    """Write flat float8 `codes` times `scale` into `out`, flat and as long, both on one card.

    Raises NotImplementedError where there is no compiler. What does not come in whole groups goes by torch's cast.
    """
    if codes.numel() % CODES or codes.data_ptr() % 16 or out.data_ptr() % 16:
        out.copy_(codes)
    else:
        groups = codes.numel() // CODES
        with torch.cuda.device(codes.device):
            kernel = _kernel(codes.device, codes.dtype, out.dtype)
            kernel(grid=(-(-groups // THREADS), 1, 1), block=(THREADS, 1, 1), args=[codes, out, groups])
    if scale != 1.0:
        out.mul_(scale)


def source(float8: torch.dtype, dtype: torch.dtype) -> str:
    """CUDA C of the kernel for a pair of dtypes; HIP reads it too."""
    settings = {**_FROM[float8], "VALUE": _TO[dtype], "WIDTH": str(dtype.itemsize)}
    return "".join(f"#define {name} {value}\n" for name, value in settings.items()) + _SOURCE


@functools.cache
def _kernel(device: torch.device, float8: torch.dtype, dtype: torch.dtype) -> Any:
    """The kernel, compiled for the current device; `device` is for the cache."""
    try:
        compiled: Any = torch.cuda._compile_kernel(source(float8, dtype), "expand")
    except Exception as error:  # it is nobody's public interface: no compiler, another signature, a card too old
        raise NotImplementedError(f"no kernel for {device}: {error}") from error
    return compiled
