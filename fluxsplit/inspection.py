"""What `fluxsplit info` says of a file: a latent, a picture or weights, told by content and never by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fluxsplit import checkpoint
from fluxsplit.conditioning_header import prompt_of
from fluxsplit.errors import FluxsplitError, refusal
from fluxsplit.found import found_in, read_found
from fluxsplit.found_text import as_form, facts_of, started_from
from fluxsplit.latents import COMFY_TENSOR, read_latents
from fluxsplit.metadata import PARAMETERS_KEY, RECORD_KEY, record_from_json
from fluxsplit.picture_text import PictureText, first_bytes, picture_kind, read_picture_text
from fluxsplit.places import safetensors_below
from fluxsplit.recipe import VAE_FACTOR, Parent, Recipe, WeightsStamp
from fluxsplit.safetensor_header import NoSafetensors, read_header
from fluxsplit.torch_file import ZIP_MAGIC

HASH_DIGITS = 16
"""Of a weight file's hash, for people; `--json` has all of them."""
_OTHER_PICTURES = ((b"RIFF", "a RIFF file, but no WebP"), (b"GIF8", "a GIF"), (b"%!PS", "PostScript"), (b"BM", "a BMP"))
_LATENT_TENSORS = {COMFY_TENSOR, "latents", "samples"}
_CONDITIONING_TENSORS = {"t5", "pooled"}


@dataclass(frozen=True, slots=True)
class Report:
    """What one file is."""

    path: str
    kind: str
    """`latent`, `picture`, `conditioning` or `weights`."""
    size_bytes: int
    facts: tuple[tuple[str, str], ...]
    """Name and value, in the order to show them."""
    recipe: Recipe | None = None
    details: dict[str, Any] = field(default_factory=dict)
    """The facts as data, for `--json`."""

    def to_json(self) -> str:
        """One line of JSON: path, kind, size_bytes, recipe (object or null), and the details of this kind."""
        recipe = None if self.recipe is None else json.loads(self.recipe.to_json())
        table = {"path": self.path, "kind": self.kind, "size_bytes": self.size_bytes, "recipe": recipe}
        return json.dumps({**table, **self.details}, allow_nan=False)

    def lines(self) -> list[str]:
        """Lines for people: the path, then one indented `name: value` each, control characters made visible."""
        facts = (*self.facts, *(_recipe_facts(self.recipe) if self.recipe else ()))
        width = max((len(name) for name, _ in facts), default=0) + 1
        return [_visible(self.path), *(f"  {name + ':':{width}} {_visible(value)}" for name, value in facts)]


def inspect(path: str | Path) -> Report:
    """What the file or diffusers folder at `path` is.

    Raises UsageError where there is nothing at `path`, FluxsplitError for what cannot be read and for files that are
    damaged or of another kind, with one line that says which.
    """
    try:
        return _inspect(Path(path))
    except OSError as error:
        raise refusal(error) from error


def _inspect(path: Path) -> Report:
    if path.is_dir():
        return _weights(path, sum(file.stat().st_size for file in safetensors_below(path)))
    start = first_bytes(path, 512)
    size_bytes = path.stat().st_size
    if picture_kind(start):
        return _picture(path, size_bytes)
    for magic, what in _OTHER_PICTURES:
        if start.startswith(magic):
            raise FluxsplitError(f"{path.name} is {what}, of which nothing is read", "name a PNG, JPEG or WebP")
    if start.startswith((ZIP_MAGIC, b"\x80")) or start[257:262] == b"ustar":
        return _latent(path, size_bytes)
    try:
        tensors = set(read_header(path).tensors)
    except NoSafetensors:
        what = f"it starts with {start[:12]!r}" if start else "it is empty"
        raise FluxsplitError(f"{path.name} is no picture, latent or weight file: {what}") from None
    if tensors & _LATENT_TENSORS:
        return _latent(path, size_bytes)
    if tensors >= _CONDITIONING_TENSORS:
        return _conditioning(path, size_bytes)
    return _weights(path, size_bytes)


def _latent(path: Path, size_bytes: int) -> Report:
    latents = read_latents(path)
    first = latents[0]
    height, width = (side * VAE_FACTOR for side in first.shape[2:])
    batch = f", batch of {first.batch}" if first.batch > 1 else ""
    facts = [
        ("kind", f"latent ({first.format}{batch})"),
        ("picture", f"{width}x{height} pixels"),
        ("latents", f"{'x'.join(map(str, first.shape))} fp32, all finite"),
        ("payload sha256", first.payload_sha256),
        *([("encoded by", _stamp(first.encoded_by))] if first.encoded_by else []),
        *_parent_facts(first.parent),
        *_foreign_facts(first.foreign),
    ]
    if first.recipe is None:
        facts += facts_of(read_found(path)) or [("recipe", "none: an encoded picture, or another program's")]
    details = {
        "format": first.format,
        "batch": first.batch,
        "shape": list(first.shape),
        "width": width,
        "height": height,
        "payload_sha256": [latent.payload_sha256 for latent in latents],
        "encoded_by": asdict(first.encoded_by) if first.encoded_by else None,
        "parent": asdict(first.parent) if first.parent else None,
        "foreign": first.foreign,
    }
    return Report(str(path), "latent", size_bytes, tuple(facts), first.recipe, details)


def _foreign_facts(foreign: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(f"ComfyUI {name}", f"{len(text)} characters") for name, text in foreign.items()]


def _parent_facts(parent: Parent | None) -> list[tuple[str, str]]:
    return [("rendered from", parent.name)] if parent is not None else []


def _picture(path: Path, size_bytes: int) -> Report:
    picture = read_picture_text(path)
    facts = [("kind", f"picture ({picture.container})"), ("picture", f"{picture.width}x{picture.height} pixels")]
    details: dict[str, Any] = {"width": picture.width, "height": picture.height, "texts": picture.texts}
    if RECORD_KEY not in picture.texts:
        return _foreign_picture(path, size_bytes, picture, facts, details)
    try:
        record = record_from_json(picture.texts[RECORD_KEY])
    except FluxsplitError as error:
        raise FluxsplitError(f"{path.name} is refused: {error.message}", error.hint) from None
    facts += [
        ("latent sha256", record.latent_sha256),
        ("VAE", _stamp(record.vae)),
        ("decoded by", _table(record.versions)),
        *_parent_facts(record.parent),
        *_foreign_facts({name: text for name, text in picture.texts.items() if name in ("prompt", "workflow")}),
    ]
    facts += [
        ("upscaled", f"{stamp.scale}x by {stamp.name} (sha256 {stamp.sha256}) to {stamp.width}x{stamp.height} pixels")
        for stamp in record.upscaler
    ]
    if record.recipe is None:
        facts.append(("recipe", "none: the latent was an encoded picture's, or another program's"))
    details |= {"latent_sha256": record.latent_sha256, "vae": asdict(record.vae), "versions": record.versions}
    details["parent"] = asdict(record.parent) if record.parent else None
    details |= {"upscaler": [asdict(stamp) for stamp in record.upscaler]}
    return Report(str(path), "picture", size_bytes, tuple(facts), record.recipe, details)


def _foreign_picture(
    path: Path, size_bytes: int, picture: PictureText, facts: list[tuple[str, str]], details: dict[str, Any]
) -> Report:
    found = found_in(picture, path)
    if found.tool is None:
        parameters = picture.texts.get(PARAMETERS_KEY)
        facts += [] if parameters is None else [(PARAMETERS_KEY, parameters)]
        facts += [(key, f"{len(text)} characters") for key, text in picture.texts.items() if key != PARAMETERS_KEY]
        facts.append(("recipe", "none that is known; not written by fluxsplit"))
    else:
        facts += facts_of(found)
        details |= {"found": json.loads(as_form(found, "json", path.name))}
    return Report(str(path), "picture", size_bytes, tuple(facts), None, details)


def _conditioning(path: Path, size_bytes: int) -> Report:
    header = read_header(path)
    shapes = {name: list(tensor.shape) for name, tensor in header.tensors.items()}
    prompt = prompt_of(path)
    facts = [("kind", "conditioning (an encoded prompt)"), *([("prompt", prompt)] if prompt else [])]
    facts += [(name, f"{'x'.join(map(str, shape))} {header.tensors[name].dtype}") for name, shape in shapes.items()]
    return Report(str(path), "conditioning", size_bytes, tuple(facts), None, {"prompt": prompt, "shapes": shapes})


def _weights(path: Path, size_bytes: int) -> Report:
    contents = checkpoint.describe(path)
    variant = f" {contents.variant}" if contents.variant else ""
    facts = [("kind", f"weights ({contents.layout}{variant})"), ("size", f"{size_bytes / 1e9:.2f} GB")]
    for kind, part in contents.parts.items():
        dtypes = ", ".join(f"{count / 1e6:,.1f} M {dtype}" for dtype, count in part.dtypes.items())
        facts.append((kind, f"{part.tensors} tensors, {part.bytes / 1e9:.2f} GB: {dtypes}"))
    facts += [("note", note) for note in contents.notes]
    return Report(str(path), "weights", size_bytes, tuple(facts), None, asdict(contents))


def _recipe_facts(recipe: Recipe) -> list[tuple[str, str]]:
    """The recipe for people; values that no picture of this model has are left out."""
    encoded = not recipe.conditioning_sha256
    shown: dict[str, str | None] = {
        "prompt": recipe.prompt,
        "negative": recipe.negative or None,
        "seed": str(recipe.seed) + (f", draw {recipe.noise_index}" if recipe.noise_index else ""),
        "size": f"{recipe.width}x{recipe.height}",
        "steps": str(recipe.steps),
        "sampler": f"{recipe.sampler}, {recipe.scheduler}",
        "sigmas": " ".join(f"{sigma:.4f}" for sigma in recipe.sigmas),
        "shift": None if recipe.shift is None else f"{recipe.shift:g}",
        "guidance": None if recipe.guidance is None else f"{recipe.guidance:g}",
        "cfg": None if recipe.cfg == 1 else f"{recipe.cfg:g}",
        "start": started_from(recipe) or None,
        "model": f"FLUX.1 {recipe.variant}, {recipe.dtype}, {recipe.device}",
        "transformer": _stamp(recipe.transformer),
        "conditioning": None if encoded else f"saved (sha256 {str(recipe.conditioning_sha256)[:HASH_DIGITS]})",
        "T5": _stamp(recipe.text_encoder) if encoded or recipe.text_encoder.name else None,
        "CLIP": _stamp(recipe.clip) if encoded or recipe.clip.name else None,
        "versions": _table(recipe.versions),
        "created": recipe.created or None,
    }
    return [(name, value) for name, value in shown.items() if value is not None]


def _stamp(stamp: WeightsStamp) -> str:
    return f"{stamp.name} (sha256 {stamp.sha256[:HASH_DIGITS]})" if stamp.sha256 else stamp.name


def _table(table: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in table.items()) or "not recorded"


def _visible(text: str) -> str:
    """Text of a stranger for the terminal: escape sequences and line breaks are shown, not obeyed."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
