"""Fit the linear map by which `fluxsplit peek` draws latents: pixels of a VAE's pictures from its latents.

    scripts/fit_peek.py > fluxsplit/peek_demo.py                  # the demo model's
    scripts/fit_peek.py --vae ae.safetensors --pictures photos    # another VAE's; needs pictures of its world

Pictures are encoded and decoded by the VAE. For each latent, the 8x8 pixels that the decoder draws are averaged over
cells of 4x4, and the weights of the 16 channels (and a constant) are those of least squares over all latents. Half of
the pictures are kept aside; what the map leaves unexplained of them, beside a map with one cell, goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fluxsplit import checkpoint
from fluxsplit.diffusers_models import AutoencoderKL
from fluxsplit.latent_space import LatentSpace, latent_space
from fluxsplit.models import demo_files
from fluxsplit.tiled_vae import TiledVae
from fluxsplit.vae import load_vae
from fluxsplit.weights import WeightFiles
from shapes import Array, picture, random_scene

SIDE_PX = 192


def drawn(count: int, seed: int) -> list[Array]:
    """Scenes of shapes, [H, W, 3] in -1..1."""
    rng = np.random.default_rng(seed)
    return [
        picture(random_scene(rng, int(rng.integers(1, 3))), rng, SIDE_PX, SIDE_PX).clip(-1, 1) for _ in range(count)
    ]


def photos(folder: Path, count: int) -> list[Array]:
    """The first pictures of a folder, cut to the middle square."""
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    made = []
    for file in files[:count]:
        with Image.open(file) as opened:
            side = min(opened.size)
            left, top = (opened.width - side) // 2, (opened.height - side) // 2
            square = opened.convert("RGB").crop((left, top, left + side, top + side)).resize((2 * SIDE_PX, 2 * SIDE_PX))
        made.append(np.asarray(square, np.float32) / 127.5 - 1)
    return made


@torch.inference_mode()
def decoded(vae: AutoencoderKL, pictures: list[Array], scaling: float, shift: float) -> list[tuple[Tensor, Tensor]]:
    """Model-space latents [1, 16, h, w] and what the decoder makes of them [1, 3, 8h, 8w], of every picture."""
    made = []
    for pixels in pictures:
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
        latents = vae.encode(image).latent_dist.mean
        made.append(((latents - shift) * scaling, vae.decode(latents).sample.clamp(-1, 1)))
    return made


def pairs(made: list[tuple[Tensor, Tensor]], cells: int) -> tuple[Array, Array]:
    """Latents with a constant [N, 17] and the pixels of their cells [N, 3 * cells^2]."""
    order = [colour * cells**2 + place for place in range(cells**2) for colour in range(3)]
    inputs, outputs = [], []
    for latents, pixels in made:
        averaged = torch.nn.functional.avg_pool2d(pixels, 8 // cells)
        woven = torch.nn.functional.pixel_unshuffle(averaged, cells)  # [1, 3 * cells^2, h, w], colour outermost
        inputs.append(latents[0].permute(1, 2, 0).reshape(-1, 16).numpy())
        outputs.append(woven[0, order].permute(1, 2, 0).reshape(-1, 3 * cells**2).numpy())
    stacked = np.concatenate(inputs)
    return np.hstack([stacked, np.ones((len(stacked), 1), np.float32)]), np.concatenate(outputs)


def report(name: str, weights: Array, test: tuple[Array, Array]) -> float:
    """Root mean square error in levels of 255 on pictures that were kept aside."""
    error = (np.clip(test[0] @ weights, -1, 1) - test[1]) * 127.5
    rms = float(np.sqrt((error**2).mean()))
    spread = float(test[1].std() * 127.5)
    print(f"{name}: rms error {rms:.2f} of 255, where the pixels spread by {spread:.1f}", file=sys.stderr)
    return rms


def table(weights: Array, cells: int, space: LatentSpace) -> str:
    """The module that `fluxsplit/peek_demo.py` is."""
    lines = [
        '"""The demo model\'s linear map from latents to pixels, fitted by scripts/fit_peek.py."""',
        "",
        "# fmt: off",
    ]
    lines += [f"CELLS, SCALING, SHIFT = {cells}, {space.scaling}, {space.shift}", "WEIGHTS = ("]
    for row in weights[:-1].T:
        numbers = [f"{value:.4f}" for value in row]
        lines += ["    (" + ", ".join(numbers[:8]) + ",", "     " + ", ".join(numbers[8:]) + "),"]
    bias = [f"{value:.4f}" for value in weights[-1]]
    return "\n".join([*lines, ")", "BIAS = (" + ", ".join(bias) + ")"])


def main() -> None:
    """Fit and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", default="", help="VAE file; the demo model's without")
    parser.add_argument("--pictures", type=Path, help="folder of pictures; scenes of shapes without")
    parser.add_argument("--count", type=int, default=24)
    arguments = parser.parse_args()
    file = arguments.vae or demo_files().vae
    contents = checkpoint.describe(file)
    space = latent_space(contents.config.get("vae", {}))
    vae = TiledVae(load_vae(checkpoint.part(file, "vae"), WeightFiles(), torch.device("cpu")), "fp32").module
    pictures = photos(arguments.pictures, arguments.count) if arguments.pictures else drawn(arguments.count, 1)
    half = len(pictures) // 2
    made = decoded(vae, pictures, space.scaling, space.shift)
    figures = {}
    for cells in (1, 2):
        train, test = pairs(made[:half], cells), pairs(made[half:], cells)
        weights = np.linalg.lstsq(train[0], train[1], rcond=None)[0]
        figures[f"rms_{cells}"] = report(f"{cells}x{cells} pixels for each latent", weights, test)
    print(table(weights, cells, space))
    print(json.dumps(figures), file=sys.stderr)


if __name__ == "__main__":
    main()
