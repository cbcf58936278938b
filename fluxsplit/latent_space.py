"""How the latents that a transformer sees relate to those that its VAE decodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLUX_SCALING, FLUX_SHIFT = 0.3611, 0.1159
"""Of FLUX.1's VAE (BFL `src/flux/util.py`; ComfyUI `comfy/latent_formats.py`)."""


@dataclass(frozen=True, slots=True)
class LatentSpace:
    """How the sampler's latents relate to the VAE's: vae = model / scaling + shift."""

    scaling: float = FLUX_SCALING
    shift: float = FLUX_SHIFT

    def to_vae(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE decodes them, from latents as the transformer sees them."""
        return latents / self.scaling + self.shift

    def to_model(self, latents: torch.Tensor) -> torch.Tensor:
        """Undoes `to_vae`."""
        return (latents - self.shift) * self.scaling


def latent_space(config: dict[str, object]) -> LatentSpace:
    """Flux's values, or those of the VAE section of `fluxsplit.config`."""
    scaling = float(str(config.get("scaling_factor", FLUX_SCALING)))
    return LatentSpace(scaling, float(str(config.get("shift_factor", FLUX_SHIFT))))
