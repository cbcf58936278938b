"""The latent file, between sampling and decoding: `.pt`, `.safetensors` or ComfyUI's `.latent`, without torch.

Values are VAE-space fp32 [B, 16, height/8, width/8]: model space / 0.3611 + 0.1159, what ComfyUI's SaveLatent
writes and what `AutoencoderKL.decode` takes as is. Scaling them again is a silent error, so every way in here
ends in the same space, and files of unknown scale are refused. What a file is, its content says, not its name.

| file | tensor | recipe, SHA-256 of the payload, and of whom there is one the VAE that encoded it and the parent |
|---|---|---|
| `.pt` | `latents` in a dict for `torch.load(weights_only=True)` | `recipe`, `sha256`, `vae`, `parent` in that dict |
| `.safetensors` | `latents` | metadata `fluxsplit.recipe`, `.sha256`, `.vae`, `.parent` |
| `.latent` | `latent_tensor`, empty marker `latent_format_version_0` | the same, with ComfyUI's `prompt`, `workflow` |
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fluxsplit import durable
from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.recipe import (
    LATENT_CHANNELS,
    LATENT_FORMATS,
    MAX_SIDE_PX,
    VAE_FACTOR,
    Parent,
    Recipe,
    WeightsStamp,
    parent_from_json,
    stamp_from_json,
)
from fluxsplit.safetensor_header import LATENT_LIMITS, read_header
from fluxsplit.torch_file import BYTES_BY_DTYPE, MAX_FILE_BYTES, ZIP_MAGIC, Tensor, read_torch_file, torch_file_bytes

FORMAT = "fluxsplit-latent-1"
SUFFIXES = {"pt": ".pt", "safetensors": ".safetensors", "latent": ".latent"}
RECIPE_KEY = "fluxsplit.recipe"
SHA256_KEY = "fluxsplit.sha256"
VAE_KEY = "fluxsplit.vae"
PARENT_KEY = "fluxsplit.parent"
COMFY_TENSOR = "latent_tensor"
COMFY_MARKER = "latent_format_version_0"
FOREIGN_KEYS = ("prompt", "workflow")
_TENSOR_NAMES = ("latents", "samples")
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAX_LATENT_SIDE = MAX_SIDE_PX // VAE_FACTOR

Shape = tuple[int, int, int, int]
_Read = tuple[str, Tensor, dict[str, str], dict[str, str]]


@dataclass(frozen=True, slots=True)
class LatentFile:
    """One picture's latents, read and checked."""

    path: str
    format: str
    """One of `LATENT_FORMATS`, told by content."""
    shape: Shape
    """[1, 16, height/8, width/8]."""
    payload: bytes = field(repr=False)
    """Little-endian fp32 in C order, all finite, VAE space."""
    recipe: Recipe | None
    """None where another program wrote the file."""
    foreign: dict[str, str]
    """ComfyUI's `prompt` and `workflow`, unchanged, where the file has them."""
    payload_sha256: str
    encoded_by: WeightsStamp | None = None
    """The VAE of a latent that was made from a picture; None for others, and where it is not said."""
    parent: Parent | None = None
    """The picture that was rendered again; None where none was."""
    index: int = 0
    """Item of the batch that the file holds."""
    batch: int = 1

    @property
    def stem(self) -> str:
        """The name of what is made of it, without suffix: the file's, and of a batch the number in it."""
        return Path(self.path).stem + (f"-{self.index}" if self.batch > 1 else "")


def read_latent(path: str | Path) -> LatentFile:
    """The one picture in the latent file at `path`; raises FluxsplitError, also where the file holds a batch."""
    latents = read_latents(path)
    if len(latents) != 1:
        raise FluxsplitError(f"{Path(path).name} holds a batch of {len(latents)} latents, one is needed here")
    return latents[0]


def read_latents(path: str | Path) -> list[LatentFile]:
    """The pictures in the latent file at `path`, each [1, 16, height/8, width/8]; ComfyUI's may hold a batch.

    fp16 and bf16 are widened exactly. Raises UsageError where there is no such file, FluxsplitError where it is
    not a latent of Flux, is damaged, or holds NaN or infinity.
    """
    path = Path(path)
    try:
        kind, tensor, texts, foreign = _read(path)
        return _checked(path, kind, tensor, texts, foreign)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise FluxsplitError(f"cannot read {path}: {error.strerror}") from error


def write_latent(
    folder: str | Path,
    stem: str,
    payload: bytes,
    shape: Shape,
    recipe: Recipe | None,
    *,
    format: str = "pt",
    encoded_by: WeightsStamp | None = None,
    parent: Parent | None = None,
) -> Path:
    """Write latents to the first free `folder/stem.ext`, `stem-2.ext`, ..., durably; returns the path.

    `payload` is little-endian fp32 [1, 16, height/8, width/8] in C order, VAE space; `format` is one of
    `LATENT_FORMATS`; `encoded_by` is the VAE, where it was made from a picture, and `parent` the picture that it is a
    rerender of. Raises FluxsplitError where values are not finite, where size and recipe disagree, or where the disk
    refuses.
    """
    if format not in LATENT_FORMATS:
        raise UsageError(f"latent format {format!r} is not one of {', '.join(LATENT_FORMATS)}")
    try:
        _check_shape(shape)
        _check_payload(payload, shape)
        if recipe is not None:
            _check_size(shape, recipe)
        if parent is not None:
            parent_from_json(json.dumps(asdict(parent)))
    except FluxsplitError as error:
        raise FluxsplitError(f"latent {stem} is not written: {error.message}", error.hint) from None
    more = {"vae": encoded_by, "parent": parent}
    stamps = {name: json.dumps(asdict(value)) for name, value in more.items() if value is not None}
    data = _encoded(payload, shape, recipe, format, stamps)
    if encoded_by is not None:  # has no time in it, and is the same each time
        return durable.write_once(folder, stem, SUFFIXES[format], b"".join(data))
    return durable.write_free(folder, stem, SUFFIXES[format], data)


def _encoded(
    payload: bytes, shape: Shape, recipe: Recipe | None, format: str, stamps: Mapping[str, str]
) -> list[bytes | memoryview]:
    sha256 = hashlib.sha256(payload).hexdigest()
    text = "" if recipe is None else recipe.to_json()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FluxsplitError("the prompt holds a character that is no Unicode text", "retype the prompt") from None
    if format == "pt":
        texts = {"format": FORMAT, "recipe": text, "sha256": sha256, **stamps}
        return [torch_file_bytes("latents", shape, payload, texts)]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": (0, len(payload))}
    empty = {"dtype": "F32", "shape": (0,), "data_offsets": (len(payload), len(payload))}
    tensors = {"latents": entry} if format == "safetensors" else {COMFY_TENSOR: entry, COMFY_MARKER: empty}
    metadata = {"format": FORMAT, RECIPE_KEY: text, SHA256_KEY: sha256}
    metadata |= {key: stamps[name] for name, key in (("vae", VAE_KEY), ("parent", PARENT_KEY)) if name in stamps}
    header = json.dumps({"__metadata__": metadata, **tensors}, ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)
    return [struct.pack("<Q", len(header)), header, payload]


def _read(path: Path) -> _Read:
    """Format, raw tensor, our own texts (format, recipe, sha256, vae, parent) and foreign texts of the file."""
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(ZIP_MAGIC):
        return _read_pt(path)
    if start.startswith(_OLD_TORCH) or start[257:262] == b"ustar":
        hint = "load and save it again with torch 1.6 or newer, if you trust it"
        raise FluxsplitError(f"{path.name} is in the old torch format, which cannot be read safely", hint)
    if start[8:9] != b"{":
        raise FluxsplitError(f"{path.name} is no latent file", "latents are .pt, .safetensors or ComfyUI's .latent")
    return _read_safetensors(path)


def _read_pt(path: Path) -> _Read:
    try:
        table = read_torch_file(path, (*_TENSOR_NAMES, "format", "recipe", "sha256", "vae", "parent"))
    except FluxsplitError as error:
        raise FluxsplitError(f"{path.name} is refused: {error.message}", error.hint) from None
    texts = {name: value for name, value in table.items() if isinstance(value, str) and name not in _TENSOR_NAMES}
    tensors = [value for value in table.values() if isinstance(value, Tensor)]
    if len(tensors) != 1 or len(texts) + 1 != len(table):
        raise FluxsplitError(f"{path.name} holds no tensor named latents or samples", "name a latent file")
    return "pt", tensors[0], texts, {}


def _read_safetensors(path: Path) -> _Read:
    header = read_header(path, LATENT_LIMITS)
    names = (COMFY_TENSOR, *_TENSOR_NAMES)
    found = [info for name, info in header.tensors.items() if name in names]
    if len(found) != 1:
        held = ", ".join(name[:40] for name in header.tensors) or "nothing"
        raise FluxsplitError(f"{path.name} is no latent file: it holds {held}")
    info = found[0]
    if info.name == COMFY_TENSOR and COMFY_MARKER not in header.tensors:
        raise FluxsplitError(
            f"{path.name} has no {COMFY_MARKER}: ComfyUI wrote it for Stable Diffusion 1, scaled by 0.18215",
            "only Flux latents can be decoded",
        )
    if info.dtype not in BYTES_BY_DTYPE:
        raise FluxsplitError(f"{path.name} holds {info.dtype} latents", "save them as fp32, fp16 or bf16")
    if info.end - info.start > MAX_FILE_BYTES:
        raise FluxsplitError(f"{path.name} has {info.end - info.start} bytes of latents, over {MAX_FILE_BYTES}")
    with path.open("rb") as file:
        file.seek(info.start)
        data = file.read(info.end - info.start)
    if len(data) != info.end - info.start:
        raise FluxsplitError(f"{path.name} became shorter while it was read")
    ours = {"recipe": RECIPE_KEY, "sha256": SHA256_KEY, "vae": VAE_KEY, "parent": PARENT_KEY, "format": "format"}
    texts = {name: header.metadata[key] for name, key in ours.items() if key in header.metadata}
    foreign = {key: header.metadata[key] for key in FOREIGN_KEYS if header.metadata.get(key)}
    kind = "latent" if info.name == COMFY_TENSOR else "safetensors"
    return kind, Tensor(info.dtype, info.shape, data), texts, foreign


def _checked(
    path: Path, kind: str, tensor: Tensor, texts: Mapping[str, str], foreign: dict[str, str]
) -> list[LatentFile]:
    """The file's pictures, after everything that it says was held against everything else."""
    try:
        recipe = Recipe.from_json(texts["recipe"]) if texts.get("recipe") else None
        own = texts if texts.get("format") == FORMAT else {}
        encoded_by = stamp_from_json(own["vae"], "its VAE") if "vae" in own else None
        parent = parent_from_json(own["parent"]) if "parent" in own else None
        shape = (1, *tensor.shape) if len(tensor.shape) == 3 and tensor.shape[0] != 1 else tensor.shape
        _check_shape(shape)
        batch, channels, height, width = shape
        payload = _widened(tensor)
        sha256 = hashlib.sha256(payload).hexdigest()
        _check_texts(texts, sha256)
        _check_payload(payload, shape)
        if recipe is not None:
            _check_size(shape, recipe)
    except FluxsplitError as error:
        raise FluxsplitError(f"{path.name} is refused: {error.message}", error.hint) from None
    if batch == 1:
        one = (1, channels, height, width)
        return [LatentFile(str(path), kind, one, payload, recipe, foreign, sha256, encoded_by, parent)]
    size = len(payload) // batch
    items = [payload[start : start + size] for start in range(0, len(payload), size)]
    return [
        LatentFile(
            str(path),
            kind,
            (1, channels, height, width),
            item,
            None,
            foreign,
            hashlib.sha256(item).hexdigest(),
            encoded_by,
            None,
            index,
            batch,
        )
        for index, item in enumerate(items)
    ]


def _check_texts(texts: Mapping[str, str], sha256: str) -> None:
    """A file of ours names its format and the hash of its payload; a stranger's names neither."""
    named = texts.get("format", "")
    if named.startswith("fluxsplit") and named != FORMAT:
        raise FluxsplitError(f"its format is {named[:40]!r}, this version reads {FORMAT}", "use a newer fluxsplit")
    if (named == FORMAT or texts.get("recipe")) and "sha256" not in texts:
        raise FluxsplitError("it lacks the SHA-256 of its latents", "make it again")
    if "sha256" in texts and texts["sha256"] != sha256:
        raise FluxsplitError("it is damaged: its latents do not have the SHA-256 it records", "make it again")


def _check_shape(shape: tuple[int, ...]) -> None:
    """Refuse what is not [B, 16, height/8, width/8] of a picture in range."""
    shown = "x".join(map(str, shape)) or "scalar"
    if len(shape) == 4 and shape[1] == 4:
        raise FluxsplitError(f"its shape {shown} is a Stable Diffusion latent (4 channels), not Flux (16)")
    if len(shape) == 3 and shape[2] == 4 * LATENT_CHANNELS:
        hint = "unpack it with FluxPipeline._unpack_latents, then divide by 0.3611 and add 0.1159"
        raise FluxsplitError(f"its shape {shown} is a packed latent of diffusers", hint)
    if len(shape) != 4 or shape[1] != LATENT_CHANNELS or not 1 <= shape[0] <= 10_000:
        raise FluxsplitError(f"its shape {shown} is not 1x16x(height/8)x(width/8)")
    if not all(2 <= side <= _MAX_LATENT_SIDE for side in shape[2:]):
        raise FluxsplitError(f"its shape {shown} is a picture of {shape[3] * 8}x{shape[2] * 8} pixels, out of range")


def _check_size(shape: tuple[int, ...], recipe: Recipe) -> None:
    if shape != (1, LATENT_CHANNELS, recipe.height // VAE_FACTOR, recipe.width // VAE_FACTOR):
        shown = "x".join(map(str, shape))
        raise FluxsplitError(f"its shape {shown} is not that of its recipe, {recipe.width}x{recipe.height} pixels")


def _check_payload(payload: bytes, shape: tuple[int, ...]) -> None:
    """Refuse a payload of the wrong length, or with values that no decoder can draw."""
    if len(payload) != 4 * math.prod(shape):
        raise FluxsplitError(f"its {len(payload)} bytes are not fp32 of shape {'x'.join(map(str, shape))}")
    values = _floats(payload)
    # fp32 values are added as doubles, which finite ones cannot overflow: the sum is finite iff all are.
    if math.isfinite(sum(values)):
        return
    count = sum(not math.isfinite(value) for value in values)
    hint = "sample again with --dtype bf16 or fp32"
    raise FluxsplitError(f"{count} of its {len(values)} values are NaN or infinite", hint)


def _floats(payload: bytes) -> memoryview[float] | array[float]:
    if sys.byteorder == "little":
        return memoryview(payload).cast("f")
    values = array("f")
    values.frombytes(payload)
    values.byteswap()
    return values


def _widened(tensor: Tensor) -> bytes:
    """The values as little-endian fp32, exactly."""
    if tensor.dtype == "F32":
        return tensor.data
    wide = bytearray(2 * len(tensor.data))
    if tensor.dtype == "BF16":  # the upper half of an fp32
        wide[2::4] = tensor.data[0::2]
        wide[3::4] = tensor.data[1::2]
        return bytes(wide)
    step = 1 << 17  # bytes; keeps the Python floats of a large file from piling up
    for start in range(0, len(tensor.data), step):
        part = tensor.data[start : start + step]
        count = len(part) // 2
        struct.pack_into(f"<{count}f", wide, 2 * start, *struct.unpack(f"<{count}e", part))
    return bytes(wide)
