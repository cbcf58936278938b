"""`fluxsplit peek`: latent files → small previews, by a linear map in this process or by TAEF1 in one of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxsplit import places
from fluxsplit.arguments import check_device, check_names_differ, out_folder
from fluxsplit.cli_decode import gather_latents
from fluxsplit.errors import FluxsplitError, ends_all
from fluxsplit.executor import run_stage
from fluxsplit.jobs import PeekJob, absolute
from fluxsplit.latents import read_latents
from fluxsplit.peek import write_peek
from fluxsplit.progress import Progress
from fluxsplit.taef1 import find_taef1, of_no_use


def peek(given: dict[str, Any], defaults: dict[str, Any], progress: Progress) -> int:
    """Write a preview of every latent; returns the exit code. Raises FluxsplitError where none can be made."""
    values = defaults | given
    files = gather_latents(values.get("latents", []))
    decoder = str(values.get("decoder", "auto"))
    weights = "" if decoder == "linear" else find_taef1(decoder, places.comfyui_root(values.get("comfyui", "")))
    job = PeekJob(
        latents=tuple(absolute(file) for file in files),
        weights=weights,
        device=check_device(values.get("device", "auto")),
        out=out_folder(values),
        overwrite=bool(values.get("overwrite", False)),
    )
    if job.overwrite:
        check_names_differ(job.latents, job.out)
    if weights:
        _by_taef1(job, progress, may_fail=decoder == "auto")
    else:
        _linear(job, progress)
    return 1 if progress.failures else 0


def _by_taef1(job: PeekJob, progress: Progress, *, may_fail: bool) -> None:
    """By a decoder that was named, or by one that was found, in whose place the linear map does too."""
    done: set[str] = set()
    try:
        for event in run_stage("peek", job):
            progress.show(event)
            if event["event"] in ("result", "failed"):
                done.add(str(event.get("source") or event.get("item")))
    except FluxsplitError as error:
        if not may_fail:
            raise
        progress.note(of_no_use(job.weights, error))
        _linear(replace(job, latents=tuple(path for path in job.latents if path not in done)), progress)


def _linear(job: PeekJob, progress: Progress) -> None:
    for path in job.latents:
        try:
            for latent in read_latents(path):
                made = write_peek(latent, Path(job.out or Path(path).parent), latent.stem, job.overwrite)
                recipe = latent.recipe.to_object() if latent.recipe else None
                progress.show({"event": "result", "path": str(made), "source": path, "recipe": recipe})
        except FluxsplitError as error:
            if len(job.latents) == 1 or ends_all(error):
                raise
            progress.failed(path, error.message, error.hint)
