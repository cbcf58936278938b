"""`fluxsplit export`: copies of pictures that fit where they are to be shown."""

from __future__ import annotations

import sys
from pathlib import Path

from fluxsplit.arguments import check_choice
from fluxsplit.errors import FluxsplitError
from fluxsplit.export import TARGETS, export_picture


def run_export(files: list[str], target: str, out: str, ai_mark: bool) -> int:
    """Write the copies, printing their paths; returns the exit code. One that fails does not stop the rest."""
    check_choice("for", target, TARGETS)
    failures = 0
    for file in files:
        try:
            for path in export_picture(Path(file).expanduser(), target, Path(out).expanduser(), ai_mark):
                print(path)
        except FluxsplitError as error:
            if len(files) == 1:
                raise
            failures += 1
            print(f"fluxsplit: {error.line()}", file=sys.stderr)
    return 1 if failures else 0
