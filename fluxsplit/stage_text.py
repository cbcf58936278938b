"""The text stage: every prompt through T5, then every prompt through CLIP, into conditioning files."""

from __future__ import annotations

from pathlib import Path

import torch

from fluxsplit import checkpoint, durable
from fluxsplit.conditioning import Conditioning, conditioning_bytes
from fluxsplit.device import device_info, keep_within, pick_device
from fluxsplit.errors import FluxsplitError
from fluxsplit.events import Events
from fluxsplit.job_plan import check_fits
from fluxsplit.jobs import TextJob
from fluxsplit.memory import budget_bytes, free_ram_bytes
from fluxsplit.memory_plan import readers_of
from fluxsplit.read_ahead import ReadAhead
from fluxsplit.streaming import Streaming, layout
from fluxsplit.text import T5, Clip, T5Tokens
from fluxsplit.text_plan import SLOTS, TextPlan, plan_text
from fluxsplit.weights import WeightFiles

CACHE_SHARE = 0.4
"""Of free RAM that T5 may keep in the page cache: the transformer, which comes next, is more than twice as large."""


def run(job: TextJob, events: Events) -> None:
    """Encode `job.prompts` into `job.outputs`, unless what they are for would not fit."""
    if job.then is not None:
        check_fits(job.then)
    t5, clip = checkpoint.part(job.text_encoder, "t5"), checkpoint.part(job.clip, "clip")
    tokens, total = T5Tokens(t5, job.t5_tokenizer), 2 * len(job.prompts)
    device = _device(job, plan_text(t5, clip, [len(tokens.of(prompt)) for prompt in job.prompts]), events)
    events.send("text", done=0, total=total)
    files = WeightFiles()
    states = _t5_states(job, T5(t5, tokens, files, device), files, events)
    encoder = Clip(clip, job.clip_tokenizer, files, device)
    for done, (prompt, output) in enumerate(zip(job.prompts, job.outputs, strict=True)):
        events.send("text", done=len(job.prompts) + done, total=total)
        conditioning = Conditioning(states[done], encoder.encode(prompt).cpu())
        files.check_unchanged()
        _check(conditioning, job)
        durable.replace(Path(output), conditioning_bytes(conditioning, prompt))
        events.send("result", path=output)
    events.send("text", done=total, total=total)


def _device(job: TextJob, plan: TextPlan, events: Events) -> torch.device:
    """The device to encode on, a card told to keep within the budget; the CPU where a card has not as much."""
    device = pick_device(job.device)
    if device.type == "cpu":
        return device
    info = device_info(device)
    budget = budget_bytes(job.vram, info)
    if plan.peak_bytes > budget:
        room = f"{budget / 1e9:.2f} GB of {info.name} may be used"
        events.send("note", text=f"text is encoded on the CPU: {plan.text()}, and {room}")
        return torch.device("cpu")
    keep_within(budget, device)
    events.send("plan", text=plan.text(), smaller={"device": "cpu", "then": None})
    return device


def _check(conditioning: Conditioning, job: TextJob) -> None:
    """Nothing that is not finite is handed on, or kept for the next time."""
    for tensor, path in ((conditioning.t5, job.text_encoder), (conditioning.pooled, job.clip)):
        if not bool(tensor.isfinite().all()):
            raise FluxsplitError(
                f"the text encoder in {Path(path).name} gives NaN or infinity", "the file is damaged; download it again"
            )


def _t5_states(job: TextJob, t5: T5, files: WeightFiles, events: Events) -> list[torch.Tensor]:
    """T5's part; nothing of it is left afterwards but what it says."""
    t5.loader = loader = _loader(t5, files, t5.device)

    def told(done: int, blocks: int) -> None:
        events.send("text", done=done * len(job.prompts) // blocks, total=2 * len(job.prompts))

    states = t5.encode(job.prompts, told)
    loader.close()
    return states


def _loader(t5: T5, files: WeightFiles, device: torch.device) -> Streaming | ReadAhead:
    """Brings T5's blocks in: through two slots to a card; on a CPU out of the page cache.

    Each block is needed once in this process. Its pages stay in the page cache for the next command, unless that
    would push out what others have there: then they are given back.
    """
    block_bytes = sum(layout(block).bytes for block in t5.blocks)
    fleeting = frozenset(range(len(t5.blocks) if block_bytes > CACHE_SHARE * free_ram_bytes() else 0))
    if device.type == "cpu":
        return ReadAhead(t5.blocks, files, fleeting, lambda count: None, once=True)
    readers = readers_of(device_info(device))
    torch.set_num_threads(1)  # where reading is a copy of torch's, each reader would have its own
    return Streaming(t5.blocks, files, device, slots=SLOTS, once=True, readers=readers, fleeting=fleeting)
