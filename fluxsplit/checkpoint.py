"""What weight files hold: the layout told by keys, the parts inside, and where each parameter's bytes are.

Only headers are read here. A file is recognised by its keys, never by its name, since `flux1-dev-fp8.safetensors`
is the name of a 12 GB transformer and of a 17 GB all-in-one file alike. Facts about the layouts come from
ComfyUI v0.3.64 (`comfy/model_detection.py`, `comfy/supported_models.py`, `comfy/ops.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from fluxsplit.errors import FluxsplitError, ModelFileMissing
from fluxsplit.names import Target, transformer_targets, vae_target
from fluxsplit.places import is_hidden
from fluxsplit.recipe import strict_json
from fluxsplit.refusals import refuse_foreign, refuse_quantisation
from fluxsplit.safetensor_header import Header, TensorInfo, read_header

PARTS = ("transformer", "t5", "clip", "vae")
CONFIG_KEY = "fluxsplit.config"
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_FP8_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_PREFIXES = {
    "transformer": ("model.diffusion_model.", ""),
    "t5": ("text_encoders.t5xxl.transformer.", ""),
    "clip": ("text_encoders.clip_l.transformer.", ""),
    "vae": ("vae.", "first_stage_model.", ""),
}
_SENTINELS = {
    "transformer": ("double_blocks.0.img_attn.norm.key_norm.scale", "transformer_blocks.0.attn.norm_added_k.weight"),
    "t5": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
    "clip": ("text_model.embeddings.position_embedding.weight", "embeddings.position_embedding.weight"),
    "vae": ("decoder.conv_in.weight",),
}
_FOLDERS = {"transformer": "transformer", "t5": "text_encoder_2", "clip": "text_encoder", "vae": "vae"}
_IGNORED = ("logit_scale", "text_projection.weight", "position_ids", "scaled_fp8", "comfy_quant", "embed_tokens.weight")
_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")


@dataclass(frozen=True, slots=True)
class PartInfo:
    """One part of a model, as the header shows it."""

    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    """Number of parameters by dtype, as in `{"F8_E4M3": 11891146752}`."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the values of one parameter are: row runs of one tensor of a file, in order."""

    path: str
    tensor: TensorInfo
    runs: tuple[tuple[int, int], ...]
    """Rows; more than one run only where halves are exchanged."""
    shape: tuple[int, ...]
    dtype: str
    """As stored, F8_E4M3 also where a quantised file keeps the codes as U8."""
    scale: TensorInfo | None = None
    """fp32 scalar: the weight is code * scale."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a model: its parameters by their diffusers or transformers names."""

    kind: str
    layout: str
    sources: dict[str, Source]
    config: dict[str, Any]
    """What the file's `fluxsplit.config` says of this part."""

    @property
    def path(self) -> str:
        """The file that holds it; of several, one."""
        return next(iter(self.sources.values())).path

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter; raises FluxsplitError if the file has none of that name."""
        if name not in self.sources:
            raise FluxsplitError(f"the {self.kind} has no {name}", "the file is incomplete; download it again")
        return self.sources[name].shape

    def count(self, pattern: str) -> int:
        """How many numbers n, from 0 up, make `pattern % n` the start of a parameter's name."""
        n = 0
        while any(name.startswith(pattern % n) for name in self.sources):
            n += 1
        return n


@dataclass(frozen=True, slots=True)
class Contents:
    """What a weight file or folder holds."""

    layout: str
    """`ComfyUI all-in-one`, `BFL`, `diffusers`, or the part's name for a lone text encoder or VAE."""
    parts: dict[str, PartInfo]
    """By kind: transformer, t5, clip, vae."""
    variant: str
    """`schnell`, `dev`, or empty where there is no transformer."""
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def describe(path: str | Path) -> Contents:
    """What the weights at `path` (a safetensors file or a diffusers folder) hold, from the headers alone.

    Raises FluxsplitError for anything that is not a Flux.1 weight file in a float format, naming what it is.
    """
    parts = {kind: part for kind in PARTS if (part := find_part(path, kind)) is not None}
    if not parts:
        refuse_foreign(path, {name for header in _headers(path, "transformer") for name in header.tensors})
    variant = "" if "transformer" not in parts else variant_of(parts["transformer"])
    layouts = {part.layout for part in parts.values()}
    if "prefixed" in layouts:
        layout = "ComfyUI all-in-one"
    elif "transformer" in parts:
        layout = parts["transformer"].layout
    else:
        layout = " + ".join(parts)
    config = _config(next(iter(_headers(path, next(iter(parts))))))
    return Contents(layout, {kind: _summary(part) for kind, part in parts.items()}, variant, config)


def variant_of(transformer: Part) -> str:
    """`dev` if the transformer embeds a guidance, else `schnell` (ComfyUI `supported_models.py`)."""
    embeds_guidance = any(name.startswith("time_text_embed.guidance_embedder.") for name in transformer.sources)
    return "dev" if embeds_guidance else "schnell"


def part(path: str | Path, kind: str) -> Part:
    """The part `kind` of the weights at `path`; raises ModelFileMissing if they do not hold it."""
    found = find_part(path, kind)
    if found is None:
        held = ", ".join(describe(path).parts)
        raise ModelFileMissing(f"{Path(path).name} holds {held}, but no {kind}", f"name a file that holds the {kind}")
    return found


def find_part(path: str | Path, kind: str) -> Part | None:
    """The part `kind` (one of `PARTS`) of the weights at `path`, or None if they do not hold it.

    Raises FluxsplitError if the file cannot be read, or holds this part in a format that is not supported.
    """
    headers = _headers(path, kind)
    names = {name for header in headers for name in header.tensors}
    for prefix in _PREFIXES[kind]:
        for sentinel in _SENTINELS[kind]:
            if prefix + sentinel in names:
                return _read_part(headers, kind, prefix, sentinel)
    if kind == "transformer":
        bare = {name.removeprefix("model.diffusion_model.") for name in names}
        if "double_blocks.0.img_mod.lin.weight" in bare or any(name.startswith("distilled_g") for name in bare):
            refuse_foreign(path, names)
    return None


def _headers(path: str | Path, kind: str) -> list[Header]:
    """Headers of the file, or of the shards that a diffusers folder holds for this part."""
    place = Path(path)
    if not place.exists():
        raise ModelFileMissing(f"{place} does not exist")
    if place.is_file():
        return [read_header(place)]
    folder = place / _FOLDERS[kind] if (place / _FOLDERS[kind]).is_dir() else place
    files = sorted(file for file in folder.glob("*.safetensors") if not is_hidden(file))
    if folder == place and (place / "model_index.json").exists():
        return []
    if not files and folder == place:
        raise ModelFileMissing(f"{place} holds no safetensors file and no diffusers model")
    return [read_header(file) for file in files]


def _config(header: Header) -> dict[str, Any]:
    text = header.metadata.get(CONFIG_KEY)
    if text is None:
        return {}
    config = strict_json(text)
    if not isinstance(config, dict):
        raise FluxsplitError(f"{CONFIG_KEY} of {Path(header.path).name} is not a JSON object")
    return config


def _summary(part: Part) -> PartInfo:
    tensors = {(source.path, source.tensor.name): source for source in part.sources.values()}
    dtypes: dict[str, int] = {}
    for source in tensors.values():
        dtypes[source.dtype] = dtypes.get(source.dtype, 0) + math.prod(source.tensor.shape)
    size = sum(source.tensor.end - source.tensor.start for source in tensors.values())
    return PartInfo(len(tensors), sum(dtypes.values()), size, dict(sorted(dtypes.items(), key=lambda kv: -kv[1])))


def _read_part(headers: list[Header], kind: str, prefix: str, sentinel: str) -> Part:
    mapping, layout = _vocabulary(kind, prefix, sentinel, headers)
    sources: dict[str, Source] = {}
    unknown: list[str] = []
    for header in headers:
        formats = _quantised_layers(header, prefix)
        for name, tensor in header.tensors.items():
            if not name.startswith(prefix) or _is_marker(name) or not _belongs(kind, prefix, name):
                continue
            if name.rpartition(".")[0] not in formats:
                refuse_quantisation(header.path, name, tensor.dtype)
            targets = mapping(name[len(prefix) :])
            if not targets:
                unknown.append(name)
            for target in targets:
                if target.name in sources:
                    _refuse_second(kind, sources[target.name].path, header.path, target.name, name)
                sources[target.name] = _source(header, tensor, target, formats, prefix)
    if unknown:
        shown = ", ".join(sorted(unknown)[:4])
        raise FluxsplitError(
            f"{Path(headers[0].path).name} has {len(unknown)} tensors that Flux.1's {kind} does not have: {shown}",
            "this is another model, or one changed by a tool that fluxsplit does not know",
        )
    return Part(kind, layout, sources, _part_config(headers, kind))


def _refuse_second(kind: str, first: str, second: str, target: str, name: str) -> NoReturn:
    """What is there twice is so in two files of a folder, as a rule."""
    names = Path(first).name, Path(second).name
    if names[0] != names[1]:
        folder = Path(second).parent
        raise FluxsplitError(f"{folder} holds two files with a {kind}: {names[0]} and {names[1]}", "name one of them")
    raise FluxsplitError(f"{names[1]} fills {target} twice, again by {name}", "the file is damaged")


def _part_config(headers: list[Header], kind: str) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for header in headers:
        value = _config(header).get(kind, {})
        if not isinstance(value, dict):
            raise FluxsplitError(f"{CONFIG_KEY} of {Path(header.path).name}: {kind} is not an object")
        config.update(value)
    return config


def _belongs(kind: str, prefix: str, name: str) -> bool:
    """Whether a tensor of an unprefixed file is this part's: a bare file may hold a stray other part."""
    if prefix:
        return True
    others = [p for other, prefixes in _PREFIXES.items() if other != kind for p in prefixes if p]
    return not name.startswith(tuple(others))


def _is_marker(name: str) -> bool:
    return name.endswith(_IGNORED) or name.endswith(_SCALES + _INPUT_SCALES)


Mapping = Callable[[str], tuple[Target, ...]]


def _same(name: str) -> tuple[Target, ...]:
    return (Target(name),)


def _vocabulary(kind: str, prefix: str, sentinel: str, headers: list[Header]) -> tuple[Mapping, str]:
    layout = "prefixed" if prefix else kind
    if kind == "transformer":
        if sentinel.startswith("transformer_blocks"):
            return _same, "prefixed" if prefix else "diffusers"
        return transformer_targets, "prefixed" if prefix else "BFL"
    if kind == "vae":
        names = {name for header in headers for name in header.tensors}
        if any(name.startswith(prefix + "decoder.up_blocks.") for name in names):
            return _same, layout
        levels = 0
        while any(name.startswith(f"{prefix}encoder.down.{levels}.") for name in names):
            levels += 1
        return (lambda name: (Target(vae_target(name, levels)),)), layout
    if kind == "clip":
        return (lambda name: (Target(name.removeprefix("text_model.")),)), layout
    return _same, layout


def _source(header: Header, tensor: TensorInfo, target: Target, formats: dict[str, str], prefix: str) -> Source:
    stem = tensor.name.rpartition(".")[0]
    dtype = formats.get(stem, tensor.dtype) if tensor.name.endswith(".weight") else tensor.dtype
    if dtype not in _FLOATS:
        raise FluxsplitError(f"{Path(header.path).name} stores {tensor.name} as {tensor.dtype}, not as a float")
    rows = tensor.shape[0] if tensor.shape else 1
    runs: tuple[tuple[int, int], ...] = ((0, rows),)
    if target.rows is not None:
        hidden = _hidden_size(header, prefix)
        runs = ((target.rows[0] * hidden, target.rows[1] * hidden),)
        if runs[0][1] > rows:
            raise FluxsplitError(f"{tensor.name} has {rows} rows, {target.name} needs rows {runs[0][0]}..{runs[0][1]}")
    elif target.swap_halves:
        runs = ((rows // 2, rows), (0, rows // 2))
    shape = (sum(stop - start for start, stop in runs), *tensor.shape[1:]) if tensor.shape else ()
    scale = next((header.tensors[stem + s] for s in _SCALES if stem + s in header.tensors), None)
    if scale is not None and (scale.dtype != "F32" or math.prod(scale.shape) != 1):
        raise FluxsplitError(
            f"{Path(header.path).name} scales {stem} by a {scale.dtype} tensor of shape {list(scale.shape)}",
            "only one fp32 scale for each matrix is supported",
        )
    return Source(header.path, tensor, runs, shape, dtype, scale if tensor.name.endswith(".weight") else None)


def _hidden_size(header: Header, prefix: str) -> int:
    if prefix + "img_in.weight" not in header.tensors:
        raise FluxsplitError(f"{Path(header.path).name} has no {prefix}img_in.weight", "the file is incomplete")
    return header.tensors[prefix + "img_in.weight"].shape[0]


def _quantised_layers(header: Header, prefix: str) -> dict[str, str]:
    """Storage dtype by layer, where ComfyUI's quantisation metadata names one; raises on formats other than float8."""
    formats: dict[str, str] = {}
    for layer, value in _quantisation_entries(header):
        name = value.get("format") if isinstance(value, dict) else None
        if name not in _FP8_FORMATS:
            raise FluxsplitError(
                f"{Path(header.path).name} stores {layer} as {str(name)[:40]}, which is not supported",
                "use an fp8 (e4m3fn or e5m2), fp16 or bf16 file",
            )
        for stem in (layer, prefix + layer):
            formats[stem] = _FP8_FORMATS[name]
    return formats


def _quantisation_entries(header: Header) -> Iterable[tuple[str, Any]]:
    text = header.metadata.get("_quantization_metadata")
    if text is not None:
        layers = strict_json(text).get("layers", {})
        yield from layers.items()
    for name, tensor in header.tensors.items():
        if name.endswith(".comfy_quant"):
            with Path(header.path).open("rb") as file:
                file.seek(tensor.start)
                raw = file.read(min(tensor.end - tensor.start, 4096))
            try:
                yield name.removesuffix(".comfy_quant"), json.loads(raw)
            except ValueError:
                raise FluxsplitError(f"{Path(header.path).name}: {name} is not JSON") from None
