"""Imports of heavy libraries without the optional packages that they would drag in.

diffusers and transformers import whatever optional package they find (scipy, torchvision, accelerate, and diffusers
all of transformers), though the two model classes used here need none: 9.4 s of CPU became 5.6 s, twice in the two
commands that make a picture. A module that stands as None in `sys.modules` is one that cannot be imported, by the
rules of the import system; libraries that ask whether it is there get "no". It stands there only meanwhile.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Make packages look missing to what is imported inside; those already imported stay as they are."""
    hidden = [name for name in packages if name not in sys.modules]
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]
    modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            if name in modules and modules[name] is None:
                del modules[name]
