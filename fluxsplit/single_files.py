"""Events about single files: what a stage would make of one in a dry run, and that one failed while the rest go on."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxsplit.device import device_name
from fluxsplit.errors import FluxsplitError, ends_all, is_out_of_memory
from fluxsplit.events import Events


@dataclass(slots=True)
class Failures:
    """Tells failures of single files, and counts them."""

    events: Events
    count: int = 0

    @contextmanager
    def told_of(self, path: str) -> Iterator[None]:
        """A failure inside is that of one file, unless it ends everything. So is one of the driver's, as MIOpen's."""
        try:
            yield
        except FluxsplitError as error:
            if ends_all(error):
                raise
            self._tell(path, error)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            said = (str(error).splitlines() or [""])[0][:200]
            known = FluxsplitError(f"{Path(path).name}: {type(error).__name__}: {said}", "run it again with --debug")
            self._tell(path, known, traceback.format_exc())

    def _tell(self, path: str, error: FluxsplitError, trace: str = "") -> None:
        self.count += 1
        self.events.send("failed", item=path, message=error.message, hint=error.hint, traceback=trace)


def tell_planned(
    events: Events, source: str, target: Path, size: tuple[int, int], device: torch.device, plan: str
) -> None:
    """Tell what would be made of a file, of what width and height in pixels, where and by what plan."""
    width, height = size
    told = {"source": source, "path": str(target), "width": width, "height": height, "taken": target.exists()}
    events.send("planned", **told, device=device_name(device), plan=plan)
