"""`fluxsplit peek`: latent files → small previews, by a linear map in this process or by TAEF1 in one of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fluxsplit import places
from fluxsplit.arguments import check_device
from fluxsplit.cli_decode import gather_latents
from fluxsplit.errors import FluxsplitError, ModelFileMissing
from fluxsplit.executor import run_stage
from fluxsplit.jobs import PeekJob, absolute
from fluxsplit.latents import read_latents
from fluxsplit.peek import write_peek
from fluxsplit.progress import Progress
from fluxsplit.state_dict import SUFFIXES

TAEF1_NAMES = ("taef1_decoder", "taef1")


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
        out=absolute(values["out"]) if values.get("out") else "",
        overwrite=bool(values.get("overwrite", False)),
    )
    if weights:
        for event in run_stage("peek", job):
            progress.show(event)
    else:
        _linear(job, progress)
    return 1 if progress.failures else 0


def _linear(job: PeekJob, progress: Progress) -> None:
    for path in job.latents:
        try:
            for latent in read_latents(path):
                stem = Path(path).stem + (f"-{latent.index}" if latent.batch > 1 else "")
                made = write_peek(latent, Path(job.out or Path(path).parent), stem, job.overwrite)
                recipe = latent.recipe.to_object() if latent.recipe else None
                progress.show({"event": "result", "path": str(made), "recipe": recipe})
        except FluxsplitError as error:
            if len(job.latents) == 1:
                raise
            progress.failed(path, error.message, error.hint)


def find_taef1(wanted: str, comfyui: Path | None) -> str:
    """The file of TAEF1's decoder: named, or for `auto` in ComfyUI's `vae_approx` or the Hugging Face cache.

    Empty where `auto` finds none. Raises ModelFileMissing for a name that is nowhere.
    """
    path = Path(wanted).expanduser()
    if wanted != "auto" and path.is_file():
        return absolute(path)
    names = TAEF1_NAMES if wanted == "auto" else (Path(wanted).stem.lower(),)
    folders = places.comfyui_folders(comfyui, "vae_approx")
    for folder in folders:
        for file in places.weight_files(folder, suffixes=SUFFIXES):
            if file.stem.lower() in names:
                return absolute(file)
    if wanted != "auto":
        looked = ", ".join(map(str, folders)) or "no ComfyUI folder"
        raise ModelFileMissing(f"--decoder {wanted}: no such file, and none in {looked}", "use auto, linear, or a file")
    hub = places.hugging_face_hub(os.environ)
    cached = sorted(hub.glob("models--madebyollin--taef1/snapshots/*/diffusion_pytorch_model.safetensors"))
    return absolute(cached[0]) if cached else ""
