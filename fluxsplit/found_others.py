"""Tools that write JSON of their own: InvokeAI, Fooocus, SwarmUI, mflux, Draw Things, NovelAI, Civitai."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fluxsplit.errors import FluxsplitError
from fluxsplit.found_recipe import FoundRecipe
from fluxsplit.found_values import (
    as_number,
    as_seed,
    as_side,
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
from fluxsplit.metadata import PARAMETERS_KEY

Table = Mapping[str, Any]


def json_object(text: str) -> Table:
    """The JSON object in `text`; empty where it is something else."""
    if not text.lstrip().startswith("{"):
        return {}
    try:
        return table_of(lenient_json(text))
    except FluxsplitError:
        return {}


def _build(tool: str, table: Table, **names: str) -> FoundRecipe:
    """The common fields, under the names that the tool gives them."""

    def of(field: str) -> Any:
        return table.get(names.get(field, field))

    sampler, sampler_note = sampler_of(of("sampler"))
    scheduler, scheduler_note = scheduler_of(of("scheduler") or schedule_behind(of("sampler")))
    return FoundRecipe(
        tool=tool,
        prompt=as_text(of("prompt")),
        negative=as_text(of("negative")),
        seed=as_seed(of("seed")),
        steps=as_steps(of("steps")),
        guidance=as_number(of("guidance")),
        cfg=as_number(of("cfg")),
        sampler=sampler,
        scheduler=scheduler,
        width=as_side(of("width")),
        height=as_side(of("height")),
        model=as_text(of("model")),
        notes=notes_of(sampler_note, scheduler_note),
    )


def read_invokeai(text: str) -> FoundRecipe:
    """InvokeAI's `invokeai_metadata`; its `scheduler` is what others call the sampler."""
    table = json_object(text)
    if not table:
        return FoundRecipe()
    found = _build(
        "InvokeAI",
        {**table, "scheduler": None, "sampler": table.get("scheduler"), "model": None},
        prompt="positive_prompt",
        negative="negative_prompt",
        cfg="cfg_scale",
    )
    model = table_of(table.get("model"))
    digest = as_text(model.get("hash")) or ""
    sha256 = digest.removeprefix("sha256:") if re.fullmatch(r"sha256:[0-9a-f]{64}", digest) else None
    strength = as_number(table.get("strength"))
    source = "cpu" if table.get("rand_device", "cpu") == "cpu" else "gpu"
    return replace(
        found, model=as_text(model.get("name")), model_hash=sha256, denoise=strength or 1.0, noise_source=source
    )


def read_fooocus(text: str) -> FoundRecipe:
    """Fooocus' own scheme in `parameters`."""
    table = json_object(text)
    if "base_model" not in table:
        return FoundRecipe()
    found = _build("Fooocus", table, negative="negative_prompt", guidance="guidance_scale", model="base_model")
    width, height = as_size(table.get("resolution"))
    note = "Fooocus renders SDXL: its guidance and sampler are carried over as they stand"
    return replace(found, width=width, height=height, notes=(*found.notes, note), noise_source="gpu")


def read_swarmui(text: str) -> FoundRecipe:
    """SwarmUI's JSON in `parameters`; `cfgscale` is true guidance, `fluxguidancescale` the distilled one."""
    table = table_of(json_object(text).get("sui_image_params"))
    if not table:
        return FoundRecipe()
    found = _build("SwarmUI", table, negative="negativeprompt", guidance="fluxguidancescale", cfg="cfgscale")
    models = json_object(text).get("sui_models")
    first = table_of(models[0]) if isinstance(models, list) and models else {}
    digest = (as_text(first.get("hash")) or "").removeprefix("0x").lower()
    return replace(found, model_hash=digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None, noise_source="cpu")


def read_mflux(text: str) -> FoundRecipe:
    """mflux' UserComment; it samples with Euler and a linear schedule, and draws noise by MLX."""
    table = json_object(text)
    if "mflux_version" not in table:
        return FoundRecipe()
    found = _build("mflux", table, negative="negative_prompt")
    warning = "mflux draws its noise with MLX, so the seed gives another picture here"
    return replace(found, sampler="euler", scheduler="simple", noise_source="gpu", warnings=(warning,))


def read_draw_things(text: str) -> FoundRecipe:
    """Draw Things' JSON in the XMP's exif:UserComment."""
    table = json_object(text)
    if not {"c", "uc", "scale"} <= set(table):
        return FoundRecipe()
    found = _build("Draw Things", table, prompt="c", negative="uc", guidance="scale")
    width, height = as_size(table.get("size"))
    warning = "Draw Things draws its noise in its own way, so the seed gives another picture here"
    return replace(found, width=width, height=height, noise_source="gpu", warnings=(warning,))


def read_novelai(texts: Mapping[str, str]) -> FoundRecipe:
    """NovelAI: the prompt under `Description`, the rest as JSON under `Comment`."""
    table = json_object(texts.get("Comment", ""))
    if texts.get("Software") != "NovelAI" or not table:
        return FoundRecipe()
    found = _build("NovelAI", table, prompt="", negative="uc", guidance="scale")
    prompt = as_text(texts.get("Description")) or as_text(table.get("prompt"))
    note = "NovelAI's models are not Flux: its scale and sampler are carried over as they stand"
    return replace(found, prompt=prompt, notes=(*found.notes, note), noise_source="gpu")


def texts_in(hidden: str) -> dict[str, str]:
    """The texts in what an alpha channel hides: NovelAI's by their keywords as JSON, else A1111's `parameters`."""
    table = json_object(hidden)
    if not table:
        return {PARAMETERS_KEY: hidden}
    return {name: text for name, text in table.items() if isinstance(text, str)}


def read_civitai(value: Any) -> FoundRecipe:
    """Civitai's `extraMetadata`, inside a ComfyUI graph."""
    table = table_of(value) or json_object(value if isinstance(value, str) else "")
    if "prompt" not in table or "cfgScale" not in table:
        return FoundRecipe()
    found = _build("Civitai", table, negative="negativePrompt", guidance="cfgScale")
    resources = table.get("resources")
    first = table_of(resources[0]) if isinstance(resources, list) and resources else {}
    version = as_seed(first.get("modelVersionId"))
    return replace(found, model=None if version is None else f"Civitai model version {version}")
