"""The safetensors header: good files are described, contradictory ones refused in one line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from samples import SHAPE, hostile_safetensors, make_payload, safetensors_bytes, tensor_entry

from fluxsplit.errors import FluxsplitError, ModelFileMissing
from fluxsplit.safetensor_header import BITS_BY_DTYPE, LATENT_LIMITS, read_header

PAYLOAD = make_payload()
# Refused by `latents` for what they hold; as safetensors files they are in order.
IN_ORDER = {
    "integer latents", "60000 tensors", "SD1 .latent", "4 channels", "no such tensor", "NaN", "wrong sha256",
    "no sha256", "newer format", "recipe is a list",
}  # fmt: skip


def test_files_of_the_library_are_described(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros(0),
        "scale": torch.ones(()),
        "codes": torch.zeros(7, dtype=torch.float8_e4m3fn),
        "other": torch.zeros(2, 2, dtype=torch.float8_e5m2),
        "count": torch.zeros(3, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "x", {"note": "ü\n"})
    header = read_header(tmp_path / "x")
    assert header.metadata == {"note": "ü\n"}
    assert header.size_bytes == (tmp_path / "x").stat().st_size
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "a.weight": ("BF16", (3, 5)),
        "b": ("F32", (0,)),
        "scale": ("F32", ()),
        "codes": ("F8_E4M3", (7,)),
        "other": ("F8_E5M2", (2, 2)),
        "count": ("I64", (3,)),
    }
    scale = header.tensors["scale"]
    assert (tmp_path / "x").read_bytes()[scale.start : scale.end] == b"\0\0\x80?"
    assert max(info.end for info in header.tensors.values()) == header.size_bytes
    assert header.data_start == min(info.start for info in header.tensors.values())


def test_bits_match_torch() -> None:
    for name, dtype in {"F64": torch.float64, "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}.items():
        assert BITS_BY_DTYPE[name] == 8 * dtype.itemsize


@pytest.mark.parametrize("name", [name for name in hostile_safetensors() if name not in IN_ORDER])
def test_hostile_headers_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(hostile_safetensors()[name])
    limits = LATENT_LIMITS if name == "5 million dimensions" else None
    started_s = time.process_time()
    with pytest.raises(FluxsplitError) as caught:
        read_header(path, *([limits] if limits else []))
    assert time.process_time() - started_s < 5
    assert caught.value.line().isprintable()
    assert len(caught.value.line()) < 500
    assert "x.safetensors" in caught.value.message


def test_truncation_says_how_much_is_missing(tmp_path: Path) -> None:
    whole = safetensors_bytes({"latents": tensor_entry(SHAPE)}, PAYLOAD)
    (tmp_path / "x").write_bytes(whole[:-100])
    with pytest.raises(FluxsplitError) as caught:
        read_header(tmp_path / "x")
    expected = f"x is truncated: it has {len(whole) - 100} bytes, its header says {len(whole)}; download it again"
    assert caught.value.line() == expected


@pytest.mark.parametrize(
    ("start", "said"),
    [(b"version https://git-lfs", "git lfs pull"), (b"<!DOCTYPE html>", "web page"), (b"GGUF", "fp8")],
)
def test_common_mistakes_are_named(tmp_path: Path, start: bytes, said: str) -> None:
    (tmp_path / "x").write_bytes(start + bytes(100))
    with pytest.raises(FluxsplitError) as caught:
        read_header(tmp_path / "x")
    assert said in caught.value.line()


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelFileMissing, match="does not exist"):
        read_header(tmp_path / "x")
    with pytest.raises(FluxsplitError, match="cannot read"):
        read_header(tmp_path)


def test_control_characters_are_shown(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(hostile_safetensors()["path and escape"])
    with pytest.raises(FluxsplitError) as caught:
        read_header(tmp_path / "x")
    assert "\x1b" not in caught.value.message
    assert r"\x1b" in caught.value.message


def test_a_17_gb_file_takes_milliseconds(tmp_path: Path) -> None:
    tensors, start = {}, 0
    for number in range(1500):
        tensors[f"model.diffusion_model.double_blocks.{number}.img_attn.qkv.weight"] = {
            "dtype": "F8_E4M3", "shape": [3000, 3800], "data_offsets": [start, start + 11_400_000],
        }  # fmt: skip
        start += 11_400_000
    head = safetensors_bytes(tensors)
    with (tmp_path / "x").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + start)
    elapsed_s = []
    for _ in range(3):
        started_s = time.process_time()
        assert len(read_header(tmp_path / "x").tensors) == 1500
        elapsed_s.append(time.process_time() - started_s)
    assert min(elapsed_s) < 0.1  # 7 ms on a quiet core


GOOD = safetensors_bytes({"__metadata__": {"a": "b"}, "latents": tensor_entry(SHAPE)}, PAYLOAD)
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")
EDITS = st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), max_size=4)


def damaged(edits: list[tuple[int, int]], length: int) -> bytes:
    data = bytearray(GOOD)
    for place, value in edits:
        data[place] = value
    return bytes(data[:length])


def check_damaged(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        header = read_header(path)
    except FluxsplitError as error:
        assert error.line().isprintable()
    else:
        assert sum(info.end - info.start for info in header.tensors.values()) == len(data) - header.data_start


@settings(max_examples=150, deadline=None)
@given(EDITS, st.integers(0, len(GOOD)) | st.just(len(GOOD)))
def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, edits: list, length: int) -> None:
    check_damaged(tmp_path_factory.getbasetemp() / "damaged", damaged(edits, length))


@pytest.mark.torture
@settings(max_examples=3_000, deadline=None)
@given(EDITS, st.just(len(GOOD)) | st.integers(0, len(GOOD)))
def test_much_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, edits: list, length: int) -> None:
    check_damaged(tmp_path_factory.getbasetemp() / "damaged", damaged(edits, length))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSON, JSON)
def test_any_json_is_refused_or_described(
    tmp_path_factory: pytest.TempPathFactory, entry: object, more: object
) -> None:
    table = {"t": entry, "__metadata__": more}
    check_damaged(tmp_path_factory.getbasetemp() / "any", safetensors_bytes(json.dumps(table).encode(), b"1234"))
