"""`fluxsplit info`: one report a file; a file that cannot be read is named and the rest go on."""

from __future__ import annotations

import sys
from pathlib import Path

from fluxsplit.arguments import named
from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.found import read_found
from fluxsplit.found_text import FORMS, as_form
from fluxsplit.inspection import inspect


def run_info(files: list[str], json: bool, form: str | None) -> int:
    """Print the reports; returns the exit code. `form` is one of `FORMS` for the recipe alone."""
    if form is not None and form not in FORMS:
        raise UsageError(f"--as {form} is not one of {', '.join(FORMS)}")
    failures, paths = 0, [path for file in files for path in named(file)]
    for number, path in enumerate(paths):
        try:
            text = _report(path, json, form)
        except FluxsplitError as error:
            if len(paths) == 1:
                raise
            failures += 1
            print(f"fluxsplit: {error.line()}", file=sys.stderr)
            continue
        print("\n" * (number > 0 and not json and form is None) + text)
    return 1 if failures else 0


def _report(path: Path, json: bool, form: str | None) -> str:
    if form is not None:
        return as_form(read_found(path), form, path.name)
    report = inspect(path)
    return report.to_json() if json else "\n".join(report.lines())
