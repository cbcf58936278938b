"""ComfyUI's graphs: the settings of the sampler that made the picture, by following links back from what was saved.

The API graph (`prompt`) is `{id: {"class_type", "inputs": {name: value | [id, slot]}}}`; the page's graph (`workflow`)
keeps values by position and is turned into the same form by `api_graph`, from tables of which value is which (ComfyUI
`nodes.py`, `comfy_extras/nodes_custom_sampler.py`, `nodes_flux.py`, `nodes_sd3.py`). The API graph is preferred.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fluxsplit.found_others import json_object, read_civitai
from fluxsplit.found_recipe import FoundRecipe
from fluxsplit.found_values import (
    as_count,
    as_number,
    as_seed,
    as_side,
    as_steps,
    as_text,
    file_name,
    notes_of,
    sampler_of,
    scheduler_of,
    table_of,
)

Node = Mapping[str, Any]
Graph = Mapping[str, Node]
MAX_DEPTH = 20
MAX_NODES = 5000
MAX_NAMED = 4
_CONDITIONINGS = ("conditioning", "conditioning_1", "conditioning_to", "positive", "")
_SECOND_TEXTS = ("conditioning_2", "conditioning_from")
"""Inputs of nodes that make one conditioning of two."""
_SAVERS = ("SaveImage", "PreviewImage", "SaveLatent", "SaveAnimatedWEBP", "SaveImageWebsocket")
_SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustomAdvanced", "SamplerCustom")
_TEXT_KEYS = ("t5xxl", "text", "text_g", "value", "string", "populated_text", "prompt", "wildcard_text", "clip_l")
_VALUE_KEYS = ("value", "seed", "noise_seed", "int", "float", "string", *_TEXT_KEYS)
_LATENT_SIZES = ("width", "height")
_COMFY_DEV_SHIFT = 1.15
_WIDGETS: dict[str, tuple[str, ...]] = {
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (
        *("add_noise", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler", "start_at_step"),
        *("end_at_step", "return_with_leftover_noise"),
    ),
    "SamplerCustom": ("add_noise", "noise_seed", "", "cfg"),
    "RandomNoise": ("noise_seed", ""),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "KSamplerSelect": ("sampler_name",),
    "FluxGuidance": ("guidance",),
    "CFGGuider": ("cfg",),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeFlux": ("clip_l", "t5xxl", "guidance"),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "EmptyFlux2LatentImage": ("width", "height", "batch_size"),
    "ModelSamplingFlux": ("max_shift", "base_shift", "width", "height"),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "UnetLoaderGGUF": ("unet_name",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "LatentFromBatch": ("batch_index", "length"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "ControlNetApplyAdvanced": ("strength", "start_percent", "end_percent"),
    "ConditioningAverage": ("conditioning_to_strength",),
}
_PATCHES = ("ipadapter", "pulid", "freeu", "teacache")
"""In the kind, in lower case, of nodes between a model and its sampler that change what it draws, besides LoRAs."""
_STEERING = ("controlnet", "stylemodel", "referencelatent", "inpaintmodel", "instructpixtopix")
"""The same, between the text and the sampler."""


@dataclass(frozen=True, slots=True)
class _Walk:
    """A graph, and looking things up in it."""

    graph: Graph

    def linked(self, node: Node, name: str) -> Node:
        """The node that an input is linked to; empty where it is a value, or there is none."""
        value = table_of(node.get("inputs")).get(name)
        if isinstance(value, list) and value and isinstance(value[0], str | int):
            return table_of(self.graph.get(str(value[0])))
        return {}

    def value(self, node: Node, name: str) -> Any:
        """The value of an input, through primitives."""
        for _ in range(MAX_DEPTH):
            value = table_of(node.get("inputs")).get(name)
            if not isinstance(value, list):
                return value
            node = self.linked(node, name)
            keys = [key for key in _VALUE_KEYS if _has(node, key)]
            if not keys:
                return None
            name = name if _has(node, name) else keys[0]
        return None

    def back(self, node: Node, names: tuple[str, ...]) -> Iterator[Node]:
        """The node, and those before it through the first of `names` that is linked, each once."""
        seen: list[Node] = []
        for _ in range(MAX_DEPTH):
            if not node or any(node is other for other in seen):
                return
            yield node
            seen.append(node)
            node = next((found for name in names if (found := self.linked(node, name))), {})


def _has(node: Node, name: str) -> bool:
    return name in table_of(node.get("inputs"))


def _kind(node: Node) -> str:
    return as_text(node.get("class_type")) or ""


def read_comfy(prompt: str, workflow: str) -> FoundRecipe:
    """The recipe in ComfyUI's two texts, either of which may be empty; `tool` is None where there is no sampler."""
    graph = _api(json_object(prompt))
    if (civitai := _civitai(prompt)).tool:
        return civitai
    if not graph:
        graph = api_graph(json_object(workflow))
    walk = _Walk(graph)
    sampler = _sampler(walk)
    return FoundRecipe() if not sampler else _settings(walk, sampler)


def _civitai(prompt: str) -> FoundRecipe:
    return read_civitai(json_object(prompt).get("extraMetadata"))


def _api(table: Mapping[str, Any]) -> Graph:
    if len(table) > MAX_NODES:
        return {}
    return {str(key): node for key, node in table.items() if isinstance(node, dict) and "class_type" in node}


def _sampler(walk: _Walk) -> Node:
    """The sampler behind what was saved; else the first one that there is."""
    for saver in walk.graph.values():
        if _kind(saver) in _SAVERS:
            for node in walk.back(saver, ("images", "samples", "image", "pixels", "latent_image", "")):
                if _kind(node) in _SAMPLERS:
                    return node
    return next((node for node in walk.graph.values() if _kind(node) in _SAMPLERS), {})


def _settings(walk: _Walk, node: Node) -> FoundRecipe:
    custom = _kind(node) in ("SamplerCustomAdvanced", "SamplerCustom")
    levels = _back_to(walk, walk.linked(node, "sigmas"), "BasicScheduler") if custom else node
    chooser = walk.linked(node, "sampler") if custom else node
    guider = walk.linked(node, "guider") or node
    noise = walk.linked(node, "noise") or node
    sampler, sampler_note = sampler_of(walk.value(chooser, "sampler_name"))
    scheduler, scheduler_note = scheduler_of(walk.value(levels, "scheduler"))
    positive = walk.linked(guider, "positive") or walk.linked(guider, "conditioning")
    prompt, guidance = _text(walk, positive)
    cfg = as_number(walk.value(guider, "cfg"))
    negative, _ = _text(walk, walk.linked(guider, "negative")) if cfg not in (None, 1) else (None, None)
    model = _model(walk, node, guider, levels)
    shift, shift_note = _shift(walk, guider, levels, guidance is not None or "dev" in (model or "").lower())
    width, height, index, batch_note = _size(walk, node)
    seed = walk.value(noise, "noise_seed")
    return FoundRecipe(
        tool="ComfyUI",
        prompt=prompt,
        negative=negative or "",
        seed=as_seed(seed if seed is not None else walk.value(noise, "seed")),
        steps=as_steps(walk.value(levels, "steps")),
        guidance=guidance,
        cfg=cfg if cfg is not None else 1.0,
        sampler=sampler,
        scheduler=scheduler,
        shift=shift,
        width=width,
        height=height,
        noise_index=index,
        model=model,
        denoise=_denoise(walk, levels),
        noise_source="cpu",
        notes=notes_of(sampler_note, scheduler_note, shift_note, batch_note),
        warnings=notes_of(_began_late(walk, node), *_unlike_ours(walk, positive, node, guider, levels)),
    )


def _back_to(walk: _Walk, node: Node, kind: str) -> Node:
    names = ("sigmas", "")
    return next((found for found in walk.back(node, names) if _kind(found) == kind), node)


def _text(walk: _Walk, node: Node) -> tuple[str | None, float | None]:
    """Prompt and distilled guidance of a conditioning."""
    guidance = None
    for step in walk.back(node, _CONDITIONINGS):
        if guidance is None and _has(step, "guidance"):
            guidance = as_number(walk.value(step, "guidance"))
        for name in _TEXT_KEYS:
            if _has(step, name) and (text := as_text(walk.value(step, name))) is not None:
                return text, guidance
    return None, guidance


def _denoise(walk: _Walk, levels: Node) -> float:
    denoise = as_number(walk.value(levels, "denoise"))
    return 1.0 if denoise is None else denoise


def _model(walk: _Walk, *starts: Node) -> str | None:
    for start in starts:
        for node in walk.back(start, ("model", "")):
            for name in ("unet_name", "ckpt_name"):
                if (text := as_text(walk.value(node, name))) is not None:
                    return file_name(text)
    return None


def _shift(walk: _Walk, guider: Node, levels: Node, is_dev: bool) -> tuple[float | None, str | None]:
    """mu: of a ModelSamplingFlux node (`comfy_extras/nodes_model_advanced.py`), else ComfyUI's constant for dev."""
    for start in (levels, guider):
        for node in walk.back(start, ("model", "")):
            if _kind(node) != "ModelSamplingFlux":
                continue
            top, base = (as_number(walk.value(node, name)) for name in ("max_shift", "base_shift"))
            width, height = (as_side(walk.value(node, name)) for name in _LATENT_SIZES)
            if None in (top, base, width, height):
                return None, "the ModelSamplingFlux node cannot be read; the model's own shift is assumed"
            assert top is not None and base is not None and width is not None and height is not None
            return base + (width * height / 256 - 256) * (top - base) / 3840, None
    return (_COMFY_DEV_SHIFT, "no ModelSamplingFlux: ComfyUI shifts dev by 1.15") if is_dev else (None, None)


def _size(walk: _Walk, sampler: Node) -> tuple[int | None, int | None, int | None, str | None]:
    """Width, height, item of the batch, and a note where the item is a guess."""
    index = None
    for node in walk.back(walk.linked(sampler, "latent_image"), ("samples", "latent", "latent_image", "")):
        if _kind(node) == "LatentFromBatch":
            index = as_count(walk.value(node, "batch_index"), 9999)
        if _has(node, "width") and _has(node, "height"):
            batch = as_count(walk.value(node, "batch_size"), 9999) or 1
            note = None
            if batch > 1 and index is None:
                note = (
                    f"the picture is one of a batch of {batch}, and the file does not say which; the first is assumed"
                )
            return as_side(walk.value(node, "width")), as_side(walk.value(node, "height")), index or 0, note
    return None, None, index, None


def _began_late(walk: _Walk, sampler: Node) -> str | None:
    if _kind(sampler) != "KSamplerAdvanced":
        return None
    first = as_count(walk.value(sampler, "start_at_step"), 10_000) or 0
    return f"sampling began at step {first} of another sampler's latent" if first else None


def _unlike_ours(walk: _Walk, positive: Node, *models: Node) -> Iterator[str]:
    """What the graph does to the model and to the text that fluxsplit does not."""
    loras, others = dict[str, None](), dict[str, None]()
    for start in models:
        for node in walk.back(start, ("model", "")):
            if "lora" in _kind(node).lower():
                loras.update(dict.fromkeys(_loras_of(walk, node)))
            elif any(part in _kind(node).lower() for part in _PATCHES):
                others[_kind(node)[:80]] = None
    for node in walk.back(positive, _CONDITIONINGS):
        steers = any(part in _kind(node).lower() for part in _STEERING)
        mixes = bool(_kind(node)) and any(walk.linked(node, name) for name in _SECOND_TEXTS)  # not where bypassed
        first_alone = as_number(walk.value(node, "conditioning_to_strength")) == 1
        if (steers and as_number(walk.value(node, "strength")) != 0) or (mixes and not first_alone):
            others[_kind(node)[:80]] = None
    for what, names in (("loads LoRA", loras), ("uses", others)):
        if names:
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            yield f"the graph {what} {', '.join(list(names)[:MAX_NAMED])}{more}, which fluxsplit does not"


def _loras_of(walk: _Walk, node: Node) -> Iterator[str]:
    """Files that a LoRA node loads, by name or in tables as rgthree's Power Lora Loader has them; else its stack's."""
    inputs = table_of(node.get("inputs"))
    if as_text(inputs.get("switch")) == "Off" or as_number(walk.value(node, "strength_model")) == 0:
        return
    for name, value in inputs.items():
        if "lora" not in name.lower():
            continue
        table = table_of(value)
        text = as_text(table.get("lora") if table else walk.value(node, name))
        number = name.lower().rpartition("_")[2]
        strength = table.get("strength") if table else walk.value(node, f"strength_{number}")
        if text and text != "None" and table.get("on") is not False and as_number(strength) != 0:
            yield file_name(text)[:80]
        elif text is None and isinstance(value, list):  # a stack, by another node
            yield _kind(node)[:80]


# -- the page's graph ---------------------------------------------------------------------------------------------


def api_graph(workflow: Mapping[str, Any]) -> Graph:
    """The page's graph in the form of the API's; nodes that are muted are left out, bypassed ones pass links on."""
    nodes, links = workflow.get("nodes"), workflow.get("links")
    if not isinstance(nodes, list) or len(nodes) > MAX_NODES:
        return {}
    sources = _sources(links if isinstance(links, list) else [])
    graph = {}
    for node in nodes:
        if isinstance(node, dict) and node.get("mode") != 2:
            graph[str(node.get("id"))] = _api_node(node, sources)
    return graph


def _sources(links: list[Any]) -> dict[int, list[Any]]:
    """Source `[node, slot]` of every link by its number; links are lists or, in newer files, objects."""
    sources: dict[int, list[Any]] = {}
    for link in links:
        if isinstance(link, list) and len(link) >= 3 and isinstance(link[0], int):
            sources[link[0]] = [str(link[1]), link[2]]
        elif isinstance(link, dict) and isinstance(link.get("id"), int):
            sources[link["id"]] = [str(link.get("origin_id")), link.get("origin_slot")]
    return sources


def _api_node(node: Mapping[str, Any], sources: Mapping[int, list[Any]]) -> Node:
    kind = as_text(node.get("type")) or ""
    values = node.get("widgets_values")
    inputs: dict[str, Any] = dict(values) if isinstance(values, dict) else {}
    if isinstance(values, list):
        inputs |= {name: value for name, value in zip(_names(kind, values), values, strict=False) if name}
        inputs |= {f"lora {number}": value for number, value in enumerate(values) if "lora" in table_of(value)}
    slots = node.get("inputs")
    for slot in slots if isinstance(slots, list) else []:
        number = table_of(slot).get("link")
        if isinstance(number, int) and number in sources:
            passes = kind == "Reroute" or node.get("mode") == 4
            inputs["" if passes and "" not in inputs else str(slot.get("name", ""))] = sources[number]
    return {"class_type": "" if node.get("mode") == 4 else kind, "inputs": inputs}


def _names(kind: str, values: list[Any]) -> tuple[str, ...]:
    """Which value is which; text nodes of any kind hold their text first, primitives their value."""
    if kind in _WIDGETS:
        return _WIDGETS[kind]
    if kind.startswith("Primitive"):
        return ("value",)
    return ("text",) if values and isinstance(values[0], str) and "Text" in kind else ()


def with_picture_size(found: FoundRecipe) -> FoundRecipe:
    """Where the graph names no size, that of the file."""
    if found.tool != "ComfyUI" or found.width is not None or found.picture_width is None:
        return found
    note = "the graph names no size; that of the picture is assumed"
    return replace(found, width=found.picture_width, height=found.picture_height, notes=(*found.notes, note))
