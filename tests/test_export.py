"""Copies that fit: format, size, what is kept and what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from foreign_files import KSAMPLER, png
from PIL import Image
from samples import make_recipe

from fluxsplit.cli import main
from fluxsplit.cli_export import run_export
from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.export import TARGETS, export_picture
from fluxsplit.found import read_found
from fluxsplit.metadata import ImageRecord, encode_png, png_text_chunks, read_png_text, read_record
from fluxsplit.progress import Progress
from fluxsplit.recipe import WeightsStamp


def ours(path: Path) -> bytes:
    pixels = bytes(range(256)) * 6
    record = ImageRecord(make_recipe(), "ab" * 32, WeightsStamp("ae"))
    path.write_bytes(encode_png(pixels, 32, 16, png_text_chunks(record)))
    return pixels


def test_civitai_keeps_pixels_and_recipe(tmp_path: Path) -> None:
    pixels = ours(tmp_path / "x.png")
    (copy,) = export_picture(tmp_path / "x.png", "civitai", tmp_path / "out")
    with Image.open(copy) as image:
        assert (copy.name, image.format, image.tobytes()) == ("x-civitai.png", "PNG", pixels)
    assert read_record(copy) == read_record(tmp_path / "x.png")
    assert any(line.startswith("Steps: ") for line in read_png_text(copy)["parameters"].splitlines())
    assert "trainedAlgorithmicMedia" in read_png_text(copy)["XML:com.adobe.xmp"]


def test_civitai_gets_parameters_of_other_tools(tmp_path: Path) -> None:
    import json

    png(tmp_path / "x.png", {"prompt": json.dumps(KSAMPLER)})
    (copy,) = export_picture(tmp_path / "x.png", "civitai", tmp_path, ai_mark=False)
    texts = read_png_text(copy)
    assert set(texts) == {"parameters"}
    assert texts["parameters"].startswith("a fox\nNegative prompt: blurry\nSteps: 4, Sampler: DPM++ 2M")
    assert read_found(copy).seed == 7


@pytest.mark.parametrize(("target", "form"), [("pixelfed", "JPEG"), ("web", "WEBP")])
def test_others_get_no_recipe(target: str, form: str, tmp_path: Path) -> None:
    ours(tmp_path / "x.png")
    copies = export_picture(tmp_path / "x.png", target, tmp_path / "out")
    with Image.open(copies[0]) as image:
        assert (image.format, image.size) == (form, (32, 16))
    data = copies[0].read_bytes()
    assert b"fox" not in data
    assert b"Steps" not in data
    assert b"trainedAlgorithmicMedia" in data
    assert [copy.read_text() for copy in copies[1:]] == (["a fox, snow"] if target == "pixelfed" else [])


@pytest.mark.parametrize("target", TARGETS)
def test_a_photo_is_not_marked_as_made_by_a_model(target: str, tmp_path: Path) -> None:
    Image.new("RGB", (32, 16), "red").save(tmp_path / "photo.jpg")
    assert b"trainedAlgorithmicMedia" not in export_picture(tmp_path / "photo.jpg", target, tmp_path)[0].read_bytes()


def test_large_pictures_shrink_and_alpha_goes_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (5000, 100), (255, 0, 0, 0)).save(tmp_path / "x.png")
    (copy,) = export_picture(tmp_path / "x.png", "pixelfed", tmp_path)
    with Image.open(copy) as image:
        assert image.size == (4096, 82)
        assert image.getpixel((5, 5)) == (255, 255, 255)
    (copy,) = export_picture(tmp_path / "x.png", "web", tmp_path)
    with Image.open(copy) as image:
        assert (image.size, image.mode) == ((2048, 41), "RGBA")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours(tmp_path / "x.png")
    (tmp_path / "bad.png").write_bytes(b"hello")
    files = [str(tmp_path / name) for name in ("bad.png", "x.png")]
    assert run_export(files, "web", str(tmp_path / "out"), True, Progress()) == 1
    assert run_export(files[1:], "web", str(tmp_path / "out"), True, Progress()) == 0
    printed = capsys.readouterr()
    assert printed.out.split() == [str(tmp_path / "out" / name) for name in ("x-web.webp", "x-web.webp")]
    assert "bad.png" in printed.err
    with pytest.raises(UsageError, match="for"):
        run_export(files, "print", str(tmp_path), True, Progress())
    with pytest.raises(FluxsplitError):
        run_export(files[:1], "web", str(tmp_path), True, Progress())


def test_copies_as_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours(tmp_path / "x.png")
    (tmp_path / "bad.png").write_bytes(b"hello")
    with pytest.raises(SystemExit, match="1"):
        main(["export", "--for", "web", "--json", "--out", str(tmp_path / "out"), str(tmp_path)])
    failed, made = map(json.loads, capsys.readouterr().out.splitlines())
    assert failed["failed"] == str(tmp_path / "bad.png") and failed["message"]
    assert (made["path"], made["source"]) == (str(tmp_path / "out" / "x-web.webp"), str(tmp_path / "x.png"))


def test_a_folder_stands_for_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("mine")
    for name in ("sheet.png", "a.peek.png"):
        ours(tmp_path / "in" / name)
    for name in ("b.png", "a.png"):
        ours(tmp_path / "in" / name)
    assert run_export([str(tmp_path / "in")], "web", str(tmp_path / "out"), True, Progress()) == 0
    assert [Path(line).name for line in capsys.readouterr().out.split()] == ["a-web.webp", "b-web.webp"]


def test_an_overview_among_named_pictures_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell's pattern names it too; named alone it is meant."""
    sheet, picture = tmp_path / "sheet.png", tmp_path / "0001.png"
    for file in (sheet, picture):
        ours(file)
    assert run_export([str(picture), str(sheet)], "web", str(tmp_path / "out"), True, Progress()) == 0
    printed = capsys.readouterr()
    assert [Path(line).name for line in printed.out.split()] == ["0001-web.webp"]
    assert f"{sheet} left out" in printed.err
    assert run_export([str(sheet)], "web", str(tmp_path / "out"), True, Progress()) == 0
    assert Path(capsys.readouterr().out.strip()).name == "sheet-web.webp"


def test_a_copy_for_civitai_without_a_recipe_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    ours(tmp_path / "x.png")
    for name, told in (("photo.png", True), ("x.png", False)):
        assert run_export([str(tmp_path / name)], "civitai", str(tmp_path / "out"), True, Progress()) == 0
        assert ("says no parameters" in capsys.readouterr().err) == told
