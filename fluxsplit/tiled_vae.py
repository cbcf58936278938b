"""Decoding in diffusers' overlapped tiles, for those who want it (`--tile`): quicker to nothing, and not exact.

Each tile has GroupNorm and attention statistics of its own, so that tones drift from one to the next; see
docs/decoding.md. It is here because others decode so, and their pictures may have to be met.
"""

from __future__ import annotations

import torch

from fluxsplit.device import DTYPES
from fluxsplit.vae import Vae, levels


class TiledVae:
    """diffusers' AutoencoderKL (`module`) with all weights in memory."""

    def __init__(self, vae: Vae, dtype: str) -> None:
        from fluxsplit.diffusers_models import AutoencoderKL  # noqa: PLC0415 - 1.7 s of CPU, only for tiles

        self._device, self._dtype = vae.device, DTYPES[dtype]
        shape = vae.shape
        with torch.device("meta"):
            self.module = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * len(shape.widths),
                up_block_types=("UpDecoderBlock2D",) * len(shape.widths),
                block_out_channels=shape.widths,
                layers_per_block=shape.blocks,
                latent_channels=shape.latent_channels,
                norm_num_groups=shape.groups,
                use_quant_conv="quant_conv.weight" in vae.part.sources,
                use_post_quant_conv="post_quant_conv.weight" in vae.part.sources,
                mid_block_add_attention=shape.attention,
            )
        sides = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        weights = {name: vae.parameter(name, self._dtype).view(side) for name, side in sides.items()}
        self.module.load_state_dict(weights, strict=True, assign=True)
        self.module.eval()
        self._factor = shape.factor

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor, tile: int) -> torch.Tensor:
        """VAE-space latents [1, 16, h, w] → RGB [8 h, 8 w, 3] uint8, in tiles of `tile` pixels; 0 for none at all."""
        return levels(self.values(latents, tile)).cpu()

    @torch.inference_mode()
    def values(self, latents: torch.Tensor, tile: int) -> torch.Tensor:
        """The picture [8 h, 8 w, 3] in -1..1."""
        self.module.use_tiling = tile > 0
        self.module.tile_sample_min_size = tile
        self.module.tile_latent_min_size = tile // self._factor
        decoded: torch.Tensor = self.module.decode(latents.to(self._device, self._dtype)).sample[0]
        return decoded.permute(1, 2, 0)
