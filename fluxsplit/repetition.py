"""What a picture says of itself, and what is asked to be different → the picture to sample.

Flags come before what the file says; what neither says is an error that names the flag, or a default that is named.
A picture at its own size with nothing changed is repeated to the bit: its recorded noise levels and its own start.
At another size `keep` decides what is carried over (see `start`); coupled noise needs the noise that the picture was
made of, so without it (drawn on a graphics card, made from another picture) only the picture itself can be kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fluxsplit import defaults
from fluxsplit.arguments import (
    MAX_CFG,
    check_cfg,
    check_choice,
    check_prompt,
    check_range,
    draw_seed,
    parse_seeds,
    parse_shift,
    parse_sigmas,
    parse_size,
    prompt_warnings,
)
from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.found_recipe import FoundRecipe
from fluxsplit.jobs import ImageJob
from fluxsplit.recipe import MAX_STEPS, SAMPLERS, SCHEDULERS, VAE_FACTOR, check_size
from fluxsplit.start import FITS, KEEPS, MAX_GRIDS, MIN_STRENGTH, NoiseGrid, Start

MAX_SCALE = 16.0
LEAST_SIDE_PX = 2 * VAE_FACTOR
PHOTO_PIXELS = 1 << 20
"""What a picture that says nothing of itself is rendered at, if it is larger: where FLUX.1 draws best."""
_CHANGES = ("prompt", "negative", "seed", "steps", "guidance", "cfg", "sampler", "scheduler", "shift", "sigmas")
_KEEPING = ("keep", "strength", "low_frequency_guidance")
"""Not `fit`: at its own size there is nothing to fit."""
_NEUTRAL = {"fit": FITS[0], "low_frequency_guidance": 0.0}
"""What asks for nothing."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """What is to be kept of a picture, before its latent is at hand."""

    keep: str
    """One of `KEEPS`, or `same` for a picture that is repeated with its own start."""
    noise: tuple[NoiseGrid, ...] = ()
    strength: float = 1.0
    fit: str = "stretch"
    low_frequency_guidance: float = 0.0

    @property
    def needs_latent(self) -> bool:
        """Whether the picture itself is started from."""
        return self.keep in ("image", "composition")

    def start(self, latent_sha256: str) -> Start | None:
        """The start of a picture whose latent has that SHA-256."""
        if self.keep not in KEEPS[1:]:
            return None
        return Start(
            self.keep,
            self.noise,
            self.strength,
            self.fit,
            self.low_frequency_guidance,
            latent_sha256 if self.needs_latent else "",
        )


@dataclass(slots=True)
class Told:
    """What is to be said of a picture."""

    assumed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def images_of(
    found: FoundRecipe, given: Mapping[str, Any], variant: str, config: Mapping[str, Any], told: Told
) -> list[ImageJob]:
    """The pictures to sample, one for each seed, without their start; raises UsageError for what is missing.

    `given` are the flags; `variant` and `config` are those of the transformer.
    """
    width, height = new_size(found, given, told)
    prompt, negative, cfg = _texts(found, given, told)
    levels = _levels(found, given, (width, height), variant, config, told)
    sampler = _named("sampler", found.sampler, given, SAMPLERS, told)
    guidance = given.get("guidance", found.guidance)
    if given.get("guidance") is not None:
        check_range("guidance", given["guidance"], 0, 1000)
        if variant != "dev":
            raise UsageError("--guidance has no effect: the model is schnell, which takes none", "drop --guidance")
    elif variant == "dev" and guidance is None:
        told.assumed.append(f"guidance {defaults.guidance_of(variant):g} (--guidance)")
    return [
        ImageJob(
            prompt=prompt,
            conditioning="",
            seed=seed,
            width=width,
            height=height,
            guidance=guidance if variant == "dev" else None,
            cfg=cfg,
            negative=negative,
            sampler=sampler,
            noise_index=given.get("noise_index", found.noise_index) or 0,
            **levels,
        )
        for seed in _seeds(found, given, told)
    ]


def is_repetition(found: FoundRecipe, given: Mapping[str, Any]) -> bool:
    """Whether exactly the picture of a recipe of ours is asked for."""
    recipe = found.recipe
    if recipe is None or new_size(found, given, Told()) != (recipe.width, recipe.height):
        return False
    made_of = recipe.start is None and given.get("keep") in ("seed", "noise")
    if made_of and not _asks(given, "fit"):  # at its own size there is nothing else to keep
        given = {name: value for name, value in given.items() if name != "keep"}
    changed = any(_asks(given, name) for name in (*_CHANGES, *_KEEPING, "noise_index"))
    return not changed and given.get("count", 1) == 1


def _asks(given: Mapping[str, Any], name: str) -> bool:
    """Whether a flag is given that asks for something."""
    return given.get(name) is not None and given[name] != _NEUTRAL.get(name)


def new_size(found: FoundRecipe, given: Mapping[str, Any], told: Told) -> tuple[int, int]:
    """Width and height to render; raises UsageError."""
    if given.get("size") and given.get("scale") is not None:
        raise UsageError("--size and --scale both say how large", "drop one")
    if given.get("size"):
        return parse_size(given["size"])
    width, height = own_size(found)
    if not width or not height:
        raise UsageError("its size is not known", "give --size")
    if given.get("scale") is None:
        if found.tool is None:
            return _rounded(width, height, min(1.0, math.sqrt(PHOTO_PIXELS / (width * height))), told)
        check_size(width, height)
        return width, height
    scale = given["scale"]
    if not (math.isfinite(scale) and 0 < scale <= MAX_SCALE):
        raise UsageError(f"--scale {scale:g} is not above 0 and up to {MAX_SCALE:g}")
    if min(width, height) * scale < LEAST_SIDE_PX:
        hint = f"the smallest is {math.ceil(1000 * LEAST_SIDE_PX / min(width, height)) / 1000:g}"
        raise UsageError(f"--scale {scale:g} of {width}x{height} is less than {LEAST_SIDE_PX} a side", hint)
    return _rounded(width, height, scale, told)


def _rounded(width: int, height: int, scale: float, told: Told) -> tuple[int, int]:
    size = tuple(max(2, round(side * scale / VAE_FACTOR)) * VAE_FACTOR for side in (width, height))
    check_size(size[0], size[1])
    if size != (width * scale, height * scale):
        times = f"{scale:.3g} times its own" if scale != 1 else "its own"
        told.assumed.append(f"size {size[0]}x{size[1]}, the multiple of 8 nearest to {times} (--size)")
    return size[0], size[1]


def own_size(found: FoundRecipe) -> tuple[int, int]:
    """The size at which a picture was sampled, else that of the file; 0 where neither is known."""
    if found.width and found.height:
        return found.width, found.height
    return found.picture_width or 0, found.picture_height or 0


def keeping_of(found: FoundRecipe, given: Mapping[str, Any], size: tuple[int, int], told: Told) -> Keeping:
    """What to keep at a new size; raises UsageError where what was asked for cannot be."""
    asked = given.get("keep")
    if asked is not None:
        check_choice("keep", asked, KEEPS)
    noise = known_noise(found, given)
    keep = asked or _default_keep(found, given, size, noise, told)
    if keep in ("noise", "composition") and not noise:
        raise UsageError(
            f"--keep {keep} needs the noise that the picture was made of, which is not known here", "use --keep image"
        )
    if asked is not None or keep != "seed":
        _check_useful(keep, given)
    fit = check_choice("fit", given.get("fit", "stretch"), FITS)
    weight = given.get("low_frequency_guidance", defaults.LOW_FREQUENCY_GUIDANCE)
    check_range("low-frequency-guidance", weight, 0, 1)
    if keep == "seed":
        return Keeping(keep)
    grids = () if keep == "image" else (*noise[:-1], replace(noise[-1], fit=fit))
    if keep == "noise":
        return Keeping(keep, grids, fit=fit)
    strength = _strength(given)
    return Keeping(keep, grids, strength, fit, weight)


def _strength(given: Mapping[str, Any]) -> float:
    if given.get("sigmas"):
        first = parse_sigmas(given["sigmas"])[0]
        if given.get("strength") not in (None, first):
            raise UsageError(f"--sigmas begin at {first:g}, which is their strength", "drop --strength")
        return first
    strength = float(given.get("strength", defaults.STRENGTH))
    check_range("strength", strength, MIN_STRENGTH, 1)
    return strength


def _default_keep(
    found: FoundRecipe, given: Mapping[str, Any], size: tuple[int, int], noise: tuple[NoiseGrid, ...], told: Told
) -> str:
    if found.tool is not None and size == own_size(found) and not any(_asks(given, name) for name in _KEEPING):
        return "seed"
    if noise or defaults.KEEP in ("seed", "image"):
        return defaults.KEEP
    told.assumed.append("keep image, since its noise is not known (--keep)")
    return "image"


def _check_useful(keep: str, given: Mapping[str, Any]) -> None:
    useless = {"seed": ("strength", "fit", "low_frequency_guidance"), "noise": ("strength", "low_frequency_guidance")}
    for name in useless.get(keep, ()):
        if _asks(given, name):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} has no effect with --keep {keep}", "use --keep composition, or drop it")


def known_noise(found: FoundRecipe, given: Mapping[str, Any]) -> tuple[NoiseGrid, ...]:
    """The grids of noise that a picture was made of, its own last; empty where they are not known."""
    size = (found.width, found.height)
    if found.seed is None or found.noise_source == "gpu" or None in size:
        return ()
    if found.recipe is None and found.denoise not in (None, 1.0):
        return ()
    before: tuple[NoiseGrid, ...] = ()
    if found.recipe is not None and found.recipe.start is not None:
        before = found.recipe.start.noise
    own = NoiseGrid(found.seed, int(found.width or 0), int(found.height or 0), found.noise_index or 0)
    return (*before, own)[-MAX_GRIDS:] if len(before) < MAX_GRIDS else ()


def _seeds(found: FoundRecipe, given: Mapping[str, Any], told: Told) -> list[int]:
    seeds = given.get("seed") or ([] if found.seed is None else [str(found.seed)])
    if not seeds and found.tool is None:  # a photo, of which nothing is to be repeated
        seeds = [str(draw_seed())]
        told.assumed.append(f"seed {seeds[0]} (--seed)")
    if not seeds:
        raise UsageError("it does not say its seed", "give --seed")
    return parse_seeds(seeds, given.get("count", 1), without="it is the picture's own, with --count those after it")


def _texts(found: FoundRecipe, given: Mapping[str, Any], told: Told) -> tuple[str, str, float]:
    """Prompt, negative prompt and cfg."""
    prompts = given.get("prompt") or ([] if found.prompt is None else [found.prompt])
    if not prompts:
        raise UsageError("it does not say its prompt", "give --prompt")
    if len(prompts) > 1:
        raise UsageError(f"a rerender has one prompt, {len(prompts)} are given", "give one --prompt")
    cfg = given.get("cfg", found.cfg)
    if cfg is None:
        cfg = 1.0
        told.assumed.append("cfg 1 (--cfg)")
    if given.get("cfg") is not None:
        check_cfg(cfg)
    check_range("cfg", cfg, 0, MAX_CFG)
    negative = check_prompt(given.get("negative", found.negative or ""))
    if negative and cfg == 1:
        if given.get("negative"):
            raise UsageError(
                "a negative prompt has no effect with --cfg 1, which never computes it", "give --cfg 2 or so"
            )
        told.assumed.append("no negative prompt: with cfg 1 it does nothing")
        negative = ""
    told.warnings += prompt_warnings(prompts[0])
    return check_prompt(prompts[0]), negative, float(cfg)


def _named(flag: str, found: str | None, given: Mapping[str, Any], known: tuple[str, ...], told: Told) -> str:
    """A sampler or scheduler: the flag's, the file's, or the first of the known ones, which is then told."""
    if given.get(flag):
        return check_choice(flag, given[flag], known)
    if found in known:
        return str(found)
    told.assumed.append(f"{flag} {known[0]} (--{flag})")
    return known[0]


def _levels(
    found: FoundRecipe,
    given: Mapping[str, Any],
    size: tuple[int, int],
    variant: str,
    config: Mapping[str, Any],
    told: Told,
) -> dict[str, Any]:
    """Steps, scheduler, shift and sigmas, named as ImageJob names them."""
    if given.get("sigmas"):
        return {"sigmas": parse_sigmas(given["sigmas"])}
    if given.get("steps") is not None:
        check_range("steps", given["steps"], 1, MAX_STEPS)
    asked = any(given.get(name) is not None for name in ("steps", "scheduler", "shift"))
    if found.scheduler == "custom" and found.sigmas and not asked:
        return {"sigmas": found.sigmas}
    steps = given.get("steps", found.steps)
    if steps is None:
        told.assumed.append(f"{defaults.steps_of(variant, dict(config))} steps (--steps)")
    told_shift = given.get("shift") is not None
    levels = {
        "steps": steps,
        "scheduler": _named("scheduler", found.scheduler, given, SCHEDULERS, told),
        "shift": parse_shift(given["shift"]) if told_shift else _shift(found, variant, dict(config)),
    }
    if found.recipe is not None and found.sigmas and is_repetition(found, given):
        levels["recorded_sigmas"] = found.sigmas
    return levels


def _shift(found: FoundRecipe, variant: str, config: dict[str, Any]) -> float | None:
    """mu at the new size: by the model's rule where the picture's was that at its own, else as it was."""
    if found.shift is None or not (found.width and found.height):
        return None
    by_rule = defaults.shift_of(variant, config, found.width, found.height)
    return None if by_rule is not None and abs(by_rule - found.shift) < 1e-9 else found.shift


def described(found: FoundRecipe) -> str:
    """What a file says, in one line for people."""
    parts = [found.tool or "no recipe"]
    if found.prompt is not None:
        parts.append(f"prompt {found.prompt if len(found.prompt) <= 60 else found.prompt[:59] + '…'!r}")
    if found.seed is not None:
        parts.append(f"seed {found.seed}")
    if found.width and found.height:
        parts.append(f"{found.width}x{found.height}")
    if found.steps is not None:
        parts.append(f"{found.steps} steps")
    parts += [text for text in (found.sampler, found.scheduler) if text]
    for name in ("guidance", "cfg", "shift"):
        value = getattr(found, name)
        if value is not None and (name, value) != ("cfg", 1.0):
            parts.append(f"{name} {value:.6g}")
    if found.model:
        parts.append(f"model {found.model}")
    return ", ".join(parts)


def require_recipe(found: FoundRecipe, given: Mapping[str, Any]) -> None:
    """Raise where a file says nothing, and the flags do not say it instead."""
    if found.tool is None and not given.get("prompt"):
        raise FluxsplitError("it does not say how it was made", "give --prompt")
