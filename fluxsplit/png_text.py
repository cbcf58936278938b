"""The text of a PNG, by walking its chunks: no pixel is decoded, and no text is inflated beyond a limit.

Pillow gives the same texts, but decodes the whole picture to reach those after it, and reads a chunk of
300 MB before it objects. Format: https://www.w3.org/TR/png-3/, chunks IHDR, tEXt, zTXt, iTXt, IEND.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fluxsplit.errors import FluxsplitError, UsageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 150_000
"""Of any kind; a picture of 16384 x 16384 pixels in the 8 kB pieces of libpng has some 100,000."""
MAX_TEXTS = 256
MAX_TEXT_BYTES = 4 << 20
"""For one text, inflated: all of a latent file's metadata fits (`safetensor_header.LATENT_LIMITS`)."""
MAX_ALL_TEXT_BYTES = 8 << 20
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_READ_CHUNKS = (b"IHDR", b"eXIf", *_TEXT_CHUNKS)
_HINT = "copy or download it again"


@dataclass(frozen=True, slots=True)
class PngText:
    """Size in pixels and texts, by keyword, of a PNG."""

    width: int
    height: int
    texts: dict[str, str]
    exif: bytes = b""
    """The eXIf chunk: a TIFF block."""
    alpha: bool = False
    """Whether each pixel has a transparency (colour types 4 and 6)."""


def read_png(path: str | Path) -> PngText:
    """Size and texts of the PNG at `path`.

    Raises UsageError where there is no such file, FluxsplitError where it is not a PNG, is cut short or
    damaged, repeats a keyword, or holds more text than any tool writes.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _walk(file)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise FluxsplitError(f"cannot read {path}: {error.strerror}") from error
    except FluxsplitError as error:
        raise FluxsplitError(f"{path.name} {error.message}", error.hint) from None


def _walk(file: BinaryIO) -> PngText:
    size_bytes = os.fstat(file.fileno()).st_size
    if file.read(8) != SIGNATURE:
        raise FluxsplitError("is not a PNG picture")
    kind, data = _chunk(file, size_bytes)
    if kind != b"IHDR" or len(data) != 13:
        raise FluxsplitError("is a damaged PNG: it does not start with its size", _HINT)
    width, height = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big")
    alpha = data[9] in (4, 6)
    texts: dict[str, str] = {}
    total_bytes, exif = 0, b""
    for _ in range(MAX_CHUNKS):
        kind, data = _chunk(file, size_bytes)
        if kind == b"IEND":
            return PngText(width, height, texts, exif, alpha)
        if kind == b"eXIf":
            exif = exif or data
        if kind not in _TEXT_CHUNKS:
            continue
        keyword, text, used_bytes = _text(kind, data)
        total_bytes += used_bytes
        if keyword in texts:
            raise FluxsplitError(f"has two texts named {keyword[:80]!r}, so neither can be trusted")
        if len(texts) >= MAX_TEXTS or total_bytes > MAX_ALL_TEXT_BYTES:
            raise FluxsplitError(f"holds over {MAX_TEXTS} texts or {MAX_ALL_TEXT_BYTES >> 20} MB of text")
        texts[keyword] = text
    raise FluxsplitError(f"is a PNG of over {MAX_CHUNKS} chunks")


def _chunk(file: BinaryIO, size_bytes: int) -> tuple[bytes, bytes]:
    """Name and checked data of the next chunk; the data of chunks that say nothing here is skipped."""
    head = file.read(8)
    length, kind = int.from_bytes(head[:4], "big"), head[4:]
    end = file.tell() + length + 4
    if len(head) < 8 or end > size_bytes:
        raise FluxsplitError(f"is a PNG cut short: {size_bytes} bytes are too few", _HINT)
    if kind not in _READ_CHUNKS:
        file.seek(end)
        return kind, b""
    if length > MAX_TEXT_BYTES:
        raise FluxsplitError(f"holds a text of {length} bytes, at most {MAX_TEXT_BYTES} are read")
    data = file.read(length)
    crc = file.read(4)
    if len(data) != length or crc != zlib.crc32(kind + data).to_bytes(4, "big"):
        raise FluxsplitError(f"is a damaged PNG: the checksum of its {kind.decode()} chunk is wrong", _HINT)
    return kind, data


def _text(kind: bytes, data: bytes) -> tuple[str, str, int]:
    """Keyword, text, and the bytes of both, inflated."""
    raw_keyword, zero, rest = data.partition(b"\0")
    if not zero or not 1 <= len(raw_keyword) <= 79:
        raise FluxsplitError("is a damaged PNG: a text has no keyword", _HINT)
    keyword = raw_keyword.decode("latin-1")
    if kind == b"tEXt":
        return keyword, rest.decode("latin-1"), len(data)
    if kind == b"zTXt":
        raw = _inflated(keyword, rest[:1], rest[1:])
        return keyword, raw.decode("latin-1"), len(raw_keyword) + len(raw)
    flag, method, tail = rest[:1], rest[1:2], rest[2:]
    _, zero, tail = tail.partition(b"\0")  # the language
    _, second_zero, raw = tail.partition(b"\0")  # the keyword in that language
    if not second_zero or flag not in (b"\0", b"\1"):
        raise FluxsplitError(f"is a damaged PNG: its text {keyword!r} has no beginning", _HINT)
    if flag == b"\1":
        raw = _inflated(keyword, method, raw)
    try:
        return keyword, raw.decode("utf-8"), max(len(data), len(raw_keyword) + len(raw))
    except UnicodeDecodeError:
        raise FluxsplitError(f"is a damaged PNG: its text {keyword!r} is not UTF-8", _HINT) from None


def _inflated(keyword: str, method: bytes, data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(data, MAX_TEXT_BYTES + 1)
    except zlib.error:
        raw = b""
    if len(raw) > MAX_TEXT_BYTES:
        raise FluxsplitError(f"holds a text {keyword!r} that inflates to over {MAX_TEXT_BYTES} bytes")
    if method != b"\0" or not inflater.eof:
        raise FluxsplitError(f"is a damaged PNG: its text {keyword!r} does not inflate", _HINT)
    return raw
