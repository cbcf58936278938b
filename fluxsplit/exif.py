"""EXIF, read within bounds: the few text tags in which tools keep a prompt and the orientation, from a TIFF block.

Format: TIFF 6.0 section 2 and Exif 2.32. Only the first directory and its Exif directory are read; offsets may
point anywhere, so every one is checked, and nothing is followed twice.
"""

from __future__ import annotations

import struct

from fluxsplit.errors import FluxsplitError

IMAGE_DESCRIPTION, MAKE, MODEL, SOFTWARE = 0x010E, 0x010F, 0x0110, 0x0131
USER_COMMENT, MAKER_NOTE = 0x9286, 0x927C
ORIENTATION = 0x0112
EXIF_DIRECTORY = 0x8769
_TEXT_TAGS = {IMAGE_DESCRIPTION, MAKE, MODEL, SOFTWARE, USER_COMMENT, MAKER_NOTE}
_BYTES_BY_TYPE = {1: 1, 2: 1, 7: 1}  # BYTE, ASCII, UNDEFINED
MAX_ENTRIES = 512
MAX_VALUE_BYTES = 4 << 20


def read_exif(data: bytes) -> dict[int, bytes]:
    """The text tags of an EXIF block (with or without its `Exif` mark), raw, by number; the orientation as one byte.

    Raises FluxsplitError, whose message goes on from a file's name, where the block is not TIFF or points outside.
    """
    data = data.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None or len(data) < 8:
        raise FluxsplitError("has an EXIF block that is not TIFF")
    tags: dict[int, bytes] = {}
    exif_at = _directory(data, order, _number(data, order, 4), tags)
    if exif_at:
        _directory(data, order, exif_at, tags)
    return tags


def _directory(data: bytes, order: str, at: int, tags: dict[int, bytes]) -> int:
    """Read the text tags of the directory at `at`; returns where the Exif directory is, or 0."""
    if at + 2 > len(data):
        raise FluxsplitError("has an EXIF block that points outside of itself")
    count: int = struct.unpack_from(order + "H", data, at)[0]
    if count > MAX_ENTRIES or at + 2 + 12 * count > len(data):
        raise FluxsplitError(f"has an EXIF directory of {count} entries in {len(data)} bytes")
    exif_at = 0
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind, length = struct.unpack_from(order + "HHI", data, entry)
        if tag == EXIF_DIRECTORY:
            exif_at = _number(data, order, entry + 8)
        if tag == ORIENTATION and (kind, length) == (3, 1):
            tags.setdefault(tag, bytes([min(255, struct.unpack_from(order + "H", data, entry + 8)[0])]))
        if tag not in _TEXT_TAGS or kind not in _BYTES_BY_TYPE:
            continue
        start = entry + 8 if length <= 4 else _number(data, order, entry + 8)
        if length > MAX_VALUE_BYTES or start + length > len(data):
            raise FluxsplitError(f"has an EXIF text of {length} bytes in a block of {len(data)}")
        tags.setdefault(tag, data[start : start + length])
    return exif_at


def _number(data: bytes, order: str, at: int) -> int:
    value: int = struct.unpack_from(order + "I", data, at)[0]
    return value


def comment_text(raw: bytes) -> str:
    """The text of a UserComment: eight bytes name its encoding, and writers disagree on what they mean.

    `UNICODE` is UTF-16 in the writer's order: big-endian by A1111 (piexif), little-endian by others; text is mostly
    ASCII, so the side on which the zeros lie tells.
    """
    mark, body = raw[:8], raw[8:]
    if mark == b"UNICODE\0":
        if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return body.decode("utf-16", "replace")
        big = body[0::2].count(0) >= body[1::2].count(0)
        return body.decode("utf-16-be" if big else "utf-16-le", "replace").rstrip("\0")
    if mark in (b"ASCII\0\0\0", b"\0" * 8, b"JIS\0\0\0\0\0"):
        return body.decode("utf-8", "replace").rstrip("\0")
    return plain_text(raw)


def plain_text(raw: bytes) -> str:
    """The text of an ASCII tag, which tools fill with UTF-8."""
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")
