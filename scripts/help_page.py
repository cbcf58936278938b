"""Writes docs/help.md from `--help`, so that the page cannot say anything else: `python scripts/help_page.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "help.md"
COMMANDS = (
    "",
    "sample",
    "preview",
    "rerender",
    "peek",
    "decode",
    "upscale",
    "encode",
    "gallery",
    "info",
    "export",
    "run",
)


def page() -> str:
    """The help of every command, as Markdown."""
    parts = ["# Commands\n\nMade by `python scripts/help_page.py`.\n"]
    for command in COMMANDS:
        words = [sys.executable, "-m", "fluxsplit", *command.split(), "--help"]
        environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
        text = subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout
        lines = "\n".join(
            line.rstrip() for line in text.replace("python -m fluxsplit", "fluxsplit").strip().splitlines()
        )
        parts.append(f"## fluxsplit {command}".rstrip() + f"\n\n```\n{lines}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
