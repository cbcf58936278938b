"""What a `sample` command would do, as a table for people or one JSON object for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fluxsplit.checkpoint import describe, part, variant_of
from fluxsplit.defaults import guidance_of, shift_of, steps_of
from fluxsplit.executor import run_stage
from fluxsplit.jobs import DeviceJob
from fluxsplit.memory import DeviceInfo, budget_bytes
from fluxsplit.memory_plan import MemoryPlan, plan_memory
from fluxsplit.model_sizes import Model, read_model
from fluxsplit.progress import bytes_text
from fluxsplit.sample_plan import Plan
from fluxsplit.sample_run import cached
from fluxsplit.text_plan import plan_text
from fluxsplit.work import MIN_TEXT_TOKENS, tokens_of, work_of

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
                "name": f"{image.stem or f'<time>-{image.seed}-<prompt>'}.{plan.format}",
            }
        )
    return {
        "variant": variant,
        "layout": contents.layout,
        "files": {kind: entry for kind in _TITLES if (entry := _file(plan, kind))},
        "tokenizers": [name for name in (plan.files.t5_tokenizer, plan.files.clip_tokenizer) if name and plan.prompts],
        "prompts_to_encode": len(set(plan.prompts) - cached(plan).keys()),
        "images": images,
        "out": plan.out,
        "format": plan.format,
        "dtype": plan.dtype,
        "device": plan.device,
        "vram": plan.vram,
    }


def memory_plan(plan: Plan) -> tuple[MemoryPlan, DeviceInfo, Model]:
    """What the sample stage would plan on this machine as it is now; a process of its own looks at the device.

    Prompts are taken for as long as T5 pads them, which all but the longest are. Raises UsageError where the budget
    is too small.
    """
    part_ = part(plan.files.transformer, "transformer")
    contents = describe(plan.files.transformer)
    work = work_of(plan.images, steps_of(variant_of(part_), contents.config))
    sizes = read_model(part_, "bf16")
    tokens = max(tokens_of(width, height, work.text_tokens) for width, height in work.sizes)
    held = contents.parts["transformer"]
    job = DeviceJob(
        plan.device,
        plan.dtype,
        part_.path,
        sum(block.bytes for block in sizes.blocks),
        held.parameters,
        sizes.hidden,
        sizes.head,
        tokens,
    )
    (event,) = [event for event in run_stage("device", job) if event["event"] == "device"]
    names = {field.name for field in fields(DeviceInfo)}
    device = DeviceInfo(**{name: value for name, value in event.items() if name in names})
    model = read_model(part_, event["dtype"])
    return plan_memory(model, work, device, budget_bytes(plan.vram, device), event["dtype"]), device, model


def show_plan(plan: Plan, as_json: bool, **more: Any) -> None:
    """The plan on stdout, as one line of JSON with `more` or as tables."""
    print(plan_json(plan, **more)) if as_json else print_plan(plan)


def plan_json(plan: Plan, **more: Any) -> str:
    """The plan and `more` as one line of JSON, with the memory plan and the device under `memory` and `device_info`."""
    memory, device, _ = memory_plan(plan)
    return json.dumps(plan_object(plan) | {"memory": asdict(memory), "device_info": asdict(device)} | more)


def print_plan(plan: Plan) -> None:
    """The plan as tables on stdout."""
    from rich.console import Console  # noqa: PLC0415  not at start
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    shown = plan_object(plan)
    memory, device, model = memory_plan(plan)
    files = Table("part", "file", "bytes", "holds", title=f"FLUX.1 {shown['variant']}, {shown['layout']}")
    for kind, entry in shown["files"].items():
        holds = ", ".join(f"{count:,} {dtype}" for dtype, count in entry["dtypes"].items())
        files.add_row(_TITLES[kind], Text(entry["path"], overflow="fold"), bytes_text(entry["bytes"]), holds)
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
    placed = Table("memory", "bytes", "what", title=f"{device.name}, {memory.text()}")
    for row in (*text_rows(plan, device), *memory_rows(memory, model)):
        placed.add_row(*row)
    console.print(placed)
    names = [image["name"] for image in shown["images"]]
    which = names[0] if names[0] == names[-1] else f"{names[0]} to {names[-1]}"
    pictures = f", pictures into {Path(plan.out).parent}" if plan.images[0].stem else ""
    console.print(Text(f"latents into {plan.out} as {which}{pictures}"), soft_wrap=True)


def text_rows(plan: Plan, device: DeviceInfo) -> list[tuple[str, str, str]]:
    """What encoding takes of a card before the transformer comes; prompts are taken for as long as T5 pads them."""
    wanted = set(plan.prompts) - cached(plan).keys()
    if device.kind == "cpu" or not wanted:
        return []
    files = part(plan.files.text_encoder, "t5"), part(plan.files.clip, "clip")
    text = plan_text(*files, [MIN_TEXT_TOKENS] * len(wanted))
    where = "" if text.peak_bytes <= budget_bytes(plan.vram, device) else "; on the CPU, as the card has not as much"
    return [("text encoders", bytes_text(text.peak_bytes), f"{text.text()}, before all that follows{where}")]


def memory_rows(memory: MemoryPlan, model: Model) -> list[tuple[str, str, str]]:
    """The memory plan as rows of name, bytes and explanation."""
    on_cpu = memory.device == "cpu"
    where = "in the page cache" if on_cpu else "on the card"
    rows = [("blocks that stay", memory.resident_bytes, f"{_blocks(memory.resident, model)} {where}")]
    if memory.streamed:
        often = f"once a pass, for {_pictures(memory.together)}"
        rows.append(("blocks that stream", memory.streamed_bytes, f"{_blocks(memory.streamed, model)}, {often}"))
    if memory.fleeting and not on_cpu:
        rows.append(("from the disk", memory.fleeting_bytes, "of these, in every pass, as RAM is too short for them"))
    once = "matrices of timestep and prompt, read once before the first step"
    rows.append(("modulation", memory.modulation_bytes, once))
    if memory.slots:
        spare = f", and {bytes_text(memory.spare_bytes)}" if memory.spare_bytes else ""
        taken_bytes = memory.slots * memory.slot_bytes + memory.spare_bytes
        slots = f"{memory.slots} of {bytes_text(memory.slot_bytes)}{spare}, in which they take turns"
        rows.append(("slots", taken_bytes, slots))
    if memory.pinned_bytes:
        rows.append(("pinned RAM", memory.pinned_bytes, "that blocks pass through; not of the budget"))
    if memory.pinnable_bytes:
        rows.append(("pinned file", memory.pinnable_bytes, "of its pages in RAM, if a step waits for copies"))
    chunk = "" if memory.query_chunk is None else f", attention in chunks of {memory.query_chunk} queries"
    rows += [
        ("base", memory.base_bytes, "libraries, small weights"),
        ("scratch", memory.scratch_bytes, "the matrix that is multiplied with"),
        ("activations", memory.activation_bytes, f"of the largest picture{chunk}"),
        ("states", memory.state_bytes, f"between blocks, and modulations, of {_pictures(memory.together)}"),
        ("peak", memory.peak_bytes, "predicted" + (", of anonymous RAM" if on_cpu else ", of the card's memory")),
        ("budget", memory.budget_bytes, f"the smallest that works is {bytes_text(memory.smallest_bytes)}"),
    ]
    table = [(name, bytes_text(count), what) for name, count, what in rows]
    if memory.step_s is not None:
        table.append(("step", "", f"{memory.step_s:.3g} s predicted, limited by {memory.limit}"))
    return table


def _blocks(numbers: tuple[int, ...], model: Model) -> str:
    kinds = [model.blocks[number].name.partition(" ")[0] for number in numbers]
    return " and ".join(f"{kinds.count(kind)} {kind}" for kind in ("double", "single") if kind in kinds) or "none"


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def _file(plan: Plan, kind: str) -> dict[str, Any] | None:
    path = getattr(plan.files, kind)
    if not path or (kind in ("text_encoder", "clip") and not plan.prompts):
        return None
    held = describe(path).parts[_KINDS[kind]]
    return {"path": path, "name": Path(path).name, "bytes": held.bytes, "dtypes": held.dtypes}
