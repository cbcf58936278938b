"""The commands as a user runs them, in processes of their own, with the demo model: pictures, and what goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fluxsplit.latents import read_latent, write_latent
from fluxsplit.metadata import read_recipe, read_record
from fluxsplit.models import demo_files
from fluxsplit.png_text import read_png

PROMPT = "a large red circle above a small blue square on a white background"


def fluxsplit(
    *words: str | Path, cwd: Path, stdin: str | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command; stdout, stderr and exit code."""
    return subprocess.run(
        [sys.executable, "-m", "fluxsplit", *map(str, words)],
        cwd=cwd,
        input=stdin,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], str]:
    """A folder, two latents of one prompt in it, and what the command wrote to stderr."""
    folder = tmp_path_factory.mktemp("run")
    done = fluxsplit("sample", "-p", PROMPT, "--seed", "7", "-n", "2", "--size", "136x120", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, [Path(line) for line in done.stdout.splitlines()], done.stderr


def test_sample_writes_a_latent_for_each_seed(sampled: tuple[Path, list[Path], str]) -> None:
    folder, paths, stderr = sampled
    assert len(paths) == 2 and all(path.parent == folder / "latents" for path in paths)
    latents = [read_latent(path) for path in paths]
    recipes = [latent.recipe for latent in latents]
    assert [recipe.seed for recipe in recipes if recipe] == [7, 8]
    assert latents[0].shape == (1, 16, 15, 17) and latents[0].payload != latents[1].payload
    assert recipes[0] is not None and recipes[0].prompt == PROMPT and len(recipes[0].transformer.sha256) == 64
    assert "demo model" in stderr


def test_a_latent_too_large_for_the_budget_does_not_stop_the_others(
    sampled: tuple[Path, list[Path], str], tmp_path: Path
) -> None:
    large = write_latent(tmp_path, "a-large", bytes(4 * 16 * 256 * 256), (1, 16, 256, 256), None)
    words = ["decode", str(large), str(sampled[1][0]), "--vae", "demo", "--vram", "22M", "-o", str(tmp_path / "out")]
    done = fluxsplit(*words, cwd=tmp_path)
    assert done.returncode == 1 and "for 2048x2048 in fp32 even in the smallest strips" in done.stderr
    assert [Path(line).stem for line in done.stdout.splitlines()] == [sampled[1][0].stem]
    assert "trying once more" not in done.stderr


def test_what_is_decoded_again_is_told(sampled: tuple[Path, list[Path], str], tmp_path: Path) -> None:
    words = ("decode", str(sampled[1][0]), "-o", str(tmp_path))
    first, again = (fluxsplit(*words, cwd=tmp_path) for _ in range(2))
    assert "beside" not in first.stderr + again.stderr
    assert first.stdout == again.stdout and len(list(tmp_path.iterdir())) == 1, "the same picture is there already"
    another = fluxsplit(*words, "--vae-dtype", "bf16", cwd=tmp_path)
    assert "1 written beside pictures that were there" in another.stderr and len(list(tmp_path.iterdir())) == 2
    assert "beside" not in fluxsplit(*words, "--vae-dtype", "bf16", "--overwrite", cwd=tmp_path).stderr
    assert len(list(tmp_path.iterdir())) == 2


def test_overwriting_never_costs_a_picture_of_the_same_run(
    sampled: tuple[Path, list[Path], str], tmp_path: Path
) -> None:
    for folder, latent in zip("ab", sampled[1], strict=True):
        (tmp_path / folder).mkdir()
        shutil.copy(latent, tmp_path / folder / "x.pt")
    words = ("decode", "a", "b", "--out", "o", "--delete-latents")
    refused = fluxsplit(*words, "--overwrite", cwd=tmp_path)
    assert refused.returncode == 2 and "would be written to one name" in refused.stderr
    assert (tmp_path / "a" / "x.pt").exists() and (tmp_path / "b" / "x.pt").exists() and not (tmp_path / "o").exists()
    done = fluxsplit(*words, cwd=tmp_path)
    assert [Path(line).name for line in done.stdout.split()] == ["x.png", "x-2.png"] and "beside" not in done.stderr


def test_without_a_cache_that_can_be_written_to_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ("sample", "-p", "a blue circle", "--size", "64x64", "--seed", "1")
    done = fluxsplit(*words, cwd=tmp_path, environment={"FLUXSPLIT_CACHE": str(tmp_path / "file" / "below")})
    assert done.returncode == 0 and Path(done.stdout.strip()).is_file(), done.stderr


def test_a_dry_run_of_decode_says_how_and_makes_nothing(sampled: tuple[Path, list[Path], str], tmp_path: Path) -> None:
    large = write_latent(tmp_path, "large", bytes(4 * 16 * 256 * 256), (1, 16, 256, 256), None)
    words = ("decode", *sampled[1], large, "--vae", "demo", "--vram", "22M", "-o", tmp_path / "out", "--dry-run")
    done = fluxsplit(*words, cwd=tmp_path)
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert "for 2048x2048 in fp32 even in the smallest strips" in done.stderr
    assert [f"{path} to {tmp_path / 'out' / path.stem}.png: 136x120 on cpu, fp32, peak 0.0" for path in sampled[1]] == [
        line[: line.index("peak 0.0") + 8] for line in done.stdout.splitlines()
    ]
    told = [json.loads(line) for line in fluxsplit(*words, "--json", cwd=tmp_path).stdout.splitlines()]
    assert [one.get("width") for one in told] == [136, 136, None] and told[0]["plan"] in done.stdout
    assert told[2]["failed"] == str(large) and "--vram" in told[2]["hint"] + told[2]["message"]
    tiled = fluxsplit("decode", sampled[1][0], "--tile", "64", "--dry-run", "--delete-latents", cwd=tmp_path)
    assert "then the latent is deleted" in tiled.stdout and "deleted" not in done.stdout and sampled[1][0].exists()
    assert "in tiles of 64 pixels" in tiled.stdout and len(list(tmp_path.iterdir())) == 1


def test_a_dry_run_of_encode_and_upscale(sampled: tuple[Path, list[Path], str], tmp_path: Path) -> None:
    (picture,) = fluxsplit("decode", sampled[1][0], "-o", tmp_path, cwd=tmp_path).stdout.split()
    done = fluxsplit("encode", picture, "--size", "64x48", "--dry-run", cwd=tmp_path)
    where = tmp_path / "latents" / f"{Path(picture).stem}.pt"
    assert done.stdout.startswith(f"{picture} to {where}: 64x48 on cpu, fp32, peak ") and not where.parent.exists()


def test_decode_carries_the_recipe_into_the_picture(sampled: tuple[Path, list[Path], str]) -> None:
    folder, paths, _ = sampled
    done = fluxsplit("decode", *paths, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["source"], one["width"], one["height"]) for one in told] == [(str(path), 136, 120) for path in paths]
    pictures = [Path(one["path"]) for one in told]
    assert [picture.parent for picture in pictures] == [folder / "images"] * 2
    assert read_recipe(pictures[0]) == read_latent(paths[0]).recipe
    png = read_png(pictures[0])
    assert (png.width, png.height) == (136, 120) and png.texts["parameters"].startswith(PROMPT + "\nSteps: 4")


def test_the_same_seed_gives_the_same_bytes_alone_and_beside_others(
    sampled: tuple[Path, list[Path], str], tmp_path: Path
) -> None:
    _, paths, _ = sampled
    kept = tmp_path / "prompt.safetensors"
    first = fluxsplit(
        "sample", "-p", PROMPT, "--seed", "8", "--size", "136x120", "--save-conditioning", kept, cwd=tmp_path
    )
    assert first.returncode == 0, first.stderr
    again = fluxsplit(
        "sample", "--conditioning", kept, "--seed", "8", "--size", "136x120", "--format", "latent", cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    alone, from_file = (read_latent(done.stdout.strip()) for done in (first, again))
    assert alone.payload == from_file.payload == read_latent(paths[1]).payload
    assert from_file.recipe is not None and from_file.recipe.prompt == PROMPT
    assert not from_file.recipe.text_encoder.name and from_file.recipe.conditioning_sha256
    assert alone.recipe is not None and alone.recipe.text_encoder.name and not alone.recipe.conditioning_sha256
    words = ("rerender", again.stdout.strip(), "--size", "144x128", "--conditioning", kept)
    rendered = fluxsplit(*words, cwd=tmp_path)
    once_more = fluxsplit(*words, cwd=tmp_path)
    assert rendered.returncode == once_more.returncode == 0 and rendered.stdout == once_more.stdout
    assert "is there already" in once_more.stderr
    encoded = fluxsplit(*words[:-2], cwd=tmp_path)
    assert encoded.stdout != rendered.stdout and "made from a saved --conditioning" in encoded.stderr


def test_one_bad_latent_does_not_stop_the_rest(sampled: tuple[Path, list[Path], str], tmp_path: Path) -> None:
    _, paths, _ = sampled
    good = read_latent(paths[0])
    folder = tmp_path / "mixed"
    folder.mkdir()
    shutil.copy(paths[0], folder / "a-good.pt")
    damaged = bytearray(paths[1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "b-damaged.pt").write_bytes(damaged)
    write_latent(folder, "c-good", good.payload, good.shape, good.recipe)
    done = fluxsplit("decode", folder, "--delete-latents", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert len(done.stdout.splitlines()) == 2 and "b-damaged.pt" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["b-damaged.pt"], "only what was decoded is deleted"


def cut(path: Path, to: Path, keep: float) -> Path:
    """A copy of a file that ends too early."""
    raw = path.read_bytes()
    to.write_bytes(raw[: int(len(raw) * keep)])
    return to


def with_key(path: Path, name: str) -> Path:
    """A safetensors file that holds one small tensor of that name."""
    header = json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return path


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--size", "510x512"], 2, "504x512"),
        (["--seed", "-1"], 2, "-1"),
        (["--negative", "blurry"], 2, "cfg"),
        (["--steps", "0"], 2, "steps"),
        (["--model", "missing.safetensors"], 3, "missing.safetensors"),
        (["--model", "cut.safetensors"], 1, "truncated"),
        (["--model", "chroma.safetensors"], 1, "Chroma"),
        (["--model", "nf4.safetensors"], 1, "NF4"),
        (["--device", "cuda:7"], 2, "cuda:7"),
        (["--sigmas", "0.5,1,0"], 2, "fall"),
        (["--prompt-file", "nothing.txt"], 2, "nothing.txt"),
    ],
)
def test_bad_sample_arguments_are_one_line(words: list[str], code: int, says: str, tmp_path: Path) -> None:
    cut(Path(demo_files().transformer), tmp_path / "cut.safetensors", 0.5)
    with_key(tmp_path / "chroma.safetensors", "distilled_guidance_layer.in_proj.weight")
    with_key(tmp_path / "nf4.safetensors", "double_blocks.0.img_mod.lin.weight.quant_state.bitsandbytes__nf4")
    prompt = [] if "--prompt-file" in words else ["-p", "a red circle"]
    done = fluxsplit("sample", *prompt, *words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr and not done.stdout
    assert not (tmp_path / "latents").exists()


def test_a_full_disk_leaves_nothing_under_a_final_name(tmp_path: Path) -> None:
    """A real file system of 64 kB, where the machine allows one to be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    sample = f"{sys.executable} -m fluxsplit sample -p x --seed 1..3 --out {small}"
    command = f"mount -t tmpfs -o size=64k none {small} && {sample}"
    done = (
        subprocess.run(
            ["unshare", "--mount", "sh", "-c", f"{command} --size 256x256; code=$?; ls -A {small}; exit $code"],
            capture_output=True,
            text=True,
            check=False,
        )
        if shutil.which("unshare") and os.geteuid() == 0
        else None
    )
    if done is None or "mount" in done.stderr:
        pytest.skip("needs the right to mount a file system")
    assert done.returncode == 1 and "space" in done.stderr.lower(), done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.count("disk is full") <= 1, "not once for each picture"


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_ends_every_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fluxsplit", "sample", "-p", PROMPT, "-n", "500", "--size", "256x256"],
        cwd=tmp_path,
        env={**os.environ, "FLUXSPLIT_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert all(process.stdout.readline().strip().endswith(".pt") for _ in range(2))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    time.sleep(0.2)
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
    assert not left.strip()
    for latent in (tmp_path / "latents").iterdir():
        assert read_latent(latent).recipe is not None, "whatever has a final name is whole"
    assert len(list((tmp_path / "cache" / "conditioning").iterdir())) == 1, "kept with the first picture"


def test_a_preview_is_repeated_to_the_bit_without_its_text_encoders(tmp_path: Path) -> None:
    """Parts in files of their own: the encoders' file is gone when the picture is rendered again."""
    from safetensors.torch import load_file, save_file

    demo = demo_files()
    tensors = load_file(demo.transformer)
    config = _metadata(Path(demo.transformer))
    is_text = {name: name.startswith("text_encoders.") for name in tensors}
    for file, wanted in (("model.safetensors", False), ("text.safetensors", True)):
        save_file({name: t for name, t in tensors.items() if is_text[name] == wanted}, tmp_path / file, config)
    files = ("-m", "model.safetensors", "--tokenizers", Path(demo.t5_tokenizer).parents[1])
    text = ("--text-encoder", "text.safetensors", "--clip", "text.safetensors")
    made = fluxsplit("preview", "-p", PROMPT, "--seed", "7", "--size", "72x64", *files, *text, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    preview = Path(made.stdout.strip())
    assert (preview.parent / "sheet.html").is_file() and (preview.parent / "sheet.png").is_file()
    (tmp_path / "text.safetensors").unlink()
    again = fluxsplit("rerender", "--from", preview, *files, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    result = Path(again.stdout.strip())
    with Image.open(preview) as one, Image.open(result) as other:
        assert one.tobytes() == other.tobytes()
    record = read_record(result)
    assert record.parent is not None and record.parent.name == preview.name and record.recipe is not None
    assert record.recipe.text_encoder.sha256 == read_recipe(preview).text_encoder.sha256 != ""
    shutil.rmtree(preview.parent / "latents")  # the picture is then encoded by the VAE
    larger = fluxsplit("rerender", "--from", preview, "--size", "104x136", "--fit", "centre", *files, cwd=tmp_path)
    assert larger.returncode == 0, larger.stderr
    recipe = read_recipe(Path(larger.stdout.strip()))
    assert recipe.start is not None and recipe.start.keep == "composition" and recipe.steps == 4
    repeated = fluxsplit("rerender", "--from", larger.stdout.strip(), "--out", "again", *files, cwd=tmp_path)
    assert repeated.returncode == 0, repeated.stderr
    with Image.open(larger.stdout.strip()) as one, Image.open(repeated.stdout.strip()) as other:
        assert one.tobytes() == other.tobytes()


def _metadata(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        metadata: dict[str, str] = json.loads(file.read(length)).get("__metadata__", {})
    return metadata


def test_the_same_rerender_again_goes_on_where_the_first_one_ended(tmp_path: Path) -> None:
    """Pictures that are there are left, finished latents only decoded, to the same bytes; `decode` changes nothing."""
    first = fluxsplit("preview", "-p", PROMPT, "--seed", "7..8", "--size", "64x64", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    words = ("rerender", "--from", "previews", "--size", "96x64")
    made = fluxsplit(*words, cwd=tmp_path)
    paths = [Path(line) for line in made.stdout.splitlines()]
    assert made.returncode == 0 and [path.name for path in paths] == ["0001-96x64.png", "0002-96x64.png"]
    before = [path.read_bytes() for path in paths]
    paths[1].unlink()
    again = fluxsplit(*words, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout == made.stdout, again.stderr
    assert "0001-96x64.png is there already" in again.stderr
    assert "0002-96x64.pt was finished before and is only decoded" in again.stderr and "s/step" not in again.stderr
    decoded = fluxsplit("decode", "renders/latents", "--out", "renders", cwd=tmp_path)
    assert decoded.returncode == 0 and "2 were there already, the same" in decoded.stderr
    assert [path.read_bytes() for path in paths] == before and len(list((tmp_path / "renders").glob("*.png"))) == 2
    assert read_record(paths[0]).parent is not None
    told = fluxsplit("info", paths[0], "renders/latents/0001-96x64.pt", cwd=tmp_path).stdout
    assert [line.split()[2] for line in told.splitlines() if "rendered from:" in line] == ["0001.png"] * 2
    dry = fluxsplit(*words, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0 and dry.stdout == "" and "is there already" in dry.stderr
    planned = json.loads(fluxsplit(*words, "--dry-run", "--json", cwd=tmp_path).stdout)
    assert planned["images"] == [] and [Path(path).name for path in planned["there"]] == [path.name for path in paths]
    told = [json.loads(line) for line in fluxsplit(*words, "--json", cwd=tmp_path).stdout.splitlines()]
    assert [(Path(one["source"]).name, one["width"], one["height"]) for one in told] == [
        ("0001-96x64.pt", 96, 64),
        ("0002-96x64.pt", 96, 64),
    ]
    more = fluxsplit("rerender", "previews/0001.png", "--size", "96x64", "--count", "2", cwd=tmp_path)
    assert [Path(line).name for line in more.stdout.splitlines()] == ["0001-96x64.png", "0001-96x64-seed8.png"]
    other = fluxsplit(*words, "--steps", "3", cwd=tmp_path)
    assert [Path(line).name for line in other.stdout.splitlines()] == ["0001-96x64-2.png", "0002-96x64-2.png"]
    in_bf16 = fluxsplit(*words, "--vae-dtype", "bf16", cwd=tmp_path)
    assert "finished before and is only decoded" in in_bf16.stderr and "s/step" not in in_bf16.stderr
    assert [read_record(line).dtype for line in in_bf16.stdout.splitlines()] == ["bf16", "bf16"]
    larger = fluxsplit(*words, "--upscale", "2", cwd=tmp_path)
    names = [Path(line).name for line in larger.stdout.splitlines()]
    assert names == ["0001-96x64.png", "0002-96x64.png", "0001-96x64-2x.png", "0002-96x64-2x.png"]
    once_more = fluxsplit(*words, "--upscale", "2", cwd=tmp_path)
    assert once_more.stdout == larger.stdout and "enlarged" not in once_more.stderr, "nothing is enlarged twice"
    by_decode = fluxsplit(
        "decode", "renders/latents/0001-96x64.pt", "-o", "renders", "-u", "2", "--upscale-tile", "64", cwd=tmp_path
    )
    assert [Path(line).name for line in by_decode.stdout.splitlines()] == ["0001-96x64.png", "0001-96x64-2x.png"]
    assert "enlarged" not in by_decode.stderr and "0001-96x64-2x.png is there already" in by_decode.stderr
    to_size = fluxsplit(*words, "--upscale-to", "160x120", cwd=tmp_path)
    assert [Path(line).name for line in to_size.stdout.splitlines()][2:] == [
        "0001-96x64-160x120.png",
        "0002-96x64-160x120.png",
    ]


def test_a_photo_is_started_from_whatever_its_size(tmp_path: Path) -> None:
    """Not only where its sides are no multiples of 8; at a megapixel at most; by the demo model if none is named."""
    image = Image.new("RGB", (128, 64), "white")
    image.paste((200, 30, 40), (40, 8, 88, 56))
    image.save(tmp_path / "a.png")
    made = fluxsplit("rerender", "a.png", "-p", PROMPT, "--strength", "0.5", cwd=tmp_path)
    assert made.returncode == 0 and "keep image at strength 0.5" in made.stderr and "demo model" in made.stderr
    recipe = read_recipe(made.stdout.strip())
    assert recipe is not None and recipe.start is not None and recipe.start.keep == "image"
    plain = fluxsplit("rerender", "a.png", "-p", PROMPT, "--dry-run", cwd=tmp_path)
    assert "keep image at strength 0.8" in plain.stderr
    image.resize((4032, 3024)).save(tmp_path / "large.jpg")
    large = fluxsplit("rerender", "large.jpg", "-p", PROMPT, "--dry-run", "--json", cwd=tmp_path)
    assert "size 1184x888, the multiple of 8 nearest to 0.293 times its own (--size)" in large.stderr
    assert "starts from" not in large.stdout and json.loads(large.stdout)["images"][0]["width"] == 1184


def test_enlarged_copies_in_a_folder_are_not_rendered_or_encoded_once_more(tmp_path: Path) -> None:
    for words in (("preview", "-p", PROMPT, "--seed", "7", "--size", "64x64"), ("upscale", "previews")):
        assert fluxsplit(*words, cwd=tmp_path).returncode == 0
    again = fluxsplit("rerender", "previews", "--scale", "1.5", cwd=tmp_path)
    assert [Path(line).name for line in again.stdout.splitlines()] == ["0001-96x96.png"], again.stderr
    assert "1 enlarged copy is left out" in again.stderr
    encoded = fluxsplit("encode", "previews", cwd=tmp_path)
    assert [Path(line).name for line in encoded.stdout.splitlines()] == ["0001.pt"], encoded.stderr


def test_what_a_folder_holds_already_is_left_out(tmp_path: Path) -> None:
    words = ("sample", "-p", PROMPT, "-p", "a blue circle", "--seed", "7", "-n", "2", "--size", "64x64")
    first = fluxsplit(*words, cwd=tmp_path)
    paths = first.stdout.splitlines()
    assert first.returncode == 0 and len(paths) == 4
    everything = fluxsplit(*words, "--skip-existing", cwd=tmp_path)
    assert sorted(everything.stdout.splitlines()) == sorted(paths) and "4 of 4 are in" in everything.stderr
    Path(paths[1]).unlink()
    one = fluxsplit(*words, "--skip-existing", "--json", cwd=tmp_path)
    made = [json.loads(line) for line in one.stdout.splitlines()]
    assert "3 of 4 are in" in one.stderr and len(made) == 4
    assert (made[-1]["recipe"]["prompt"], made[-1]["recipe"]["seed"]) == (PROMPT, 8)
    assert len(list((tmp_path / "latents").iterdir())) == 4
    other = fluxsplit(*words, "--skip-existing", "--steps", "3", cwd=tmp_path)
    assert other.returncode == 0 and "already" not in other.stderr and len(other.stdout.splitlines()) == 4


@pytest.mark.skipif(os.name == "nt", reason="nobody kills so there")
@pytest.mark.parametrize("command", ["decode", "upscale"])
def test_a_stage_that_the_system_kills_is_followed_by_one_that_does_the_rest(command: str, tmp_path: Path) -> None:
    """As Linux does where memory runs out; with the real stages, each item once."""
    import psutil

    for number in range(6):
        if command == "decode":
            write_latent(
                tmp_path / "in", f"{number}", struct.pack("<f", number / 10) * 16 * 48 * 48, (1, 16, 48, 48), None
            )
        else:
            (tmp_path / "in").mkdir(exist_ok=True)
            Image.effect_noise((500, 500), 20).convert("RGB").save(tmp_path / "in" / f"{number}.png")
    words = [command, "in", "--out", "out", *(["--vae", "demo"] if command == "decode" else [])]
    command_line = [sys.executable, "-m", "fluxsplit", *words]
    with subprocess.Popen(command_line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        first = run.stdout.readline()
        for stage in psutil.Process(run.pid).children():
            stage.kill()
        rest, told = run.communicate(timeout=300)
    assert run.returncode == 0, told
    assert f"the {command} stage was killed, most likely by the system because memory ran out; its plan was " in told
    assert "trying once more with a smaller plan" in told
    made = [Path(line).name for line in (first + rest).splitlines()]
    names = [f"{number}.png" if command == "decode" else f"{number}-2x.png" for number in range(6)]
    assert list(dict.fromkeys(made)) == names and sorted(file.name for file in (tmp_path / "out").iterdir()) == names


def test_a_preview_that_was_ended_early_goes_on(tmp_path: Path) -> None:
    """Latents without a picture are decoded, those with one told, the rest is numbered on."""
    words = ("preview", "-p", "a blue circle", "--seed", "7..9", "--size", "64x64", "--steps", "1", "--skip-existing")
    first = fluxsplit(*words, cwd=tmp_path)
    pictures = tmp_path / "previews"
    assert first.returncode == 0 and len(first.stdout.split()) == 3
    for lost in ("latents/0002.pt", "0002.png", "0003.png"):
        (pictures / lost).unlink()
    again = fluxsplit(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [Path(line).name for line in again.stdout.split()] == ["0001.png", "0003.png", "0004.png"]
    assert "2 of 3 are in" in again.stderr and "image: 1 step" in again.stderr
    assert [read_recipe(pictures / f"000{n}.png").seed for n in (1, 3, 4)] == [7, 9, 8]
    done = fluxsplit(*words, cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout.split()) == 3 and "step" not in done.stderr
    dry = fluxsplit(*words, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0 and not list(pictures.glob("0005*"))
