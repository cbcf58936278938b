"""Contact sheets of a folder of previews: `sheet.png` to look at, `sheet.html` to choose with, without a server.

The page is one file that loads nothing: pictures are embedded small, and `Z` shows the PNG beside it where it still
lies. Prompts come from files, hence from strangers: they reach the page as JSON that holds no `<`, are set as text,
and a content security policy lets only the page's own script run.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxsplit import durable
from fluxsplit.errors import FluxsplitError
from fluxsplit.found import FoundRecipe, read_found

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PICTURES = 400
"""The newest ones; a folder of more is for the gallery."""
MAX_PIXELS = 1 << 26
THUMBNAIL_PX = 384
TILE_PX = 256
LABEL_PX = 20
MARGIN_PX = 8
MAX_COLUMNS = 8
_TEMPLATE = Path(__file__).parent / "sheet_page.html"


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture of a sheet."""

    name: str
    prompt: str
    seed: int | None
    width: int
    height: int
    image: Image
    """At most THUMBNAIL_PX on its longer side, RGB."""


def write_sheets(folder: Path) -> Path | None:
    """Write `sheet.png` and `sheet.html` of the newest pictures in `folder`; returns the page, None without pictures.

    Pictures that cannot be read are left out. Sheets of an earlier call are replaced.
    """
    files = sorted(file for file in folder.glob("[0-9]*.png") if file.is_file())[-MAX_PICTURES:]
    entries = [entry for file in files if (entry := _entry(file)) is not None]
    if not entries:
        return None
    durable.replace(folder / "sheet.png", _png(entries))
    return durable.replace(folder / "sheet.html", page(entries).encode())


def _entry(file: Path) -> Entry | None:
    from PIL import Image  # noqa: PLC0415  60 ms, and only previews draw sheets

    try:
        with Image.open(file, formats=("PNG",)) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                return None
            small = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return None
    found = FoundRecipe()
    with suppress(FluxsplitError):  # a picture whose recipe is damaged is shown all the same
        found = read_found(file)
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    return Entry(file.name, found.prompt or "", found.seed, width, height, small)


def by_prompt(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Entries grouped by prompt, each group where its first picture stands."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.prompt, []).append(entry)
    return groups


def page(entries: Sequence[Entry]) -> str:
    """The page: HTML with style, script and pictures in it."""
    template = _TEMPLATE.read_text("utf-8")
    groups = [
        {"prompt": prompt, "pictures": [_described(entry) for entry in group]}
        for prompt, group in by_prompt(entries).items()
    ]
    data = json.dumps(groups).replace("<", "\\u003c")
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.replace("{{script_sha256}}", digest).replace("{{data}}", data)


def _described(entry: Entry) -> dict[str, Any]:
    buffer = io.BytesIO()
    entry.image.save(buffer, format="JPEG", quality=88)
    return {
        "name": entry.name,
        "seed": None if entry.seed is None else str(entry.seed),  # JavaScript's numbers end at 2^53
        "width": entry.width,
        "height": entry.height,
        "thumbnail": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(),
    }


def _png(entries: Sequence[Entry]) -> bytes:
    """The sheet as a picture: a row of tiles after another, groups under their prompt, the seed under each picture."""
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415

    font = ImageFont.load_default(14)
    groups = by_prompt(entries)
    columns = min(MAX_COLUMNS, max(map(len, groups.values())))
    width = columns * (TILE_PX + MARGIN_PX) + MARGIN_PX
    row_px = TILE_PX + LABEL_PX + MARGIN_PX
    titles = {prompt: textwrap.wrap(_printable(prompt), width // 8)[:3] or ["(no recipe)"] for prompt in groups}
    height = MARGIN_PX + sum(
        len(titles[prompt]) * LABEL_PX + -(-len(group) // columns) * row_px for prompt, group in groups.items()
    )
    sheet = Image.new("RGB", (width, height), (24, 24, 24))
    pen = ImageDraw.Draw(sheet)
    top = MARGIN_PX
    for prompt, group in groups.items():
        for line in titles[prompt]:
            pen.text((MARGIN_PX, top), line, (235, 235, 235), font)
            top += LABEL_PX
        for number, entry in enumerate(group):
            x = MARGIN_PX + number % columns * (TILE_PX + MARGIN_PX)
            _tile(sheet, pen, entry, x, top + number // columns * row_px, font)
        top += -(-len(group) // columns) * row_px
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def _tile(sheet: Image, pen: Any, entry: Entry, x: int, y: int, font: Any) -> None:
    picture = entry.image.copy()
    picture.thumbnail((TILE_PX, TILE_PX))
    sheet.paste(picture, (x + (TILE_PX - picture.width) // 2, y + (TILE_PX - picture.height) // 2))
    seed = "" if entry.seed is None else f"  seed {entry.seed}"
    pen.text((x, y + TILE_PX + 2), f"{Path(entry.name).stem}{seed}", (180, 180, 180), font)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
