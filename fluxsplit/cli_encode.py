"""`fluxsplit encode`: pictures → the VAE → one encode stage, which writes a latent file for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fluxsplit import durable
from fluxsplit.arguments import (
    check_choice,
    check_device,
    files_in,
    gather_files,
    out_folder,
    parse_size,
    without_overviews,
)
from fluxsplit.cli_sample import wanted_files
from fluxsplit.executor import StageProcess
from fluxsplit.jobs import EncodeJob, absolute
from fluxsplit.memory import check_budget
from fluxsplit.metadata import as_rendered
from fluxsplit.models import demo_files, resolve_vae
from fluxsplit.picture_file import SUFFIXES
from fluxsplit.progress import Progress
from fluxsplit.recipe import DTYPES, ENCODE_FITS, LATENT_FORMATS
from fluxsplit.retry import events_with_retry


def encode(given: dict[str, Any], defaults: dict[str, Any], progress: Progress) -> int:
    """Plan and encode; returns the exit code."""
    job = plan_encode(given, defaults, progress)
    durable.check_folder(job.out)
    for event in encode_events(job, progress):
        progress.show(event)
    return 1 if progress.failures else 0


def plan_encode(given: dict[str, Any], defaults: dict[str, Any], progress: Progress) -> EncodeJob:
    """The job of a command from its flags and, where they are silent, the settings; raises FluxsplitError."""
    values = defaults | given
    width, height = parse_size(values["size"]) if values.get("size") else (0, 0)
    if given.get("model") and not given.get("vae"):  # a VAE of the settings does not overrule it
        values = {**values, "vae": ""}
    pictures = gather_files(
        values.get("pictures", []),
        lambda folder: as_rendered(files_in(folder, SUFFIXES, "picture")),
        "picture to encode",
    )
    job = EncodeJob(
        images=tuple(absolute(path) for path in without_overviews(pictures, progress.note)),
        vae="",
        out=out_folder(values, "latents"),
        device=check_device(values.get("device", "auto")),
        dtype=check_choice("vae-dtype", values.get("vae_dtype", "auto"), DTYPES),
        vram=check_budget(values.get("vram", "auto")),
        width=width,
        height=height,
        fit=check_choice("fit", values.get("fit", "cut"), ENCODE_FITS),
        format=check_choice("format", values.get("format", "pt"), LATENT_FORMATS),
        dry_run=bool(values.get("dry_run", False)),
    )
    if any(values.get(name) for name in ("vae", "model", "comfyui")):
        return replace(job, vae=resolve_vae(wanted_files(values)))
    progress.note("no --vae and no --model given: using the demo model's VAE")
    return replace(job, vae=demo_files().vae)


def encode_events(job: EncodeJob, progress: Progress) -> Iterator[dict[str, Any]]:
    """The events of an encode stage; where memory runs out, the rest is tried once more by a smaller plan."""
    with StageProcess("encode") as process:
        yield from events_with_retry(process, job, progress.note)
