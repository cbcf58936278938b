"""The network that spandrel builds for a file's tensors, refused where it does not enlarge single pictures.

spandrel recognises a network by the names of its tensors and builds it; the tensors are read by `state_dict`, never
by spandrel, whose own loader unpickles.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fluxsplit.errors import FluxsplitError
from fluxsplit.state_dict import StateDict

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WINDOW_PX = 32
"""A multiple of the windows that are in use: 8 (SwinIR, OmniSR), 16 (HAT), 8x32 (DAT)."""
BUILD_SLACK_BYTES = 256 << 20


def build_network(name: str, state: StateDict) -> Any:
    """spandrel's network for these tensors, in fp32 on the CPU."""
    loader, unknown, single = _spandrel()
    values = {key: _tensor(tensor.dtype, tensor.shape, tensor.data) for key, tensor in state.items()}
    for key, value in values.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise FluxsplitError(f"{name} is refused: {key[:80]} holds NaN or infinity", "download it again")
    weight_bytes = sum(value.nbytes for value in values.values())
    try:
        with _bounded_memory(3 * weight_bytes + BUILD_SLACK_BYTES):
            network = loader().load_from_state_dict(values)
    except unknown:
        keys = ", ".join(key[:60] for key in list(values)[:3])
        raise FluxsplitError(
            f"{name} holds no upscaler that spandrel knows; its tensors are {keys}, ...", "name another --upscale"
        ) from None
    except Exception as error:  # spandrel builds by what the names and shapes say, and fails in as many ways
        detail = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise FluxsplitError(f"{name} is refused: its tensors do not fit together: {detail}") from error
    _check_kind(name, network, single)
    network.model.eval().requires_grad_(False).float()
    return network


def _check_kind(name: str, network: Any, single: Any) -> None:
    """Only what takes one picture of any size and gives one."""
    kind = network.architecture.name
    if not isinstance(network, single):
        raise FluxsplitError(f"{name} is {kind}, which fills in masked areas; it does not enlarge")
    if network.size_requirements.square or network.purpose == "FaceSR":
        raise FluxsplitError(f"{name} is {kind}, which restores cut-out faces of one size; it takes no other picture")
    if network.input_channels not in (1, 3) or network.output_channels != network.input_channels:
        channels = f"{network.input_channels} to {network.output_channels}"
        raise FluxsplitError(f"{name} is {kind} from {channels} channels; grey and RGB can be used")


def _spandrel() -> tuple[Any, type[Exception], Any]:
    try:
        from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError  # noqa: PLC0415
    except (ImportError, RuntimeError, OSError, AttributeError) as error:  # a torchvision of another torch
        raise FluxsplitError(
            f"upscaling needs spandrel and a torchvision that fits torch {torch.__version__}: "
            f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}",
            "install the torchvision of your torch build (see docs/upscaling.md); all else works without it",
        ) from error
    return ModelLoader, UnsupportedModelError, ImageModelDescriptor


def _tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=DTYPES[dtype])
    value = torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(shape)
    return value.float() if value.is_floating_point() else value


@contextlib.contextmanager
def _bounded_memory(extra_bytes: int) -> Iterator[None]:
    """No more than `extra_bytes` of new memory inside, so that shapes which lie end in an error; Linux only.

    With one thread, since a pool of them that is started inside would want stacks.
    """
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    import resource  # noqa: PLC0415 - there is none on Windows

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    data_bytes = int(statm.read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes + extra_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        torch.set_num_threads(threads)


def alignment_of(network: Any) -> int:
    """What the origins of tiles are multiples of.

    Networks with attention cut their input into windows of 8 to 32 pixels, counted from its origin, and pad what is
    left at the end; spandrel therefore asks for no multiple. In a tile that begins elsewhere all windows are others:
    a tiny SwinIR then was off by 0.2 of 1, and by 2e-7 from a multiple of its window.
    """
    has_windows = any("attn" in name or "relative_position" in name for name in network.model.state_dict())
    return math.lcm(network.size_requirements.multiple_of, WINDOW_PX if has_windows else 1)
