"""SHA-256 of weight files, remembered by path, size and time of change, since 12 GB take a while to read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from fluxsplit.places import safetensors_below
from fluxsplit.recipe import WeightsStamp

CHUNK_BYTES = 8 << 20
_MAX_ENTRIES = 500


def cache_folder() -> Path:
    """Where fluxsplit keeps what it can make again: `FLUXSPLIT_CACHE`, else the platform's cache folder."""
    if "FLUXSPLIT_CACHE" in os.environ:
        return Path(os.environ["FLUXSPLIT_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or str(Path.home() / ".cache")
    return Path(base) / "fluxsplit"


def weights_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a weight file; of a folder, that of its files' names and hashes in order."""
    place = Path(path)
    if place.is_file():
        return file_sha256(place)
    lines = [f"{file_sha256(file)}  {file.relative_to(place).as_posix()}\n" for file in safetensors_below(place)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weights_stamp(path: str | Path) -> WeightsStamp:
    """Name and hash of a weight file or folder."""
    return stamp_of(path, weights_sha256(path))


def stamp_of(path: str | Path, sha256: str) -> WeightsStamp:
    """The stamp with a hash that is known; of a name that is no text, which a recipe cannot hold, what is."""
    return WeightsStamp(Path(path).name.encode("utf-8", "replace").decode(), sha256)


def remembered_sha256(path: str | Path) -> str | None:
    """What `weights_sha256` would say, if it can say so without reading the files; else None."""
    place = Path(path)
    known = _read()
    try:
        if place.is_file():
            return known.get(_key(place.resolve()))
        files = safetensors_below(place)
        if not files or any(_key(file.resolve()) not in known for file in files):
            return None
    except OSError:
        return None
    return weights_sha256(place)


def file_sha256(path: str | Path) -> str:
    """Hex SHA-256 of a file, from memory if it has not changed since it was last computed."""
    place = Path(path).resolve()
    key = _key(place)
    known = _read()
    if key in known:
        return known[key]
    digest = hashlib.sha256()
    with place.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    _remember(key, digest.hexdigest())
    return digest.hexdigest()


def _key(place: Path) -> str:
    status = place.stat()
    return f"{place}|{status.st_size}|{status.st_mtime_ns}"


def _read() -> dict[str, str]:
    try:
        known = json.loads((cache_folder() / "sha256.json").read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(key: str, digest: str) -> None:
    """Best effort: without a writable cache the hash is computed again next time."""
    entries = list({**_read(), key: digest}.items())[-_MAX_ENTRIES:]
    target = cache_folder() / "sha256.json"
    part = target.with_name(f"sha256.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(dict(entries)))
        part.replace(target)
    except OSError:
        with contextlib.suppress(OSError):  # of a disk that cannot be written to, as the rest
            part.unlink(missing_ok=True)
