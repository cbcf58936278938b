"""`fluxsplit preview`: prompts → one sample stage, one decode stage, numbered pictures and a sheet to choose from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxsplit.arguments import out_folder
from fluxsplit.cli_decode import plan_decode, require_vae, run_decode
from fluxsplit.cli_sample import DEMO_SIZE, is_demo, made_already, only_planned, plan_sample, without_made
from fluxsplit.executor import StageProcess
from fluxsplit.progress import Progress
from fluxsplit.recipe import LATENT_FORMATS
from fluxsplit.sample_plan import Plan
from fluxsplit.sample_run import run_sample, undecoded_told
from fluxsplit.sheet import write_sheets

FOLDER = "previews"
LATENTS = "latents"
"""Folder of the latents, below that of the pictures."""
SIZE = "512x512"
COUNT = 8
_NUMBER = re.compile(r"(\d{4,9})(?:-\d+)?\.(?:png|" + "|".join(LATENT_FORMATS) + ")", re.ASCII)


def preview(given: dict[str, Any], defaults: dict[str, Any], progress: Progress) -> int:
    """Plan and render, or show the plan; returns the exit code."""
    plan = plan_preview(given, defaults)
    require_vae(given, defaults | given, plan.files.is_demo)
    made = list[str]()
    if (defaults | given).get("skip_existing"):
        plan, made = _without_existing(plan, progress)
    if not plan.images and (not made or given.get("dry_run")):
        return 0
    if given.get("dry_run"):
        return only_planned(plan, given, progress)
    return run_preview(plan, given, defaults, progress, made)


def plan_preview(given: dict[str, Any], defaults: dict[str, Any]) -> Plan:
    """The plan of a command from its flags and the settings: small pictures, each with a free number."""
    size = DEMO_SIZE if is_demo(defaults | given) else SIZE
    values: dict[str, Any] = {"size": size, "count": COUNT, **defaults}
    if given.get("seed") and "count" not in defaults:
        values["count"] = 1  # seeds that are listed are the pictures that are wanted
    out = Path(out_folder(values | given, FOLDER))
    return _numbered(plan_sample({**given, "out": str(out / LATENTS)}, values))


def _numbered(plan: Plan) -> Plan:
    """The plan with a free number for each image."""
    first = next_number(Path(plan.out).parent)
    images = (replace(image, stem=f"{first + number:04d}") for number, image in enumerate(plan.images))
    return replace(plan, images=tuple(images))


def _without_existing(plan: Plan, progress: Progress) -> tuple[Plan, list[str]]:
    """The plan without what its folder holds already, and the latents among that which have no picture yet.

    Those that have one are told as results.
    """
    found, undecoded = made_already(plan, progress), list[str]()
    for path, recipe in found.values():
        picture = Path(plan.out).parent / f"{path.stem}.png"
        if picture.exists():
            progress.show({"event": "result", "path": str(picture), "recipe": recipe.to_object()})
        else:
            undecoded.append(str(path))
    return _numbered(without_made(plan, found)), undecoded


def run_preview(
    plan: Plan, given: dict[str, Any], defaults: dict[str, Any], progress: Progress, made: Sequence[str] = ()
) -> int:
    """Sample, decode that and the latents that are `made`, write the sheets; returns the exit code."""
    latents, pictures = list(made), Path(plan.out).parent
    with StageProcess("decode") as ahead:  # its imports overlap the sampling; it touches no device before its job
        with undecoded_told(latents, given, pictures, progress), _how_to_go_on(plan, given, latents, progress):
            if plan.images:
                run_sample(plan, progress, lambda event: latents.append(event["path"]))
        if not latents:
            return 1
        words: dict[str, Any] = {
            key: given[key] for key in ("model", "vae", "comfyui", "device", "vram", "vae_dtype") if key in given
        }
        decoding = plan_decode({**words, "latents": latents, "out": str(pictures)}, defaults)
        with undecoded_told(latents, given, pictures, progress), _sheets_of(pictures, progress):
            run_decode(decoding, progress, ahead)
    return 1 if progress.failures else 0


@contextmanager
def _how_to_go_on(plan: Plan, given: dict[str, Any], latents: list[str], progress: Progress) -> Iterator[None]:
    """Where it is ended early, say how the rest is made without what is finished."""
    try:
        yield
    except BaseException:
        if latents:
            seeds = {image.seed for image in plan.images}
            # where seeds are given, only those are rendered
            drawn = "" if given.get("seed") else f"--seed {min(seeds)} -n {len(seeds)} and "
            progress.note(f"the same command with {drawn}--skip-existing goes on")
        raise


@contextmanager
def _sheets_of(pictures: Path, progress: Progress) -> Iterator[None]:
    """Write the sheets afterwards, of what there is by then if it is ended early."""
    try:
        yield
    finally:
        if (sheet := write_sheets(pictures)) is not None:
            progress.note(f"to choose: open {sheet}, or run fluxsplit gallery {pictures}")


def next_number(folder: Path) -> int:
    """The first number above those of the pictures and latents in a folder of previews, from 1."""
    return max(_numbers((folder, folder / LATENTS)), default=0) + 1


def _numbers(folders: Iterable[Path]) -> Iterable[int]:
    for place in folders:
        with suppress(OSError):
            for file in place.iterdir():
                if match := _NUMBER.fullmatch(file.name):
                    yield int(match[1])
