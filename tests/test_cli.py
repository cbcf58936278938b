"""The command line: arguments → jobs or an error, with stages that compute nothing."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from headers import Shapes, all_in_one, clip, t5, tokenizers, transformer, vae, write

from fluxsplit import cli, models, sample_run
from fluxsplit.arguments import files_in, gather_files, named, prompt_warnings
from fluxsplit.conditioning_header import payload_sha256
from fluxsplit.errors import UsageError, refusal
from fluxsplit.fingerprint import file_sha256
from fluxsplit.metadata import encode_png
from fluxsplit.sample_run import decoding
from fluxsplit.settings import WORKFLOW
from fluxsplit.torch_file import ZIP_MAGIC

FAKE_STAGE = Path(__file__).parent / "fake_stage.py"


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: list[str]
    err: str
    log: list[dict[str, Any]]

    def job(self, stage: str) -> dict[str, Any]:
        """The one job of a stage."""
        (job,) = [entry["job"] for entry in self.log if entry["what"] == "job" and entry["stage"] == stage]
        return job

    @property
    def images(self) -> list[dict[str, Any]]:
        """The images of the sample job."""
        return self.job("sample")["images"]


Run = Callable[..., Ran]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bare machine with a demo model, and the folder in which commands run."""
    for name in [name for name in os.environ if name.startswith("FLUXSPLIT_")] + ["HF_HOME", "HF_HUB_CACHE"]:
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name.lower()))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(models, "DEMO_FOLDER", tmp_path / "demo")
    demo = write(tmp_path / "demo" / "flux-demo.safetensors", all_in_one())
    tokenizers(tmp_path / "demo" / "tokenizers")
    monkeypatch.setenv("FAKE_SHA256", file_sha256(demo))
    monkeypatch.setattr("fluxsplit.executor.stage_command", lambda stage: [sys.executable, str(FAKE_STAGE), stage])
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line as the installed command would, in this process."""

    def run_command(*words: str | Path, stdin: str | None = None) -> Ran:
        stream = io.TextIOWrapper(io.BytesIO((stdin or "").encode()), "utf-8")
        monkeypatch.setattr(stream, "isatty", lambda: stdin is None, raising=False)
        monkeypatch.setattr("sys.stdin", stream)
        (tmp_path / "log").unlink(missing_ok=True)
        with pytest.raises(SystemExit) as caught:
            cli.main([str(word) for word in words])
        printed = capfd.readouterr()
        log = (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
        code = caught.value.code
        assert isinstance(code, int)
        return Ran(code, printed.out.splitlines(), printed.err, [json.loads(line) for line in log])

    return run_command


def test_settings_that_the_demo_model_has_no_use_for_are_told(run: Run, home: Path) -> None:
    (home / "fluxsplit.toml").write_text('vae = "ae.safetensors"\ntokenizers = "folder"\n')
    ran = run("sample", "-p", "a red circle", "--seed", "7")
    assert ran.code == 0
    assert "using the demo model, which has its own parts; 'vae', 'tokenizers' in the settings are not used" in ran.err
    (home / "fluxsplit.toml").unlink()
    assert "settings" not in run("sample", "-p", "a red circle", "--seed", "8").err


@pytest.mark.parametrize(
    ("seed", "hint"),
    [
        ("-1", "without --seed one is drawn and told"),
        ("random", "without --seed one is drawn and told"),
        ("1, 2,3", "give --seed once for each: --seed 1 --seed 2 --seed 3"),
        ("seven", "write it as 7 or 7..15"),
    ],
)
def test_seeds_as_other_tools_write_them_are_answered(run: Run, seed: str, hint: str) -> None:
    ran = run("sample", "-p", "a red circle", "--seed", seed)
    assert ran.code == 2 and hint in ran.err and not ran.log


def test_sample_with_the_demo_model(run: Run, home: Path) -> None:
    ran = run("sample", "-p", "a red circle", "--seed", "7")
    assert ran.code == 0
    assert ran.out == [str(home / "latents" / "latent-7.pt")]
    assert "no model given: using the demo model" in ran.err
    (image,) = ran.images
    assert (image["prompt"], image["seed"], image["width"], image["height"]) == ("a red circle", 7, 256, 256)
    assert image["steps"] is image["guidance"] is image["shift"] is None
    assert ran.job("text")["prompts"] == ["a red circle"]
    assert ran.job("sample")["files"]["is_demo"] is True


def test_the_text_stage_is_gone_before_the_transformer_is_touched(run: Run) -> None:
    ran = run("sample", "-p", "x", "--seed", "1")
    order = [(entry["what"], entry["stage"]) for entry in ran.log]
    assert order.index(("done", "text")) < order.index(("job", "sample"))
    assert order.index(("start", "sample")) < order.index(("done", "sample"))
    conditioning = ran.images[0]["conditioning"]
    assert not Path(conditioning).exists() and not Path(conditioning).parent.exists()


def test_every_prompt_with_every_seed(run: Run) -> None:
    ran = run("sample", "-p", "a", "-p", "b", "-p", "a", "--seed", "7..8", "--seed", "20", "-n", "2", "--size", "64×32")
    assert [(image["prompt"], image["seed"]) for image in ran.images] == [
        (prompt, seed) for prompt in "ab" for seed in (7, 8, 9, 20, 21)
    ]
    assert len(ran.job("text")["prompts"]) == 2
    assert {image["conditioning"] for image in ran.images if image["prompt"] == "b"} == {ran.job("text")["outputs"][1]}
    assert {(image["width"], image["height"]) for image in ran.images} == {(64, 32)}


def test_seeds_are_drawn_and_printed(run: Run) -> None:
    ran = run("sample", "-p", "a", "--size", "64x64")
    assert f"fluxsplit: seed {ran.images[0]['seed']}\n" in ran.err
    assert 0 <= ran.images[0]["seed"] < 2**32
    assert run("sample", "-p", "a", "--size", "64x64").images[0]["seed"] != ran.images[0]["seed"]


def test_every_flag_arrives(run: Run, home: Path) -> None:
    ran = run(
        "sample", "-p", "a", "--negative", "blur", "--cfg", "2", "--seed", 2**64 - 1, "--size", "16x24", "--steps", "3",
        "--scheduler", "beta", "--shift", "1.15", "--sampler", "heun", "--noise-index", "2", "--dtype", "bf16",
        "--device", "cpu", "-o", "o", "--format", "latent",
    )  # fmt: skip
    image = ran.images[0]
    expected = {
        "negative": "blur",
        "cfg": 2.0,
        "seed": 2**64 - 1,
        "width": 16,
        "height": 24,
        "steps": 3,
        "scheduler": "beta",
        "shift": 1.15,
        "sampler": "heun",
        "noise_index": 2,
    }
    assert {name: image[name] for name in expected} == expected
    assert ran.job("text")["prompts"] == ["a", "blur"]
    assert image["negative_conditioning"] == ran.job("text")["outputs"][1]
    job = ran.job("sample")
    assert (job["dtype"], job["device"], job["format"], job["out"]) == ("bf16", "cpu", "latent", str(home / "o"))
    assert ran.out == [str(home / "o" / f"latent-{2**64 - 1}.latent")]


def test_sigmas(run: Run) -> None:
    assert run("sample", "-p", "a", "--sigmas", "1, 0.5 0").images[0]["sigmas"] == [1.0, 0.5, 0.0]


def test_prompts_from_a_file_and_from_stdin(run: Run, home: Path) -> None:
    (home / "prompts.txt").write_text("\ufeffone\n\n# no\n  two  \r\n", "utf-8")
    assert run("sample", "--prompt-file", "prompts.txt").job("text")["prompts"] == ["one", "two"]
    assert run("sample", stdin="drei ä\nvier\n").job("text")["prompts"] == ["drei ä", "vier"]
    assert run("sample", "-p", "x", "-p", "-", stdin="y\n").job("text")["prompts"] == ["x", "y"]
    assert run("sample", "-p", "x", stdin="y\n").job("text")["prompts"] == ["x"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-p", "a", "--size", "1000x1001"], "not a multiple of 8; the nearest that work are 1000x1000 and 1000x1008"),
        (["-p", "a", "--size", "big"], "size 'big' is not WIDTHxHEIGHT"),
        (["-p", "a", "--size", "0x64"], "width 0 is outside"),
        (["-p", "a", "--seed", "-1"], "seed '-1' is neither a number nor a range"),
        (["-p", "a", "--seed", "18446744073709551616"], "goes beyond 2^64-1"),
        (["-p", "a", "--seed", "18446744073709551615", "-n", "2"], "with --count 2 goes beyond 2^64-1"),
        (["-p", "a", "--seed", "9..7"], "runs backwards; write it as 7..9"),
        (["-p", "a", "--seed", "0..99999999999"], "one run makes at most 10000 images"),
        (["-p", "a", "-n", "0"], "count 0 is outside 1..10000"),
        (["-p", "a", "--negative", "b"], "a negative prompt has no effect with --cfg 1"),
        (["-p", "a", "--cfg", "nan"], "--cfg nan is outside"),
        (["-p", "a", "--cfg", "0"], "give --cfg 1 for no true guidance"),
        (["-p", "a", "--sigmas", "1,2,0"], "do not fall from at most 1 to 0"),
        (["-p", "a", "--sigmas", "1,x,0"], "are not numbers"),
        (["-p", "a", "--sigmas", "1,0", "--steps", "4"], "2 sigmas make 1 steps, not 4"),
        (["-p", "a", "--sigmas", "1,0", "--shift", "1"], "--shift has no effect"),
        (["-p", "a", "--sigmas", "1,0", "--scheduler", "beta"], "--scheduler has no effect"),
        (["-p", "a", "--sampler", "eular"], "is not one of euler, heun, dpmpp_2m; did you mean euler?"),
        (["-p", "a", "--scheduler", "karras"], "is not one of simple, normal"),
        (["-p", "a", "--shift", "big"], "shift 'big' is neither auto nor a number"),
        (["-p", "a", "--shift", "inf"], "outside -100..100"),
        (["-p", "a", "--steps", "0"], "--steps 0 is outside 1..1000"),
        (["-p", "a", "--noise-index", "-1"], "--noise-index -1 is outside"),
        (["-p", "a", "--dtype", "fp8"], "--dtype 'fp8' is not one of"),
        (["-p", "a", "--format", "png"], "--format 'png' is not one of"),
        (["-p", "a", "--device", "gpu"], "device 'gpu' is not known"),
        (["-p", "a", "--guidance", "3"], "is schnell, which takes none"),
        (["-p", "a", "--vae", "x"], "--vae is given without --model"),
        (["-p", "a", "-p", "b", "--save-conditioning", "c"], "keeps one prompt, 2 are given"),
        (["-p", "a", "--conditioning", "nope"], "there is no such file; make one with --save-conditioning"),
        (["--conditioning", "x", "--save-conditioning", "y"], "would copy"),
        (["-p", "a", "--conditioning", "x", "--cfg", "2"], "needs the text encoders"),
        (["-p", "\udcff"], "is not valid text"),
        (["-p", "a" * 100_001], "100001 characters"),
        (["--prompt-file", "nope.txt"], "nope.txt cannot be read: No such file"),
        ([], "there is no prompt"),
    ],
)  # fmt: skip
def test_usage_errors_of_sample(run: Run, words: list[str], said: str) -> None:
    ran = run("sample", *words)
    assert said in ran.err, ran.err
    assert ran.code == 2
    assert ran.out == [] and ran.log == []
    assert len(ran.err.strip().splitlines()) == 1 and ran.err.startswith("fluxsplit: ")


@pytest.mark.parametrize("words", [["sample", "--steps", "x"], ["sample", "--modle", "x"], ["smaple"], ["decode"], []])
def test_usage_errors_of_the_parser(run: Run, words: list[str]) -> None:
    assert run(*words).code == 2


def test_an_empty_pipe_is_no_prompt(run: Run) -> None:
    ran = run("sample", stdin="\n# nothing\n")
    assert (ran.code, ran.err) == (2, "fluxsplit: stdin holds no prompt; write one prompt a line\n")
    assert "there is no prompt; give one, as --prompt" in run("sample", stdin="\n").err
    alone = run("sample", "a red circle")
    assert alone.code == 2 and "(a red circle); a prompt is given as --prompt" in alone.err


def test_a_folder_of_previews_stands_for_its_latents(run: Run, home: Path) -> None:
    run("preview", "-p", "a", "--seed", "1..2")
    for folder in ("previews", "previews/latents"):
        ran = run("decode", folder)
        assert [Path(name).name for name in ran.job("decode")["latents"]] == ["0001.pt", "0002.pt"], ran.err


def test_the_gallery_checks_what_it_is_given_before_it_starts(run: Run, home: Path) -> None:
    (home / "previews").mkdir()
    (home / "file").touch()
    wrong = run("gallery", "--no-open", "--rerender", "--modle x")
    assert wrong.code == 2 and "No such option: --modle" in wrong.err and wrong.out == []
    wrong = run("gallery", "--no-open", "--renders", "file")
    assert wrong.code == 2 and "--renders file is not a folder" in wrong.err


def real_model(folder: Path, shapes: Shapes | None = None) -> Path:
    """A model in a file of its own, with tokenizers beside it."""
    tokenizers(folder / "tokenizers")
    return write(folder / "flux.safetensors", all_in_one() if shapes is None else shapes)


def test_a_model_of_ones_own(run: Run, tmp_path: Path) -> None:
    ran = run("sample", "-p", "a", "-m", real_model(tmp_path / "m", all_in_one(dev=True)), "--guidance", "2")
    assert (ran.images[0]["width"], ran.images[0]["guidance"]) == (1024, 2.0)
    assert "demo" not in ran.err


def test_parts_that_were_found_are_told(run: Run, tmp_path: Path) -> None:
    model = real_model(tmp_path / "m", transformer())
    write(tmp_path / "m" / "encoder.safetensors", t5())
    write(tmp_path / "m" / "l.safetensors", clip())
    ran = run("sample", "-p", "a", "-m", model)
    assert f"T5 found: {tmp_path / 'm' / 'encoder.safetensors'}" in ran.err
    assert ran.code == 0


def test_missing_model_files_exit_with_3(run: Run, tmp_path: Path) -> None:
    assert run("sample", "-p", "a", "-m", "nope.safetensors").code == 3
    ran = run("sample", "-p", "a", "-m", write(tmp_path / "t.safetensors", transformer()))
    assert ran.code == 3 and "comfyanonymous/flux_text_encoders" in ran.err and ran.log == []
    assert "encoded already by --conditioning" in ran.err


def conditioning_file(path: Path, prompt: str = "a fox") -> Path:
    return write(path, {"t5": (1, 8, 4096), "pooled": (1, 768)}, "F32", {"prompt": json.dumps(prompt)})


def test_a_conditioning_needs_no_text_stage(run: Run, tmp_path: Path) -> None:
    model = write(tmp_path / "t.safetensors", transformer())
    file = conditioning_file(tmp_path / "c.safetensors")
    ran = run("sample", "-m", model, "--conditioning", file, "--seed", "1..2")
    assert [entry["stage"] for entry in ran.log if entry["what"] == "start"] == ["sample"]
    assert {(image["prompt"], image["conditioning"]) for image in ran.images} == {("a fox", str(file))}
    assert ran.job("sample")["files"]["text_encoder"] == ""
    assert run("sample", "-m", model, "--conditioning", file, "-p", "a fox").images[0]["prompt"] == "a fox"
    other = run("sample", "-m", model, "--conditioning", file, "-p", "a dog")
    assert other.code == 2 and "made of the prompt 'a fox', not of 'a dog'" in other.err
    assert run("sample", "-m", model, "--conditioning", file, "-p", "a", "-p", "b").code == 2


def test_what_is_no_conditioning(run: Run, tmp_path: Path) -> None:
    ran = run("sample", "--conditioning", write(tmp_path / "c.safetensors", vae()))
    assert ran.code == 1 and "a conditioning holds t5 and pooled" in ran.err


@pytest.mark.parametrize(
    ("t5_shape", "pooled", "says"),
    [
        ((1, 8, 2048), (1, 768), "t5 is [1, 8, 2048], this transformer takes a width of 4096"),
        ((1, 8, 4096), (1, 512), "pooled is [1, 512], this transformer takes a width of 768"),
        ((8, 4096), (1, 768), "a conditioning holds t5 [1, T, D] and pooled [1, P]"),
        ((2, 8, 4096), (1, 768), "a conditioning holds t5 [1, T, D] and pooled [1, P]"),
        ((1, 0, 4096), (1, 768), "a conditioning holds t5 [1, T, D] and pooled [1, P]"),
        ((1, 8, 4096), (768,), "a conditioning holds t5 [1, T, D] and pooled [1, P]"),
    ],
)
def test_what_is_no_conditioning_of_this_model_is_refused_before_anything_starts(
    run: Run, tmp_path: Path, t5_shape: tuple[int, ...], pooled: tuple[int, ...], says: str
) -> None:
    model = write(tmp_path / "t.safetensors", transformer())
    file = write(tmp_path / "c.safetensors", {"t5": t5_shape, "pooled": pooled}, "F32")
    for words in ([], ["--dry-run"]):
        ran = run("sample", "-m", model, "--conditioning", file, "-p", "a", *words)
        assert ran.code == 1 and says in ran.err and not ran.log


def test_previews_of_a_conditioning(run: Run, tmp_path: Path) -> None:
    model = write(tmp_path / "t.safetensors", transformer())
    file = conditioning_file(tmp_path / "c.safetensors")
    ran = run("preview", "-m", model, "--conditioning", file, "-n", "2", "--vae", "demo")
    assert {(image["prompt"], image["conditioning"]) for image in ran.images} == {("a fox", str(file))}
    assert "text" not in {entry["stage"] for entry in ran.log}


def test_the_text_stage_knows_what_comes_after_it(run: Run) -> None:
    """So that it can refuse what would not fit, before it encodes."""
    ran = run("sample", "-p", "a", "--size", "64x64", "--vram", "2G")
    assert ran.job("text")["then"] == ran.job("sample")
    assert ran.job("text")["then"]["images"][0]["conditioning"] == ran.job("text")["outputs"][0]


def test_save_conditioning(run: Run, home: Path) -> None:
    ran = run("sample", "-p", "a", "--cfg", "2", "--save-conditioning", "c.safetensors")
    assert ran.job("text")["outputs"][0] == str(home / "c.safetensors")
    assert (home / "c.safetensors").read_text() == "a"
    again = run("sample", "-p", "a", "--save-conditioning", "c.safetensors")
    assert again.code == 2 and "is there already" in again.err


def test_some_failed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "seed 8")
    ran = run("sample", "-p", "a", "--seed", "7..9", "-q")
    assert (ran.code, len(ran.out)) == (1, 2)
    assert ran.err == "fluxsplit: seed 8: NaN at step 2; try --dtype fp32\n"


@pytest.mark.parametrize("stage", ["text", "sample", "decode"])
def test_out_of_memory_exits_with_4(run: Run, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    latent = run("sample", "-p", "a", "--seed", "1").out[0]
    monkeypatch.setenv("FAKE_FAIL", f"{stage} out of memory")
    words = ["decode", latent] if stage == "decode" else ["sample", "-p", "a", "-q", "--seed", "1"]
    ran = run(*words)
    assert ran.code == 4 and ran.err.endswith("fluxsplit: no room; smaller --size\n")
    debug = run(*words, "--debug")
    assert "Traceback of the stage" in debug.err and debug.err.endswith("fluxsplit: no room; smaller --size\n")
    assert debug.code == 4


@pytest.mark.parametrize("how", ["out of memory", "is killed"])
@pytest.mark.parametrize("stage", ["decode", "encode", "upscale"])
def test_what_ran_out_of_memory_goes_on_with_a_smaller_plan(
    run: Run, monkeypatch: pytest.MonkeyPatch, home: Path, stage: str, how: str
) -> None:
    latents = run("sample", "-p", "a", "--seed", "1..3").out
    pictures = [str(home / f"{n}.png") for n in range(3)]
    for picture in pictures:
        Path(picture).touch()
    monkeypatch.setenv("FAKE_FAIL", f"{stage} {how} at the second")
    ran = run("decode", *latents) if stage == "decode" else run(stage, *pictures)
    assert (ran.code, len(ran.out)) == (0, 3), ran.err
    why = "no room" if how == "out of memory" else f"the {stage} stage was killed, most likely by the system because"
    assert why in ran.err and "its plan was plan 0; trying once more with a smaller plan" in ran.err
    first, second = (entry["job"] for entry in ran.log if entry["what"] == "job" and entry["stage"] == stage)
    items = "latents" if stage == "decode" else "images"
    assert (first["smaller"], second["smaller"]) == (0, 1) and second[items] == first[items][1:]


def test_text_that_ran_out_of_memory_is_encoded_on_the_cpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "text is killed")
    ran = run("sample", "-p", "a", "--vram", "2G")
    assert ran.code == 0 and "its plan was a card; trying once more with the CPU" in ran.err
    first, second = (entry["job"] for entry in ran.log if entry["what"] == "job" and entry["stage"] == "text")
    assert (first["device"], first["vram"], second["device"]) == ("auto", "2G", "cpu")
    there = run("sample", "-p", "a", "--device", "cpu")
    assert there.code == 0


def test_a_second_time_out_of_memory_tells_the_second_plan(
    run: Run, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    (latent,) = run("sample", "-p", "a", "--seed", "1").out
    monkeypatch.setenv("FAKE_FAIL", "decode is always killed")
    ran = run("decode", latent)
    assert ran.code == 4 and ran.err.splitlines()[-1].endswith(
        "because memory ran out; its plan was plan 1; close other programs, or give less by --vram"
    )


def test_the_machine_settings_of_the_vae(run: Run) -> None:
    latent = run("sample", "-p", "a", "--seed", "1").out[0]
    words = ("--vram", "8G", "--vae-dtype", "bf16", "--tile", "512")
    job = run("decode", latent, *words).job("decode")
    assert (job["vram"], job["dtype"], job["tile"], job["smaller"]) == ("8G", "bf16", 512, 0)
    assert run("decode", latent, "--dtype", "fp16").job("decode")["dtype"] == "fp16"
    for bad in (("--vram", "lots"), ("--vram", "0G"), ("--vram", "120%"), ("--tile", "63"), ("--vae-dtype", "fp8")):
        ran = run("decode", latent, *bad)
        assert ran.code == 2 and bad[1] in ran.err, ran.err


def test_encode(run: Run, home: Path) -> None:
    (home / "a.png").touch()
    ran = run("encode", "a.png", "--size", "64x32", "--format", "latent", "--vram", "50%")
    assert ran.code == 0 and "demo model" in ran.err
    job = ran.job("encode")
    assert job["images"] == [str(home / "a.png")] and (job["width"], job["height"]) == (64, 32)
    assert (job["format"], job["out"], job["vram"]) == ("latent", str(home / "latents"), "50%")
    assert job["fit"] == "cut" and run("encode", "a.png", "--fit", "stretch").job("encode")["fit"] == "stretch"
    assert run("encode", "a.png", "--fit", "centre").code == 2
    assert run("encode", "a.png", "--size", "63x32").code == 2
    assert run("encode", "a.png", "--vae", "nowhere.safetensors").code == 3


@pytest.mark.parametrize("command", ["decode", "encode", "upscale", "peek"])
def test_files_that_are_not_there_are_a_mistake_in_the_command(run: Run, home: Path, command: str) -> None:
    alone = run(command, "a.png")
    assert alone.code == 2 and alone.out == [] and "a.png does not exist" in alone.err and not alone.log
    assert "a.png does not exist, nor do the 2 others" in run(command, "a.png", "b.png", "c.png").err
    assert "a.png does not exist, nor does the other one" in run(command, "a.png", "b.png").err


def test_a_dry_run_says_that_nothing_can_be_written(run: Run, home: Path) -> None:
    (home / "taken").write_text("a file")
    (home / "a.png").touch()
    (latent,) = run("sample", "-p", "a", "--seed", "1").out
    commands = ("sample -p a", "preview -p a", f"decode {latent}", "encode a.png", "upscale a.png")
    for words in map(str.split, commands):
        ran = run(*words, "--dry-run", "--out", "taken/inside")
        assert ran.code == 1 and "taken" in ran.err, words
        assert run(*words, "--dry-run", "--out", "new").code == 0, words


def test_json_lines(run: Run) -> None:
    ran = run("sample", "-p", "a", "--seed", "1..2", "--json")
    lines = [json.loads(line) for line in ran.out]
    assert [line["recipe"]["seed"] for line in lines] == [1, 2]
    assert all(Path(line["path"]).is_file() for line in lines)


def test_dry_run(run: Run) -> None:
    ran = run("sample", "-p", "a [red] fox", "--seed", "3..4", "--dry-run", "--size", "64x32")
    text = "\n".join(ran.out)
    assert ran.code == 0 and {entry["stage"] for entry in ran.log} == {"device"}
    assert "blocks that stay" in text and "the smallest that works" in text
    assert "flux-demo.safetensors" in text and "64x32" in text and "a [red] fox" in text and "latents" in text
    plan = json.loads(run("sample", "-p", "a", "--seed", "3", "--dry-run", "--json", "--steps", "7").out[0])
    assert plan["variant"] == "schnell"
    assert plan["images"][0]["seed"] == 3 and plan["images"][0]["steps"] == 7
    assert plan["files"]["transformer"]["dtypes"]
    assert plan["memory"]["streamed"] == [] and plan["memory"]["peak_bytes"] < plan["memory"]["budget_bytes"]


def test_vram(run: Run) -> None:
    assert run("sample", "-p", "a", "--vram", "8G").job("sample")["vram"] == "8G"
    assert run("sample", "-p", "a").job("sample")["vram"] == "auto"
    wrong = run("sample", "-p", "a", "--vram", "lots")
    assert wrong.code == 2 and "--vram 'lots'" in wrong.err
    small = run("sample", "-p", "a", "--vram", "1M", "--dry-run", "--size", "1024x512")
    assert small.code == 2 and "1024x512 needs at least" in small.err and "or more" in small.err


def test_out_of_memory_is_tried_once_more_with_less(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a second process, for the pictures that are not there yet; and it stands in the job what had failed."""
    monkeypatch.setenv("FAKE_FAIL", "sample out of memory once")
    ran = run("sample", "-p", "a", "--seed", "1..3")
    assert ran.code == 0 and len(ran.out) == 3
    assert "no room; its plan was a large plan; trying once more with a budget of 2.00 GB" in ran.err
    first, second = [e for e in ran.log if e["what"] == "job" and e["stage"] == "sample"]
    assert first["pid"] != second["pid"]
    assert [image["seed"] for image in second["job"]["images"]] == [2, 3]
    assert (second["job"]["vram"], second["job"]["retried"]) == ("2000000000", "a large plan")


def test_decode_finds_the_demo_vae_by_the_recipe(run: Run, home: Path, tmp_path: Path) -> None:
    run("sample", "-p", "a", "--seed", "1..3")
    ran = run("decode", "latents", "--overwrite", "--delete-latents")
    assert ran.out == [str(home / "images" / f"latent-{seed}.png") for seed in (1, 2, 3)]
    job = ran.job("decode")
    assert job["vae"] == str(tmp_path / "demo" / "flux-demo.safetensors")
    assert job["overwrite"] is job["delete_latents"] is True


@pytest.mark.parametrize(
    "words", [("sample", "-p", "a"), ("decode", "latents"), ("upscale", "a.png"), ("preview", "-p", "a")]
)
def test_out_is_no_file(words: tuple[str, ...], run: Run, home: Path) -> None:
    run("sample", "-p", "a", "--seed", "1")
    (home / "a.png").write_bytes(b"x")
    ran = run(*words, "--out", "new/x.PNG")
    assert ran.code == 2 and "--out new/x.PNG is the name of a file" in ran.err and not (home / "new").exists()
    (home / "folder.pt").mkdir()
    assert run("decode", "latents", "--out", "folder.pt").code == 0


def test_the_command_that_is_suggested_names_the_folder_where_that_is_all(run: Run, home: Path) -> None:
    latents = run("sample", "-p", "a", "--seed", "1..3").out
    assert sample_run.decoding(latents, {}) == "fluxsplit decode latents"
    assert sample_run.decoding(latents[:2], {}) == "fluxsplit decode latents/latent-1.pt latents/latent-2.pt"
    assert sample_run.decoding(latents[:1], {"vae": "ae"}) == "fluxsplit decode latents/latent-1.pt --vae ae"


def test_what_json_prints_is_taken_as_names(run: Run) -> None:
    lines = run("sample", "-p", "a", "--seed", "1..2", "--json").out
    ran = run("decode", "-", stdin="\n".join(lines))
    assert ran.code == 0 and ran.job("decode")["latents"] == [json.loads(line)["path"] for line in lines]


def test_sample_decode_in_a_pipe(run: Run, home: Path) -> None:
    made = run("sample", "-p", "a", "--seed", "1..2").out
    ran = run("decode", "-", "-o", "p", stdin="\n".join(made) + "\n")
    assert ran.out == [str(home / "p" / "latent-1.png"), str(home / "p" / "latent-2.png")]


def test_decode_by_vae_model_or_setting(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latent = run("sample", "-p", "a", "--seed", "1").out[0]
    lone, model = write(tmp_path / "ae.safetensors", vae()), real_model(tmp_path / "m")
    assert run("decode", latent, "--vae", lone).job("decode")["vae"] == str(lone)
    assert run("decode", latent, "--model", model).job("decode")["vae"] == str(model)
    monkeypatch.setenv("FLUXSPLIT_VAE", str(lone))
    assert run("decode", latent, "--model", model).job("decode")["vae"] == str(model)
    assert run("decode", latent).job("decode")["vae"] == str(tmp_path / "demo" / "flux-demo.safetensors")
    monkeypatch.setenv("FAKE_SHA256", "ab" * 32)
    other = run("sample", "-p", "a", "--seed", "2").out[0]
    assert run("decode", other).job("decode")["vae"] == str(lone)
    both = run("decode", latent, other)
    vaes = [entry["job"]["vae"] for entry in both.log if entry["what"] == "job"]
    assert (both.code, len(both.out), len(set(vaes))) == (0, 2, 2)


def test_the_demo_model_has_a_name(run: Run, home: Path, tmp_path: Path) -> None:
    demo = str(tmp_path / "demo" / "flux-demo.safetensors")
    latent = run("sample", "-m", "demo", "-p", "a", "--seed", "1")
    assert latent.job("sample")["files"]["transformer"] == demo
    assert run("decode", latent.out[0], "--vae", "demo").job("decode")["vae"] == demo


@pytest.mark.parametrize("words", [("sample", "-p", "a"), ("preview", "-p", "a")])
def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_computed(
    run: Run, home: Path, words: tuple[str, ...]
) -> None:
    (home / "taken").touch()
    ran = run(*words, "-o", "taken")
    assert ran.code == 1 and "is a file, not a folder" in ran.err
    assert not [entry for entry in ran.log if entry["what"] == "job"]


def test_decode_without_a_vae(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = run("sample", "-p", "a", "--seed", "1").out[0]
    monkeypatch.setenv("FAKE_SHA256", "ab" * 32)
    others = run("sample", "-p", "a", "--seed", "2..3").out
    ran = run("decode", *others)
    assert ran.code == 3 and "ae.safetensors (335 MB)" in ran.err and len(ran.err.splitlines()) == 1
    mixed = run("decode", demo, *others)
    assert (mixed.code, len(mixed.out), mixed.err.count("no VAE found")) == (1, 1, 2)


def test_decode_enlarges_in_a_process_after_the_vaes(run: Run, home: Path) -> None:
    run("sample", "-p", "a", "--seed", "1..2")
    (home / "net.pth").write_bytes(ZIP_MAGIC)
    words = ("--upscale-to", "300x200", "--upscale-tile", "96")
    ran = run("decode", "latents", "--upscale", "net.pth", *words, "--dtype", "bf16")
    names = ["latent-1.png", "latent-2.png", "latent-1-large.png", "latent-2-large.png"]
    assert (ran.code, ran.out) == (0, [str(home / "images" / name) for name in names])
    order = [(entry["what"], entry["stage"]) for entry in ran.log]
    assert order.index(("done", "decode")) < order.index(("start", "upscale"))
    job = ran.job("upscale")
    assert (job["weights"], job["width"], job["height"], job["dtype"]) == (str(home / "net.pth"), 300, 200, "auto")
    assert (job["tile"], ran.job("decode")["tile"]) == (96, 0)
    for more, says in ((["96"], "no effect"), (["9", "--upscale", "net.pth"], "16..65535")):
        ran = run("decode", "latents", "--upscale-tile", *more)
        assert ran.code == 2 and "--upscale-tile" in ran.err and says in ran.err and not ran.log


def test_decode_looks_for_the_upscaler_first(run: Run) -> None:
    run("sample", "-p", "a", "--seed", "1")
    ran = run("decode", "latents", "--upscale", "4")
    assert ran.code == 3 and ran.out == ran.log == []
    assert "--fetch downloads RealESRGAN_x4plus.pth (67 MB)" in ran.err and len(ran.err.splitlines()) == 1


def test_a_dry_run_downloads_nothing(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxsplit.upscalers.download", lambda *_: pytest.fail("it was downloaded"))
    (home / "a.png").write_bytes(b"x")
    ran = run("upscale", "a.png", "--fetch", "--dry-run")
    assert "a dry run fetches no weights" in ran.err and ran.job("upscale")["dry_run"] is True


def test_upscale(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "ComfyUI" / "models" / "upscale_models"
    folder.mkdir(parents=True)
    (folder / "RealESRGAN_x2plus.pth").write_bytes(b"x")
    (home / "in").mkdir()
    for name in ("b.PNG", "a.jpg", "c.txt"):
        (home / "in" / name).write_bytes(b"")
    (home / "large").mkdir()
    ran = run("upscale", "in", "--tile", "512", "--overwrite", "-o", "large")
    assert ran.out == [str(home / "large" / name) for name in ("a-large.png", "b-large.png")]
    job = ran.job("upscale")
    assert job["weights"] == str(folder / "RealESRGAN_x2plus.pth") and job["published_sha256"].startswith("49fafd45")
    assert (job["factor"], job["tile"], job["overwrite"], job["device"]) == (2, 512, True, "auto")
    piped = run("upscale", "-", stdin=str(home / "in" / "a.jpg") + "\n")
    assert piped.out == [str(home / "in" / "a-large.png")] and piped.job("upscale")["tile"] is None
    monkeypatch.setenv("FAKE_FAIL", "upscale out of memory")
    assert run("upscale", "in").code == 4


def test_a_folders_own_results_are_not_enlarged_again(run: Run, home: Path) -> None:
    (home / "net.pth").write_bytes(ZIP_MAGIC)
    pixels = bytes(3 * 4 * 4)
    (home / "in").mkdir()
    (home / "in" / "a.png").write_bytes(encode_png(pixels, 4, 4, {"parameters": "a fox"}))
    (home / "in" / "a-2x.png").write_bytes(encode_png(pixels, 4, 4, {"postprocessing": "Postprocess upscale by: 2"}))
    (home / "in" / "b.png").write_bytes(b"damaged")
    job = run("upscale", "in", "-u", "net.pth").job("upscale")
    assert [Path(path).name for path in job["images"]] == ["a.png", "b.png"]
    assert len(run("upscale", "in/a-2x.png", "-u", "net.pth").job("upscale")["images"]) == 1
    for name in ("a.png", "b.png", "a-large.png", "b-large.png", "a-2x-large.png"):
        (home / "in" / name).unlink()
    ran = run("upscale", "in", "-u", "net.pth")
    assert ran.code == 2 and "enlarged before" in ran.err


def test_usage_errors_of_upscale(run: Run, home: Path) -> None:
    (home / "empty").mkdir()
    (home / "a.png").write_bytes(b"")
    for words, said in [
        (["empty"], "holds no picture"),
        (["-"], "there is no picture to enlarge"),
        (["a.png", "--tile", "5"], "'5' is no side of a tile in pixels"),
        (["a.png", "--tile", "-64"], "is no side of a tile in pixels"),
        (["a.png", "--upscale-to", "big"], "is not WIDTHxHEIGHT"),
        (["a.png", "--upscale-to", "0x9"], "is outside 1..65535"),
        (["a.png", "--dtype", "int8"], "is not one of"),
        (["a.png", "--device", "gpu"], "gpu"),
    ]:
        ran = run("upscale", *words)
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (2, [], 1), words
        assert said in ran.err, words


def test_what_cannot_be_decoded_is_reported_and_the_rest_go_on(run: Run, home: Path) -> None:
    latent = run("sample", "-p", "a", "--seed", "1").out[0]
    (home / "bad.pt").write_bytes(b"PK\x03\x04 bad")
    ran = run("decode", "bad.pt", latent, "gone.pt")
    assert (ran.code, len(ran.out)) == (1, 1)
    assert "bad.pt" in ran.err and "gone.pt" in ran.err
    assert run("decode", "gone.pt").code == 2
    assert run("decode", "bad.pt").code == 1


def test_usage_errors_of_decode(run: Run, home: Path) -> None:
    (home / "empty").mkdir()
    for words, said in [
        (["empty"], "holds no latent file"),
        (["-"], "there is no latent file to decode"),
        (["x.pt", "--dtype", "int8"], "is not one of"),
        (["x.pt", "--device", "?"], "is not known"),
    ]:
        ran = run("decode", *words, stdin="")
        assert (ran.code, said in ran.err) == (2, True), ran.err


def test_settings_stand_in_for_flags(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "fluxsplit.toml").write_text('[sample]\nsteps = 3\nsampler = "heun"\nguidance = 2\nout = "there"\n')
    monkeypatch.setenv("FLUXSPLIT_SAMPLE_CFG", "1.5")
    ran = run("sample", "-p", "a", "--sampler", "euler", "--seed", "1")
    image = ran.images[0]
    assert (image["steps"], image["sampler"], image["cfg"]) == (3, "euler", 1.5)
    assert image["guidance"] is None  # a default meant for dev does not stop schnell
    assert ran.out == [str(home / "there" / "latent-1.pt")]
    (home / "fluxsplit.toml").write_text("[sample]\nstpes = 3\n")
    ran = run("sample", "-p", "a")
    assert (ran.code, "did you mean steps?" in ran.err) == (2, True)


def test_workflow_files(run: Run, home: Path) -> None:
    (home / "s.toml").write_text('[sample]\nprompt = "a"\nseed = [7, "9..10"]\nsize = "64x64"\nquiet = true\n')
    ran = run("run", "s.toml")
    assert (ran.code, ran.err) == (0, "")
    assert [image["seed"] for image in ran.images] == [7, 9, 10]
    (home / "d.toml").write_text('[decode]\nlatents = ["latents"]\nout = "p"\njson = true\n')
    assert [json.loads(line)["recipe"]["seed"] for line in run("run", "d.toml").out] == [10, 7, 9]
    (home / "d.toml").write_text('[decode]\nlatnets = ["latents"]\n')
    ran = run("run", "d.toml")
    assert (ran.code, "did you mean latents?" in ran.err) == (2, True)


def test_a_budget_of_the_settings_that_is_too_small_is_told_with_its_place(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "fluxsplit.toml").write_text('vram = "100M"\n')
    monkeypatch.setattr(sample_run, "events_with_retry", _too_small)
    said = run("sample", "-p", "a").err
    assert f"the budget is 100 MB (vram is set in {home / 'fluxsplit.toml'}); give --vram 442M" in said
    assert "is set in" not in run("sample", "-p", "a", "--vram", "100M").err


def _too_small(*_: object) -> Iterator[dict[str, Any]]:
    raise UsageError("256x256 needs at least 442 MB, the budget is 100 MB", "give --vram 442M or more")
    yield {}


def test_a_setting_is_not_blamed_for_what_only_shares_its_name(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write(home / "t.safetensors", transformer())
    (home / "fluxsplit.toml").write_text(f'model = "{model.as_posix()}"\nvae = "{model.as_posix()}"\n')
    other = write(home / "enc" / "model.safetensors", clip())
    ran = run("sample", "-p", "a", "--text-encoder", other)
    assert ran.err.startswith("fluxsplit: model.safetensors holds clip, but no t5") and "set in" not in ran.err
    wrong = write(home / "model.safetensors", vae())
    assert "set in" not in run("sample", "--conditioning", wrong).err
    (home / "fluxsplit.toml").write_text('[decode]\nupscale_tile = "huge"\n')
    monkeypatch.setenv("FLUXSPLIT_UPSCALE_TILE", "512")
    said = run("decode", wrong, "--upscale", "2").err
    assert "--upscale-tile 'huge'" in said and f"(set in {home / 'fluxsplit.toml'})" in said


@pytest.mark.parametrize(
    ("command", "setting", "says"),
    [
        ("sample", 'vram = "8X"', "--vram '8X' is not an amount of memory (set in {file}); write"),
        ("sample", 'scheduler = "fast"', "--scheduler 'fast' is not one of"),
        ("sample", 'size = "big"', "size 'big' is not WIDTHxHEIGHT (set in {file}); write"),
        ("sample", 'model = "nope.safetensors"', "--model nope.safetensors: there is no such file or folder (set in"),
        ("decode", 'vae-dtype = "fp8"', "--vae-dtype 'fp8' is not one of"),
    ],
)
def test_a_setting_that_cannot_be_used_is_told_with_its_place(
    run: Run, home: Path, command: str, setting: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, key = home / "fluxsplit.toml", setting.partition(" ")[0]
    file.write_text(f"[{command}]\n{setting}\n")
    words = ["-p", "a"] if command == "sample" else [str(write(home / "x.pt", vae()))]
    ran = run(command, *words)
    assert ran.code in (2, 3) and says.format(file=file) in ran.err and f"(set in {file})" in ran.err, ran.err
    flag = run(command, *words, f"--{key}", "wrong")
    assert flag.code in (2, 3) and "set in" not in flag.err
    monkeypatch.setenv(f"FLUXSPLIT_{command}_{key.replace('-', '_')}".upper(), "wrong")
    assert f"(set in FLUXSPLIT_{command.upper()}_" in run(command, *words).err


def test_what_may_render_nothing_keeps_no_conditioning(run: Run, home: Path) -> None:
    words = ("sample", "-p", "a", "--save-conditioning", "c.safetensors")
    assert "drop one" in run(*words, "--skip-existing").err
    (home / "fluxsplit.toml").write_text("[sample]\nskip-existing = true\n")
    ran = run(*words)
    assert ran.code == 2 and "--skip-existing may render nothing" in ran.err and not ran.log


def test_pictures_of_a_saved_conditioning_go_on_as_others_do(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kept = write(home / "t.safetensors", transformer()), conditioning_file(home / "c.safetensors")
    words = ("sample", "-m", model, "--conditioning", kept, "--seed", "1..3")
    monkeypatch.setenv("FAKE_FAIL", "sample ends at the second")
    assert "the same command with --skip-existing goes on" in run(*words).err
    monkeypatch.delenv("FAKE_FAIL")
    again = run(*words, "--skip-existing")
    sha256 = {image["conditioning_sha256"] for image in again.images}
    assert again.code == 0 and sha256 == {payload_sha256(kept.read_bytes())}


def test_what_was_encoded_is_kept_though_sampling_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the encoders' hashes are known from before, T5 need not run again for a prompt."""
    kept: list[str] = []
    monkeypatch.setattr("fluxsplit.conditioning_cache.keep", lambda encoders, prompt, path: kept.append(prompt))
    monkeypatch.setenv("FAKE_FAIL", "sample out of memory")
    assert run("sample", "-p", "a").code == 4 and kept == ["a"]
    monkeypatch.delenv("FAKE_FAIL")
    assert run("sample", "-p", "b", "--seed", "1..2").code == 0 and kept == ["a", "b"], "once"


def test_the_systems_refusal_is_no_bug(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "there/a.pt")

    said = "fluxsplit: there/a.pt: Permission denied; --debug shows where\n"
    monkeypatch.setattr("fluxsplit.inspection.first_bytes", lambda path, count: refuses(path))
    ran = run("info", __file__, FAKE_STAGE)
    assert (ran.code, ran.err) == (1, 2 * said), "the next one is read all the same"
    monkeypatch.setattr("fluxsplit.cli_info.inspect", refuses)
    ran = run("info", __file__, "--debug")
    assert ran.code == 1 and "Traceback" in ran.err
    ran = run("info", __file__)
    assert (ran.code, ran.err) == (1, said)


def test_a_refusal_names_the_folder_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what was looked for in it."""
    (tmp_path / "closed").mkdir()
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "closed" if mode == os.X_OK else access(path, mode)
    )
    inside = PermissionError(
        errno.EACCES, "Permission denied", str(tmp_path / "closed" / "transformer" / "config.json")
    )
    assert refusal(inside).message == f"{tmp_path / 'closed'}: Permission denied"
    beside = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "file"))
    assert refusal(beside).message == f"{tmp_path / 'file'}: Permission denied"


def test_a_folder_that_cannot_be_read_stops_no_other(tmp_path: Path) -> None:
    def in_folder(folder: Path) -> list[Path]:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    (tmp_path / "a.pt").touch()
    names = [str(tmp_path), str(tmp_path / "a.pt")]
    assert gather_files(names, in_folder, "latent") == [Path(name) for name in names]
    assert gather_files(names, lambda folder: map(in_folder, [folder]), "latent") == [Path(name) for name in names]


def test_hidden_files_are_not_what_a_folder_holds(tmp_path: Path) -> None:
    """macOS puts `._a.png` beside `a.png` on disks that are not its own, which is no picture."""
    for name in ("a.png", "._a.png", ".hidden.png"):
        (tmp_path / name).touch()
    assert files_in(tmp_path, (".png",), "picture") == [tmp_path / "a.png"]
    assert named(str(tmp_path / "*.png")) == [tmp_path / "a.png"]
    assert named(str(tmp_path / "._*.png")) == [tmp_path / "._a.png"], "asked for"
    assert named(str(tmp_path / "._a.png")) == [tmp_path / "._a.png"]
    (tmp_path / ".AppleDouble").mkdir()
    (tmp_path / ".AppleDouble" / "a.png").touch()
    with pytest.raises(UsageError, match="nothing matches"):
        named(str(tmp_path / "*" / "a.png"))
    assert named(str(tmp_path / ".Apple*" / "*.png")) == [tmp_path / ".AppleDouble" / "a.png"]


def test_hidden_latents_are_neither_decoded_nor_counted(run: Run, home: Path) -> None:
    ran = run("preview", "-p", "a", "-n", "2", "--size", "64x64")
    assert ran.code == 0, ran.err
    for folder in ("previews", "previews/latents"):
        (home / folder / "._0001.pt").write_bytes(b"what macOS knows of it")
    assert len(run("decode", "previews", "--out", "o").out) == 2
    latents = [str(path) for path in sorted((home / "previews" / "latents").glob("0*.pt"))]
    assert decoding(latents, {}) == "fluxsplit decode previews/latents"


@pytest.mark.skipif(os.name != "posix", reason="its signals")
@pytest.mark.skipif(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="Ctrl-C is ignored here")
def test_an_interruption_before_the_command_line_is_there_shows_no_traceback() -> None:
    """While the first imports run, here as long as a test needs."""
    slow = "import builtins, time; from fluxsplit import __main__ as m\n"
    slow += "found = builtins.__import__\n"
    slow += "def late(name, *more):\n    if name == 'fluxsplit.cli': print('now', flush=True); time.sleep(60)\n"
    slow += "    return found(name, *more)\nbuiltins.__import__ = late\nm.main()"
    with subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (-signal.SIGINT, b"")


def test_a_file_where_nobody_may_look_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, there = tmp_path / "nobody" / "a.pt", tmp_path / "b.pt"
    there.touch()
    stat = Path.stat

    def refuses(path: Path, **options: Any) -> os.stat_result:
        if path == hidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuses)
    assert gather_files([str(hidden), str(there)], lambda folder: [], "latent") == [hidden, there]


@pytest.mark.skipif(os.name != "posix", reason="a shell closes it")
def test_without_stdout_a_command_runs(home: Path) -> None:
    command = shlex.join([sys.executable, "-m", "fluxsplit", "sample", "--dry-run", "-p", "a"])
    run = subprocess.run(f"{command} >&-", shell=True, check=False, capture_output=True, text=True, timeout=120)
    assert (run.returncode, "bug" in run.stderr) == (0, False), run.stderr


def test_where_sampling_ends_early_it_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "sample ends at the second")
    ran = run("sample", "-p", "a", "--seed", "1..3")
    assert ran.code == 1 and "1 of 3 are finished; the same command with --skip-existing goes on" in ran.err
    drawn = run("sample", "-p", "a", "-n", "3")
    assert f"the same command with --seed {drawn.images[0]['seed']} and --skip-existing goes on" in drawn.err
    monkeypatch.delenv("FAKE_FAIL")


def test_flags_behind_a_workflow_file_overrule_it(run: Run, home: Path) -> None:
    (home / "s.toml").write_text('[sample]\nprompt = "a"\nseed = [7, 8]\nsize = "64x64"\n')
    ran = run("run", "s.toml", "--seed", "9", "-n", "2", "--size", "32x32", "-q")
    assert ran.code == 0 and not ran.err, ran.err
    assert [(image["prompt"], image["seed"], image["width"]) for image in ran.images] == [("a", 9, 32), ("a", 10, 32)]
    assert run("run", "s.toml", "--dry-run", "--json").out[0].startswith("{")
    (home / "d.toml").write_text('[decode]\nlatents = ["latents"]\n')
    assert [Path(line).parent for line in run("run", "d.toml", "--out", "p").out] == [home / "p"] * 2
    assert len(run("run", "d.toml", ran.out[0]).out) == 1, "arguments too"
    wrong = run("run", "d.toml", "--seed", "3")
    assert wrong.code == 2 and "No such option" in wrong.err and "decode" in wrong.err
    assert "Decode latent files" in " ".join(run("run", "d.toml", "--help").out)


@pytest.mark.parametrize("command", ["sample", "decode"])
def test_the_shipped_workflows_run(run: Run, command: str) -> None:
    for name in ["sample", "decode"][: 1 + (command == "decode")]:
        ran = run("run", Path(__file__).parents[1] / "workflows" / f"{name}.toml")
        assert ran.code == 0, ran.err


@pytest.mark.parametrize("command", ["sample", "decode"])
def test_every_flag_is_a_setting(command: str) -> None:
    import typer

    flags = {parameter.name for parameter in typer.main.get_command(cli.app).commands[command].params}  # type: ignore[attr-defined]
    assert flags - {"debug", "help"} == set(WORKFLOW[command])


def test_names_on_stdin_may_be_divided_by_nul(run: Run) -> None:
    latents = run("sample", "-p", "a fox", "--seed", "1..2").out
    for between in ("\n", "\0"):
        assert len(run("info", "--json", "-", stdin=between.join([*latents, ""])).out) == 2


def test_a_lora_in_a_prompt_is_told(run: Run) -> None:
    for more in ("<lora:detail:0.8>", "embedding:x", "{red|blue}", "__colour__", "BREAK in it"):
        assert "fluxsplit has no such thing" in run("sample", "-p", f"a fox {more}").err, more
    assert "no such thing" not in run("sample", "-p", "a {fox} with snake__case and (emphasis:1.2), BREAKING").err
    assert "LoRA" not in run("sample", "-p", "a fox").err


def test_info(run: Run, tmp_path: Path) -> None:
    latent = run("sample", "-p", "a fox", "--seed", "1").out[0]
    ran = run("info", latent)
    assert ran.code == 0 and "a fox" in "\n".join(ran.out)
    model = real_model(tmp_path / "m")
    ran = run("info", "--json", latent, model)
    assert [json.loads(line)["path"] for line in ran.out] == [latent, str(model)]
    ran = run("info", "gone.pt", latent)
    assert ran.code == 1 and "gone.pt" in ran.err and ran.out
    assert run("info", "gone.pt").code == 2


def test_info_of_a_folder_tells_of_every_file_in_it(run: Run, tmp_path: Path) -> None:
    latents = [*run("sample", "-p", "a fox", "--seed", "1").out, *run("sample", "-p", "a fox", "--seed", "2").out]
    folder = Path(latents[0]).parent
    (folder / "notes.txt").write_text("mine")
    assert [json.loads(line)["path"] for line in run("info", "--json", folder).out] == sorted(latents)
    (tmp_path / "empty").mkdir()
    ran = run("info", tmp_path / "empty")
    assert ran.code == 2 and "holds no picture, latent or weight file" in ran.err
    ran = run("info", "--json", tmp_path / "empty", "gone.pt", latents[0])
    assert ran.code == 1 and [json.loads(line)["path"] for line in ran.out] == latents[:1]
    assert "empty holds no" in ran.err and "gone.pt does not exist" in ran.err


def test_version_and_help(run: Run) -> None:
    assert run("--version").out == ["fluxsplit 0.1.0"]
    text = "\n".join(run("sample", "--help").out)
    assert all(title in text for title in ("Picture:", "Sampling:", "Model files:", "Machine:", "Output:", "Examples:"))


def test_a_bug_is_one_line_and_a_traceback_only_with_debug(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("fluxsplit.cli_sample.plan_sample", broken)
    ran = run("sample", "-p", "a")
    assert (ran.code, len(ran.err.splitlines())) == (1, 1)
    assert "ZeroDivisionError: oops" in ran.err and "--debug" in ran.err
    assert "Traceback" in run("--debug", "sample", "-p", "a").err


def started(home: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own, with the fake stages."""
    script = (
        "import sys; from pathlib import Path;"
        "import fluxsplit.executor as e, fluxsplit.models as m, fluxsplit.cli as c;"
        f"e.stage_command = lambda stage: [sys.executable, {str(FAKE_STAGE)!r}, stage];"
        f"m.DEMO_FOLDER = Path({str(models.DEMO_FOLDER)!r}); c.main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(home), **environment},
    )


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interruption_ends_the_stages_and_leaves_nothing(home: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = started(home, "sample", "-p", "a", "--seed", "1", FAKE_FAIL="sample hangs")
    log = tmp_path / "log"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and '"stage": "sample", "job"' in log.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err and err.endswith("fluxsplit: interrupted\n")
    for entry in map(json.loads, log.read_text().splitlines()):
        with pytest.raises(ProcessLookupError):
            os.kill(entry["pid"], 0)
    assert not list(home.glob("fluxsplit-*"))


@pytest.mark.skipif(os.name == "nt", reason="pipes")
def test_a_reader_that_leaves_early(home: Path) -> None:
    process = started(home, "sample", "-p", "a", "--seed", "1..50", "--size", "64x64")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 1
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


def test_what_other_programs_would_read_in_a_prompt_is_looked_for_quickly() -> None:
    """Prompts of strangers too: nothing that is quadratic in their length."""
    began_s = time.process_time()
    for hostile in ("{" + "|" * 99_999, "{" * 50_000 + "|" * 50_000, "-__a" * 25_000, "embedding:" * 10_000):
        prompt_warnings(hostile)
    assert time.process_time() - began_s < 5


def test_a_latent_that_cannot_be_deleted_is_a_failure(home: Path) -> None:
    """As `rm` says it: who deletes to have room is to be told by the exit code as well."""
    from fluxsplit.stage_decode import _delete

    class Sent:
        def send(self, event: str, **fields: str) -> None:
            told.append((event, fields["item"], fields["message"]))

    told: list[tuple[str, str, str]] = []
    _delete(str(home / "gone.pt"), Sent())  # type: ignore[arg-type]
    assert told == [("failed", str(home / "gone.pt"), "decoded, but it cannot be deleted: No such file or directory")]
