"""Training of the demo's flow by a trainer and, on a CPU that others use too, an assistant.

Processes in lockstep all wait for the slowest. An assistant on another core works at its own pace: it reads the weights
as they are, and whenever a gradient of its own is ready, one or two steps stale, the trainer's next step takes it in
(Hogwild, Recht et al., arXiv 1106.5730).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from torch import Tensor

from demo_flow import FlowConfig, FlowTrainer


class Assistant:
    """A second process that adds gradients at its own pace; its gradient and a flag are in shared memory."""

    def __init__(self, trainer: FlowTrainer, tokenizer_folder: Path) -> None:
        trainer.model.share_memory()
        self.gradients = [torch.zeros_like(p).share_memory_() for p in trainer.model.parameters()]
        self.state = torch.zeros(2, dtype=torch.float64).share_memory_()  # pictures of a gradient that is ready, part
        shared = (trainer.model, self.gradients, self.state, trainer.work, tokenizer_folder, trainer.config)
        torch.multiprocessing.get_context("spawn").Process(target=assist, args=shared, daemon=True).start()

    def take_in(self, model: FluxTransformer2DModel, size: int, part: float) -> int:
        """Average a waiting gradient into the model's own of `size` pictures; returns how many pictures it adds."""
        self.state[1] = part
        added = int(self.state[0])
        if added:
            for parameter, other in zip(model.parameters(), self.gradients, strict=True):
                assert parameter.grad is not None
                parameter.grad.lerp_(other, added / (added + size))
            self.state[0] = 0
        return added


def assist(
    weights: FluxTransformer2DModel,
    gradients: list[Tensor],
    state: Tensor,
    work: Path,
    tokenizer_folder: Path,
    config: FlowConfig,
) -> None:
    """The assistant's loop: gradients of pictures that no other process draws, for as long as the trainer lives."""
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(12)  # the trainer comes first
    trainer = FlowTrainer(work, tokenizer_folder, config, "cpu")
    trainer.rank = 1
    while os.getppid() != 1:
        with torch.no_grad():
            for own, shared in zip(trainer.model.parameters(), weights.parameters(), strict=True):
                own.copy_(shared)
        loss, size = trainer.losses(float(state[1]))
        loss.backward()
        while state[0] and os.getppid() != 1:
            time.sleep(0.01)
        for parameter, shared in zip(trainer.model.parameters(), gradients, strict=True):
            assert parameter.grad is not None
            shared.copy_(parameter.grad)
        trainer.model.zero_grad()
        trainer.step += 1
        state[0] = size


def train_flow(
    work: Path, tokenizer_folder: Path, config: FlowConfig, minutes: float, device: str, assisted: bool = False
) -> None:
    """Train or go on training; started under torchrun, with as many processes as it was given."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    trainer = FlowTrainer(work, tokenizer_folder, config, device)
    trainer.run(minutes, Assistant(trainer, tokenizer_folder) if assisted else None)
    if dist.is_initialized():
        dist.destroy_process_group()
