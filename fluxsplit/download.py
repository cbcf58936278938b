"""A file from the web whose size and SHA-256 are known beforehand, resumed where it was cut off, durably written.

Bytes go to `<name>.<start of the hash>.download` beside the target and stay there when the connection breaks. Only
once all of them have the right hash does the target get its name. Nothing beyond the known size is ever read.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxsplit import durable
from fluxsplit.errors import FluxsplitError
from fluxsplit.fingerprint import file_sha256

if TYPE_CHECKING:
    from http.client import HTTPResponse

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30.0
LOCAL = ("127.0.0.1", "localhost", "::1")


def download(url: str, target: Path, size_bytes: int, sha256: str, on_bytes: Callable[[int], None]) -> Path:
    """Fetch `url` to `target`, unless that is it already; `on_bytes` is told how many came.

    Another file of that name is replaced, once the right one is here. Raises FluxsplitError where the server refuses,
    the connection breaks, or size or hash are not as they should be.
    """
    if target.exists() and file_sha256(target) == sha256:
        return target
    durable.check_space(target.parent, size_bytes)
    from http.client import HTTPException  # noqa: PLC0415 - as urllib, only where something is fetched

    part = target.with_name(f"{target.name}.{sha256[:12]}.download")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _receive(url, part, size_bytes, on_bytes)
    except (OSError, HTTPException, ValueError) as error:  # URLError and time-outs are OSErrors
        raise FluxsplitError(
            f"cannot fetch {url}: {getattr(error, 'reason', None) or error}", "run it again to go on where it stopped"
        ) from error
    found = hashlib.sha256()
    for chunk in _chunks(part):
        found.update(chunk)
    if found.hexdigest() != sha256:
        part.unlink()
        raise FluxsplitError(
            f"{url} gave a file with SHA-256 {found.hexdigest()}, it should be {sha256}", "it was not kept"
        )
    durable.replace(target, _chunks(part))
    part.unlink(missing_ok=True)
    return target


def _receive(url: str, part: Path, size_bytes: int, on_bytes: Callable[[int], None]) -> None:
    done = part.stat().st_size if part.exists() else 0
    if done > size_bytes:
        part.unlink()
        done = 0
    if done == size_bytes:
        return
    with _opened(url, done) as answer:
        if answer.status != 206:  # the server begins from the start
            done = 0
        promised = answer.headers.get("Content-Length")
        if promised is not None and int(promised) != size_bytes - done:
            raise FluxsplitError(f"{url} has {int(promised) + done} bytes, it should have {size_bytes}")
        with part.open("ab" if done else "wb") as file:
            while chunk := answer.read(min(CHUNK_BYTES, size_bytes - done + 1)):
                done += len(chunk)
                if done > size_bytes:
                    break
                file.write(chunk)
                on_bytes(done)
    if done > size_bytes:
        part.unlink()
        raise FluxsplitError(f"{url} has over {size_bytes} bytes", "it was not kept")
    if done < size_bytes:
        raise FluxsplitError(f"{url} ended after {done} of {size_bytes} bytes", "run it again to go on there")


@contextlib.contextmanager
def _opened(url: str, start: int) -> Iterator[HTTPResponse]:
    import urllib.request  # noqa: PLC0415 - 50 ms that only a download need spend

    class OnlyHttps(urllib.request.HTTPRedirectHandler):
        def redirect_request(
            self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
        ) -> urllib.request.Request | None:
            _check_address(newurl)
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    _check_address(url)
    headers = {"User-Agent": "fluxsplit", **({"Range": f"bytes={start}-"} if start else {})}
    opener = urllib.request.build_opener(OnlyHttps)
    with opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S) as answer:
        yield answer


def _check_address(url: str) -> None:
    """Only https, and plain http from this machine itself."""
    from urllib.parse import urlsplit  # noqa: PLC0415

    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOCAL):
        raise FluxsplitError(f"{url[:200]} is not an https address")


def _chunks(part: Path) -> Iterator[bytes]:
    with part.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
