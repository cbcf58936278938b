"""Encoded prompts kept on disk, so that a prompt is encoded once: T5 is 5 to 10 GB to read, its result 4 MB.

An entry is a conditioning file under the SHA-256 of what it was made from: both encoders' weights, the tokenizers,
the prompt. Its metadata names these again, with the SHA-256 of the tensors; an entry of which any of it disagrees is
removed and made again. Weights are known by their remembered hash (see `fingerprint`): nothing here opens them, so a
prompt is kept once the hash is known, which is when its first picture is done at the latest. Oldest use goes first.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fluxsplit import durable
from fluxsplit.conditioning_header import MAX_FILE_BYTES, payload_sha256
from fluxsplit.errors import FluxsplitError
from fluxsplit.fingerprint import cache_folder, remembered_sha256, stamp_of
from fluxsplit.jobs import ModelFiles
from fluxsplit.recipe import WeightsStamp
from fluxsplit.safetensor_header import read_header

ENCODING = 1
"""Of the way in which prompts are encoded; raised whenever the same weights would give other numbers."""
MAX_CACHE_BYTES = 1_000_000_000
_SOURCE, _PAYLOAD = "fluxsplit.source", "fluxsplit.sha256"


@dataclass(frozen=True, slots=True)
class Encoders:
    """What turns a prompt into a conditioning."""

    text_encoder: WeightsStamp
    clip: WeightsStamp
    tokenizers_sha256: str


def encoders_of(files: ModelFiles) -> Encoders | None:
    """The encoders in `files`, if the hashes of their weights are remembered."""
    stamps = []
    for path in (files.text_encoder, files.clip):
        sha256 = remembered_sha256(path) if path else None
        if sha256 is None:
            return None
        stamps.append(stamp_of(path, sha256))
    tokenizers = tokenizers_sha256(files.t5_tokenizer, files.clip_tokenizer)
    return Encoders(stamps[0], stamps[1], tokenizers) if tokenizers else None


def tokenizers_sha256(t5_tokenizer: str, clip_tokenizer: str) -> str:
    """One SHA-256 of the tokenizers' files, a few MB; empty where one cannot be read."""
    digest = hashlib.sha256()
    folder = Path(clip_tokenizer)
    for file in (Path(t5_tokenizer), folder / "vocab.json", folder / "merges.txt"):
        try:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError:
            return ""
    return digest.hexdigest()


def find(encoders: Encoders, prompt: str) -> str:
    """The path of the conditioning of a prompt, checked; empty where there is none."""
    file = _file(encoders, prompt)
    try:
        if not file.is_file():
            return ""
        if not _holds(file, _source(encoders, prompt)):
            file.unlink()
            return ""
        os.utime(file)
    except FluxsplitError:
        with suppress(OSError):
            file.unlink()
        return ""
    except OSError:
        return ""
    return str(file)


def keep(encoders: Encoders, prompt: str, conditioning: str) -> None:
    """Keep a copy of the conditioning file of a prompt. Without a writable cache it is encoded again next time."""
    with suppress(FluxsplitError, OSError):
        read_header(conditioning)  # refuses what is no safetensors file
        raw = Path(conditioning).read_bytes()
        entry = _with_metadata(raw, prompt, _source(encoders, prompt))
        if len(entry) <= MAX_FILE_BYTES:
            durable.replace(_file(encoders, prompt), entry)
            _trim(folder().glob("*.safetensors"))


def folder() -> Path:
    """Where the entries are."""
    return cache_folder() / "conditioning"


def stamps_in(conditioning: str) -> tuple[WeightsStamp, WeightsStamp] | None:
    """Which T5 and CLIP an entry was made with; None for a file that does not say."""
    with suppress(FluxsplitError, OSError, ValueError, TypeError, KeyError):
        source = json.loads(read_header(conditioning).metadata[_SOURCE])
        return WeightsStamp(**source["text_encoder"]), WeightsStamp(**source["clip"])
    return None


def _source(encoders: Encoders, prompt: str) -> str:
    return json.dumps({"encoding": ENCODING, **asdict(encoders), "prompt": prompt}, sort_keys=True)


def _file(encoders: Encoders, prompt: str) -> Path:
    hashes = (encoders.text_encoder.sha256, encoders.clip.sha256, encoders.tokenizers_sha256)
    key = json.dumps([ENCODING, *hashes, prompt])
    return folder() / f"{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}.safetensors"


def _holds(file: Path, source: str) -> bool:
    """Whether an entry is whole and of this very source; the names of files may differ, their hashes may not."""
    metadata = read_header(file).metadata
    return _unnamed(metadata.get(_SOURCE, "{}")) == _unnamed(source) and metadata.get(_PAYLOAD) == payload_sha256(
        file.read_bytes()
    )


def _unnamed(source: str) -> object:
    try:
        table = json.loads(source)
        for part in ("text_encoder", "clip"):
            table[part].pop("name", None)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None
    return table


def _with_metadata(raw: bytes, prompt: str, source: str) -> bytes:
    """A safetensors file with other metadata, its tensors as they are."""
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = {"prompt": json.dumps(prompt), _SOURCE: source, _PAYLOAD: payload_sha256(raw)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + raw[8 + length :]


def _trim(files: Iterable[Path]) -> None:
    """Remove what was used longest ago, until the rest fits."""
    known = sorted(((file.stat().st_mtime, file.stat().st_size, file) for file in files), reverse=True)
    total = 0
    for _, size, file in known:
        total += size
        if total > MAX_CACHE_BYTES:
            file.unlink(missing_ok=True)
