"""VAE-space latents → pixels, by diffusers' AutoencoderKL."""

from __future__ import annotations

import torch
from torch import nn

from fluxsplit.checkpoint import Part
from fluxsplit.diffusers_models import AutoencoderKL
from fluxsplit.errors import FluxsplitError
from fluxsplit.weights import StoredLinear, WeightFiles, fill

LATENT_CHANNELS = 16
NORM_GROUPS = 32


class Vae:
    """A decoder with its weights."""

    def __init__(self, part: Part, files: WeightFiles, dtype: torch.dtype, device: torch.device) -> None:
        """Build from `part` (kind `vae`); raises FluxsplitError where it is not a 16-channel VAE."""
        self.dtype, self.device = dtype, device
        with torch.device("meta"):
            self.module = AutoencoderKL(**_dimensions(part))
        fill(self.module, part, files, dtype, device)
        _as_dense(self.module, dtype, device)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE-space latents [1, 16, h, w] → RGB [8 * h, 8 * w, 3], uint8 on the CPU.

        Rounded down, as ComfyUI writes PNGs (`nodes.py`, SaveImage). Raises FluxsplitError on a non-finite picture.
        """
        decoded: torch.Tensor = self.module.decode(latents.to(self.device, self.dtype)).sample[0].float()
        if not bool(decoded.isfinite().all()):
            raise FluxsplitError("the decoded picture holds NaN or infinity", "decode with --dtype fp32")
        unit = ((decoded + 1) / 2).clamp(0, 1)  # [3, H, W]
        levels: torch.Tensor = (unit * 255).to(torch.uint8).permute(1, 2, 0).contiguous().cpu()
        return levels


def _as_dense(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Expand the few matrices of the attention for good: the whole VAE is 0.2 GB at most."""
    for child in module.modules():
        if isinstance(child, StoredLinear):
            child.make_dense(dtype, device)


def _dimensions(part: Part) -> dict[str, object]:
    channels = part.shape("decoder.conv_in.weight")[1]
    if channels != LATENT_CHANNELS:
        raise FluxsplitError(f"this VAE has {channels} latent channels, Flux's has {LATENT_CHANNELS}")
    levels = part.count("encoder.down_blocks.%d.")
    widths = [part.shape(f"encoder.down_blocks.{i}.resnets.0.conv2.weight")[0] for i in range(levels)]
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(widths),
        "layers_per_block": part.count("encoder.down_blocks.0.resnets.%d."),
        "latent_channels": channels,
        "norm_num_groups": int(part.config.get("norm_num_groups", NORM_GROUPS)),
        "use_quant_conv": "quant_conv.weight" in part.sources,
        "use_post_quant_conv": "post_quant_conv.weight" in part.sources,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in part.sources,
    }
