"""Pictures of strangers, read for their pixels, and written again with everything that they said of themselves.

Pillow reads four formats here and no other: it would open PostScript under the name of a PNG and start Ghostscript.
The text of a PNG is read by `png_text` before, within its limits; a JPEG or WebP keeps its prompt in the EXIF
UserComment, as AUTOMATIC1111 writes it (`UNICODE` and UTF-16), from where it becomes the `parameters` of the PNG.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxsplit.errors import FluxsplitError
from fluxsplit.exif import EXIF_DIRECTORY, USER_COMMENT, comment_text
from fluxsplit.metadata import PARAMETERS_KEY, PNG_COMPRESS_LEVEL
from fluxsplit.picture_text import XMP_KEY, first_bytes
from fluxsplit.png_text import MAX_TEXT_BYTES, SIGNATURE, read_png

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_PIXELS = 1 << 28
"""16384 x 16384, the largest that the sampler makes."""
MAX_EXIF_BYTES = 1 << 20
_RGB_MODES = ("RGB", "RGBA", "P")
"""A profile of CMYK or grey says nothing of the RGB that is written."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The pixels of a picture, upright, and what came with them."""

    image: Image
    """Mode RGB, L, or I;16 for grey of 16 bits."""
    alpha: Image | None
    """Mode L; None where all is opaque."""
    texts: dict[str, str]
    """As for a PNG, by keyword."""
    exif: bytes
    """Without the orientation, which was applied; empty where there is none."""
    icc_profile: bytes

    @property
    def width(self) -> int:
        """In pixels."""
        return self.image.width

    @property
    def height(self) -> int:
        """In pixels."""
        return self.image.height


def read_picture(path: str | Path) -> Picture:
    """The picture at `path`, turned upright as its EXIF says.

    Raises UsageError where there is no such file, FluxsplitError where it is no PNG, JPEG, WebP or BMP, is damaged
    or has over `MAX_PIXELS`.
    """
    path = Path(path)
    start = first_bytes(path, 8)
    texts = dict(read_png(path).texts) if start == SIGNATURE else {}
    try:
        return _opened(path, texts)
    except FluxsplitError:
        raise
    except Exception as error:  # Pillow's readers fail in many ways on files that lie
        text = str(error).splitlines()[0][:120] if str(error) else ""
        detail = text if text and isinstance(error, OSError | ValueError) else f"{type(error).__name__} {text}".rstrip()
        raise FluxsplitError(f"{path.name} cannot be read as a picture: {detail}") from error


def _opened(path: Path, texts: dict[str, str]) -> Picture:
    from PIL import Image, ImageOps, UnidentifiedImageError  # noqa: PLC0415 - 60 ms, only where pictures are read

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses from twice this number on
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise FluxsplitError(f"{path.name} has {opened.width}x{opened.height} pixels, over {MAX_PIXELS}")
            opened.load()
            upright = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError:
        raise FluxsplitError(f"{path.name} is no picture that can be read", "PNG, JPEG, WebP and BMP can") from None
    exif = upright.getexif()
    kept = exif.tobytes() if exif else b""
    icc = upright.info.get("icc_profile")
    image, alpha = _separated(upright)
    return Picture(
        image,
        alpha,
        {**_texts_of(exif, upright.info.get("xmp")), **texts},
        kept if len(kept) <= MAX_EXIF_BYTES else b"",
        icc if isinstance(icc, bytes) and len(icc) <= MAX_TEXT_BYTES and upright.mode in _RGB_MODES else b"",
    )


def _separated(image: Image) -> tuple[Image, Image | None]:
    """Colours, or grey where it is grey, and what is transparent."""
    is_grey = image.mode in ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
    if image.has_transparency_data:
        whole = image.convert("LA" if is_grey and image.mode in ("1", "L", "LA") else "RGBA")
        alpha = whole.getchannel("A")
        colours = whole.convert("L" if whole.mode == "LA" else "RGB")
        return colours, alpha if alpha.getextrema() != (255, 255) else None
    if image.mode in ("I;16", "I;16B", "I;16L"):
        return (image if image.mode == "I;16" else image.convert("I").convert("I;16")), None
    return image.convert("L" if is_grey else "RGB"), None


def _texts_of(exif: Any, xmp: Any) -> dict[str, str]:
    """What a JPEG or WebP says, under the keywords that a PNG has for it."""
    texts = {}
    comment = exif.get_ifd(EXIF_DIRECTORY).get(USER_COMMENT) if exif else None
    if isinstance(comment, bytes) and len(comment) <= MAX_TEXT_BYTES:
        text = comment_text(comment)
        if "Steps: " in text and "�" not in text:  # what else may stand there stays in the EXIF alone
            texts[PARAMETERS_KEY] = text
    if isinstance(xmp, bytes) and len(xmp) <= MAX_TEXT_BYTES:
        text = xmp.decode("utf-8", "replace").rstrip("\0")
        if "�" not in text:
            texts[XMP_KEY] = text
    return texts


def resized(image: Image, width: int, height: int) -> Image:
    """By Lanczos; the same picture where the size is the same."""
    from PIL import Image as PillowImage  # noqa: PLC0415

    return image if image.size == (width, height) else image.resize((width, height), PillowImage.Resampling.LANCZOS)


def encode(image: Image, texts: Mapping[str, str], exif: bytes = b"", icc_profile: bytes = b"") -> bytes:
    """A PNG of the picture (L, LA, RGB, RGBA) with texts, EXIF and colour profile.

    Raises FluxsplitError for text that is no Unicode.
    """
    from PIL.PngImagePlugin import PngInfo  # noqa: PLC0415

    info = PngInfo()
    for keyword, text in texts.items():
        try:
            info.add_text(keyword, text)
        except UnicodeEncodeError:
            raise FluxsplitError(f"the text {keyword[:80]!r} holds a character that is no Unicode text") from None
    said: dict[str, Any] = {"exif": exif} if exif else {}
    if icc_profile:
        said["icc_profile"] = icc_profile
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=info, compress_level=PNG_COMPRESS_LEVEL, **said)
    return buffer.getvalue()
