"""`fluxsplit export`: copies of pictures that fit where they are to be shown."""

from __future__ import annotations

from pathlib import Path

from fluxsplit.arguments import check_choice, files_in, gather_files, out_folder, without_overviews
from fluxsplit.errors import FluxsplitError, ends_all
from fluxsplit.export import TARGETS, export_picture
from fluxsplit.found import read_found
from fluxsplit.jobs import absolute
from fluxsplit.picture_file import SUFFIXES
from fluxsplit.progress import Progress


def run_export(files: list[str], target: str, out: str, ai_mark: bool, progress: Progress) -> int:
    """Write the copies, telling their paths; returns the exit code. One that fails does not stop the rest."""
    check_choice("for", target, TARGETS)
    sources = gather_files(files, lambda folder: files_in(folder, SUFFIXES, "picture"), "picture to export")
    sources = without_overviews(sources, progress.note)
    folder = Path(out_folder({"out": out}))
    for source in sources:
        try:
            for path in export_picture(source, target, folder, ai_mark):
                progress.show({"event": "result", "path": str(path), "source": absolute(source), "recipe": None})
            if target == "civitai" and read_found(source).tool is None:
                progress.note(f"{source.name} does not say how it was made, so its copy says no parameters")
        except FluxsplitError as error:
            if len(sources) == 1 or ends_all(error):
                raise
            progress.failed(absolute(source), error.message, error.hint)
    return 1 if progress.failures else 0
