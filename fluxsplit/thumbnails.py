"""Small copies of pictures for the gallery: made by Pillow in a process of its own, and kept in the cache folder.

A picture may come from anywhere and its decoder is C code, so that it runs outside the server: with bounded memory,
a time limit, PNG alone, and a limit on pixels that is checked before anything is decoded. A worker that dies or
hangs costs one thumbnail. This file is also the worker: `python -m fluxsplit.thumbnails` reads lines of JSON
`[source, target]` and answers each with one of `{"ok": true}` or `{"error": ...}`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from fluxsplit.child_environment import child_environment, module_command, own_process_group
from fluxsplit.errors import FluxsplitError
from fluxsplit.fingerprint import cache_folder

SIDE_PX = 400
"""Of the longer side: rows of the page are 200 high, and screens have up to two pixels for each."""
QUALITY = 82
MAX_PIXELS = 64_000_000
MAX_SIDE_PX = 16_384
MAX_MEMORY_BYTES = 1 << 30
MAX_CACHE_BYTES = 256 << 20
PATIENCE_S = 20.0
_ENDING = b"\xff\xd9"


class Thumbnails:
    """Makes thumbnails, a few at once; `get` is called by any thread and waits."""

    def __init__(self, workers: int = 2) -> None:
        self._idle: queue.Queue[_Worker] = queue.Queue()
        self._workers = [_Worker() for _ in range(workers)]
        for worker in self._workers:
            self._idle.put(worker)
        self._folder = cache_folder() / "thumbnails"

    def get(self, source: Path, stamp: str) -> bytes:
        """The JPEG of a picture; `stamp` changes when the picture does. Raises FluxsplitError."""
        target = self._folder / f"{hashlib.sha256(f'{source}|{stamp}|{SIDE_PX}'.encode()).hexdigest()}.jpg"
        kept = _whole(target)
        if kept is not None:
            return kept
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        worker = self._idle.get()
        try:
            kept = _whole(target)
            if kept is None:
                worker.make(source, target)
                kept = _whole(target)
        finally:
            self._idle.put(worker)
        if kept is None:
            raise FluxsplitError(f"no thumbnail of {source.name} could be kept in {self._folder}")
        return kept

    def tidy(self) -> None:
        """Remove the thumbnails that were made longest ago, until the rest fits."""
        with contextlib.suppress(OSError):
            files = [(file.stat().st_mtime, file.stat().st_size, file) for file in self._folder.iterdir()]
            total_bytes = sum(size for _, size, _ in files)
            for _, size, file in sorted(files):
                if total_bytes <= MAX_CACHE_BYTES:
                    return
                file.unlink(missing_ok=True)
                total_bytes -= size

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.end()


class _Worker:
    """One process, started when it is first needed and again after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def make(self, source: Path, target: Path) -> None:
        process = self._running()
        late = threading.Timer(PATIENCE_S, process.kill)
        late.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([os.fspath(source), os.fspath(target)]).encode() + b"\n")
            process.stdin.flush()
            answer = process.stdout.readline(1 << 16)
        except OSError:
            answer = b""
        finally:
            late.cancel()
        if not answer:
            self.end()
            raise FluxsplitError(f"{source.name} could not be decoded: its decoder died or took over {PATIENCE_S:g} s")
        error = json.loads(answer).get("error")
        if error:
            raise FluxsplitError(f"{source.name} could not be decoded: {str(error)[:200]}")

    def end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        process.kill()
        process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.end()
            self._process = subprocess.Popen(
                module_command("fluxsplit.thumbnails"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=child_environment(os.environ),
                **own_process_group(),  # Ctrl-C is the server's to hear
            )
        return self._process


def _whole(path: Path) -> bytes | None:
    """The JPEG at `path`, None where it is missing or was cut short by a power cut."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if data.endswith(_ENDING) else None


def make_thumbnail(source: Path, target: Path) -> None:
    """Write the JPEG of a PNG; raises OSError or ValueError, as Pillow does, for what is none or too large."""
    from PIL import Image  # noqa: PLC0415  only in the worker

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    handle = os.open(source, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file, Image.open(file, formats=["PNG"]) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
            raise ValueError(f"{width}x{height} pixels are over {MAX_PIXELS // 10**6} million")
        picture.load()
        if "A" in picture.getbands() or "transparency" in picture.info:
            grey = Image.new("RGBA", picture.size, (64, 64, 64, 255))
            small = Image.alpha_composite(grey, picture.convert("RGBA")).convert("RGB")
        else:
            small = picture.convert("RGB")
    small.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS, reducing_gap=3)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            small.save(out, format="JPEG", quality=QUALITY)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _bound_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # noqa: PLC0415  there is none on Windows

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def _serve() -> None:
    _bound_memory()
    for line in sys.stdin.buffer:
        answer: dict[str, Any] = {"ok": True}
        try:
            source, target = json.loads(line)
            make_thumbnail(Path(source), Path(target))
        except MemoryError:
            answer = {"error": f"it needs over {MAX_MEMORY_BYTES >> 20} MB"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
