"""`fluxsplit preview`: prompts → one sample stage, one decode stage, numbered pictures and a sheet to choose from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxsplit.arguments import out_folder
from fluxsplit.cli_decode import plan_decode, require_vae, run_decode
from fluxsplit.cli_sample import DEMO_SIZE, is_demo, only_planned, plan_sample
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
    if given.get("dry_run"):
        return only_planned(plan, given, progress)
    return run_preview(plan, given, defaults, progress)


def plan_preview(given: dict[str, Any], defaults: dict[str, Any]) -> Plan:
    """The plan of a command from its flags and the settings: small pictures, each with a free number."""
    size = DEMO_SIZE if is_demo(defaults | given) else SIZE
    values: dict[str, Any] = {"size": size, "count": COUNT, **defaults}
    if given.get("seed") and "count" not in defaults:
        values["count"] = 1  # seeds that are listed are the pictures that are wanted
    out = Path(out_folder(values | given, FOLDER))
    plan = plan_sample({**given, "out": str(out / LATENTS)}, values)
    first = next_number(out)
    images = (replace(image, stem=f"{first + number:04d}") for number, image in enumerate(plan.images))
    return replace(plan, images=tuple(images))


def run_preview(plan: Plan, given: dict[str, Any], defaults: dict[str, Any], progress: Progress) -> int:
    """Sample, decode, write the sheets; returns the exit code."""
    latents, pictures = list[str](), Path(plan.out).parent
    with StageProcess("decode") as ahead:  # its imports overlap the sampling; it touches no device before its job
        with undecoded_told(latents, given, pictures, progress):
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
