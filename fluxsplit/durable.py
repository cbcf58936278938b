"""Files that exist whole or not at all: written aside, flushed to the disk, then given their name.

A final name exists only for a complete file (promise P1), and a function here returns only after the file and
its name would survive a power cut on a local filesystem (P2). The bytes go to `<name>.<random>.part` in the
same folder, are flushed with fsync, and the finished file is then linked to its name: linking fails where the
name is taken, so nothing is ever overwritten unless `replace` was called.

A failed fsync is never repeated: Linux marks the lost pages clean, so a second fsync would report success for
data that is gone (Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fluxsplit.errors import DiskFull, FluxsplitError

Bytes = bytes | bytearray | memoryview
PART_SUFFIX = ".part"
MAX_NAME_BYTES = 255
MAX_SAME_NAMES = 100_000
WRITE_BYTES = 8 << 20
MAX_TAIL_BYTES = 1 << 16

HELD_WAITS_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0)
_HELD = (5, 32, 33)
"""Windows: access denied, in use by another process, a part of it locked."""
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EINVAL}
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


def write_new(path: str | Path, data: Bytes | Iterable[Bytes]) -> Path:
    """Write `data` to `path`, which must not exist, and return it; parent folders are made.

    Raises FluxsplitError where the name is taken or the system refuses; then no file of ours is left.
    """
    path = Path(path)

    def commit(part: Path) -> Path:
        try:
            _link(part, path)
        except FileExistsError:
            raise FluxsplitError(f"{path} already exists", "choose another name, or give --overwrite") from None
        return path

    return _write(path, data, commit)


def write_free(folder: str | Path, stem: str, suffix: str, data: Bytes | Iterable[Bytes]) -> Path:
    """Write `data` to the first free of `stem.ext`, `stem-2.ext`, `stem-3.ext`, ... and return its path.

    `suffix` comes with its dot. Two processes that race for a name get two names. Raises FluxsplitError.
    """
    folder = Path(folder)

    def commit(part: Path) -> Path:
        for name in itertools.islice(_names(stem, suffix), MAX_SAME_NAMES):
            with contextlib.suppress(FileExistsError):
                _link(part, folder / name)
                return folder / name
        raise FluxsplitError(f"{folder} holds {MAX_SAME_NAMES} files named {stem}{suffix}", "use another folder")

    return _write(folder / (stem + suffix), data, commit)


def write_once(folder: str | Path, stem: str, suffix: str, data: bytes) -> Path:
    """As `write_free`, but where one of the names is taken by just these bytes, that file is left alone and returned.

    For what is made of one file again and again: each time the same, under one name.
    """
    return already_there(folder, stem, suffix, data) or write_free(folder, stem, suffix, data)


def already_there(folder: str | Path, stem: str, suffix: str, data: bytes) -> Path | None:
    """The file that holds just these bytes under one of the names that `write_free` would try, safely on the disk."""
    for name in itertools.islice(_names(stem, suffix), MAX_SAME_NAMES):
        path = Path(folder) / name
        try:
            if path.stat().st_size == len(data) and path.read_bytes() == data:
                _flush_file(path)  # whoever wrote it may not have
                return path
        except FileNotFoundError:
            return None
        except OSError:
            continue
    return None


def replace(path: str | Path, data: Bytes | Iterable[Bytes]) -> Path:
    """Write `data` to `path`, in one step in place of a file that may be there (`--overwrite`).

    Whoever reads `path` meanwhile sees the old file or the new one, whole. Raises FluxsplitError.
    """
    path = Path(path)

    def commit(part: Path) -> Path:
        _once_free(lambda: part.replace(path))
        return path

    return _write(path, data, commit)


def append_line(path: str | Path, line: bytes, is_whole: Callable[[bytes], bool]) -> None:
    """Add `line` and a newline to the end of `path`, which is made where it is missing; flushed when this returns.

    Writers in several processes take turns. An end without newline is what a writer left that died: it is
    completed where `is_whole` says that only the newline is missing (a person's editor may leave it out), and
    cut off otherwise. Raises FluxsplitError, and then nothing of the line is left in the file.
    """
    path = Path(path)
    try:
        _make_folder(path.parent)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
        try:
            with _file_lock(handle):
                _append(handle, line, is_whole)
        finally:
            os.close(handle)
        _flush_folder(path.parent)
    except OSError as error:
        raise _explained(error, path, len(line)) from error


def _append(handle: int, line: bytes, is_whole: Callable[[bytes], bool]) -> None:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise OSError(errno.EINVAL, "not a plain file")
    size_bytes = os.lseek(handle, 0, os.SEEK_END)
    start = os.lseek(handle, max(0, size_bytes - MAX_TAIL_BYTES), os.SEEK_SET)
    before, _, tail = os.read(handle, MAX_TAIL_BYTES).rpartition(b"\n")
    whole = bool(tail) and is_whole(tail)
    end = size_bytes if whole or not tail else size_bytes - len(tail)
    if tail and not whole and not before and start:
        raise OSError(errno.EINVAL, f"its last {MAX_TAIL_BYTES} bytes hold no line")
    data = (b"\n" if whole else b"") + line + b"\n"
    try:
        os.ftruncate(handle, end)
        os.lseek(handle, end, os.SEEK_SET)
        done = 0
        while done < len(data):
            done += os.write(handle, data[done:])
        os.fsync(handle)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(handle, end)
        raise


@contextlib.contextmanager
def _file_lock(handle: int) -> Iterator[None]:
    """Hold the file against other writers of this program; a filesystem without locks goes without."""
    if sys.platform == "win32":
        import msvcrt  # noqa: PLC0415

        os.lseek(handle, 1 << 30, os.SEEK_SET)  # far behind the end, so that readers are not held off
        msvcrt.locking(handle, msvcrt.LK_LOCK, 1)
        try:
            yield
        finally:
            os.lseek(handle, 1 << 30, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)
        return
    import fcntl  # noqa: PLC0415 - there is none on Windows

    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    yield  # closing the file lets go


def check_folder(folder: str | Path) -> None:
    """Raise FluxsplitError where nothing can be written into `folder`, or where it cannot be made.

    Nothing is left there. Meant for the moment before a long computation, whose results would be lost.
    """
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    probe = _part_name(place / "probe")
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise _explained(error, Path(folder), 0) from error


def check_space(folder: str | Path, needed_bytes: int) -> None:
    """Raise FluxsplitError where the disk of `folder` has not twice `needed_bytes` free (promise P6).

    The folder need not exist yet. Meant for the minute before a long computation, not for its end.
    """
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        free_bytes = shutil.disk_usage(place).free
    except OSError:
        return  # some network folders tell nothing; the write itself will
    if free_bytes < 2 * needed_bytes:
        raise FluxsplitError(
            f"{folder} has {_size(free_bytes)} free and the results need {_size(needed_bytes)}",
            f"free at least {_size(2 * needed_bytes - free_bytes)} or choose another folder",
        )


def _names(stem: str, suffix: str) -> Iterator[str]:
    yield stem + suffix
    for number in itertools.count(2):
        yield f"{stem}-{number}{suffix}"


def _write(path: Path, data: Bytes | Iterable[Bytes], commit: Callable[[Path], Path]) -> Path:
    """Write `data` aside, flush it, let `commit` name it, flush the folder; clean up after any failure."""
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise FluxsplitError(f"the file name {path.name[:40]}... is over {MAX_NAME_BYTES} bytes", "shorten it")
    counter = _Counter()
    chunks = counter.watch((data,) if isinstance(data, bytes | bytearray | memoryview) else data)
    part: Path | None = None
    try:
        _make_folder(path.parent)
        part = _part_name(path)
        _write_part(part, chunks)
        final = commit(part)
        part.unlink(missing_ok=True)
        part = None
        _flush_folder(path.parent)
    except OSError as error:
        if part is not None and _is_held(error):
            whole, part = part, None
            raise FluxsplitError(
                f"{path} is open in another program; what was to be in it is in {whole}", "close it and rename the file"
            ) from error
        raise _explained(error, path, counter.seen_bytes) from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
    return final


class _Counter:
    """How many bytes were asked for so far, to say in an error what the file needs."""

    def __init__(self) -> None:
        self.seen_bytes = 0

    def watch(self, chunks: Iterable[Bytes]) -> Iterator[memoryview]:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            self.seen_bytes += len(view)
            yield view


def _part_name(path: Path) -> Path:
    """A name of its own beside `path`; long names are cut so that the ending still fits."""
    cut = os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f"{cut}.{os.urandom(8).hex()}{PART_SUFFIX}")


def _write_part(part: Path, chunks: Iterable[memoryview]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(part, flags, 0o666)
    try:
        for chunk in chunks:
            done = 0
            while done < len(chunk):
                done += os.write(handle, chunk[done : done + WRITE_BYTES])
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(part: Path, path: Path) -> None:
    """Give `part` its final name unless the name is taken (then FileExistsError)."""
    if os.name == "nt":
        _once_free(lambda: part.rename(path))  # on Windows renaming never overwrites
        return
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_locked(part, path)


def _once_free(move: Callable[[], object]) -> None:
    """Rename, again for some seconds where Windows says that somebody has the file open.

    A virus scanner, a search index or a viewer looks into every new file there.
    """
    for wait_s in HELD_WAITS_S:
        try:
            move()
            return
        except PermissionError as error:
            if not _is_held(error):
                raise
        time.sleep(wait_s)
    move()


def _is_held(error: OSError) -> bool:
    return getattr(error, "winerror", None) in _HELD


def _rename_locked(part: Path, path: Path) -> None:
    """For filesystems without hard links (exFAT): look and rename while holding the folder's lock.

    The lock goes with its process, so a kill leaves none. It holds off every writer of this program; other
    programs have the moment between the look and the rename.
    """
    with _folder_lock(path.parent):
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        part.rename(path)


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    import fcntl  # noqa: PLC0415 - there is none on Windows, which never gets here

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _make_folder(folder: Path) -> None:
    """Make `folder` and its missing parents, each flushed into the folder above it."""
    missing = []
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        missing.append(place)
        place = place.parent
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        _flush_folder(made.parent)


def _flush_file(path: Path) -> None:
    """Make what another wrote survive a power cut; Windows does that for none but the writer."""
    if os.name != "nt":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _flush_folder(folder: Path) -> None:
    """Make a new name in `folder` survive a power cut; Windows and some network folders have no such call."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(handle)


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def _explained(error: OSError, path: Path, needed_bytes: int) -> FluxsplitError:
    """The system's refusal, with what to do about it."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        try:
            free = f", {_size(shutil.disk_usage(path.parent).free)} are free"
        except OSError:
            free = ""
        need = f"at least {_size(needed_bytes)} are needed{free}"
        return DiskFull(f"cannot write {path}: the disk is full", f"{need}; free some space and run again")
    hint = {
        errno.EFBIG: f"the filesystem or a limit of this account allows no file of {_size(needed_bytes)}",
        errno.EACCES: "choose a folder that this account may write to",
        errno.EPERM: "choose a folder that this account may write to",
        errno.EROFS: "choose a folder on a filesystem that is not mounted read-only",
        errno.EIO: "the disk failed to store it, so nothing was kept; check the disk before you run again",
        errno.ENOTDIR: "a part of that path is a file, not a folder",
        errno.EEXIST: "a part of that path is a file, not a folder",
        errno.ENAMETOOLONG: "choose a shorter name",
    }.get(error.errno or 0, "")
    return FluxsplitError(f"cannot write {path}: {reason}", hint)
