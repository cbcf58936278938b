"""A copy of a picture that fits where it is to be shown: size, format, and metadata kept or dropped on purpose.

| for | format | metadata |
|---|---|---|
| `pixelfed` | JPEG of at most 15 MB, 4096 pixels | none, the server strips it; the prompt beside it as alt text |
| `civitai` | PNG, pixels unchanged | `parameters` as Civitai parses it, also for other tools' pictures; our record |
| `web` | WebP, 2048 pixels | none but the mark that an AI made it |

Sources: pixelfed/pixelfed issues 544 and 5447, pixelfed-rn issue 279; the mark is IPTC's `trainedAlgorithmicMedia`.
EXIF's Artist is never written: `ai` there is Civitai's own mark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from fluxsplit import durable
from fluxsplit.errors import FluxsplitError
from fluxsplit.found import read_found
from fluxsplit.found_recipe import FoundRecipe
from fluxsplit.found_text import as_a1111
from fluxsplit.metadata import PARAMETERS_KEY, RECORD_KEY
from fluxsplit.picture_file import Picture, encode, read_picture, resized
from fluxsplit.picture_text import XMP_KEY

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELFED_BYTES, PIXELFED_SIDE_PX = 15_000_000, 4096
WEB_SIDE_PX = 2048
QUALITIES = (95, 90, 85, 78, 70, 60, 50)
AI_MARK = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    "</rdf:RDF></x:xmpmeta>"
)


@dataclass(frozen=True, slots=True)
class Exported:
    """The bytes of a copy, its suffix, and the text that goes beside it, if any."""

    data: bytes
    suffix: str
    alt_text: str = ""


def export_picture(path: str | Path, target: str, out: str | Path, ai_mark: bool = True) -> list[Path]:
    """Write the copy of `path` for `target` (one of `TARGETS`) into `out`; returns what was written.

    With `ai_mark` a picture that says how it was rendered is marked as made by a model (IPTC).
    Nothing is overwritten, and a copy that is there already is not written again. Raises FluxsplitError where the
    picture is damaged or cannot be made to fit.
    """
    path = Path(path)
    picture, found = read_picture(path), read_found(path)
    made = _EXPORTERS[target](picture, found, ai_mark and found.tool is not None)  # a photo is nobody's rendering
    copy = durable.write_once(out, f"{path.stem}-{target}", made.suffix, made.data)
    if not made.alt_text:
        return [copy]
    return [copy, durable.write_once(out, copy.stem, ".txt", made.alt_text.encode())]


def _for_pixelfed(picture: Picture, found: FoundRecipe, ai_mark: bool) -> Exported:
    image = _shrunk(_flat(picture), PIXELFED_SIDE_PX)
    for quality in QUALITIES:
        buffer = BytesIO()
        image.save(buffer, format="JPEG", quality=quality, optimize=True, xmp=AI_MARK.encode() if ai_mark else None)
        if buffer.tell() <= PIXELFED_BYTES:
            return Exported(buffer.getvalue(), ".jpg", (found.prompt or "").strip())
    raise FluxsplitError(
        f"{image.width}x{image.height} pixels do not fit {PIXELFED_BYTES / 1e6:.0f} MB as JPEG",
        "export a smaller picture",
    )


def _for_civitai(picture: Picture, found: FoundRecipe, ai_mark: bool) -> Exported:
    texts = {} if found.tool is None else {PARAMETERS_KEY: as_a1111(found)}
    if RECORD_KEY in picture.texts:
        texts[RECORD_KEY] = picture.texts[RECORD_KEY]
    if PARAMETERS_KEY in picture.texts and found.recipe is not None:
        texts[PARAMETERS_KEY] = picture.texts[PARAMETERS_KEY]  # it tells of upscaling too
    if ai_mark:
        texts[XMP_KEY] = AI_MARK
    return Exported(encode(_whole(picture), texts, b"", picture.icc_profile), ".png")


def _for_web(picture: Picture, found: FoundRecipe, ai_mark: bool) -> Exported:
    buffer = BytesIO()
    image = _shrunk(_whole(picture).convert("RGB" if picture.alpha is None else "RGBA"), WEB_SIDE_PX)
    image.save(buffer, format="WEBP", quality=85, method=4, xmp=AI_MARK.encode() if ai_mark else b"")
    return Exported(buffer.getvalue(), ".webp")


_EXPORTERS: dict[str, Callable[[Picture, FoundRecipe, bool], Exported]] = {
    "pixelfed": _for_pixelfed,
    "civitai": _for_civitai,
    "web": _for_web,
}
TARGETS = tuple(_EXPORTERS)


def _whole(picture: Picture) -> Image:
    """Colours and transparency together again, 8 bits each."""
    image = picture.image.convert("RGB")
    if picture.alpha is not None:
        image.putalpha(picture.alpha)
    return image


def _flat(picture: Picture) -> Image:
    """On white where it is transparent."""
    from PIL import Image as PillowImage  # noqa: PLC0415

    image = picture.image.convert("RGB")
    if picture.alpha is None:
        return image
    return PillowImage.composite(image, PillowImage.new("RGB", image.size, "white"), picture.alpha)


def _shrunk(image: Image, side_px: int) -> Image:
    """At most `side_px` on the longer side; never enlarged."""
    longer = max(image.size)
    if longer <= side_px:
        return image
    width, height = (max(1, round(side * side_px / longer)) for side in image.size)
    return resized(image, width, height)
