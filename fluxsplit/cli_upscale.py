"""`fluxsplit upscale` and `decode --upscale`: pictures → which weights → one upscale stage."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxsplit import durable, places
from fluxsplit.arguments import (
    check_choice,
    check_device,
    check_names_differ,
    files_in,
    gather_files,
    out_folder,
    without_overviews,
)
from fluxsplit.errors import UsageError
from fluxsplit.executor import StageProcess
from fluxsplit.fingerprint import weights_sha256
from fluxsplit.jobs import UpscaleJob, absolute
from fluxsplit.memory import check_budget
from fluxsplit.metadata import is_enlarged
from fluxsplit.picture_file import SUFFIXES
from fluxsplit.progress import Progress
from fluxsplit.recipe import DTYPES
from fluxsplit.rerender_sources import record_of
from fluxsplit.retry import events_with_retry
from fluxsplit.upscalers import Chosen, choose

MAX_SIDE_PX = 65535
MIN_TILE_PX = 16


@dataclass(frozen=True, slots=True)
class UpscaleOptions:
    """How pictures are to be enlarged: a job without its pictures, and a line to say when it is done."""

    job: UpscaleJob
    note: str = ""


def upscale(given: dict[str, Any], defaults: dict[str, Any], progress: Progress) -> int:
    """Plan and enlarge; returns the exit code."""
    values = defaults | given
    pictures = gather_files(values.get("pictures", []), _not_enlarged, "picture to enlarge")
    pictures = without_overviews(pictures, progress.note)
    options = upscale_options({"upscale": "2", **values}, progress)
    if options.job.overwrite:
        check_names_differ(pictures, options.job.out)
    for folder in {options.job.out or str(Path(picture).parent) for picture in pictures}:
        durable.check_folder(folder)
    upscale_paths(pictures, options, progress)
    return 1 if progress.failures else 0


def upscale_options(values: dict[str, Any], progress: Progress) -> UpscaleOptions:
    """What the settings `upscale`, `upscale_to`, `tile`, `fetch` and the like mean; finds or fetches the weights.

    Raises UsageError for a value that cannot be used, ModelFileMissing where the weights are nowhere.
    """
    width, height = parse_target(values["upscale_to"]) if values.get("upscale_to") else (0, 0)
    job = UpscaleJob(
        images=(),
        weights="",
        device=check_device(values.get("device", "auto")),
        width=width,
        height=height,
        out=out_folder(values),
        dtype=check_choice("dtype", values.get("dtype", "auto"), DTYPES),
        vram=check_budget(str(values.get("vram", "auto"))),
        tile=_tile(values),
        overwrite=bool(values.get("overwrite", False)),
        dry_run=bool(values.get("dry_run", False)),
    )

    def on_bytes(name: str, done_bytes: int, total_bytes: int) -> None:
        progress.show({"event": "load", "what": name, "done_bytes": done_bytes, "total_bytes": total_bytes})

    comfyui = places.comfyui_root(values.get("comfyui", ""))
    fetch = bool(values.get("fetch", False))
    if fetch and job.dry_run:
        progress.note("a dry run fetches no weights: this is what would be done with those that are here")
        fetch = False
    chosen = choose(str(values["upscale"]), comfyui, fetch, on_bytes)
    return UpscaleOptions(_with_weights(job, chosen), chosen.note)


def enlarging(given: dict[str, Any], defaults: dict[str, Any], progress: Progress) -> UpscaleOptions | None:
    """How what another command makes is to be enlarged, beside it; None where that is not asked for.

    `dtype`, `tile` and `out` are of that command's own work.
    """
    values = defaults | given
    if not (values.get("upscale") or values.get("upscale_to")):
        if given.get("upscale_tile") is not None:
            raise UsageError("--upscale-tile has no effect: nothing is enlarged", "give --upscale as well, or drop it")
        return None
    wanted = {key: value for key, value in values.items() if key not in ("dtype", "tile", "out")}
    return upscale_options({"upscale": "2", **wanted}, progress)


def enlarge(pictures: Sequence[str], options: UpscaleOptions, progress: Progress) -> None:
    """Enlarge what another command made; what is there already, from the same pictures, is told and left."""
    there = {picture: "" if options.job.overwrite else _enlarged(picture, options.job) for picture in pictures}
    for picture, enlarged in there.items():
        if enlarged:
            tell_there(enlarged, picture, progress)
    upscale_paths([picture for picture, enlarged in there.items() if not enlarged], options, progress)


def _enlarged(picture: str, job: UpscaleJob) -> str:
    """The picture that would be made of this one by enlarging it, if it is there; else empty."""
    path, own = Path(picture), record_of(Path(picture))
    for file in sorted(path.parent.glob(f"{glob.escape(path.stem)}-*.png")) if own is not None else ():
        record = record_of(file)
        if record is None or len(record.upscaler) != 1 or replace(record, upscaler=()) != own:
            continue
        (stamp,) = record.upscaler
        size = own.recipe and (own.recipe.width * job.factor, own.recipe.height * job.factor)
        wanted = (job.width, job.height) if job.width else size if job.factor else (stamp.width, stamp.height)
        if (stamp.width, stamp.height) == wanted and stamp.sha256 == weights_sha256(job.weights):
            return str(file)
    return ""


def tell_there(picture: str, source: str, progress: Progress) -> None:
    """Say that a picture need not be made again; it is a result all the same, with what a new one would say."""
    record = record_of(Path(picture))
    recipe = record.recipe if record is not None else None
    sized = record.upscaler[-1] if record is not None and record.upscaler else recipe
    size = {} if sized is None else {"width": sized.width, "height": sized.height}
    progress.note(f"{Path(picture).name} is there already, made with these settings")
    told = {"event": "result", "path": picture, "source": source, "recipe": recipe and recipe.to_object()}
    progress.show(told | size)


def _with_weights(job: UpscaleJob, chosen: Chosen) -> UpscaleJob:
    sha256 = chosen.published.sha256 if chosen.published else ""
    return replace(job, weights=chosen.path, factor=chosen.factor, published_sha256=sha256)


def upscale_paths(paths: Sequence[str | Path], options: UpscaleOptions, progress: Progress) -> list[str]:
    """Enlarge pictures in a process of its own and show its events; returns the paths of what was made.

    A picture that fails is told to `progress`, and the rest go on. Raises what the stage raises.
    """
    if not paths:
        return []
    if options.note:
        progress.note(options.note)
    before = len(progress.results)
    job = replace(options.job, images=tuple(absolute(path) for path in paths))
    with StageProcess("upscale") as process:
        for event in events_with_retry(process, job, progress.note):
            progress.show(event)
    return progress.results[before:]


def _not_enlarged(folder: Path) -> list[Path]:
    """The pictures in a folder that were not enlarged before, so that a second run does not enlarge its own results."""
    fresh = [file for file in files_in(folder, SUFFIXES, "picture") if not is_enlarged(file)]
    if not fresh:
        raise UsageError(f"all pictures in {folder} were enlarged before", "name those that are to be enlarged again")
    return fresh


def parse_target(text: str) -> tuple[int, int]:
    """Width and height of `WxH`, which need be no multiples of anything; raises UsageError."""
    width, cross, height = text.lower().replace("×", "x").partition("x")
    if not (cross and width.strip().isdecimal() and height.strip().isdecimal()):
        raise UsageError(f"--upscale-to {text!r} is not WIDTHxHEIGHT", "write it as 3840x2160")
    size = int(width), int(height)
    if not all(1 <= side <= MAX_SIDE_PX for side in size):
        raise UsageError(f"--upscale-to {text!r} is outside 1..{MAX_SIDE_PX} pixels")
    return size


def _tile(values: dict[str, Any]) -> int | None:
    flag = "upscale_tile" if "upscale_tile" in values else "tile"
    return parse_tile(values.get(flag, "auto"), flag.replace("_", "-"))


def parse_tile(text: str | int, flag: str = "tile") -> int | None:
    """Side of the tiles in pixels, 0 for none, None for `auto`; raises UsageError."""
    if str(text) == "auto":
        return None
    if not str(text).isdecimal() or (int(text) != 0 and not MIN_TILE_PX <= int(text) <= MAX_SIDE_PX):
        hint = f"use auto, 0 for none, or {MIN_TILE_PX}..{MAX_SIDE_PX}"
        raise UsageError(f"--{flag} {str(text)[:40]!r} is no side of a tile in pixels", hint)
    return int(text)
