"""Which pictures a rerender is made from, and where their latents are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fluxsplit.arguments import is_overview, is_passed_over, named, read_names, without_overviews
from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.latents import SUFFIXES, read_latent
from fluxsplit.metadata import ImageRecord, as_rendered, read_record
from fluxsplit.picks import read_picks

LATENTS = "latents"
ENCODED = "encoded"
"""Folder below it, of pictures that had no latent any more."""
PICKS_FOLDER = "previews"
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def gather(values: Mapping[str, Any], note: Callable[[str], None]) -> list[Path]:
    """The pictures and latents that are named: files, globs, folders, picks, and the lines of stdin for `-`.

    `note` is told what of a folder is left out.
    """
    files: dict[Path, None] = {}
    for name in (*values.get("images", ()), *values.get("from", ())):
        for word in read_names() if name == "-" else [name]:
            files.update(dict.fromkeys(_named(word, note)) if word else {})
    if values.get("from_picks"):
        files.update(dict.fromkeys(_picked(Path(values["from_picks"]).expanduser())))
    if not files:
        raise UsageError("there is no picture to render again", "name some with --from, or use --from-picks")
    return without_overviews(list(files), note)


def _named(word: str, note: Callable[[str], None]) -> list[Path]:
    path = Path(word).expanduser()
    if path.is_dir():
        suffixes = (*_PICTURES, *SUFFIXES.values())
        try:
            files = sorted(path.iterdir())
        except OSError:
            return [path]  # its reader says so, and the others go on
        held = [file for file in files if file.suffix.lower() in suffixes and not is_passed_over(file)]
        if not held:
            raise UsageError(f"{path} holds no picture and no latent", f"they end in {', '.join(suffixes)}")
        rendered = as_rendered(held)
        if left := len(held) - len(rendered):
            what = "1 enlarged copy is" if left == 1 else f"{left} enlarged copies are"
            note(f"{path}: {what} left out; name them to render them again")
        return rendered
    matching = named(word)
    if matching == [path]:
        return matching
    return [file for file in matching if file.is_file() and not is_overview(file)]


def _picked(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"--from-picks {folder}: there is no such folder", "make previews first, or name their folder")
    picked = [folder / name for name, pick in read_picks(folder).items() if pick.pick == "pick"]
    if not picked:
        raise UsageError(f"nothing is picked in {folder}", f"choose with fluxsplit gallery {folder}")
    return sorted(picked)


def record_of(source: Path) -> ImageRecord | None:
    """What a PNG of ours says of itself; None for other files."""
    with suppress(FluxsplitError):
        return read_record(source)
    return None


def find_latent(source: Path, stems: Iterable[str], sha256: str) -> str:
    """A latent of that SHA-256 among those of these names in the folders where ours are kept."""
    here = source.absolute().parent
    folders = (
        here / LATENTS,
        here.parent / LATENTS,
        here.parent / PICKS_FOLDER / LATENTS,
        here / LATENTS / ENCODED,
        here,
    )
    for stem in stems:
        for folder in folders:
            for suffix in SUFFIXES.values():
                path = folder / f"{stem}{suffix}"
                if path.is_file() and latent_sha256(str(path)) == sha256:
                    return str(path)
    return ""


def latent_sha256(latent: str) -> str:
    """Of a latent file's payload; empty where there is none."""
    if latent:
        with suppress(FluxsplitError):
            return read_latent(latent).payload_sha256
    return ""
