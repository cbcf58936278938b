"""`fluxsplit decode`: latent files → the VAE that each was made for → one decode stage for each VAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxsplit import durable
from fluxsplit.arguments import (
    check_choice,
    check_device,
    check_names_differ,
    files_in,
    gather_files,
    is_passed_over,
    out_folder,
)
from fluxsplit.cli_sample import wanted_files
from fluxsplit.cli_upscale import UpscaleOptions, enlarge, enlarging
from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.executor import StageProcess
from fluxsplit.fingerprint import file_sha256
from fluxsplit.jobs import DecodeJob, absolute
from fluxsplit.latents import SUFFIXES, LatentFile, read_latents
from fluxsplit.memory import check_budget
from fluxsplit.models import demo_files, resolve_vae
from fluxsplit.progress import Progress
from fluxsplit.recipe import DTYPES, VAE_FACTOR
from fluxsplit.retry import events_with_retry

MIN_TILE_PX = 64


@dataclass(frozen=True, slots=True)
class Refused:
    """A latent file that no stage needs to see."""

    path: str
    error: FluxsplitError


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What a `decode` command is going to do."""

    jobs: tuple[DecodeJob, ...]
    """One for each VAE."""
    refused: tuple[Refused, ...]
    upscale: UpscaleOptions | None = None
    """How to enlarge the pictures afterwards."""


def decode(given: dict[str, Any], defaults: dict[str, Any], progress: Progress) -> int:
    """Plan and decode; returns the exit code.

    Where the names come through a pipe, the stage's process starts at once, so that its imports overlap whatever
    the other end of the pipe is still doing; it touches no device before it has its job.
    """
    if "-" not in given.get("latents", []):
        return _decode(given, defaults, progress)
    with StageProcess("decode") as ahead:
        return _decode(given, defaults, progress, ahead)


def _decode(
    given: dict[str, Any], defaults: dict[str, Any], progress: Progress, ahead: StageProcess | None = None
) -> int:
    upscale = enlarging(given, defaults, progress)
    return run_decode(replace(plan_decode(given, defaults), upscale=upscale), progress, ahead)


def plan_decode(given: dict[str, Any], defaults: dict[str, Any]) -> DecodePlan:
    """The plan of a command from its flags and, where they are silent, the settings; raises FluxsplitError."""
    values = defaults | given
    job = DecodeJob(
        latents=(),
        vae="",
        out=out_folder(values, "images"),
        device=check_device(values.get("device", "auto")),
        dtype=check_choice("vae-dtype", values.get("vae_dtype", "auto"), DTYPES),
        vram=check_budget(values.get("vram", "auto")),
        tile=check_tile(values.get("tile", 0)),
        overwrite=bool(values.get("overwrite", False)),
        delete_latents=bool(values.get("delete_latents", False)),
        dry_run=bool(values.get("dry_run", False)),
    )
    files = gather_latents(values.get("latents", []))
    if job.overwrite:
        check_names_differ(files, job.out)
    vaes = _Vaes(given, values)
    groups: dict[str, list[str]] = {}
    refused: list[Refused] = []
    for file in files:
        try:
            groups.setdefault(vaes.of(read_latents(file)[0]), []).append(absolute(file))
        except FluxsplitError as error:
            refused.append(Refused(absolute(file), error))
    jobs = tuple(replace(job, latents=tuple(latents), vae=vae) for vae, latents in groups.items())
    return DecodePlan(jobs, tuple(refused))


def run_decode(plan: DecodePlan, progress: Progress, ahead: StageProcess | None = None) -> int:
    """Decode; returns the exit code, 1 where some latents failed and that of the reason where none could start.

    The first job goes to the process that was started `ahead`, if one was.
    """
    if not plan.jobs and len({refused.error.line() for refused in plan.refused}) == 1:
        raise plan.refused[0].error
    for refused in plan.refused:
        progress.failed(refused.path, refused.error.message, refused.error.hint)
    before = len(progress.results)
    for folder in {job.out for job in plan.jobs}:
        durable.check_folder(folder)
    for number, job in enumerate(plan.jobs):
        with ahead if ahead is not None and number == 0 else StageProcess("decode") as process:
            for event in events_with_retry(process, job, progress.note):
                progress.show(event)
    if plan.upscale is not None and any(job.dry_run for job in plan.jobs):
        progress.note(f"what is decoded would be enlarged by {Path(plan.upscale.job.weights).name}")
    elif plan.upscale is not None:
        made = dict.fromkeys(progress.results[before:])  # each picture once
        enlarge(tuple(made), plan.upscale, progress)  # the VAE's process has ended
    codes = {refused.error.exit_code for refused in plan.refused}
    return codes.pop() if not plan.jobs and len(codes) == 1 else int(bool(progress.failures))


def require_vae(given: dict[str, Any], values: dict[str, Any], of_demo: bool) -> None:
    """Raise FluxsplitError where latents that are still to be sampled, with the demo model or another, have no VAE.

    `values` are the settings with the flags `given` upon them.
    """
    vaes = _Vaes(given, values)
    if not (of_demo and vaes.follows_latents):
        vaes.named_or_found()


class _Vaes:
    """Finds the VAE for each latent, and each VAE only once."""

    def __init__(self, given: dict[str, Any], values: dict[str, Any]) -> None:
        self.follows_latents = not (given.get("vae") or given.get("model"))
        """Whether the demo model's latents get its VAE unasked."""
        self._wanted = wanted_files(without_rivals(values, given))
        self._vae: str | FluxsplitError | None = None
        self._demo_sha256: str | None = None

    def of(self, latent: LatentFile) -> str:
        """The VAE to decode a latent with; raises FluxsplitError where none is found."""
        if self.follows_latents and self._is_demo(latent):
            return demo_files().vae
        try:
            return self.named_or_found()
        except FluxsplitError as error:
            raise _missing(error, latent) from None

    def named_or_found(self) -> str:
        """The VAE of latents whose own is not known; raises FluxsplitError where none is found."""
        if self._vae is None:
            try:
                self._vae = resolve_vae(self._wanted)
            except FluxsplitError as error:
                self._vae = error
        if isinstance(self._vae, FluxsplitError):
            raise self._vae
        return self._vae

    def _is_demo(self, latent: LatentFile) -> bool:
        stamp = latent.encoded_by or (latent.recipe.transformer if latent.recipe else None)
        if stamp is None or not stamp.sha256:
            return False
        if self._demo_sha256 is None:
            try:
                self._demo_sha256 = file_sha256(demo_files().transformer)
            except FluxsplitError:
                self._demo_sha256 = ""
        return stamp.sha256 == self._demo_sha256  # one file holds all of the demo model


def _missing(error: FluxsplitError, latent: LatentFile) -> FluxsplitError:
    """That there is no VAE, with what is known of the one that a latent needs."""
    if latent.encoded_by is not None:
        return type(error)(f"{error.message}; {latent.encoded_by.name} encoded it", error.hint)
    if latent.recipe is None:  # what encoded it the latent does not say
        return type(error)(error.message, f"{error.hint}; if the demo model's VAE encoded it, give --vae demo")
    return error


def without_rivals(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A model that is given on the command line is not overruled by a VAE from the settings."""
    return {**values, "vae": ""} if given.get("model") and not given.get("vae") else values


def gather_latents(names: Sequence[str]) -> list[Path]:
    """Latent files in the order given: files, the latents in folders, and the lines of stdin for `-`."""
    suffixes = tuple(SUFFIXES.values())

    def in_folder(folder: Path) -> list[Path]:
        """Those of `preview` and `rerender` are in a folder below their pictures'."""
        below = folder / "latents"
        held = (file for file in folder.iterdir() if file.suffix.lower() in suffixes)
        here = not below.is_dir() or not all(map(is_passed_over, held))
        return files_in(folder if here else below, suffixes, "latent file")

    return gather_files(names, in_folder, "latent file to decode")


def check_tile(pixels: int) -> int:
    """Side of the tiles in pixels, 0 for exact strips; raises UsageError."""
    if pixels and (pixels < MIN_TILE_PX or pixels % VAE_FACTOR):
        raise UsageError(
            f"--tile {pixels} is no side of a tile", f"use 0, or a multiple of {VAE_FACTOR} from {MIN_TILE_PX} on"
        )
    return pixels
