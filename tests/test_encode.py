"""Pictures to latent files by the stage itself: sizes, transparency, orientation, what fails, and the way back."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL  # noqa: F401  before our rooms, as conftest.py has it believe in accelerate
from PIL import Image

from fluxsplit import stage_decode, stage_encode
from fluxsplit.errors import FluxsplitError
from fluxsplit.fingerprint import file_sha256
from fluxsplit.inspection import inspect
from fluxsplit.jobs import DecodeJob, EncodeJob
from fluxsplit.latents import read_latent, write_latent
from fluxsplit.models import demo_files
from fluxsplit.picture_file import read_picture
from fluxsplit.recipe import LATENT_FORMATS, WeightsStamp
from fluxsplit.vae_session import VaeSession


class Recorder:
    """Events in a list."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, event: str, **fields: Any) -> None:
        self.sent.append({"event": event, **fields})

    def of(self, event: str) -> list[dict[str, Any]]:
        return [one for one in self.sent if one["event"] == event]


def encode(out: Path, *paths: Path, **options: Any) -> Recorder:
    """Encode with the demo model's VAE."""
    recorder = Recorder()
    job = EncodeJob(tuple(map(str, paths)), demo_files().vae, str(out), "cpu", **options)
    stage_encode.run(job, recorder)  # type: ignore[arg-type]
    return recorder


def drawn(width: int, height: int) -> Image.Image:
    """A gradient with a red rectangle."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    image.paste((200, 30, 40), (width // 4, height // 4, width // 2, height // 2))
    return image


class Damaging(Recorder):
    """Writes into a file once the first item has begun."""

    def __init__(self, file: Path, at: str) -> None:
        super().__init__()
        self._file, self._at = file, at

    def send(self, event: str, **fields: Any) -> None:
        super().send(event, **fields)
        if event == self._at and len(self.of(event)) == 1:
            with self._file.open("r+b") as stream:
                stream.seek(-64, os.SEEK_END)
                stream.write(bytes(64))


@pytest.mark.parametrize("tile", [0, 64])
def test_no_picture_is_written_of_a_vae_that_changes_meanwhile(tmp_path: Path, tile: int) -> None:
    vae = Path(shutil.copy(demo_files().vae, tmp_path / "vae.safetensors"))
    latent = write_latent(tmp_path, "a", bytes(4 * 16 * 16 * 16), (1, 16, 16, 16), None)
    recorder = Damaging(vae, "plan")
    job = DecodeJob((str(latent),), str(vae), str(tmp_path / "out"), "cpu", tile=tile, delete_latents=True)
    stage_decode.run(job, recorder)  # type: ignore[arg-type]
    assert not recorder.of("result") and "was changed during the run" in recorder.of("failed")[0]["message"]
    assert not (tmp_path / "out").exists() and latent.exists()


def test_no_latent_is_written_of_a_vae_that_changes_meanwhile(tmp_path: Path) -> None:
    vae = Path(shutil.copy(demo_files().vae, tmp_path / "vae.safetensors"))
    drawn(64, 64).save(tmp_path / "a.png")
    recorder = Damaging(vae, "plan")
    stage_encode.run(EncodeJob((str(tmp_path / "a.png"),), str(vae), str(tmp_path / "out"), "cpu"), recorder)  # type: ignore[arg-type]
    assert not recorder.of("result") and "was changed during the run" in recorder.of("failed")[0]["message"]


def test_an_error_of_the_driver_costs_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As MIOpen's, which says nothing; memory that ran out ends the stage instead, for a smaller plan."""
    names = tuple(str(write_latent(tmp_path, name, bytes(4 * 16 * 4), (1, 16, 2, 2), None)) for name in "abc")
    whole = VaeSession.decode
    raised: list[Exception] = []

    def failing(self: VaeSession, *arguments: Any) -> Any:
        if raised:
            raise raised.pop()
        return whole(self, *arguments)

    monkeypatch.setattr(VaeSession, "decode", failing)
    raised.append(RuntimeError("miopenStatusUnknownError"))
    recorder = Recorder()
    stage_decode.run(DecodeJob(names, demo_files().vae, str(tmp_path / "out"), "cpu"), recorder)  # type: ignore[arg-type]
    (failed,) = recorder.of("failed")
    assert failed["item"] == names[0] and "miopenStatusUnknownError" in failed["message"]
    assert "RuntimeError" in failed["traceback"] and len(recorder.of("result")) == 2
    raised.append(torch.OutOfMemoryError("HIP out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        stage_decode.run(DecodeJob(names, demo_files().vae, str(tmp_path / "out"), "cpu"), Recorder())  # type: ignore[arg-type]


@pytest.mark.parametrize("vram", ["300M", "10M"])
def test_tiles_that_do_not_fit_are_refused_before_they_are_computed(tmp_path: Path, vram: str) -> None:
    latent = write_latent(tmp_path, "a", bytes(4 * 16 * 128 * 128), (1, 16, 128, 128), None)
    job = DecodeJob((str(latent),), demo_files().vae, str(tmp_path / "out"), "cpu", tile=1024, vram=vram, dry_run=True)
    recorder = Recorder()
    stage_decode.run(job, recorder)  # type: ignore[arg-type]
    (failed,) = recorder.of("failed")
    assert "tiles of 1024 pixels need 4,3" in failed["message"] and "for 1024x1024 in fp32" in failed["message"]
    assert ("give --tile" in failed["hint"]) == (vram == "300M") and "leave out --tile" in failed["hint"]
    stage_decode.run(replace(job, vram="16G", dry_run=False, tile=64), recorder)  # type: ignore[arg-type]
    assert recorder.of("plan")[0]["text"].startswith("fp32, in tiles of 64 pixels, peak 0.1")
    assert recorder.of("plan")[0]["smaller"] is None


@pytest.mark.parametrize(("fit", "width_px"), [("cut", 32), ("stretch", 16)])
def test_another_ratio_is_cut_off_or_pulled(tmp_path: Path, fit: str, width_px: int) -> None:
    """A square in the middle stays a square unless the picture is to be pulled."""
    image = Image.new("RGB", (128, 64), "white")
    image.paste((0, 0, 0), (48, 16, 80, 48))
    image.save(tmp_path / "a.png")
    job = EncodeJob((), "", "", "cpu", width=64, height=64, fit=fit)
    pixels = stage_encode.prepared(read_picture(tmp_path / "a.png"), job, 8)
    assert pixels.shape == (64, 64, 3)
    dark = (pixels[:, :, 0] < 128).nonzero()
    high, wide = (dark.amax(0) - dark.amin(0) + 1).tolist()
    assert (high, wide) == (32, width_px)


@pytest.mark.parametrize(
    ("size", "wanted"), [((3, 400), (64, 8)), ((400, 3), (8, 64)), ((1, 1), (64, 8)), ((9, 9), (16, 8))]
)
def test_whatever_ratio_a_picture_has_something_of_it_is_left(
    size: tuple[int, int], wanted: tuple[int, int], tmp_path: Path
) -> None:
    Image.new("RGB", size, (200, 0, 0)).save(tmp_path / "a.png")
    job = EncodeJob((), "", "", "cpu", width=wanted[0], height=wanted[1])
    pixels = stage_encode.prepared(read_picture(tmp_path / "a.png"), job, 8)
    assert pixels.shape == (wanted[1], wanted[0], 3) and bool((pixels[:, :, 0] == 200).all())


def test_there_and_back(tmp_path: Path) -> None:
    drawn(128, 96).save(tmp_path / "a.png")
    (result,) = encode(tmp_path, tmp_path / "a.png").of("result")
    latent = read_latent(result["path"])
    assert latent.shape == (1, 16, 12, 16) and latent.recipe is None
    assert latent.encoded_by == WeightsStamp("flux-demo.safetensors", file_sha256(demo_files().vae))
    recorder = Recorder()
    stage_decode.run(DecodeJob((result["path"],), demo_files().vae, str(tmp_path / "b"), "cpu"), recorder)  # type: ignore[arg-type]
    with Image.open(recorder.of("result")[0]["path"]) as back:
        first, second = (_levels(image) for image in (drawn(128, 96), back))
    assert float((first - second).abs().mean()) < 20
    assert float((255 - first - second).abs().mean()) > 60


@pytest.mark.parametrize("format", LATENT_FORMATS)
def test_a_latent_names_the_vae_that_encoded_it(format: str, tmp_path: Path) -> None:
    drawn(32, 16).save(tmp_path / "a.png")
    (result,) = encode(tmp_path, tmp_path / "a.png", format=format).of("result")
    assert (result["source"], result["width"], result["height"]) == (str(tmp_path / "a.png"), 32, 16)
    read = read_latent(result["path"]).encoded_by
    assert read is not None and read.name == "flux-demo.safetensors"
    facts = dict(inspect(result["path"]).facts)
    assert facts["encoded by"].startswith("flux-demo.safetensors (sha256 ")


@pytest.mark.skipif(os.name == "nt", reason="names there are text")
def test_a_vae_whose_name_is_no_text(tmp_path: Path) -> None:
    vae = Path(os.fsdecode(os.fsencode(tmp_path) + b"/v\xff.safetensors"))
    try:
        vae.symlink_to(demo_files().vae)
    except OSError:
        pytest.skip("this file system has no such names")
    drawn(32, 16).save(tmp_path / "a.png")
    recorder = Recorder()
    stage_encode.run(EncodeJob((str(tmp_path / "a.png"),), str(vae), str(tmp_path), "cpu"), recorder)  # type: ignore[arg-type]
    latent = read_latent(recorder.of("result")[0]["path"])
    assert latent.encoded_by is not None and latent.encoded_by.name == "v?.safetensors"


@pytest.mark.parametrize("format", LATENT_FORMATS)
def test_the_same_latent_is_not_written_twice(format: str, tmp_path: Path) -> None:
    drawn(32, 16).save(tmp_path / "a.png")
    paths = [encode(tmp_path, tmp_path / "a.png", format=format).of("result")[0]["path"] for _ in range(2)]
    assert paths[0] == paths[1]


def test_what_encoded_a_latent_may_not_be_anything(tmp_path: Path) -> None:
    payload = bytes(4 * 16 * 2 * 2)
    for stamp in (WeightsStamp("x" * 10_000), WeightsStamp("ae", "no hash")):
        made = write_latent(tmp_path, "a", payload, (1, 16, 2, 2), None, encoded_by=stamp)
        with pytest.raises(FluxsplitError, match="what it says of its VAE is"):
            read_latent(made)


def _levels(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()


def test_the_same_picture_gives_the_same_latents_each_time(tmp_path: Path) -> None:
    drawn(64, 64).save(tmp_path / "a.png")
    paths = [encode(tmp_path / name, tmp_path / "a.png").of("result")[0]["path"] for name in "xy"]
    assert read_latent(paths[0]).payload == read_latent(paths[1]).payload


def test_sizes_are_cut_round_the_middle_or_resized(tmp_path: Path) -> None:
    drawn(77, 70).save(tmp_path / "a.png")
    drawn(77, 70).crop((2, 3, 74, 67)).save(tmp_path / "cut.png")
    paths = {path.stem: path for path in tmp_path.glob("*.png")}
    found = {name: encode(tmp_path / "o", path).of("result")[0]["path"] for name, path in paths.items()}
    assert read_latent(found["a"]).shape == (1, 16, 8, 9)
    assert read_latent(found["a"]).payload == read_latent(found["cut"]).payload
    resized = encode(tmp_path / "o", tmp_path / "a.png", width=128, height=64).of("result")[0]["path"]
    assert read_latent(resized).shape == (1, 16, 8, 16)


def test_what_is_transparent_is_white_and_exif_turns(tmp_path: Path) -> None:
    clear = drawn(64, 48).convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    clear.save(tmp_path / "clear.png")
    Image.new("RGB", (64, 48), "white").save(tmp_path / "white.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    drawn(64, 48).save(tmp_path / "turned.webp", exif=exif, lossless=True)
    drawn(64, 48).transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    names = ("clear.png", "white.png", "turned.webp", "upright.png")
    results = encode(tmp_path / "o", *(tmp_path / name for name in names)).of("result")
    payloads = [read_latent(result["path"]).payload for result in results]
    assert payloads[0] == payloads[1] and payloads[2] == payloads[3]
    assert read_latent(results[2]["path"]).shape == (1, 16, 8, 6)


def test_one_bad_picture_does_not_stop_the_rest(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    drawn(4, 4).save(tmp_path / "small.png")
    drawn(64, 64).save(tmp_path / "good.png")
    names = ("bad.png", "gone.png", "small.png", "good.png")
    recorder = encode(tmp_path / "o", *(tmp_path / name for name in names), format="latent")
    assert [Path(one["item"]).name for one in recorder.of("failed")] == ["bad.png", "gone.png", "small.png"]
    assert [Path(one["path"]).name for one in recorder.of("result")] == ["good.latent"]
    assert recorder.of("encode")[-1]["done"] == 4


def test_a_result_that_is_not_finite_is_tried_again_in_fp32(tmp_path: Path) -> None:
    """fp16 cannot hold these latents, fp32 can: the picture is made, and its record says in what."""
    from safetensors.torch import save_file

    from fluxsplit.metadata import record_from_json
    from fluxsplit.png_text import read_png

    save_file({"latents": torch.full((1, 16, 4, 4), 3e5)}, tmp_path / "large.safetensors")
    recorder = Recorder()
    job = DecodeJob((str(tmp_path / "large.safetensors"),), demo_files().vae, str(tmp_path), "cpu", dtype="fp16")
    stage_decode.run(job, recorder)  # type: ignore[arg-type]
    assert "trying again in fp32" in recorder.of("note")[0]["text"]
    record = record_from_json(read_png(Path(recorder.of("result")[0]["path"])).texts["fluxsplit"])
    assert record.dtype == "fp32"


def test_a_result_that_is_not_finite_in_fp32_is_no_picture(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name, value in (("a", 3e38), ("b", 0.5)):
        save_file({"latents": torch.full((1, 16, 4, 4), value)}, tmp_path / f"{name}.safetensors")
    recorder = Recorder()
    names = tuple(str(tmp_path / f"{name}.safetensors") for name in "ab")
    stage_decode.run(DecodeJob(names, demo_files().vae, str(tmp_path), "cpu"), recorder)  # type: ignore[arg-type]
    assert [Path(one["item"]).stem for one in recorder.of("failed")] == ["a"]
    assert "in fp32 too" in recorder.of("failed")[0]["message"]
    assert [Path(one["path"]).name for one in recorder.of("result")] == ["b.png"]
