"""A stage without torch: takes the real jobs, says the real events, writes the real files, computes nothing.

`FAKE_LOG` names a file that gets one JSON line for each thing that happens; `FAKE_FAIL` what goes wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxsplit.jobs import DecodeJob, EncodeJob, SampleJob, TextJob, UpscaleJob, job_from_json
from fluxsplit.latents import read_latents, write_latent
from fluxsplit.metadata import encode_png
from fluxsplit.recipe import Recipe, WeightsStamp


def say(event: str, **fields: Any) -> None:
    """Write an event."""
    print(json.dumps({"event": event, **fields}), flush=True)


def log(what: str, **fields: Any) -> None:
    """Note what happens, for the test to look at."""
    with Path(os.environ["FAKE_LOG"]).open("a") as file:
        file.write(json.dumps({"what": what, "pid": os.getpid(), **fields}) + "\n")


def main() -> None:
    """Run the stage."""
    stage = sys.argv[1]
    log("start", stage=stage)
    say("ready")
    line = sys.stdin.readline()
    if not line:
        return
    job = job_from_json(stage, line)
    if stage == "device":
        figures = {"free_bytes": 20_000_000_000, "total_bytes": 24_000_000_000}
        say("device", dtype="fp32", kind="cpu", name="cpu", **figures)
        say("done", results=0, failures=0)
        return
    log("job", stage=stage, job=json.loads(line))
    if os.environ.get("FAKE_FAIL") == f"{stage} hangs":
        say("note", text="hanging")
        time.sleep(60)
    if os.environ.get("FAKE_FAIL") == "sample out of memory once" and stage == "sample" and not job.retried:
        say("plan", text="a large plan", smaller={"vram": "2000000000", "retried": "a large plan"})
        sample(replace(job, images=job.images[:1]))
        say("error", exit_code=4, message="no room", hint="smaller --size", traceback="Traceback of the stage")
        return
    if os.environ.get("FAKE_FAIL") == f"{stage} out of memory":
        say("error", exit_code=4, message="no room", hint="smaller --size", traceback="Traceback of the stage")
        return
    runs = {"text": text, "sample": sample, "decode": decode, "encode": encode, "upscale": upscale}
    results, failures = runs[stage](job)
    log("done", stage=stage)
    say("done", results=results, failures=failures)


def text(job: TextJob) -> tuple[int, int]:
    """Conditioning files that hold the prompt alone."""
    say("plan", text="a card", smaller=None if job.device == "cpu" else {"device": "cpu"})
    if os.environ.get("FAKE_FAIL") == "text is killed" and job.device != "cpu":
        os.kill(os.getpid(), signal.SIGKILL)
    for prompt, output in zip(job.prompts, job.outputs, strict=True):
        Path(output).write_text(prompt)
        say("result", path=output)
    say("text", done=len(job.prompts), total=len(job.prompts))
    return len(job.prompts), 0


def sample(job: SampleJob) -> tuple[int, int]:
    """Latents of zeros."""
    failures = 0
    for number, image in enumerate(job.images):
        if os.environ.get("FAKE_FAIL") == f"seed {image.seed}":
            failures += 1
            say("failed", item=f"seed {image.seed}", message="NaN at step 2", hint="try --dtype fp32")
            continue
        say("step", image=number, images=len(job.images), step=1, steps=1, step_s=0.01)
        stamp = WeightsStamp("demo", os.environ.get("FAKE_SHA256", ""))
        recipe = Recipe(
            prompt=image.prompt, seed=image.seed, width=image.width, height=image.height, steps=1, sigmas=(1.0, 0.0),
            sampler=image.sampler, scheduler=image.scheduler, shift=image.shift, guidance=image.guidance, cfg=image.cfg,
            negative=image.negative, noise_index=image.noise_index, variant="schnell", transformer=stamp,
            text_encoder=stamp, clip=stamp, dtype="fp32", device="cpu",
            conditioning_sha256=image.conditioning_sha256 or None,
        )  # fmt: skip
        shape = (1, 16, image.height // 8, image.width // 8)
        payload = bytes(4 * 16 * shape[2] * shape[3])
        path = write_latent(
            job.out,
            image.stem or f"latent-{image.seed}",
            payload,
            shape,
            recipe,
            format=job.format,
            parent=image.parent,
        )
        say("result", number=number, path=str(path), recipe=json.loads(recipe.to_json()))
        _fail_at_the_second("sample", 0)
    return len(job.images) - failures, failures


def decode(job: DecodeJob) -> tuple[int, int]:
    """Small black pictures."""
    Path(job.out).mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(job.latents):
        _tell_plan(job.smaller)
        if os.environ.get("FAKE_FAIL") == "decode is always killed":
            os.kill(os.getpid(), signal.SIGKILL)
        recipe = read_latents(path)[0].recipe
        picture = Path(job.out) / f"{Path(path).stem}.png"
        picture.write_bytes(encode_png(bytes(3 * 8 * 8), 8, 8, {}))
        say("result", path=str(picture), recipe=recipe and json.loads(recipe.to_json()))
        say("decode", done=number + 1, total=len(job.latents))
        _fail_at_the_second("decode", job.smaller)
    return len(job.latents), 0


def encode(job: EncodeJob) -> tuple[int, int]:
    """Latents of zeros."""
    for number, path in enumerate(job.images):
        _tell_plan(job.smaller)
        written = write_latent(job.out, Path(path).stem, bytes(4 * 16 * 4), (1, 16, 2, 2), None, format=job.format)
        say("result", path=str(written), recipe=None)
        say("encode", done=number + 1, total=len(job.images))
        _fail_at_the_second("encode", job.smaller)
    return len(job.images), 0


def _tell_plan(smaller: int) -> None:
    say("plan", text=f"plan {smaller}", smaller={"smaller": smaller + 1})


def _fail_at_the_second(stage: str, smaller: int) -> None:
    fails = os.environ.get("FAKE_FAIL", "")
    if fails == f"{stage} is killed at the second" and not smaller:
        os.kill(os.getpid(), signal.SIGKILL)
    if fails == f"{stage} ends at the second" or (fails == f"{stage} out of memory at the second" and not smaller):
        say("error", exit_code=4 if "memory" in fails else 1, message="no room", hint="smaller --size", traceback="")
        sys.exit()


def upscale(job: UpscaleJob) -> tuple[int, int]:
    """Larger pictures that hold nothing."""
    for number, path in enumerate(job.images):
        _tell_plan(job.smaller)
        if number:
            _fail_at_the_second("upscale", job.smaller)
        say("upscale", image=number, images=len(job.images), done=1, total=1)
        picture = Path(job.out or Path(path).parent) / f"{Path(path).stem}-large.png"
        picture.write_bytes(b"")
        say("result", path=str(picture), recipe=None)
    return len(job.images), 0


if __name__ == "__main__":
    main()
