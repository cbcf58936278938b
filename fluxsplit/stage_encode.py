"""The encode stage: one load of the VAE, every picture encoded to a latent file, as ComfyUI's VAEEncode does."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import torch
from PIL import Image

from fluxsplit import latents, picture_file
from fluxsplit.beside import thread_beside
from fluxsplit.errors import FluxsplitError
from fluxsplit.events import Events
from fluxsplit.fingerprint import weights_stamp
from fluxsplit.jobs import EncodeJob
from fluxsplit.latents import SUFFIXES
from fluxsplit.picture_file import Picture
from fluxsplit.recipe import MAX_SIDE_PX, WeightsStamp
from fluxsplit.single_files import Failures, tell_planned
from fluxsplit.vae_session import VaeSession, teller


def run(job: EncodeJob, events: Events) -> None:
    """Encode `job.images`; one that fails is reported and the rest go on. Raises OutOfMemory."""
    if job.dry_run:
        _foretell(job, events)
        return
    with thread_beside() as hashing:
        _encode(job, events, hashing.submit(weights_stamp, job.vae))


def _encode(job: EncodeJob, events: Events, stamp: Future[WeightsStamp]) -> None:
    session = VaeSession(job.vae, job.device, job.dtype, job.vram, job.smaller, events)
    total, failures = len(job.images), Failures(events)
    for number, path in enumerate(job.images):
        events.send("encode", done=number, total=total)
        with failures.told_of(path):
            pixels = prepared(picture_file.read_picture(path), job, session.vae.shape.factor)
            tensor = session.encode(pixels, teller(events, number, total, "encode"))
            payload, (_, channels, height, width) = tensor.numpy().tobytes(), tensor.shape
            shape = (1, channels, height, width)
            written = latents.write_latent(
                job.out, Path(path).stem, payload, shape, None, format=job.format, encoded_by=stamp.result()
            )
            size = {"width": pixels.shape[1], "height": pixels.shape[0]}
            events.send("result", path=str(written), source=path, **size, recipe=None)
    events.send("encode", done=total, total=total, failed=failures.count)


def _foretell(job: EncodeJob, events: Events) -> None:
    """Say how each picture would be encoded."""
    failures = Failures(events)
    session = VaeSession(job.vae, job.device, job.dtype, job.vram, job.smaller, events)
    for path in job.images:
        with failures.told_of(path):
            picture = picture_file.read_picture(path)
            height, width, _ = prepared(picture, job, session.vae.shape.factor).shape
            target = Path(job.out) / f"{Path(path).stem}{SUFFIXES[job.format]}"
            plan = session.encode_plan(height, width).text()
            tell_planned(events, path, target, (width, height), session.device, plan)


def prepared(picture: Picture, job: EncodeJob, factor: int) -> torch.Tensor:
    """RGB [H, W, 3] uint8: of the job's size, or as it is, cut to multiples of `factor` round its middle.

    What is transparent becomes white. Cut as ComfyUI's VAEEncode cuts (`comfy/sd.py`, vae_encode_crop_pixels).
    """
    image = picture.image
    if image.mode == "I;16":
        image = image.point(lambda value: value / 256).convert("L")
    image = image.convert("RGB")
    if picture.alpha is not None:
        white = Image.new("RGB", image.size, (255, 255, 255))
        image = Image.composite(image, white, picture.alpha)
    image = _of_size(image, job.width, job.height, job.fit) if job.width else _of_multiples(image, factor)
    if max(image.size) > MAX_SIDE_PX:
        raise FluxsplitError(f"{image.width}x{image.height} pixels are over {MAX_SIDE_PX} a side", "give a --size")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def _of_size(image: Image.Image, width: int, height: int, fit: str) -> Image.Image:
    if fit == "cut":  # as much as has the ratio that is wanted
        wide, high = round(image.height * width / height), round(image.width * height / width)
        image = _cut(image, max(1, min(image.width, wide)), max(1, min(image.height, high)))
    return picture_file.resized(image, width, height)


def _of_multiples(image: Image.Image, factor: int) -> Image.Image:
    width, height = (side // factor * factor for side in image.size)
    if not width or not height:
        raise FluxsplitError(f"{image.width}x{image.height} pixels are fewer than {factor}x{factor}", "give a --size")
    return _cut(image, width, height)


def _cut(image: Image.Image, width: int, height: int) -> Image.Image:
    """Its middle."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))
