"""Which pictures of a folder were picked: `picks.jsonl`, one decision a line, the last one for a picture wins.

The file is only ever added to, so that a decision is on the disk when it is made, a person can read and edit
it, and two programs may write at once. It lies beside pictures that come from anywhere, so it is read as a
stranger's: bounded, strict, and its names are names in that folder, never paths.
"""

from __future__ import annotations

import datetime
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fluxsplit.durable import append_line
from fluxsplit.errors import FluxsplitError
from fluxsplit.recipe import strict_json

PICKS_NAME = "picks.jsonl"
DECISIONS = ("pick", "reject", None)
MAX_STARS = 5
MAX_FILE_BYTES = 32 << 20
MAX_LINE_BYTES = 2048
MAX_PICTURES = 100_000
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))}
"""Names that are no files on Windows, with any ending."""
_HINT = "mend or remove that line"


@dataclass(frozen=True, slots=True)
class Pick:
    """What was decided of one picture, and when."""

    image: str
    """The file's name in the folder of `picks.jsonl`."""
    pick: str | None = None
    """`pick`, `reject`, or None for undecided."""
    stars: int = 0
    """1 to 5; 0 for none."""
    time: str = ""
    """UTC, ISO 8601; set by `add_pick` where it is empty."""

    def __post_init__(self) -> None:
        if not is_plain_name(self.image):
            raise FluxsplitError(f"{self.image[:80]!r} is not the name of a picture in the folder")
        if self.pick not in DECISIONS:
            raise FluxsplitError(f"pick is {str(self.pick)[:40]!r}, not pick, reject or null")
        if type(self.stars) is not int or not 0 <= self.stars <= MAX_STARS:
            raise FluxsplitError(f"stars are {str(self.stars)[:40]}, not 0 to {MAX_STARS}")
        if not isinstance(self.time, str) or len(self.time) > 64:
            raise FluxsplitError("time is not a short text")

    def to_json(self) -> str:
        """The decision as a line of the file, without its end."""
        return json.dumps(asdict(self), ensure_ascii=True, allow_nan=False)


def is_plain_name(name: Any) -> bool:
    """Whether `name` can only mean a file in the folder itself, on any system."""
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable():
        return False
    if name.partition(".")[0].rstrip().upper() in _DEVICES or name[-1] in ". ":
        return False
    return len(name) <= 255 and not any(c in name for c in "/\\:") and len(os.fsencode(name)) <= 255


def add_pick(folder: str | Path, pick: Pick) -> Pick:
    """Add a decision to the folder's `picks.jsonl` and return it with its time.

    When this returns, the line survives a power cut; several processes may do this at once. Raises FluxsplitError.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    made = pick if pick.time else Pick(pick.image, pick.pick, pick.stars, now)
    path = Path(folder) / PICKS_NAME
    if path.exists() and path.stat().st_size > MAX_FILE_BYTES - MAX_LINE_BYTES:
        raise FluxsplitError(f"{path} has {path.stat().st_size} bytes and takes no more", "keep its newest lines")
    append_line(path, made.to_json().encode(), is_whole=_is_decision)
    return made


def read_picks(folder: str | Path, warn: Callable[[str], None] | None = None) -> dict[str, Pick]:
    """The decisions that hold, by the picture's name, in the order in which they were made; {} without a file.

    A last line that was cut short (its writer died) is passed over, and `warn` is told; without `warn` it is said
    on stderr. Raises FluxsplitError, with the line's number, for any other line that `add_pick` cannot have written.
    """
    path = Path(folder) / PICKS_NAME
    lines = _read(path).split(b"\n")
    picks: dict[str, Pick] = {}
    for number, line in _numbered(lines):
        try:
            pick = _decision(line)
        except FluxsplitError as error:
            if number < len(lines):
                raise FluxsplitError(f"{path} line {number}: {error.message}", _HINT) from None
            (warn or _say)(f"{path} ends in half a line, which is passed over")
            continue
        picks.pop(pick.image, None)  # the newest comes last
        picks[pick.image] = pick
        if len(picks) > MAX_PICTURES:
            raise FluxsplitError(f"{path} names over {MAX_PICTURES} pictures", "split the folder")
    return picks


def picked_names(picks: dict[str, Pick]) -> list[str]:
    """The names of the pictures that are picked, sorted."""
    return sorted(name for name, pick in picks.items() if pick.pick == "pick")


def _read(path: Path) -> bytes:
    """The file's bytes, none where it is missing; refused where it is no plain file, as a link or a pipe."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise FluxsplitError(f"cannot read {path}: {error.strerror}") from error
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FluxsplitError(f"{path} is not a plain file")
        if status.st_size > MAX_FILE_BYTES:
            raise FluxsplitError(f"{path} has {status.st_size} bytes, over {MAX_FILE_BYTES}", "keep its newest lines")
        return file.read(MAX_FILE_BYTES)


def _numbered(lines: list[bytes]) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _decision(line: bytes) -> Pick:
    if len(line) > MAX_LINE_BYTES:
        raise FluxsplitError(f"has {len(line)} bytes, over {MAX_LINE_BYTES}")
    try:
        value = strict_json(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise FluxsplitError("is not UTF-8") from None
    names = [field.name for field in fields(Pick)]
    if not isinstance(value, dict) or not {"image", "pick"} <= set(value) <= set(names):
        raise FluxsplitError(f"is not an object of {', '.join(names)}, of which the first two are needed")
    if not isinstance(value["image"], str) or not isinstance(value["pick"], str | None):
        raise FluxsplitError("image is not a text, or pick neither a text nor null")
    return Pick(**value)


def _is_decision(line: bytes) -> bool:
    try:
        _decision(line)
    except FluxsplitError:
        return False
    return True


def _say(text: str) -> None:
    print(f"fluxsplit: {text}", file=sys.stderr)
