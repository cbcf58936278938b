"""Pictures as `fluxsplit preview` leaves them, for trying the gallery: drawn, with recipes, quickly."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from fluxsplit.metadata import ImageRecord, encode_png, png_text_chunks
from fluxsplit.recipe import Parent, Recipe, WeightsStamp

THINGS = ("lighthouse", "fox", "red circle", "old harbour", "glass tower", "snowy valley", "market hall", "sail boat")
LIGHTS = ("at dusk", "in morning fog", "under a green sky", "in hard noon light", "by candle light")
SIDES = ((512, 512), (512, 512), (640, 448), (448, 640))


def prompt_of(group: int) -> str:
    """The prompt of a group of pictures."""
    return f"a {THINGS[group % len(THINGS)]} {LIGHTS[group // len(THINGS) % len(LIGHTS)]}, study {group}"


def make_recipe(prompt: str, seed: int, width: int, height: int) -> Recipe:
    """A recipe of schnell's four steps."""
    return Recipe(
        prompt=prompt,
        seed=seed,
        width=width,
        height=height,
        steps=4,
        sigmas=(1.0, 0.75, 0.5, 0.25, 0.0),
        sampler="euler",
        scheduler="simple",
        shift=None,
        guidance=None,
        cfg=1.0,
        negative="",
        noise_index=0,
        variant="schnell",
        transformer=WeightsStamp("flux1-schnell-fp8.safetensors"),
        text_encoder=WeightsStamp("t5xxl_fp8.safetensors"),
        clip=WeightsStamp("clip_l.safetensors"),
        dtype="bf16",
        device="cpu",
    )


def draw(seed: int, width: int, height: int, scene: int) -> bytes:
    """RGB8 of a scene that is the same in every size; grain makes the file as large as a real picture's."""
    rng = random.Random(scene * 1000 + seed)
    picture = Image.new("RGB", (64, 64))
    sky, ground = [tuple(rng.randrange(30, 230) for _ in range(3)) for _ in range(2)]
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, 64, 64), fill=sky)
    pen.rectangle((0, rng.randrange(30, 50), 64, 64), fill=ground)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for _ in range(5):
        x, y, r = (rng.random() for _ in range(3))
        r = 0.05 + 0.15 * r
        box = ((x - r) * width, (y - r) * height, (x + r) * width, (y + r) * height)
        pen.ellipse(box, fill=tuple(rng.randrange(256) for _ in range(3)))
    picture = picture.filter(ImageFilter.GaussianBlur(width / 512))
    grain = Image.effect_noise((width, height), 12).convert("RGB")
    return Image.blend(picture, grain, 0.12).tobytes()


def write_preview(folder: Path, number: int, group: int) -> Path:
    """One preview, `0007.png`."""
    width, height = SIDES[group % len(SIDES)]
    path = folder / f"{number:04d}.png"
    path.write_bytes(_png(prompt_of(group), 1000 + number, width, height, group, None))
    return path


def write_render(renders: Path, number: int, group: int, scale: float = 2.0) -> Path:
    """The result of a preview, in which the same scene is larger."""
    width, height = (round(side * scale / 8) * 8 for side in SIDES[group % len(SIDES)])
    parent = Parent(f"{number:04d}.png", _sha256(1000 + number, group))
    path = renders / f"{number:04d}.png"
    path.write_bytes(_png(prompt_of(group), 1000 + number, width, height, group, parent))
    return path


def write_previews(folder: Path, count: int, in_group: int = 25, drawn: int = 24) -> None:
    """Many previews, `in_group` of each prompt; `drawn` pictures are drawn and used again under new recipes."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = [encode_png(draw(scene, *SIDES[scene % 4], scene), *SIDES[scene % 4], {}) for scene in range(drawn)]
    for number in range(count):
        group = number // in_group
        scenes = [scene for scene in range(drawn) if scene % 4 == group % 4]
        recipe = make_recipe(prompt_of(group), 1001 + number, *SIDES[group % 4])
        record = ImageRecord(recipe, _sha256(1001 + number, group), WeightsStamp("ae.safetensors"))
        texts = encode_png(bytes(3), 1, 1, png_text_chunks(record))
        picture = plain[scenes[number % len(scenes)]]
        spliced = picture[:33] + texts[33 : texts.index(b"IDAT") - 4] + picture[33:]  # behind IHDR, before the pixels
        (folder / f"{number + 1:04d}.png").write_bytes(spliced)


def _png(prompt: str, seed: int, width: int, height: int, group: int, parent: Parent | None) -> bytes:
    recipe = make_recipe(prompt, seed, width, height)
    sha256 = hashlib.sha256(f"{seed} {parent}".encode()).hexdigest() if parent else _sha256(seed, group)
    record = ImageRecord(recipe, sha256, WeightsStamp("ae.safetensors"), parent=parent)
    return encode_png(draw(seed, width, height, group), width, height, png_text_chunks(record))


def _sha256(seed: int, group: int) -> str:
    return hashlib.sha256(f"{seed} {group}".encode()).hexdigest()
