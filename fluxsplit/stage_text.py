"""The text stage: every prompt through T5, then every prompt through CLIP, into conditioning files."""

from __future__ import annotations

from pathlib import Path

from fluxsplit import checkpoint, durable
from fluxsplit.conditioning import Conditioning, conditioning_bytes
from fluxsplit.device import pick_device
from fluxsplit.events import Events
from fluxsplit.jobs import TextJob
from fluxsplit.text import T5, Clip
from fluxsplit.weights import WeightFiles


def run(job: TextJob, events: Events) -> None:
    """Encode `job.prompts` into `job.outputs`."""
    device = pick_device(job.device)
    total = 2 * len(job.prompts)
    t5 = T5(checkpoint.part(job.text_encoder, "t5"), job.t5_tokenizer, WeightFiles(), device)
    states = []
    for done, prompt in enumerate(job.prompts):
        events.send("text", done=done, total=total)
        states.append(t5.encode(prompt).cpu())
    del t5
    clip = Clip(checkpoint.part(job.clip, "clip"), job.clip_tokenizer, WeightFiles(), device)
    for done, (prompt, output) in enumerate(zip(job.prompts, job.outputs, strict=True)):
        events.send("text", done=len(job.prompts) + done, total=total)
        conditioning = Conditioning(states[done], clip.encode(prompt).cpu())
        durable.replace(Path(output), conditioning_bytes(conditioning, prompt))
        events.send("result", path=output)
    events.send("text", done=total, total=total)
