"""Who brings a model's blocks in, as those who compute them see it."""

from __future__ import annotations

import contextlib
from typing import Protocol


class Loader(Protocol):
    """Brings the blocks in: `streaming`, `read_ahead`, or nobody."""

    def brought_in(self, number: int) -> contextlib.AbstractContextManager[None]:
        """While it is entered, block `number` can be computed."""


class EveryBlockThere:
    """A loader that has nothing to bring in."""

    def brought_in(self, number: int) -> contextlib.AbstractContextManager[None]:
        """While it is entered, block `number` can be computed."""
        return contextlib.nullcontext()
