"""AUTOMATIC1111's `parameters` text, as A1111, Forge, SD.Next, stable-diffusion.cpp, Fooocus and fluxsplit write it.

The last line holds `Name: value` pairs and counts as such where at least three are found, by the regular expression of
A1111 and Forge (`modules/infotext_utils.py`); lines before it are the prompt and, from `Negative prompt:` on, the
negative one.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

from fluxsplit.errors import FluxsplitError
from fluxsplit.found_recipe import FoundRecipe
from fluxsplit.found_values import (
    as_number,
    as_seed,
    as_size,
    as_steps,
    as_text,
    lenient_json,
    notes_of,
    sampler_of,
    schedule_behind,
    scheduler_of,
    table_of,
)

PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
MIN_PAIRS = 3
MAX_LINE_CHARS = 200_000
_NEGATIVE = "Negative prompt:"
_SDCPP = ", SDCPP: {"
GPU_SEED = "the seed's noise is a GPU's (there is no RNG: CPU), so that seed gives another picture here"


def read_a1111(text: str) -> FoundRecipe:
    """The recipe in a `parameters` text; `tool` is None where it is none."""
    text, sdcpp = _without_sdcpp(text)
    *lines, last = text.strip().split("\n")
    pairs = _pairs(last)
    if len(pairs) < MIN_PAIRS:
        return FoundRecipe()
    prompt, negative = _prompts(lines)
    found = _from_pairs(pairs, prompt, negative)
    if sdcpp:
        found = _with_sdcpp(found, sdcpp)
    return found


def _pairs(line: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for match in PAIR.finditer(line[:MAX_LINE_CHARS]):
        name, value = match[1].strip(), match[2].strip()
        if value.startswith('"') and value.endswith('"'):
            try:
                value = str(json.loads(value))
            except ValueError:
                value = value[1:-1]
        pairs.setdefault(name, value)
    return pairs


def _prompts(lines: list[str]) -> tuple[str, str]:
    prompt: list[str] = []
    negative: list[str] | None = None
    for line in lines:
        if line.strip().startswith(_NEGATIVE) and negative is None:
            negative = [line.strip()[len(_NEGATIVE) :].strip()]
        elif negative is not None:
            negative.append(line)
        else:
            prompt.append(line)
    return "\n".join(prompt).strip(), "\n".join(negative or []).strip()


def _tool(pairs: dict[str, str]) -> str:
    version = pairs.get("Version", "")
    if version.startswith("fluxsplit"):
        return "fluxsplit"
    if "stable-diffusion.cpp" in version:
        return "stable-diffusion.cpp"
    if pairs.get("App") == "SD.Next":
        return "SD.Next"
    if version.startswith("Fooocus"):
        return "Fooocus"
    if re.match(r"f\d|neo", version) or "Distilled CFG Scale" in pairs or "Module 1" in pairs:
        return "Forge"
    return "A1111"


def _guidance(pairs: dict[str, str]) -> tuple[float | None, float | None, str | None]:
    """Distilled guidance, true guidance, and a note."""
    scale = as_number(pairs.get("CFG scale"))
    distilled = as_number(pairs.get("Distilled CFG Scale", pairs.get("Guidance")))
    if distilled is not None:
        return distilled, scale, None
    if scale is None or scale == 1:
        return None, scale, None
    return scale, 1.0, f"CFG scale {scale:g} is read as Flux's guidance, since no distilled one is given"


def _from_pairs(pairs: dict[str, str], prompt: str, negative: str) -> FoundRecipe:
    tool = _tool(pairs)
    schedule = pairs.get("Schedule type", pairs.get("Scheduler" if tool != "SD.Next" else "Schedule"))
    name = pairs.get("Sampler", "")
    if tool == "stable-diffusion.cpp" and " " in name:
        name, schedule = name.rsplit(" ", 1)
        schedule = None if schedule == "discrete" else schedule  # its word for the model's own
    sampler, sampler_note = sampler_of(name)
    scheduler, scheduler_note = scheduler_of(schedule_behind(name) if schedule in (None, "Automatic") else schedule)
    guidance, cfg, guidance_note = _guidance(pairs)
    width, height = as_size(pairs.get("Size"))
    on_cpu = pairs.get("RNG", "").lower() == "cpu" or tool == "fluxsplit"
    upscaled = "Hires upscale" in pairs or "Hires resize" in pairs
    denoise = None if upscaled else as_number(pairs.get("Denoising strength"))
    return FoundRecipe(
        tool=tool,
        prompt=as_text(prompt),
        negative=as_text(negative),
        seed=as_seed(pairs.get("Seed")),
        steps=as_steps(pairs.get("Steps")),
        guidance=guidance,
        cfg=cfg,
        sampler=sampler,
        scheduler=scheduler,
        width=width,
        height=height,
        noise_index=as_seed(pairs.get("Noise index")),
        model=as_text(pairs.get("Model") or pairs.get("Unet") or pairs.get("UNet") or None),
        model_hash=_hash(pairs),
        denoise=1.0 if denoise is None else denoise,
        noise_source="cpu" if on_cpu else "gpu",
        notes=notes_of(sampler_note, scheduler_note, guidance_note, *_hires_notes(pairs)),
        warnings=notes_of(None if on_cpu else GPU_SEED, _lora_warning(prompt)),
    )


def _lora_warning(prompt: str) -> str | None:
    names = re.findall(r"<lora:([^:<>]{1,80})", prompt[:MAX_LINE_CHARS])
    return f"the prompt loads LoRA {', '.join(names[:4])}, which fluxsplit does not" if names else None


def _hash(pairs: dict[str, str]) -> str | None:
    text = pairs.get("Model hash", "").lower()
    return text if re.fullmatch(r"[0-9a-f]{8,64}", text) else None


def _hires_notes(pairs: dict[str, str]) -> tuple[str, ...]:
    if "Hires upscale" not in pairs and "Hires resize" not in pairs:
        return ()
    how = pairs.get("Hires upscale", pairs.get("Hires resize", ""))
    return (f"the picture went through a hires fix ({how[:20]}); size and seed are those of its first pass",)


def _without_sdcpp(text: str) -> tuple[str, str]:
    """stable-diffusion.cpp appends its JSON unquoted, which would tear the pairs apart."""
    at = text.find(_SDCPP)
    return (text, "") if at < 0 else (text[:at], text[at + len(_SDCPP) - 1 :])


def _with_sdcpp(found: FoundRecipe, text: str) -> FoundRecipe:
    """The model from stable-diffusion.cpp's own JSON; its `Model` is empty with --diffusion-model."""
    try:
        table = table_of(lenient_json(text))
    except FluxsplitError:
        return replace(found, tool="stable-diffusion.cpp")
    models = table_of(table.get("models"))
    name = as_text(models.get("diffusion_model")) or as_text(models.get("model")) or found.model
    return replace(found, tool="stable-diffusion.cpp", model=_base_name(name))


def _base_name(path: str | None) -> str | None:
    return re.split(r"[/\\]", path)[-1] if path else path
