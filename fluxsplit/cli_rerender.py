"""`fluxsplit rerender`: pictures with a recipe → the same pictures at another size, or with other settings."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxsplit import durable
from fluxsplit.already_made import Renderer, recipe_of, renderer_of
from fluxsplit.arguments import check_choice, check_device, gather_prompts, out_folder
from fluxsplit.cli_decode import plan_decode, require_vae, run_decode, without_rivals
from fluxsplit.cli_encode import encode_events
from fluxsplit.cli_sample import wanted_files
from fluxsplit.cli_upscale import UpscaleOptions, enlarge, enlarging, tell_there
from fluxsplit.conditioning_cache import Encoders
from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.fingerprint import weights_sha256
from fluxsplit.jobs import EncodeJob, ImageJob, ModelFiles, absolute
from fluxsplit.memory import check_budget
from fluxsplit.metadata import ImageRecord
from fluxsplit.models import DEMO, demo_files, resolve_vae
from fluxsplit.progress import Progress
from fluxsplit.recipe import DTYPES
from fluxsplit.rerender_orders import Order, read_orders, texts_of
from fluxsplit.rerender_sources import ENCODED, LATENTS, gather, latent_sha256, record_of
from fluxsplit.sample_plan import Plan
from fluxsplit.sample_run import run_sample, undecoded_told

FOLDER = "renders"
_DECODING = ("model", "vae", "comfyui", "device", "vram", "vae_dtype")


def rerender(given: dict[str, Any], defaults: dict[str, Any], progress: Progress) -> int:
    """Read, plan, sample and decode; returns the exit code. One that fails does not stop the rest."""
    values, upscale = without_rivals(defaults | _with_prompt(given), given), enlarging(given, defaults, progress)
    orders = read_orders(gather(values, progress.note), values, progress)
    names = Counter(order.source.name for order in orders)
    for order in orders:
        label = order.source.name if names[order.source.name] == 1 else str(order.source)
        for line in order.lines:
            progress.note(f"{label}: {line}")
    out = Path(out_folder(values, FOLDER))
    orders = _decodable(orders, given, values, out, progress)
    if not values.get("dry_run"):
        orders = _with_latents(orders, values, out, progress)
    planned = _planned(orders, values, out)
    if values.get("dry_run"):
        return _show(planned, bool(values.get("json")), progress)
    _tell_made(planned, progress)
    latents = list(planned.latents)
    with undecoded_told(latents, given, out, progress):
        for plan in planned.plans:
            run_sample(plan, progress, lambda event: latents.append(event["path"]))
        if latents:
            _decode(latents, given, defaults, out, upscale, progress)
    if upscale is not None:
        enlarge(planned.pictures, upscale, progress)
    return 1 if progress.failures else 0


def _decodable(
    orders: list[Order], given: dict[str, Any], values: dict[str, Any], out: Path, progress: Progress
) -> list[Order]:
    """The orders whose pictures are there, or have a VAE; the others are told, and raised where there are no more."""
    lacking: dict[bool, FluxsplitError] = {}
    for of_demo in {order.files.is_demo for order in orders}:
        try:
            require_vae(given, values, of_demo)
        except FluxsplitError as error:
            lacking[of_demo] = error
    refused = [order for order in orders if order.files.is_demo in lacking and _is_new(order, values, out)]
    if refused and len(refused) == len(orders):
        raise lacking[refused[0].files.is_demo]
    for order in refused:
        why = lacking[order.files.is_demo]
        progress.failed(absolute(order.source), why.message, why.hint)
    return [order for order in orders if order not in refused]


def _is_new(order: Order, values: dict[str, Any], out: Path) -> bool:
    return bool(_planned([order], values, out).plans)


def _tell_made(planned: _Planned, progress: Progress) -> None:
    """Say what is not made again; pictures that are there are results all the same."""
    for picture in planned.pictures:
        source = _latent_of(Path(picture))
        tell_there(picture, str(source) if source.is_file() else "", progress)
    for latent in planned.latents:
        progress.note(f"{Path(latent).name} was finished before and is only decoded")


def _latent_of(picture: Path) -> Path:
    return picture.parent / LATENTS / f"{picture.stem}.pt"


def _with_prompt(given: dict[str, Any]) -> dict[str, Any]:
    """The flags, with the prompt from stdin where that is asked for."""
    if "-" not in given.get("prompt", ()):
        return given
    if "-" in (*given.get("images", ()), *given.get("from", ())):
        raise UsageError("the prompt and the pictures' names are both to come from stdin", "give one of them as a flag")
    return {**given, "prompt": gather_prompts(given["prompt"], "")}


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


@dataclass(frozen=True, slots=True)
class _Planned:
    """What is to be sampled, and what need not be."""

    plans: tuple[Plan, ...]
    """One for each model."""
    pictures: tuple[str, ...]
    """That are there already."""
    latents: tuple[str, ...]
    """That are, without their pictures."""


def _planned(orders: Sequence[Order], values: dict[str, Any], out: Path) -> _Planned:
    groups: dict[tuple[ModelFiles, str, Encoders | None], list[Order]] = {}
    for order in orders:
        groups.setdefault((order.files, order.dtype, order.encoders), []).append(order)
    names, plans, pictures, latents = _Names(out, values), list[Plan](), dict[str, None](), dict[str, None]()
    for (files, dtype, encoders), members in groups.items():
        renderer, images = renderer_of(files, encoders, dtype, str(values.get("device", "auto"))), list[ImageJob]()
        for asked, is_known in (one for order in members for one in _asked(order)):
            picture, latent = names.made(asked, renderer) if is_known else ("", "")
            if picture:
                pictures[picture] = None
            elif latent:
                latents[latent] = None
            else:
                images.append(replace(asked, stem=names.free(asked.stem)))
        if images:
            plans.append(_plan(files, dtype, encoders, images, values, out))
    return _Planned(tuple(plans), tuple(pictures), tuple(latents))


def _plan(
    files: ModelFiles,
    dtype: str,
    encoders: Encoders | None,
    images: Sequence[ImageJob],
    values: dict[str, Any],
    out: Path,
) -> Plan:
    texts = tuple(texts_of(images))
    return Plan(
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
        vram=check_budget(str(values.get("vram", "auto"))),
        encoders=encoders,
    )


def _asked(order: Order) -> list[tuple[ImageJob, bool]]:
    """The order's pictures, and whether all that decides them is known: not in a dry run, before one is encoded."""
    is_known = bool(order.latent) or not order.keeping.needs_latent
    return [(replace(image, parent=order.parent, **_start(order)), is_known) for image in order.images]


def _start(order: Order) -> dict[str, Any]:
    """ImageJob's fields on what is kept."""
    if order.keeping.keep == "same":
        start = order.found.recipe.start if order.found.recipe is not None else None
        return {"start": start, "start_latent": order.latent}
    sha256 = latent_sha256(order.latent) if order.keeping.needs_latent else ""
    if order.keeping.needs_latent and not sha256:
        return {}  # a dry run, before the picture is encoded
    return {"start": order.keeping.start(sha256), "start_latent": order.latent}


def _stems(image: ImageJob) -> tuple[str, str]:
    """The name of a job's picture, and the one that it would have had if seeds were (not) asked for as well."""
    by_seed = f"-seed{image.seed}"
    plain = image.stem.removesuffix(by_seed)
    return image.stem, plain if plain != image.stem else image.stem + by_seed


class _Names:
    """Names for results in a folder: those that are free, and those that hold what is asked for already."""

    def __init__(self, out: Path, values: dict[str, Any]) -> None:
        self._out = out
        self._vae, self._vae_dtype = str(values.get("vae") or ""), str(values.get("vae_dtype") or "auto")
        self._taken = {file.stem for place in (out, out / LATENTS) if place.is_dir() for file in place.iterdir()}
        self._mine: set[str] = set()

    def free(self, stem: str) -> str:
        name = next(name for name in self._names(stem) if name not in self._taken)
        self._taken.add(name)
        self._mine.add(name)
        return name

    def made(self, image: ImageJob, renderer: Renderer) -> tuple[str, str]:
        """Picture and latent of what a job asks for, as far as they are there; empty where they are not."""
        numbered = (itertools.takewhile(self._taken.__contains__, self._names(stem)) for stem in _stems(image))
        for name in itertools.chain.from_iterable(numbered):
            if name in self._mine:
                continue
            picture = self._out / f"{name}.png"
            latent = _latent_of(picture)
            record = record_of(picture)
            recipes = (record.recipe if record is not None and self._decoded(record) else None, recipe_of(latent))
            there = [recipe is not None and renderer.made(recipe, image) for recipe in recipes]
            if any(there):
                return (absolute(picture) if there[0] else ""), (absolute(latent) if there[1] else "")
        return "", ""

    def _decoded(self, record: ImageRecord) -> bool:
        """Whether a picture was decoded as it is asked for; by whichever VAE and in whichever dtype, if none is."""
        if self._vae_dtype not in ("auto", record.dtype):
            return False
        if not self._vae:
            return True
        vae = Path(demo_files().vae if self._vae == DEMO else self._vae).expanduser()
        if record.vae.sha256 and vae.exists():
            return weights_sha256(vae) == record.vae.sha256
        return vae.stem == Path(record.vae.name).stem

    @staticmethod
    def _names(stem: str) -> Iterator[str]:
        yield stem
        yield from (f"{stem}-{number}" for number in itertools.count(2))


def _decode(
    latents: list[str],
    given: dict[str, Any],
    defaults: dict[str, Any],
    out: Path,
    upscale: UpscaleOptions | None,
    progress: Progress,
) -> None:
    words: dict[str, Any] = {key: given[key] for key in _DECODING if key in given}
    plan = plan_decode({**words, "latents": latents, "out": str(out)}, defaults)
    run_decode(replace(plan, upscale=upscale), progress)


def _show(planned: _Planned, as_json: bool, progress: Progress) -> int:
    from fluxsplit.dry_run import show_plan  # noqa: PLC0415

    there = [*planned.pictures, *planned.latents]
    for path in there:
        progress.note(f"{Path(path).name} is there already, made with these settings")
    for plan in planned.plans:
        durable.check_folder(plan.out)
        show_plan(plan, as_json, there=there)
    if as_json and not planned.plans:
        print(json.dumps({"images": [], "there": there}))
    return 1 if progress.failures else 0
