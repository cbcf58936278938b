"""Finds TAEF1, the distilled decoder of FLUX.1's latents, and draws peeks of written latents with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fluxsplit import places
from fluxsplit.errors import FluxsplitError, ModelFileMissing
from fluxsplit.executor import run_stage
from fluxsplit.jobs import PeekJob, absolute
from fluxsplit.latents import read_latents
from fluxsplit.peek import write_peek
from fluxsplit.progress import Progress
from fluxsplit.state_dict import SUFFIXES

NAMES = ("taef1_decoder", "taef1")


def find_taef1(wanted: str, comfyui: Path | None) -> str:
    """The file of TAEF1's decoder: named, or for `auto` in ComfyUI's `vae_approx` or the Hugging Face cache.

    Empty where `auto` finds none. Raises ModelFileMissing for a name that is nowhere.
    """
    path = Path(wanted).expanduser()
    if wanted != "auto" and path.is_file():
        return absolute(path)
    names = NAMES if wanted == "auto" else (Path(wanted).stem.lower(),)
    folders = places.comfyui_folders(comfyui, "vae_approx")
    for folder in folders:
        for file in places.weight_files(folder, suffixes=SUFFIXES):
            if file.stem.lower() in names:
                return absolute(file)
    if wanted != "auto":
        looked = f", and none in {', '.join(map(str, folders))}" if folders else ""
        raise ModelFileMissing(f"--decoder {wanted}: there is no such file{looked}", "use auto, linear, or a file")
    hub = places.hugging_face_hub(os.environ)
    cached = sorted(hub.glob("models--madebyollin--taef1/snapshots/*/diffusion_pytorch_model.safetensors"))
    return absolute(cached[0]) if cached else ""


def peek_beside(latents: Sequence[str], weights: str, device: str, progress: Progress) -> None:
    """Write a peek beside each latent; what cannot be drawn is noted, since the latents themselves are there."""
    if not latents:
        return
    left = list(latents)
    try:
        for event in run_stage("peek", PeekJob(tuple(latents), weights, device)):
            if event["event"] == "failed":
                progress.note(f"no preview: {event['message']}")
            elif event["event"] == "decode":
                progress.show(event)
                left = list(latents[int(event["done"]) :])
    except FluxsplitError as error:
        progress.note(of_no_use(weights, error))
        for path in left:
            with suppress(FluxsplitError):  # the next latent will say so
                for latent in read_latents(path):
                    write_peek(latent, Path(path).parent, latent.stem)


def of_no_use(weights: str, error: FluxsplitError) -> str:
    """A line for the person."""
    return f"{Path(weights).name} is of no use here, so the linear map draws: {error.message}"
