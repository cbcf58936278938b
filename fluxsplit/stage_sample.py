"""The sample stage: one load of the transformer, every picture's latent sampled and written."""

from __future__ import annotations

import datetime
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fluxsplit import checkpoint, defaults, fp8, latents
from fluxsplit.checkpoint import Contents, Part
from fluxsplit.conditioning import Conditioning, read_conditioning
from fluxsplit.device import DTYPE_NAMES, device_name, pick_device, pick_dtype
from fluxsplit.errors import FluxsplitError
from fluxsplit.events import Events
from fluxsplit.fingerprint import weights_sha256
from fluxsplit.jobs import ImageJob, ModelFiles, SampleJob
from fluxsplit.latent_space import LatentSpace, latent_space
from fluxsplit.recipe import LATENT_CHANNELS, VAE_FACTOR, Recipe, WeightsStamp
from fluxsplit.sampling import SAMPLE
from fluxsplit.schedule import from_sigma
from fluxsplit.schedule import sigmas as scheduled_sigmas
from fluxsplit.starting_point import starting_point
from fluxsplit.transformer import Flux, check_conditioning
from fluxsplit.weights import WeightFiles, keep_resident

SLUG_CHARS = 40
RESERVED_BYTES = 1_000_000_000
"""Of a card's free memory: for the expanded matrix, the allocator and the driver."""
ACTIVATION_BYTES_PER_TOKEN = 64
"""Times the hidden size: what the widest block holds for each token, measured generously."""

_VERSIONED = ("fluxsplit", "torch", "diffusers", "transformers")


@dataclass(frozen=True, slots=True)
class _Model:
    flux: Flux
    contents: Contents
    space: LatentSpace
    stamps: dict[str, Future[WeightsStamp]]
    read: _ReadAhead


def run(job: SampleJob, events: Events) -> None:
    """Sample `job.images`; a picture that fails is reported and the rest go on."""
    with ThreadPoolExecutor(max_workers=1) as hashing:
        model = _load(job, events, hashing)
        for number, image in enumerate(job.images):
            try:
                recipe, payload = _sample(model, image, number, len(job.images), events)
                recipe = _stamped(recipe, job.files, model.stamps)
                path = latents.write_latent(
                    job.out, image.stem or _stem(recipe), payload, _shape(recipe), recipe, format=job.format
                )
            except FluxsplitError as error:
                item = f"seed {image.seed}: {image.prompt[:60]}"
                events.send("failed", item=item, message=error.message, hint=error.hint)
                continue
            events.send("result", path=str(path), recipe=recipe.to_object())


def _load(job: SampleJob, events: Events, hashing: ThreadPoolExecutor) -> _Model:
    device = pick_device(job.device)
    contents = checkpoint.describe(job.files.transformer)
    part = checkpoint.part(job.files.transformer, "transformer")
    dtype = pick_dtype(job.dtype, device, contents.parts["transformer"].parameters)
    if not fp8.self_test(device, dtype):
        raise FluxsplitError(
            f"{device_name(device)} does not expand float8 exactly in {DTYPE_NAMES[dtype]}", "try another --dtype"
        )
    files = WeightFiles()
    flux = Flux(part, files, dtype, device)
    if device.type == "cuda":
        keep_resident(flux.module, device, _resident_budget(device, job, part))
    vae_config = checkpoint.describe(job.files.vae or job.files.transformer).config.get("vae", {})
    stamps = {
        path: hashing.submit(_stamp, path)
        for path in {job.files.transformer, job.files.text_encoder, job.files.clip} - {""}
    }
    return _Model(flux, contents, latent_space(vae_config), stamps, _ReadAhead(part, files, events))


def _resident_budget(device: torch.device, job: SampleJob, part: Part) -> int:
    free_bytes, _ = torch.cuda.mem_get_info(device)
    tokens = max(image.width * image.height // 256 for image in job.images) + 512
    hidden = part.shape("x_embedder.weight")[0]
    return max(0, free_bytes - RESERVED_BYTES - tokens * hidden * ACTIVATION_BYTES_PER_TOKEN)


class _ReadAhead:
    """Reports the first reading of the weights, and asks for the next block's bytes while one is computed."""

    def __init__(self, part: Part, files: WeightFiles, events: Events) -> None:
        self._events, self._files = events, files
        spans: dict[tuple[str, ...], list[Any]] = {}
        sizes: dict[tuple[str, ...], dict[str, int]] = {}
        for name, source in part.sources.items():
            if "transformer_blocks." in name:
                key = tuple(name.split(".")[:2])
                info = source.tensor
                path, start, stop = spans.get(key, [source.path, info.start, info.end])
                spans[key] = [path, min(start, info.start), max(stop, info.end)]
                sizes.setdefault(key, {})[info.name] = info.end - info.start
        order = sorted(spans, key=lambda key: (key[0] != "transformer_blocks", int(key[1])))
        self._spans = [spans[key] for key in order]
        self._block_bytes = [sum(sizes[key].values()) for key in order]
        self.total_bytes = sum(self._block_bytes)
        self._done_bytes = 0
        self._ask(0)

    def block_done(self, done: int) -> None:
        """Called after each block of the first forward; later ones cost nothing."""
        if done > len(self._spans) or self._done_bytes >= self.total_bytes:
            return
        self._done_bytes += self._block_bytes[done - 1]
        self._ask(done)
        self._events.send("load", what="transformer", done_bytes=self._done_bytes, total_bytes=self.total_bytes)

    def _ask(self, block: int) -> None:
        if block < len(self._spans):
            path, start, stop = self._spans[block]
            self._files.open(path).will_need(start, stop)


def _shape(recipe: Recipe) -> tuple[int, int, int, int]:
    return 1, LATENT_CHANNELS, recipe.height // VAE_FACTOR, recipe.width // VAE_FACTOR


def _stamp(path: str) -> WeightsStamp:
    return WeightsStamp(Path(path).name, weights_sha256(path))


def _sample(model: _Model, image: ImageJob, number: int, images: int, events: Events) -> tuple[Recipe, bytes]:
    recipe = _recipe(model, image)
    conditioning = _conditioning(model.flux, image.conditioning)
    negative = _conditioning(model.flux, image.negative_conditioning) if image.cfg != 1 else None
    step, started = 0, time.monotonic()

    def on_step(done: int) -> None:
        nonlocal step, started
        now = time.monotonic()
        events.send("step", image=number, images=images, step=done, steps=recipe.steps, step_s=now - started)
        step, started = done, now

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        velocity = _velocity(model, x, sigma, conditioning, negative, recipe)
        if not bool(velocity.isfinite().all()):
            raise FluxsplitError(
                f"step {step + 1} of {recipe.steps} gave NaN or infinity in {recipe.dtype}", "try --dtype fp32"
            )
        clean = x - sigma * velocity.to(x.device)
        return clean if point.guide is None else point.guide(clean, sigma)

    preview = latents.read_latent(image.start_latent) if image.start_latent else None
    point = starting_point(recipe, preview, model.space)
    x = SAMPLE[recipe.sampler](denoise, point.latents, recipe.sigmas, on_step)
    vae_space = model.space.to_vae(x).contiguous()
    return recipe, vae_space.view(torch.uint8).numpy().tobytes()


def _velocity(
    model: _Model,
    x: torch.Tensor,
    sigma: float,
    conditioning: Conditioning,
    negative: Conditioning | None,
    recipe: Recipe,
) -> torch.Tensor:
    """The predicted velocity, with true guidance where a negative is given (Ho & Salimans, arXiv 2207.12598)."""

    def predict(text: Conditioning) -> torch.Tensor:
        return model.flux.velocity(x, sigma, text, recipe.guidance, lambda done, _: model.read.block_done(done))

    wanted = predict(conditioning)
    if negative is None:
        return wanted
    unwanted = predict(negative)
    return unwanted + recipe.cfg * (wanted - unwanted)


def _conditioning(flux: Flux, path: str) -> Conditioning:
    conditioning = read_conditioning(path)
    check_conditioning(flux, conditioning, Path(path).name)
    return conditioning


def _recipe(model: _Model, image: ImageJob) -> Recipe:
    """Everything that was asked or defaulted, as it will be rendered."""
    variant, config = model.flux.variant, model.contents.config
    shift = image.shift if image.shift is not None else defaults.shift_of(variant, config, image.width, image.height)
    levels = image.recorded_sigmas or image.sigmas
    if not levels:
        steps = image.steps or defaults.steps_of(variant, config)
        levels = scheduled_sigmas(image.scheduler, steps, variant, shift)
    if image.start is not None and not image.recorded_sigmas:
        levels = from_sigma(levels, image.start.strength, None if image.sigmas else shift)
    guidance = image.guidance if image.guidance is not None else defaults.guidance_of(variant)
    return Recipe(
        prompt=image.prompt,
        seed=image.seed,
        width=image.width,
        height=image.height,
        steps=len(levels) - 1,
        sigmas=levels,
        sampler=image.sampler,
        scheduler="custom" if image.sigmas else image.scheduler,
        shift=None if image.sigmas else shift,
        guidance=guidance if variant == "dev" else None,
        cfg=image.cfg,
        negative=image.negative,
        noise_index=image.noise_index,
        variant=variant,
        transformer=WeightsStamp(""),
        text_encoder=WeightsStamp(""),
        clip=WeightsStamp(""),
        dtype=DTYPE_NAMES[model.flux.dtype],
        device=device_name(model.flux.device),
        stored_dtype=next(iter(model.contents.parts["transformer"].dtypes)),
        versions={name: version(name) for name in _VERSIONED},
        start=image.start,
    )


def _stamped(recipe: Recipe, files: ModelFiles, stamps: dict[str, Future[WeightsStamp]]) -> Recipe:
    """The recipe with the weights' hashes and the time; waits for the hashes, which were computed meanwhile."""
    none = WeightsStamp("")
    return replace(
        recipe,
        transformer=stamps[files.transformer].result(),
        text_encoder=stamps[files.text_encoder].result() if files.text_encoder else none,
        clip=stamps[files.clip].result() if files.clip else none,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _stem(recipe: Recipe) -> str:
    """Name of the latent file without suffix: local time, seed and the start of the prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", recipe.prompt.lower()).strip("-")[:SLUG_CHARS].strip("-")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{recipe.seed}-{words or 'empty'}"
