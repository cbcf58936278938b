"""Encoded prompts on disk: found only where everything agrees, bounded, and never in the way."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxsplit import conditioning_cache as cache
from fluxsplit.conditioning import Conditioning, conditioning_bytes, read_conditioning
from fluxsplit.fingerprint import file_sha256, remembered_sha256, stamp_of
from fluxsplit.jobs import ModelFiles
from fluxsplit.recipe import WeightsStamp

ENCODERS = cache.Encoders(
    WeightsStamp("t5.safetensors", "a" * 64), WeightsStamp("clip.safetensors", "b" * 64), "c" * 64
)


def conditioning(folder: Path, value: float = 1.0) -> str:
    """A conditioning file."""
    tensors = Conditioning(torch.full((1, 8, 4), value), torch.full((1, 3), value))
    path = folder / f"made-{value}.safetensors"
    path.write_bytes(conditioning_bytes(tensors, "a fox"))
    return str(path)


def test_what_is_kept_is_found_and_is_the_same(tmp_path: Path) -> None:
    made = conditioning(tmp_path)
    assert cache.find(ENCODERS, "a fox") == ""
    cache.keep(ENCODERS, "a fox", made)
    found = cache.find(ENCODERS, "a fox")
    assert found and torch.equal(read_conditioning(found).t5, read_conditioning(made).t5)
    assert cache.stamps_in(found) == (ENCODERS.text_encoder, ENCODERS.clip)
    assert cache.stamps_in(made) is None, "a conditioning of --save-conditioning names no encoders"


@pytest.mark.parametrize(
    "other",
    [
        replace(ENCODERS, text_encoder=WeightsStamp("t5.safetensors", "d" * 64)),
        replace(ENCODERS, clip=WeightsStamp("clip.safetensors", "d" * 64)),
        replace(ENCODERS, tokenizers_sha256="d" * 64),
    ],
)
def test_other_weights_or_tokenizers_are_another_entry(tmp_path: Path, other: cache.Encoders) -> None:
    cache.keep(ENCODERS, "a fox", conditioning(tmp_path))
    assert cache.find(other, "a fox") == "" and cache.find(ENCODERS, "a fox ") == ""


def test_the_name_of_a_weight_file_does_not_matter(tmp_path: Path) -> None:
    cache.keep(ENCODERS, "a fox", conditioning(tmp_path))
    assert cache.find(replace(ENCODERS, clip=WeightsStamp("renamed.safetensors", "b" * 64)), "a fox")


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "swapped", "rubbish"])
def test_a_damaged_entry_is_removed(tmp_path: Path, damage: str) -> None:
    cache.keep(ENCODERS, "a fox", conditioning(tmp_path))
    cache.keep(ENCODERS, "a dog", conditioning(tmp_path, 2.0))
    entry = Path(cache.find(ENCODERS, "a fox"))
    raw = bytearray(entry.read_bytes())
    if damage == "bit":
        raw[-1] ^= 1
    entry.write_bytes(
        {
            "bit": bytes(raw),
            "cut": bytes(raw[:-4]),
            "empty": b"",
            "swapped": Path(cache.find(ENCODERS, "a dog")).read_bytes(),
            "rubbish": os.urandom(300),
        }[damage]
    )
    assert cache.find(ENCODERS, "a fox") == "" and not entry.exists()
    assert cache.find(ENCODERS, "a dog")


def test_what_is_no_conditioning_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a fox")
    cache.keep(ENCODERS, "a fox", str(tmp_path / "x"))
    cache.keep(ENCODERS, "a fox", str(tmp_path / "missing"))
    assert cache.find(ENCODERS, "a fox") == ""


def test_the_cache_is_bounded_and_the_oldest_use_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = conditioning(tmp_path)
    for number, prompt in enumerate(("a", "b", "c")):
        cache.keep(ENCODERS, prompt, made)
        os.utime(cache.find(ENCODERS, prompt), (number, number))
    cache.find(ENCODERS, "a")  # used just now
    size = Path(cache.find(ENCODERS, "a")).stat().st_size
    os.utime(cache.find(ENCODERS, "c"), (2, 2))
    os.utime(cache.folder() / Path(cache.find(ENCODERS, "b")).name, (1, 1))
    monkeypatch.setattr(cache, "MAX_CACHE_BYTES", 3 * size + 100)
    cache.keep(ENCODERS, "d", made)
    kept = [bool(cache.find(ENCODERS, prompt)) for prompt in "abcd"]
    assert kept == [True, False, True, True] and len(list(cache.folder().iterdir())) == 3


def test_an_unwritable_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLUXSPLIT_CACHE", str(tmp_path / "file" / "cache"))
    cache.keep(ENCODERS, "a fox", conditioning(tmp_path))
    assert cache.find(ENCODERS, "a fox") == ""


def test_encoders_are_known_by_remembered_hashes_only(tmp_path: Path) -> None:
    for name in ("t5", "clip", "tokenizer.json", "vocab.json", "merges.txt"):
        (tmp_path / name).write_text(name)
    files = ModelFiles(
        "m", str(tmp_path / "t5"), str(tmp_path / "clip"), "", str(tmp_path / "tokenizer.json"), str(tmp_path)
    )
    assert cache.encoders_of(files) is None and remembered_sha256(tmp_path / "t5") is None
    file_sha256(tmp_path / "t5")
    assert cache.encoders_of(files) is None
    sha256 = file_sha256(tmp_path / "clip")
    known = cache.encoders_of(files)
    assert known is not None and known.clip == WeightsStamp("clip", sha256)
    (tmp_path / "vocab.json").write_text("other")
    assert cache.encoders_of(files) != known
    (tmp_path / "t5").write_text("another t5")
    assert cache.encoders_of(files) is None, "a file that has changed is not remembered"
    assert cache.encoders_of(replace(files, text_encoder="")) is None


def test_names_that_are_no_text_fit_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "t5\udcff.safetensors"
    assert stamp_of(file, "ab" * 32) == WeightsStamp("t5?.safetensors", "ab" * 32)
