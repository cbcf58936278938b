"""`fluxsplit rerender`: what a picture says, what is asked to differ, and what reaches the stages."""

from __future__ import annotations

import errno
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from headers import transformer, vae, write
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from samples import SHAPE, make_payload
from test_cli import Run, conditioning_file, home, run

from fluxsplit import conditioning_cache
from fluxsplit.conditioning_header import saved
from fluxsplit.fingerprint import file_sha256
from fluxsplit.latents import read_latent, write_latent
from fluxsplit.metadata import ImageRecord, encode_png, png_text_chunks
from fluxsplit.models import demo_files
from fluxsplit.recipe import Parent, Recipe, WeightsStamp
from fluxsplit.start import NoiseGrid, Start

__all__ = ["home", "run"]


def recipe(**changes: Any) -> Recipe:
    """A recipe of the demo model for 64x48 pixels."""
    stamp = WeightsStamp("flux-demo.safetensors", file_sha256(demo_files().transformer))
    plain = Recipe(
        prompt="a fox", seed=7, width=64, height=48, steps=2, sigmas=(1.0, 0.4, 0.0), sampler="heun",
        scheduler="normal", shift=None, guidance=None, cfg=1.0, negative="", noise_index=3, variant="schnell",
        transformer=stamp, text_encoder=stamp, clip=stamp, dtype="bf16", device="cpu",
    )  # fmt: skip
    return replace(plain, **changes)


def preview(folder: Path, name: str = "0007", keep_latent: bool = True, **changes: Any) -> Path:
    """A preview with its latent."""
    made = recipe(**changes)
    shape = (1, 16, made.height // 8, made.width // 8)
    payload = bytes(4 * 16 * shape[2] * shape[3])
    latent = write_latent(folder / "latents", name, payload, shape, made)
    record = ImageRecord(made, read_latent(latent).payload_sha256, made.clip)
    pixels = bytes(3 * made.width * made.height)
    path = folder / f"{name}.png"
    path.write_bytes(encode_png(pixels, made.width, made.height, png_text_chunks(record)))
    if not keep_latent:
        latent.unlink()
    return path


def foreign(path: Path, parameters: str, size: tuple[int, int] = (64, 48)) -> Path:
    """A PNG with A1111's text."""
    info = PngInfo()
    info.add_text("parameters", parameters)
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG", pnginfo=info)
    path.write_bytes(buffer.getvalue())
    return path


def test_nothing_changed_repeats_every_setting(run: Run, home: Path) -> None:
    ran = run("rerender", "--from", preview(home / "previews"))
    assert ran.code == 0, ran.err
    (image,) = ran.images
    want = {"prompt": "a fox", "seed": 7, "width": 64, "height": 48, "steps": 2, "sampler": "heun"}
    want |= {"scheduler": "normal", "noise_index": 3, "cfg": 1.0, "start": None, "shift": None, "sigmas": []}
    assert {name: image[name] for name in want} == want
    assert image["recorded_sigmas"] == [1.0, 0.4, 0.0], "to the last bit"
    assert ran.job("sample")["dtype"] == "bf16" and ran.job("sample")["files"]["is_demo"]
    assert ran.out == [str(home / "renders" / "0007-64x48.png")]
    source, made = (
        read_latent(home / f"{name}.pt") for name in ("previews/latents/0007", "renders/latents/0007-64x48")
    )
    assert made.parent == Parent("0007.png", source.payload_sha256) and source.parent is None
    assert "seed 7" in ran.err and "nothing is changed" in ran.err


@pytest.mark.parametrize(
    "words",
    [["--fit", "centre"], ["--low-frequency-guidance", "0"], ["--count", "1"], ["--keep", "noise"], ["--keep", "seed"]],
)
def test_a_flag_that_asks_for_nothing_changes_nothing(run: Run, home: Path, words: list[str]) -> None:
    (image,) = run("rerender", "--from", preview(home / "previews"), *words).images
    assert image["start"] is None and image["recorded_sigmas"] == [1.0, 0.4, 0.0]


def test_the_prompt_may_come_from_stdin(run: Run, home: Path) -> None:
    source = preview(home / "previews")
    (image,) = run("rerender", source, "-p", "-", stdin="# a line that is none\na dog\n").images
    assert image["prompt"] == "a dog"
    for words, stdin, says in (
        (["-p", "-"], "a\nb\n", "one prompt"),
        (["-", "-p", "-"], "a\n", "both to come from stdin"),
    ):
        ran = run("rerender", *([source] if len(words) == 2 else []), *words, stdin=stdin)
        assert ran.code == 2 and says in ran.err


def test_what_is_wrong_with_the_flags_is_said_once(run: Run, home: Path) -> None:
    for name in ("0001", "0002", "0003"):
        preview(home / "previews", name)
    for words in (["--count", "0"], ["--size", "100x100"], ["--scale", "0.01"]):
        ran = run("rerender", "previews", *words)
        assert ran.code == 2 and len(ran.err.splitlines()) == 1 and "0001" not in ran.err


def test_pictures_of_one_name_are_told_apart(run: Run, home: Path) -> None:
    preview(home / "a"), preview(home / "b")
    ran = run("rerender", "a/0007.png", "b/0007.png", "--count", "2", "--sampler", "euler", "--dry-run")
    assert "a/0007.png: found" in ran.err and "b/0007.png: found" in ran.err


def test_another_size_keeps_the_composition(run: Run, home: Path) -> None:
    source = preview(home / "previews")
    ran = run("rerender", source, "--size", "136x96")
    start = ran.images[0]["start"]
    assert (start["keep"], start["strength"], start["fit"]) == ("composition", 0.8, "stretch")
    assert start["noise"] == [{"seed": 7, "width": 64, "height": 48, "noise_index": 3, "fit": "stretch"}]
    assert ran.images[0]["start_latent"] == str(home / "previews" / "latents" / "0007.pt")
    assert ran.images[0]["recorded_sigmas"] == [] and ran.job("sample")["dtype"] == "auto"
    assert "keep composition at strength 0.8" in ran.err


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["--keep", "seed"], None),
        (["--keep", "noise", "--fit", "centre"], ("noise", 1.0, "centre", 0.0, 1, False)),
        (["--keep", "image"], ("image", 0.8, "stretch", 0.0, 0, True)),
        (["--keep", "image", "--strength", "0.5"], ("image", 0.5, "stretch", 0.0, 0, True)),
        (
            ["--strength", "0.95", "--low-frequency-guidance", "1", "--fit", "centre"],
            ("composition", 0.95, "centre", 1.0, 1, True),
        ),
        (["--sigmas", "0.7,0.3,0"], ("composition", 0.7, "stretch", 0.0, 1, True)),
    ],
)
def test_what_is_kept(run: Run, home: Path, words: list[str], start: tuple[Any, ...] | None) -> None:
    ran = run("rerender", "--from", preview(home / "previews"), "--scale", "2", *words)
    assert ran.code == 0, ran.err
    got = ran.images[0]["start"]
    if start is None:
        assert got is None
        return
    names = ("keep", "strength", "fit", "low_frequency_guidance")
    assert (*(got[name] for name in names), len(got["noise"]), bool(got["latent_sha256"])) == start


def test_every_setting_can_be_overridden(run: Run, home: Path) -> None:
    words = ["-p", "a dog", "--negative", "cats", "--seed", "9", "--steps", "5", "--cfg", "2", "--sampler", "euler"]
    words += ["--scheduler", "simple", "--shift", "1.15", "--noise-index", "1", "--dtype", "fp32"]
    ran = run("rerender", "--from", preview(home / "previews"), *words)
    (image,) = ran.images
    want = {"prompt": "a dog", "negative": "cats", "seed": 9, "steps": 5, "cfg": 2.0, "sampler": "euler"}
    want |= {"scheduler": "simple", "shift": 1.15, "noise_index": 1, "recorded_sigmas": [], "start": None}
    assert {name: image[name] for name in want} == want and ran.job("sample")["dtype"] == "fp32"
    assert ran.job("text")["prompts"] == ["a dog", "cats"]


def test_where_decoding_ends_early_the_finished_latents_are_told(
    run: Run, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "decode ends at the second")
    ran = run("rerender", "--from", preview(home / "previews"), "--seed", "1..3")
    assert ran.code == 1 and len(ran.out) == 1
    assert "2 finished, without their pictures yet; to have them: fluxsplit decode" in ran.err


def test_a_name_that_is_no_text_is_a_parent_all_the_same(run: Run, home: Path) -> None:
    source = preview(home / "previews")
    odd = home / os.fsdecode(b"a\xff.png")
    try:
        odd.write_bytes(source.read_bytes())
    except OSError:
        pytest.skip("this file system has no such names")
    ran = run("rerender", odd, "--keep", "seed", "--scale", "2")
    assert ran.code == 0, ran.err
    (latent,) = (home / "renders" / "latents").glob("*.pt")
    parent = read_latent(latent).parent
    assert parent is not None and parent.name == "a?.png"


def test_of_a_batch_of_latents_the_first_is_rendered_and_that_is_told(run: Run, home: Path) -> None:
    write_latent(home, "batch", make_payload() * 3, (3, *SHAPE[1:]), None)
    write_latent(home, "one", make_payload(), SHAPE, None)
    for name, told in (("batch", True), ("one", False)):
        ran = run("rerender", f"{name}.pt", "-p", "a fox", "-m", "demo", "--seed", "1", "--dry-run")
        assert ran.code == 0, ran.err
        assert ("the first of the 3 latents that it holds" in ran.err) == told


def test_globs_folders_stdin_and_several_seeds(run: Run, home: Path) -> None:
    for name in ("0001", "0002"):
        preview(home / "previews", name)
    (home / "previews" / "sheet.png").write_bytes(b"")
    by_glob = run("rerender", "--from", "previews/*.png", "--dry-run", "--json")
    assert len(json.loads(by_glob.out[0])["images"]) == 2
    assert not [entry for entry in by_glob.log if entry["what"] == "job"]
    by_shell = run("rerender", *sorted((home / "previews").glob("*.png")), "--dry-run", "--json")
    assert len(by_shell.out) == len(by_glob.out) and "sheet.png left out" in by_shell.err
    by_folder = run("rerender", "--from", "previews", "--seed", "11..12")
    assert [image["stem"] for image in by_folder.images] == [
        f"{name}-64x48-seed{seed}" for name in ("0001", "0002") for seed in (11, 12)
    ]
    counted = run("rerender", "--from", "previews", "--count", "2", "--scale", "2")
    assert [image["stem"] for image in counted.images] == [
        f"{name}-128x96-seed{seed}" for name in ("0001", "0002") for seed in (7, 8)
    ]
    assert {image["start"]["keep"] for image in counted.images} == {"composition"}
    by_stdin = run("rerender", "--from", "-", stdin="previews/0002.png\n\n")
    assert [image["stem"] for image in by_stdin.images] == ["0002-64x48"]
    again = run("rerender", "previews/0002.png")
    assert [image["stem"] for image in again.images] == ["0002-64x48-2"], "nothing is overwritten"


def test_a_picture_without_its_latent_is_encoded_once_for_all(run: Run, home: Path) -> None:
    for name in ("0001", "0002", "0003"):
        preview(home / "previews", name, keep_latent=name == "0002")
    ran = run("rerender", "previews", "--scale", "2")
    assert ran.code == 0, ran.err
    assert [entry["stage"] for entry in ran.log if entry["what"] == "job"] == ["encode", "text", "sample", "decode"]
    folder = home / "renders" / "latents" / "encoded"
    assert [Path(image["start_latent"]).parent for image in ran.images] == [
        folder, home / "previews" / "latents", folder
    ]  # fmt: skip
    assert len({image["start_latent"] for image in ran.images}) == 3
    seed = run("rerender", "previews/0001.png", "--scale", "2", "--keep", "noise")
    assert "encode" not in [entry["stage"] for entry in seed.log]


def test_a_latent_of_another_picture_is_not_taken(run: Run, home: Path) -> None:
    source = preview(home / "previews", "0001")
    (home / "previews" / "latents" / "0001.pt").unlink()
    write_latent(home / "previews" / "latents", "0001", b"\0\0\x80?" * 16 * 48, (1, 16, 6, 8), None)
    ran = run("rerender", source, "--scale", "2")
    assert Path(ran.images[0]["start_latent"]).parent.name == "encoded"


def test_picks(run: Run, home: Path) -> None:
    for name in ("0001", "0002", "0003"):
        preview(home / "previews", name)
    lines = [{"image": "0001.png", "pick": "pick"}, {"image": "0002.png", "pick": "reject"}]
    lines += [{"image": "0003.png", "pick": "pick"}, {"image": "0001.png", "pick": None}]
    text = "".join(json.dumps({"stars": 0, "time": "2026-11-24T12:00:00Z", **line}) + "\n" for line in lines)
    (home / "previews" / "picks.jsonl").write_text(text)
    for words in (["--from-picks"], ["--from-picks", "--scale", "2"], ["--from-picks", "previews"]):
        ran = run("rerender", *words)
        assert [image["stem"].split("-")[0] for image in ran.images] == ["0003"], ran.err
    (home / "previews" / "picks.jsonl").write_text("")
    assert run("rerender", "--from-picks").code == 2


def test_the_text_encoders_are_not_even_looked_for(run: Run, home: Path, tmp_path: Path) -> None:
    source = preview(home / "previews")
    made = recipe()
    files = demo_files()
    tokenizers = conditioning_cache.tokenizers_sha256(files.t5_tokenizer, files.clip_tokenizer)
    encoders = conditioning_cache.Encoders(made.text_encoder, made.clip, tokenizers)
    kept = write(tmp_path / "made", {"t5": (1, 8, 4), "pooled": (1, 3)}, "F32")
    conditioning_cache.keep(encoders, "a fox", str(kept))
    ran = run("rerender", "--from", source, "--scale", "2")
    assert [entry["stage"] for entry in ran.log if entry["what"] == "start"] == ["sample", "decode"]
    assert ran.job("sample")["files"]["text_encoder"] == ran.job("sample")["files"]["clip"] == ""
    assert ran.images[0]["conditioning"] == conditioning_cache.find(encoders, "a fox")
    encoded = run("rerender", "--from", source, "--scale", "2", "--no-cache")
    assert encoded.job("text")["prompts"] == ["a fox"]


def test_a_rerender_of_a_rerender_knows_both_noises(run: Run, home: Path) -> None:
    preview(home / "previews")
    latent = read_latent(home / "previews" / "latents" / "0007.pt")
    start = Start("composition", (NoiseGrid(7, 64, 48, 3),), 0.9, latent_sha256=latent.payload_sha256)
    source = preview(home / "renders", "0007-128x96", width=128, height=96, seed=8, start=start)
    larger = run("rerender", source, "--scale", "2")
    assert [(grid["seed"], grid["width"]) for grid in larger.images[0]["start"]["noise"]] == [(7, 64), (8, 128)]
    same = run("rerender", source)
    assert same.code == 2 and "started from the latent" in same.err, "the picture does not name its parent here"


def test_a_picture_of_another_tool_says_what_was_assumed(run: Run, home: Path) -> None:
    text = "a fox\nSteps: 4, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Seed: 7, Size: 64x48, RNG: CPU"
    source = foreign(home / "a.png", text)
    ran = run("rerender", source)
    assert ran.code == 2 and "--model" in ran.err
    write(home / "model.safetensors", {})
    missing = run("rerender", source, "--model", "nowhere.safetensors")
    assert missing.code == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "there is no picture"),
        (["--from", "missing.png"], "does not exist"),
        (["--from", "*.webp"], "nothing matches"),
        (["--from", "empty"], "holds no picture"),
        (["--from", "previews/0007.png", "--size", "100x100", "--scale", "2"], "drop one"),
        (["--from", "previews/0007.png", "--size", "100x100"], "multiple of 8"),
        (["--from", "previews/0007.png", "--scale", "0"], "not above 0"),
        (["--from", "previews/0007.png", "--scale", "nan"], "not above 0"),
        (["--from", "previews/0007.png", "--keep", "all"], "is not one of"),
        (["--from", "previews/0007.png", "--strength", "1.5"], "outside"),
        (["--from", "previews/0007.png", "--keep", "seed", "--strength", "0.5"], "no effect"),
        (["--from", "previews/0007.png", "--keep", "noise", "--strength", "0.5"], "no effect"),
        (["--from", "previews/0007.png", "--upscale-tile", "64"], "no effect"),
        (["--from", "previews/0007.png", "--keep", "seed", "--fit", "centre"], "no effect"),
        (["--from", "previews/0007.png", "--upscale", "bare.png"], "neither safetensors nor"),
        (["--from", "previews/0007.png", "--count", "0"], "outside 1.."),
        (["--from", "previews/0007.png", "--sigmas", "0.9,0.5,0", "--strength", "0.5"], "drop --strength"),
        (["--from", "previews/0007.png", "-p", "a", "-p", "b"], "one prompt"),
        (["--from", "previews/0007.png", "--guidance", "3"], "no effect"),
        (["--from", "previews/0007.png", "--negative", "x"], "no effect"),
        (["--from", "bare.png"], "does not say how it was made"),
        (["--from", "damaged.png"], "damaged.png"),
    ],
)
def test_what_cannot_be_done_is_one_line(run: Run, home: Path, words: list[str], says: str) -> None:
    preview(home / "previews")
    (home / "empty").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48)).save(buffer, "PNG")
    (home / "bare.png").write_bytes(buffer.getvalue())
    (home / "damaged.png").write_bytes((home / "previews" / "0007.png").read_bytes()[:200])
    ran = run("rerender", *words)
    assert ran.code in (1, 2) and says in ran.err and not ran.out
    assert len(ran.err.strip().splitlines()) == 1 and not ran.log


def test_a_photo_with_a_prompt_gets_a_seed_a_size_and_stands_upright(run: Run, home: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (301, 203)).save(home / "photo.jpg", exif=exif)
    ran = run("rerender", "--from", "photo.jpg", "-p", "a fox", "-m", "demo", "--dry-run")
    assert ran.code == 0 and "renders at 200x304" in ran.err and "(--seed)" in ran.err


def test_one_bad_picture_does_not_stop_the_rest(run: Run, home: Path) -> None:
    preview(home / "previews", "0001")
    (home / "previews" / "0002.png").write_bytes(b"no picture")
    ran = run("rerender", "--from", "previews", "--scale", "2")
    assert ran.code == 1 and len(ran.out) == 1 and "0002.png" in ran.err


def test_a_picture_of_a_conditioning_is_rendered_again_with_it(run: Run, home: Path) -> None:
    """Where there is no text encoder at all."""
    model = write(home / "t.safetensors", transformer())
    source = preview(home / "previews")
    words = ("rerender", source, "-m", model, "--size", "128x96", "--vae", "demo")
    assert "no T5 text encoder found" in run(*words).err
    ran = run(*words, "--conditioning", conditioning_file(home / "c.safetensors"))
    assert ran.code == 0, ran.err
    assert ran.images[0]["conditioning"] == str(home / "c.safetensors") and ran.images[0]["prompt"] == "a fox"
    assert ran.job("sample")["files"]["text_encoder"] == "" and "text" not in {entry["stage"] for entry in ran.log}
    other = write(home / "d.safetensors", {"t5": (1, 9, 4096), "pooled": (1, 768)}, "F32")
    third = run(*words, "--conditioning", other)
    assert third.images[0]["conditioning_sha256"] != ran.images[0]["conditioning_sha256"]
    assert "d.safetensors does not say its prompt; it is taken for 'a fox'" in third.err
    warned = run("rerender", preview(home / "previews", "0008", conditioning_sha256="a" * 64), "--dry-run")
    assert "made from a saved --conditioning" in warned.err


def test_a_conditioning_of_something_else_renders_nothing_again(run: Run, home: Path) -> None:
    model = write(home / "t.safetensors", transformer())
    words = ("rerender", preview(home / "previews"), "-m", model, "--conditioning")
    other = run(*words, conditioning_file(home / "c.safetensors", "a dog"))
    assert other.code == 2 and "was made of the prompt 'a dog', not of 'a fox'" in other.err
    negative = run(*words, conditioning_file(home / "d.safetensors"), "--cfg", "2")
    assert negative.code == 2 and "needs the text encoders" in negative.err
    narrow = run(*words, write(home / "e.safetensors", {"t5": (1, 8, 64), "pooled": (1, 768)}, "F32"))
    assert narrow.code == 1 and "takes a width of 4096" in narrow.err
    assert run(*words, "nowhere").code == 2


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_what_could_not_be_decoded_is_not_sampled(run: Run, home: Path, more: list[str]) -> None:
    model, kept = write(home / "t.safetensors", transformer()), conditioning_file(home / "c.safetensors")
    for words in (["rerender", str(preview(home / "previews"))], ["preview"]):
        ran = run(*words, "-m", model, "--conditioning", kept, *more)
        assert ran.code == 3 and "no VAE found" in ran.err
        assert "sample" not in {entry["stage"] for entry in ran.log}


def test_a_folder_that_cannot_be_read_stops_no_other_picture(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, closed, listed = preview(home / "previews"), home / "closed", Path.iterdir
    closed.mkdir()

    def iterdir(path: Path) -> Any:
        if path.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    ran = run("rerender", "closed", source)
    assert ran.code == 1 and ran.out == [str(home / "renders" / "0007-64x48.png")]
    assert "closed" in ran.err and "bug" not in ran.err


def test_hidden_files_are_not_rendered_again(run: Run, home: Path) -> None:
    source = preview(home / "previews")
    source.with_name("._0007.png").write_bytes(b"what macOS knows of it")
    ran = run("rerender", "previews")
    assert ran.code == 0 and [image["prompt"] for image in ran.images] == ["a fox"]


def test_a_picture_without_a_vae_stops_no_other(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the demo model, whose VAE is in it, and one of a model that is found by its name, alone."""
    model = write(home / "flux1.safetensors", transformer())
    other = WeightsStamp("flux1.safetensors", "0" * 64)
    preview(home / "previews", "0001"), preview(home / "previews", "0002", transformer=other)
    kept = conditioning_file(home / "c.safetensors")
    made = saved(str(kept), 1.0)
    monkeypatch.setattr("fluxsplit.rerender_orders._conditioning", lambda *arguments: made)
    monkeypatch.setattr("fluxsplit.models.find_named", lambda name, kind, comfyui: model)
    ran = run("rerender", "previews", "--conditioning", kept)
    assert ran.code == 1 and ran.out == [str(home / "renders" / "0001-64x48.png")]
    assert "0002.png: no VAE found" in ran.err


def test_nothing_is_encoded_for_what_could_not_be_decoded(run: Run, home: Path) -> None:
    """A model that is named is not overruled by a VAE of the settings, for encoding as for decoding."""
    write(home / "v.safetensors", vae())
    (home / "fluxsplit.toml").write_text('vae = "v.safetensors"\n')
    model, kept = write(home / "m" / "t.safetensors", transformer()), conditioning_file(home / "c.safetensors")
    source = preview(home / "previews", keep_latent=False)
    words = ("rerender", source, "-m", model, "--keep", "image", "--conditioning", kept)
    ran = run(*words)
    assert ran.code == 3 and "no VAE found" in ran.err and not ran.log
    assert run(*words, "--vae", "v.safetensors").job("encode")["vae"] == str(home / "v.safetensors")


def test_a_hidden_picture_that_is_asked_for_is_rendered(run: Run, home: Path) -> None:
    preview(home / "previews", ".h")
    assert len(run("rerender", "previews/.h*.png").images) == 1
