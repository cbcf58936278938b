"""Train a small upscaler on drawn pictures: the 2x Compact network of the package, or an RRDBNet for measurements.

    nice scripts/train_upscaler.py compact fluxsplit/demo/upscaler-2x.safetensors   # 10 CPU-minutes, one core
    nice scripts/train_upscaler.py rrdb /tmp/rrdb-x2.pth --minutes 6

Architectures are those of Real-ESRGAN, so that everything that reads its files reads these: SRVGGNetCompact with
few features, and RRDBNet with 64 features in the layout of RealESRGAN_x2plus (pixels unshuffled by 2), but two blocks
in place of 23. Pictures are scenes of shapes, half of them with thin lines, gradients and grain drawn over, then
blurred a little and halved by one of three filters, which is what a network must undo. The loss is mean absolute
error. The last line is JSON: PSNR on scenes that were not trained on, beside Lanczos.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import save_file
from torch import Tensor, nn

from shapes import Array, draw, layout, random_scene

SIDE_PX = 192
PATCH_PX = 96
"""Of the large picture; the network sees half of it."""
FILTERS = (Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
BATCH = {"compact": 16, "rrdb": 4}


def picture(rng: np.random.Generator, test: bool = False) -> Image.Image:
    """A drawn picture of `SIDE_PX`, RGB."""
    scene = random_scene(rng, int(rng.integers(1, 3)), test)
    pixels = draw(layout(scene, rng, 1.0, 1.0), scene.background, SIDE_PX, SIDE_PX)
    if rng.random() < 0.5:
        pixels = pixels + _gradient(rng)
    image = Image.fromarray(((pixels.clip(-1, 1) + 1) * 127.5).astype(np.uint8))
    if rng.random() < 0.5:
        image = _with_lines(image, rng)
    if rng.random() < 0.4:
        grain = rng.normal(0, rng.uniform(2, 10), (SIDE_PX, SIDE_PX, 1))
        image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
    return image


def _gradient(rng: np.random.Generator) -> Array:
    ys, xs = np.mgrid[0:SIDE_PX, 0:SIDE_PX] / SIDE_PX - 0.5
    slopes = rng.normal(0, 0.5, (2, 3))
    return np.asarray(xs[..., None] * slopes[0] + ys[..., None] * slopes[1], np.float32)


def _with_lines(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Thin lines and small words, four times as large and then shrunk, so that their edges are smooth."""
    large = image.resize((4 * SIDE_PX, 4 * SIDE_PX), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(large)
    for _ in range(int(rng.integers(2, 8))):
        colour = tuple(int(level) for level in rng.integers(0, 256, 3))
        places = rng.uniform(0, 4 * SIDE_PX, (int(rng.integers(2, 5)), 2))
        ends = [(float(x), float(y)) for x, y in places]
        if rng.random() < 0.3:
            pen.text(ends[0], "flux split 4719", fill=colour, font_size=int(rng.integers(40, 160)))
        else:
            pen.line(ends, fill=colour, width=int(rng.integers(3, 17)))
    return large.resize((SIDE_PX, SIDE_PX), Image.Resampling.BOX)


def halved(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture as the network gets it."""
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.8))))
    return image.resize((image.width // 2, image.height // 2), FILTERS[int(rng.integers(len(FILTERS)))])


def pairs(count: int, seed: int, test: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Small and large pictures, uint8 [3, H, W]."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        large = picture(rng, test)
        made.append((_as_tensor(halved(large, rng)), _as_tensor(large)))
    return made


def _as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def network(kind: str) -> nn.Module:
    """An untrained network, small enough to be trained in minutes."""
    if kind == "compact":
        from spandrel.architectures.Compact import Compact  # noqa: PLC0415

        compact: nn.Module = Compact(num_feat=32, num_conv=6, upscale=2)
        nn.init.zeros_(compact.body[-1].weight)  # type: ignore[index,union-attr]
        return compact  # begins as the nearest neighbour, to which it adds
    from spandrel.architectures.ESRGAN import ESRGAN  # noqa: PLC0415

    rrdb: nn.Module = ESRGAN(in_nc=12, num_filters=64, num_blocks=2, scale=4, shuffle_factor=2)
    for module in rrdb.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 0.5
    return rrdb


def batch_of(data: list[tuple[Tensor, Tensor]], count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random patches in random orientation: fp32 [B, 3, P/2, P/2] and [B, 3, P, P]."""
    small, large = [], []
    for number in rng.integers(len(data), size=count):
        low, high = data[number]
        top, left = (int(place) for place in rng.integers(0, (SIDE_PX - PATCH_PX) // 2, 2))
        low = low[:, top : top + PATCH_PX // 2, left : left + PATCH_PX // 2]
        high = high[:, 2 * top : 2 * top + PATCH_PX, 2 * left : 2 * left + PATCH_PX]
        turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
        low, high = (torch.rot90(part, turns, (1, 2)) for part in (low, high))
        small.append(low.flip(2) if mirror else low)
        large.append(high.flip(2) if mirror else high)
    return torch.stack(small).float() / 255, torch.stack(large).float() / 255


def train(model: nn.Module, kind: str, minutes: float) -> int:
    """Train for so many minutes of CPU time; returns the number of steps."""
    data = pairs(300, seed=1)
    rng = np.random.default_rng(2)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3 if kind == "compact" else 2e-4)
    start_s, total_s, steps = time.process_time(), 60 * minutes, 0
    while (used_s := time.process_time() - start_s) < total_s:
        for group in optimiser.param_groups:
            group["lr"] = (2e-3 if kind == "compact" else 2e-4) * (
                0.02 + 0.98 * math.cos(math.pi / 2 * used_s / total_s)
            )
        small, large = batch_of(data, BATCH[kind], rng)
        loss = F.l1_loss(model(small), large)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        steps += 1
        if steps % 100 == 0:
            print(f"{used_s:.0f} CPU-seconds, step {steps}, loss {loss.item():.4f}", file=sys.stderr, flush=True)
    return steps


@torch.inference_mode()
def evaluate(model: nn.Module) -> dict[str, float]:
    """PSNR in dB over scenes that were not trained on: the network's, and that of Lanczos."""
    data = pairs(40, seed=3, test=True)
    ours, theirs = [], []
    for small, large in data:
        made = model(small[None].float() / 255).clamp(0, 1)[0]
        image = Image.fromarray(small.permute(1, 2, 0).numpy()).resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
        ours.append(_psnr(made, large.float() / 255))
        theirs.append(_psnr(_as_tensor(image).float() / 255, large.float() / 255))
    return {"psnr_db": sum(ours) / len(ours), "lanczos_psnr_db": sum(theirs) / len(theirs)}


def _psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10(float(((a - b) ** 2).mean()))


def as_published(state: dict[str, Any]) -> dict[str, Any]:
    """RRDBNet's tensors under the names that Real-ESRGAN's files have, from those that spandrel builds with."""
    blocks = max(int(match[1]) for name in state if (match := re.match(r"model\.1\.sub\.(\d+)\.", name)))
    names = {"model.0": "conv_first", f"model.1.sub.{blocks}": "conv_body"}
    ends = [
        int(match[1]) for name in state if (match := re.fullmatch(r"model\.(\d+)\.weight", name)) and match[1] != "0"
    ]
    for number, place in enumerate(sorted(ends)[:-2]):
        names[f"model.{place}"] = f"conv_up{number + 1}"
    names |= dict(zip((f"model.{place}" for place in sorted(ends)[-2:]), ("conv_hr", "conv_last"), strict=True))
    renamed = {}
    for name, value in state.items():
        owner, leaf = name.rsplit(".", 1)
        dense = re.fullmatch(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0", owner)
        renamed[f"body.{dense[1]}.rdb{dense[2]}.conv{dense[3]}.{leaf}" if dense else f"{names[owner]}.{leaf}"] = value
    return renamed


def main() -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("compact", "rrdb"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0, help="CPU time, not wall time")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = network(arguments.kind)
    steps = train(model, arguments.kind, arguments.minutes)
    figures = evaluate(model.eval())
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    if arguments.kind == "compact":
        save_file({name: value.half() for name, value in state.items()}, arguments.out)
    else:
        torch.save({"params_ema": as_published(state)}, arguments.out)
    parameters = sum(value.numel() for value in state.values())
    print(json.dumps({"kind": arguments.kind, "steps": steps, "parameters": parameters, **figures}))


if __name__ == "__main__":
    main()
