"""How well a rerender keeps the composition of its preview, measured in pairs through the product's own rooms.

    nice python scripts/eval_rerender.py --work WORK                 # measure, 100 pairs, then write docs/rerender.md
    nice python scripts/eval_rerender.py --work WORK --part 0/2 &    # two processes share the pairs; run both
    nice python scripts/eval_rerender.py --work WORK --part 1/2
    python scripts/eval_rerender.py --work WORK --report             # only the table, from what is there
    python scripts/eval_rerender.py --work WORK --report --sheet docs/images/rerender.png

Everything that is measured is appended to WORK at once, so a run that was stopped goes on where it was. Columns:
`overlap` of the foreground of the shrunk result with the preview's (intersection over union), `SSIM` with the
preview, `kept`: the share in which every object kept shape, colour and place, `right`: the share that shows what
the prompt says, `sharp`: slope of the objects' edges relative to the preview enlarged by bicubic interpolation.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

from demo_check import test_prompts
from fluxsplit import checkpoint, defaults
from fluxsplit.conditioning import Conditioning
from fluxsplit.fingerprint import file_sha256
from fluxsplit.latent_space import LatentSpace, latent_space
from fluxsplit.latents import LatentFile
from fluxsplit.lockstep import Picture, sample_together
from fluxsplit.models import Wanted, demo_files, resolve
from fluxsplit.recipe import Recipe, WeightsStamp
from fluxsplit.schedule import from_sigma, sigmas
from fluxsplit.start import NoiseGrid, Start
from fluxsplit.starting_point import starting_point
from fluxsplit.text import T5, Clip, T5Tokens
from fluxsplit.transformer import Flux
from fluxsplit.vae_session import VaeSession
from fluxsplit.weights import WeightFiles
from shapes import Found, Pixels, Scene, check, find_objects

PAGE = Path(__file__).resolve().parent.parent / "docs" / "rerender.md"
BEGIN, END = "<!-- table: written by scripts/eval_rerender.py -->", "<!-- end of table -->"
PLACE = 0.06
"""Shorter sides by which an object's middle may move and still be where it was."""
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Way:
    """One way of rendering again."""

    name: str
    keep: str
    strength: float = 1.0
    guidance: float = 0.0


WAYS = (
    Way("plain enlargement (bicubic)", "enlarged"),
    Way("`seed`: the same seed, as ComfyUI does", "seed"),
    Way("`noise`", "noise"),
    *(Way(f"`image`, strength {s:g}", "image", s) for s in (0.7, 0.8, 0.9, 0.95)),
    Way("`image` 0.95, guided (as HiFlow)", "image", 0.95, 1.0),
    Way("`image` 1, guided (as I-Max)", "image", 1.0, 1.0),
    *(Way(f"`composition`, strength {s:g}", "composition", s) for s in (0.7, 0.8, 0.9, 0.95, 1.0)),
    *(Way(f"`composition` {s:g}, guided", "composition", s, 1.0) for s in (0.9, 0.95)),
)
SHORT = tuple(
    way
    for way in WAYS
    if way.keep in ("enlarged", "seed", "noise")
    or (way.keep, way.strength, way.guidance) == ("image", 0.9, 0.0)
    or (way.keep == "composition" and way.strength in (0.8, 0.9))
)
"""For the sizes that cost most."""
MIDDLE = tuple(way for way in WAYS if way in SHORT or (way.keep in ("image", "composition") and way.strength == 0.95))


@dataclass(frozen=True, slots=True)
class Leg:
    """From one size to another, with some number of steps."""

    old: Size
    new: Size
    steps: int
    ways: tuple[Way, ...]

    @property
    def title(self) -> str:
        return f"{self.old[0]}x{self.old[1]} to {self.new[0]}x{self.new[1]}, {self.steps} steps"


LEGS = (
    Leg((128, 128), (256, 256), 4, WAYS),
    Leg((128, 128), (256, 256), 8, MIDDLE),
    Leg((256, 256), (512, 512), 4, SHORT),
    Leg((256, 256), (576, 472), 4, SHORT),
)


class Silent:
    """Takes a stage's events and tells nobody."""

    def send(self, event: str, **fields: Any) -> None:
        """Nothing."""


class Model:
    """The demo model or another, loaded once."""

    def __init__(self, model: str, tokenizers: str) -> None:
        files = (
            demo_files()
            if not model
            else resolve(Wanted(model=model, tokenizers=tokenizers), ("transformer", "t5", "clip"))
        )
        cpu = torch.device("cpu")
        self.flux = Flux(checkpoint.part(files.transformer, "transformer"), WeightFiles(), torch.float32, cpu)
        self.config = checkpoint.describe(files.transformer).config
        self.space: LatentSpace = latent_space(self.config.get("vae", {}))
        self.vae = VaeSession(files.vae or files.transformer, "cpu", "fp32", "auto", 0, Silent())  # type: ignore[arg-type]
        part = checkpoint.part(files.text_encoder, "t5")
        self._t5 = T5(part, T5Tokens(part, files.t5_tokenizer), WeightFiles(), cpu)
        self._clip = Clip(checkpoint.part(files.clip, "clip"), files.clip_tokenizer, WeightFiles(), cpu)
        self.sha256 = file_sha256(files.transformer)

    def encoded(self, prompt: str) -> Conditioning:
        """What the text encoders make of a prompt."""
        return Conditioning(self._t5.encode([prompt])[0].cpu(), self._clip.encode(prompt).cpu())

    def recipe(self, prompt: str, seed: int, size: Size, steps: int, start: Start | None) -> Recipe:
        """A recipe as the sample stage makes it."""
        mu = defaults.shift_of(self.flux.variant, self.config, *size)
        levels = sigmas("simple", steps, self.flux.variant, mu)
        if start is not None and start.keep != "noise":
            levels = from_sigma(levels, start.strength, mu)
        stamp = WeightsStamp("")
        return Recipe(
            prompt=prompt, seed=seed, width=size[0], height=size[1], steps=len(levels) - 1, sigmas=levels,
            sampler="euler", scheduler="simple", shift=mu, guidance=None, cfg=1.0, negative="", noise_index=0,
            variant=self.flux.variant, transformer=stamp, text_encoder=stamp, clip=stamp, dtype="fp32", device="cpu",
            start=start,
        )  # fmt: skip

    def latents(self, recipe: Recipe, conditioning: Conditioning, preview: LatentFile | None) -> LatentFile:
        """The latent of a recipe, as the sample stage makes it."""
        picture = Picture(recipe, conditioning, None, starting_point(recipe, preview, self.space))
        _, latent = next(iter(sample_together(self.flux, {0: picture}, lambda steps: None)))
        if not isinstance(latent, torch.Tensor):
            raise latent
        payload = self.space.to_vae(latent).contiguous().view(torch.uint8).numpy().tobytes()
        shape = (1, 16, recipe.height // 8, recipe.width // 8)
        return LatentFile("", "pt", shape, payload, None, {}, hashlib.sha256(payload).hexdigest())

    def pixels(self, latent: LatentFile) -> Pixels:
        """The picture of a latent."""
        tensor = torch.frombuffer(bytearray(latent.payload), dtype=torch.float32).view(latent.shape)
        return self.vae.decode(tensor, lambda share: None)[0].numpy()


# -- what is measured --------------------------------------------------------------------------


def shrunk(pixels: Pixels, size: Size) -> Pixels:
    """A picture at another size, by Lanczos."""
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def foreground(pixels: Pixels) -> Any:
    """Where a picture is not of its border's colour."""
    image = pixels.astype(np.float32)
    border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), image[:, :2].reshape(-1, 3)])
    return np.linalg.norm(image - np.median(border, axis=0), axis=-1) > 55


def overlap(a: Pixels, b: Pixels) -> float:
    """Intersection over union of the foregrounds."""
    one, other = foreground(a), foreground(b)
    union = float((one | other).sum())
    return float((one & other).sum()) / union if union else 1.0


def ssim(a: Pixels, b: Pixels) -> float:
    """Mean structural similarity of the grey pictures (Wang et al. 2004, Gaussian of 1.5)."""
    x, y = (pixels.astype(np.float64).mean(-1) for pixels in (a, b))

    def blur(values: Any) -> Any:
        return ndimage.gaussian_filter(values, 1.5, truncate=3.5)

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def kept(preview: Pixels, result: Pixels) -> bool:
    """Whether background and every object kept shape, colour and place, and none came or went."""
    (ground, before), (new_ground, after) = find_objects(preview), find_objects(result)
    if ground != new_ground or len(before) != len(after):
        return False
    sides = [(p.shape[1] / min(p.shape[:2]), p.shape[0] / min(p.shape[:2])) for p in (preview, result)]
    left = list(after)
    for thing in before:
        match = next((other for other in left if _same(thing, other, sides)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same(old: Found, new: Found, sides: list[tuple[float, float]]) -> bool:
    """Places are compared as shares of the frame, so that a stretched picture counts as kept."""
    (w, h), (new_w, new_h) = sides
    moved = math.hypot(new.x / new_w - old.x / w, new.y / new_h - old.y / h)
    return (old.shape, old.colour) == (new.shape, new.colour) and moved < PLACE


def edge_slope(pixels: Pixels) -> float:
    """Steepest change per pixel along the objects' outlines, as a share of the whole step; 0 without objects."""
    image = pixels.astype(np.float32)
    mask = foreground(pixels)
    rim = mask ^ ndimage.binary_erosion(mask)
    if not rim.any():
        return 0.0
    dy, dx = (np.linalg.norm(np.gradient(image, axis=axis), axis=-1) for axis in (0, 1))
    slope = ndimage.maximum_filter(np.hypot(dx, dy), 5)
    reach = max(2, min(image.shape[:2]) // 32)
    window = (2 * reach + 1, 2 * reach + 1, 1)
    step = np.linalg.norm(ndimage.maximum_filter(image, window) - ndimage.minimum_filter(image, window), axis=-1) + 1e-6
    return float((slope / step)[rim].mean())


# -- running -----------------------------------------------------------------------------------


def measured(
    model: Model, leg: Leg, number: int, prompt: str, scene: Scene, keep_pictures: Path | None
) -> Iterator[dict[str, Any]]:
    """One line for each way, of one pair."""
    seed = 1000 + number
    conditioning = model.encoded(prompt)
    latent = model.latents(model.recipe(prompt, seed, leg.old, leg.steps, None), conditioning, None)
    preview = model.pixels(latent)
    large = np.asarray(Image.fromarray(preview).resize(leg.new, Image.Resampling.BICUBIC))
    plain_slope = edge_slope(large)
    grid = (NoiseGrid(seed, *leg.old),)
    pictures = [preview]
    for way in leg.ways:
        if way.keep == "enlarged":
            result = large
        else:
            start = None
            if way.keep != "seed":
                noise = () if way.keep == "image" else grid
                sha256 = "" if way.keep == "noise" else latent.payload_sha256
                start = Start(way.keep, noise, way.strength, "stretch", way.guidance, sha256)
            recipe = model.recipe(prompt, seed, leg.new, leg.steps, start)
            result = model.pixels(model.latents(recipe, conditioning, latent))
        pictures.append(result)
        small = shrunk(result, leg.old)
        yield {
            "leg": leg.title,
            "way": way.name,
            "pair": number,
            "overlap": overlap(preview, small),
            "ssim": ssim(preview, small),
            "kept": kept(preview, result),
            "right": check(scene, result).right,
            "sharp": edge_slope(result) / plain_slope if plain_slope else math.nan,
        }
    if keep_pictures is not None:
        strip(pictures, keep_pictures / f"{strip_name(leg)}-{number:03d}.png")


def strip(pictures: list[Pixels], path: Path) -> None:
    """Preview and results side by side, each 128 pixels high."""
    sizes = [(128 * pixels.shape[1] // pixels.shape[0], 128) for pixels in pictures]
    tiles = [shrunk(pixels, size) for pixels, size in zip(pictures, sizes, strict=True)]
    sheet = Image.new("RGB", (sum(width + 4 for width, _ in sizes), 128), (128, 128, 128))
    x = 0
    for tile in tiles:
        sheet.paste(Image.fromarray(tile), (x, 0))
        x += tile.shape[1] + 4
    sheet.save(path)


def sheet(work: Path, leg: Leg, path: Path) -> None:
    """The strips of a leg one above the other, each column under its way's name."""
    strips = [Image.open(file) for file in sorted(work.glob(f"{strip_name(leg)}-*.png"))]
    names = ["preview", *(way.name.replace("`", "") for way in leg.ways)]
    height, step = 40, strips[0].width // len(names)
    whole = Image.new("RGB", (strips[0].width, height + 132 * len(strips)), (255, 255, 255))
    for number, name in enumerate(names):
        words = name.replace(" (bicubic)", "").replace(", strength", "").replace(": the same seed, as ComfyUI does", "")
        ImageDraw.Draw(whole).text((number * step + 2, 4), "\n".join(words.rsplit(", ", 1)), fill=(0, 0, 0))
    for row, picture in enumerate(strips):
        whole.paste(picture, (0, height + 132 * row))
    whole.save(path)


def strip_name(leg: Leg) -> str:
    """How the files of a leg's strips begin."""
    return leg.title.replace(" ", "-").replace(",", "")


def lines(work: Path, sha256: str) -> list[dict[str, Any]]:
    """What was measured of this model, by all processes; a last line that was cut off is left out."""
    found = []
    for file in sorted(work.glob(f"{sha256[:12]}-*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def run(model: Model, args: argparse.Namespace) -> None:
    """Measure what is not there yet."""
    part, parts = (int(word) for word in args.part.split("/"))
    file = args.work / f"{model.sha256[:12]}-{part}-of-{parts}.jsonl"
    known = {(line["leg"], line["pair"], line["way"]) for line in lines(args.work, model.sha256)}
    pairs = test_prompts(args.pairs, "test", 17)
    for leg in LEGS[: args.legs]:
        for number, (prompt, scene) in enumerate(pairs):
            if number % parts != part or all((leg.title, number, way.name) in known for way in leg.ways):
                continue
            pictures = args.work if number < args.pictures else None
            made = [json.dumps(line) + "\n" for line in measured(model, leg, number, prompt, scene, pictures)]
            with file.open("a") as out:
                out.write("".join(made))
            print(f"{leg.title}: pair {number + 1} of {len(pairs)}", file=sys.stderr)


# -- the table ---------------------------------------------------------------------------------


def summary(found: list[dict[str, Any]], pairs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Means by leg and way; only legs of which something is there."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for leg in LEGS:
        for way in leg.ways:
            rows = {r["pair"]: r for r in found if (r["leg"], r["way"]) == (leg.title, way.name) and r["pair"] < pairs}
            if rows:
                means = {
                    name: float(np.nanmean([row[name] for row in rows.values()]))
                    for name in ("overlap", "ssim", "kept", "right", "sharp")
                }
                table.setdefault(leg.title, {})[way.name] = {"pairs": len(rows), **means}
    return table


def markdown(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table, one for each leg."""
    text = []
    for leg, rows in table.items():
        count = int(min(row["pairs"] for row in rows.values()))
        text += [f"\n**{leg}**, {count} pairs\n", "| | overlap | SSIM | kept | right | sharp |"]
        text.append("|---|---|---|---|---|---|")
        for way, row in rows.items():
            parts = (row["kept"], row["right"])
            shares = " | ".join(f"{part:.0%}" for part in parts)
            text.append(f"| {way} | {row['overlap']:.2f} | {row['ssim']:.2f} | {shares} | {row['sharp']:.2f} |")
    return "\n".join(text)


def report(table: dict[str, dict[str, dict[str, float]]], sha256: str) -> None:
    """Write the table between the marks of docs/rerender.md."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    said = f"\n\nDemo model with SHA-256 {sha256[:12]}.\n"
    PAGE.write_text(f"{before}{BEGIN}{said}{markdown(table)}\n\n{END}{after}")


def main() -> None:
    """Parse the command line, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what was measured")
    parser.add_argument("--model", default="", help="an all-in-one file; default: the demo model")
    parser.add_argument("--tokenizers", default="", help="as for fluxsplit sample")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--legs", type=int, default=len(LEGS), help="only the first of the sizes")
    parser.add_argument("--part", default="0/1", help="I/N: every N-th pair from I on")
    parser.add_argument("--pictures", type=int, default=6, help="pairs of which a strip of pictures is kept in WORK")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--sheet", type=Path, help="draw the kept pictures of 256x256 to 512x512 here")
    parser.add_argument("--no-page", action="store_true", help="print the table, leave docs/rerender.md as it is")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    sha256 = file_sha256(args.model or demo_files().transformer)
    if not args.report:
        run(Model(args.model, args.tokenizers), args)
    if args.sheet:
        sheet(args.work, LEGS[2], args.sheet)
    table = summary(lines(args.work, sha256), args.pairs)
    print(markdown(table))
    if not args.no_page:
        report(table, sha256)
    print(json.dumps({"model": sha256, "ways": [asdict(way) for way in WAYS], "table": table}))


if __name__ == "__main__":
    main()
