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
from fluxsplit.device import DTYPE_NAMES, device_info, has_fast_bf16, keep_within, pick_device
from fluxsplit.device import DTYPES as TORCH_DTYPES
from fluxsplit.errors import DoesNotFit, FluxsplitError
from fluxsplit.events import Events
from fluxsplit.fingerprint import weights_stamp
from fluxsplit.jobs import UpscaleJob
from fluxsplit.memory import budget_bytes
from fluxsplit.metadata import UpscalerStamp
from fluxsplit.picture_file import Picture
from fluxsplit.recipe import WeightsStamp
from fluxsplit.single_files import Failures, tell_planned
from fluxsplit.tiles import largest_tile, smaller_tile, smallest_bytes
from fluxsplit.upscale import Tiling, Upscaler, enlarge, tile_count

STRETCHED = 0.02
"""By how much the ratio of the sides may change without a word."""
MAX_OUTPUT_PIXELS = 1 << 30
"""3 GB of bytes; PNG itself would allow more."""


@dataclass(frozen=True, slots=True)
class _Run:
    job: UpscaleJob
    network: Upscaler
    stamp: Future[WeightsStamp]
    budget_bytes: int
    """Of a card for weights and tiles; on a CPU for tiles and the picture itself."""
    events: Events


def run(job: UpscaleJob, events: Events) -> None:
    """Enlarge `job.images`; one that fails is reported and the rest go on. Raises OutOfMemory."""
    device = pick_device(job.device)
    with thread_beside() as hashing:
        budget = budget_bytes(job.vram, device_info(device), again=bool(job.smaller))
        if device.type != "cpu":
            keep_within(budget, device)
        network = _loaded(job, device)
        stamp = hashing.submit(weights_stamp, job.weights)
        here = _Run(job, network, stamp, budget, events)
        if job.published_sha256 and stamp.result().sha256 != job.published_sha256:
            text = f"{network.name} is not the file that Real-ESRGAN published under this name; --fetch gets that"
            events.send("note", text=text)
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
            plan = _planned(here, picture).text
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
    plan = _planned(here, picture)
    again = None if plan.is_smallest else {"smaller": job.smaller + 1}
    events.send("plan", text=plan.text, smaller=again)
    factor = _factor(job, picture, width)

    def on_tile(done: int, total: int) -> None:
        events.send("upscale", image=number, images=len(job.images), done=done, total=total)

    asked = network.dtype
    levels = enlarge(network, _pixels(picture), plan.tiling, on_tile)
    if network.dtype != asked:
        events.send("note", text=f"{Path(path).name} was computed in fp32: {DTYPE_NAMES[asked]} gave NaN or infinity")
    if abs(width * picture.height / (height * picture.width) - 1) > STRETCHED:
        text = f"{Path(path).name} is pulled: {width}x{height} is another ratio than {picture.width}x{picture.height}"
        events.send("note", text=text)
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


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one picture is enlarged."""

    tiling: Tiling
    text: str
    """For people."""
    is_smallest: bool


def _planned(here: _Run, picture: Picture) -> _Plan:
    """The tiles for a picture; raises DoesNotFit where the budget does not hold even the smallest."""
    job, network = here.job, here.network
    width, height, pixel_bytes = picture.width, picture.height, network.planned_bytes(1, 1)
    beside = network.picture_bytes(width, height) if network.device.type == "cpu" else _weight_bytes(network)
    if job.tile is not None:
        side = job.tile
    else:
        need, room = beside + smallest_bytes(width, height, pixel_bytes), here.budget_bytes
        if need > room:
            raise DoesNotFit(
                f"{network.name} needs {need / 1e6:,.1f} MB for {width}x{height} even in the smallest tiles, "
                f"and {room / 1e6:,.1f} MB may be used",
                f"give --vram {-(-need // 1_000_000)}M or more",
            )
        side = largest_tile(width, height, pixel_bytes, room - beside, network.alignment)
    for _ in range(job.smaller):
        side = smaller_tile(width, height, side) or side
    is_smallest = network.tiles_itself or not smaller_tile(width, height, side)
    tiles = tile_count(network, width, height, Tiling(side))
    shown, area = ("1 tile", width * height) if tiles == 1 else (f"{tiles} tiles of {side} pixels", side * side)
    peak = f"peak {(beside + area * pixel_bytes) / 1e9:.2f} GB"
    return _Plan(Tiling(side), f"{network.name}, {DTYPE_NAMES[network.dtype]}, {shown}, {peak}", is_smallest)


def _weight_bytes(network: Upscaler) -> int:
    """What the network's weights take of a card."""
    return torch.cuda.memory_allocated(network.device)


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
