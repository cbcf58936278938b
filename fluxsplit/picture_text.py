"""What a picture says besides its pixels: the texts of PNG, JPEG and WebP, told by content, no pixel decoded.

JPEG: segments up to the scan (ITU T.81, annex B); EXIF and XMP in APP1. WebP: RIFF chunks `EXIF` and `XMP ` (Google's
container specification). What is not text is skipped, and what is read is bounded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.exif import ORIENTATION, read_exif
from fluxsplit.png_text import SIGNATURE, read_png

XMP_KEY = "XML:com.adobe.xmp"
"""Under which PNG keeps XMP (XMP specification part 3)."""
MAX_BLOCK_BYTES = 4 << 20
MAX_BLOCKS = 4096
_XMP_MARK = b"http://ns.adobe.com/xap/1.0/\0"
_CUT_SHORT = "copy or download it again"


@dataclass(frozen=True, slots=True)
class PictureText:
    """Size in pixels and everything textual of one picture."""

    container: str
    """`PNG`, `JPEG` or `WebP`."""
    width: int
    """Upright, as shown."""
    height: int
    texts: dict[str, str] = field(default_factory=dict)
    """Of a PNG, by keyword."""
    exif: dict[int, bytes] = field(default_factory=dict)
    """Raw text tags, by number."""
    xmp: str = ""
    comment: str = ""
    """Of a JPEG's COM segment."""
    alpha: bool = False
    """Whether it is a PNG with an alpha channel, which may hide a text (`alpha_text`)."""


def first_bytes(path: Path, count: int = 16) -> bytes:
    """The first `count` bytes of a file, by which its kind is told.

    Raises UsageError where there is no such file, FluxsplitError where it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(count)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise FluxsplitError(f"cannot read {path}: {error.strerror}") from error


def picture_kind(start: bytes) -> str:
    """`PNG`, `JPEG` or `WebP` by the first 16 bytes of a file; empty for anything else."""
    if start.startswith(SIGNATURE):
        return "PNG"
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "WebP" if start[:4] == b"RIFF" and start[8:12] == b"WEBP" else ""


def read_picture_text(path: str | Path) -> PictureText:
    """Everything textual of the picture at `path`.

    Raises UsageError where there is no such file, FluxsplitError where it is no PNG, JPEG or WebP, is damaged, or
    holds more text than any tool writes.
    """
    path = Path(path)
    kind = picture_kind(first_bytes(path))
    if not kind:
        raise FluxsplitError(f"{path.name} is no PNG, JPEG or WebP picture")
    if kind == "PNG":
        return _upright(_in_png(path))
    try:
        with path.open("rb") as file:
            found = _in_jpeg(file) if kind == "JPEG" else _in_webp(file)
        if not found.width or not found.height:
            raise FluxsplitError(f"is a {kind} without a picture", _CUT_SHORT)
    except OSError as error:
        raise FluxsplitError(f"cannot read {path}: {error.strerror}") from error
    except FluxsplitError as error:
        raise FluxsplitError(f"{path.name} {error.message}", error.hint) from None
    return _upright(found)


def _upright(found: PictureText) -> PictureText:
    """With the sides as they are shown: orientations 5 to 8 lie on their side (Exif 2.32, 4.6.5)."""
    if found.exif.get(ORIENTATION, b"\1")[0] in range(5, 9):
        return replace(found, width=found.height, height=found.width)
    return found


def _in_png(path: Path) -> PictureText:
    png = read_png(path)
    try:
        exif = read_exif(png.exif) if png.exif else {}
    except FluxsplitError as error:
        raise FluxsplitError(f"{path.name} {error.message}", error.hint) from None
    return PictureText("PNG", png.width, png.height, png.texts, exif, png.texts.get(XMP_KEY, ""), alpha=png.alpha)


def _in_jpeg(file: BinaryIO) -> PictureText:
    size_bytes = os.fstat(file.fileno()).st_size
    file.seek(2)
    width = height = 0
    exif: dict[int, bytes] = {}
    xmp = comment = ""
    for _ in range(MAX_BLOCKS):
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF:
            raise FluxsplitError("is a damaged JPEG: a segment does not begin where it should", _CUT_SHORT)
        marker, length = head[1], int.from_bytes(head[2:], "big") - 2
        if marker in (0xD9, 0xDA):  # end, or the picture itself
            return PictureText("JPEG", width, height, {}, exif, xmp, comment)
        if length < 0 or file.tell() + length > size_bytes:
            raise FluxsplitError(f"is a JPEG cut short: {size_bytes} bytes are too few", _CUT_SHORT)
        data = file.read(length)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and length >= 5:
            height, width = int.from_bytes(data[1:3], "big"), int.from_bytes(data[3:5], "big")
        elif marker == 0xE1 and data.startswith(b"Exif\0\0"):
            exif = exif or read_exif(data)
        elif marker == 0xE1 and data.startswith(_XMP_MARK):
            xmp = xmp or data[len(_XMP_MARK) :].decode("utf-8", "replace")
        elif marker == 0xFE:
            comment = comment or data.decode("utf-8", "replace")
    raise FluxsplitError(f"is a JPEG of over {MAX_BLOCKS} segments")


def _in_webp(file: BinaryIO) -> PictureText:
    size_bytes = os.fstat(file.fileno()).st_size
    file.seek(12)
    width = height = 0
    exif: dict[int, bytes] = {}
    xmp = ""
    for _ in range(MAX_BLOCKS):
        head = file.read(8)
        if len(head) < 8:
            return PictureText("WebP", width, height, {}, exif, xmp)
        kind, length = head[:4], int.from_bytes(head[4:], "little")
        following = file.tell() + length + length % 2
        if file.tell() + length > size_bytes:
            raise FluxsplitError(f"is a WebP cut short: {size_bytes} bytes are too few", _CUT_SHORT)
        if kind in (b"VP8X", b"VP8 ", b"VP8L") and not width:
            width, height = _webp_size(kind, file.read(min(length, 10)))
        elif kind in (b"EXIF", b"XMP "):
            if length > MAX_BLOCK_BYTES:
                raise FluxsplitError(f"holds a text of {length} bytes, at most {MAX_BLOCK_BYTES} are read")
            data = file.read(length)
            if kind == b"EXIF":
                exif = exif or read_exif(data)
            else:
                xmp = xmp or data.decode("utf-8", "replace")
        file.seek(following)
    raise FluxsplitError(f"is a WebP of over {MAX_BLOCKS} chunks")


def _webp_size(kind: bytes, data: bytes) -> tuple[int, int]:
    """Width and height from the first ten bytes of a VP8X, VP8 or VP8L chunk."""
    if len(data) < 10 and not (kind == b"VP8L" and len(data) >= 5):
        return 0, 0
    if kind == b"VP8X":
        return int.from_bytes(data[4:7], "little") + 1, int.from_bytes(data[7:10], "little") + 1
    if kind == b"VP8 ":
        return int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF
    bits = int.from_bytes(data[1:5], "little")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
