"""Downloads from a server on this machine: resumed, checked, kept only when right."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fluxsplit import upscalers
from fluxsplit.download import download
from fluxsplit.errors import FluxsplitError

DATA = bytes(range(256)) * 9000
SHA256 = hashlib.sha256(DATA).hexdigest()


class Web:
    """A server whose behaviour a test sets, and what it was asked."""

    def __init__(self) -> None:
        self.cut_at: int | None = None
        self.data = DATA
        self.ranges = True
        self.says_length = True
        self.redirect = ""
        self.status = 200
        self.asked: list[str] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/x.pth"


@pytest.fixture
def web() -> Iterator[Web]:
    here = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here.asked.append(self.headers.get("Range", "all"))
            if here.redirect or here.status != 200:
                self.send_response(302 if here.redirect else here.status)
                self.send_header("Location", here.redirect)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if here.ranges else 0
            self.send_response(206 if start else 200)
            if here.says_length:
                self.send_header("Content-Length", str(len(here.data) - start))
            self.end_headers()
            self.wfile.write(here.data[start : here.cut_at])

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that had enough

    server = Server(("127.0.0.1", 0), Handler)
    here.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield here
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(web: Web, folder: Path, seen: list[int] | None = None) -> Path:
    return download(web.url, folder / "sub" / "x.pth", len(DATA), SHA256, (seen if seen is not None else []).append)


def test_a_file_comes_whole_and_is_not_fetched_twice(web: Web, tmp_path: Path) -> None:
    seen: list[int] = []
    file = fetch(web, tmp_path, seen)
    assert file.read_bytes() == DATA and seen[-1] == len(DATA)
    assert [path.name for path in file.parent.iterdir()] == ["x.pth"]
    fetch(web, tmp_path)
    assert len(web.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_what_was_cut_off_is_gone_on_with(web: Web, tmp_path: Path, ranges: bool) -> None:
    web.cut_at, web.ranges = 1_500_000, ranges
    with pytest.raises(FluxsplitError, match=r"1500000 of 2304000 bytes|IncompleteRead") as raised:
        fetch(web, tmp_path)
    assert "run it again" in raised.value.hint
    assert not (tmp_path / "sub" / "x.pth").exists()
    web.cut_at = None
    seen: list[int] = []
    assert fetch(web, tmp_path, seen).read_bytes() == DATA
    assert web.asked == ["all", "bytes=1500000-"]
    assert (seen[0] > 1_500_000) == ranges, "a server that knows no ranges begins again"


@pytest.mark.parametrize("says_length", [True, False])
def test_a_file_of_another_size_is_not_read_to_its_end(web: Web, tmp_path: Path, says_length: bool) -> None:
    web.data, web.says_length = DATA * 4, says_length
    with pytest.raises(FluxsplitError, match=r"it should have 2304000|has over 2304000 bytes"):
        fetch(web, tmp_path)
    assert list((tmp_path / "sub").iterdir()) == []


def test_a_file_of_another_hash_is_not_kept(web: Web, tmp_path: Path) -> None:
    web.data = DATA[:-1] + b"\0"
    with pytest.raises(FluxsplitError, match=f"it should be {SHA256}"):
        fetch(web, tmp_path)
    assert list((tmp_path / "sub").iterdir()) == []


def test_a_part_that_was_damaged_meanwhile_is_found_out_and_begun_again(web: Web, tmp_path: Path) -> None:
    part = tmp_path / "sub" / f"x.pth.{SHA256[:12]}.download"
    part.parent.mkdir()
    part.write_bytes(b"\1" * 1000)
    with pytest.raises(FluxsplitError, match="it should be"):
        fetch(web, tmp_path)
    assert fetch(web, tmp_path).read_bytes() == DATA


def test_refusals_of_the_server(web: Web, tmp_path: Path) -> None:
    web.status = 404
    with pytest.raises(FluxsplitError, match="Not Found"):
        fetch(web, tmp_path)


@pytest.mark.parametrize("address", ["http://example.org/x", "file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_only_https_is_followed(web: Web, tmp_path: Path, address: str) -> None:
    web.redirect = address
    with pytest.raises(FluxsplitError, match=r"not an https address|not allowed"):
        fetch(web, tmp_path)
    with pytest.raises(FluxsplitError, match="not an https address"):
        download(address, tmp_path / "y", 1, SHA256, [].append)


def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(FluxsplitError, match="cannot fetch"):
        download("http://127.0.0.1:9/x", tmp_path / "x", 10, SHA256, [].append)


@pytest.fixture
def published(web: Web, monkeypatch: pytest.MonkeyPatch) -> Web:
    """The server, as if it had published every upscaler."""
    monkeypatch.setattr(upscalers, "_RELEASES", f"http://127.0.0.1:{web.port}")
    table = tuple(replace(item, size_bytes=len(DATA), sha256=SHA256) for item in upscalers.PUBLISHED)
    monkeypatch.setattr(upscalers, "PUBLISHED", table)
    return web


def test_an_upscaler_is_fetched_when_asked_and_found_afterwards(published: Web) -> None:
    seen: list[tuple[str, int, int]] = []
    chosen = upscalers.choose("4", None, True, lambda *told: seen.append(told))
    assert chosen.factor == 4 and Path(chosen.path).read_bytes() == DATA
    assert Path(chosen.path) == upscalers.own_folder() / "RealESRGAN_x4plus.pth"
    assert seen[-1] == ("RealESRGAN_x4plus.pth", len(DATA), len(DATA))
    assert upscalers.choose("x4plus", None, False, lambda *told: None).path == chosen.path
    assert len(published.asked) == 1
    for wanted in ("4", "x4plus"):
        Path(chosen.path).write_bytes(DATA[:-7])
        assert upscalers.choose(wanted, None, False, lambda *told: None).path == chosen.path
        assert Path(chosen.path).read_bytes() == DATA[:-7], "nothing is fetched that was not asked for"
        assert upscalers.choose(wanted, None, True, lambda *told: None).path == chosen.path
        assert Path(chosen.path).read_bytes() == DATA
    assert len(published.asked) == 3


@pytest.mark.usefixtures("published")
def test_a_file_of_comfyui_that_is_another_is_left_and_the_published_one_fetched(tmp_path: Path) -> None:
    theirs = tmp_path / "ComfyUI" / "models" / "upscale_models" / "RealESRGAN_x4plus.pth"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"another")
    assert upscalers.choose("4", tmp_path / "ComfyUI", False, lambda *told: None).path == str(theirs)
    fetched = upscalers.choose("4", tmp_path / "ComfyUI", True, lambda *told: None)
    assert Path(fetched.path).read_bytes() == DATA and theirs.read_bytes() == b"another"
