"""The decode stage: one load of the VAE, every latent file decoded to a PNG that carries its recipe."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch

from fluxsplit import checkpoint, durable, metadata
from fluxsplit.device import DTYPE_NAMES, device_name, pick_device, pick_vae_dtype
from fluxsplit.errors import FluxsplitError
from fluxsplit.events import Events
from fluxsplit.fingerprint import weights_sha256
from fluxsplit.jobs import DecodeJob
from fluxsplit.latents import LatentFile, read_latents
from fluxsplit.recipe import WeightsStamp
from fluxsplit.vae import Vae
from fluxsplit.weights import WeightFiles


def run(job: DecodeJob, events: Events) -> None:
    """Decode `job.latents`; one that fails is reported and the rest go on."""
    device = pick_device(job.device)
    dtype = pick_vae_dtype(job.dtype, device)
    with ThreadPoolExecutor(max_workers=1) as background:
        stamp = background.submit(_stamp, job.vae)
        vae = Vae(checkpoint.part(job.vae, "vae"), WeightFiles(), dtype, device)
        parents = dict(zip(job.latents, job.parents, strict=False))
        for done, path in enumerate(job.latents):
            events.send("decode", done=done, total=len(job.latents))
            try:
                for latent in read_latents(path):
                    _decode(vae, latent, job, stamp, events, parents.get(path))
                if job.delete_latents:
                    Path(path).unlink()
            except FluxsplitError as error:
                events.send("failed", item=path, message=error.message, hint=error.hint)
        events.send("decode", done=len(job.latents), total=len(job.latents))


def _stamp(path: str) -> WeightsStamp:
    return WeightsStamp(Path(path).name, weights_sha256(path))


def _decode(
    vae: Vae,
    latent: LatentFile,
    job: DecodeJob,
    stamp: Future[WeightsStamp],
    events: Events,
    parent: tuple[str, str] | None,
) -> None:
    tensor = torch.frombuffer(bytearray(latent.payload), dtype=torch.float32).view(latent.shape)
    pixels = vae.decode(tensor)  # [H, W, 3]
    height, width = pixels.shape[:2]
    record = metadata.ImageRecord(
        recipe=latent.recipe,
        latent_sha256=latent.payload_sha256,
        vae=stamp.result(),
        versions={name: version(name) for name in ("fluxsplit", "torch", "diffusers")},
        dtype=DTYPE_NAMES[vae.dtype],
        device=device_name(vae.device),
        parent=metadata.Parent(*parent) if parent is not None and parent[0] else None,
    )
    texts = metadata.png_text_chunks(record, latent.foreign)
    png = metadata.encode_png(pixels.numpy().tobytes(), width, height, texts)
    stem = Path(latent.path).stem + (f"-{latent.index}" if latent.batch > 1 else "")
    if job.overwrite:
        path = durable.replace(Path(job.out) / f"{stem}.png", png)
    else:
        path = durable.write_free(job.out, stem, ".png", png)
    events.send("result", path=str(path), recipe=latent.recipe.to_object() if latent.recipe else None)
