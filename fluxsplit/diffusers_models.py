"""diffusers' model classes that fluxsplit builds, imported without the packages they do not need."""

from __future__ import annotations

from fluxsplit.lean_import import without

with without("transformers", "accelerate", "scipy", "torchvision", "peft"):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vae import DecoderTiny
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel, FluxTransformerBlock

__all__ = ["AutoencoderKL", "DecoderTiny", "FluxTransformer2DModel", "FluxTransformerBlock"]
