"""`fluxsplit gallery`: checks, the server, and the browser that shows its page."""

from __future__ import annotations

import os
import shlex
import sys
import threading
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from typer.exceptions import TyperException

from fluxsplit.errors import UsageError

FOLDER = "previews"
RENDERS = "renders"
INSTALL = 'install them with: pip install "fluxsplit[gallery]"'


def run_gallery(given: dict[str, Any], check_rerender: Callable[[Sequence[str]], object]) -> int:
    """Serve the gallery until Ctrl-C; its address is printed on stdout.

    `check_rerender` raises where these are no flags of `rerender`. Raises FluxsplitError.
    """
    folder = Path(given.get("folder", FOLDER)).expanduser()
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", 'make previews first: fluxsplit preview --prompt "..."')
    next(folder.iterdir(), None)  # one that cannot be read is refused at once
    renders = Path(given.get("renders", RENDERS)).expanduser()
    if renders.exists() and not renders.is_dir():
        raise UsageError(f"--renders {renders} is not a folder")
    flags = _rerender_flags(given.get("rerender", ""))
    try:
        check_rerender(flags)
    except TyperException as error:
        raise UsageError(
            f"--rerender {given.get('rerender', '')!r}: {error}", "see fluxsplit rerender --help"
        ) from None
    try:
        from fluxsplit.gallery import address, open_gallery, serve, server  # noqa: PLC0415  an extra
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "fluxsplit":
            raise
        raise UsageError(f"the gallery needs starlette and uvicorn, and {error.name} is missing", INSTALL) from None
    gallery, bound = open_gallery(folder.absolute(), renders.absolute(), int(given.get("port", 0)), flags)
    print(address(gallery, gallery.keys.token), flush=True)
    print("fluxsplit: the gallery runs until Ctrl-C", file=sys.stderr)
    if not given.get("no_open"):
        opener = threading.Timer(0.3, webbrowser.open, (address(gallery, gallery.keys.launch_code()),))
        opener.daemon = True
        opener.start()
    with suppress(KeyboardInterrupt):  # which is how it is meant to end
        serve(gallery, bound, server(gallery))
    return 0


def _rerender_flags(text: str) -> tuple[str, ...]:
    try:
        words = shlex.shlex(text, posix=True, punctuation_chars=False)
        words.whitespace_split, words.commenters = True, ""
        if os.name == "nt":
            words.escape = ""  # a backslash is a part of a path there
        return tuple(words)
    except ValueError as error:
        raise UsageError(f"--rerender {text!r} cannot be split into flags: {error}") from None
