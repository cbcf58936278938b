"""Carries the plan of a `sample` out: a text stage, then the sample stage, and what is said of its latents."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxsplit import conditioning_cache, durable
from fluxsplit.conditioning_cache import encoders_of
from fluxsplit.executor import StageProcess
from fluxsplit.jobs import SampleJob, TextJob
from fluxsplit.latents import SUFFIXES
from fluxsplit.places import is_hidden
from fluxsplit.progress import Progress
from fluxsplit.retry import events_with_retry
from fluxsplit.sample_plan import Plan
from fluxsplit.step_times import timed
from fluxsplit.taef1 import peek_beside


def run_sample_and_taef1(plan: Plan, progress: Progress) -> int:
    """Sample, then have TAEF1 draw every latent that was written; returns the exit code."""
    written: list[str] = []

    def on_result(event: dict[str, Any]) -> None:
        written.append(event["path"])
        progress.show(event)

    code = run_sample(plan, progress, on_result)
    peek_beside(written, plan.taef1, plan.device, progress)
    return code


@contextmanager
def undecoded_told(latents: list[str], given: dict[str, Any], pictures: Path, progress: Progress) -> Iterator[None]:
    """Where it is ended early, say how those of `latents` that are finished become `pictures`, if they are not yet."""
    try:
        yield
    except BaseException:
        if left := [latent for latent in latents if not (pictures / f"{Path(latent).stem}.png").exists()]:
            told = decoding(left, given, pictures)
            progress.note(f"{len(left)} finished, without their pictures yet; to have them: {told}")
        raise


def run_sample(plan: Plan, progress: Progress, on_result: Callable[[dict[str, Any]], None] | None = None) -> int:
    """Encode, then sample; returns the exit code. Results are shown, or given to `on_result`.

    The sample stage starts at once, so that its imports overlap the encoding; it gets its job, and with it the
    first byte of the transformer, only when the text stage's process has ended. Prompts that were encoded before
    are taken from the cache; where all were, there is no text stage.
    """
    for note in plan.notes:
        progress.note(note)
    durable.check_folder(plan.out)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fluxsplit-", ignore_cleanup_errors=True)))
        ready = cached(plan)
        places = {
            text: kept or str(folder / f"{number}.safetensors")
            for number, (text, kept) in enumerate(zip(plan.prompts, plan.conditionings, strict=True))
            if text not in ready
        }
        text_stage = stack.enter_context(StageProcess("text")) if places else None
        sample_stage = stack.enter_context(StageProcess("sample"))
        job = _sample_job(plan, ready | places)
        if text_stage is not None:
            for event in events_with_retry(text_stage, _text_job(plan, places, job), progress.note):
                if event["event"] != "result":
                    progress.show(event)
        unkept = {} if _keep(plan, places) else places
        sizes = [(image.width, image.height) for image in plan.images]
        events = events_with_retry(sample_stage, job, progress.note)
        for event in timed(events, plan.files.transformer, sizes):
            (on_result if on_result and event["event"] == "result" else progress.show)(event)
            if event["event"] == "result":
                _keep(plan, unkept)
                unkept = {}  # kept with the first picture, whatever becomes of the others
    return 1 if progress.failures else 0


def cached(plan: Plan) -> dict[str, str]:
    """The conditionings that are in the cache, by prompt; those to be saved to a file are encoded."""
    encoders = (plan.encoders or encoders_of(plan.files)) if plan.cache and plan.prompts else None
    if encoders is None:
        return {}
    found = {
        text: conditioning_cache.find(encoders, text)
        for text, kept in zip(plan.prompts, plan.conditionings, strict=True)
        if not kept
    }
    return {text: path for text, path in found.items() if path}


def _keep(plan: Plan, places: dict[str, str]) -> bool:
    """Keep what was encoded, if the encoders' hashes are known: from an earlier run, or when a picture is done."""
    encoders = encoders_of(plan.files) if plan.cache and places else None
    if encoders is None:
        return False
    for text, path in places.items():
        conditioning_cache.keep(encoders, text, path)
    return True


def _text_job(plan: Plan, places: dict[str, str], then: SampleJob) -> TextJob:
    files = plan.files
    return TextJob(
        tuple(places),
        tuple(places.values()),
        files.text_encoder,
        files.clip,
        files.t5_tokenizer,
        files.clip_tokenizer,
        plan.device,
        plan.vram,
        then,
    )


def _sample_job(plan: Plan, places: dict[str, str]) -> SampleJob:
    images = tuple(
        replace(
            image,
            conditioning=image.conditioning or places[image.prompt],
            negative_conditioning=places[image.negative] if image.cfg != 1 else "",
        )
        for image in plan.images
    )
    return SampleJob(
        images, plan.files, plan.out, plan.format, plan.dtype, plan.device, plan.peek, plan.peek_steps, plan.vram
    )


def decoding(latents: Sequence[str], given: dict[str, Any], out: Path | None = None) -> str:
    """The command that decodes these latents, and no others that lie beside them."""
    words = ["fluxsplit", "decode", *map(_shown, _as_folder(latents))]
    for flag in ("model", "vae", "comfyui", "upscale", "upscale_to"):
        words += [f"--{flag.replace('_', '-')}", str(given[flag])] if given.get(flag) else []
    return shlex.join([*words, *(["--out", _shown(str(out))] if out else [])])


def _as_folder(latents: Sequence[str]) -> Sequence[str]:
    """The folder that these latents are all of, if it is; else the latents."""
    folder = Path(latents[0]).parent
    held = (file for file in folder.iterdir() if not is_hidden(file))
    there = {str(file) for file in held if file.suffix.lower() in SUFFIXES.values()}
    return [str(folder)] if len(there) > 1 and there == set(latents) else latents


def _shown(name: str) -> str:
    """A path as short as it can be typed here."""
    path, here = Path(name), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else name
