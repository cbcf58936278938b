"""What one stage process is asked to do: frozen dataclasses that cross the process boundary as JSON.

Only paths, numbers and text cross it, never a tensor. A job comes from the parent process, not from
strangers, so reading one back is plain.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fluxsplit.recipe import Parent
from fluxsplit.start import NoiseGrid, Start


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where each part of a Flux model is. Several parts may be the same all-in-one file."""

    transformer: str
    text_encoder: str = ""
    """T5; empty where a saved conditioning makes it needless."""
    clip: str = ""
    vae: str = ""
    t5_tokenizer: str = ""
    """Path of T5's `tokenizer.json`."""
    clip_tokenizer: str = ""
    """Folder that holds CLIP's `vocab.json` and `merges.txt`."""
    is_demo: bool = False


@dataclass(frozen=True, slots=True)
class ImageJob:
    """One picture to sample. None stands for the model's own default."""

    prompt: str
    conditioning: str
    """Path of the conditioning file made from the prompt."""
    seed: int
    width: int
    height: int
    steps: int | None = None
    guidance: float | None = None
    cfg: float = 1.0
    negative: str = ""
    negative_conditioning: str = ""
    conditioning_sha256: str = ""
    """Of the tensors in a file that the person named; empty for one that is made for this job, or kept by us."""
    sampler: str = "euler"
    scheduler: str = "simple"
    sigmas: tuple[float, ...] = ()
    """Given noise levels; empty for the scheduler's."""
    shift: float | None = None
    """mu; None for the model's own rule (`auto`)."""
    noise_index: int = 0
    recorded_sigmas: tuple[float, ...] = ()
    """Noise levels as a recipe recorded them for its scheduler, steps and shift; they hold to the last bit."""
    start: Start | None = None
    """What is kept of another picture."""
    start_latent: str = ""
    """Latent file of that picture."""
    parent: Parent | None = None
    """The picture that this is a rerender of."""
    stem: str = ""
    """Name of the latent file without suffix; empty for time, seed and prompt."""


@dataclass(frozen=True, slots=True)
class SampleJob:
    """Sample every image with one load of the transformer; each becomes a latent file in `out`."""

    images: tuple[ImageJob, ...]
    files: ModelFiles
    out: str
    format: str
    dtype: str
    device: str
    peek: bool = False
    """Write a preview beside each latent."""
    peek_steps: bool = False
    """Write a preview after each step, in place of the last."""
    vram: str = "auto"
    """Memory that may be used: `8G`, `75%` of what is free, or `auto`."""
    retried: str = ""
    """The plan that ran out of memory before this one, for people; empty at the first try."""


@dataclass(frozen=True, slots=True)
class TextJob:
    """Encode prompts with T5 and CLIP; each result is a conditioning file (safetensors: t5, pooled)."""

    prompts: tuple[str, ...]
    outputs: tuple[str, ...]
    """One path for each prompt."""
    text_encoder: str
    clip: str
    t5_tokenizer: str
    clip_tokenizer: str
    device: str
    vram: str = "auto"
    then: SampleJob | None = None
    """What is sampled with them; refused before anything is encoded, if the memory does not suffice for it."""


@dataclass(frozen=True, slots=True)
class DeviceJob:
    """Say what the device is, and how fast on the shapes of a model and with its file."""

    device: str
    dtype: str
    path: str
    weight_bytes: int
    parameters: int
    hidden: int
    head: int
    tokens: int


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """Decode every latent file with one load of the VAE; each becomes a PNG in `out`."""

    latents: tuple[str, ...]
    vae: str
    out: str
    device: str
    dtype: str = "auto"
    overwrite: bool = False
    delete_latents: bool = False
    vram: str = "auto"
    tile: int = 0
    """Side of overlapped tiles in pixels; 0 for exact strips."""
    smaller: int = 0
    """How often a plan ran out of memory before."""
    dry_run: bool = False
    """Say what would be made and how, and make nothing."""


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """Encode every picture with one load of the VAE; each becomes a latent file in `out`."""

    images: tuple[str, ...]
    vae: str
    out: str
    device: str
    dtype: str = "auto"
    vram: str = "auto"
    width: int = 0
    """Pixels that every picture is resized to; 0 to take it as it is, cut to multiples of 8."""
    height: int = 0
    fit: str = "cut"
    """One of `recipe.ENCODE_FITS`: what is done where that is another aspect ratio."""
    format: str = "pt"
    smaller: int = 0
    """How often a plan ran out of memory before."""
    dry_run: bool = False
    """As for `DecodeJob`."""


@dataclass(frozen=True, slots=True)
class UpscaleJob:
    """Enlarge every picture with one load of the network; each becomes a PNG."""

    images: tuple[str, ...]
    weights: str
    device: str
    factor: int = 0
    """How much larger; 0 for as much as the network makes it."""
    width: int = 0
    """The size at the end, in pixels, whatever the network makes; 0 for none given."""
    height: int = 0
    out: str = ""
    """A folder; empty for that of each picture."""
    dtype: str = "auto"
    vram: str = "auto"
    tile: int | None = None
    """Side in pixels, 0 for no tiles, None for as large as the memory allows."""
    overwrite: bool = False
    published_sha256: str = ""
    """What a file of this name should have; empty where that is not known."""
    smaller: int = 0
    """How often a plan ran out of memory before."""
    dry_run: bool = False
    """As for `DecodeJob`."""


@dataclass(frozen=True, slots=True)
class PeekJob:
    """Draw every latent by TAEF1's decoder."""

    latents: tuple[str, ...]
    weights: str
    device: str
    out: str = ""
    """A folder; empty for that of each latent."""
    overwrite: bool = False


Job = TextJob | SampleJob | DecodeJob | EncodeJob | UpscaleJob | PeekJob | DeviceJob
STAGES: dict[str, type[Job]] = {
    "text": TextJob,
    "sample": SampleJob,
    "decode": DecodeJob,
    "encode": EncodeJob,
    "upscale": UpscaleJob,
    "peek": PeekJob,
    "device": DeviceJob,
}


def job_to_json(job: Job) -> str:
    """One line of JSON that `job_from_json` reads back."""
    return json.dumps(asdict(job))


def job_from_json(stage: str, text: str) -> Job:
    """The job of `stage` in `text`; raises KeyError or TypeError where the parent and the stage disagree."""
    table = json.loads(text)
    if stage in ("encode", "upscale"):
        return STAGES[stage](**{**table, "images": tuple(table["images"])})
    if stage == "sample":
        return _sample_job(table)
    if stage == "text" and table["then"] is not None:
        table["then"] = _sample_job(table["then"])
    for name in ("prompts", "outputs", "latents"):
        if name in table:
            table[name] = tuple(table[name])
    return STAGES[stage](**table)


def _sample_job(table: dict[str, Any]) -> SampleJob:
    files, images = ModelFiles(**table["files"]), tuple(_image(image) for image in table["images"])
    return SampleJob(**{**table, "files": files, "images": images})


def _image(table: dict[str, Any]) -> ImageJob:
    start = table["start"]
    if start is not None:
        start = Start(**{**start, "noise": tuple(NoiseGrid(**grid) for grid in start["noise"])})
    levels = {name: tuple(table[name]) for name in ("sigmas", "recorded_sigmas")}
    parent = None if table["parent"] is None else Parent(**table["parent"])
    return ImageJob(**{**table, **levels, "start": start, "parent": parent})


def absolute(path: str | Path) -> str:
    """An absolute path without resolving links, so that a stage need not run where the command ran."""
    return str(Path(path).expanduser().absolute())
