"""The latent file: what is written reads back here, in torch and in ComfyUI's way; hostile files are refused."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import (
    COUNT,
    SHAPE,
    hostile_pt,
    hostile_safetensors,
    make_payload,
    make_recipe,
    safetensors_bytes,
    tensor_entry,
    write_all,
)

from fluxsplit import durable, latents
from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.latents import read_latent, read_latents, write_latent
from fluxsplit.recipe import LATENT_FORMATS

PAYLOAD = make_payload()
TENSOR = torch.frombuffer(bytearray(PAYLOAD), dtype=torch.float32).view(SHAPE)
ODD_PROMPT = 'say "ü🦊"\r\n\tNegative prompt: \\ {"a": 1}\x00 '


@pytest.mark.parametrize("format", LATENT_FORMATS)
@pytest.mark.parametrize("has_recipe", [True, False])
def test_what_is_written_reads_back(tmp_path: Path, format: str, has_recipe: bool) -> None:
    recipe = make_recipe(prompt=ODD_PROMPT, seed=2**64 - 1, negative=ODD_PROMPT) if has_recipe else None
    path = write_latent(tmp_path / "new", "fox", PAYLOAD, SHAPE, recipe, format=format)
    assert path.name == f"fox.{format}"
    renamed = path.rename(tmp_path / "anything")
    latent = read_latent(renamed)
    assert latent == latents.LatentFile(
        str(renamed), format, SHAPE, PAYLOAD, recipe, {}, hashlib.sha256(PAYLOAD).hexdigest()
    )


def test_names_are_counted_up_and_formats_checked(tmp_path: Path) -> None:
    paths = [write_latent(tmp_path, "fox", PAYLOAD, SHAPE, None) for _ in range(3)]
    assert [path.name for path in paths] == ["fox.pt", "fox-2.pt", "fox-3.pt"]
    with pytest.raises(UsageError, match="not one of pt"):
        write_latent(tmp_path, "fox", PAYLOAD, SHAPE, None, format="npz")


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_the_pt(tmp_path: Path, mmap: bool) -> None:
    path = write_latent(tmp_path, "fox", PAYLOAD, SHAPE, make_recipe())
    table = torch.load(path, weights_only=True, mmap=mmap)
    assert list(table) == ["format", "latents", "recipe", "sha256"]
    assert table["format"] == "fluxsplit-latent-1"
    assert torch.equal(table["latents"], TENSOR)
    assert table["latents"].is_contiguous()
    assert json.loads(table["recipe"])["prompt"] == "a fox, snow"
    assert table["sha256"] == hashlib.sha256(PAYLOAD).hexdigest()


def test_the_pt_is_the_same_each_time_and_aligned(tmp_path: Path) -> None:
    first, second = (write_latent(tmp_path, "fox", PAYLOAD, SHAPE, make_recipe()) for _ in range(2))
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().index(PAYLOAD) % 64 == 0


def test_the_longest_recipe_fits(tmp_path: Path) -> None:
    recipe = make_recipe(prompt="\x01" * 100_000, negative="🦊" * 100_000)
    for format in LATENT_FORMATS:
        assert read_latent(write_latent(tmp_path, "x", PAYLOAD, SHAPE, recipe, format=format)).recipe == recipe


def test_comfyui_reads_the_latent(tmp_path: Path) -> None:
    """LoadLatent (nodes.py:507-540): `latent_tensor`, times 1/0.18215 unless the marker is there."""
    path = write_latent(tmp_path, "fox", PAYLOAD, SHAPE, make_recipe(), format="latent")
    tensors = safetensors.torch.load_file(path)
    assert torch.equal(tensors["latent_tensor"], TENSOR)
    assert tensors["latent_format_version_0"].shape == (0,)
    assert tensors["latent_format_version_0"].dtype == torch.float32
    path = write_latent(tmp_path, "fox", PAYLOAD, SHAPE, make_recipe(), format="safetensors")
    assert torch.equal(safetensors.torch.load_file(path)["latents"], TENSOR)


def test_comfyui_latents_are_read_with_their_graphs(tmp_path: Path) -> None:
    """SaveLatent (nodes.py:456-504), a batch of two."""
    batch = torch.cat([TENSOR, -TENSOR])
    metadata = {"prompt": '{"3": {"class_type": "KSampler"}}', "workflow": '{"nodes": [], "x": NaN}', "extra": "no"}
    tensors = {"latent_tensor": batch, "latent_format_version_0": torch.tensor([])}
    safetensors.torch.save_file(tensors, tmp_path / "ComfyUI_00001_.latent", metadata)
    first, second = read_latents(tmp_path / "ComfyUI_00001_.latent")
    assert first.foreign == {"prompt": metadata["prompt"], "workflow": metadata["workflow"]}
    assert (first.shape, first.index, second.index, first.batch) == (SHAPE, 0, 1, 2)
    assert second.payload == array("f", [-x for x in array("f", PAYLOAD)]).tobytes()
    assert first.recipe is None
    assert first.format == "latent"
    with pytest.raises(FluxsplitError, match="batch of 2"):
        read_latent(tmp_path / "ComfyUI_00001_.latent")
    safetensors.torch.save_file(tensors, tmp_path / "no", {"prompt": ""})
    assert read_latents(tmp_path / "no")[0].foreign == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", ["bare", "samples", "latents", "three dimensions", "part", "parameter grad"])
def test_files_of_torch_save_are_read(tmp_path: Path, dtype: torch.dtype, shape: str) -> None:
    tensor = TENSOR.to(dtype)
    saved = {
        "bare": tensor,
        "samples": {"samples": tensor, "batch_index": [0], "note": None, "x": 1.5},
        "latents": {"latents": tensor},
        "three dimensions": tensor[0],
        "part": torch.cat([tensor, tensor + 1, tensor])[2:],
        "parameter grad": tensor.clone().requires_grad_(),
    }[shape]
    torch.save(saved, tmp_path / "x")
    latent = read_latent(tmp_path / "x")
    assert latent.payload == PAYLOAD
    assert latent.shape == SHAPE
    assert latent.recipe is None
    if isinstance(saved, torch.Tensor):
        safetensors.torch.save_file({"latents": saved.detach().clone()}, tmp_path / "y")
        assert read_latent(tmp_path / "y").payload == PAYLOAD


def test_every_half_widens_exactly(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
        finite = torch.where(torch.isfinite(every.float()), every, torch.zeros((), dtype=dtype)).view(1, 16, 64, 64)
        torch.save(finite, tmp_path / "x")
        expected = finite.float().numpy().tobytes()
        assert read_latent(tmp_path / "x").payload == expected


def test_doubles_are_refused_by_name(tmp_path: Path) -> None:
    torch.save(TENSOR.double(), tmp_path / "x")
    with pytest.raises(FluxsplitError, match="tensor is 'Double'") as caught:
        read_latent(tmp_path / "x")
    assert caught.value.hint == "save it as fp32, fp16 or bf16"


def test_legacy_torch_files_are_refused(tmp_path: Path) -> None:
    torch.save(TENSOR, tmp_path / "x", _use_new_zipfile_serialization=False)
    with pytest.raises(FluxsplitError, match="old torch format"):
        read_latent(tmp_path / "x")


SAID = {
    "os.system": "asks for 'posix.system'",
    "4 channels": "a Stable Diffusion latent (4 channels), not Flux (16)",
    "packed": "packed latent of diffusers",
    "NaN": "1 of its 128 values are NaN or infinite",
    "+inf and -inf": "2 of its 128 values",
    "wrong sha256": "damaged",
    "flipped bit": "Bad CRC",
    "TorchScript": "TorchScript",
    "deflated": "compressed",
    "SD1 .latent": "0.18215",
    "storage of 1 TB": "claims 1099511627776 bytes and has 512",
    "hash of a doubled tuple": "key that is no text",
    "two of a name": "two records",
    "transposed": "contiguous",
    "newer format": "newer fluxsplit",
}
BOUNDED = """
import re, sys, time
from fluxsplit.errors import FluxsplitError
from fluxsplit.latents import read_latents
heavy = sorted({"torch", "numpy", "diffusers", "transformers", "PIL"} & set(sys.modules))
assert not heavy, heavy
def peak_bytes():
    with open("/proc/self/status") as file:  # ru_maxrss would begin with the parent's
        return int(re.search(r"VmHWM:\\s*(\\d+) kB", file.read())[1]) * 1024
for path in sys.argv[1:]:
    before_bytes, started_s = peak_bytes(), time.process_time()
    try:
        read_latents(path)
        line = "ACCEPTED"
    except FluxsplitError as error:
        line = type(error).__name__ + " " + error.line()
    print(time.process_time() - started_s, peak_bytes() - before_bytes, line, sep="\\t")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_hostile_files_are_refused_quickly_and_in_little_memory(tmp_path: Path, kind: str) -> None:
    """P10: a typed error of one line, in 5 seconds and 256 MB, and nothing runs."""
    files = hostile_pt() if kind == "pt" else hostile_safetensors()
    paths = write_all(tmp_path, files)
    command = [sys.executable, "-c", BOUNDED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(files)
    for name, line in zip(files, lines, strict=True):
        elapsed_s, grown_bytes, said = line.split("\t")
        assert said.startswith("FluxsplitError file-"), f"{name}: {said}"
        assert SAID.get(name, "") in said, f"{name}: {said}"
        assert float(elapsed_s) < 5, name
        assert int(grown_bytes) < 256e6, name
        assert said.isprintable(), name
    assert not Path("/tmp/owned").exists()


def test_recipe_and_shape_must_agree(tmp_path: Path) -> None:
    with pytest.raises(FluxsplitError, match="not that of its recipe, 64x16"):
        write_latent(tmp_path, "x", PAYLOAD, SHAPE, make_recipe(width=64))
    metadata = {
        "fluxsplit.recipe": make_recipe(width=64).to_json(),
        "fluxsplit.sha256": hashlib.sha256(PAYLOAD).hexdigest(),
    }
    data = safetensors_bytes({"__metadata__": metadata, "latents": tensor_entry(SHAPE)}, PAYLOAD)
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FluxsplitError, match="not that of its recipe"):
        read_latent(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_values_are_not_written(tmp_path: Path, value: float) -> None:
    payload = array("f", [0.0] * (COUNT - 1) + [value]).tobytes()
    with pytest.raises(FluxsplitError, match="1 of its 128 values"):
        write_latent(tmp_path, "x", payload, SHAPE, None)
    with pytest.raises(FluxsplitError, match="are not fp32 of shape"):
        write_latent(tmp_path, "x", payload[:-4], SHAPE, None)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_finite_values_are_fine(tmp_path: Path) -> None:
    payload = array("f", [3.4028234e38] * COUNT).tobytes()
    assert read_latent(write_latent(tmp_path, "x", payload, SHAPE, None)).payload == payload


def test_surrogates_in_a_prompt_are_refused(tmp_path: Path) -> None:
    for format in LATENT_FORMATS:
        with pytest.raises(FluxsplitError, match="no Unicode"):
            write_latent(tmp_path, "x", PAYLOAD, SHAPE, make_recipe(prompt="\udcff"), format=format)
    assert list(tmp_path.iterdir()) == []


def test_absent_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_latents(tmp_path / "x")
    with pytest.raises(FluxsplitError, match="cannot read"):
        read_latents(tmp_path)


@pytest.mark.parametrize("format", LATENT_FORMATS)
def test_a_full_disk_leaves_no_latent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FluxsplitError, match="the disk is full"):
        write_latent(tmp_path, "x", PAYLOAD, SHAPE, None, format=format)
    assert list(tmp_path.iterdir()) == []
    assert durable.PART_SUFFIX == ".part"


def good_files(folder: Path) -> list[bytes]:
    files = [write_latent(folder, "g", PAYLOAD, SHAPE, make_recipe(), format=f).read_bytes() for f in LATENT_FORMATS]
    torch.save({"samples": TENSOR}, folder / "theirs")
    return [*files, (folder / "theirs").read_bytes()]


def check_damaged(path: Path, data: bytes) -> None:
    """A damaged file is refused, or its latents are as they were: a name or a padding byte may change unnoticed."""
    path.write_bytes(data)
    try:
        found = read_latents(path)
    except FluxsplitError as error:
        assert error.line().isprintable()
    else:
        assert all(latent.payload == PAYLOAD for latent in found if latent.recipe is not None)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3), st.randoms(use_true_random=False), st.integers(1, 3))
def test_damage_is_refused(
    tmp_path_factory: pytest.TempPathFactory, which: int, source: random.Random, count: int
) -> None:
    fuzz(tmp_path_factory.getbasetemp(), which, source, count)


@pytest.mark.torture
def test_much_damage_is_refused(tmp_path: Path) -> None:
    source = random.Random(1)
    for number in range(20_000):
        fuzz(tmp_path, number % 4, source, source.randint(1, 6))


GOOD: list[bytes] = []


def fuzz(folder: Path, which: int, source: random.Random, count: int) -> None:
    if not GOOD:
        (folder / "good").mkdir(exist_ok=True)
        GOOD.extend(good_files(folder / "good"))
    data = bytearray(GOOD[which])
    for _ in range(count):
        data[source.randrange(len(data))] = source.randrange(256)
    if source.random() < 0.2:
        del data[source.randrange(len(data)) :]
    check_damaged(folder / "fuzzed", bytes(data))


@pytest.mark.parametrize("format", LATENT_FORMATS)
def test_every_flipped_payload_bit_is_noticed(tmp_path: Path, format: str) -> None:
    path = write_latent(tmp_path, "x", PAYLOAD, SHAPE, make_recipe(), format=format)
    data = bytearray(path.read_bytes())
    start = data.index(PAYLOAD)
    for bit in range(0, len(PAYLOAD) * 8, 37):
        data[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(FluxsplitError):
            read_latents(path)
        data[start + bit // 8] ^= 1 << bit % 8
