"""The demo model's autoencoder: stock `AutoencoderKL` on both sides of the fixed latents.

The encoder learns to produce the projection of `demo_latents`, the decoder to draw crisp pictures
from it, the two apart from each other. Crops come from pictures of many sizes, because a larger
picture looks like a closer view; latents get a little noise, as a few-step sampler leaves some.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from demo_latents import CHANNELS, SCALING_FACTOR, SHIFT_FACTOR, project_batch, to_vae
from shapes import Placed, draw, layout, random_scene

WIDTHS = (16, 24, 48, 64)
GROUPS = 8
LR = 2.5e-3


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder without attention and without quantisation convolutions."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=GROUPS,
        scaling_factor=SCALING_FACTOR,
        shift_factor=SHIFT_FACTOR,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def crops(rng: np.random.Generator, count: int, size: int) -> Tensor:
    """Square crops, most of them on an outline, of pictures of 64 to 640 pixels.  # [B, 3, S, S]"""
    images = []
    for _ in range(count):
        scene = random_scene(rng, int(rng.integers(1, 3)))
        placed = layout(scene, rng, 1.0, 1.0)
        zoom = max(1.0, 64 * 2 ** rng.uniform(0, 3.3) / size)  # frame's side in crops
        target = placed[int(rng.integers(len(placed)))]
        angle, reach = rng.uniform(0, 2 * np.pi), target.radius * rng.uniform(0.2, 1.3)
        room = max(0.0, 0.5 - 0.5 / zoom)
        x = float(np.clip(target.x + reach * np.cos(angle), -room, room))
        y = float(np.clip(target.y + reach * np.sin(angle), -room, room))
        closer = [Placed(p.thing, (p.x - x) * zoom, (p.y - y) * zoom, p.radius * zoom) for p in placed]
        images.append(torch.from_numpy(draw(closer, scene.background, size, size)))
    return torch.stack(images).permute(0, 3, 1, 2).contiguous()


def _slopes(images: Tensor) -> tuple[Tensor, Tensor]:
    return images[..., 1:, :] - images[..., :-1, :], images[..., 1:] - images[..., :-1]


def picture_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Absolute, squared and slope differences."""
    error = made - wanted
    rows, columns = _slopes(error)
    slopes = rows.abs().mean() + columns.abs().mean()
    return error.abs().mean() + error.square().mean() + 0.3 * slopes


def psnr(made: Tensor, wanted: Tensor) -> float:
    """Peak signal to noise ratio in dB for pictures in -1..1."""
    error = (made.clamp(-1, 1) - wanted).square().mean()
    return float(10 * torch.log10(4 / error))


def train_vae(work: Path, minutes: float, device: str) -> None:
    """Train both halves for `minutes` over all runs, saved as `vae.pt`."""
    torch.manual_seed(2)
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=1e-4)
    path, step, spent_s = work / "vae.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent_s = state["step"], state["spent_s"]
    before = last_save = time.time()
    while spent_s < minutes * 60:
        part = spent_s / (minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 100, (1 - part) / 0.6)
        rng = np.random.default_rng((41, step))
        size, count = (128, 3) if step % 8 == 0 else (64, 12)
        images = crops(rng, count, size).to(device)
        latents = project_batch(images)  # [B, 16, S/8, S/8]
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(step))
        strength = float(rng.uniform(0, 0.15))
        made = vae.decoder(to_vae(latents + strength * noise.to(device)))
        mean = vae.encoder(images)[:, :CHANNELS]
        encoded = nn.functional.smooth_l1_loss(mean, to_vae(latents), beta=0.2)
        # The upper half is the logarithm of the variance: held at a small constant.
        spread = (vae.encoder.conv_out.bias[CHANNELS:] + 8).square().mean() * 0.01
        loss = picture_loss(made, images) + 0.5 * encoded + spread
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        now = time.time()
        spent_s, before = spent_s + now - before, now
        if step % 50 == 0:
            log = {"step": step, "part": round(part, 3), "psnr": round(psnr(made, images), 2)}
            log |= {"encoder": round(float(encoded), 4), "s": round(spent_s)}
            print(json.dumps(log), flush=True)
        if now - last_save > 120 or spent_s >= minutes * 60:
            last_save = now
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step, "spent_s": spent_s}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)


def load_vae(work: Path) -> AutoencoderKL:
    """The trained autoencoder."""
    vae = build_vae()
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["vae"])
    return vae.eval().requires_grad_(False)
