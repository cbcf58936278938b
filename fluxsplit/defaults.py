"""What a model does when it is not told: steps, guidance and the shift of its noise levels."""

from __future__ import annotations

import math
from typing import Any

COMFYUI_DEV_SHIFT = 1.15
"""mu that ComfyUI uses at every size unless a ModelSamplingFlux node is wired."""
_STEPS = {"schnell": 4, "dev": 20}
_DEV_GUIDANCE = 3.5
_BASE_TOKENS, _MAX_TOKENS = 256, 4096
_BASE_SHIFT, _MAX_SHIFT = 0.5, 1.15


def steps_of(variant: str, config: dict[str, Any]) -> int:
    """Steps for `schnell` or `dev`, unless the file's `fluxsplit.config` says otherwise."""
    return int(config.get("sampling", {}).get("steps", _STEPS[variant]))


def guidance_of(variant: str) -> float | None:
    """Distilled guidance: dev embeds one, schnell none."""
    return _DEV_GUIDANCE if variant == "dev" else None


def shift_of(variant: str, config: dict[str, Any], width: int, height: int) -> float | None:
    """mu for `--shift auto` at a size in pixels: by resolution for dev, none for schnell, as BFL does.

    A file whose config names a `shift` factor under `sampling` has mu = ln(factor * sqrt(n / shift_tokens)), n the
    number of 16x16 patches (Esser et al., arXiv 2403.03206, section 5.3.2).
    """
    sampling = config.get("sampling", {})
    if "shift" in sampling:
        patches = width * height / 256
        return math.log(float(sampling["shift"]) * math.sqrt(patches / float(sampling["shift_tokens"])))
    return resolution_shift(width, height) if variant == "dev" else None


def resolution_shift(width: int, height: int) -> float:
    """mu linear in the number of 16x16 patches (BFL `sampling.py`, get_lin_function), not clamped.

    0.5 at 256 patches, 1.15 at 4096.
    """
    patches = width * height / 256
    slope = (_MAX_SHIFT - _BASE_SHIFT) / (_MAX_TOKENS - _BASE_TOKENS)
    return _BASE_SHIFT + (patches - _BASE_TOKENS) * slope


KEEP = "composition"
"""What a rerender at another size keeps of its picture; measured in docs/rerender.md."""
STRENGTH = 0.8
"""Sigma from which it is drawn again."""
LOW_FREQUENCY_GUIDANCE = 0.0
