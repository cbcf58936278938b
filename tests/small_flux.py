"""A small Flux in a file of its own, and the sample stage over it, for tests of memory, streaming and lockstep."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel  # noqa: F401  before our rooms, as conftest.py has it believe in accelerate
from safetensors.torch import load_file, save_file

import synthetic_checkpoint
from fluxsplit import stage_sample
from fluxsplit.events import Events
from fluxsplit.job_plan import plan_job
from fluxsplit.jobs import ImageJob, ModelFiles, SampleJob
from synthetic_checkpoint import TINY, Dimensions

CONFIG = {"fluxsplit.config": json.dumps({"transformer": {"axes_dims_rope": [8, 12, 12]}})}


class Recorder(Events):
    """Events kept in memory."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        super().__init__(self.stream)

    def of(self, event: str) -> list[dict[str, Any]]:
        """The events of a kind."""
        lines = map(json.loads, self.stream.getvalue().splitlines())
        return [line for line in lines if line["event"] == event]


def write_flux(path: Path, dtype: str = "e4m3", *, dev: bool = False, seed: int = 0, **changes: Any) -> Path:
    """A transformer of random values in BFL's layout."""
    dimensions: Dimensions = replace(TINY, dev=dev, **changes)
    synthetic_checkpoint.write(path, synthetic_checkpoint.flux_shapes(dimensions), dtype, CONFIG, seed)
    return path


def write_conditioning(path: Path, seed: int, tokens: int = 7) -> str:
    """Random T5 states and a pooled vector."""
    generator = torch.Generator().manual_seed(seed)
    t5 = torch.randn(1, tokens, TINY.context, generator=generator)
    save_file({"t5": t5, "pooled": torch.randn(1, TINY.pooled, generator=generator)}, path)
    return str(path)


def image(conditioning: str, seed: int = 1, size: tuple[int, int] = (48, 32), **changes: Any) -> ImageJob:
    """A picture to sample."""
    return ImageJob("a fox", conditioning, seed, *size, **{"steps": 2, **changes})


def sample(
    path: Path,
    images: list[ImageJob],
    out: Path,
    dtype: str = "fp32",
    plan: dict[str, Any] | None = None,
    device: str = "cpu",
    **job: Any,
) -> tuple[list[torch.Tensor], Recorder]:
    """Latents [1, 16, h, w] in the order in which they were written, and what the stage said.

    `plan` changes fields of the plan, which for so small a model would always be the same. All advance together.
    """
    recorder = Recorder()
    files = ModelFiles(str(path))
    changes = {"together": len(images), **(plan or {})}

    def planned(*arguments: Any) -> Any:
        return replace(plan_job(*arguments), **changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_sample, "plan_job", planned)
        stage_sample.run(SampleJob(tuple(images), files, str(out), "safetensors", dtype, device, **job), recorder)
    return [load_file(result["path"])["latents"] for result in recorder.of("result")], recorder


def by_seed(recorder: Recorder) -> dict[int, torch.Tensor]:
    """Latents by the seed of their picture."""
    return {result["recipe"]["seed"]: load_file(result["path"])["latents"] for result in recorder.of("result")}
