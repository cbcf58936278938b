"""Recipes in and out of PNG text: `parameters` for other tools, `fluxsplit` for an exact repetition.

`parameters` is AUTOMATIC1111's text as Forge and Civitai read it (A1111 `modules/infotext_utils.py`): the
prompt, a line `Negative prompt: ...`, and a last line of `Name: value` pairs. It rounds and leaves out;
`fluxsplit` is JSON that loses nothing, and the only text that is read back here. Where a latent came from
ComfyUI, its `prompt` and `workflow` go into the PNG unchanged, for else they would end with the latent file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from fluxsplit import __version__
from fluxsplit.errors import FluxsplitError
from fluxsplit.png_text import read_png
from fluxsplit.recipe import (
    SCHEMA,
    Parent,
    Recipe,
    WeightsStamp,
    parent_from_object,
    recipe_from_object,
    strict_json,
)

PARAMETERS_KEY = "parameters"
RECORD_KEY = "fluxsplit"
PNG_COMPRESS_LEVEL = 4
"""Within 2 % of zlib's default 6 on pictures, at about half the time."""
SAMPLER_NAMES = {"euler": "Euler", "heun": "Heun", "dpmpp_2m": "DPM++ 2M"}
SCHEDULE_NAMES = {"simple": "Simple", "normal": "Normal", "beta": "Beta", "sgm_uniform": "SGM Uniform"}
POSTPROCESSING_KEY = "postprocessing"
MAX_UPSCALERS = 8
_HEX = set("0123456789abcdef")
_RECORD_FIELDS = {"fluxsplit", "recipe", "latent_sha256", "vae", "versions", "dtype", "device"}
_LATER_FIELDS = {"upscaler", "parent"}
"""Left out where they say nothing, so that files without them are read by older versions too."""


@dataclass(frozen=True, slots=True)
class UpscalerStamp:
    """One enlargement of the decoded picture: by which weights, by how much, and the size that came out."""

    name: str
    sha256: str
    scale: int
    """Of the model itself; the size may have been changed after it (`--upscale-to`)."""
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What a PNG of ours says of itself."""

    recipe: Recipe | None
    """None where the latent was another program's."""
    latent_sha256: str
    """Of the fp32 payload that was decoded."""
    vae: WeightsStamp
    versions: dict[str, str] = field(default_factory=dict)
    """Of the process that decoded; the one that sampled is in the recipe."""
    dtype: str = ""
    """What the VAE computed in: fp32, bf16 or fp16."""
    device: str = ""
    """`cpu`, or the name of the graphics card that decoded."""
    upscaler: tuple[UpscalerStamp, ...] = ()
    """In the order in which they were applied; empty in a picture as it was decoded."""
    parent: Parent | None = None
    """None where the picture is no rerender."""

    def to_json(self) -> str:
        """One line of JSON that `record_from_json` reads back exactly."""
        recipe = None if self.recipe is None else json.loads(self.recipe.to_json())
        table: dict[str, Any] = {
            "fluxsplit": SCHEMA,
            "recipe": recipe,
            "latent_sha256": self.latent_sha256,
            "vae": asdict(self.vae),
            "versions": self.versions,
            "dtype": self.dtype,
            "device": self.device,
        }
        if self.upscaler:
            table["upscaler"] = [asdict(stamp) for stamp in self.upscaler]
        if self.parent is not None:
            table["parent"] = asdict(self.parent)
        return json.dumps(table, ensure_ascii=False, allow_nan=False)


def record_from_json(text: str) -> ImageRecord:
    """The record in `text`; raises FluxsplitError on anything that `ImageRecord.to_json` could not have written."""
    table = strict_json(text)
    if not isinstance(table, dict) or table.get("fluxsplit") != SCHEMA:
        raise FluxsplitError(f"its fluxsplit text is not of schema {SCHEMA}", "use a newer fluxsplit")
    if set(table) - _LATER_FIELDS != _RECORD_FIELDS:
        odd = ", ".join(repr(name[:40]) for name in sorted((set(table) - _LATER_FIELDS) ^ _RECORD_FIELDS)[:5])
        raise FluxsplitError(f"its fluxsplit text has unknown or missing fields: {odd}")
    vae, versions = _text_table(table["vae"]), _text_table(table["versions"])
    sha256 = table["latent_sha256"]
    if set(vae) != {"name", "sha256"} or not _is_sha256(sha256) or (vae["sha256"] and not _is_sha256(vae["sha256"])):
        raise FluxsplitError("its fluxsplit text has no proper VAE or latent hash")
    recipe = None if table["recipe"] is None else recipe_from_object(table["recipe"])
    computed = _text_table({name: table[name] for name in ("dtype", "device")})
    upscaler = _upscalers(table.get("upscaler", []))
    stamp = WeightsStamp(vae["name"], vae["sha256"])
    parent = parent_from_object(table["parent"]) if "parent" in table else None
    return ImageRecord(recipe, sha256, stamp, versions, **computed, upscaler=upscaler, parent=parent)


def _upscalers(value: Any) -> tuple[UpscalerStamp, ...]:
    if not isinstance(value, list) or len(value) > MAX_UPSCALERS:
        raise FluxsplitError(f"its fluxsplit text has no proper list of at most {MAX_UPSCALERS} upscalers")
    for stamp in value:
        if (
            not isinstance(stamp, dict)
            or set(stamp) != {"name", "sha256", "scale", "width", "height"}
            or not isinstance(stamp["name"], str)
            or not _is_sha256(stamp["sha256"])
            or not all(type(stamp[key]) is int and 1 <= stamp[key] < 1 << 20 for key in ("scale", "width", "height"))
        ):
            raise FluxsplitError("its fluxsplit text has an upscaler without name, SHA-256, scale and size")
    return tuple(UpscalerStamp(**stamp) for stamp in value)


def upscaled_texts(texts: Mapping[str, str], stamp: UpscalerStamp, factor: str) -> dict[str, str]:
    """The texts of an enlarged picture: those it had, verbatim, with the upscaler added.

    A record of ours gets `stamp`; every picture gets `postprocessing`, where A1111's Extras say it
    (`modules/postprocessing.py`). `factor` is what was asked for: a number or `WIDTHxHEIGHT`. `parameters`
    stays as it is: its `Size` is that of the first pass, as in A1111.
    """
    kept = dict(texts)
    with suppress(FluxsplitError):  # another version's record is carried over as it is
        record = record_from_json(kept.get(RECORD_KEY, "{}"))
        kept[RECORD_KEY] = replace(record, upscaler=(*record.upscaler, stamp)[-MAX_UPSCALERS:]).to_json()
    kind = "Postprocess upscale to" if "x" in factor else "Postprocess upscale by"
    said = {kind: factor, "Postprocess upscaler": stamp.name, "Postprocess upscaler SHA-256": stamp.sha256}
    text = ", ".join(f"{name}: {quoted(value)}" for name, value in said.items())
    before = kept.get(POSTPROCESSING_KEY)
    kept[POSTPROCESSING_KEY] = f"{before}, {text}" if before else text
    return kept


def is_enlarged(path: Path) -> bool:
    """Whether a PNG says that it was enlarged after it was decoded; of other files, and damaged ones, nobody knows."""
    if path.suffix.lower() != ".png":
        return False
    with suppress(FluxsplitError):
        return POSTPROCESSING_KEY in read_png(path).texts
    return False


def as_rendered(pictures: list[Path]) -> list[Path]:
    """Of a folder's pictures those that were not enlarged, which are others of them once more; all, where all were."""
    return [picture for picture in pictures if not is_enlarged(picture)] or pictures


def _text_table(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > 32 or not all(isinstance(text, str) for text in value.values()):
        raise FluxsplitError("its fluxsplit text has something other than a small table of texts")
    return value


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= _HEX


def read_record(path: str | Path) -> ImageRecord:
    """What the PNG at `path`, one of ours, says of itself; raises FluxsplitError, also for other tools' PNGs."""
    texts = read_png_text(path)
    if RECORD_KEY not in texts:
        found = f"; it has {', '.join(repr(name[:40]) for name in list(texts)[:6])}" if texts else ""
        raise FluxsplitError(f"{Path(path).name} has no fluxsplit text{found}", "only pictures by fluxsplit have one")
    try:
        return record_from_json(texts[RECORD_KEY])
    except FluxsplitError as error:
        raise FluxsplitError(f"{Path(path).name} is refused: {error.message}", error.hint) from None


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in the PNG at `path`; raises FluxsplitError where it has none."""
    record = read_record(path)
    if record.recipe is None:
        raise FluxsplitError(f"{Path(path).name} was decoded from another program's latent, which had no recipe")
    return record.recipe


def read_png_text(path: str | Path) -> dict[str, str]:
    """The texts of the PNG at `path`, by keyword, without decoding its pixels; raises FluxsplitError."""
    return read_png(path).texts


def png_text_chunks(record: ImageRecord, foreign: Mapping[str, str] | None = None) -> dict[str, str]:
    """The texts for a PNG, by keyword: `parameters` (where there is a recipe), `fluxsplit`, and `foreign` as is."""
    texts = {} if record.recipe is None else {PARAMETERS_KEY: parameters_text(record.recipe)}
    return {**texts, RECORD_KEY: record.to_json(), **(foreign or {})}


def parameters_text(recipe: Recipe) -> str:
    """The recipe as A1111's `parameters`.

    Guidance goes under Forge's `Distilled CFG Scale`; `Model hash` is the first 10 hex digits of the SHA-256,
    and Civitai finds the model by it and by `Hashes`. `RNG: CPU` says that the seed's noise is not a GPU's.
    """
    sha256 = recipe.transformer.sha256
    values = {
        "Steps": recipe.steps,
        "Sampler": SAMPLER_NAMES[recipe.sampler],
        "Schedule type": SCHEDULE_NAMES.get(recipe.scheduler),
        "CFG scale": _number(recipe.cfg),
        "Distilled CFG Scale": None if recipe.guidance is None else _number(recipe.guidance),
        "Seed": recipe.seed,
        "Noise index": recipe.noise_index or None,
        "Denoising strength": None if recipe.start is None else _number(recipe.start.strength),
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": sha256[:10] or None,
        "Model": recipe.transformer.name.removesuffix(".safetensors") or None,
        "RNG": "CPU",
    }
    pairs = [f"{name}: {quoted(str(value))}" for name, value in values.items() if value is not None]
    if sha256:
        pairs.append(f"Hashes: {json.dumps({'model': sha256[:10]})}")  # Civitai wants this one bare
    version = recipe.versions.get("fluxsplit", __version__)
    pairs.append(f"Version: {quoted(f'fluxsplit {version}')}")
    negative = [f"Negative prompt: {recipe.negative}"] if recipe.negative else []
    return "\n".join([recipe.prompt, *negative, ", ".join(pairs)]).replace("\0", " ")


def _number(value: float) -> str:
    return f"{value:.12g}"


def quoted(text: str) -> str:
    """A value of `parameters`, as JSON where it would end early or be taken for JSON (A1111's rule)."""
    needs_quotes = any(c in text for c in ',:"\\') or not text.isprintable() or text != text.strip()
    return json.dumps(text, ensure_ascii=False) if needs_quotes else text


def encode_png(pixels: bytes | bytearray | memoryview, width: int, height: int, texts: Mapping[str, str]) -> bytes:
    """A PNG of RGB8 `pixels` [height, width, 3] with `texts` before the picture data.

    Latin-1 text becomes tEXt, other text iTXt; `read_png_text` gives both back unchanged. Raises FluxsplitError
    for text that is no Unicode, and ValueError where `pixels` have another size.
    """
    from PIL import Image  # noqa: PLC0415 - 60 ms, and only the decoding process writes pictures
    from PIL.PngImagePlugin import PngInfo  # noqa: PLC0415

    if len(pixels) != width * height * 3:
        raise ValueError(f"{len(pixels)} bytes are not {width}x{height} RGB pixels")
    info = PngInfo()
    for keyword, text in texts.items():
        try:
            info.add_text(keyword, text)
        except UnicodeEncodeError:
            raise FluxsplitError(f"the text {keyword!r} holds a character that is no Unicode text") from None
    buffer = BytesIO()
    picture = Image.frombuffer("RGB", (width, height), bytes(pixels), "raw", "RGB", 0, 1)
    picture.save(buffer, format="PNG", pnginfo=info, compress_level=PNG_COMPRESS_LEVEL)
    return buffer.getvalue()
