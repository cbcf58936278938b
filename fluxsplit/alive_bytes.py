"""How many bytes a network holds at its peak, counted and not tabled.

The network is run once on the meta device, where tensors have sizes but no values, and the bytes alive at the same time
are counted. That is a property of the network, so it holds for every architecture.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROBE_PX = 128
UNKNOWN_PIXEL_BYTES = 64_000
"""Of a network that cannot run on the meta device: more than any measured one needs in fp32."""


def peak_pixel_bytes(network: Any) -> float:
    """Bytes alive at the peak for each pixel that goes in, in fp32, the input not counted.

    On a copy without values, since several architectures keep something of their input in themselves; with values and
    on few pixels where an architecture (SPAN) does not run without.
    """
    for make, wanted_px, device in ((_on_meta, PROBE_PX, "meta"), (lambda model: model, PROBE_PX // 2, "cpu")):
        least_px = max(wanted_px, network.size_requirements.minimum)
        side = least_px + -least_px % network.size_requirements.multiple_of
        with contextlib.suppress(Exception):  # one that asks for values, or for what this machine has not
            model = make(network.model)
            probe = torch.zeros(1, network.input_channels, side, side, device=device)
            with torch.inference_mode(), AliveBytes() as alive:
                model(probe)
            return float(alive.peak_bytes / side**2)
    return UNKNOWN_PIXEL_BYTES


def _on_meta(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose tensors have no values, made without copying those of the model."""
    held = {id(value): value for value in (*model.parameters(), *model.buffers())}
    empty = {
        place: torch.nn.Parameter(torch.empty_like(value, device="meta"), requires_grad=False)
        if isinstance(value, torch.nn.Parameter)
        else torch.empty_like(value, device="meta")
        for place, value in held.items()
    }
    return copy.deepcopy(model, dict(empty))


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, for as long as anything refers to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._alive: dict[int, int] = {}
        self._alive_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place = storage._cdata
        if place in self._alive:
            return
        self._alive[place] = storage.nbytes()
        self._alive_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
        weakref.finalize(storage, self._forget, place)

    def _forget(self, place: int) -> None:
        self._alive_bytes -= self._alive.pop(place)
