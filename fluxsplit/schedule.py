"""Noise levels: simple, normal, beta, sgm_uniform, and the shift by resolution, with ComfyUI's numbers.

Flux's sigma is time itself, moved by a shift mu: sigma(t) = e^mu / (e^mu + 1/t - 1). ComfyUI tabulates sigma at
10000 times for dev and 1000 for schnell and its schedulers pick from that table (`comfy/model_sampling.py`,
`comfy/samplers.py`, v0.3.64). What follows gives the same sigmas to fp32 rounding.
"""

from __future__ import annotations

import math

import torch

from fluxsplit.errors import UsageError

TABLE_SIZE = {"dev": 10_000, "schnell": 1000}


def shifted(times: torch.Tensor, mu: float | None) -> torch.Tensor:
    """sigma(t) of times in 0..1, fp32."""
    if mu is None:
        return times
    alpha = math.exp(mu)
    return alpha / (alpha + (1 / times - 1))


def sigmas(scheduler: str, steps: int, variant: str, mu: float | None) -> tuple[float, ...]:
    """Noise levels for `steps` steps, from 1 to 0; `beta` may give fewer where two of its picks coincide.

    Raises UsageError where the steps are more than the model has noise levels.
    """
    size = TABLE_SIZE[variant]
    if steps > size:
        raise UsageError(f"{steps} steps are more than the {size} noise levels of {variant}")
    table = shifted(torch.arange(1, size + 1, dtype=torch.float32) / size, mu)
    picked = _PICK[scheduler](table, steps, mu)
    levels = [*picked, 0.0]
    return tuple(a for a, b in zip(levels, [*levels[1:], -1.0], strict=True) if a > b)


def from_sigma(levels: tuple[float, ...], start: float, mu: float | None) -> tuple[float, ...]:
    """The same number of steps from `start` down: a start in the middle costs no steps, whatever the schedule.

    Times, which mu turns into sigmas, are drawn together so that the first is that of `start`. For evenly spaced
    ones this is ComfyUI's `denoise`: int(n / d) steps are planned and the last n taken (`comfy/samplers.py`,
    KSampler.set_steps). schnell's four from 0.9 are 0.9, 0.675, 0.45, 0.225, 0.
    """
    if start == levels[0]:
        return levels
    alpha = 1.0 if mu is None else math.exp(mu)

    def time(sigma: float) -> float:
        return 1 / (alpha / sigma - alpha + 1)

    scale = time(start) / time(levels[0])
    times = [scale * time(level) for level in levels[1:-1]]
    return start, *(alpha / (alpha + 1 / t - 1) for t in times), 0.0


def _simple(table: torch.Tensor, steps: int, mu: float | None) -> list[float]:
    stride = len(table) / steps
    return [float(table[-(1 + int(i * stride))]) for i in range(steps)]


def _normal(table: torch.Tensor, steps: int, mu: float | None) -> list[float]:
    # ComfyUI takes sigma_min, already shifted, for a time and shifts it once more; kept, to give the same pictures.
    times = torch.linspace(1.0, float(table[0]), steps)
    return shifted(times, mu).tolist()


def _sgm_uniform(table: torch.Tensor, steps: int, mu: float | None) -> list[float]:
    times = torch.linspace(1.0, float(table[0]), steps + 1)[:-1]
    return shifted(times, mu).tolist()


def _beta(table: torch.Tensor, steps: int, mu: float | None) -> list[float]:
    """Times at quantiles of Beta(0.6, 0.6) (Lee et al., arXiv 2407.12173)."""
    import numpy as np  # noqa: PLC0415  scipy is slow to import and only this scheduler needs it
    from scipy.stats import beta  # noqa: PLC0415

    quantiles = beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), 0.6, 0.6)
    indices = np.rint(quantiles * (len(table) - 1)).astype(int)
    return [float(table[i]) for i in indices]


_PICK = {"simple": _simple, "normal": _normal, "sgm_uniform": _sgm_uniform, "beta": _beta}
