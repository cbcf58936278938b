"""Thumbnails: made in a process of their own, kept, bounded."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fluxsplit import thumbnails
from fluxsplit.errors import FluxsplitError
from fluxsplit.thumbnails import SIDE_PX, Thumbnails
from gallery_pictures import write_preview


@pytest.fixture
def maker() -> Iterator[Thumbnails]:
    maker = Thumbnails(workers=1)
    yield maker
    maker.close()


def png(width: int, height: int, rows: bytes, colour: int = 2) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_thumbnail_is_small_and_kept(maker: Thumbnails, tmp_path: Path) -> None:
    source = write_preview(tmp_path, 1, 2)  # 640 x 448
    data = maker.get(source, "1")
    assert Image.open(io.BytesIO(data)).size == (SIDE_PX, SIDE_PX * 448 // 640)
    assert b"lighthouse" not in data and len(data) < source.stat().st_size // 4
    source.unlink()
    assert maker.get(source, "1") == data  # from the cache
    with pytest.raises(FluxsplitError):
        maker.get(source, "2")


def test_a_thumbnail_cut_short_is_made_again(maker: Thumbnails, tmp_path: Path) -> None:
    source = write_preview(tmp_path, 1, 0)
    data = maker.get(source, "1")
    kept = next(maker._folder.iterdir())
    kept.write_bytes(data[:500])
    assert maker.get(source, "1") == data


def test_what_cannot_be_decoded_is_an_error_and_the_next_one_works(maker: Thumbnails, tmp_path: Path) -> None:
    hostile = {
        "bomb": png(60_000, 60_000, b"\0" * 100),
        "long": png(2_000_000, 1, b"\0" * 100),
        "short": png(64, 64, b"\0" * 100),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "text": b"no picture",
    }
    for name, data in hostile.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FluxsplitError, match="could not be decoded"):
            maker.get(tmp_path / name, "1")
    (tmp_path / "link").symlink_to(write_preview(tmp_path, 1, 0))
    with pytest.raises(FluxsplitError):
        maker.get(tmp_path / "link", "1")
    assert maker.get(write_preview(tmp_path, 2, 0), "1")


def test_a_worker_that_dies_is_replaced(maker: Thumbnails, tmp_path: Path) -> None:
    assert maker.get(write_preview(tmp_path, 1, 0), "1")
    process = maker._workers[0]._process
    assert process is not None
    process.kill()
    process.wait()
    assert maker.get(write_preview(tmp_path, 2, 0), "1")


def test_a_worker_that_hangs_is_ended(maker: Thumbnails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thumbnails, "module_command", lambda _: ["sleep", "60"])
    monkeypatch.setattr(thumbnails, "PATIENCE_S", 0.3)
    with pytest.raises(FluxsplitError, match="took over"):
        maker.get(write_preview(tmp_path, 1, 0), "1")
    monkeypatch.undo()


def test_transparent_and_grey_pictures(maker: Thumbnails, tmp_path: Path) -> None:
    for number, mode in enumerate(("RGBA", "LA", "L", "P", "1", "I;16")):
        path = tmp_path / f"{number}.png"
        Image.new(mode, (32, 16)).save(path)
        assert Image.open(io.BytesIO(maker.get(path, "1"))).mode == "RGB"


def test_the_cache_has_an_end(maker: Thumbnails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        maker.get(write_preview(tmp_path, number, 0), "1")
    sizes = [file.stat().st_size for file in maker._folder.iterdir()]
    monkeypatch.setattr(thumbnails, "MAX_CACHE_BYTES", sum(sizes) // 2)
    maker.tidy()
    assert sum(file.stat().st_size for file in maker._folder.iterdir()) <= sum(sizes) // 2
