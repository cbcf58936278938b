"""One VAE at work in a stage: plans each picture before it starts, says how far it is, tries again in fp32."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from fluxsplit import checkpoint
from fluxsplit.decode_plan import VaePlan, picture_size, plan_vae
from fluxsplit.device import device_info, keep_within, pick_device, pick_vae_dtype_name
from fluxsplit.errors import FluxsplitError, OutOfMemory, is_out_of_memory, memory_hint
from fluxsplit.events import Events
from fluxsplit.group_norm import NotFinite
from fluxsplit.memory import budget_bytes
from fluxsplit.planes import spill_folder
from fluxsplit.tile_plan import TilePlan, plan_tiles
from fluxsplit.tiled_vae import TiledVae
from fluxsplit.vae import Advance, load_vae
from fluxsplit.vae_passes import Pass
from fluxsplit.weights import WeightFiles

NEWS_EVERY_S = 0.3

T = TypeVar("T")


class VaeSession:
    """A VAE on its device, and what a job says of memory and dtype."""

    def __init__(self, weights: str, device: str, dtype: str, vram: str, smaller: int, events: Events) -> None:
        """`weights` is the file, `smaller` how many times a plan ran out of memory before."""
        self.device = pick_device(device)
        self._files = WeightFiles()
        self.vae = load_vae(checkpoint.part(weights, "vae"), self._files, self.device)
        self.dtype = pick_vae_dtype_name(dtype, self.device)
        self._vram, self._smaller, self._events = vram, smaller, events
        self._again = bool(smaller)
        self._folder = spill_folder(os.environ)
        self._tiled: dict[str, TiledVae] = {}

    def decode(self, latents: torch.Tensor, advance: Advance, tile: int = 0) -> tuple[torch.Tensor, str]:
        """VAE-space latents [1, 16, h, w] → RGB [8 h, 8 w, 3] uint8, and the dtype that it was computed in.

        `tile` is the side of diffusers' overlapped tiles in pixels, 0 for exact strips. Raises OutOfMemory, and
        FluxsplitError where the picture is not finite in fp32 either.
        """
        if tile:
            return self._in_some_dtype(lambda dtype: self._tiled_in(dtype, latents, tile))
        passes = self.vae.decoder_passes(latents.shape[2], latents.shape[3])
        return self._planned(passes, lambda plan: self.vae.decode(latents, plan, advance, self._folder))

    def encode(self, pixels: torch.Tensor, advance: Advance) -> torch.Tensor:
        """RGB [8 h, 8 w, 3] uint8 → VAE-space latents [1, 16, h, w] fp32; raises as `decode` does."""
        passes = self.vae.encoder_passes(pixels.shape[0], pixels.shape[1])
        return self._planned(passes, lambda plan: self.vae.encode(pixels, plan, advance, self._folder))[0]

    def decode_plan(self, height: int, width: int) -> VaePlan:
        """How latents of this size would be decoded in strips now; raises FluxsplitError where no plan fits."""
        return self._fitting(self.vae.decoder_passes(height, width), self.dtype)[0]

    def tile_plan(self, height: int, width: int, tile: int, dtype: str = "") -> TilePlan:
        """How latents of this size would be decoded in tiles now; raises DoesNotFit."""
        info, factor = device_info(self.device), self.vae.shape.factor
        dtype = dtype or self.dtype
        sources = () if dtype in self._tiled else self.vae.part.sources.values()  # afterwards its weights are there
        parameters = sum(math.prod(source.shape) for source in sources)
        budget = budget_bytes(self._vram, info, again=self._again)
        return plan_tiles((width * factor, height * factor), tile, dtype, parameters, info, budget)

    def encode_plan(self, height: int, width: int) -> VaePlan:
        """How a picture of this size in pixels would be encoded now; raises as `decode_plan` does."""
        return self._fitting(self.vae.encoder_passes(height, width), self.dtype)[0]

    def _planned(self, passes: tuple[Pass, ...], carry_out: Callable[[VaePlan], T]) -> tuple[T, str]:
        def attempt(dtype: str) -> T:
            plan = self._plan(passes, dtype)
            try:
                return carry_out(plan)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                detail = (str(error).splitlines() or ["memory ran out"])[0][:200]
                raise OutOfMemory(
                    f"the VAE ran out of memory as planned ({plan.text()}): {detail}",
                    memory_hint("decode"),
                ) from error

        return self._in_some_dtype(attempt)

    def _plan(self, passes: tuple[Pass, ...], dtype: str) -> VaePlan:
        plan, budget = self._fitting(passes, dtype)
        self._again = True
        if self.device.type != "cpu":
            keep_within(budget, self.device)
        self._events.send("plan", text=plan.text(), smaller={"smaller": self._smaller + 1})
        if plan.home != "device":
            width, height = picture_size(passes)
            self._events.send("note", text=f"VAE for {width}x{height} pixels: {plan.text()}")
        return plan

    def _fitting(self, passes: tuple[Pass, ...], dtype: str) -> tuple[VaePlan, int]:
        """The plan for the device as it is now, and the budget that it was made for."""
        info = device_info(self.device)
        budget = budget_bytes(self._vram, info, again=self._again)
        return plan_vae(passes, dtype, budget, info, smaller=self._smaller), budget

    def _in_some_dtype(self, attempt: Callable[[str], T]) -> tuple[T, str]:
        """The result in the session's dtype, or in fp32 where it is not finite in that."""
        for dtype in dict.fromkeys((self.dtype, "fp32")):
            try:
                result = attempt(dtype)
            except NotFinite as error:
                self._files.check_unchanged()  # if it was changed, that is why
                if dtype == "fp32":
                    raise _hopeless(error) from error
                self._events.send("note", text=f"{error.message} in {dtype}; trying again in fp32")
                continue
            self._files.check_unchanged()
            return result, dtype
        raise AssertionError("fp32 returns or raises")

    def _tiled_in(self, dtype: str, latents: torch.Tensor, tile: int) -> torch.Tensor:
        plan = self.tile_plan(latents.shape[2], latents.shape[3], tile, dtype)
        self._again = True
        self._events.send("plan", text=plan.text(), smaller=None)
        return self._tile_decoder(dtype).decode(latents, tile)

    def _tile_decoder(self, dtype: str) -> TiledVae:
        if dtype not in self._tiled:
            self._tiled = {dtype: TiledVae(self.vae, dtype)}
        return self._tiled[dtype]


def _hopeless(error: NotFinite) -> FluxsplitError:
    hint = "the latents or the VAE's weights are damaged, or not of the same model"
    return FluxsplitError(f"{error.message}, in fp32 too", hint)


def teller(events: Events, number: int, total: int, event: str = "decode") -> Advance:
    """Tells how far item `number` of `total` is, now and then."""
    last_s = time.monotonic()

    def advance(share: float) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= NEWS_EVERY_S and share < 1:
            last_s = time.monotonic()
            events.send(event, done=number + min(round(share, 4), 0.9999), total=total)

    return advance
