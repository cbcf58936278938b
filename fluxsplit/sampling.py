"""The denoise loop: Euler, Heun, DPM++ 2M as generators that ask for the clean latent and are told it.

A sampler is a function of model, x and sigmas (after k-diffusion `sampling.py`), turned inside out: it yields what
it wants predicted and is sent the answer, so that whoever drives it may drive several at once (`lockstep`). x stays
fp32 throughout; only the network runs in 16 bits. In rectified flow the noised latent is
x = (1 - sigma) * clean + sigma * noise, and the network predicts velocity v = noise - clean, so
clean = x - sigma * v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """What a sampler wants predicted: the clean latent, x - sigma * v in x's dtype."""

    x: torch.Tensor
    """[1, 16, h, w], fp32, or fp64 where the sampler needs it."""
    sigma: float
    step: int
    """Number of steps that are finished, from 0."""


Sampling = Generator[Ask, torch.Tensor, torch.Tensor]
"""Yields what is to be predicted, is sent the clean latent of the same shape, returns the picture's latent."""
Sigmas = tuple[float, ...]


def euler(x: torch.Tensor, sigmas: Sigmas) -> Sampling:
    """First order: a straight line along the predicted direction (Karras et al., arXiv 2206.00364, alg. 1)."""
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = yield Ask(x, sigma, step)
        direction = (x - clean) / sigma
        x = x + direction * (following - sigma)
    return x


def heun(x: torch.Tensor, sigmas: Sigmas) -> Sampling:
    """Second order: the mean of the directions at both ends of a step, two forwards each but the last."""
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = yield Ask(x, sigma, step)
        direction = (x - clean) / sigma
        ahead = x + direction * (following - sigma)
        if following > 0:
            # In fp64: x - clean is sigma * v, which fp32 loses where sigma is small ("normal" ends at 0.001 or less),
            # and this direction is followed over a whole step.
            wide = ahead.double()
            clean = yield Ask(wide, following, step)
            direction = (direction + ((wide - clean) / following).to(x.dtype)) / 2
            ahead = x + direction * (following - sigma)
        x = ahead
    return x


def dpmpp_2m(x: torch.Tensor, sigmas: Sigmas) -> Sampling:
    """DPM-Solver++(2M) in log sigma (Lu et al., arXiv 2211.01095), as k-diffusion and ComfyUI write it."""
    before: torch.Tensor | None = None
    h_before = 0.0
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        clean = yield Ask(x, sigma, step)
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
    return x


SAMPLE: dict[str, Callable[[torch.Tensor, Sigmas], Sampling]] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def drive(sampling: Sampling, denoise: Callable[[torch.Tensor, float], torch.Tensor]) -> torch.Tensor:
    """The latent at the end of one sampling; `denoise` takes x and sigma and gives the clean latent."""
    ask = next(sampling)
    while True:
        try:
            ask = sampling.send(denoise(ask.x, ask.sigma))
        except StopIteration as end:
            latents: torch.Tensor = end.value
            return latents
