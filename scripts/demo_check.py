"""Quick check of a training run: sample in this process, decode, and count what is right."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from captions import caption, to_text
from demo_flow import FlowConfig, build_flow, shift_sigmas
from demo_latents import image_ids, to_vae, unpack, unproject
from demo_text import Tokenizers, encode, load_encoders
from demo_vae import load_vae
from shapes import Pixels, Scene, Verdict, check, random_scene, to_pixels


def test_prompts(count: int, split: str, seed: int) -> list[tuple[str, Scene]]:
    """Prompts with their scenes, one and two objects in turn."""
    rng = np.random.default_rng((71, seed))
    pairs = []
    for index in range(count):
        scene = random_scene(rng, 1 + index % 2, test=split == "test")
        pairs.append((to_text(caption(rng, scene)), scene))
    return pairs


def summarise(scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Percentages right, per picture or per object, of single and paired scenes together."""

    def percent(values: list[bool]) -> float:
        return round(100 * sum(values) / max(len(values), 1), 1)

    rows = list(zip(scenes, verdicts, strict=True))
    singles = [v for s, v in rows if len(s.things) == 1]
    doubles = [v for s, v in rows if len(s.things) == 2]
    return {
        "background": percent([v.background for v in verdicts]),
        "colour": percent([c for v in verdicts for c in v.colours]),
        "shape": percent([s for v in verdicts for s in v.shapes]),
        "relation": percent([v.relation for v in verdicts if v.relation is not None]),
        "place": percent([v.place for v in verdicts if v.place is not None]),
        "duplicated": percent([v.duplicated for v in verdicts]),
        "colour of one": percent([c for v in singles for c in v.colours]),
        "shape of one": percent([s for v in singles for s in v.shapes]),
        "colour of two": percent([c for v in doubles for c in v.colours]),
        "shape of two": percent([s for v in doubles for s in v.shapes]),
        "all right, one": percent([v.right for v in singles]),
        "all right, two": percent([v.right for v in doubles]),
    }


class Sampler:
    """Encoders and a transformer, sampling packed latents with Euler steps."""

    def __init__(self, work: Path, tokenizer_folder: Path, device: str) -> None:
        self.device = device
        self.tokenizers = Tokenizers(tokenizer_folder)
        self.t5, self.clip = load_encoders(work, self.tokenizers)
        self.model, self.config = load_flow(work)
        for module in (self.t5, self.clip, self.model):
            module.to(device)

    @torch.no_grad()
    def sample(self, prompts: list[str], rows: int, columns: int, steps: int, shift: float, seed: int) -> Tensor:
        """Latents [B, 16, 2 rows, 2 columns] in flow space."""
        generator = torch.Generator().manual_seed(seed)
        count = rows * columns
        x = torch.randn(len(prompts), count, 64, generator=generator).to(self.device)
        ids = [self.tokenizers.t5_ids(prompts), self.tokenizers.clip_ids(prompts)]
        states, pooled = encode(self.t5, self.clip, *(i.to(self.device) for i in ids))
        scale = shift * math.sqrt(count / 64)
        sigmas = shift_sigmas(torch.linspace(1, 0, steps + 1), scale)
        places = image_ids(rows, columns, self.config.rope_short_side_tokens).to(self.device)
        for now, then in itertools.pairwise(sigmas):
            velocity = self.model(
                hidden_states=x,
                encoder_hidden_states=states,
                pooled_projections=pooled,
                timestep=now.expand(len(x)).to(self.device),
                img_ids=places,
                txt_ids=torch.zeros(states.shape[1], 3, device=self.device),
                return_dict=False,
            )[0]
            x = x + (then - now) * velocity
        return unpack(x, rows, columns).cpu()


def load_flow(work: Path) -> tuple[FluxTransformer2DModel, FlowConfig]:
    """The averaged weights of the last checkpoint."""
    state = torch.load(work / "flow.pt", map_location="cpu", weights_only=False)
    config = FlowConfig(**state["config"])
    model = build_flow(config)
    model.load_state_dict(state["ema"])
    return model.eval().requires_grad_(False), config


@torch.no_grad()
def decode(latents: Tensor, vae: AutoencoderKL | None) -> list[Pixels]:
    """Pixels [H, W, 3], by the autoencoder or by the projection's inverse."""
    if vae is None:
        return [to_pixels(unproject(item.numpy())) for item in latents]
    images = torch.cat([vae.decode(to_vae(item[None])).sample for item in latents])
    return [to_pixels(image.permute(1, 2, 0).numpy()) for image in images]


def contact_sheet(pictures: Sequence[Pixels], columns: int, path: Path) -> None:
    """Equal-sized pictures in rows, with a thin gap."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + 2), columns * (width + 2), 3), 90, np.uint8)
    for index, picture in enumerate(pictures):
        y, x = index // columns * (height + 2), index % columns * (width + 2)
        sheet[y : y + height, x : x + width] = picture
    Image.fromarray(sheet).save(path)


def check_flow(options: argparse.Namespace, device: str) -> dict[str, dict[str, float]]:
    """Score the last checkpoint at each size; sheets and a JSON-ready table."""
    sampler = Sampler(options.work, options.demo / "tokenizers", device)
    vae = load_vae(options.work) if (options.work / "vae.pt").exists() else None
    table = {}
    for size in options.sizes.split(","):
        width, height = (int(side) for side in size.split("x"))
        pairs = test_prompts(options.pairs, options.split, width * height)
        started = time.time()
        pictures: list[Pixels] = []
        chunk = max(1, 64 * 128 * 128 // (width * height))
        for first in range(0, len(pairs), chunk):
            prompts = [prompt for prompt, _ in pairs[first : first + chunk]]
            latents = sampler.sample(prompts, height // 16, width // 16, options.steps, options.shift, first)
            pictures += decode(latents, vae)
        scenes = [scene for _, scene in pairs]
        verdicts = [check(s, p) for s, p in zip(scenes, pictures, strict=True)]
        table[size] = summarise(scenes, verdicts) | {"s": round(time.time() - started, 1)}
        contact_sheet(pictures[:40], 8, options.work / f"check-{size}.png")
    return table
