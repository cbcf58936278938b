"""A found recipe as text: for people, as A1111's `parameters`, as a fluxsplit command line, as JSON."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict

from fluxsplit.errors import FluxsplitError
from fluxsplit.found_recipe import FoundRecipe
from fluxsplit.found_values import file_name
from fluxsplit.metadata import SAMPLER_NAMES, SCHEDULE_NAMES, parameters_text, quoted
from fluxsplit.models import DEMO, DEMO_FILE
from fluxsplit.recipe import Recipe

FORMS = ("a1111", "cli", "json")


def facts_of(found: FoundRecipe) -> list[tuple[str, str]]:
    """Names and values for people; what the file does not say is left out."""
    size = f"{found.width}x{found.height}" if found.width and found.height else None
    shown: dict[str, object] = {
        "written by": found.tool,
        "prompt": found.prompt,
        "negative": found.negative or None,
        "seed": found.seed if not found.noise_index else f"{found.seed}, draw {found.noise_index}",
        "size": size,
        "steps": found.steps,
        "sampler": ", ".join(text for text in (found.sampler, found.scheduler) if text) or None,
        "guidance": found.guidance,
        "cfg": None if found.cfg == 1 else found.cfg,
        "shift": found.shift,
        "denoise": None if found.denoise == 1 else found.denoise,
        "model": found.model,
        "model hash": found.model_hash,
        "start": started_from(found.recipe) or None,
        "noise": {"cpu": "drawn on the CPU", "gpu": "drawn on a GPU"}.get(found.noise_source or ""),
    }
    facts = [
        (name, f"{value:g}" if isinstance(value, float) else str(value))
        for name, value in shown.items()
        if value is not None
    ]
    facts += [("assumed", note) for note in found.notes]
    return facts + [("warning", warning) for warning in found.warnings]


def as_form(found: FoundRecipe, form: str, name: str) -> str:
    """The recipe in one of `FORMS`; raises FluxsplitError, with the file's name, where it holds none."""
    if found.tool is None:
        raise FluxsplitError(f"{name} holds no recipe", "only pictures and latents with metadata have one")
    if form == "json":
        table = asdict(found) | {"recipe": None if found.recipe is None else found.recipe.to_object()}
        return json.dumps(table, ensure_ascii=False, allow_nan=False)
    return as_a1111(found) if form == "a1111" else as_command(found)


def as_a1111(found: FoundRecipe) -> str:
    """AUTOMATIC1111's `parameters`, with what is known."""
    if found.recipe is not None:
        return parameters_text(found.recipe)
    size = f"{found.width}x{found.height}" if found.width and found.height else None
    values = {
        "Steps": found.steps,
        "Sampler": SAMPLER_NAMES.get(found.sampler or ""),
        "Schedule type": SCHEDULE_NAMES.get(found.scheduler or ""),
        "CFG scale": found.cfg,
        "Distilled CFG Scale": found.guidance,
        "Seed": found.seed,
        "Noise index": found.noise_index or None,
        "Size": size,
        "Model hash": found.model_hash[:10] if found.model_hash else None,
        "Model": found.model,
        "RNG": "CPU" if found.noise_source == "cpu" else None,
    }
    pairs = [f"{name}: {quoted(_plain(value))}" for name, value in values.items() if value is not None]
    negative = [f"Negative prompt: {found.negative}"] if found.negative else []
    return "\n".join([found.prompt or "", *negative, ", ".join(pairs)])


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_command(found: FoundRecipe) -> str:
    """The `fluxsplit sample` command that renders it again, quoted for a POSIX shell."""
    words = ["fluxsplit", "sample", "--prompt", found.prompt or ""]
    guided = found.cfg is not None and found.cfg != 1
    size = f"{found.width}x{found.height}" if found.width and found.height else None
    given = found.scheduler == "custom" and found.sigmas
    options: dict[str, object] = {
        "--model": _model_named(found),
        "--seed": found.seed,
        "--noise-index": found.noise_index or None,
        "--size": size,
        "--steps": None if given else found.steps,
        "--sampler": found.sampler,
        "--scheduler": None if found.scheduler == "custom" else found.scheduler,
        "--sigmas": ",".join(map(repr, found.sigmas)) if given and found.sigmas else None,
        "--shift": None if given else found.shift,
        "--guidance": found.guidance,
        "--cfg": found.cfg if guided else None,
        "--negative": found.negative if guided and found.negative else None,
    }
    for name, value in options.items():
        if value is not None:
            words += [name, repr(value) if isinstance(value, float) else str(value)]
    # names in them are strangers', and whatever came after a line's end would be a command
    told = ["# " + "".join(c if c.isprintable() else " " for c in warning) for warning in found.warnings]
    if started := started_from(found.recipe):
        told.append(f"# {started}: only `fluxsplit rerender --from` it makes the same picture")
    return "\n".join([*told, shlex.join(words)])


def _model_named(found: FoundRecipe) -> str | None:
    """What `--model` may be given: a name and never a path, as it is a stranger's."""
    name = "".join(c for c in file_name(found.model or "") if c.isprintable())
    return DEMO if name in (DEMO_FILE, DEMO_FILE.removesuffix(".safetensors")) else name or None


def started_from(recipe: Recipe | None) -> str:
    """What a picture that was not drawn from noise alone began with; empty for others."""
    start = None if recipe is None else recipe.start
    if start is None:
        return ""
    latent = f", whose latent is {start.latent_sha256[:12]}..., with strength {start.strength:g}"
    return f"keeps the {start.keep} of another picture{latent if start.latent_sha256 else ''}"
