"""The denoise loop: Euler, Heun, DPM++ 2M over a function that predicts the clean latent.

A sampler is a function of model, x and sigmas (after k-diffusion `sampling.py`). x stays fp32 throughout; only the
network runs in 16 bits. In rectified flow the noised latent is x = (1 - sigma) * clean + sigma * noise, and the
network predicts velocity v = noise - clean, so clean = x - sigma * v.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch

Denoise = Callable[[torch.Tensor, float], torch.Tensor]
"""(x [1, 16, h, w], sigma) → predicted clean latent of the same shape, x - sigma * v in x's dtype."""
OnStep = Callable[[int], None]


def euler(denoise: Denoise, x: torch.Tensor, sigmas: tuple[float, ...], on_step: OnStep) -> torch.Tensor:
    """First order: a straight line along the predicted direction (Karras et al., arXiv 2206.00364, alg. 1)."""
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        direction = (x - denoise(x, sigma)) / sigma
        x = x + direction * (following - sigma)
        on_step(step + 1)
    return x


def heun(denoise: Denoise, x: torch.Tensor, sigmas: tuple[float, ...], on_step: OnStep) -> torch.Tensor:
    """Second order: the mean of the directions at both ends of a step, two forwards each but the last."""
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        direction = (x - denoise(x, sigma)) / sigma
        ahead = x + direction * (following - sigma)
        if following > 0:
            # In fp64: x - clean is sigma * v, which fp32 loses where sigma is small ("normal" ends at 0.001 or less),
            # and this direction is followed over a whole step.
            wide = ahead.double()
            direction = (direction + ((wide - denoise(wide, following)) / following).to(x.dtype)) / 2
            ahead = x + direction * (following - sigma)
        x = ahead
        on_step(step + 1)
    return x


def dpmpp_2m(denoise: Denoise, x: torch.Tensor, sigmas: tuple[float, ...], on_step: OnStep) -> torch.Tensor:
    """DPM-Solver++(2M) in log sigma (Lu et al., arXiv 2211.01095), as k-diffusion and ComfyUI write it."""
    before: torch.Tensor | None = None
    h_before = 0.0
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = denoise(x, sigma)
        if following == 0:
            x = clean
        else:
            h = math.log(sigma) - math.log(following)
            guess = clean
            if before is not None:
                r = h_before / h
                guess = (1 + 1 / (2 * r)) * clean - (1 / (2 * r)) * before
            x = (following / sigma) * x - math.expm1(-h) * guess
            h_before = h
        before = clean
        on_step(step + 1)
    return x


SAMPLE = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
