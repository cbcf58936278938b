"""The optimiser of the demo model's matrices: momentum, orthogonalised (Muon, Jordan et al. 2024)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn


def fast_bf16(device: str) -> bool:
    """Whether matrix products in bf16 are worth it: on a graphics card, or a CPU with instructions for them."""
    return device == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest orthogonal matrices by Newton-Schulz (Muon's quintic).  # [K, M, N]"""
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if fast_bf16(matrices.device.type):
        x = x.bfloat16()  # the iteration corrects itself; sixteen bits are enough (Jordan et al., Muon)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon:
    """Momentum, orthogonalised; each process does its share of the matrices."""

    def __init__(self, matrices: list[nn.Parameter], rank: int, world: int) -> None:
        self.matrices = matrices
        self.momenta = [torch.zeros_like(p) for p in matrices]
        shapes = sorted({tuple(p.shape) for p in matrices})
        self.groups = []
        for shape in shapes:
            same = [i for i, p in enumerate(matrices) if tuple(p.shape) == shape]
            self.groups.append(same[rank::world])
        self.world = world

    @torch.no_grad()
    def step(self, lr: float, momentum: float = 0.95) -> None:
        """One update; `lr` is the root mean square of an element's change, times five."""
        updates = [torch.zeros_like(p) for p in self.matrices]
        for group in self.groups:
            if not group:
                continue
            directions = []
            for index in group:
                grad, held = self.matrices[index].grad, self.momenta[index]
                if grad is None:
                    raise RuntimeError("a matrix has no gradient; call backward first")
                held.lerp_(grad, 1 - momentum)
                directions.append(grad.lerp(held, momentum))
            for index, update in zip(group, orthogonalise(torch.stack(directions)), strict=True):
                updates[index].copy_(update)
        if self.world > 1:
            flat = torch.cat([update.flatten() for update in updates])
            dist.all_reduce(flat)
            sizes = [update.numel() for update in updates]
            updates = [part.view_as(update) for part, update in zip(torch.split(flat, sizes), updates, strict=True)]
        for parameter, update in zip(self.matrices, updates, strict=True):
            scale = 0.2 * math.sqrt(max(parameter.shape))
            parameter.mul_(1 - 0.02 * lr).sub_(update, alpha=lr * scale)


def split_parameters(
    model: FluxTransformer2DModel,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Block matrices for Muon; embeddings, modulations and vectors for AdamW."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_block = "transformer_blocks" in name and parameter.ndim == 2
        plain = in_block and not name.split(".", 2)[2].startswith("norm")
        (matrices if plain else rest).append(parameter)
    return matrices, rest
