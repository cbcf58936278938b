"""Who may speak to the gallery: the page that this very server sent to this person's browser, and nobody else.

Every web page that is open in the browser, and every program on the machine, can reach a port of 127.0.0.1. So:

- Host must be exactly ours. A name that was rebound to 127.0.0.1 after its page was loaded still says its own.
- Origin and Sec-Fetch-Site, where a browser sends them, must say that the request comes from our own page;
  `null` (a file, a sandboxed frame) is nobody. A request that changes something must carry Origin.
- The interface wants a random token in a header, which no page of another origin can add without permission,
  and we grant none (no CORS). The page has it from the part of its address after `#`, which is never sent.
- Pictures are loaded by <img>, which sends no header of ours, so they want a cookie. Cookies go to every port of
  a host; hence its value opens pictures only, whose ids are keyed hashes besides, and not the interface.

A request is refused before any handler sees it. Comparable servers fell to each of these: ComfyUI CVE-2024-10481
and issue 12860, Gradio CVE-2024-47084 and CVE-2024-47165, Ray GHSA-q279-jhrf-cc6v.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Headers = Iterable[tuple[bytes, bytes]]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

TOKEN_HEADER = b"x-fluxsplit-token"
MAX_BODY_BYTES = 64 << 10
LAUNCH_CODE_S = 120.0
PAGES = ("/", "/gallery.js", "/gallery.css", "/favicon.ico")
"""Hold nothing of the person's, and so need no token."""
_PATH = re.compile(rb"/[a-z0-9./]*", re.ASCII)
_QUERY = re.compile(rb"|v=[0-9a-f-]{1,40}", re.ASCII)
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    b"form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
SAFETY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)


class Keys:
    """The secrets of one run: the token, the cookie's value, and a code for the browser that is opened for the person.

    The code works once and for two minutes: it stands on the browser's command line, which other users of the
    machine can list, while the token is only printed.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.token = secrets.token_urlsafe(32)
        self.origin = f"http://127.0.0.1:{port}"
        self.hosts = {f"127.0.0.1:{port}".encode()} | ({b"127.0.0.1"} if port == 80 else set())
        self.cookie_name = f"fluxsplit-{port}"
        self.cookie_value = hmac.new(self.token.encode(), b"pictures", hashlib.sha256).hexdigest()
        self.id_secret = hmac.new(self.token.encode(), b"ids", hashlib.sha256).digest()
        self._code = ""
        self._code_until_s = 0.0
        self._lock = threading.Lock()

    def launch_code(self) -> str:
        """A code that stands for the token once."""
        with self._lock:
            self._code, self._code_until_s = secrets.token_urlsafe(32), time.monotonic() + LAUNCH_CODE_S
            return self._code

    def opens(self, given: bytes) -> bool:
        """Whether `given` is the token."""
        return hmac.compare_digest(given, self.token.encode())

    def spend(self, given: bytes) -> bool:
        """Whether `given` is the launch code; it is none any more afterwards."""
        with self._lock:
            good = bool(self._code) and hmac.compare_digest(given, self._code.encode())
            if good:
                self._code = ""
            return good and time.monotonic() < self._code_until_s


def refusal(method: str, raw_path: bytes, query: bytes, headers: Headers, keys: Keys) -> tuple[int, str] | None:
    """The status and the reason with which a request is refused, or None where it may pass."""
    sent: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        sent.setdefault(name.lower(), []).append(value)
    if method not in ("GET", "POST"):
        return 405, "only GET and POST are answered"
    if len(sent.get(b"host", [])) != 1 or sent[b"host"][0] not in keys.hosts:
        return 421, f"this server is {keys.origin} and goes by no other name"
    if not _PATH.fullmatch(raw_path) or b".." in raw_path or b"//" in raw_path or not _QUERY.fullmatch(query):
        return 400, "no such address"
    if b"upgrade" in sent:
        return 400, "the connection is not upgraded"
    return _stranger(method, raw_path, sent, keys) or _locked(method, raw_path, sent, keys)


def _stranger(method: str, path: bytes, sent: dict[bytes, list[bytes]], keys: Keys) -> tuple[int, str] | None:
    """Refuse what another page had the browser send."""
    origins = sent.get(b"origin", [])
    if origins not in ([], [keys.origin.encode()]) or (method == "POST" and not origins):
        return 403, "requests are taken from the gallery's own page only"
    typed = method == "GET" and path.decode() in PAGES  # an address that was typed, or opened by a program
    if sent.get(b"sec-fetch-site", [b"same-origin"]) not in ([b"same-origin"], *([[b"none"]] if typed else [])):
        return 403, "requests are taken from the gallery's own page only"
    if method != "POST":
        return None
    kind = sent.get(b"content-type", [])
    if len(kind) != 1 or kind[0].lower().replace(b" ", b"") not in (
        b"application/json",
        b"application/json;charset=utf-8",
    ):
        return 415, "only application/json is taken"
    length = sent.get(b"content-length", [b"0"])
    if len(length) != 1 or not length[0].isdigit() or len(length[0]) > 9 or int(length[0]) > MAX_BODY_BYTES:
        return 413, f"at most {MAX_BODY_BYTES} bytes are taken"
    return None


def _locked(method: str, path: bytes, sent: dict[bytes, list[bytes]], keys: Keys) -> tuple[int, str] | None:
    """Refuse who does not hold the key of what is asked for."""
    if path.decode() in PAGES:
        return None if method == "GET" else (405, "pages are only read")
    tokens = sent.get(TOKEN_HEADER, [])
    if path.startswith(b"/api/"):
        if len(tokens) == 1 and (keys.opens(tokens[0]) or (path == b"/api/session" and keys.spend(tokens[0]))):
            return None
        return 403, "the token is missing or of another run; open the address that fluxsplit gallery printed"
    if path.startswith((b"/picture/", b"/thumbnail/")) and method == "GET":
        found = _cookies(sent.get(b"cookie", []), keys.cookie_name.encode())
        if len(found) == 1 and hmac.compare_digest(found[0], keys.cookie_value.encode()):
            return None
        return 403, "pictures are shown on the gallery's own page only"
    return 404, "no such address"


def _cookies(lines: list[bytes], name: bytes) -> list[bytes]:
    pairs = (part.strip().partition(b"=") for line in lines for part in line.split(b";"))
    return [value for key, _, value in pairs if key == name]


class Guard:
    """Refuses what `refusal` refuses, bounds bodies, and adds the safety headers to every answer."""

    def __init__(self, app: App, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a websocket that is never accepted
        answer = _with_headers(send)
        why = refusal(scope["method"], scope["raw_path"], scope["query_string"], scope["headers"], self._keys)
        if why is not None:
            await _refuse(answer, *why)
            return
        await self._app(scope, _bounded(receive), answer)


class BodyTooLarge(Exception):
    """More bytes came than the request's head said or than are taken."""


def _bounded(receive: Receive) -> Receive:
    seen_bytes = 0

    async def bounded() -> Message:
        nonlocal seen_bytes
        message = await receive()
        seen_bytes += len(message.get("body", b""))
        if seen_bytes > MAX_BODY_BYTES:
            raise BodyTooLarge
        return message

    return bounded


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *SAFETY_HEADERS]
        await send(message)

    return sending


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = reason.encode()
    head = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    head += [(b"cache-control", b"no-store"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
