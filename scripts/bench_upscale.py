"""Upscaling and previews measured: tiles against the whole picture, seams, planned against taken memory, CPU time.

    scripts/bench_upscale.py                         # some minutes on one core
    scripts/bench_upscale.py --pictures docs/images  # and docs/images/upscaling.png
    scripts/bench_upscale.py --blocks 23 --size 448x320 --no-memory

Networks: `compact`, the trained one of the package; `rrdb`, RRDBNet in the layout of RealESRGAN_x2plus with 64 features
and --blocks blocks (23 in the published file), its weights random, its last layer scaled so that the levels of the
picture are used and none is cut off. The picture is drawn and has texture everywhere, so that gradients at seams can be
held against those elsewhere.

`equal` compares with spandrel's own call on the whole picture. For each tiling the table has the largest and the root
mean square error against that, in levels of 255, and `seam`, the mean step between neighbouring pixels where tiles
fade into each other (and on both sides of it), as a multiple of the mean step elsewhere; divided by the same multiple
of the whole picture, which has no seams. `cut` is what Real-ESRGAN's own script does: padding of 10 pixels, hard cuts.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fluxsplit.tiles import cut, largest_tile
from fluxsplit.upscale import Tiling, Upscaler, enlarged_strips
from fluxsplit.upscalers import PACKAGED
from train_upscaler import as_published

OVERLAP_PX = 64
CUT_PADDING_PX = 10


def textured(width: int, height: int) -> Tensor:
    """A drawn picture with gradients, lines and grain everywhere: fp32 [3, H, W] in 0..1."""
    rng = np.random.default_rng(0)
    image = Image.new("RGB", (width, height))
    ys, xs = np.mgrid[0:height, 0:width]
    waves = [128 + 60 * np.sin(xs / 37 + shift) + 50 * np.cos(ys / 29 - 2 * shift) for shift in (0.0, 2.1, 4.2)]
    image = Image.fromarray(np.stack(waves, axis=-1).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(width * height // 900):
        x, y = float(rng.uniform(0, width)), float(rng.uniform(0, height))
        dx, dy = rng.normal(0, 18, 2)
        colour = tuple(int(level) for level in rng.integers(0, 256, 3))
        pen.line([x, y, x + dx, y + dy], fill=colour, width=int(rng.integers(1, 4)))
    levels = np.asarray(image, np.float32) + rng.normal(0, 4, (height, width, 3))
    return torch.from_numpy(np.ascontiguousarray(levels.clip(0, 255).transpose(2, 0, 1), np.float32)) / 255


def random_rrdb(folder: Path, blocks: int, pixels: Tensor) -> Path:
    """A file as RealESRGAN_x2plus.pth is, with random weights whose results stay in range."""
    from spandrel.architectures.ESRGAN import ESRGAN  # noqa: PLC0415

    torch.manual_seed(0)
    model: Any = ESRGAN(in_nc=12, num_filters=64, num_blocks=blocks, scale=4, shuffle_factor=2).eval()
    last = model.model[-1]
    with torch.no_grad():
        made = model(pixels[None, :, :64, :64])
        last.weight *= 0.17 / made.std()
        last.bias.copy_(0.5 - (made - last.bias[None, :, None, None]).mean((0, 2, 3)) * 0.17 / made.std())
        made = model(pixels[None, :, :64, :64])
        outside = float(((made < 0) | (made > 1)).float().mean())
    print(f"rrdb: {blocks} blocks, {outside:.2%} of its values leave 0..1", file=sys.stderr)
    path = folder / "random_x2.pth"
    torch.save({"params_ema": as_published(dict(model.state_dict()))}, path)
    return path


def whole(network: Upscaler, pixels: Tensor, tiling: Tiling) -> tuple[Tensor, float]:
    """The enlarged picture and the CPU seconds that it took."""
    start_s = time.process_time()
    made = torch.cat(list(enlarged_strips(network, pixels, tiling, lambda done, total: None)), dim=1)
    return made, time.process_time() - start_s


def hard_cut(network: Upscaler, pixels: Tensor, tile: int) -> Tensor:
    """Tiles beside each other, each computed with a padding that is cut off again."""
    height, width = pixels.shape[1:]
    made = torch.zeros(3, height * network.scale, width * network.scale)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            y, x = max(0, top - CUT_PADDING_PX), max(0, left - CUT_PADDING_PX)
            bottom, right = min(height, top + tile), min(width, left + tile)
            part = pixels[:, y : min(height, bottom + CUT_PADDING_PX), x : min(width, right + CUT_PADDING_PX)]
            with torch.inference_mode():  # not through spandrel, which would mirror the edges up to multiples of 4
                result = network._network.model(part[None])[0].clamp(0, 1)
            result = result[:, (top - y) * network.scale :, (left - x) * network.scale :]
            rows, columns = (bottom - top) * network.scale, (right - left) * network.scale
            place = made[:, top * network.scale :, left * network.scale :]
            place[:, :rows, :columns] = result[:, :rows, :columns]
    return made


def seams(length: int, tile: int, network: Upscaler) -> Tensor:
    """Which of the steps between neighbouring output pixels lie where tiles meet, [length * scale - 1]."""
    scale = network.scale
    marked = torch.zeros(length * scale - 1, dtype=torch.bool)
    padded = math.ceil(length / network.multiple) * network.multiple
    for span in cut(padded, tile, OVERLAP_PX, network.alignment):
        if span.fade_in:
            marked[span.keep_start * scale - 2 : (span.keep_start + span.fade_in) * scale + 1] = True
    return marked


def cuts(length: int, tile: int, scale: int) -> Tensor:
    """As `seams`, for hard cuts."""
    marked = torch.zeros(length * scale - 1, dtype=torch.bool)
    marked[[place * scale - 1 for place in range(tile, length, tile)]] = True
    return marked


def step_ratio(made: Tensor, rows: Tensor, columns: Tensor) -> float:
    """Mean step across the marked rows and columns as a multiple of the mean step elsewhere."""
    down, right = made.diff(dim=1).abs().mean((0, 2)), made.diff(dim=2).abs().mean((0, 1))
    ratios = []
    for steps, marked in ((down, rows), (right, columns)):
        if marked.any():
            ratios.append(float(steps[marked].mean() / steps[~marked].mean()))
    return sum(ratios) / len(ratios) if ratios else 1.0


def compared(name: str, made: Tensor, full: Tensor, rows: Tensor, columns: Tensor, cpu_s: float) -> dict[str, Any]:
    """One row of the table."""
    error = (made - full) * 255
    seam = step_ratio(made, rows, columns) / step_ratio(full, rows, columns)
    figures = {"tiling": name, "max_error": float(error.abs().max()), "rms_error": float(error.square().mean().sqrt())}
    errors = f"max {figures['max_error']:9.5f}  rms {figures['rms_error']:9.6f}"
    print(f"  {name:14} {errors}  seam {seam:.4f}  {cpu_s:6.1f} CPU-s", file=sys.stderr, flush=True)
    return figures | {"seam": seam, "cpu_s": cpu_s}


def measured(network: Upscaler, pixels: Tensor, with_cuts: bool) -> dict[str, Any]:
    """Tilings of one network, beside its whole result and spandrel's."""
    height, width = pixels.shape[1:]
    full, whole_s = whole(network, pixels, Tiling(0))
    with torch.inference_mode():
        equal = bool(torch.equal(full, network._network(pixels[None])[0]))
    print(f"{network.name} ({network.architecture}, {width}x{height}): equal to spandrel {equal}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    budget = int(network.planned_bytes(width, height) * 0.4)  # a machine that holds two fifths of the picture
    auto = largest_tile(width, height, network.planned_bytes(1, 1), budget, network.alignment)
    for name, tile in (("256", 256), ("512", 512), (f"auto ({auto})", auto)):
        made, cpu_s = whole(network, pixels, Tiling(tile, OVERLAP_PX))
        marks = seams(height, tile, network), seams(width, tile, network)
        rows.append(compared(name, made, full, *marks, cpu_s))
    if with_cuts:
        start_s = time.process_time()
        made = hard_cut(network, pixels, 256)
        marks = cuts(height, 256, network.scale), cuts(width, 256, network.scale)
        rows.append(compared("256, cut", made, full, *marks, time.process_time() - start_s))
    return {"network": network.name, "equal": equal, "whole_cpu_s": whole_s, "tilings": rows}


def peaks(network: Upscaler, sides: tuple[int, ...]) -> Iterator[dict[str, float]]:
    """Planned bytes beside what the process's resident memory grew by at its peak, for each side of a tile."""
    network.apply(torch.rand(3, 64, 64))  # what the first call allocates for good
    for side in sides:
        tile = torch.rand(3, side, side)
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        network.apply(tile)
        taken = _status("VmHWM") - before
        planned = network.planned_bytes(side, side)
        print(
            f"  tile {side}: planned {planned / 1e6:.0f} MB, taken {taken / 1e6:.0f} MB ({taken / planned:.2f})",
            file=sys.stderr,
        )
        yield {"side": side, "planned_bytes": planned, "taken_bytes": taken}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"this system does not tell {name}")


def picture(folder: Path, network: Upscaler) -> None:
    """Nearest, Lanczos and the network side by side, of a drawn scene and of lines."""
    from train_upscaler import pairs  # noqa: PLC0415

    rows = []
    for small, large in pairs(12, seed=7, test=True)[2:12:3]:
        image = Image.fromarray(small.permute(1, 2, 0).numpy())
        made, _ = whole(network, small.float() / 255, Tiling(0))
        ours = Image.fromarray((made * 255).round().byte().permute(1, 2, 0).numpy())
        truth = Image.fromarray(large.permute(1, 2, 0).numpy())
        shown = [
            image.resize(ours.size, Image.Resampling.NEAREST),
            image.resize(ours.size, Image.Resampling.LANCZOS),
            ours,
            truth,
        ]
        rows.append([part.crop((32, 32, 160, 160)).resize((256, 256), Image.Resampling.NEAREST) for part in shown])
    sheet = Image.new("RGB", (4 * 260 - 4, len(rows) * 260 - 4), "white")
    for y, row in enumerate(rows):
        for x, part in enumerate(row):
            sheet.paste(part, (260 * x, 260 * y))
    sheet.save(folder / "upscaling.png", optimize=True)


def peek_ms(draws: int = 20) -> dict[str, float]:
    """Milliseconds to draw the preview of a latent of 1024x1024 pixels by either linear map, median and largest."""
    from fluxsplit.peek import FLUX, demo_map, draw  # noqa: PLC0415

    payload = torch.randn(16, 128, 128).numpy().tobytes()
    figures: dict[str, float] = {}
    for name, peek_map in (("flux", FLUX), ("demo", demo_map())):
        taken = []
        for _ in range(draws):
            start_s = time.process_time()
            draw(payload, 128, 128, peek_map)
            taken.append(1000 * (time.process_time() - start_s))
        figures |= {f"{name}_median_ms": sorted(taken)[draws // 2], f"{name}_largest_ms": max(taken)}
    print(f"preview: {', '.join(f'{key} {value:.1f}' for key, value in figures.items())}", file=sys.stderr)
    return figures


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="720x560")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="planned against taken")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    torch.set_num_threads(1)
    pixels = textured(width, height)
    peek = peek_ms()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for path in (PACKAGED, random_rrdb(Path(folder), arguments.blocks, pixels)):
            network = Upscaler(path, torch.float32, torch.device("cpu"))
            taken = list(peaks(network, (128, 192, 256, 384))) if arguments.memory else []
            results.append(measured(network, pixels, True) | {"pixel_bytes": network.pixel_bytes, "memory": taken})
            if arguments.pictures and path == PACKAGED:
                picture(arguments.pictures, network)
    print(json.dumps({"size": arguments.size, "blocks": arguments.blocks, "peek": peek, "networks": results}))


if __name__ == "__main__":
    main()
