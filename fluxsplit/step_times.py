"""How long a sampling step took here, remembered by model, size and device, so that a plan can say how long it takes.

Best effort: a cache that cannot be read or written only means that nothing is foretold.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxsplit.fingerprint import cache_folder

TEXT_TOKENS = 512
"""T5's, which run through every block beside the picture's own."""
PIXELS_PER_TOKEN = 256
_MAX_ENTRIES = 200
_MAX_FILE_BYTES = 1 << 20
_FILE = "step-times.json"


def timed(events: Iterable[dict[str, Any]], model: str, sizes: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """The events of a sample stage as they come; its last step's time is remembered at the end.

    `model` is the transformer's path and `sizes` are the pixels of each picture (width, height). The first step
    also loads and warms, so that only later ones count.
    """
    seen: dict[str, float] = {}
    for event in events:
        if event["event"] == "step" and int(event["step"]) > 1 and int(event["image"]) < len(sizes):
            width, height = sizes[int(event["image"])]
            together = max(1, int(event.get("together", 1)))
            seen[_key(model, width, height)] = float(event["step_s"]) / together
        yield event
    if seen:
        _remember(seen)


def step_seconds(model: str, width: int, height: int) -> float | None:
    """Seconds that a step of one picture is likely to take with a model (a file's name), None where none was timed.

    From the nearest size that was timed, in proportion to the tokens that run through the blocks.
    """
    tokens = _tokens(width, height)
    known = []
    for key, step_s in _read().items():
        with contextlib.suppress(ValueError):
            name, size = key.rsplit("|", 1)
            timed_tokens = _tokens(*map(int, size.split("x")))
            if name == model:
                known.append((abs(timed_tokens - tokens), step_s * tokens / timed_tokens))
    return min(known)[1] if known else None


def _tokens(width: int, height: int) -> float:
    return width * height / PIXELS_PER_TOKEN + TEXT_TOKENS


def _key(model: str, width: int, height: int) -> str:
    return f"{Path(model).name}|{width}x{height}"


def _read() -> dict[str, float]:
    try:
        path = cache_folder() / _FILE
        known = json.loads(path.read_text("utf-8")) if path.stat().st_size <= _MAX_FILE_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: float(value) for key, value in known.items() if type(value) in (int, float) and 0 < value < 1e5}


def _remember(seen: Mapping[str, float]) -> None:
    target = cache_folder() / _FILE
    part = target.with_name(f"{_FILE}.{os.getpid()}.part")
    kept = {key: value for key, value in _read().items() if key not in seen}
    entries = list({**kept, **seen}.items())[-_MAX_ENTRIES:]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dict(entries)), "utf-8")
        part.replace(target)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
