"""The gallery as its page uses it: the stream of changes, decisions, pictures, renders; and the command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from gallery_server import Client, running, wait_for

from fluxsplit import gallery as gallery_room
from fluxsplit.errors import UsageError
from fluxsplit.gallery import open_gallery
from fluxsplit.picks import Pick, add_pick, read_picks
from gallery_pictures import write_preview

ROOT = Path(__file__).parents[1]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with running(tmp_path) as client:
        yield client


def stream(client: Client, until: str) -> list[dict[str, Any]]:
    """What the page is told, up to a message that holds `until`."""
    keys = client.gallery.keys
    lines = [f"GET /api/events HTTP/1.1\r\nHost: 127.0.0.1:{keys.port}\r\nX-Fluxsplit-Token: {keys.token}\r\n\r\n"]
    answer = client.raw("".join(lines).encode(), lambda data: until.encode() in data and data.endswith(b"\r\n"))
    text = answer.body.decode()
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def test_the_stream_begins_with_all_there_is(client: Client) -> None:
    messages = stream(client, "0003.png")
    assert messages[0] == {"reset": True}
    names = [item["name"] for message in messages for item in message.get("items", [])]
    assert sorted(names) == ["0001.png", "0001.png", "0002.png", "0003.png"]


def test_who_comes_before_the_server_runs_is_not_refused(tmp_path: Path) -> None:
    """The address is printed, and the browser opened, a moment before."""
    gallery, bound = open_gallery(tmp_path, tmp_path)
    with bound, socket.create_connection(("127.0.0.1", gallery.keys.port), timeout=5):
        gallery.close()


def test_new_pictures_and_decisions_of_others_arrive(client: Client) -> None:
    write_preview(client.gallery.index.folder, 8, 2)
    assert stream(client, "0008.png")
    add_pick(client.gallery.index.folder, Pick("0008.png", "reject", 2))
    assert stream(client, '"reject"')


def test_decisions_are_on_the_disk_when_they_are_answered(client: Client) -> None:
    marks = [{"id": id, "pick": "pick", "stars": number} for number, id in enumerate(client.ids())]
    assert client.post("/api/marks", {"marks": marks}).json() == {"written": 3}
    assert [pick.stars for pick in read_picks(client.gallery.index.folder).values()] == [0, 1, 2]


def test_a_decision_that_cannot_be_written_is_an_error_in_words(client: Client) -> None:
    picks = client.gallery.index.folder / "picks.jsonl"
    picks.mkdir()
    answer = client.post("/api/marks", {"marks": [{"id": client.ids()[0], "pick": "pick", "stars": 0}]})
    assert answer.status == 400 and "picks.jsonl" in answer.json()["error"]


def test_the_picks_are_rendered_and_their_results_shown(client: Client) -> None:
    ids = client.ids()
    client.post("/api/marks", {"marks": [{"id": ids[1], "pick": "pick", "stars": 0}]})
    told = client.post("/api/plan", {"scale": 2}).json()
    assert (told["count"], told["sizes"]) == (1, ["1024x1024"])
    assert told["command"].startswith("fluxsplit rerender --from-picks ")
    assert client.post("/api/renders", {"scale": 2}).json() == {"id": 1}
    wait_for(lambda: client.gallery.queue.state()[0]["state"] == "done")
    wait_for(lambda: len(client.ids("render")) == 2)
    _, objects, _ = client.gallery.index.changes_since(0)
    assert next(item for item in objects if item["id"] == ids[1])["results"]


def test_a_render_can_be_cancelled(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEP_S", "30")
    client.post("/api/marks", {"marks": [{"id": client.ids()[0], "pick": "pick", "stars": 0}]})
    id = client.post("/api/renders", {"scale": 2}).json()["id"]
    assert client.post("/api/renders/cancel", {"id": id}).status == 200
    assert client.gallery.queue.state()[0]["state"] == "cancelled"


def test_the_launch_code_gives_the_token_once(client: Client) -> None:
    code = client.gallery.keys.launch_code()
    headers = [pair for pair in client.post_headers() if pair[0] != "X-Fluxsplit-Token"]
    answer = client.send("POST", "/api/session", [*headers, ("X-Fluxsplit-Token", code)], b"{}")
    assert answer.json()["token"] == client.gallery.keys.token


def test_a_picture_that_went_is_not_found(client: Client) -> None:
    id = client.ids()[0]
    path = client.gallery.index.folder / "0001.png"
    path.unlink()
    path.symlink_to("/etc/hostname")
    assert client.get(f"/picture/{id}").status == 404


def test_pages_have_an_end(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery_room, "MAX_STREAMS", 0)
    keys = client.gallery.keys
    answer = client.send("GET", "/api/events", [*client.headers(), ("X-Fluxsplit-Token", keys.token)])
    assert answer.status == 400 and "close some" in answer.json()["error"]


def test_a_port_in_use_is_said(client: Client, tmp_path: Path) -> None:
    for port in (client.port, 70_000):
        with pytest.raises(UsageError, match=f"port {port} cannot be used"):
            open_gallery(tmp_path, tmp_path, port)


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fluxsplit", "gallery", "--no-open", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def test_the_command_prints_its_address_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "previews").mkdir()
    process = start(tmp_path)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:") and len(line.partition("#")[2]) > 40
    port, token = line.strip().removeprefix("http://127.0.0.1:").split("/#")
    with socket.create_connection(("127.0.0.1", int(port)), timeout=60) as page:  # a page that is open meanwhile
        head = f"GET /api/events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nX-Fluxsplit-Token: {token}\r\n\r\n"
        page.sendall(head.encode())
        assert page.recv(1 << 16).startswith(b"HTTP/1.1 200")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out == "", "as that is how it is meant to end"
    assert err.split("\n") == ["fluxsplit: the gallery runs until Ctrl-C", ""]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "nowhere is not a folder"),
        ((".", "--port", "99999"), "port 99999 cannot be used"),
        ((".", "--rerender", "'"), "cannot be split"),
    ],
)
def test_what_the_command_cannot_use_is_said(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    _, err = (process := start(tmp_path, *words)).communicate(timeout=120)
    assert process.returncode == 2 and said in err and len(err.splitlines()) == 1


def test_without_the_extra_the_command_says_how_to_install_it(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['uvicorn'] = None\n")
    process = start(tmp_path, ".", PYTHONPATH=f"{tmp_path / 'site'}{os.pathsep}{ROOT}")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "fluxsplit[gallery]" in err, err
