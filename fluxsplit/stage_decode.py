"""The decode stage: one load of the VAE, every latent file decoded to a PNG that carries its recipe."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from fluxsplit import durable, metadata
from fluxsplit.beside import thread_beside
from fluxsplit.device import device_name
from fluxsplit.events import Events
from fluxsplit.fingerprint import weights_stamp
from fluxsplit.jobs import DecodeJob
from fluxsplit.latents import LatentFile, read_latents
from fluxsplit.recipe import WeightsStamp
from fluxsplit.single_files import Failures, tell_planned
from fluxsplit.vae import Advance
from fluxsplit.vae_session import VaeSession, teller


def run(job: DecodeJob, events: Events) -> None:
    """Decode `job.latents`, each read while the one before is decoded; one that fails is reported and the rest go on.

    Raises OutOfMemory, with the plan that did not hold.
    """
    if job.dry_run:
        _foretell(job, events)
        return
    with thread_beside() as hashing, thread_beside() as reading:
        stamp = hashing.submit(weights_stamp, job.vae)
        session = VaeSession(job.vae, job.device, job.dtype, job.vram, job.smaller, events)
        total, failures, made = len(job.latents), Failures(events), _Made(job)
        following = reading.submit(read_latents, job.latents[0]) if total else None
        for number, path in enumerate(job.latents):
            assert following is not None
            current = following
            if number + 1 < total:
                following = reading.submit(read_latents, job.latents[number + 1])
            events.send("decode", done=number, total=total)
            with failures.told_of(path):
                for latent in current.result():
                    told = teller(events, number, total)
                    _decode(session, latent, made, stamp, events, told)
                if job.delete_latents:
                    _delete(path, events)
        for note in made.notes():
            events.send("note", text=note)
        events.send("decode", done=total, total=total, failed=failures.count)


@dataclass(slots=True)
class _Made:
    """What a run has written, to replace no picture of its own: latents may share a name."""

    job: DecodeJob
    targets: set[Path] = field(default_factory=set)
    beside: int = 0
    same: int = 0

    def write(self, target: Path, png: bytes) -> Path:
        """Write a picture under `target`, or where that is taken beside it; returns its path."""
        again = target in self.targets
        self.targets.add(target)
        if self.job.overwrite and not again:
            return durable.replace(target, png)
        if there := durable.already_there(target.parent, target.stem, target.suffix, png):
            self.same += 1
            return there
        path = durable.write_free(target.parent, target.stem, target.suffix, png)
        self.beside += path != target and not again
        return path

    def notes(self) -> Iterator[str]:
        """What is to be said of names at the end."""
        if self.same:
            yield f"{self.same} {'was' if self.same == 1 else 'were'} there already, the same"
        if self.beside:
            yield f"{self.beside} written beside pictures that were there (numbered); --overwrite replaces them"


def _foretell(job: DecodeJob, events: Events) -> None:
    """Say how each latent would be decoded."""
    failures = Failures(events)
    session = VaeSession(job.vae, job.device, job.dtype, job.vram, job.smaller, events)
    for path in job.latents:
        with failures.told_of(path):
            for latent in read_latents(path):
                height, width = latent.shape[-2:]
                if job.tile:
                    plan = session.tile_plan(height, width, job.tile).text()
                else:
                    plan = session.decode_plan(height, width).text()
                plan += "; then the latent is deleted" if job.delete_latents else ""
                size = width * session.vae.shape.factor, height * session.vae.shape.factor
                tell_planned(events, path, _target(job, latent), size, session.device, plan)


def _target(job: DecodeJob, latent: LatentFile) -> Path:
    """The picture of a latent, where no other has its name."""
    return Path(job.out) / f"{latent.stem}.png"


def _delete(path: str, events: Events) -> None:
    try:
        Path(path).unlink()
    except OSError as error:
        events.send("failed", item=path, message=f"decoded, but it cannot be deleted: {error.strerror}", hint="")


def _decode(
    session: VaeSession,
    latent: LatentFile,
    made: _Made,
    stamp: Future[WeightsStamp],
    events: Events,
    advance: Advance,
) -> None:
    job = made.job
    tensor = torch.frombuffer(bytearray(latent.payload), dtype=torch.float32).view(latent.shape)
    pixels, dtype = session.decode(tensor, advance, job.tile)  # [H, W, 3]
    height, width = pixels.shape[:2]
    record = metadata.ImageRecord(
        recipe=latent.recipe,
        latent_sha256=latent.payload_sha256,
        vae=stamp.result(),
        versions={name: version(name) for name in ("fluxsplit", "torch", "diffusers")},
        dtype=dtype,
        device=device_name(session.device),
        parent=latent.parent,
    )
    texts = metadata.png_text_chunks(record, latent.foreign)
    png = metadata.encode_png(pixels.numpy().tobytes(), width, height, texts)
    path = made.write(_target(job, latent), png)
    recipe = latent.recipe.to_object() if latent.recipe else None
    events.send("result", path=str(path), source=latent.path, width=width, height=height, recipe=recipe)
