"""Which device a stage computes on, and in which dtype."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from fluxsplit.errors import UsageError
from fluxsplit.memory import DeviceInfo, free_ram_bytes, total_ram_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SMALL_PARAMETERS = 1_000_000_000
"""Below this a model is quick in fp32 on any CPU, and its pictures are the same on all of them."""


def pick_device(name: str) -> torch.device:
    """The device `auto`, `cpu` or `cuda:N` means; ROCm's cards are cuda to torch. Raises UsageError.

    A card becomes the current one, so that nothing, pinned memory least of all, wakes another by the way.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    index = name.removeprefix("cuda").removeprefix(":") or "0"
    if not name.startswith("cuda") or not index.isdigit():
        raise UsageError(f"device {name!r} is not known", "use auto, cpu or cuda:N")
    if int(index) >= torch.cuda.device_count():
        raise UsageError(
            f"device {name} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} graphics cards",
            "install the torch build for your card (see the README), or use --device cpu",
        )
    torch.cuda.set_device(int(index))
    return torch.device("cuda", int(index))


def device_name(device: torch.device) -> str:
    """`cpu`, or the card's name as its driver says it."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def pick_dtype(name: str, device: torch.device, parameters: int) -> torch.dtype:
    """What the transformer computes in.

    `auto` is bf16 where the device multiplies it fast; fp16 on cards that do not (RDNA2 and older); on a CPU fp32
    for small models and where bf16 has no instructions of its own.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        fast = parameters >= SMALL_PARAMETERS and torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if has_fast_bf16(device) else torch.float16


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a card has bf16 matrix units: NVIDIA from Ampere (8.0), AMD CDNA and from RDNA3 (gfx11)."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        architecture: str = properties.gcnArchName
        return architecture.startswith(("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"))
    return bool(properties.major >= 8)


def pick_vae_dtype_name(name: str, device: torch.device) -> str:
    """What the VAE computes in: fp32, or bf16 on cards that are fast at it; fp16 overflows in Flux's VAE."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" and has_fast_bf16(device) else "fp32"


def exact_fp32() -> None:
    """Have convolutions in fp32 computed in fp32: cuDNN rounds their operands to the 10 bits of TF32 otherwise."""
    torch.backends.cudnn.allow_tf32 = False


def keep_within(budget_bytes: int, device: torch.device) -> None:
    """Have torch's allocator take no more of a card than this: it gives back what it holds for later, or raises.

    Windows would otherwise move what is too much to the machine's RAM without a word, and every step with it.
    """
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / total_bytes), device)


def device_info(device: torch.device) -> DeviceInfo:
    """What a plan has to know of a device, without measuring anything: kind, name, memory, and what is unified."""
    if device.type == "cpu":
        free = free_ram_bytes()
        cores = torch.get_num_threads()
        return DeviceInfo(
            "cpu",
            "cpu",
            free,
            total_ram_bytes(),
            unified=True,
            ram_bytes=free,
            cores=cores,
            processor_cores=cores,
            tile_products=torch.cpu._is_amx_tile_supported(),
        )
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    free_bytes += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept for what comes next
    properties = torch.cuda.get_device_properties(device)
    unified = bool(getattr(properties, "is_integrated", False))
    if unified and torch.version.hip is None:  # there the page cache, our own files, counts as taken
        free_bytes = max(free_bytes, free_ram_bytes())
    return DeviceInfo(
        kind="cuda" if torch.version.hip is None else "hip",
        name=properties.name,
        free_bytes=free_bytes,
        total_bytes=total_bytes,
        unified=unified,
        ram_bytes=free_ram_bytes(),
        cores=int(properties.multi_processor_count),
        processor_cores=torch.get_num_threads(),
        fused_attention=_has_fused_attention(properties),
        growing_segments=_has_growing_segments(),
    )


def _has_growing_segments() -> bool:
    """Whether `expandable_segments` is set, and built in: on Windows it is not, with ROCm not everywhere."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    return sys.platform == "linux" and torch.version.hip is None and "expandable_segments:true" in settings.lower()


def _has_fused_attention(properties: Any) -> bool:
    """Whether torch brings a kernel that keeps the score matrix to itself: not on AMD before CDNA2 and RDNA3.

    AOTriton is built for none of those (TheRock#1925); torch then materialises queries x keys for every head.
    """
    if torch.version.hip is None:
        return bool(properties.major >= 5)
    return str(properties.gcnArchName).startswith(("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12"))
