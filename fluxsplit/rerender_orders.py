"""What is to be rendered again: pictures with a recipe and flags → one order each, with its model, start and parent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fluxsplit import conditioning_cache, places
from fluxsplit.arguments import check_choice
from fluxsplit.checkpoint import describe, part, variant_of
from fluxsplit.cli_sample import wanted_files
from fluxsplit.conditioning_cache import Encoders
from fluxsplit.conditioning_header import Saved, check_file, check_prompt_is, saved
from fluxsplit.errors import FluxsplitError, ModelFileMissing, UsageError
from fluxsplit.fingerprint import file_sha256, stamp_of
from fluxsplit.found import read_found
from fluxsplit.found_recipe import FoundRecipe
from fluxsplit.found_values import file_name
from fluxsplit.jobs import ImageJob, ModelFiles, absolute
from fluxsplit.latents import read_latents
from fluxsplit.metadata import ImageRecord
from fluxsplit.models import DEMO, Wanted, demo_files, find_tokenizers, resolve
from fluxsplit.progress import Progress
from fluxsplit.recipe import DTYPES, Parent
from fluxsplit.repetition import (
    Keeping,
    Told,
    described,
    images_of,
    is_repetition,
    keeping_of,
    new_size,
    require_recipe,
)
from fluxsplit.rerender_sources import find_latent, latent_sha256, record_of


@dataclass(frozen=True, slots=True)
class Order:
    """One picture to render again."""

    source: Path
    found: FoundRecipe
    images: tuple[ImageJob, ...]
    keeping: Keeping
    files: ModelFiles
    encoders: Encoders | None
    dtype: str
    latent: str
    """Latent file to start from; empty where there is none, or where the picture is still to be encoded."""
    parent: Parent
    lines: tuple[str, ...] = field(default=())
    """What is said of it."""


def read_orders(sources: Sequence[Path], values: Mapping[str, Any], progress: Progress) -> list[Order]:
    """An order for each picture; one for which that cannot be is told, and raised where all fail for one reason."""
    orders, failures = list[Order](), list[tuple[Path, FluxsplitError]]()
    for source in sources:
        try:
            orders.append(_order(source, values))
        except FluxsplitError as error:
            failures.append((source, error))
    if len(failures) == len(sources) and len({error.line() for _, error in failures}) == 1:
        source, first = failures[0]
        if source.name in first.message:
            raise first
        who = source.name if len(sources) == 1 else f"each of {len(sources)} pictures"
        raise type(first)(f"{who}: {first.message}", first.hint) from None
    for source, failure in failures:
        progress.failed(absolute(source), failure.message, failure.hint)
    return orders


def _order(source: Path, values: Mapping[str, Any]) -> Order:
    """What to do for one picture; raises FluxsplitError where it cannot be done."""
    found = read_found(source)
    require_recipe(found, values)
    told = Told(warnings=list(found.warnings))
    if found.container == "latent" and (count := len(read_latents(source))) > 1:
        told.assumed.append(f"the first of the {count} latents that it holds")
    wanted = _wanted(found, values, told)
    transformer = resolve(wanted, ("transformer",))
    variant = variant_of(part(transformer.transformer, "transformer"))
    images = images_of(found, values, variant, describe(transformer.transformer).config, told)
    size = new_size(found, values, told=Told())
    repeats = is_repetition(found, values)
    keeping = Keeping("same") if repeats else keeping_of(found, values, size, told)
    record = record_of(source)
    latent = _latent(source, found, record, keeping)
    if values.get("conditioning"):
        kept = _conditioning(images[0], values["conditioning"], transformer, told)
        images = [replace(image, conditioning=kept.path, conditioning_sha256=kept.sha256) for image in images]
        files, encoders = transformer, None
    else:
        if found.recipe is not None and found.recipe.conditioning_sha256:
            told.warnings.append("it was made from a saved --conditioning; its prompt, encoded here, may give another")
        files, encoders = _text_files(found, values, wanted, transformer, images)
    dtype = found.recipe.dtype if repeats and found.recipe is not None and not values.get("dtype") else ""
    return Order(
        source=source,
        found=found,
        images=tuple(_numbered(source, images, bool(values.get("seed")) or len(images) > 1)),
        keeping=keeping,
        files=files,
        encoders=encoders,
        dtype=dtype or check_choice("dtype", values.get("dtype", "auto"), DTYPES),
        latent=latent,
        parent=Parent(stamp_of(source, "").name, record.latent_sha256 if record is not None else latent_sha256(latent)),
        lines=tuple(_lines(found, told, keeping, images[0], transformer.transformer)),
    )


def _lines(found: FoundRecipe, told: Told, keeping: Keeping, image: ImageJob, transformer: str) -> list[str]:
    same = f"nothing is changed{_but(found, image, transformer)}"
    how = {"same": same, "seed": "the seed's own noise"}.get(keeping.keep, f"keep {keeping.keep}")
    strength = f" at strength {keeping.strength:g}" if keeping.needs_latent else ""
    lines = [f"found: {described(found)}"]
    lines += [f"assumed: {'; '.join((*found.notes, *told.assumed))}"] if (*found.notes, *told.assumed) else []
    lines += [f"warning: {text}" for text in told.warnings]
    return [*lines, f"renders at {image.width}x{image.height}, {how}{strength}"]


def _but(found: FoundRecipe, image: ImageJob, transformer: str) -> str:
    """What differs from a recipe though no setting does, as far as names and hashes at hand tell."""
    if found.recipe is None:
        return ""
    others = ["the model"] if found.recipe.transformer.name != stamp_of(transformer, "").name else []
    if (found.recipe.conditioning_sha256 or "") != image.conditioning_sha256:
        others.append("what the prompt is encoded by")
    return f" but {' and '.join(others)}" if others else ""


def _wanted(found: FoundRecipe, values: Mapping[str, Any], told: Told) -> Wanted:
    """The model of a picture: as flags or settings name it, the demo model by its hash, else by the file's name."""
    wanted = wanted_files(dict(values))
    if wanted.model:
        return wanted
    with suppress(ModelFileMissing):
        if found.model_hash and file_sha256(demo_files().transformer).startswith(found.model_hash.lower()):
            return Wanted()
    if not found.model and found.tool is None:  # a photo
        told.assumed.append("the demo model (--model)")
        return replace(wanted, model=DEMO)
    if not found.model:
        raise UsageError("it does not say its model", "give --model, which may be demo")
    name = file_name(found.model)
    try:
        resolve(replace(wanted, model=name), ("transformer",))
    except ModelFileMissing:
        raise ModelFileMissing(f"its model {name!r} is not in ComfyUI's folders", "give --model") from None
    told.assumed.append(f"model {name}, found by its name (--model)")
    return replace(wanted, model=name)


def _conditioning(image: ImageJob, conditioning: str, files: ModelFiles, told: Told) -> Saved:
    """What `--conditioning` names, if it is for this image's prompt, which all seeds have, and for the model."""
    kept = saved(conditioning, image.cfg)
    told.warnings += check_prompt_is(kept, image.prompt, "drop --conditioning, or name the one of this prompt")
    check_file(kept.path, part(files.transformer, "transformer"))
    return kept


def _text_files(
    found: FoundRecipe, values: Mapping[str, Any], wanted: Wanted, transformer: ModelFiles, images: Sequence[ImageJob]
) -> tuple[ModelFiles, Encoders | None]:
    """The model's files; without text encoders where the cache holds every prompt as the recipe's encoders made it.

    The encoders' files are then not even looked for: their hashes stand in the recipe.
    """
    told = values.get("text_encoder") or values.get("clip") or not values.get("cache", True)
    recipe = found.recipe
    if not told and recipe is not None and recipe.text_encoder.sha256 and recipe.clip.sha256:
        with suppress(ModelFileMissing):
            encoders = Encoders(recipe.text_encoder, recipe.clip, _tokenizers(wanted, transformer))
            if all(conditioning_cache.find(encoders, text) for text in texts_of(images)):
                return replace(transformer, text_encoder="", clip=""), encoders
    return resolve(wanted, ("transformer", "t5", "clip")), None


def _tokenizers(wanted: Wanted, files: ModelFiles) -> str:
    if files.is_demo:
        return conditioning_cache.tokenizers_sha256(files.t5_tokenizer, files.clip_tokenizer)
    comfyui = places.comfyui_root(wanted.comfyui)
    named = find_tokenizers(wanted.tokenizers, Path(files.transformer), comfyui)
    return conditioning_cache.tokenizers_sha256(*named)


def texts_of(images: Iterable[ImageJob]) -> list[str]:
    """The texts that are encoded for some images, each once."""
    encoded = [image for image in images if not image.conditioning]
    texts = [
        text for image in encoded for text in ((image.prompt, image.negative) if image.cfg != 1 else (image.prompt,))
    ]
    return list(dict.fromkeys(texts))


def _latent(source: Path, found: FoundRecipe, record: ImageRecord | None, keeping: Keeping) -> str:
    """The latent to start from, told by its SHA-256, not by its name; empty where there is none."""
    start = found.recipe.start if found.recipe is not None else None
    if keeping.keep == "same":
        if start is None or not start.latent_sha256:
            return ""
        parent = Path(record.parent.name).stem if record is not None and record.parent is not None else source.stem
        latent = find_latent(source, (parent, source.stem), start.latent_sha256)
        if not latent:
            raise UsageError(
                f"it started from the latent of {parent}, which is not there any more",
                "render from that picture again, or choose another --size, --keep or --strength",
            )
        return latent
    if not keeping.needs_latent:
        return ""
    if found.container == "latent":
        return absolute(source)
    return "" if record is None else find_latent(source, (source.stem,), record.latent_sha256)


def _numbered(source: Path, images: Sequence[ImageJob], by_seed: bool) -> list[ImageJob]:
    """Images with the names of their files: the picture's, the size and, where it is asked for, the seed."""
    return [
        replace(image, stem=f"{source.stem}-{image.width}x{image.height}" + (f"-seed{image.seed}" if by_seed else ""))
        for image in images
    ]
