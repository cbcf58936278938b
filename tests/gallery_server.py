"""A gallery that really runs on a port, and requests to it byte by byte, also such as no client sends."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxsplit.gallery import Gallery, open_gallery, serve, server
from fluxsplit.gallery_jobs import RenderQueue
from gallery_pictures import write_preview, write_render

FAKE = str(Path(__file__).parent / "fake_rerender.py")


@dataclass(frozen=True)
class Answer:
    status: int
    head: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Client:
    """What the page would send, with anything replaced."""

    gallery: Gallery

    @property
    def port(self) -> int:
        return self.gallery.keys.port

    def ids(self, kind: str = "preview") -> list[str]:
        _, objects, _ = self.gallery.index.changes_since(0)
        return [item["id"] for item in sorted(objects, key=lambda item: item["name"]) if item["kind"] == kind]

    def headers(self) -> list[tuple[str, str]]:
        keys = self.gallery.keys
        return [("Host", f"127.0.0.1:{keys.port}"), ("Connection", "close"), ("Sec-Fetch-Site", "same-origin")]

    def post_headers(self) -> list[tuple[str, str]]:
        keys = self.gallery.keys
        return [
            *self.headers(),
            ("Origin", keys.origin),
            ("Content-Type", "application/json"),
            ("X-Fluxsplit-Token", keys.token),
        ]

    def cookie(self) -> tuple[str, str]:
        return ("Cookie", f"{self.gallery.keys.cookie_name}={self.gallery.keys.cookie_value}")

    def raw(self, data: bytes, until: Callable[[bytes], bool] = lambda _: False) -> Answer:
        """Send bytes, take the answer until the server closes or `until` holds; status 0 where there is none."""
        received = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as link, contextlib.suppress(OSError):
            with contextlib.suppress(OSError):
                link.sendall(data)
            while (chunk := link.recv(1 << 16)) and not until(received := received + chunk):
                pass
        head, _, body = received.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        status = int(lines[0].split()[1]) if received else 0
        return Answer(status, {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}, body)

    def send(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes | None = None) -> Answer:
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
        if body is not None and not any(name.lower() in ("content-length", "transfer-encoding") for name, _ in headers):
            lines.append(f"Content-Length: {len(body)}")
        return self.raw("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b""))

    def get(self, target: str) -> Answer:
        return self.send("GET", target, [*self.headers(), self.cookie()])

    def post(self, target: str, value: Any) -> Answer:
        return self.send("POST", target, self.post_headers(), json.dumps(value).encode())


def fake_command(words: list[str]) -> list[str]:
    return [sys.executable, FAKE, *words]


def wait_for(condition: Callable[[], Any], seconds: float = 90.0) -> Any:
    """What `condition` gives once it is true; fails after some seconds."""
    end_s = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def running(folder: Path, previews: int = 3, renders: int = 1) -> Iterator[Client]:
    """A gallery over `folder/previews` and `folder/renders`, its renders made by a stand-in for `rerender`."""
    for name in ("previews", "renders"):
        (folder / name).mkdir(exist_ok=True)
    for number in range(previews):
        write_preview(folder / "previews", number + 1, number // 4)
    for number in range(renders):
        write_render(folder / "renders", number + 1, number // 4)
    gallery, bound = open_gallery(folder / "previews", folder / "renders", queue=RenderQueue(fake_command))
    serving = server(gallery)
    thread = threading.Thread(target=serve, args=(gallery, bound, serving), daemon=True)
    thread.start()
    client = Client(gallery)
    try:
        wait_for(lambda: serving.started and len(client.ids()) >= previews and len(client.ids("render")) >= renders)
        yield client
    finally:
        serving.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
