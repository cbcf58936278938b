"""Enlarging: equal to spandrel's own result, seams blended, memory planned and run out of, pictures of every kind."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from samples import make_recipe
from spandrel.architectures.Compact import Compact
from spandrel.architectures.ESRGAN import ESRGAN

from fluxsplit import upscalers
from fluxsplit.errors import FluxsplitError, ModelFileMissing, OutOfMemory, UsageError
from fluxsplit.events import Events
from fluxsplit.fingerprint import file_sha256
from fluxsplit.jobs import UpscaleJob
from fluxsplit.metadata import ImageRecord, png_text_chunks, read_record
from fluxsplit.picture_file import read_picture
from fluxsplit.png_text import read_png
from fluxsplit.recipe import WeightsStamp
from fluxsplit.stage_upscale import run
from fluxsplit.state_dict import read_state_dict
from fluxsplit.torch_file import ZIP_MAGIC
from fluxsplit.upscale import Tiling, Upscaler, enlarge, enlarged_strips
from fluxsplit.upscalers import PUBLISHED, choose
from train_upscaler import as_published

CPU = torch.device("cpu")


def quiet(done: int, total: int) -> None:
    pass


def nothing(name: str, done: int, total: int) -> None:
    raise AssertionError(f"{name} is downloaded")


def save_esrgan(path: Path, scale: int, features: int = 8, blocks: int = 1) -> Path:
    """Random weights in the layout of Real-ESRGAN's files: x2 with unshuffled pixels, x4 without."""
    torch.manual_seed(0)
    model = ESRGAN(
        in_nc=12 if scale == 2 else 3, num_filters=features, num_blocks=blocks, scale=4,
        shuffle_factor=2 if scale == 2 else None,
    )  # fmt: skip
    torch.save({"params_ema": as_published(dict(model.state_dict()))}, path)
    return path


def save_compact(path: Path, scale: int = 4, convs: int = 3) -> Path:
    torch.manual_seed(0)
    torch.save({"params": Compact(num_feat=8, num_conv=convs, upscale=scale).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of tiny networks."""
    folder = tmp_path_factory.mktemp("weights")
    return {
        "x2": save_esrgan(folder / "x2.pth", 2),
        "x4": save_esrgan(folder / "x4.pth", 4),
        "compact": save_compact(folder / "compact.pth"),
    }


def opened(path: Path, dtype: torch.dtype = torch.float32) -> Upscaler:
    return Upscaler(path, dtype, CPU)


def whole(network: Upscaler, pixels: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    return torch.cat(list(enlarged_strips(network, pixels, tiling, quiet)), dim=1)


@pytest.mark.parametrize(("name", "scale", "multiple"), [("x2", 2, 4), ("x4", 4, 1), ("compact", 4, 1)])
def test_equal_to_spandrels_own_result(weights: dict[str, Path], name: str, scale: int, multiple: int) -> None:
    from spandrel import ModelLoader

    network = opened(weights[name])
    assert (network.scale, network.multiple) == (scale, multiple)
    pixels = torch.rand(3, 45, 51, generator=torch.Generator().manual_seed(1))
    theirs = ModelLoader().load_from_state_dict(torch.load(weights[name], weights_only=True))(pixels[None])[0]
    assert torch.equal(whole(network, pixels, Tiling(0)), theirs)


def test_tiles_of_compact_are_exact_beyond_its_reach(weights: dict[str, Path]) -> None:
    """Five convolutions reach five pixels; a quarter of the overlap of 24, six, is thrown away at each edge."""
    network = opened(weights["compact"])
    pixels = torch.rand(3, 150, 131, generator=torch.Generator().manual_seed(1))
    tiled = whole(network, pixels, Tiling(96, 24))
    assert (tiled - whole(network, pixels, Tiling(0))).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(131, 150), (97, 64), (64, 97), (200, 33)])
def test_tiles_of_x2_begin_at_even_places(weights: dict[str, Path], size: tuple[int, int]) -> None:
    """From an odd origin the pixels are paired wrongly; the error would be as large as the picture."""
    network = opened(weights["x2"])
    pixels = torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
    full = whole(network, pixels, Tiling(0))
    tiled = whole(network, pixels, Tiling(64, 16))
    assert tiled.shape == full.shape == (3, 2 * size[0], 2 * size[1])
    assert (tiled - full).abs().max() < 1e-3
    shifted = whole(network, pixels[:, 1:, 1:], Tiling(0))
    assert (shifted[:, 20:-20, 20:-20] - full[:, 22:-20, 22:-20]).abs().max() > 1e-3, "so that it would be seen"


def windowed(path: Path) -> Path:
    """A SwinIR with windows of 8 pixels and little reach."""
    from spandrel.architectures.SwinIR import SwinIR

    torch.manual_seed(0)
    model = SwinIR(
        img_size=32, window_size=8, depths=[2], embed_dim=12, num_heads=[2], mlp_ratio=2, upscale=2,
        upsampler="pixelshuffle",
    )  # fmt: skip
    torch.save({"params": model.state_dict()}, path)
    return path


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_tiles_of_attention_begin_at_its_windows(tmp_path: Path) -> None:
    """spandrel asks for no multiple there, but windows are counted from the origin."""
    network = opened(windowed(tmp_path / "swin.pth"))
    assert (network.multiple, network.alignment, network.pixel_bytes < 64_000) == (1, 32, True)
    pixels = torch.rand(3, 300, 270, generator=torch.Generator().manual_seed(1))
    full = whole(network, pixels, Tiling(0))
    assert (whole(network, pixels, Tiling(256, 32)) - full).abs().max() < 1e-5
    network.alignment = 1
    assert (whole(network, pixels, Tiling(256, 32)) - full).abs().max() > 1e-2, "so that it would be seen"


def test_a_network_that_does_not_run_without_values_is_measured_with_them(tmp_path: Path) -> None:
    from spandrel.architectures.SPAN import SPAN

    torch.manual_seed(0)
    torch.save(SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2).state_dict(), tmp_path / "span.pth")
    network = opened(tmp_path / "span.pth")
    assert 4 * 8 < network.pixel_bytes < 40 * 4 * 8
    pixels = torch.rand(3, 100, 90, generator=torch.Generator().manual_seed(1))
    difference = whole(network, pixels, Tiling(64, 16)) - whole(network, pixels, Tiling(0))
    assert difference.abs().max() < 1e-2


def test_progress_counts_every_tile(weights: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    enlarge(opened(weights["x4"]), torch.rand(3, 100, 90), Tiling(64, 16), lambda *counts: seen.append(counts))
    assert seen == [(done, 4) for done in (1, 2, 3, 4)]


def test_one_channel_is_applied_to_each(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(Compact(num_in_ch=1, num_out_ch=1, num_feat=8, num_conv=2, upscale=2).state_dict(), tmp_path / "l.pth")
    network = opened(tmp_path / "l.pth")
    pixels = torch.rand(3, 20, 20)
    made = whole(network, pixels, Tiling(0))
    assert made.shape == (3, 40, 40)
    assert torch.equal(made[1], whole(network, pixels[1:2].expand(3, -1, -1), Tiling(0))[0])


@pytest.mark.parametrize("name", ["x2", "x4", "compact"])
def test_the_planned_bytes_hold_what_is_alive(weights: dict[str, Path], name: str) -> None:
    """The largest layer's input and output at least, and no more than four times that."""
    network = opened(weights[name])
    channels, area = (8 * 4, 1) if name == "compact" else (8, 16 if name == "x4" else 4)
    layer_bytes = 4 * channels * area
    assert 1.4 * layer_bytes <= network.pixel_bytes <= 6 * layer_bytes
    half = opened(weights[name], torch.bfloat16)
    assert half.planned_bytes(10, 10) == network.planned_bytes(10, 10) / 2


class Small(Upscaler):
    """A network on a device that holds so many pixels and no more."""

    holds_pixels = 0

    def apply(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape[1] * pixels.shape[2] > self.holds_pixels:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().apply(pixels)


def test_tiles_are_halved_where_memory_runs_out(weights: dict[str, Path]) -> None:
    pixels = torch.rand(3, 300, 260, generator=torch.Generator().manual_seed(1))
    network = Small(weights["compact"], torch.float32, CPU)
    network.holds_pixels = 100 * 100
    seen: list[int] = []
    made = enlarge(network, pixels, Tiling(0), lambda done, total: seen.append(total))
    assert set(seen) == {25}, "300 and 150 were tried, 75 fits"
    full = enlarge(opened(weights["compact"]), pixels, Tiling(0), quiet)
    assert (made.int() - full.int()).abs().max() <= 1


def test_memory_that_holds_no_tile_ends_in_out_of_memory(weights: dict[str, Path]) -> None:
    network = Small(weights["compact"], torch.float32, CPU)
    with pytest.raises(OutOfMemory, match=r"tiles of 75 pixels.*2 GiB"):
        enlarge(network, torch.rand(3, 300, 260), Tiling(0), quiet)


def test_another_error_is_not_taken_for_memory(weights: dict[str, Path]) -> None:
    network = opened(weights["compact"])
    with pytest.raises(RuntimeError, match="channels"):
        enlarge(network, torch.rand(5, 30, 30), Tiling(0), quiet)


def huge(path: Path, factor: float) -> Path:
    """Weights whose activations overflow fp16 but not fp32, or both."""
    torch.manual_seed(0)
    state = Compact(num_feat=8, num_conv=2, upscale=2).state_dict()
    state["body.0.weight"] *= factor
    torch.save(state, path)
    return path


def test_what_overflows_in_fp16_is_computed_again_in_fp32(tmp_path: Path) -> None:
    file = huge(tmp_path / "h.pth", 1e6)
    network = opened(file, torch.float16)
    pixels = torch.rand(3, 20, 20)
    made = enlarge(network, pixels, Tiling(0), quiet)
    assert network.dtype == torch.float32
    assert torch.equal(made, enlarge(opened(file), pixels, Tiling(0), quiet))


def test_what_is_not_finite_in_fp32_either_is_no_picture(tmp_path: Path) -> None:
    with pytest.raises(FluxsplitError, match="NaN or infinity in fp32"):
        enlarge(opened(huge(tmp_path / "h.pth", 1e38)), torch.rand(3, 20, 20) + 10, Tiling(0), quiet)


# -- weights that lie ---------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    state = Compact(num_feat=8, num_conv=2, upscale=2).state_dict()
    state["body.2.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "n.pth")
    with pytest.raises(FluxsplitError, match=r"body\.2\.weight holds NaN"):
        opened(tmp_path / "n.pth")


def test_a_network_that_spandrel_does_not_know(tmp_path: Path) -> None:
    torch.save({"nothing.weight": torch.ones(3)}, tmp_path / "u.pth")
    with pytest.raises(FluxsplitError, match=r"no upscaler that spandrel knows.*nothing\.weight"):
        opened(tmp_path / "u.pth")


def test_shapes_that_lie_end_in_an_error_and_little_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak is seen: without a bound the first would build 90 GB of layers."""
    honest = dict(Compact(num_feat=8, num_conv=2, upscale=2).state_dict())
    wide, long, torn = dict(honest), dict(honest), dict(honest)
    wide["body.0.weight"] = torch.zeros(50_000, 3, 3, 3)
    long["body.1999.bias"] = torch.zeros(12)
    del torn["body.3.weight"]
    for name, state in {"wide": wide, "long": long, "torn": torn}.items():
        torch.save(state, tmp_path / f"{name}.pth")
    script = (
        "import resource, sys, torch\n"
        "from fluxsplit.upscale import Upscaler\n"
        "from fluxsplit.errors import FluxsplitError\n"
        "import spandrel\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n        Upscaler(path, torch.float32, torch.device('cpu'))\n"
        "    except FluxsplitError as error:\n        print(peak() - before, error.message)\n"
    )
    files = [str(tmp_path / f"{name}.pth") for name in ("torn", "long", "wide")]
    done = subprocess.run(
        [sys.executable, "-c", script, *files], capture_output=True, text=True, check=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("do not fit together" in line for line in lines)
    assert int(lines[-1].split()[0]) < 400 << 10, "kilobytes"


def test_without_a_torchvision_that_works(monkeypatch: pytest.MonkeyPatch, weights: dict[str, Path]) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("spandrel", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(FluxsplitError, match="torchvision that fits torch") as raised:
        opened(weights["x2"])
    assert raised.value.hint.startswith("install the torchvision") and "all else works" in raised.value.hint


# -- the stage ----------------------------------------------------------------------------------------------------


def staged(job: UpscaleJob) -> list[dict[str, Any]]:
    stream = io.StringIO()
    run(job, Events(stream))
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def results(job: UpscaleJob) -> list[Path]:
    return [Path(event["path"]) for event in staged(job) if event["event"] == "result"]


def of_kind(kind: str) -> Image.Image:
    """A picture of 21 x 13 in some mode of Pillow's."""
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (13, 21, 4), dtype=np.uint8)
    if kind == "I;16":
        return Image.fromarray(levels[..., 0].astype(np.uint16) * 257)
    if kind == "P":
        return Image.fromarray(levels[..., :3]).quantize(16)
    if kind == "P with a transparent colour":
        picture = Image.fromarray(levels[..., :3]).quantize(16)
        picture.info["transparency"] = 3
        return picture
    return Image.fromarray(levels).convert(kind)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("RGB", "RGB"), ("RGBA", "RGBA"), ("L", "L"), ("LA", "LA"), ("1", "L"), ("P", "RGB"), ("I;16", "L"),
     ("P with a transparent colour", "RGBA")],
)  # fmt: skip
def test_every_kind_of_picture(weights: dict[str, Path], tmp_path: Path, kind: str, mode: str) -> None:
    source = of_kind(kind)
    source.save(tmp_path / "a.png", **({"transparency": 3} if "transparent" in kind else {}))
    [made] = results(UpscaleJob((str(tmp_path / "a.png"),), str(weights["x2"]), "cpu"))
    assert made == tmp_path / "a-2x.png"
    with Image.open(made) as picture:
        assert (picture.mode, picture.size) == (mode, (42, 26))
        if mode in ("RGBA", "LA"):
            with Image.open(tmp_path / "a.png") as again:
                alpha = again.convert("RGBA").getchannel("A").resize((42, 26), Image.Resampling.LANCZOS)
            assert picture.getchannel("A").tobytes() == alpha.tobytes()


def test_sixteen_bits_go_in_unrounded(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "a.png")
    from fluxsplit.stage_upscale import _pixels

    assert torch.allclose(_pixels(read_picture(tmp_path / "a.png")), torch.tensor(1000 / 65535))


def test_a_jpeg_is_turned_upright_and_keeps_its_prompt(weights: dict[str, Path], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    exif[0x010E] = "a description"
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a fox, naïve\nSteps: 4".encode("utf-16-be")
    of_kind("RGB").save(tmp_path / "a.jpg", exif=exif)
    [made] = results(UpscaleJob((str(tmp_path / "a.jpg"),), str(weights["x2"]), "cpu"))
    with Image.open(made) as picture:
        assert picture.size == (26, 42)
        assert picture.getexif().get(0x0112) in (None, 1) and picture.getexif()[0x010E] == "a description"
    texts = read_png(made).texts
    assert texts["parameters"] == "a fox, naïve\nSteps: 4"
    assert texts["postprocessing"].startswith("Postprocess upscale by: 2, Postprocess upscaler: x2.pth, ")


def test_the_same_enlargement_is_not_written_twice(weights: dict[str, Path], tmp_path: Path) -> None:
    of_kind("RGB").save(tmp_path / "a.png")
    job = UpscaleJob((str(tmp_path / "a.png"),), str(weights["x2"]), "cpu")
    assert results(job) == results(job) == [tmp_path / "a-2x.png"]
    (tmp_path / "a-2x.png").write_bytes(b"another's")
    assert results(job) == [tmp_path / "a-2x-2.png"]


def test_a_dry_run_says_what_would_be_made(weights: dict[str, Path], tmp_path: Path) -> None:
    of_kind("RGB").resize((300, 200)).save(tmp_path / "a.png")
    job = UpscaleJob((str(tmp_path / "a.png"), "no.png"), str(weights["x2"]), "cpu", tile=96, dry_run=True)
    planned, failed = staged(job)
    assert planned["event"] == "planned" and (planned["width"], planned["height"]) == (600, 400)
    assert planned["path"] == str(tmp_path / "a-2x.png") and not Path(planned["path"]).exists()
    assert (failed["event"], failed["item"]) == ("failed", "no.png")
    tiles = sum(event["event"] == "upscale" for event in staged(replace(job, images=job.images[:1], dry_run=False)))
    assert tiles > 1 and planned["plan"].startswith(f"x2.pth, fp32, {tiles} tiles of 96 pixels, peak ")


def test_metadata_is_carried_over_and_the_upscaler_added(weights: dict[str, Path], tmp_path: Path) -> None:
    record = ImageRecord(make_recipe(width=16, height=16), "ab" * 32, WeightsStamp("ae"))
    texts = {**png_text_chunks(record, {"workflow": '{"ü": 1}'}), "Comment": "kept"}
    info = PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    of_kind("RGB").save(tmp_path / "a.png", pnginfo=info, icc_profile=b"profile")
    job = UpscaleJob(
        (str(tmp_path / "a.png"),), str(weights["x4"]), "cpu", width=100, height=50, out=str(tmp_path / "o")
    )
    events = staged(job)
    made = Path(events[-1]["path"])
    assert made == tmp_path / "o" / "a-100x50.png" and events[-1]["recipe"]["width"] == 16
    after = read_record(made)
    assert after.recipe == record.recipe and after.vae == record.vae
    [stamp] = after.upscaler
    assert (stamp.name, stamp.scale, stamp.width, stamp.height) == ("x4.pth", 4, 100, 50)
    assert stamp.sha256 == file_sha256(weights["x4"])
    for keyword in ("parameters", "workflow", "Comment"):
        assert read_png(made).texts[keyword] == texts[keyword]
    with Image.open(made) as picture:
        assert picture.size == (100, 50) and picture.info["icc_profile"] == b"profile"


def test_nothing_is_overwritten_unless_asked(weights: dict[str, Path], tmp_path: Path) -> None:
    of_kind("RGB").save(tmp_path / "a.png")
    job = UpscaleJob((str(tmp_path / "a.png"),), str(weights["x2"]), "cpu")
    (tmp_path / "a-2x.png").write_bytes(b"another's")
    assert results(job)[0].name == "a-2x-2.png"
    over = UpscaleJob((str(tmp_path / "a.png"),), str(weights["x2"]), "cpu", overwrite=True)
    assert results(over)[0].name == "a-2x.png" and not (tmp_path / "a-2x-3.png").exists()


def test_a_picture_that_fails_does_not_stop_the_rest(weights: dict[str, Path], tmp_path: Path) -> None:
    of_kind("RGB").save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    bad = {
        "cut.png": good[:-30],
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "text.png": b"hello",
        "empty.png": b"",
        "flipped.png": good[:60] + bytes([good[60] ^ 255]) + good[61:],
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    names = ["nowhere.png", *bad, "good.png"]
    events = staged(UpscaleJob(tuple(str(tmp_path / name) for name in names), str(weights["x2"]), "cpu"))
    assert [Path(e["item"]).name for e in events if e["event"] == "failed"] == names[:-1]
    assert [Path(e["path"]).name for e in events if e["event"] == "result"] == ["good-2x.png"]


def test_a_bomb_is_refused_before_it_is_unpacked(weights: dict[str, Path], tmp_path: Path) -> None:
    """A PNG of 100,000 x 100,000 pixels in a few kilobytes."""
    of_kind("1").save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data)
    [event] = staged(UpscaleJob((str(tmp_path / "a.png"),), str(weights["x2"]), "cpu"))
    assert event["event"] == "failed" and ("pixels" in event["message"])


def test_a_number_halves_what_a_larger_network_makes(weights: dict[str, Path], tmp_path: Path) -> None:
    of_kind("RGB").save(tmp_path / "a.png")
    [made] = results(UpscaleJob((str(tmp_path / "a.png"),), str(weights["x4"]), "cpu", factor=2))
    with Image.open(made) as picture:
        assert made.name == "a-2x.png" and picture.size == (42, 26)


# -- which weights ------------------------------------------------------------------------------------------------


def comfyui(folder: Path, *names: str) -> Path:
    (folder / "models" / "upscale_models" / "sub").mkdir(parents=True)
    for name in names:
        (folder / "models" / "upscale_models" / name).write_bytes(ZIP_MAGIC)
    return folder


def test_numbers_and_names_find_files_in_comfyuis_folders(tmp_path: Path) -> None:
    root = comfyui(tmp_path, "RealESRGAN_x2plus.pth", "sub/realesr-general-x4v3.pth", "4x-UltraSharp.pth")
    two, four = choose("2", root, False, nothing), choose("4", root, False, nothing)
    assert Path(two.path).name == "RealESRGAN_x2plus.pth" and two.factor == 2
    assert two.published is not None and two.published.sha256.startswith("49fafd45")
    assert Path(four.path).name == "realesr-general-x4v3.pth" and four.factor == 4 and not four.note
    for name in ("4x-UltraSharp", "4x-ultrasharp.pth", str(root / "models/upscale_models/4x-UltraSharp.pth")):
        found = choose(name, root, False, nothing)
        assert Path(found.path).name == "4x-UltraSharp.pth" and found.factor == 0 and found.published is None


def test_two_from_a_network_of_four_says_so(tmp_path: Path) -> None:
    chosen = choose("2", comfyui(tmp_path, "RealESRGAN_x4plus.pth"), False, nothing)
    assert chosen.factor == 2 and "halved" in chosen.note


@pytest.mark.parametrize("name", ["4", "anime", "RealESRGAN_x4plus.pth", "realesr-animevideov3"])
def test_nothing_is_downloaded_unasked(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ModelFileMissing, match=r"--fetch downloads \S+\.pth \(\d+ MB\) from https://github.com"
    ) as raised:
        raise choose_error(name, comfyui(tmp_path))
    assert raised.value.exit_code == 3


def choose_error(name: str, root: Path) -> BaseException:
    """The error with its hint in the message, as people see it."""
    with pytest.raises(ModelFileMissing) as raised:
        choose(name, root, False, nothing)
    return ModelFileMissing(raised.value.line())


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ModelFileMissing, match="upscaler waifu: no such file") as raised:
        choose("waifu", comfyui(tmp_path), True, nothing)
    assert all(published.short in raised.value.hint for published in PUBLISHED)


def test_the_table_of_published_files() -> None:
    assert len({published.sha256 for published in PUBLISHED}) == 5
    for published in PUBLISHED:
        assert len(published.sha256) == 64 and published.url.endswith(f"/{published.release}/{published.file}")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_dtype_that_an_architecture_does_not_take(weights: dict[str, Path], dtype: str) -> None:
    network = opened(weights["compact"])
    network._network.supports_half = network._network.supports_bfloat16 = False
    with pytest.raises(UsageError, match=f"does not work in {dtype}"):
        network.compute_in({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype])


def test_the_packaged_upscaler_is_small_and_says_what_it_is() -> None:
    assert upscalers.PACKAGED.stat().st_size < 300_000
    chosen = choose("2", None, False, nothing)
    assert "made for drawings" in chosen.note and "--fetch" in chosen.note
    network = opened(upscalers.PACKAGED)
    assert network.scale == 2 and len(read_state_dict(upscalers.PACKAGED)) > 10


def test_the_packaged_upscaler_draws_edges_better_than_lanczos() -> None:
    """On scenes that it was not trained on; scripts/train_upscaler.py measures 40 of them: 35.2 against 32.4 dB."""
    from train_upscaler import pairs

    network, ours, theirs = opened(upscalers.PACKAGED), 0.0, 0.0
    for small, large in pairs(4, seed=11, test=True):
        made = enlarge(network, small.float() / 255, Tiling(0), quiet).float()
        image = Image.fromarray(small.permute(1, 2, 0).numpy()).resize((192, 192), Image.Resampling.LANCZOS)
        wanted = large.permute(1, 2, 0).float()
        ours += float(((made - wanted) ** 2).mean())
        theirs += float(((torch.from_numpy(np.asarray(image).copy()).float() - wanted) ** 2).mean())
    assert ours < 0.75 * theirs


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["x2", "x4", "compact"])
def test_a_card_gives_the_picture_of_the_cpu_within_the_planned_memory(weights: dict[str, Path], name: str) -> None:
    pixels = torch.rand(3, 320, 300, generator=torch.Generator().manual_seed(1))
    wanted = enlarge(opened(weights[name]), pixels, Tiling(0), quiet).int()
    card = torch.device("cuda:0")
    for dtype, levels in ((torch.float32, 1), (torch.float16, 3)):
        network = Upscaler(weights[name], dtype, card)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made = enlarge(network, pixels, Tiling(128), quiet).int()
        assert (made - wanted).abs().max() <= levels
        assert torch.cuda.max_memory_allocated() - before <= network.planned_bytes(128, 128) * 1.5


def test_a_budget_that_holds_no_tile_is_refused(weights: dict[str, Path], tmp_path: Path) -> None:
    """On a CPU it is for the picture too, in and out."""
    of_kind("RGB").resize((300, 200)).save(tmp_path / "a.png")
    of_kind("RGB").resize((1500, 1500)).save(tmp_path / "b.png")
    network = opened(weights["x2"])
    room = network.picture_bytes(300, 200) + 64 * 64 * network.planned_bytes(1, 1)
    job = UpscaleJob(
        (str(tmp_path / "b.png"), str(tmp_path / "a.png")), str(weights["x2"]), "cpu", vram=f"{room / 1e6 + 0.01:.2f}M"
    )
    failed, plan, *_, made = staged(job)
    assert failed["event"] == "failed" and "x2.pth needs " in failed["message"] and "for 1500x1500" in failed["message"]
    assert failed["hint"].startswith("give --vram ") and made["source"].endswith("a.png")
    assert "tiles of 64 pixels, peak 0.0" in plan["text"] and plan["smaller"] is None


def test_a_plan_that_did_not_hold_is_followed_by_smaller_tiles(weights: dict[str, Path], tmp_path: Path) -> None:
    of_kind("RGB").resize((600, 400)).save(tmp_path / "a.png")
    job = UpscaleJob((str(tmp_path / "a.png"),), str(weights["x2"]), "cpu", tile=256)
    plans = [staged(replace(job, smaller=smaller, out=str(tmp_path / str(smaller))))[0] for smaller in (0, 1)]
    assert [plan["smaller"] for plan in plans] == [{"smaller": 1}, {"smaller": 2}]
    assert "tiles of 256 pixels" in plans[0]["text"] and "tiles of 128 pixels" in plans[1]["text"]
    whole = replace(job, tile=None)
    assert "fp32, 1 tile, " in staged(whole)[0]["text"]
    assert "tiles of 300 pixels" in staged(replace(whole, smaller=1, out=str(tmp_path / "w")))[0]["text"]
    least = staged(replace(job, tile=64, smaller=1, out=str(tmp_path / "l")))[0]
    assert "tiles of 64 pixels" in least["text"] and least["smaller"] is None


def test_a_size_of_another_ratio_is_told(weights: dict[str, Path], tmp_path: Path) -> None:
    of_kind("RGB").resize((30, 20)).save(tmp_path / "a.png")
    job = UpscaleJob((str(tmp_path / "a.png"),), str(weights["x2"]), "cpu", width=50, height=50)
    texts = [event["text"] for event in staged(job) if event["event"] == "note"]
    assert texts == ["a.png is pulled: 50x50 is another ratio than 30x20"]
    told = staged(replace(job, width=59, height=39, out=str(tmp_path / "o")))
    assert not [event for event in told if event["event"] == "note"]
