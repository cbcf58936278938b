"""What a `sample` command would do, as a table for people or one JSON object for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fluxsplit.checkpoint import describe, part, variant_of
from fluxsplit.cli_sample import Plan
from fluxsplit.defaults import guidance_of, shift_of, steps_of
from fluxsplit.progress import bytes_text

_TITLES = {"transformer": "transformer", "text_encoder": "T5", "clip": "CLIP", "vae": "VAE"}
_KINDS = {"transformer": "transformer", "text_encoder": "t5", "clip": "clip", "vae": "vae"}


def plan_object(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON object."""
    contents = describe(plan.files.transformer)
    variant = variant_of(part(plan.files.transformer, "transformer"))
    images = []
    for image in plan.images:
        steps = len(image.sigmas) - 1 if image.sigmas else image.steps or steps_of(variant, contents.config)
        shift = (
            image.shift if image.shift is not None else shift_of(variant, contents.config, image.width, image.height)
        )
        images.append(
            {
                "prompt": image.prompt,
                "negative": image.negative,
                "seed": image.seed,
                "width": image.width,
                "height": image.height,
                "steps": steps,
                "sigmas": list(image.sigmas),
                "sampler": image.sampler,
                "scheduler": "custom" if image.sigmas else image.scheduler,
                "shift": None if image.sigmas else shift,
                "guidance": image.guidance if image.guidance is not None else guidance_of(variant),
                "cfg": image.cfg,
                "noise_index": image.noise_index,
                "name": f"<time>-{image.seed}-<prompt>.{plan.format}",
            }
        )
    return {
        "variant": variant,
        "layout": contents.layout,
        "files": {kind: entry for kind in _TITLES if (entry := _file(plan, kind))},
        "tokenizers": [name for name in (plan.files.t5_tokenizer, plan.files.clip_tokenizer) if name and plan.prompts],
        "prompts_to_encode": len(plan.prompts),
        "images": images,
        "out": plan.out,
        "format": plan.format,
        "dtype": plan.dtype,
        "device": plan.device,
    }


def plan_json(plan: Plan) -> str:
    """The plan as one line of JSON."""
    return json.dumps(plan_object(plan))


def print_plan(plan: Plan) -> None:
    """The plan as tables on stdout."""
    from rich.console import Console  # noqa: PLC0415  not at start
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    shown = plan_object(plan)
    files = Table("part", "file", "bytes", "holds", title=f"FLUX.1 {shown['variant']}, {shown['layout']}")
    for kind, entry in shown["files"].items():
        holds = ", ".join(f"{count:,} {dtype}" for dtype, count in entry["dtypes"].items())
        files.add_row(_TITLES[kind], Text(entry["path"]), bytes_text(entry["bytes"]), holds)
    count = "1 image" if len(plan.images) == 1 else f"{len(plan.images)} images"
    images = Table("seed", "size", "steps", "sampler", "guidance", "prompt", title=count)
    for image in shown["images"]:
        guidance = " ".join(f"{name} {image[name]:g}" for name in ("guidance", "cfg") if image[name] not in (None, 1.0))
        how = f"{image['sampler']} {image['scheduler']}"
        size = f"{image['width']}x{image['height']}"
        images.add_row(str(image["seed"]), size, str(image["steps"]), how, guidance or "-", Text(image["prompt"]))
    console = Console()
    console.print(files)
    console.print(images)
    console.print(Text(f"into {shown['out']} as {shown['images'][0]['name']}"), soft_wrap=True)


def _file(plan: Plan, kind: str) -> dict[str, Any] | None:
    path = getattr(plan.files, kind)
    if not path or (kind in ("text_encoder", "clip") and not plan.prompts):
        return None
    held = describe(path).parts[_KINDS[kind]]
    return {"path": path, "name": Path(path).name, "bytes": held.bytes, "dtypes": held.dtypes}
