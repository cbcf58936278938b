"""`fluxsplit info`: one report a file; a file that cannot be read is named and the rest go on."""

from __future__ import annotations

import sys
from pathlib import Path

from fluxsplit.arguments import files_in, gather_files
from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.found import read_found
from fluxsplit.found_text import FORMS, as_form
from fluxsplit.inspection import inspect
from fluxsplit.latents import SUFFIXES as LATENT_SUFFIXES
from fluxsplit.picture_file import SUFFIXES as PICTURE_SUFFIXES
from fluxsplit.places import WEIGHT_SUFFIXES

_SUFFIXES = tuple(dict.fromkeys((*PICTURE_SUFFIXES, *LATENT_SUFFIXES.values(), *WEIGHT_SUFFIXES)))
_OF_A_MODEL = ("model_index.json", "config.json")
"""A folder that holds one of these is a model in diffusers' layout, of which there is one report."""


def run_info(files: list[str], json: bool, form: str | None) -> int:
    """Print the reports; returns the exit code. `form` is one of `FORMS` for the recipe alone."""
    if form is not None and form not in FORMS:
        raise UsageError(f"--as {form} is not one of {', '.join(FORMS)}")
    failures, found = 0, dict[Path, None]()
    for name in files:
        try:
            found.update(dict.fromkeys(gather_files([name], _in_folder, "file to tell of")))
        except FluxsplitError as error:
            if len(files) < 2:
                raise
            failures += 1
            print(f"fluxsplit: {error.line()}", file=sys.stderr)
    paths = list(found)
    for number, path in enumerate(paths):
        try:
            text = _report(path, json, form)
        except FluxsplitError as error:
            if len(paths) == 1 and not failures:
                raise
            failures += 1
            print(f"fluxsplit: {error.line()}", file=sys.stderr)
            continue
        print("\n" * (number > 0 and not json and form is None) + text)
    return 1 if failures else 0


def _in_folder(folder: Path) -> list[Path]:
    if any((folder / name).is_file() for name in _OF_A_MODEL):
        return [folder]
    return files_in(folder, _SUFFIXES, "picture, latent or weight file")


def _report(path: Path, json: bool, form: str | None) -> str:
    if form is not None:
        return as_form(read_found(path), form, path.name)
    report = inspect(path)
    return report.to_json() if json else "\n".join(report.lines())
