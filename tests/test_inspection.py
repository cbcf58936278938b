"""What `fluxsplit info` says: kinds told by content, facts as data and as lines, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from samples import SHAPE, make_payload, make_recipe, safetensors_bytes, tensor_entry

from fluxsplit import checkpoint
from fluxsplit.checkpoint import Contents, PartInfo
from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.inspection import inspect
from fluxsplit.latents import write_latent
from fluxsplit.metadata import ImageRecord, encode_png, png_text_chunks
from fluxsplit.recipe import LATENT_FORMATS, WeightsStamp

PAYLOAD = make_payload()
CONTENTS = Contents(
    "ComfyUI all-in-one",
    {"transformer": PartInfo(776, 11_901_408_320, 11_901_408_320, {"F8_E4M3": 11_900_000_000, "F32": 1_408_320})},
    "schnell",
    {},
    ("scaled float8",),
)


@pytest.mark.parametrize("format", LATENT_FORMATS)
def test_latents(tmp_path: Path, format: str) -> None:
    recipe = make_recipe(prompt="a\nfox\x1b[2J", negative="blur", cfg=2.0, noise_index=1)
    path = write_latent(tmp_path, "x", PAYLOAD, SHAPE, recipe, format=format).rename(tmp_path / "renamed.png")
    report = inspect(path)
    assert (report.kind, report.recipe) == ("latent", recipe)
    data = json.loads(report.to_json())
    assert data["recipe"]["prompt"] == "a\nfox\x1b[2J"
    assert (data["format"], data["width"], data["height"], data["batch"]) == (format, 32, 16, 1)
    lines = report.lines()
    assert lines[0] == str(path)
    assert all(line.isprintable() for line in lines)
    text = "\n".join(lines)
    for said in (f"latent ({format})", "32x16 pixels", r"a\nfox\x1b[2J", "1234567890, draw 1", "all finite"):
        assert said in text


def test_a_comfyui_batch(tmp_path: Path) -> None:
    table = {
        "__metadata__": {"prompt": "{}", "workflow": "{}"},
        "latent_tensor": tensor_entry((2, *SHAPE[1:])),
        "latent_format_version_0": tensor_entry((0,), 1024),
    }
    (tmp_path / "x").write_bytes(safetensors_bytes(table, PAYLOAD * 2))
    report = inspect(tmp_path / "x")
    assert json.loads(report.to_json())["batch"] == 2
    text = "\n".join(report.lines())
    assert "latent (latent, batch of 2)" in text
    assert "ComfyUI workflow" in text
    assert "another program's" in text


def test_our_pngs(tmp_path: Path) -> None:
    record = ImageRecord(make_recipe(), "ab" * 32, WeightsStamp("ae", "c" * 64), {"torch": "2.10"})
    (tmp_path / "x.pt").write_bytes(encode_png(bytes(32 * 16 * 3), 32, 16, png_text_chunks(record)))
    report = inspect(tmp_path / "x.pt")
    assert (report.kind, report.recipe) == ("picture", make_recipe())
    data = json.loads(report.to_json())
    assert data["vae"] == {"name": "ae", "sha256": "c" * 64}
    assert data["texts"]["parameters"].startswith("a fox, snow\nSteps: 4")
    assert "ae (sha256 ccc" in "\n".join(report.lines())


def test_pngs_without_recipe(tmp_path: Path) -> None:
    record = ImageRecord(None, "ab" * 32, WeightsStamp("ae"))
    texts = png_text_chunks(record, {"prompt": "{}"})
    (tmp_path / "x").write_bytes(encode_png(bytes(32 * 16 * 3), 32, 16, texts))
    text = "\n".join(inspect(tmp_path / "x").lines())
    assert "the latent was an encoded picture's" in text
    assert "ComfyUI prompt" in text
    info = PngInfo()
    info.add_text("parameters", "a fox\nSteps: 4")
    info.add_text("Comment", "c")
    Image.new("L", (3, 2)).save(tmp_path / "y", "PNG", pnginfo=info)
    report = inspect(tmp_path / "y")
    assert report.recipe is None
    assert r"a fox\nSteps: 4" in "\n".join(report.lines())
    assert "3x2 pixels" in "\n".join(report.lines())


def test_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(checkpoint, "describe", lambda path: (asked.append(path), CONTENTS)[1])
    (tmp_path / "x.png").write_bytes(safetensors_bytes({"img_in.weight": tensor_entry((1,))}, b"1234"))
    for path in (tmp_path / "x.png", tmp_path):
        report = inspect(path)
        assert report.kind == "weights"
        data = json.loads(report.to_json())
        assert (data["layout"], data["variant"]) == ("ComfyUI all-in-one", "schnell")
        assert data["parts"]["transformer"]["dtypes"]["F32"] == 1_408_320
        text = "\n".join(report.lines())
        assert "weights (ComfyUI all-in-one schnell)" in text
        assert "776 tensors, 11.90 GB: 11,900.0 M F8_E4M3, 1.4 M F32" in text
        assert "scaled float8" in text
    assert asked == [tmp_path / "x.png", tmp_path]


def test_conditioning(tmp_path: Path) -> None:
    table = {"t5": tensor_entry((1, 2, 4)), "pooled": tensor_entry((1, 4), 32)}
    (tmp_path / "x").write_bytes(safetensors_bytes(table, bytes(48)))
    report = inspect(tmp_path / "x")
    assert report.kind == "conditioning"
    assert any("1x2x4 F32" in line for line in report.lines())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no picture, latent or weight file: it is empty"),
        (b"\xff\xd8\xff\xe0" + bytes(20), "JPEG"),
        (b"RIFF\0\0\0\0WEBP", "WebP without"),
        (b"%!PS-Adobe", "PostScript"),
        (b"BM\xb2\x05" + bytes(30), "a BMP, of which nothing is read"),
        (b"GGUF" + bytes(30), "GGUF"),
        (b"\x80\x02}q\0." + bytes(30), "no latent file"),
        (b"PK\x03\x04" + bytes(30), "truncated"),
        (b"hello world, this is text", "no picture, latent or weight file: it starts with b'hello"),
        (b"\x89PNG\r\n\x1a\n" + bytes(30), "damaged PNG"),
        (safetensors_bytes({"x": tensor_entry((1,))}, b"1234"), "not a FLUX.1 weight file"),
    ],
)
def test_other_files_are_named(tmp_path: Path, data: bytes, said: str) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(FluxsplitError) as caught:
        inspect(tmp_path / "x.png")
    assert said in caught.value.line()
    assert "x.png" in caught.value.line()
    assert caught.value.line().isprintable()


def test_absent_files_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        inspect(tmp_path / "x")
    with pytest.raises(FluxsplitError):
        inspect(tmp_path)


def test_nothing_heavy_is_imported() -> None:
    script = "import fluxsplit.inspection, sys; print([m for m in ('PIL', 'torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
