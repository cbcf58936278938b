"""Contact sheets: every picture with its seed, hostile texts harmless, unreadable files left out."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

from foreign_files import png
from PIL import Image
from test_start import PLAIN, SHA, STAMP

from fluxsplit.metadata import ImageRecord, encode_png, png_text_chunks
from fluxsplit.sheet import write_sheets

HOSTILE = "</script><script>alert(1)</script>\u2028<img src=x onerror=alert(2)> {{data}} \"'&"


def picture(path: Path, prompt: str, seed: int, size: tuple[int, int] = (64, 48)) -> None:
    """A PNG of ours."""
    recipe = replace(PLAIN, prompt=prompt, seed=seed, width=size[0], height=size[1])
    path.parent.mkdir(exist_ok=True)
    pixels = bytes([200, 30, 30]) * (size[0] * size[1])
    path.write_bytes(encode_png(pixels, *size, png_text_chunks(ImageRecord(recipe, SHA, STAMP))))


def test_both_sheets_hold_every_picture(tmp_path: Path) -> None:
    for number in range(11):
        picture(tmp_path / f"{number:04d}.png", "a fox" if number < 10 else "a dog", 2**63 + number)
    (tmp_path / "0090.png").write_bytes(b"no picture")
    (tmp_path / "0091.png").write_bytes((tmp_path / "0001.png").read_bytes()[:-60])
    assert write_sheets(tmp_path) == tmp_path / "sheet.html"
    assert write_sheets(tmp_path) == tmp_path / "sheet.html", "and again over the earlier ones"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 8 * (256 + 8) + 8 and sheet.height > 3 * 256
        reds = sum(count for count, colour in sheet.getcolors(1 << 24) or [] if colour[0] > 150 and colour[1] < 60)
    assert reds >= 11 * 64 * 48 * 0.9
    text = (tmp_path / "sheet.html").read_text("utf-8")
    groups = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [(group["prompt"], len(group["pictures"])) for group in groups] == [("a fox", 10), ("a dog", 1)]
    assert groups[0]["pictures"][3]["seed"] == str(2**63 + 3)
    assert not re.search(r"""(src|href)=["']?https?:""", text)


def test_a_prompt_is_text_and_nothing_else(tmp_path: Path) -> None:
    picture(tmp_path / "0001.png", HOSTILE, 1)
    write_sheets(tmp_path)
    text = (tmp_path / "sheet.html").read_text("utf-8")
    assert "alert(1)</script>" not in text and text.count("</script>") == 2
    assert json.loads(text.split('id="data">')[1].split("</script>")[0])[0]["prompt"] == HOSTILE


def test_without_pictures_there_is_no_sheet(tmp_path: Path) -> None:
    assert write_sheets(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_picture_with_a_damaged_recipe_is_shown(tmp_path: Path) -> None:
    png(tmp_path / "0001.png", {"fluxsplit": "{"})
    sheet = write_sheets(tmp_path)
    assert sheet is not None and "0001.png" in sheet.read_text("utf-8")


def test_a_picture_without_a_recipe_is_shown(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 90), "blue").save(buffer, "PNG")
    (tmp_path / "0007.png").write_bytes(buffer.getvalue())
    write_sheets(tmp_path)
    assert "(no recipe)" in (tmp_path / "sheet.html").read_text("utf-8")
