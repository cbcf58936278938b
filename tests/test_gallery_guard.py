"""Attacks on a gallery that really runs: every one refused, nothing written, nothing started, nothing told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from gallery_server import Answer, Client, running

Header = tuple[str, str]
Attack = Callable[[Client], Answer]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with running(tmp_path_factory.mktemp("attacked")) as client:
        yield client


def mark(client: Client) -> bytes:
    return json.dumps({"marks": [{"id": client.ids()[0], "pick": "pick", "stars": 1}]}).encode()


def with_header(headers: list[Header], name: str, *values: str) -> list[Header]:
    return [pair for pair in headers if pair[0].lower() != name.lower()] + [(name, value) for value in values]


def post(name: str, *values: str) -> Attack:
    """The page's own request to write a pick down, with one header replaced; {port}, {token}, {code} are filled in."""

    def attack(client: Client) -> Answer:
        filled = [value.format(port=client.port, token=client.gallery.keys.token) for value in values]
        return client.send("POST", "/api/marks", with_header(client.post_headers(), name, *filled), mark(client))

    return attack


def get(target: str, name: str = "", *values: str) -> Attack:
    """A request of the page to read, with one header replaced."""

    def attack(client: Client) -> Answer:
        keys = client.gallery.keys
        headers = [*client.headers(), client.cookie(), ("X-Fluxsplit-Token", keys.token)]
        filled = [
            value.format(port=client.port, token=keys.token, cookie=keys.cookie_value, name=keys.cookie_name)
            for value in values
        ]
        if name:
            headers = with_header(headers, name, *filled)
        return client.send("GET", target.format(id=client.ids()[0], token=keys.token), headers)

    return attack


def body(target: str, text: str | bytes) -> Attack:
    def attack(client: Client) -> Answer:
        data = text.encode() if isinstance(text, str) else text
        data = data.replace(b"{id}", client.ids()[0].encode()).replace(b"{render}", client.ids("render")[0].encode())
        return client.send("POST", target, client.post_headers(), data)

    return attack


def method(word: str, target: str, *more: Header) -> Attack:
    def attack(client: Client) -> Answer:
        filled = target.format(id=client.ids()[0])
        return client.send(word, filled, [*client.post_headers(), client.cookie(), *more], mark(client))

    return attack


def code_twice(client: Client) -> Answer:
    headers = with_header(client.post_headers(), "X-Fluxsplit-Token", client.gallery.keys.launch_code())
    assert client.send("POST", "/api/session", headers, b"{}").status == 200
    return client.send("POST", "/api/session", headers, b"{}")


def code_elsewhere(client: Client) -> Answer:
    headers = with_header(client.post_headers(), "X-Fluxsplit-Token", client.gallery.keys.launch_code())
    return client.send("POST", "/api/marks", headers, mark(client))


def too_long(client: Client) -> Answer:
    return client.send("POST", "/api/marks", client.post_headers(), mark(client) + b" " * 100_000)


def chunked_too_long(client: Client) -> Answer:
    headers = [*client.post_headers(), ("Transfer-Encoding", "chunked")]
    data = b"".join(b"8000\r\n" + b" " * 0x8000 + b"\r\n" for _ in range(8)) + b"0\r\n\r\n"
    return client.send("POST", "/api/marks", headers, data)


def smuggled(client: Client) -> Answer:
    headers = [*client.post_headers(), ("Content-Length", "5"), ("Content-Length", "400")]
    return client.send("POST", "/api/marks", headers, mark(client))


def http_1_0(client: Client) -> Answer:
    return client.raw(b"GET / HTTP/1.0\r\n\r\n")


TOKEN = "X-Fluxsplit-Token"
MARK: dict[str, Any] = {"id": "{id}", "pick": "pick", "stars": 1}


def marks(**changes: Any) -> Attack:
    return body("/api/marks", json.dumps({"marks": [MARK | changes]}))


ATTACKS: dict[str, Attack] = {
    # rebinding: the right address under another name
    "Host of a stranger": post("Host", "evil.example"),
    "Host of a stranger with our port": post("Host", "evil.example:{port}"),
    "Host localhost": post("Host", "localhost:{port}"),
    "Host without port": post("Host", "127.0.0.1"),
    "Host with another port": post("Host", "127.0.0.1:1"),
    "Host that only begins like ours": post("Host", "127.0.0.1:{port}.evil.example"),
    "Host of a wildcard DNS": post("Host", "127.0.0.1.nip.example:{port}"),
    "Host with a dot behind": post("Host", "127.0.0.1.:{port}"),
    "Host as a number": post("Host", "2130706433:{port}"),
    "Host 0.0.0.0": post("Host", "0.0.0.0:{port}"),
    "Host ::1": post("Host", "[::1]:{port}"),
    "Host with a user": post("Host", "x@127.0.0.1:{port}"),
    "Host twice": post("Host", "127.0.0.1:{port}", "evil.example"),
    "no Host": post("Host"),
    "no Host in HTTP/1.0": http_1_0,
    "page for another Host": get("/", "Host", "evil.example:{port}"),
    "script for another Host": get("/gallery.js", "Host", "evil.example:{port}"),
    "picture for another Host": get("/picture/{id}", "Host", "evil.example:{port}"),
    "events for another Host": get("/api/events", "Host", "evil.example:{port}"),
    "absolute address": get("http://evil.example/"),
    # requests from other pages
    "Origin null": post("Origin", "null"),
    "Origin of a stranger": post("Origin", "http://evil.example"),
    "Origin https": post("Origin", "https://127.0.0.1:{port}"),
    "Origin of another port": post("Origin", "http://127.0.0.1:1"),
    "Origin localhost": post("Origin", "http://localhost:{port}"),
    "Origin that only begins like ours": post("Origin", "http://127.0.0.1:{port}.evil.example"),
    "Origin with a path": post("Origin", "http://127.0.0.1:{port}/"),
    "Origin of a file": post("Origin", "file://"),
    "Origin twice": post("Origin", "http://127.0.0.1:{port}", "http://evil.example"),
    "Origin empty": post("Origin", ""),
    "no Origin": post("Origin"),
    "page with Origin null": get("/", "Origin", "null"),
    "events with a stranger's Origin": get("/api/events", "Origin", "http://evil.example"),
    "picture with a stranger's Origin": get("/picture/{id}", "Origin", "http://evil.example"),
    "POST across sites": post("Sec-Fetch-Site", "cross-site"),
    "POST from another port": post("Sec-Fetch-Site", "same-site"),
    "POST from nowhere": post("Sec-Fetch-Site", "none"),
    "Sec-Fetch-Site twice": post("Sec-Fetch-Site", "same-origin", "cross-site"),
    "page linked across sites": get("/", "Sec-Fetch-Site", "cross-site"),
    "page framed by another port": get("/", "Sec-Fetch-Site", "same-site"),
    "picture shown across sites": get("/picture/{id}", "Sec-Fetch-Site", "cross-site"),
    "thumbnail shown by another port": get("/thumbnail/{id}", "Sec-Fetch-Site", "same-site"),
    "picture opened by its address": get("/picture/{id}", "Sec-Fetch-Site", "none"),
    "events across sites": get("/api/events", "Sec-Fetch-Site", "cross-site"),
    "form": post("Content-Type", "application/x-www-form-urlencoded"),
    "form with parts": post("Content-Type", "multipart/form-data; boundary=x"),
    "JSON called text": post("Content-Type", "text/plain"),
    "JSON called text and JSON": post("Content-Type", "text/plain", "application/json"),
    "JSON by the end of its name": post("Content-Type", "text/plain; x=application/json"),
    "no Content-Type": post("Content-Type"),
    "preflight": method("OPTIONS", "/api/marks", ("Access-Control-Request-Method", "POST")),
    # without the key
    "no token": post(TOKEN),
    "token empty": post(TOKEN, ""),
    "token wrong": post(TOKEN, "A" * 43),
    "token cut short": post(TOKEN, "{token:.10}"),
    "token and more": post(TOKEN, "{token}x"),
    "token twice": post(TOKEN, "{token}", "{token}"),
    "token that is no ASCII": post(TOKEN, "\xe4"),
    "events without token": get("/api/events", TOKEN),
    "token in the address": get("/api/events?token={token}", TOKEN),
    "picture's cookie as token": get("/api/events", TOKEN, "{cookie}"),
    "picture without cookie": get("/picture/{id}", "Cookie"),
    "thumbnail without cookie": get("/thumbnail/{id}", "Cookie"),
    "cookie wrong": get("/picture/{id}", "Cookie", "{name}=" + "0" * 64),
    "cookie of another gallery": get("/picture/{id}", "Cookie", "fluxsplit-1={cookie}"),
    "token in the cookie": get("/picture/{id}", "Cookie", "{name}={token}"),
    "cookie twice": get("/picture/{id}", "Cookie", "{name}={cookie}; {name}=x"),
    "launch code twice": code_twice,
    "launch code for more than the session": code_elsewhere,
    # out of the folder
    "up from a picture": get("/picture/../../../etc/passwd"),
    "up, encoded": get("/picture/%2e%2e/%2e%2e/etc/passwd"),
    "up, slashes encoded": get("/picture/..%2f..%2f..%2fetc%2fpasswd"),
    "up, encoded twice": get("/picture/%252e%252e%252fetc%252fpasswd"),
    "up by backslashes": get("/picture/..\\..\\etc\\passwd"),
    "up from the page's files": get("/gallery.js/../gallery.py"),
    "two slashes": get("//etc/passwd"),
    "a path in place of an id": get("/picture//etc/passwd"),
    "a picture by its name": get("/picture/0001.png"),
    "picks by their name": get("/picture/picks.jsonl"),
    "a thumbnail by its name": get("/thumbnail/0001.png"),
    "an id and NUL": get("/picture/{id}%00.png"),
    "an id and more": get("/picture/{id}/x"),
    "an id with one letter more": get("/picture/{id}a"),
    "an address in the query": get("/picture/{id}?v=../../etc/passwd"),
    "the folder": get("/previews/"),
    "the package's files": get("/gallery_files/index.html"),
    # other methods
    "PUT": method("PUT", "/api/marks"),
    "DELETE": method("DELETE", "/picture/{id}"),
    "TRACE": method("TRACE", "/"),
    "HEAD": method("HEAD", "/"),
    "PATCH": method("PATCH", "/api/marks"),
    "writing by GET": get("/api/marks"),
    "starting by GET": get("/api/renders"),
    "POST to a picture": method("POST", "/picture/{id}"),
    "POST to the page": method("POST", "/"),
    "another method by a header": method("OPTIONS", "/api/marks", ("X-HTTP-Method-Override", "POST")),
    "websocket": get("/api/events", "Upgrade", "websocket"),
    # bodies
    "100 kB": too_long,
    "256 kB in chunks": chunked_too_long,
    "two lengths": smuggled,
    "a length below zero": post("Content-Length", "-1"),
    "a length of words": post("Content-Length", "1e3"),
    "no JSON": body("/api/marks", "marks"),
    "deep JSON": body("/api/marks", "[" * 60_000),
    "keys twice": body("/api/marks", '{"marks": [], "marks": [' + json.dumps(MARK) + "]}"),
    "not UTF-8": body("/api/marks", b'{"marks": "\xff"}'),
    "more than marks": body("/api/marks", json.dumps({"marks": [MARK], "folder": "/"})),
    "no marks": body("/api/marks", '{"marks": []}'),
    "1001 marks": body("/api/marks", json.dumps({"marks": [0] * 1001})),
    "mark of a file": marks(id="0001.png"),
    "mark of a path": marks(id="../0001.png"),
    "mark of a result": marks(id="{render}"),
    "mark with a name": marks(image="x.png"),
    "six stars": marks(stars=6),
    "stars are NaN": marks(stars=float("nan")),
    "stars are true": marks(stars=True),
    "pick is markup": marks(pick="<svg>"),
    "pick is a list": marks(pick=["pick"]),
    "flags in the size": body("/api/renders", '{"size": "512x512 --out /"}'),
    "flag as keep": body("/api/renders", '{"scale": 2, "keep": "--model"}'),
    "scale of words": body("/api/renders", '{"scale": "2"}'),
    "scale without end": body("/api/renders", '{"scale": 1e999}'),
    "upscale is true": body("/api/renders", '{"scale": 2, "upscale": true}'),
    "size without end": body("/api/renders", '{"size": "99999x99999"}'),
    "a folder to write to": body("/api/renders", '{"scale": 2, "out": "/"}'),
    "a command": body("/api/renders", '{"scale": 2, "command": ["rm"]}'),
    "nothing picked": body("/api/renders", '{"scale": 2}'),
    "cancel by words": body("/api/renders/cancel", '{"id": "1"}'),
    "cancel what is not there": body("/api/renders/cancel", '{"id": 99}'),
}


def test_there_are_attacks_enough() -> None:
    assert len(ATTACKS) >= 40


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_is_refused(client: Client, attack: Attack) -> None:
    answer = attack(client)
    assert answer.status == 0 or 400 <= answer.status < 500, answer
    assert client.gallery.keys.token.encode() not in answer.body
    assert client.gallery.keys.cookie_value.encode() not in answer.body + str(answer.head).encode()
    assert b"root:" not in answer.body and b"lighthouse" not in answer.body and b"\x89PNG" not in answer.body
    assert not any(name.startswith("access-control") for name in answer.head)
    assert not (client.gallery.index.folder / "picks.jsonl").exists()
    assert client.gallery.queue.state() == []


def test_what_the_page_sends_is_taken(tmp_path: Path) -> None:
    """The same requests unchanged: the refusals above are for what was changed in them."""
    with running(tmp_path) as client:
        id = client.ids()[0]
        for target in ("/", "/gallery.js", "/gallery.css"):
            assert client.send("GET", target, client.headers()).status == 200
        assert client.get(f"/picture/{id}").body.startswith(b"\x89PNG")
        assert client.get(f"/picture/{id}?v=1a-2b").status == 200
        assert client.get(f"/thumbnail/{id}").body.startswith(b"\xff\xd8")
        assert post("X-Other", "1")(client).status == 200
        assert (tmp_path / "previews" / "picks.jsonl").exists()
        assert body("/api/plan", '{"size": "1152x944", "keep": "noise", "upscale": 2}')(client).status == 200
        typed = with_header(client.headers(), "Sec-Fetch-Site", "none")
        assert client.send("GET", "/", typed).status == 200


def test_every_answer_carries_the_safety_headers(client: Client) -> None:
    id = client.ids()[0]
    for answer in (client.get("/"), client.get(f"/picture/{id}"), client.get(f"/thumbnail/{id}"), client.get("/no")):
        policy = answer.head["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.head["x-content-type-options"] == "nosniff"
        assert answer.head["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in answer.head


def test_the_page_needs_nothing_that_the_policy_refuses(client: Client) -> None:
    page = client.get("/").body.decode()
    assert "<style" not in page and "style=" not in page and " onclick" not in page and "http" not in page
    assert page.count("<script") == 1 and 'src="/gallery.js"' in page
    script = client.get("/gallery.js").body.decode()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert word not in script


def test_the_cookie_is_strict_and_hidden_from_scripts(client: Client) -> None:
    cookie = client.post("/api/session", {}).head["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert client.gallery.keys.token.lower() not in cookie


def test_only_this_machine_can_reach_it(client: Client) -> None:
    import socket

    names = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for name in names - {"127.0.0.1"}:
        with pytest.raises(OSError), socket.create_connection((str(name), client.port), timeout=1):
            pass
