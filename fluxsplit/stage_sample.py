"""The sample stage: one load of the transformer, every picture's latent sampled and written."""

from __future__ import annotations

import datetime
import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fluxsplit import checkpoint, defaults, fp8, latents
from fluxsplit.beside import thread_beside
from fluxsplit.checkpoint import Contents, Part
from fluxsplit.conditioning import Conditioning, read_conditioning
from fluxsplit.conditioning_cache import stamps_in
from fluxsplit.conditioning_header import check_shapes
from fluxsplit.device import DTYPE_NAMES, device_name
from fluxsplit.errors import FluxsplitError, OutOfMemory, ends_all, is_out_of_memory
from fluxsplit.events import Events
from fluxsplit.fingerprint import weights_stamp
from fluxsplit.job_plan import pick_device_and_dtype, plan_job, tell_plan
from fluxsplit.jobs import ImageJob, ModelFiles, SampleJob
from fluxsplit.latent_space import LatentSpace, latent_space
from fluxsplit.lockstep import Picture, sample_together
from fluxsplit.memory_plan import MemoryPlan, smaller_budget
from fluxsplit.peek import write_peek
from fluxsplit.peek_steps import LivePeek
from fluxsplit.placement import Placed, place
from fluxsplit.recipe import LATENT_CHANNELS, VAE_FACTOR, Recipe, WeightsStamp
from fluxsplit.schedule import from_sigma
from fluxsplit.schedule import sigmas as scheduled_sigmas
from fluxsplit.starting_point import starting_point
from fluxsplit.transformer import Flux
from fluxsplit.weights import WeightFiles
from fluxsplit.work import PREPARED_TOGETHER

SLUG_CHARS = 40
_VERSIONED = ("fluxsplit", "torch", "diffusers", "transformers")


@dataclass(frozen=True, slots=True)
class _Model:
    part: Part
    flux: Flux
    files: WeightFiles
    placed: Placed
    contents: Contents
    space: LatentSpace
    stamps: dict[str, Future[WeightsStamp]]


def run(job: SampleJob, events: Events) -> None:
    """Sample `job.images`; a picture that fails is reported and the rest go on."""
    with thread_beside() as hashing:
        device, dtype = _device_and_dtype(job)
        part = checkpoint.part(job.files.transformer, "transformer")
        plan = plan_job(job, part, device, dtype)
        tell_plan(plan, events)
        try:
            model = _load(job, part, plan, device, dtype, events, hashing)
            for numbers in _batches(range(len(job.images)), -(-PREPARED_TOGETHER // plan.together) * plan.together):
                _prepare(model, job, numbers)
                for group in _batches(numbers, plan.together):
                    _sample_group(model, job, group, events)
            model.placed.blocks.close()
        except Exception as error:
            if is_out_of_memory(error):
                raise _out_of_memory(error, plan) from error
            raise


def _out_of_memory(error: Exception, plan: MemoryPlan) -> OutOfMemory:
    detail = next(iter(str(error).splitlines()), "") or type(error).__name__
    smaller = smaller_budget(plan)
    hint = "choose a smaller --size" if smaller is None else f"give --vram {smaller // 10**6}M, or a smaller --size"
    return OutOfMemory(f"the sample stage ran out of memory with {plan.text()} ({detail[:200]})", hint)


def _device_and_dtype(job: SampleJob) -> tuple[torch.device, torch.dtype]:
    device, dtype = pick_device_and_dtype(job)
    if not fp8.self_test(device, dtype):
        raise FluxsplitError(
            f"{device_name(device)} does not expand float8 exactly in {DTYPE_NAMES[dtype]}", "try another --dtype"
        )
    return device, dtype


def _load(
    job: SampleJob,
    part: Part,
    plan: MemoryPlan,
    device: torch.device,
    dtype: torch.dtype,
    events: Events,
    hashing: ThreadPoolExecutor,
) -> _Model:
    files = WeightFiles()
    flux = Flux(part, files, dtype, device)
    placed = place(plan, flux, files, events)
    flux.loader = placed.blocks
    contents = checkpoint.describe(job.files.transformer)
    vae_config = checkpoint.describe(job.files.vae or job.files.transformer).config.get("vae", {})
    stamps = {
        path: hashing.submit(weights_stamp, path)
        for path in {job.files.transformer, job.files.text_encoder, job.files.clip} - {""}
    }
    return _Model(part, flux, files, placed, contents, latent_space(vae_config), stamps)


def _shape(recipe: Recipe) -> tuple[int, int, int, int]:
    return 1, LATENT_CHANNELS, recipe.height // VAE_FACTOR, recipe.width // VAE_FACTOR


def _batches(numbers: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    return (numbers[first : first + most] for first in range(0, len(numbers), most))


def _prepare(model: _Model, job: SampleJob, numbers: Sequence[int]) -> None:
    """Compute the modulations of all steps of these images."""
    times: list[tuple[float, float | None, torch.Tensor]] = []
    pooled: dict[str, torch.Tensor] = {}
    for image in (job.images[number] for number in numbers):
        texts = [image.conditioning, *([image.negative_conditioning] if image.cfg != 1 else [])]
        with suppress(FluxsplitError):  # told when its picture is made
            recipe = _recipe(model, image)
            pooled |= {text: _conditioning(model.part, text).pooled for text in texts if text not in pooled}
            times += [(sigma, recipe.guidance, pooled[text]) for text in texts for sigma in recipe.sigmas if sigma > 0]
    if model.flux.is_prepared(times):
        return
    loader = model.placed.modulations()
    try:
        model.flux.prepare(times, loader)
    finally:
        loader.close()


def _sample_group(model: _Model, job: SampleJob, numbers: Sequence[int], events: Events) -> None:
    """Sample the images of these numbers in lockstep; each is written as soon as it is finished."""
    pictures: dict[int, Picture] = {}
    for number in numbers:
        with _reporting(job, number, events):
            pictures[number] = _picture(model, job.images[number])
    told = _Told(events, pictures, len(job.images))
    recipes = {number: picture.recipe for number, picture in pictures.items()}
    live = LivePeek(job.out, job.files.transformer, model.space, recipes).show if job.peek_steps else None
    for number, latent in sample_together(model.flux, pictures, told.round, live):
        with _reporting(job, number, events):
            if isinstance(latent, FluxsplitError):
                raise latent
            _write(model, job, number, pictures[number].recipe, latent, events)


@contextmanager
def _reporting(job: SampleJob, number: int, events: Events) -> Iterator[None]:
    """A failure inside is that of one picture."""
    try:
        yield
    except FluxsplitError as error:
        if ends_all(error):
            raise
        image = job.images[number]
        item = f"seed {image.seed}" + (f": {image.prompt[:60]}" if image.prompt else "")
        events.send("failed", number=number, item=item, message=error.message, hint=error.hint)


def _picture(model: _Model, image: ImageJob) -> Picture:
    recipe = _recipe(model, image)
    conditioning = _conditioning(model.part, image.conditioning)
    negative = _conditioning(model.part, image.negative_conditioning) if image.cfg != 1 else None
    preview = latents.read_latent(image.start_latent) if image.start_latent else None
    return Picture(recipe, conditioning, negative, starting_point(recipe, preview, model.space))


def _write(model: _Model, job: SampleJob, number: int, recipe: Recipe, latent: torch.Tensor, events: Events) -> None:
    payload = model.space.to_vae(latent).contiguous().view(torch.uint8).numpy().tobytes()
    model.files.check_unchanged()
    image = job.images[number]
    stamped = _stamped(recipe, job.files, model.stamps, image)
    recipe = replace(stamped, retried=job.retried or None)
    stem = image.stem or _stem(recipe)
    more: dict[str, Any] = {"format": job.format, "parent": image.parent}
    path = latents.write_latent(job.out, stem, payload, _shape(recipe), recipe, **more)
    if job.peek:
        _peek(path, events)
    events.send("result", number=number, path=str(path), recipe=recipe.to_object())


def _peek(path: Path, events: Events) -> None:
    """A preview beside a latent; one that cannot be written is no reason to lose the latent."""
    try:
        write_peek(latents.read_latent(path), path.parent, path.stem)
    except FluxsplitError as error:
        events.send("note", text=f"no preview: {error.message}")


class _Told:
    """Tells how far a group of pictures is, once for each pass in which one of them finished a step."""

    def __init__(self, events: Events, pictures: dict[int, Picture], images: int) -> None:
        self._events, self._images = events, images
        self._first, self._together = min(pictures, default=0), len(pictures)
        self._total = sum(picture.recipe.steps for picture in pictures.values())
        self._done, self._since_s = 0, time.monotonic()

    def round(self, steps: dict[int, int]) -> None:
        done, now_s = sum(steps.values()), time.monotonic()
        if done > self._done:
            self._events.send(
                "step",
                image=self._first,
                images=self._images,
                together=self._together,
                step=done,
                steps=self._total,
                step_s=(now_s - self._since_s) / (done - self._done),
            )
            self._done, self._since_s = done, now_s


def _conditioning(part: Part, path: str) -> Conditioning:
    conditioning = read_conditioning(path)
    check_shapes(Path(path).name, conditioning.t5.shape, conditioning.pooled.shape, part)
    return conditioning


def _recipe(model: _Model, image: ImageJob) -> Recipe:
    """Everything that was asked or defaulted, as it will be rendered."""
    variant, config = model.flux.variant, model.contents.config
    shift = image.shift if image.shift is not None else defaults.shift_of(variant, config, image.width, image.height)
    levels = image.recorded_sigmas or image.sigmas
    if not levels:
        steps = image.steps or defaults.steps_of(variant, config)
        levels = scheduled_sigmas(image.scheduler, steps, variant, shift)
    if image.start is not None and image.start.keep != "noise" and not image.recorded_sigmas:
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
        conditioning_sha256=image.conditioning_sha256 or None,
    )


def _stamped(recipe: Recipe, files: ModelFiles, stamps: dict[str, Future[WeightsStamp]], image: ImageJob) -> Recipe:
    """The recipe with the weights' hashes and the time; waits for the hashes, which were computed meanwhile.

    Encoders that were not needed are named as the conditioning names them, where it does.
    """
    none = WeightsStamp("")
    made_with = stamps_in(image.conditioning) or (none, none)
    encoded = not image.conditioning_sha256
    return replace(
        recipe,
        transformer=stamps[files.transformer].result(),
        text_encoder=stamps[files.text_encoder].result() if encoded and files.text_encoder else made_with[0],
        clip=stamps[files.clip].result() if encoded and files.clip else made_with[1],
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _stem(recipe: Recipe) -> str:
    """Name of the latent file without suffix: local time, seed and the start of the prompt."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", recipe.prompt).lower())
    words = words.strip("-")[:SLUG_CHARS].strip("-")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{recipe.seed}-{words or 'empty'}"
