"""The gallery's server: one page over a folder of pictures, on 127.0.0.1, for the person who started it.

What may be asked for is decided in `gallery_guard` before anything here runs. Changes reach the page as
server-sent events on one long answer, which the page reads with `fetch`, because an EventSource sends no token.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.gallery_guard import BodyTooLarge, Guard, Keys
from fluxsplit.gallery_index import GalleryIndex, open_picture
from fluxsplit.gallery_jobs import RenderQueue, plan, rerender_words, settings_from_object, shown_command
from fluxsplit.recipe import strict_json
from fluxsplit.thumbnails import Thumbnails

LOOK_EVERY_S = 1.0
TELL_EVERY_S = 0.2
BEAT_EVERY_S = 10.0
ITEMS_AT_ONCE = 200
MAX_STREAMS = 16
MAX_MARKS = 1000
BODY_WAIT_S = 10.0
CHUNK_BYTES = 1 << 18
_PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/gallery.js": ("gallery.js", "text/javascript; charset=utf-8"),
    "/gallery.css": ("gallery.css", "text/css; charset=utf-8"),
}
_KEPT = {"cache-control": "private, max-age=86400, immutable"}
_NOT_KEPT = {"cache-control": "no-store"}


@dataclass(slots=True)
class Gallery:
    """What one run of the gallery holds."""

    index: GalleryIndex
    keys: Keys
    queue: RenderQueue
    thumbnails: Thumbnails
    rerender_flags: tuple[str, ...] = ()
    """The person's own flags for `rerender`, as --model."""
    closing: threading.Event = field(default_factory=threading.Event)
    streams: int = 0

    def look(self) -> None:
        """Keep the index current until the gallery closes; runs in a thread of its own."""
        self.thumbnails.tidy()
        while not self.closing.is_set():
            try:
                more = self.index.refresh()
            except Exception as error:
                self.index.notice = f"the folder cannot be read: {error}"
                more = False
            if not more:
                self.closing.wait(LOOK_EVERY_S)

    def close(self) -> None:
        """End every stream, render and worker."""
        self.closing.set()
        self.queue.close()
        self.thumbnails.close()


def open_gallery(
    folder: Path, renders: Path, port: int = 0, rerender_flags: tuple[str, ...] = (), queue: RenderQueue | None = None
) -> tuple[Gallery, socket.socket]:
    """A gallery and the socket that it will serve, bound to 127.0.0.1; raises UsageError where the port is taken."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere it would let another program take the port over
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", port))
        bound.listen()  # who comes before the server runs waits, and is not refused
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"port {port} cannot be used: {reason}", "choose another --port, or none") from None
    keys = Keys(bound.getsockname()[1])
    index = GalleryIndex(folder, renders, keys.id_secret)
    return Gallery(index, keys, queue or RenderQueue(), Thumbnails(), rerender_flags), bound


def address(gallery: Gallery, secret: str) -> str:
    """The page's address, with the token or launch code behind `#`, which no browser sends to any server."""
    return f"{gallery.keys.origin}/#{secret}"


def server(gallery: Gallery) -> uvicorn.Server:
    """The server; `serve` runs it."""
    config = uvicorn.Config(
        application(gallery),
        http="h11",
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=200,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
    )
    return _Server(config, gallery)


class _Server(uvicorn.Server):
    """Tells the streams that it ends, for it waits for them."""

    def __init__(self, config: uvicorn.Config, gallery: Gallery) -> None:
        super().__init__(config)
        self._gallery = gallery

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._gallery.closing.set()
        await super().shutdown(sockets)


def serve(gallery: Gallery, bound: socket.socket, running: uvicorn.Server | None = None) -> None:
    """Serve until interrupted; afterwards nothing that was started is left."""
    looker = threading.Thread(target=gallery.look, daemon=True)
    looker.start()
    try:
        (running or server(gallery)).run(sockets=[bound])
    finally:
        gallery.close()
        bound.close()
        looker.join(5.0)


def application(gallery: Gallery) -> Guard:
    """The ASGI application, behind its guard."""
    handlers = _Handlers(gallery)
    routes = [Route(path, handlers.page, methods=["GET"]) for path in _PAGES]
    routes += [
        Route("/favicon.ico", handlers.no_icon, methods=["GET"]),
        Route("/api/session", handlers.session, methods=["POST"]),
        Route("/api/events", handlers.events, methods=["GET"]),
        Route("/api/marks", handlers.marks, methods=["POST"]),
        Route("/api/plan", handlers.plan, methods=["POST"]),
        Route("/api/renders", handlers.render, methods=["POST"]),
        Route("/api/renders/cancel", handlers.cancel, methods=["POST"]),
        Route("/thumbnail/{id}", handlers.thumbnail, methods=["GET"]),
        Route("/picture/{id}", handlers.picture, methods=["GET"]),
    ]
    refused: dict[Any, Any] = {FluxsplitError: _refused, BodyTooLarge: _too_large, TimeoutError: _too_slow}
    app = Starlette(routes=routes, exception_handlers=refused)
    app.router.redirect_slashes = False
    return Guard(app, gallery.keys)


class _Handlers:
    """One method for each address."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        place = resources.files("fluxsplit").joinpath("gallery_files")
        self._pages = {path: (place.joinpath(name).read_bytes(), kind) for path, (name, kind) in _PAGES.items()}

    async def page(self, request: Request) -> Response:
        body, kind = self._pages[request.url.path]
        return Response(body, media_type=kind, headers=_NOT_KEPT)

    async def no_icon(self, request: Request) -> Response:
        """Browsers ask for one unasked."""
        return Response(status_code=204)

    async def session(self, request: Request) -> Response:
        """Hand the page its cookie for pictures; the token too, for a launch code is spent now."""
        await _object(request, set())
        gallery = self._gallery
        about = {
            "token": gallery.keys.token,
            "folder": str(gallery.index.folder),
            "renders": str(gallery.index.renders),
        }
        answer = JSONResponse(about, headers=_NOT_KEPT)
        answer.set_cookie(gallery.keys.cookie_name, gallery.keys.cookie_value, httponly=True, samesite="strict")
        return answer

    async def events(self, request: Request) -> Response:
        if self._gallery.streams >= MAX_STREAMS:
            raise UsageError(f"{MAX_STREAMS} pages are open already", "close some")
        return StreamingResponse(self._stream(), media_type="text/event-stream", headers=_NOT_KEPT)

    async def marks(self, request: Request) -> Response:
        value = await _object(request, {"marks"})
        marks = value["marks"]
        if not isinstance(marks, list) or not 0 < len(marks) <= MAX_MARKS:
            raise UsageError(f"marks are a list of 1 to {MAX_MARKS}")
        for mark in marks:
            if not isinstance(mark, dict) or set(mark) != {"id", "pick", "stars"} or not isinstance(mark["id"], str):
                raise UsageError("a mark is an object of id, pick and stars")
            if not isinstance(mark["pick"], str | None):
                raise UsageError("pick is pick, reject or null")
        for mark in marks:
            await run_in_threadpool(self._gallery.index.decide, mark["id"], mark["pick"], mark["stars"])
        return JSONResponse({"written": len(marks)}, headers=_NOT_KEPT)

    async def plan(self, request: Request) -> Response:
        settings = settings_from_object(await _object(request))
        foretold = await run_in_threadpool(plan, settings, self._gallery.index.picked())
        return JSONResponse({**foretold, "command": shown_command(self._words(settings))}, headers=_NOT_KEPT)

    async def render(self, request: Request) -> Response:
        settings = settings_from_object(await _object(request))
        count = len(self._gallery.index.picked())
        if not count:
            raise UsageError("nothing is picked", "press P on a picture")
        id = self._gallery.queue.submit(self._words(settings), count)
        return JSONResponse({"id": id}, headers=_NOT_KEPT)

    async def cancel(self, request: Request) -> Response:
        id = (await _object(request, {"id"}))["id"]
        if type(id) is not int:
            raise UsageError("id is a number")
        self._gallery.queue.cancel(id)
        return JSONResponse({"cancelled": id}, headers=_NOT_KEPT)

    async def thumbnail(self, request: Request) -> Response:
        index = self._gallery.index
        picture = index.picture(request.path_params["id"])
        if picture is None:
            return _missing()
        stamp = f"{picture.size_bytes}|{picture.changed_ns}"
        data = await run_in_threadpool(self._gallery.thumbnails.get, index.path(picture).absolute(), stamp)
        return Response(data, media_type="image/jpeg", headers=_KEPT)

    async def picture(self, request: Request) -> Response:
        picture = self._gallery.index.picture(request.path_params["id"])
        if picture is None:
            return _missing()
        try:
            file, size_bytes = open_picture(self._gallery.index.path(picture))
        except OSError:
            return _missing()
        headers = {**_KEPT, "content-length": str(size_bytes)}
        return StreamingResponse(_chunks(file, size_bytes), media_type="image/png", headers=headers)

    def _words(self, settings: Any) -> list[str]:
        index = self._gallery.index
        return rerender_words(settings, index.folder, index.renders, self._gallery.rerender_flags)

    async def _stream(self) -> AsyncIterator[bytes]:
        """Everything there is, then what changes, until the page or the gallery closes."""
        gallery = self._gallery
        gallery.streams += 1
        try:
            yield _event({"reset": True})
            seen, seen_queue, notice, beat = 0, -1, "", 0.0
            while not gallery.closing.is_set():
                seen, changed, gone = gallery.index.changes_since(seen)
                for start in range(0, len(changed), ITEMS_AT_ONCE):
                    yield _event({"items": changed[start : start + ITEMS_AT_ONCE]})
                if gone:
                    yield _event({"gone": gone})
                if notice != gallery.index.notice:
                    notice = gallery.index.notice
                    yield _event({"notice": notice})
                if seen_queue != gallery.queue.revision:
                    seen_queue = gallery.queue.revision
                    yield _event({"renders": gallery.queue.state()})
                beat += TELL_EVERY_S
                if beat >= BEAT_EVERY_S:
                    beat = 0.0
                    yield b": still here\n\n"
                await asyncio.sleep(TELL_EVERY_S)
        finally:
            gallery.streams -= 1


def _event(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def _chunks(file: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    with file:
        left = size_bytes
        while left and (chunk := file.read(min(CHUNK_BYTES, left))):
            left -= len(chunk)
            yield chunk


async def _object(request: Request, names: set[str] | None = None) -> dict[str, Any]:
    """The JSON object in the request's body; with `names`, of exactly those. Raises UsageError."""
    async with asyncio.timeout(BODY_WAIT_S):
        body = await request.body()
    try:
        value = strict_json(body.decode("utf-8"))
    except (UnicodeDecodeError, FluxsplitError):
        raise UsageError("the request is not JSON") from None
    if not isinstance(value, dict) or (names is not None and set(value) != names):
        raise UsageError(f"the request is not an object of {', '.join(sorted(names or ())) or 'settings'}")
    return value


def _missing() -> Response:
    return PlainTextResponse("there is no such picture", 404, headers=_NOT_KEPT)


async def _refused(request: Request, error: FluxsplitError) -> Response:
    return JSONResponse({"error": error.line()[:500]}, 400, headers=_NOT_KEPT)


async def _too_large(request: Request, error: BodyTooLarge) -> Response:
    return JSONResponse({"error": "the request is too large"}, 413, headers=_NOT_KEPT)


async def _too_slow(request: Request, error: TimeoutError) -> Response:
    return JSONResponse({"error": "the request took too long"}, 408, headers=_NOT_KEPT)
