"""`fluxsplit sample`: flags and settings → the plan of images to make."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxsplit import durable, places
from fluxsplit.already_made import made_in, renderer_of
from fluxsplit.arguments import (
    MAX_IMAGES,
    check_cfg,
    check_choice,
    check_device,
    check_prompt,
    check_range,
    draw_seed,
    gather_prompts,
    out_folder,
    parse_seeds,
    parse_shift,
    parse_sigmas,
    parse_size,
    prompt_warnings,
)
from fluxsplit.checkpoint import part, variant_of
from fluxsplit.conditioning_header import Saved, check_file, check_prompt_is, saved
from fluxsplit.errors import UsageError
from fluxsplit.jobs import ImageJob, ModelFiles, absolute
from fluxsplit.memory import check_budget
from fluxsplit.models import DEMO, Wanted, resolve
from fluxsplit.progress import Progress
from fluxsplit.recipe import DTYPES, LATENT_FORMATS, MAX_STEPS, SAMPLERS, SCHEDULERS, Recipe
from fluxsplit.sample_plan import Plan
from fluxsplit.sample_run import decoding, run_sample, run_sample_and_taef1
from fluxsplit.taef1 import find_taef1

DEFAULT_SIZE = "1024x1024"
_PARTS = ("text_encoder", "clip", "vae", "tokenizers")
"""Files that are named beside a model; the demo model has its own."""
DEMO_SIZE = "256x256"
"""Where it draws best; see docs/demo-model.md."""


def sample(given: dict[str, Any], defaults: dict[str, Any], progress: Progress) -> int:
    """Plan and render, or show the plan; returns the exit code."""
    skips = bool((defaults | given).get("skip_existing"))
    if skips and given.get("save_conditioning"):
        raise UsageError(
            "--save-conditioning keeps the prompt of what is rendered, and --skip-existing may render nothing",
            "drop one, as by --no-skip-existing",
        )
    plan = plan_sample(given, defaults)
    if skips:
        plan = _without_existing(plan, progress)
    if not plan.images:
        return 0
    if given.get("dry_run"):
        return only_planned(plan, given, progress)
    with _how_to_go_on(plan, given, progress):
        code = run_sample_and_taef1(plan, progress) if plan.taef1 else run_sample(plan, progress)
    if progress.results and sys.stdout.isatty():  # not where a pipe takes them on
        latents = [path for path in progress.results if not path.endswith(".png")]  # beside them may be peeks
        progress.note(f"to see what was made: {decoding(latents, given)}")
    return code


@contextmanager
def _how_to_go_on(plan: Plan, given: dict[str, Any], progress: Progress) -> Iterator[None]:
    """Where it is ended early, say how what is finished need not be made again."""
    before = len(progress.results)
    try:
        yield
    except BaseException:
        done = sum(not path.endswith(".png") for path in progress.results[before:])
        if 0 < done < len(plan.images):
            without = ", without --save-conditioning," if given.get("save_conditioning") else ""
            seed = "" if given.get("seed") else f"--seed {plan.images[0].seed} and "
            finished = f"{done} of {len(plan.images)} are finished"
            progress.note(f"{finished}; the same command with {seed}--skip-existing{without} goes on")
        raise


def _without_existing(plan: Plan, progress: Progress) -> Plan:
    """The plan without what its folder holds already; that is told as results."""
    found = made_already(plan, progress)
    for path, recipe in found.values():
        progress.show({"event": "result", "path": str(path), "recipe": recipe.to_object()})
    return without_made(plan, found)


def made_already(plan: Plan, progress: Progress) -> dict[int, tuple[Path, Recipe]]:
    """Latents in the plan's folder that are what its images ask for, by their numbers; how many there are is told."""
    found = made_in(Path(plan.out), plan.images, renderer_of(plan.files, None, plan.dtype, plan.device))
    if found:
        progress.note(f"{len(found)} of {len(plan.images)} are in {plan.out} already")
    return found


def without_made(plan: Plan, made: Collection[int]) -> Plan:
    """The plan without the images of these numbers, and without prompts that only they have."""
    images = tuple(image for number, image in enumerate(plan.images) if number not in made)
    texts = {text for image in images for text in (image.prompt, image.negative)}
    kept = [(text, file) for text, file in zip(plan.prompts, plan.conditionings, strict=True) if text in texts]
    prompts, conditionings = zip(*kept, strict=True) if kept else ((), ())
    return replace(plan, images=images, prompts=prompts, conditionings=conditionings)


def is_demo(values: dict[str, Any]) -> bool:
    """Whether flags and settings mean the demo model."""
    return values.get("model", "") in ("", DEMO)


def only_planned(plan: Plan, given: dict[str, Any], progress: Progress) -> int:
    """`--dry-run`: show the plan and do nothing; returns the exit code."""
    from fluxsplit.dry_run import show_plan  # noqa: PLC0415  only where it is needed

    durable.check_folder(plan.out)
    for note in plan.notes:
        progress.note(note)
    show_plan(plan, bool(given.get("json")))
    return 0


def plan_sample(given: dict[str, Any], defaults: dict[str, Any]) -> Plan:
    """The plan of a command from its flags and, where they are silent, the settings; raises FluxsplitError."""
    _check_contradictions(given)
    values = defaults | given
    notes: list[str] = []
    images = _images(values, notes)
    wanted = wanted_files(values)
    _check_demo(given, wanted)
    need = ("transformer",) if values.get("conditioning") else ("transformer", "t5", "clip")
    files = resolve(wanted, need)
    if values.get("conditioning"):
        check_file(images[0].conditioning, part(files.transformer, "transformer"))
    notes += _found_notes(files, wanted)
    texts, kept = _texts_to_encode(images, values)
    peek = bool(values.get("peek", False))
    taef1 = find_taef1("auto", places.comfyui_root(wanted.comfyui)) if peek and not files.is_demo else ""
    return Plan(
        files=files,
        prompts=texts,
        conditionings=kept,
        images=tuple(_guided(images, given, files.transformer)),
        out=out_folder(values, "latents"),
        format=check_choice("format", values.get("format", "pt"), LATENT_FORMATS),
        dtype=check_choice("dtype", values.get("dtype", "auto"), DTYPES),
        device=check_device(values.get("device", "auto")),
        notes=tuple(notes),
        vram=check_budget(str(values.get("vram", "auto"))),
        peek=peek and not taef1,
        taef1=taef1,
        peek_steps=bool(values.get("peek_steps", False)),
        cache=bool(values.get("cache", True)),
    )


def wanted_files(values: dict[str, Any]) -> Wanted:
    """The files that flags and settings name."""
    names = ("model", "text_encoder", "clip", "vae", "tokenizers", "comfyui")
    return Wanted(**{name: values.get(name, "") for name in names})


def _check_contradictions(given: dict[str, Any]) -> None:
    """Refuse flags of which one would silently undo the other."""
    if given.get("sigmas"):
        for flag in ("scheduler", "shift"):
            if given.get(flag):
                raise UsageError(f"--{flag} has no effect on noise levels that are given by --sigmas", "drop one")
    if given.get("conditioning") and given.get("save_conditioning"):
        raise UsageError("--save-conditioning would copy the file of --conditioning", "drop one")


def _check_demo(given: dict[str, Any], wanted: Wanted) -> None:
    if not wanted.model:
        for name in _PARTS:
            if given.get(name):
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} is given without --model", "the demo model brings its own parts")


def _images(values: dict[str, Any], notes: list[str]) -> list[ImageJob]:
    """Every prompt with every seed; what is left to the model's own defaults is None."""
    cfg, negative = float(values.get("cfg", 1.0)), check_prompt(values.get("negative", ""))
    check_cfg(cfg)
    if negative and cfg == 1:
        raise UsageError(
            "a negative prompt has no effect with --cfg 1, which never computes it",
            "give --cfg 2 or so (each step then takes twice as long), or drop --negative",
        )
    kept, prompts = _conditioning_and_prompts(values, cfg, notes)
    notes += dict.fromkeys(text for prompt in prompts for text in prompt_warnings(prompt))
    seeds = parse_seeds(values.get("seed") or [_drawn(notes)], values.get("count", 1))
    if len(prompts) * len(seeds) > MAX_IMAGES:
        raise UsageError(f"{len(prompts)} prompts with {len(seeds)} seeds are over {MAX_IMAGES} images in one run")
    options = _options(values)
    width, height = parse_size(values.get("size") or (DEMO_SIZE if is_demo(values) else DEFAULT_SIZE))
    return [
        ImageJob(
            prompt=prompt,
            conditioning=kept.path,
            conditioning_sha256=kept.sha256,
            seed=seed,
            width=width,
            height=height,
            cfg=cfg,
            negative=negative,
            **options,
        )
        for prompt in prompts
        for seed in seeds
    ]


def _drawn(notes: list[str]) -> str:
    seed = str(draw_seed())
    notes.append(f"seed {seed}")
    return seed


def _options(values: dict[str, Any]) -> dict[str, Any]:
    """Checked settings of the sampler that ImageJob takes by the same names."""
    sigmas = parse_sigmas(values["sigmas"]) if values.get("sigmas") else ()
    steps, noise_index = values.get("steps"), values.get("noise_index", 0)
    if steps is not None:
        check_range("steps", steps, 1, MAX_STEPS)
        if sigmas and steps != len(sigmas) - 1:
            raise UsageError(f"{len(sigmas)} sigmas make {len(sigmas) - 1} steps, not {steps}", "drop --steps")
    if values.get("guidance") is not None:
        check_range("guidance", values["guidance"], 0, 1000)
    check_range("noise-index", noise_index, 0, 9999)
    return {
        "steps": steps,
        "guidance": values.get("guidance"),
        "sampler": check_choice("sampler", values.get("sampler", "euler"), SAMPLERS),
        "scheduler": check_choice("scheduler", values.get("scheduler", "simple"), SCHEDULERS),
        "sigmas": sigmas,
        "shift": parse_shift(values.get("shift", "auto")),
        "noise_index": noise_index,
    }


def _conditioning_and_prompts(values: dict[str, Any], cfg: float, notes: list[str]) -> tuple[Saved, list[str]]:
    """A saved conditioning, with nothing in it where none is given, and the prompts."""
    given, file = values.get("prompt", []), values.get("prompt_file", "")
    if not values.get("conditioning"):
        prompts = gather_prompts(given, file)
        if values.get("save_conditioning") and len(prompts) > 1:
            raise UsageError(f"--save-conditioning keeps one prompt, {len(prompts)} are given", "give one prompt")
        return Saved("", "", ""), prompts
    kept = saved(values["conditioning"], cfg)
    prompts = gather_prompts(given, file) if given or file else [kept.prompt]
    if len(prompts) > 1:
        raise UsageError(f"--conditioning stands for one prompt, {len(prompts)} are given", "give one at most")
    notes += check_prompt_is(kept, prompts[0], "drop --prompt, or --conditioning")
    return kept, prompts


def _texts_to_encode(images: list[ImageJob], values: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Each text once, and where its conditioning is to be kept, if anywhere."""
    texts = [image.prompt for image in images if not image.conditioning]
    if images and images[0].cfg != 1:
        texts.append(images[0].negative)
    unique = tuple(dict.fromkeys(texts))
    kept = values.get("save_conditioning", "")
    if kept and Path(kept).expanduser().exists():
        raise UsageError(f"--save-conditioning {kept} is there already", "choose another name, or remove it")
    return unique, tuple(absolute(kept) if kept and text == images[0].prompt else "" for text in unique)


def _guided(images: list[ImageJob], given: dict[str, Any], transformer: str) -> list[ImageJob]:
    """The images with guidance only where the model takes one; a default meant for dev does not stop schnell."""
    if variant_of(part(transformer, "transformer")) == "dev":
        return images
    if given.get("guidance") is not None:
        raise UsageError(
            f"--guidance has no effect: {Path(transformer).name} is schnell, which takes none",
            "use --cfg for true guidance, or drop --guidance",
        )
    return [replace(image, guidance=None) for image in images]


def _found_notes(files: ModelFiles, wanted: Wanted) -> list[str]:
    """What was used without being named, so that nobody wonders which of two files made a picture."""
    if files.is_demo:
        unused = [f"'{name}'" for name in _PARTS if getattr(wanted, name)]  # by settings: flags would have been refused
        without = f", which has its own parts; {', '.join(unused)} in the settings are not used" if unused else ""
        return [f"no model given: using the demo model{without}"]
    parts = {"T5": (files.text_encoder, wanted.text_encoder), "CLIP": (files.clip, wanted.clip)}
    return [
        f"{title} found: {path}"
        for title, (path, named) in parts.items()
        if path not in ("", files.transformer) and not named
    ]
