"""The upscale stage: one load of the network, every picture enlarged and written with its texts and the upscaler's."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from fluxsplit import durable, metadata, picture_file
from fluxsplit.beside import thread_beside
from fluxsplit.device import DTYPE_NAMES, device_info, has_fast_bf16, pick_device
from fluxsplit.device import DTYPES as TORCH_DTYPES
from fluxsplit.errors import FluxsplitError
from fluxsplit.events import Events
from fluxsplit.fingerprint import weights_stamp
from fluxsplit.jobs import UpscaleJob
from fluxsplit.memory import budget_bytes
from fluxsplit.metadata import UpscalerStamp
from fluxsplit.picture_file import Picture
from fluxsplit.recipe import WeightsStamp
from fluxsplit.single_files import Failures, tell_planned
from fluxsplit.tiles import largest_tile
from fluxsplit.upscale import Tiling, Upscaler, enlarge, tile_count

MAX_OUTPUT_PIXELS = 1 << 30
"""3 GB of bytes; PNG itself would allow more."""


@dataclass(frozen=True, slots=True)
class _Run:
    job: UpscaleJob
    network: Upscaler
    stamp: Future[WeightsStamp]
    events: Events


def run(job: UpscaleJob, events: Events) -> None:
    """Enlarge `job.images`; one that fails is reported and the rest go on. Raises OutOfMemory."""
    device = pick_device(job.device)
    with thread_beside() as hashing:
        network = _loaded(job, device)
        stamp = hashing.submit(weights_stamp, job.weights)
        here = _Run(job, network, stamp, events)
        if job.published_sha256 and stamp.result().sha256 != job.published_sha256:
            events.send("note", text=f"{network.name} is not the file that Real-ESRGAN published under this name")
        if job.dry_run:
            _foretell(here)
            return
        failures = Failures(events)
        for number, path in enumerate(job.images):
            network.compute_in(_dtype(job, network, device))  # a picture before may have needed fp32
            with failures.told_of(path):
                _upscale(here, path, number)


def _foretell(here: _Run) -> None:
    """Say how each picture would be enlarged."""
    job, network, failures = here.job, here.network, Failures(here.events)
    for path in job.images:
        with failures.told_of(path):
            picture = picture_file.read_picture(path)
            width, height = _target(job, network, picture)
            tiles = tile_count(network, picture.width, picture.height, _tiling(here, picture))
            plan = f"{network.name}, {DTYPE_NAMES[network.dtype]}, {tiles} tile{'s' * (tiles > 1)}"
            target = _place(job, path, _factor(job, picture, width))
            tell_planned(here.events, path, target, (width, height), network.device, plan)


def _loaded(job: UpscaleJob, device: torch.device) -> Upscaler:
    network = Upscaler(job.weights, torch.float32, device)
    network.compute_in(_dtype(job, network, device))
    return network


def _dtype(job: UpscaleJob, network: Upscaler, device: torch.device) -> torch.dtype:
    """fp32 on a CPU; on a card fp16, which has three bits more of every level than bf16 has, where it works."""
    if job.dtype != "auto":
        return TORCH_DTYPES[job.dtype]
    if device.type == "cpu":
        return torch.float32
    if network.supports(torch.float16):
        return torch.float16
    return torch.bfloat16 if network.supports(torch.bfloat16) and has_fast_bf16(device) else torch.float32


def _upscale(here: _Run, path: str, number: int) -> None:
    job, network, events = here.job, here.network, here.events
    picture = picture_file.read_picture(path)
    width, height = _target(job, network, picture)
    tiling = _tiling(here, picture)
    factor = _factor(job, picture, width)

    def on_tile(done: int, total: int) -> None:
        events.send("upscale", image=number, images=len(job.images), done=done, total=total)

    asked = network.dtype
    levels = enlarge(network, _pixels(picture), tiling, on_tile)
    if network.dtype != asked:
        events.send("note", text=f"{Path(path).name} was computed in fp32: {DTYPE_NAMES[asked]} gave NaN or infinity")
    image = picture_file.resized(Image.fromarray(levels.numpy()), width, height)
    if picture.image.mode != "RGB":
        image = image.convert("L")
    if picture.alpha is not None:
        image.putalpha(picture_file.resized(picture.alpha, width, height))
    of = here.stamp.result()
    stamp = UpscalerStamp(of.name, of.sha256, network.scale, width, height)
    texts = metadata.upscaled_texts(picture.texts, stamp, factor)
    png = picture_file.encode(image, texts, picture.exif, picture.icc_profile)
    target = _place(job, path, factor)
    if job.overwrite:
        written = durable.replace(target, png)
    else:
        written = durable.write_once(target.parent, target.stem, ".png", png)
    events.send("result", path=str(written), source=path, width=width, height=height, recipe=_recipe(texts))


def _factor(job: UpscaleJob, picture: Picture, width: int) -> str:
    """How much larger, as it is written into names and records: `2`, or the size that was asked for."""
    return f"{job.width}x{job.height}" if job.width else str(width // picture.width)


def _place(job: UpscaleJob, path: str, factor: str) -> Path:
    """Where the enlarged picture goes, if nothing has its name."""
    folder = Path(job.out) if job.out else Path(path).parent
    return folder / f"{Path(path).stem}-{factor if 'x' in factor else f'{factor}x'}.png"


def _target(job: UpscaleJob, network: Upscaler, picture: Picture) -> tuple[int, int]:
    """Width and height of what is written; raises FluxsplitError where that is absurd."""
    factor = job.factor or network.scale
    width, height = job.width or picture.width * factor, job.height or picture.height * factor
    made = picture.width * picture.height * network.scale**2
    if max(width * height, made) > MAX_OUTPUT_PIXELS:
        raise FluxsplitError(
            f"{picture.width}x{picture.height} pixels times {network.scale} are over {MAX_OUTPUT_PIXELS}",
            "enlarge by less",
        )
    return width, height


def _tiling(here: _Run, picture: Picture) -> Tiling:
    job, network = here.job, here.network
    if job.tile is not None:
        return Tiling(job.tile)
    side = largest_tile(
        picture.width, picture.height, network.planned_bytes(1, 1), _budget_bytes(job, network), network.alignment
    )
    return Tiling(side)


def _budget_bytes(job: UpscaleJob, network: Upscaler) -> int:
    """What tiles may take of the device, its weights being there already."""
    return budget_bytes(job.vram, device_info(network.device))


def _pixels(picture: Picture) -> torch.Tensor:
    """fp32 [3, H, W] in 0..1."""
    image = picture.image
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint16 if image.mode == "I;16" else torch.uint8)
    channels = 3 if image.mode == "RGB" else 1
    pixels = raw.view(image.height, image.width, channels).permute(2, 0, 1).float()
    unit = pixels / (65535 if image.mode == "I;16" else 255)
    return unit.expand(3, -1, -1).contiguous()


def _recipe(texts: dict[str, str]) -> dict[str, object] | None:
    with suppress(FluxsplitError):
        record = metadata.record_from_json(texts.get(metadata.RECORD_KEY, ""))
        return record.recipe.to_object() if record.recipe else None
    return None
