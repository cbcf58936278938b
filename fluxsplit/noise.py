"""Seed → initial noise, the numbers that ComfyUI draws."""

from __future__ import annotations

import torch

LATENT_CHANNELS = 16


def initial_noise(seed: int, height: int, width: int, index: int = 0) -> torch.Tensor:
    """fp32 [1, 16, height, width] (latent pixels) on the CPU: draw number `index` of the seed's generator.

    Item i of a ComfyUI batch is the i-th draw (`comfy/sample.py`, prepare_noise). Always drawn in fp32 on the CPU:
    the numbers then do not depend on the graphics card, nor on the compute dtype.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.empty(0)
    for _ in range(index + 1):
        noise = torch.randn(1, LATENT_CHANNELS, height, width, generator=generator, dtype=torch.float32)
    return noise
