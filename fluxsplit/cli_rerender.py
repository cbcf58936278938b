"""`fluxsplit rerender`: pictures with a recipe → the same pictures at another size, or with other settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fluxsplit import conditioning_cache, durable, places
from fluxsplit.arguments import check_choice, check_device, out_folder
from fluxsplit.checkpoint import describe, part, variant_of
from fluxsplit.cli_decode import plan_decode, run_decode
from fluxsplit.cli_encode import encode_events
from fluxsplit.cli_sample import wanted_files
from fluxsplit.cli_upscale import upscale_options
from fluxsplit.conditioning_cache import Encoders
from fluxsplit.errors import FluxsplitError, ModelFileMissing, UsageError
from fluxsplit.fingerprint import file_sha256
from fluxsplit.found import read_found
from fluxsplit.found_recipe import FoundRecipe
from fluxsplit.jobs import EncodeJob, ImageJob, ModelFiles, absolute
from fluxsplit.memory import check_budget
from fluxsplit.metadata import ImageRecord
from fluxsplit.models import Wanted, demo_files, find_tokenizers, resolve, resolve_vae
from fluxsplit.progress import Progress
from fluxsplit.recipe import DTYPES
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
from fluxsplit.rerender_sources import ENCODED, LATENTS, find_latent, gather, latent_sha256, record_of
from fluxsplit.sample_plan import Plan
from fluxsplit.sample_run import run_sample, undecoded_told

FOLDER = "renders"
_DECODING = ("model", "vae", "comfyui", "device", "vram", "vae_dtype")


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
    parent: tuple[str, str]
    lines: tuple[str, ...] = field(default=())
    """What is said of it."""


def rerender(given: dict[str, Any], defaults: dict[str, Any], progress: Progress) -> int:
    """Read, plan, sample and decode; returns the exit code. One that fails does not stop the rest."""
    values = defaults | given
    orders = _orders(gather(values), values, progress)
    for order in orders:
        for line in order.lines:
            progress.note(f"{order.source.name}: {line}")
    out = Path(out_folder(values, FOLDER))
    if values.get("dry_run"):
        return _show(_plans(orders, values, out), bool(values.get("json")), progress)
    parents: dict[str, tuple[str, str]] = {}
    for plan, named in _plans(_with_latents(orders, values, out, progress), values, out):
        latents: list[str] = []
        with undecoded_told(latents, given, out, progress):
            run_sample(plan, progress, lambda event, made=latents: made.append(event["path"]))  # type: ignore[misc]
        parents |= {latent: named[_stem(latent)] for latent in latents if _stem(latent) in named}
        parents |= {latent: ("", "") for latent in latents if latent not in parents}
    if parents:
        with undecoded_told(list(parents), given, out, progress):
            _decode(parents, given, defaults, out, progress)
    return 1 if progress.failures else 0


def _orders(sources: Sequence[Path], values: Mapping[str, Any], progress: Progress) -> list[Order]:
    orders = []
    for source in sources:
        try:
            orders.append(_order(source, values))
        except FluxsplitError as error:
            told = error if source.name in error.message else type(error)(f"{source.name}: {error.message}", error.hint)
            if len(sources) == 1:
                raise told from None
            progress.failed(absolute(source), error.message, error.hint)
    return orders


def _order(source: Path, values: Mapping[str, Any]) -> Order:
    """What to do for one picture; raises FluxsplitError where it cannot be done."""
    found = read_found(source)
    require_recipe(found, values)
    told = Told(warnings=list(found.warnings))
    wanted = _wanted(found, values, told)
    transformer = resolve(wanted, ("transformer",))
    variant = variant_of(part(transformer.transformer, "transformer"))
    images = images_of(found, values, variant, describe(transformer.transformer).config, told)
    size = new_size(found, values, told=Told())
    repeats = is_repetition(found, values)
    keeping = Keeping("same") if repeats else keeping_of(found, values, size, told)
    record = record_of(source)
    latent = _latent(source, found, record, keeping)
    files, encoders = _text_files(found, values, wanted, transformer, images)
    dtype = found.recipe.dtype if repeats and found.recipe is not None and not values.get("dtype") else ""
    return Order(
        source=source,
        found=found,
        images=tuple(_numbered(source, images)),
        keeping=keeping,
        files=files,
        encoders=encoders,
        dtype=dtype or check_choice("dtype", values.get("dtype", "auto"), DTYPES),
        latent=latent,
        parent=(source.name, record.latent_sha256 if record is not None else latent_sha256(latent)),
        lines=tuple(_lines(found, told, keeping, images[0])),
    )


def _lines(found: FoundRecipe, told: Told, keeping: Keeping, image: ImageJob) -> list[str]:
    how = {"same": "nothing is changed", "seed": "the seed's own noise"}.get(keeping.keep, f"keep {keeping.keep}")
    strength = f" at strength {keeping.strength:g}" if keeping.needs_latent else ""
    lines = [f"found: {described(found)}"]
    lines += [f"assumed: {'; '.join((*found.notes, *told.assumed))}"] if (*found.notes, *told.assumed) else []
    lines += [f"warning: {text}" for text in told.warnings]
    return [*lines, f"renders at {image.width}x{image.height}, {how}{strength}"]


def _wanted(found: FoundRecipe, values: Mapping[str, Any], told: Told) -> Wanted:
    """The model of a picture: as flags or settings name it, the demo model by its hash, else by the file's name."""
    wanted = wanted_files(dict(values))
    if wanted.model:
        return wanted
    with suppress(ModelFileMissing):
        if found.model_hash and file_sha256(demo_files().transformer).startswith(found.model_hash.lower()):
            return Wanted()
    if not found.model:
        raise UsageError("it does not say its model", "give --model, which may be demo")
    name = Path(found.model).name
    try:
        resolve(replace(wanted, model=name), ("transformer",))
    except ModelFileMissing:
        raise ModelFileMissing(f"its model {name!r} is not in ComfyUI's folders", "give --model") from None
    told.assumed.append(f"model {name}, found by its name (--model)")
    return replace(wanted, model=name)


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
            if all(conditioning_cache.find(encoders, text) for text in _texts(images)):
                return replace(transformer, text_encoder="", clip=""), encoders
    return resolve(wanted, ("transformer", "t5", "clip")), None


def _tokenizers(wanted: Wanted, files: ModelFiles) -> str:
    if files.is_demo:
        return conditioning_cache.tokenizers_sha256(files.t5_tokenizer, files.clip_tokenizer)
    comfyui = places.comfyui_root(wanted.comfyui)
    named = find_tokenizers(wanted.tokenizers, Path(files.transformer), comfyui)
    return conditioning_cache.tokenizers_sha256(*named)


def _texts(images: Iterable[ImageJob]) -> list[str]:
    """The texts that are encoded for some images, each once."""
    texts = [
        text for image in images for text in ((image.prompt, image.negative) if image.cfg != 1 else (image.prompt,))
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


def _numbered(source: Path, images: Sequence[ImageJob]) -> list[ImageJob]:
    """Images with the names of their files: the picture's, the size and, where there are several, the seed."""
    several = len(images) > 1
    return [
        replace(image, stem=f"{source.stem}-{image.width}x{image.height}" + (f"-seed{image.seed}" if several else ""))
        for image in images
    ]


def _with_latents(orders: list[Order], values: dict[str, Any], out: Path, progress: Progress) -> list[Order]:
    """The orders with a latent for each that starts from its picture: those without one are encoded by the VAE.

    What is encoded is kept, so that the result can be repeated to the bit.
    """
    pictures: dict[str, list[Order]] = {}
    for order in orders:
        if order.keeping.needs_latent and not order.latent:
            pictures.setdefault(order.files.vae or resolve_vae(wanted_files(values)), []).append(order)
    encoded: dict[int, str] = {}
    for vae, members in pictures.items():
        for order in members:
            progress.note(f"{order.source.name}: its latent is not there, so the picture is encoded")
        for order, path in zip(members, _encoded(vae, members, values, out, progress), strict=True):
            encoded[id(order)] = path
    ready = [replace(order, latent=encoded.get(id(order), order.latent)) for order in orders]
    return [order for order in ready if order.latent or not order.keeping.needs_latent]


def _encoded(vae: str, orders: list[Order], values: dict[str, Any], out: Path, progress: Progress) -> list[str]:
    """A latent for each picture by one load of the VAE, in order; empty where it failed, which has been said."""
    job = EncodeJob(
        images=tuple(absolute(order.source) for order in orders),
        vae=vae,
        out=str(out / LATENTS / ENCODED),
        device=check_device(values.get("device", "auto")),
        dtype=check_choice("vae-dtype", values.get("vae_dtype", "auto"), DTYPES),
        vram=check_budget(values.get("vram", "auto")),
    )
    made: list[str] = []
    for event in encode_events(job, progress):
        if event["event"] == "result":
            made.append(str(event["path"]))
            continue
        progress.show(event)
        if event["event"] == "failed":
            made.append("")
    return made


def _plans(orders: Sequence[Order], values: dict[str, Any], out: Path) -> list[tuple[Plan, dict[str, tuple[str, str]]]]:
    """One plan for each model, with the parent of each picture by the name of its file."""
    groups: dict[tuple[ModelFiles, str, Encoders | None], list[Order]] = {}
    for order in orders:
        groups.setdefault((order.files, order.dtype, order.encoders), []).append(order)
    names = _Names(out)
    plans = []
    for (files, dtype, encoders), members in groups.items():
        images: list[ImageJob] = []
        parents: dict[str, tuple[str, str]] = {}
        for order in members:
            for image in order.images:
                stem = names.free(image.stem)
                parents[stem] = order.parent
                images.append(replace(image, stem=stem, **_start(order)))
        texts = tuple(_texts(images))
        plan = Plan(
            files=files,
            prompts=texts,
            conditionings=("",) * len(texts),
            images=tuple(images),
            out=str(out / LATENTS),
            format="pt",
            dtype=dtype,
            device=check_device(values.get("device", "auto")),
            notes=(),
            cache=bool(values.get("cache", True)),
            vram=check_budget(values.get("vram", "auto")),
            encoders=encoders,
        )
        plans.append((plan, parents))
    return plans


def _start(order: Order) -> dict[str, Any]:
    """ImageJob's fields on what is kept."""
    if order.keeping.keep == "same":
        start = order.found.recipe.start if order.found.recipe is not None else None
        return {"start": start, "start_latent": order.latent}
    sha256 = latent_sha256(order.latent) if order.keeping.needs_latent else ""
    if order.keeping.needs_latent and not sha256:
        return {}  # a dry run, before the picture is encoded
    return {"start": order.keeping.start(sha256), "start_latent": order.latent}


class _Names:
    """Names for results that are free in a folder, and different from each other."""

    def __init__(self, out: Path) -> None:
        self._taken = {file.stem for place in (out, out / LATENTS) if place.is_dir() for file in place.iterdir()}

    def free(self, stem: str) -> str:
        name, number = stem, 2
        while name in self._taken:
            name, number = f"{stem}-{number}", number + 1
        self._taken.add(name)
        return name


def _stem(latent: str) -> str:
    return Path(latent).stem


def _decode(
    parents: dict[str, tuple[str, str]],
    given: dict[str, Any],
    defaults: dict[str, Any],
    out: Path,
    progress: Progress,
) -> None:
    words: dict[str, Any] = {key: given[key] for key in _DECODING if key in given}
    plan = plan_decode({**words, "latents": list(parents), "out": str(out)}, defaults)
    jobs = tuple(replace(job, parents=tuple(parents[latent] for latent in job.latents)) for job in plan.jobs)
    more = {key: value for key, value in (defaults | given).items() if key not in ("dtype", "out", "tile")}
    wanted = more.get("upscale") or more.get("upscale_to")
    upscale = upscale_options({"upscale": "2", **more}, progress) if wanted else None
    run_decode(replace(plan, jobs=jobs, upscale=upscale), progress)


def _show(plans: list[tuple[Plan, dict[str, tuple[str, str]]]], as_json: bool, progress: Progress) -> int:
    from fluxsplit.dry_run import show_plan  # noqa: PLC0415

    for plan, _ in plans:
        durable.check_folder(plan.out)
        show_plan(plan, as_json)
    return 1 if progress.failures else 0
