"""Folders to what the page is told: files that come, change and go, results matched, strangers' files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fluxsplit.errors import FluxsplitError
from fluxsplit.gallery_index import MAX_PROMPT_CHARS, GalleryIndex, Picture, matched, open_picture
from fluxsplit.metadata import encode_png
from fluxsplit.picks import Pick, add_pick, read_picks
from gallery_pictures import write_preview, write_render


@pytest.fixture
def index(tmp_path: Path) -> GalleryIndex:
    for name in ("previews", "renders"):
        (tmp_path / name).mkdir()
    return GalleryIndex(tmp_path / "previews", tmp_path / "renders", b"secret")


def told(index: GalleryIndex) -> dict[str, dict[str, Any]]:
    while index.refresh():
        pass
    return {item["name"]: item for item in index.changes_since(0)[1] if item["kind"] == "preview"}


def test_pictures_come_with_what_they_say_of_themselves(index: GalleryIndex) -> None:
    write_preview(index.folder, 7, 2)
    item = told(index)["0007.png"]
    assert item["prompt"].startswith("a red circle") and item["seed"] == "1007" and item["steps"] == 4
    assert (item["width"], item["height"], item["pick"], item["stars"]) == (640, 448, None, 0)
    assert item["model"] == "flux1-schnell-fp8.safetensors" and not item["error"]


def test_only_what_changed_is_told_again(index: GalleryIndex) -> None:
    for number in (1, 2):
        write_preview(index.folder, number, 0)
    told(index)
    seen = index.revision
    index.refresh()
    assert index.revision == seen
    write_preview(index.folder, 3, 0)
    (index.folder / "0001.png").unlink()
    index.refresh()
    revision, changed, gone = index.changes_since(seen)
    assert [item["name"] for item in changed] == ["0003.png"] and len(gone) == 1 and revision > seen
    write_preview(index.folder, 1, 1)  # the same name again, another picture
    index.refresh()
    assert [item["name"] for item in index.changes_since(revision)[1]] == ["0001.png"]


def test_decisions_are_written_and_those_of_others_are_seen(index: GalleryIndex) -> None:
    write_preview(index.folder, 1, 0)
    id = told(index)["0001.png"]["id"]
    index.decide(id, "pick", 4)
    assert read_picks(index.folder)["0001.png"].stars == 4
    assert [picture.name for picture in index.picked()] == ["0001.png"]
    add_pick(index.folder, Pick("0001.png", "reject", 0))
    assert told(index)["0001.png"]["pick"] == "reject" and index.picked() == []
    with pytest.raises(FluxsplitError, match="no such picture"):
        index.decide("0" * 32, "pick", 0)
    with pytest.raises(FluxsplitError, match="stars"):
        index.decide(id, "pick", 6)


def test_a_damaged_list_of_picks_is_said_and_keeps_what_was_known(index: GalleryIndex) -> None:
    write_preview(index.folder, 1, 0)
    index.decide(told(index)["0001.png"]["id"], "pick", 0)
    good = (index.folder / "picks.jsonl").read_bytes()
    (index.folder / "picks.jsonl").write_bytes(b"nonsense\n" + good)
    assert told(index)["0001.png"]["pick"] == "pick"
    assert "line 1" in index.notice
    (index.folder / "picks.jsonl").write_bytes(good)
    told(index)
    assert index.notice == ""


def test_results_are_matched_by_latent_then_name_then_seed() -> None:
    def picture(id: str, kind: str, **more: Any) -> Picture:
        return Picture(id, more.pop("name", f"{id}.png"), kind, 1, 1, **more)

    previews = [
        picture("a", "preview", latent_sha256="1" * 64, seed=1, prompt="fox"),
        picture("b", "preview", latent_sha256="2" * 64, seed=2, prompt="fox"),
    ]
    renders = [
        picture("latent", "render", parent_sha256="1" * 64, parent_name="b.png"),
        picture("name", "render", parent_sha256="9" * 64, parent_name="b.png"),
        picture("seed", "render", seed=2, prompt="fox"),
        picture("other seed", "render", seed=3, prompt="fox"),
        picture("nothing", "render"),
        picture("unknown parent", "render", parent_name="z.png", seed=2, prompt="fox"),
        picture("broken", "render", seed=2, prompt="fox", error="is cut short"),
    ]
    assert matched([*previews, *renders]) == {"a": ["latent"], "b": ["name", "seed"]}


def test_a_result_shows_at_its_preview(index: GalleryIndex) -> None:
    write_preview(index.folder, 1, 0)
    write_preview(index.folder, 2, 0)
    write_render(index.renders, 1, 0)
    items = told(index)
    assert len(items["0001.png"]["results"]) == 1 and items["0002.png"]["results"] == []


def test_what_is_no_picture_of_the_folder_is_left_out(index: GalleryIndex, tmp_path: Path) -> None:
    outside = write_preview(tmp_path, 1, 0)
    (index.folder / "link.png").symlink_to(write_preview(tmp_path, 2, 0))
    os.mkfifo(index.folder / "pipe.png")
    (index.folder / "folder.png").mkdir()
    for name in ("notes.txt", "picks.jsonl", "0001.png.aa.part", "drawing.svg"):
        (index.folder / name).write_text("x")
    write_preview(index.folder, 1, 0).rename(index.folder / "sheet.png")
    if os.name == "posix":
        outside.rename(index.folder / os.fsdecode(b"\xff.png"))
    assert told(index) == {}


def test_damaged_pictures_are_said_and_strangers_pictures_shown(index: GalleryIndex) -> None:
    good = write_preview(index.folder, 1, 0).read_bytes()
    (index.folder / "cut.png").write_bytes(good[:3000])
    (index.folder / "page.png").write_bytes(b"<svg onload=alert(1)>")
    (index.folder / "plain.png").write_bytes(encode_png(bytes(48), 4, 4, {}))
    (index.folder / "lies.png").write_bytes(encode_png(bytes(48), 4, 4, {"fluxsplit": '{"fluxsplit": 99}'}))
    items = told(index)
    assert "cut short" in items["cut.png"]["error"] and "not a PNG" in items["page.png"]["error"]
    assert index.picture(items["cut.png"]["id"]) is None
    for name in ("plain.png", "lies.png"):
        assert items[name]["error"] == "" and items[name]["prompt"] == "" and items[name]["width"] == 4


def test_long_prompts_are_cut_for_the_page(index: GalleryIndex) -> None:
    from samples import make_recipe

    from fluxsplit.metadata import ImageRecord, png_text_chunks
    from fluxsplit.recipe import WeightsStamp

    record = ImageRecord(make_recipe(prompt="x" * 50_000), "0" * 64, WeightsStamp("v"))
    (index.folder / "long.png").write_bytes(encode_png(bytes(48), 4, 4, png_text_chunks(record)))
    assert len(told(index)["long.png"]["prompt"]) == MAX_PROMPT_CHARS


def test_a_folder_that_goes_and_comes_back(index: GalleryIndex, tmp_path: Path) -> None:
    write_preview(index.folder, 1, 0)
    assert len(told(index)) == 1
    index.folder.rename(tmp_path / "away")
    assert told(index) == {}
    (tmp_path / "away").rename(index.folder)
    assert len(told(index)) == 1


def test_ids_tell_nothing_and_differ_from_run_to_run(index: GalleryIndex) -> None:
    write_preview(index.folder, 1, 0)
    other = GalleryIndex(index.folder, index.renders, b"another")
    assert told(index)["0001.png"]["id"] != told(other)["0001.png"]["id"]


def test_a_picture_that_became_a_link_is_not_opened(index: GalleryIndex, tmp_path: Path) -> None:
    path = write_preview(index.folder, 1, 0)
    told(index)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(OSError):
        open_picture(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError):
        open_picture(path)
