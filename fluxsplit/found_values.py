"""Values of strangers' metadata: JSON as tools write it, numbers in range, and their names for samplers.

Other tools are read leniently in form (a number may be a string, NaN may stand for nothing) and strictly in size: what
is absurd counts as not said.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from fluxsplit.errors import FluxsplitError
from fluxsplit.recipe import MAX_SEED, MAX_SIDE_PX, MAX_STEPS, MAX_TEXT_CHARS

MAX_DIGITS = 25
_SAMPLERS = {
    "euler": "euler",
    "keuler": "euler",
    "flowmatcheuler": "euler",
    "flowmatcheulerdiscretescheduler": "euler",
    "eulerflowmatch": "euler",
    "heun": "heun",
    "kheun": "heun",
    "dpmpp2m": "dpmpp_2m",
    "dpm++2m": "dpmpp_2m",
    "kdpmpp2m": "dpmpp_2m",
}
_SCHEDULERS = {
    "simple": "simple",
    "normal": "normal",
    "beta": "beta",
    "sgmuniform": "sgm_uniform",
}


_FOREIGN_SCHEDULES = ("karras", "exponential")


def lenient_json(text: str) -> Any:
    """JSON of another tool: NaN and infinity read as None, as ComfyUI writes them; duplicate keys are refused.

    Raises FluxsplitError.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_once, parse_constant=lambda _: None, parse_int=_parse_int, parse_float=_parse_float
        )
    except RecursionError:
        raise FluxsplitError("JSON is nested too deeply") from None
    except ValueError as error:
        raise FluxsplitError(f"JSON cannot be read: {str(error)[:200]}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = max(table, key=names.count) if len(names) < 1000 else "a name"
        raise FluxsplitError(f"JSON names {twice[:80]!r} twice")
    return table


def _parse_int(text: str) -> int | None:
    return int(text) if len(text) <= MAX_DIGITS else None


def _parse_float(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def as_text(value: Any) -> str | None:
    """`value` where it is text of a sane length that can be written again."""
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS:
        return None
    return value.encode("utf-8", "replace").decode("utf-8") if not value.isascii() else value


def file_name(path: str) -> str:
    """The last part of a path of whichever system."""
    return path.replace("\\", "/").split("/")[-1]


def as_number(value: Any) -> float | None:
    """`value` as a finite number, from a number or its text."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        if not re.fullmatch(r"\s*[-+]?\d{1,25}(\.\d{0,25})?([eE][-+]?\d{1,3})?\s*", value):
            return None
        value = float(value)
    if not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 1e12:
        return None
    return float(value)


def as_count(value: Any, most: int) -> int | None:
    """`value` as a whole number in 0..most."""
    if isinstance(value, str):
        value = int(value) if re.fullmatch(r"\s*\d{1,25}\s*", value) else None
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value <= most else None


def as_seed(value: Any) -> int | None:
    """`value` as a seed."""
    return as_count(value, MAX_SEED)


def as_steps(value: Any) -> int | None:
    """`value` as a number of steps."""
    return as_count(value, MAX_STEPS) or None


def as_side(value: Any) -> int | None:
    """`value` as pixels of a side."""
    return as_count(value, MAX_SIDE_PX) or None


def as_size(text: Any) -> tuple[int | None, int | None]:
    """Width and height from `1152x896` or Fooocus' `(1152, 896)`."""
    match = re.fullmatch(r"\s*\(?\s*(\d{1,6})\s*[x×,]\s*(\d{1,6})\s*\)?\s*", text) if isinstance(text, str) else None
    return (as_side(match[1]), as_side(match[2])) if match else (None, None)


def sampler_of(name: Any) -> tuple[str | None, str | None]:
    """Our name of a tool's sampler, and a note where that is an assumption."""
    text = as_text(name)
    if not text:
        return None, None
    plain, _ = _divided(text)
    if plain in _SAMPLERS:
        return _SAMPLERS[plain], None
    return "euler", f"sampler {text[:40]!r} is not one of fluxsplit's; euler stands in for it"


def schedule_behind(name: Any) -> str | None:
    """The schedule in a sampler's name, as A1111 wrote it up to 1.8 (`DPM++ 2M Karras`); None for no such name."""
    return _divided(as_text(name) or "")[1] or None


def _divided(text: str) -> tuple[str, str]:
    """A sampler's name without spaces and the like, and what schedule stands behind it."""
    plain = re.sub(r"[\s_\-]", "", text.lower())
    for known in _SAMPLERS:
        if plain.startswith(known) and plain[len(known) :] in (*_SCHEDULERS, *_FOREIGN_SCHEDULES):
            return known, plain[len(known) :]
    return plain, ""


def scheduler_of(name: Any) -> tuple[str | None, str | None]:
    """Our name of a tool's schedule, and a note where that is an assumption."""
    text = as_text(name)
    if not text:
        return None, None
    plain = re.sub(r"[\s_\-]", "", text.lower())
    if plain in _SCHEDULERS:
        return _SCHEDULERS[plain], None
    return "simple", f"schedule {text[:40]!r} is not one of fluxsplit's; simple stands in for it"


def table_of(value: Any) -> Mapping[str, Any]:
    """`value` where it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def notes_of(*notes: str | None) -> tuple[str, ...]:
    """Those that say something."""
    return tuple(note for note in notes if note)
