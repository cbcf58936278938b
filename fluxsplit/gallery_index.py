"""The pictures of a folder as the gallery shows them: read by their chunks, kept current, matched with their results.

No pixel is decoded here. The page never names a file: each picture goes by an id that is a keyed hash of its
name, so that ids can be neither guessed nor turned into paths, and only names that a listing of the folder gave
are ever opened, without following links.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import stat
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from fluxsplit.errors import FluxsplitError
from fluxsplit.found import read_found
from fluxsplit.metadata import RECORD_KEY, ImageRecord, record_from_json
from fluxsplit.picks import PICKS_NAME, Pick, add_pick, is_plain_name, read_picks
from fluxsplit.png_text import read_png

MAX_PICTURES = 20_000
READ_AT_ONCE = 100
"""Files read before the page is told of them; the first ones show while the rest are read."""
MAX_PROMPT_CHARS = 4000
PREVIEW, RENDER = "preview", "render"
_SHEET = re.compile(r"sheet(-\d+)?\.png", re.ASCII)
Change = tuple[int, dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Picture:
    """One file and what it says of itself."""

    id: str
    name: str
    kind: str
    """`preview` for the folder that is chosen from, `render` for results."""
    size_bytes: int
    changed_ns: int
    width: int = 0
    """Pixels of the file."""
    height: int = 0
    prompt: str = ""
    seed: int | None = None
    steps: int | None = None
    model: str = ""
    tool: str = ""
    latent_sha256: str = ""
    parent_name: str = ""
    parent_sha256: str = ""
    error: str = ""
    """Why it cannot be shown; empty where it can."""


class GalleryIndex:
    """The pictures of one folder and of the folder of results, with the decisions made of them.

    `refresh` is called by one thread; all else by any.
    """

    def __init__(self, folder: Path, renders: Path, secret: bytes) -> None:
        self.folder = folder
        self.renders = renders
        self._secret = secret
        self._lock = threading.Lock()
        self._pictures: dict[str, Picture] = {}
        self._picks: dict[str, Pick] = {}
        self._picks_stamp: tuple[int, int] | None = None
        self._objects: dict[str, Change] = {}
        self.revision = 0
        self.notice = ""
        """What stands in the way, for the person; empty where nothing does."""

    def refresh(self) -> bool:
        """Read what is new or changed, at most `READ_AT_ONCE` files; whether more are waiting."""
        listed = _listed(self.folder, PREVIEW, self._secret) | _listed(self.renders, RENDER, self._secret)
        notice = f"only the first {MAX_PICTURES} pictures are shown" if len(listed) >= 2 * MAX_PICTURES else ""
        known = self._pictures
        stale = [id for id, entry in listed.items() if id not in known or _stamp(known[id]) != entry[2:]]
        fresh = {id: read_picture(id, *listed[id], folder=self._folder(listed[id][1])) for id in stale[:READ_AT_ONCE]}
        picks, complaint = self._read_picks()
        with self._lock:
            if fresh or picks is not None or listed.keys() != known.keys():
                self._pictures = {id: fresh.get(id) or known[id] for id in listed if id in fresh or id in known}
                self._picks = self._picks if picks is None else picks
                self._publish()
            self.notice = complaint or notice
        return len(stale) > READ_AT_ONCE

    def changes_since(self, revision: int) -> tuple[int, list[dict[str, Any]], list[str]]:
        """The newest revision, the pictures that changed after `revision`, and the ids of those that went."""
        with self._lock:
            newer = {id: object for id, (at, object) in self._objects.items() if at > revision}
            gone = [id for id, object in newer.items() if object is None]
            return self.revision, [object for object in newer.values() if object is not None], gone

    def decide(self, id: str, pick: str | None, stars: int) -> None:
        """Write a decision of a preview down; raises FluxsplitError."""
        with self._lock:
            picture = self._pictures.get(id)
        if picture is None or picture.kind != PREVIEW:
            raise FluxsplitError("there is no such picture any more")
        made = add_pick(self.folder, Pick(picture.name, pick, stars))
        with self._lock:
            self._picks[picture.name] = made
            self._publish()

    def picked(self) -> list[Picture]:
        """The previews that are picked."""
        with self._lock:
            return [
                picture
                for picture in self._pictures.values()
                if picture.kind == PREVIEW and (pick := self._picks.get(picture.name)) and pick.pick == "pick"
            ]

    def picture(self, id: str) -> Picture | None:
        """The picture of that id, if there is one that can be shown."""
        with self._lock:
            picture = self._pictures.get(id)
        return picture if picture is not None and not picture.error else None

    def path(self, picture: Picture) -> Path:
        """Where the picture's file is."""
        return self._folder(picture.kind) / picture.name

    def _folder(self, kind: str) -> Path:
        return self.folder if kind == PREVIEW else self.renders

    def _read_picks(self) -> tuple[dict[str, Pick] | None, str]:
        """The decisions where the file has changed, and what is wrong with it."""
        try:
            status = (self.folder / PICKS_NAME).lstat()
            stamp = (status.st_size, status.st_mtime_ns)
        except OSError:
            stamp = None
        if stamp == self._picks_stamp and not self.notice:
            return None, ""
        said: list[str] = []
        try:
            picks = read_picks(self.folder, said.append)
        except FluxsplitError as error:
            return None, error.line()
        self._picks_stamp = stamp
        return picks, ""

    def _publish(self) -> None:
        """Give every object of the page that differs from the last one a new revision."""
        results = matched(self._pictures.values())
        now = {id: self._object(picture, results.get(id, [])) for id, picture in self._pictures.items()}
        gone: dict[str, None] = {id: None for id, (_, object) in self._objects.items() if object and id not in now}
        changed = {id: object for id, object in now.items() if self._objects.get(id, (0, None))[1] != object} | gone
        if changed:
            self.revision += 1
            self._objects.update({id: (self.revision, object) for id, object in changed.items()})

    def _object(self, picture: Picture, results: list[str]) -> dict[str, Any]:
        """What the page is told of a picture."""
        pick = self._picks.get(picture.name) if picture.kind == PREVIEW else None
        return {
            "id": picture.id,
            "kind": picture.kind,
            "name": picture.name,
            "version": f"{picture.changed_ns:x}-{picture.size_bytes:x}",
            "width": picture.width,
            "height": picture.height,
            "prompt": picture.prompt[:MAX_PROMPT_CHARS],
            "seed": None if picture.seed is None else str(picture.seed),  # 64 bits are more than a script's numbers
            "steps": picture.steps,
            "model": picture.model,
            "tool": picture.tool,
            "error": picture.error,
            "pick": pick.pick if pick else None,
            "stars": pick.stars if pick else 0,
            "results": results,
        }


def open_picture(path: Path) -> tuple[BinaryIO, int]:
    """The file, opened, and its size in bytes; raises OSError where it is a link or no plain file."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    file = os.fdopen(handle, "rb")
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        file.close()
        raise OSError(f"{path.name} is not a plain file")
    return file, status.st_size


def matched(pictures: Iterable[Picture]) -> dict[str, list[str]]:
    """For each preview's id the ids of its results, newest last.

    A result names its parent: by the SHA-256 of the latent, else by the file's name. One that names none belongs
    to the previews of its seed and prompt.
    """
    by_latent: dict[str, list[str]] = {}
    by_name: dict[str, list[str]] = {}
    by_seed: dict[tuple[int | None, str], list[str]] = {}
    renders: list[Picture] = []
    for picture in pictures:
        if picture.error:
            continue
        if picture.kind == RENDER:
            renders.append(picture)
            continue
        by_latent.setdefault(picture.latent_sha256, []).append(picture.id)
        by_name.setdefault(picture.name, []).append(picture.id)
        by_seed.setdefault((picture.seed, picture.prompt), []).append(picture.id)
    results: dict[str, list[str]] = {}
    for render in sorted(renders, key=lambda picture: (picture.changed_ns, picture.name)):
        for id in _parents(render, by_latent, by_name, by_seed):
            results.setdefault(id, []).append(render.id)
    return results


def _parents(
    render: Picture,
    by_latent: Mapping[str, list[str]],
    by_name: Mapping[str, list[str]],
    by_seed: Mapping[tuple[int | None, str], list[str]],
) -> list[str]:
    if render.parent_sha256 and render.parent_sha256 in by_latent:
        return by_latent[render.parent_sha256]
    if render.parent_name:
        return by_name.get(render.parent_name, [])
    return [] if render.seed is None else by_seed.get((render.seed, render.prompt), [])


def read_picture(id: str, name: str, kind: str, size_bytes: int, changed_ns: int, folder: Path) -> Picture:
    """The file's picture; one that is damaged or refused has `error`."""
    here = Picture(id, name, kind, size_bytes, changed_ns)
    try:
        return _read(here, folder / name)
    except FluxsplitError as error:
        return replace(here, error=error.line()[:300])


def _read(here: Picture, path: Path) -> Picture:
    """The picture at `path`; a recipe that is refused leaves a picture that says nothing of how it was made."""
    png = read_png(path)
    common = (here.id, here.name, here.kind, here.size_bytes, here.changed_ns, png.width, png.height)
    with contextlib.suppress(FluxsplitError):
        if RECORD_KEY in png.texts:
            return Picture(*common, **_said_by_us(record_from_json(png.texts[RECORD_KEY])))
        found = read_found(path)
        return Picture(*common, found.prompt or "", found.seed, found.steps, found.model or "", found.tool or "")
    return Picture(*common)


def _said_by_us(record: ImageRecord) -> dict[str, Any]:
    said: dict[str, Any] = {"latent_sha256": record.latent_sha256, "tool": "fluxsplit"}
    if record.parent is not None:
        said |= {"parent_name": record.parent.name, "parent_sha256": record.parent.latent_sha256}
    if (recipe := record.recipe) is not None:
        said |= {"prompt": recipe.prompt, "seed": recipe.seed, "steps": recipe.steps, "model": recipe.transformer.name}
    return said


def _stamp(picture: Picture) -> tuple[int, int]:
    return picture.size_bytes, picture.changed_ns


def _listed(folder: Path, kind: str, secret: bytes) -> dict[str, tuple[str, str, int, int]]:
    """Name, kind, size and time of change of each PNG of the folder, by its id, in the order of their names."""
    found: list[tuple[str, str, int, int]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if (
                    not entry.name.lower().endswith(".png")
                    or entry.name.startswith(".")
                    or _SHEET.fullmatch(entry.name)
                ):
                    continue
                if is_plain_name(entry.name) and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    found.append((entry.name, kind, status.st_size, status.st_mtime_ns))
    except OSError:
        return {}  # removed, or not there yet: no pictures
    found.sort(key=lambda entry: _natural(entry[0]))
    return {_id(secret, kind, entry[0]): entry for entry in found[:MAX_PICTURES]}


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """`x-2` before `x-10`."""
    parts = re.split(r"(\d{1,18})", name, flags=re.ASCII)
    return tuple((0, int(part)) if number % 2 else (1, part) for number, part in enumerate(parts))


def _id(secret: bytes, kind: str, name: str) -> str:
    return hmac.new(secret, f"{kind}/{name}".encode(), hashlib.sha256).hexdigest()[:32]
