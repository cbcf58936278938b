"""Events about single files: what a stage would make of one in a dry run, and that one failed while the rest go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxsplit.device import device_name
from fluxsplit.errors import FluxsplitError, ends_all
from fluxsplit.events import Events


@dataclass(slots=True)
class Failures:
    """Tells failures of single files, and counts them."""

    events: Events
    count: int = 0

    @contextmanager
    def told_of(self, path: str) -> Iterator[None]:
        """A failure inside is that of one file, unless it ends everything."""
        try:
            yield
        except FluxsplitError as error:
            if ends_all(error):
                raise
            self.count += 1
            self.events.send("failed", item=path, message=error.message, hint=error.hint)


def tell_planned(
    events: Events, source: str, target: Path, size: tuple[int, int], device: torch.device, plan: str
) -> None:
    """Tell what would be made of a file, of what width and height in pixels, where and by what plan."""
    width, height = size
    told = {"source": source, "path": str(target), "width": width, "height": height, "taken": target.exists()}
    events.send("planned", **told, device=device_name(device), plan=plan)
