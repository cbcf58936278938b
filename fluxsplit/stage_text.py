"""The text stage: every prompt through T5, then every prompt through CLIP, into conditioning files."""

from __future__ import annotations

from pathlib import Path

import torch

from fluxsplit import checkpoint, durable
from fluxsplit.conditioning import Conditioning, conditioning_bytes
from fluxsplit.device import device_info, pick_device
from fluxsplit.errors import FluxsplitError
from fluxsplit.events import Events
from fluxsplit.jobs import TextJob
from fluxsplit.memory import free_ram_bytes
from fluxsplit.memory_plan import readers_of
from fluxsplit.read_ahead import ReadAhead
from fluxsplit.streaming import Streaming, layout
from fluxsplit.text import T5, Clip
from fluxsplit.weights import WeightFiles

CACHE_SHARE = 0.4
"""Of free RAM that T5 may keep in the page cache: the transformer, which comes next, is more than twice as large."""


def run(job: TextJob, events: Events) -> None:
    """Encode `job.prompts` into `job.outputs`."""
    device = pick_device(job.device)
    total = 2 * len(job.prompts)
    events.send("text", done=0, total=total)
    states = _t5_states(job, device, events)
    clip = Clip(checkpoint.part(job.clip, "clip"), job.clip_tokenizer, WeightFiles(), device)
    for done, (prompt, output) in enumerate(zip(job.prompts, job.outputs, strict=True)):
        events.send("text", done=len(job.prompts) + done, total=total)
        conditioning = Conditioning(states[done], clip.encode(prompt).cpu())
        _check(conditioning, job)
        durable.replace(Path(output), conditioning_bytes(conditioning, prompt))
        events.send("result", path=output)
    events.send("text", done=total, total=total)


def _check(conditioning: Conditioning, job: TextJob) -> None:
    """Nothing that is not finite is handed on, or kept for the next time."""
    for tensor, path in ((conditioning.t5, job.text_encoder), (conditioning.pooled, job.clip)):
        if not bool(tensor.isfinite().all()):
            raise FluxsplitError(
                f"the text encoder in {Path(path).name} gives NaN or infinity", "the file is damaged; download it again"
            )


def _t5_states(job: TextJob, device: torch.device, events: Events) -> list[torch.Tensor]:
    """T5's part; nothing of it is left afterwards but what it says."""
    files = WeightFiles()
    t5 = T5(checkpoint.part(job.text_encoder, "t5"), job.t5_tokenizer, files, device)
    t5.loader = loader = _loader(t5, files, device)

    def told(done: int, blocks: int) -> None:
        events.send("text", done=done * len(job.prompts) // blocks, total=2 * len(job.prompts))

    states = [state.cpu() for state in t5.encode(job.prompts, told)]
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
    return Streaming(t5.blocks, files, device, once=True, readers=readers, fleeting=fleeting)
