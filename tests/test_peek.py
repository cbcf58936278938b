"""Previews of latents: the linear map against its formula, against the VAE, and TAEF1's decoder."""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file
from samples import make_recipe

from fluxsplit import cli_peek
from fluxsplit.errors import FluxsplitError, ModelFileMissing
from fluxsplit.events import Events
from fluxsplit.jobs import PeekJob
from fluxsplit.latents import read_latent, write_latent
from fluxsplit.metadata import read_record
from fluxsplit.models import DEMO_FOLDER
from fluxsplit.peek import FLUX, PeekMap, demo_map, draw, map_for, write_peek
from fluxsplit.progress import Progress
from fluxsplit.recipe import Recipe, WeightsStamp
from fluxsplit.stage_peek import run, taef1
from fluxsplit.state_dict import read_state_dict
from fluxsplit.taef1 import find_taef1, peek_beside


def payload(height: int, width: int, seed: int = 0) -> bytes:
    """Random VAE-space latents, with some that are far out."""
    rng = random.Random(seed)
    return array("f", [rng.gauss(0, 3) for _ in range(16 * height * width)]).tobytes()


def formula(raw: bytes, height: int, width: int, peek_map: PeekMap) -> Image.Image:
    """The map as its docstring states it, value by value."""
    values = memoryview(raw).cast("f")
    side = peek_map.cells
    image = Image.new("RGB", (width * side, height * side))
    for y in range(height * side):
        for x in range(width * side):
            at = (y // side) * width + x // side
            place = (y % side) * side + x % side
            latent = [(values[c * height * width + at] - peek_map.shift) * peek_map.scaling for c in range(16)]
            levels = []
            for colour in range(3):
                row, bias = peek_map.weights[3 * place + colour], peek_map.bias[3 * place + colour]
                unit = sum(w * value for w, value in zip(row, latent, strict=True)) + bias
                levels.append(round(min(max(127.5 * (unit + 1), 0), 255)))
            image.putpixel((x, y), tuple(levels))
    return image


def test_flux_map_is_its_formula_one_pixel_a_latent() -> None:
    raw = payload(5, 7)
    wanted = formula(raw, 5, 7, FLUX).resize((14, 10), Image.Resampling.BICUBIC)
    made = draw(raw, 5, 7, FLUX)
    assert made.size == (14, 10)
    assert max(abs(a - b) for a, b in zip(made.tobytes(), wanted.tobytes(), strict=True)) <= 1


def test_demo_map_is_its_formula_four_pixels_a_latent() -> None:
    raw = payload(3, 4)
    made, wanted = draw(raw, 3, 4, demo_map()), formula(raw, 3, 4, demo_map())
    assert made.size == wanted.size == (8, 6)
    assert max(abs(a - b) for a, b in zip(made.tobytes(), wanted.tobytes(), strict=True)) <= 1


def test_which_map() -> None:
    assert map_for("flux-demo.safetensors") == demo_map()
    assert map_for("flux1-schnell-fp8.safetensors") is map_for("") is FLUX


def test_the_demo_map_draws_what_the_demo_vae_draws(tmp_path: Path) -> None:
    """Latents of a drawn scene; the mean of 4x4 of the VAE's pixels is the preview's pixel, nearly."""
    import numpy as np

    from fit_peek import decoded, drawn
    from fluxsplit import checkpoint
    from fluxsplit.latent_space import latent_space
    from fluxsplit.models import demo_files
    from fluxsplit.tiled_vae import TiledVae
    from fluxsplit.vae import load_vae
    from fluxsplit.weights import WeightFiles

    file = demo_files().vae
    space = latent_space(checkpoint.describe(file).config.get("vae", {}))
    vae = TiledVae(load_vae(checkpoint.part(file, "vae"), WeightFiles(), torch.device("cpu")), "fp32").module
    [(latents, pixels)] = decoded(vae, drawn(1, 99), space.scaling, space.shift)
    raw = space.to_vae(latents).contiguous().view(torch.uint8).numpy().tobytes()
    made = np.asarray(draw(raw, *latents.shape[2:], demo_map()), np.float32)
    wanted = (torch.nn.functional.avg_pool2d(pixels, 4)[0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert float(np.sqrt(((made - wanted) ** 2).mean())) < 8


def demo_recipe(side: int) -> Recipe:
    return replace(make_recipe(width=side, height=side), transformer=WeightsStamp("flux-demo.safetensors", "a" * 64))


def test_a_preview_carries_the_recipe(tmp_path: Path) -> None:
    path = write_latent(tmp_path, "x", payload(4, 4), (1, 16, 4, 4), demo_recipe(32))
    made = write_peek(read_latent(path), tmp_path, "x")
    assert made == tmp_path / "x.peek.png"
    record = read_record(made)
    assert record.recipe == demo_recipe(32) and record.vae.name == "linear map of the demo model's latents"
    with Image.open(made) as image:
        assert image.size == (8, 8)
    assert write_peek(read_latent(path), tmp_path, "x").name == "x.peek.png", "the same is not written twice"
    (tmp_path / "x.peek.png").write_bytes(b"another")
    assert write_peek(read_latent(path), tmp_path, "x").name == "x-2.peek.png"
    assert write_peek(read_latent(path), tmp_path, "x", overwrite=True) == made


def peeked(tmp_path: Path, **given: Any) -> tuple[int, list[str], str]:
    out, err = io.StringIO(), io.StringIO()
    with Progress(out=out, err=err) as progress:
        code = cli_peek.peek({"latents": [str(tmp_path)], **given}, {}, progress)
    return code, out.getvalue().splitlines(), err.getvalue()


def test_one_bad_latent_does_not_stop_the_rest(tmp_path: Path) -> None:
    write_latent(tmp_path, "a", payload(4, 4), (1, 16, 4, 4), None)
    (tmp_path / "b.pt").write_bytes(b"PK\x03\x04 bad")
    write_latent(tmp_path, "c", payload(4, 6), (1, 16, 4, 6), None, format="latent")
    code, made, err = peeked(tmp_path, out=str(tmp_path / "o"))
    assert code == 1 and [Path(path).name for path in made] == ["a.peek.png", "c.peek.png"] and "b.pt" in err


def test_a_single_bad_latent_is_the_error(tmp_path: Path) -> None:
    (tmp_path / "b.pt").write_bytes(b"PK\x03\x04 bad")
    with pytest.raises(FluxsplitError, match=r"b\.pt"):
        peeked(tmp_path)


def test_no_heavy_module_is_loaded_and_the_process_stays_small(tmp_path: Path) -> None:
    path = write_latent(tmp_path, "a", payload(64, 64), (1, 16, 64, 64), None)
    script = (
        "import sys\nfrom fluxsplit.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    print(end.code, *sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "peek", str(path)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    code, *modules = done.stderr.split()
    assert code == "0" and done.stdout.strip() == str(tmp_path / "a.peek.png")
    assert not set(modules) & {"torch", "numpy", "diffusers", "transformers", "rich"}


# -- TAEF1 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> AutoencoderTiny:
    """diffusers' own model of TAEF1's dimensions, with random weights."""
    torch.manual_seed(0)
    return AutoencoderTiny(latent_channels=16, scaling_factor=1.0, shift_factor=0.0).eval()


def as_bare_decoder(model: AutoencoderTiny) -> dict[str, torch.Tensor]:
    """As `taef1_decoder` names it: the clamp is layer 0."""
    named = {}
    for key, value in model.decoder.state_dict().items():
        _, number, rest = key.split(".", 2)
        named[f"{int(number) + 1}.{rest}"] = value.clone()
    return named


@pytest.mark.parametrize("form", ["bare.safetensors", "bare.pth", "diffusers.safetensors"])
def test_taef1_in_every_form_draws_as_diffusers_does(tmp_path: Path, tiny: AutoencoderTiny, form: str) -> None:
    file = tmp_path / form
    state = as_bare_decoder(tiny) if "bare" in form else {k: v.clone() for k, v in tiny.state_dict().items()}
    torch.save(state, file) if form.endswith("pth") else save_file(state, file)
    path = write_latent(tmp_path, "x", payload(4, 6), (1, 16, 4, 6), make_recipe(width=48, height=32))
    stream = io.StringIO()
    run(PeekJob((str(path), str(tmp_path / "gone.pt")), str(file), "cpu"), Events(stream))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["result", "decode", "failed", "decode"]
    latents = torch.frombuffer(bytearray(read_latent(path).payload), dtype=torch.float32).view(1, 16, 4, 6)
    with torch.inference_mode():
        theirs = tiny.decode((latents - 0.1159) * 0.3611).sample[0]
    wanted = ((theirs.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    with Image.open(events[0]["path"]) as image:
        assert image.size == (48, 32) and image.tobytes() == wanted.tobytes()
    assert read_record(events[0]["path"]).vae.name == form


def test_taef1_draws_large_latents_small(tmp_path: Path, tiny: AutoencoderTiny) -> None:
    """Whole, it would hold 1.2 KB for each of a picture's pixels."""
    save_file(as_bare_decoder(tiny), tmp_path / "taef1.safetensors")
    path = write_latent(tmp_path, "x", payload(40, 128), (1, 16, 40, 128), None)
    stream = io.StringIO()
    run(PeekJob((str(path),), str(tmp_path / "taef1.safetensors"), "cpu"), Events(stream))
    with Image.open(json.loads(stream.getvalue().splitlines()[0])["path"]) as image:
        assert image.size == (768, 240)


def test_a_taef1_that_nobody_named_is_not_relied_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "ComfyUI" / "models" / "vae_approx"
    folder.mkdir(parents=True)
    (folder / "taef1_decoder.safetensors").write_bytes(b"junk")
    path = write_latent(tmp_path, "x", payload(4, 6), (1, 16, 4, 6), None)
    given: dict[str, Any] = {"latents": [str(path)], "comfyui": "ComfyUI"}
    with Progress() as progress:
        assert cli_peek.peek(given, {}, progress) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(tmp_path / "x.peek.png") and "so the linear map draws" in told.err
    with Progress() as progress, pytest.raises(FluxsplitError, match="taef1_decoder"):
        cli_peek.peek({**given, "decoder": "taef1_decoder"}, {}, progress)
    (tmp_path / "x.peek.png").unlink()
    with Progress() as progress:
        peek_beside([str(path)], str(folder / "taef1_decoder.safetensors"), "cpu", progress)
    assert (tmp_path / "x.peek.png").stat().st_size


def test_what_is_not_taef1_is_refused(tmp_path: Path) -> None:
    save_file({"0.weight": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(FluxsplitError, match="is not TAEF1's decoder"):
        taef1(read_state_dict(tmp_path / "x.safetensors"), "x")


def test_where_taef1_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "ComfyUI"
    folder = root / "models" / "vae_approx"
    folder.mkdir(parents=True)
    assert find_taef1("auto", root) == ""
    cached = tmp_path / "hub/models--madebyollin--taef1/snapshots/1/diffusion_pytorch_model.safetensors"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"x")
    assert find_taef1("auto", root) == str(cached)
    (folder / "taef1_decoder.pth").write_bytes(b"x")
    assert find_taef1("auto", root) == find_taef1("taef1_decoder", root) == str(folder / "taef1_decoder.pth")
    assert find_taef1(str(cached), None) == str(cached)
    with pytest.raises(ModelFileMissing, match="--decoder other"):
        find_taef1("other", root)


def test_each_step_is_shown_of_the_first_picture(tmp_path: Path) -> None:
    from fluxsplit.latent_space import LatentSpace
    from fluxsplit.peek_steps import LivePeek
    from fluxsplit.png_text import read_png

    recipes = {3: make_recipe(width=32, height=32), 4: make_recipe(width=32, height=32)}
    live = LivePeek(str(tmp_path), "/x/flux-demo.safetensors", LatentSpace(0.5, 0.1), recipes)
    clean = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    live.show(4, 1, clean)
    assert not list(tmp_path.iterdir())
    for step in (1, 2):
        live.show(3, step, clean)
        assert read_png(tmp_path / "peek.png").texts["Comment"].startswith(f"step {step} of 4")
    with Image.open(tmp_path / "peek.png") as image:
        raw = LatentSpace(0.5, 0.1).to_vae(clean).contiguous().view(torch.uint8).numpy().tobytes()
        assert image.tobytes() == draw(raw, 4, 4, demo_map()).tobytes()


def test_sample_peeks_with_taef1_where_it_is(tmp_path: Path, tiny: AutoencoderTiny) -> None:
    folder = tmp_path / "ComfyUI" / "models" / "vae_approx"
    folder.mkdir(parents=True)
    save_file(as_bare_decoder(tiny), folder / "taef1_decoder.safetensors")
    shutil.copy(DEMO_FOLDER / "flux-demo.safetensors", tmp_path / "flux.safetensors")
    words = ["sample", "-p", "a red circle", "--seed", "7", "--size", "64x64", "--steps", "1", "--peek", "--no-cache"]
    words += ["--model", "flux.safetensors", "--tokenizers", str(DEMO_FOLDER / "tokenizers"), "--comfyui", "ComfyUI"]
    command = [sys.executable, "-m", "fluxsplit", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (latent,) = done.stdout.split()
    peek = Path(latent).with_suffix(".peek.png")
    assert read_record(peek).vae.name == "taef1_decoder.safetensors"
    with Image.open(peek) as image:
        assert image.size == (64, 64)
