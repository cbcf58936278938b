"""Holds the large forms of a rerender to its preview while they are decided, in the first half of the steps.

After each prediction the lowest half of the preview's band of the clean latent is moved towards the enlarged
preview: by the weight in the first quarter of the steps, by half of it in the second. Detail, which is decided
later, is free. HiFlow (arXiv 2504.06232), I-Max (2410.07536) and FreCaS (2410.18410) do variants of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fluxsplit.cosine_basis import coefficients, planes


@dataclass(frozen=True, slots=True)
class LowFrequencyGuidance:
    """What to hold to, and how much."""

    target: torch.Tensor
    """Coefficients [1, C, bh, bw] of the enlarged preview, model space: half of the preview's band."""
    sigmas: tuple[float, ...]
    weight: float

    def __call__(self, clean: torch.Tensor, sigma: float) -> torch.Tensor:
        """The predicted clean latent [1, C, H, W] at `sigma`, its low band moved towards the preview's."""
        weight = self.weight * self._share(sigma)
        if not weight:
            return clean
        spectrum = coefficients(clean)
        rows, columns = (slice(side) for side in self.target.shape[-2:])
        spectrum[..., rows, columns] += weight * (self.target - spectrum[..., rows, columns])
        return planes(spectrum).to(clean.dtype)

    def _share(self, sigma: float) -> float:
        """1 in the first quarter of the steps, 0.5 in the second, then 0."""
        steps = len(self.sigmas) - 1
        done = sum(level > sigma for level in self.sigmas[:-1]) / steps
        return 1.0 if done < 0.25 else 0.5 if done < 0.5 else 0.0


def guidance_towards(
    enlarged: torch.Tensor, band: tuple[int, int], sigmas: tuple[float, ...], weight: float
) -> LowFrequencyGuidance:
    """Guidance towards `enlarged` [1, C, H, W], made of a preview whose grid (h, w) is `band`."""
    rows, columns = (max(1, min(side, old) // 2) for side, old in zip(enlarged.shape[-2:], band, strict=True))
    return LowFrequencyGuidance(coefficients(enlarged)[..., :rows, :columns], sigmas, weight)
