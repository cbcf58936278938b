"""Text hidden in the alpha channel of a PNG, where it outlives sites that strip every text chunk.

NovelAI and the "stealth pnginfo" extension of A1111 and Forge write it into the lowest bit of each pixel's alpha, down
the columns: a signature of 15 letters, the number of bits as 32 bits, and the text, with `stealth_pngcomp` gzipped.
(`sd_webui_stealth_pnginfo`, `scripts/stealth_pnginfo.py`; NovelAI's `novelai-image-metadata`.)
"""

from __future__ import annotations

import warnings
import zlib
from pathlib import Path

from fluxsplit.png_text import MAX_TEXT_BYTES

PLAIN, GZIPPED = b"stealth_pnginfo", b"stealth_pngcomp"
MAX_PIXELS = 1 << 24
"""4096 x 4096: what is larger is no picture straight from a generator, and takes 64 MB to open."""
_HEAD_BYTES = len(PLAIN) + 4


def hidden_text(path: str | Path) -> str:
    """The text in the alpha bits of the PNG at `path`; empty where there is none that can be read."""
    bits = _alpha_bits(Path(path))
    head = _packed(bits[: 8 * _HEAD_BYTES])
    signature, count = head[: len(PLAIN)], int.from_bytes(head[len(PLAIN) :], "big") // 8
    if signature not in (PLAIN, GZIPPED) or not 0 < count <= MAX_TEXT_BYTES:
        return ""
    data = _packed(bits[8 * _HEAD_BYTES : 8 * (_HEAD_BYTES + count)])
    if len(data) < count:
        return ""
    try:
        return (_inflated(data) if signature == GZIPPED else data).decode("utf-8")
    except (zlib.error, UnicodeDecodeError):
        return ""


def _alpha_bits(path: Path) -> bytes:
    """The lowest alpha bit of each pixel as the digit 0 or 1, column after column; empty without an alpha channel."""
    from PIL import Image  # noqa: PLC0415 - 60 ms, only where a PNG has transparency and says nothing

    try:
        with warnings.catch_warnings(action="error"), Image.open(path, formats=["PNG"]) as picture:
            if picture.mode not in ("RGBA", "LA") or picture.width * picture.height > MAX_PIXELS:
                return b""
            alpha = picture.getchannel("A")
    except Exception:  # a damaged picture hides nothing; who wants its pixels will be told
        return b""
    by_column = alpha.transpose(Image.Transpose.TRANSPOSE)
    return by_column.point([ord("0") + (value & 1) for value in range(256)]).tobytes()


def _packed(digits: bytes) -> bytes:
    """Eight binary digits to a byte, the highest first; what is left over is dropped."""
    count = len(digits) // 8
    return int(digits[: 8 * count], 2).to_bytes(count, "big") if count else b""


def _inflated(data: bytes) -> bytes:
    """A gzip member; raises zlib.error where it is damaged or larger than any text."""
    inflater = zlib.decompressobj(wbits=31)
    text = inflater.decompress(data, MAX_TEXT_BYTES)
    if not inflater.eof:
        raise zlib.error("cut short, or larger than any text")
    return text
