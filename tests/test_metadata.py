"""Recipes in PNG text: read back exactly here, and by the patterns of Forge and Civitai."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from samples import make_recipe

from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.metadata import (
    ImageRecord,
    UpscalerStamp,
    encode_png,
    parameters_text,
    png_text_chunks,
    read_png_text,
    read_recipe,
    read_record,
    record_from_json,
    upscaled_texts,
)
from fluxsplit.png_text import MAX_TEXT_BYTES, SIGNATURE, read_png
from fluxsplit.recipe import SAMPLERS, SCHEDULERS, Recipe, WeightsStamp

PIXELS = bytes(range(96)) * 16  # 32 x 16, RGB
RECORD = ImageRecord(make_recipe(), "ab" * 32, WeightsStamp("ae.safetensors", "c" * 64), {"torch": "2.10"})


def forge_reads(text: str) -> dict[str, str]:
    """What Forge's `parse_generation_parameters` makes of it (modules/infotext_utils.py)."""
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    if len(pattern.findall(last)) < 3:
        lines, last = [*lines, last], ""
    found = {"Prompt": "", "Negative prompt": ""}
    part = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            part, line = "Negative prompt", line[16:].strip()  # noqa: PLW2901
        found[part] += ("" if found[part] == "" else "\n") + line
    for name, value in pattern.findall(last):
        quoted = value[:1] == '"' and value[-1:] == '"'
        found[name] = json.loads(value) if quoted else value
    return found


def test_the_text_that_civitai_reads() -> None:
    recipe = make_recipe(prompt="a fox, snow", width=1152, height=944)
    assert parameters_text(recipe) == (
        "a fox, snow\n"
        "Steps: 4, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 1234567890, "
        "Size: 1152x944, Model hash: bbdfba27fe, Model: flux1-schnell-fp8-e4m3fn, RNG: CPU, "
        'Hashes: {"model": "bbdfba27fe"}, Version: fluxsplit 0.1.0'
    )


STAMP = UpscalerStamp("RealESRGAN_x2plus.pth", "d" * 64, 2, 64, 32)


def test_an_upscaler_is_added_and_everything_else_is_kept() -> None:
    texts = png_text_chunks(RECORD, {"workflow": "{}"})
    after = upscaled_texts(texts, STAMP, "2")
    assert record_from_json(after["fluxsplit"]) == replace(RECORD, upscaler=(STAMP,))
    assert {name: after[name] for name in ("parameters", "workflow")} == {
        name: texts[name] for name in ("parameters", "workflow")
    }
    assert after["postprocessing"] == (
        "Postprocess upscale by: 2, Postprocess upscaler: RealESRGAN_x2plus.pth, "
        f"Postprocess upscaler SHA-256: {'d' * 64}"
    )
    twice = upscaled_texts(after, replace(STAMP, width=100), "100x50")
    assert [stamp.width for stamp in record_from_json(twice["fluxsplit"]).upscaler] == [64, 100]
    assert twice["postprocessing"].startswith(after["postprocessing"] + ", Postprocess upscale to: 100x50, ")


def test_a_record_without_upscaler_is_written_as_before_upscaling_was_known() -> None:
    assert "upscaler" not in json.loads(RECORD.to_json())


def test_a_strangers_texts_are_carried_over_verbatim() -> None:
    texts = {"fluxsplit": '{"fluxsplit": 99}', "parameters": "a fox\nSteps: 4", "Author": "someone"}
    after = upscaled_texts(texts, STAMP, "2")
    assert {name: after[name] for name in texts} == texts and "postprocessing" in after


@pytest.mark.parametrize(
    "upscaler",
    [
        {},
        ["x"],
        [{}],
        [{"name": "a", "sha256": "d" * 63, "scale": 2, "width": 1, "height": 1}],
        [{"name": "a", "sha256": "d" * 64, "scale": True, "width": 1, "height": 1}],
        [{"name": "a", "sha256": "d" * 64, "scale": 2, "width": 0, "height": 1}],
        [{"name": 7, "sha256": "d" * 64, "scale": 2, "width": 1, "height": 1}],
        [{"name": "a", "sha256": "d" * 64, "scale": 2, "width": 1, "height": 1}] * 9,
    ],
)
def test_an_improper_upscaler_is_refused(upscaler: Any) -> None:
    with pytest.raises(FluxsplitError, match="upscaler"):
        record_from_json(json.dumps({**json.loads(RECORD.to_json()), "upscaler": upscaler}))


def test_forge_reads_every_field() -> None:
    recipe = make_recipe(prompt="two\nlines: a, b", negative="blurry,\ndark", cfg=2.25, noise_index=3)
    found = forge_reads(parameters_text(recipe))
    assert found == {
        "Prompt": "two\nlines: a, b",
        "Negative prompt": "blurry,\ndark",
        "Steps": "4",
        "Sampler": "Euler",
        "Schedule type": "Simple",
        "CFG scale": "2.25",
        "Distilled CFG Scale": "3.5",
        "Seed": "1234567890",
        "Noise index": "3",
        "Size": "32x16",
        "Model hash": "bbdfba27fe",
        "Model": "flux1-schnell-fp8-e4m3fn",
        "RNG": "CPU",
        "Hashes": '{"model": "bbdfba27fe"}',
        "Version": "fluxsplit 0.1.0",
    }


def test_what_is_not_known_is_left_out() -> None:
    recipe = make_recipe(guidance=None, scheduler="custom", transformer=WeightsStamp("", ""), versions={})
    found = forge_reads(parameters_text(recipe))
    assert not {"Distilled CFG Scale", "Schedule type", "Model", "Model hash", "Hashes", "Noise index"} & set(found)
    assert found["Negative prompt"] == ""
    assert "Negative" not in parameters_text(recipe)


@pytest.mark.parametrize(
    "name", ["a, b: c", 'quo"te', "back\\slash", "line\nbreak", " space ", "ü🦊", "\x1b[2J", '"x"']
)
def test_odd_model_names_read_back(name: str) -> None:
    recipe = make_recipe(transformer=WeightsStamp(name, ""))
    found = forge_reads(parameters_text(recipe))
    assert found["Model"] == name
    assert found["RNG"] == "CPU"


def test_every_sampler_and_scheduler_has_a_name() -> None:
    found = {forge_reads(parameters_text(make_recipe(sampler=sampler)))["Sampler"] for sampler in SAMPLERS}
    assert found == {"Euler", "Heun", "DPM++ 2M"}
    found = {forge_reads(parameters_text(make_recipe(scheduler=name)))["Schedule type"] for name in SCHEDULERS}
    assert found == {"Simple", "Normal", "Beta", "SGM Uniform"}


ODD = 'say "ü🦊"\r\n\n  two spaces\t\\n {"a": NaN}\r'


def test_a_png_gives_back_what_went_in(tmp_path: Path) -> None:
    recipe = make_recipe(prompt=ODD, negative=ODD, seed=2**64 - 1)
    record = ImageRecord(recipe, "ab" * 32, WeightsStamp("ae"), {"fluxsplit": "0.1.0"})
    foreign = {"prompt": '{"3": "\\ud800 NaN"}', "workflow": "ü" * 5000}
    texts = png_text_chunks(record, foreign)
    assert list(texts) == ["parameters", "fluxsplit", "prompt", "workflow"]
    path = tmp_path / "x.png"
    path.write_bytes(encode_png(PIXELS, 32, 16, texts))
    assert read_png_text(path) == texts
    assert (read_png(path).width, read_png(path).height) == (32, 16)
    assert read_recipe(path) == recipe
    assert read_record(path) == record
    with Image.open(path) as picture:
        assert picture.tobytes() == PIXELS
        assert picture.mode == "RGB"
        assert picture.text == texts


def test_a_latent_without_recipe_keeps_its_graph_only(tmp_path: Path) -> None:
    record = ImageRecord(None, "ab" * 32, WeightsStamp("ae"))
    texts = png_text_chunks(record, {"prompt": "{}"})
    assert list(texts) == ["fluxsplit", "prompt"]
    (tmp_path / "x").write_bytes(encode_png(PIXELS, 32, 16, texts))
    assert read_record(tmp_path / "x") == record
    with pytest.raises(FluxsplitError, match="had no recipe"):
        read_recipe(tmp_path / "x")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS)
@example("\0", "a\0b")
@example("ÿ\x80", "\r\n")
def test_any_prompt_survives(tmp_path_factory: pytest.TempPathFactory, prompt: str, negative: str) -> None:
    record = ImageRecord(make_recipe(prompt=prompt, negative=negative), "ab" * 32, WeightsStamp(prompt))
    texts = png_text_chunks(record, {"prompt": prompt.replace("\0", "")})
    path = tmp_path_factory.getbasetemp() / "any.png"
    path.write_bytes(encode_png(PIXELS, 32, 16, texts))
    assert read_png_text(path) == texts
    assert read_record(path) == record


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=60))
def test_forge_reads_any_one_line_prompt(prompt: str) -> None:
    found = forge_reads(parameters_text(make_recipe(prompt=prompt)))
    assert found["Seed"] == "1234567890"
    if not prompt.strip().startswith("Negative prompt:"):
        assert found["Prompt"] == prompt.strip()


def test_surrogates_and_wrong_sizes_are_refused() -> None:
    with pytest.raises(FluxsplitError, match="no Unicode"):
        encode_png(PIXELS, 32, 16, {"parameters": "\udcff"})
    with pytest.raises(ValueError, match="are not 32x17 RGB"):
        encode_png(PIXELS, 32, 17, {})


def test_records_are_read_strictly() -> None:
    table = json.loads(RECORD.to_json())
    assert record_from_json(json.dumps(table)) == RECORD
    wrong: list[Any] = [
        [], {**table, "fluxsplit": 2}, {**table, "more": 1}, {**table, "vae": {"name": "x"}},
        {**table, "vae": {"name": "x", "sha256": "zz"}}, {**table, "vae": {"name": 1, "sha256": ""}},
        {**table, "latent_sha256": "AB" * 32}, {**table, "latent_sha256": ""}, {**table, "versions": []},
        {**table, "versions": {"torch": 2}}, {**table, "recipe": []}, {**table, "recipe": {}},
        {**table, "recipe": {**table["recipe"], "seed": -1}}, {**table, "recipe": {**table["recipe"], "seed": True}},
    ]  # fmt: skip
    for value in wrong:
        with pytest.raises(FluxsplitError):
            record_from_json(json.dumps(value))
    for text in ("", "{", RECORD.to_json().replace("3.5", "NaN"), RECORD.to_json()[:-1] + ', "vae": {}}'):
        with pytest.raises(FluxsplitError):
            record_from_json(text)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


IHDR = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 16, 8, 2, 0, 0, 0))
IEND = chunk(b"IEND", b"")
IDAT = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + PIXELS[i : i + 96] for i in range(0, len(PIXELS), 96))))


def png(*chunks: bytes) -> bytes:
    return SIGNATURE + IHDR + b"".join(chunks) + IDAT + IEND


def test_all_kinds_of_text_are_read(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("plain", "ÿ\n")
    info.add_text("packed", "ÿ" * 1000, zip=True)
    info.add_itxt("wide", "🦊", lang="en", tkey="weit")
    info.add_itxt("wide packed", "🦊" * 1000, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG", pnginfo=info)
    after = buffer.getvalue().replace(IEND, chunk(b"tEXt", b"after\0x") + chunk(b"zzZz", b"?") + IEND)
    (tmp_path / "x").write_bytes(after)
    assert read_png_text(tmp_path / "x") == {
        "plain": "ÿ\n", "packed": "ÿ" * 1000, "wide": "🦊", "wide packed": "🦊" * 1000, "after": "x",
    }  # fmt: skip


BOMB = zlib.compress(bytes(64 << 20), 9)
BROKEN = bytearray(chunk(b"tEXt", b"a\0text"))
BROKEN[-6] ^= 1
HOSTILE = {
    "empty": b"",
    "signature only": SIGNATURE,
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "no IHDR": SIGNATURE + IDAT + IEND,
    "no IEND": SIGNATURE + IHDR + IDAT,
    "cut": png()[:-5],
    "twice": png(chunk(b"tEXt", b"a\0x"), chunk(b"iTXt", b"a\0\0\0\0\0y")),
    "broken checksum": png(bytes(BROKEN)),
    "zTXt bomb": png(chunk(b"zTXt", b"a\0\0" + BOMB)),
    "iTXt bomb": png(chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)),
    "three texts of 3 MB": png(*(chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(3 << 20))) for i in range(3))),
    "plain text of 5 MB": png(chunk(b"tEXt", b"a\0" + bytes(5 << 20))),
    "300 texts": png(*(chunk(b"tEXt", b"%d\0" % i) for i in range(300))),
    "1 M texts": SIGNATURE + IHDR + chunk(b"tEXt", b"a\0b") * 1_000_000,
    "200 k chunks": SIGNATURE + IHDR + chunk(b"abCd", b"") * 200_000 + IEND,
    "length of 2^32": SIGNATURE + IHDR + b"\xff\xff\xff\xfftEXt",
    "no keyword": png(chunk(b"tEXt", b"\0x")),
    "long keyword": png(chunk(b"tEXt", b"k" * 80 + b"\0x")),
    "no zero": png(chunk(b"tEXt", b"abc")),
    "short iTXt": png(chunk(b"iTXt", b"a\0\0\0x")),
    "iTXt flag 2": png(chunk(b"iTXt", b"a\0\2\0\0\0x")),
    "iTXt not UTF-8": png(chunk(b"iTXt", b"a\0\0\0\0\0\xff")),
    "not zlib": png(chunk(b"zTXt", b"a\0\0garbage")),
    "cut zlib": png(chunk(b"zTXt", b"a\0\0" + zlib.compress(b"text")[:-2])),
    "unknown method": png(chunk(b"zTXt", b"a\0\1" + zlib.compress(b"text"))),
    "no recipe": png(chunk(b"tEXt", b"parameters\0x")),
    "record is a list": png(chunk(b"tEXt", b"fluxsplit\0[]")),
    "nested record": png(chunk(b"tEXt", b"fluxsplit\0" + b"[" * 1_000_000)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pngs_are_refused_in_little_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(FluxsplitError) as caught:
            read_recipe(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64e6
    assert caught.value.line().isprintable()
    assert "x.png" in caught.value.message


def test_the_longest_recipe_fits(tmp_path: Path) -> None:
    recipe = make_recipe(prompt="\x01" * 100_000, negative="🦊" * 100_000)
    foreign = {"prompt": "ü" * ((MAX_TEXT_BYTES >> 1) - 100), "workflow": "x" * 1000}
    texts = png_text_chunks(ImageRecord(recipe, "ab" * 32, WeightsStamp("ae")), foreign)
    (tmp_path / "x").write_bytes(encode_png(PIXELS, 32, 16, texts))
    assert read_recipe(tmp_path / "x") == recipe
    assert read_png_text(tmp_path / "x") == texts


def test_pixels_are_never_decoded(tmp_path: Path) -> None:
    huge = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
    (tmp_path / "x").write_bytes(SIGNATURE + huge + chunk(b"IDAT", b"garbage") + chunk(b"tEXt", b"a\0b") + IEND)
    assert read_png_text(tmp_path / "x") == {"a": "b"}


def test_missing_files_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_png_text(tmp_path / "x")
    with pytest.raises(FluxsplitError, match="cannot read"):
        read_png_text(tmp_path)


def test_pillow_is_imported_only_to_write() -> None:
    script = "import fluxsplit.metadata, sys; print([m for m in ('PIL', 'torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


GOOD = encode_png(PIXELS, 32, 16, png_text_chunks(RECORD))


def fuzz(folder: Path, source: random.Random, count: int) -> None:
    data = bytearray(GOOD)
    for _ in range(count):
        data[source.randrange(len(data))] = source.randrange(256)
    if source.random() < 0.2:
        del data[source.randrange(len(data)) :]
    (folder / "fuzzed").write_bytes(data)
    try:
        found: Recipe | None = read_recipe(folder / "fuzzed")
    except FluxsplitError as error:
        assert error.line().isprintable()
    else:
        assert found == RECORD.recipe


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 3))
def test_damage_is_refused(tmp_path_factory: pytest.TempPathFactory, source: random.Random, count: int) -> None:
    fuzz(tmp_path_factory.getbasetemp(), source, count)


@pytest.mark.torture
def test_much_damage_is_refused(tmp_path: Path) -> None:
    source = random.Random(1)
    for _ in range(20_000):
        fuzz(tmp_path, source, source.randint(1, 6))
