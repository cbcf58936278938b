"""What to render, and what was rendered: frozen dataclasses with strict JSON, and the jobs of the stages.

A `Recipe` is everything that decides the pixels of one picture. It travels inside the latent file and
inside the PNG, both of which come from strangers, so reading one is strict: unknown or missing fields,
wrong types, NaN, duplicate keys and absurd values are errors, and nothing in it names a file to open.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.start import Start, start_from_object

SCHEMA = 1
MAX_SIDE_PX = 16384
MAX_STEPS = 1000
MAX_TEXT_CHARS = 100_000
MAX_NAME_CHARS = 1000
MAX_SEED = 2**64 - 1
LATENT_CHANNELS = 16
VAE_FACTOR = 8

SAMPLERS = ("euler", "heun", "dpmpp_2m")
SCHEDULERS = ("simple", "normal", "beta", "sgm_uniform")
LATENT_FORMATS = ("pt", "safetensors", "latent")
ENCODE_FITS = ("cut", "stretch")
DTYPES = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class WeightsStamp:
    """Which weights were used: the file's base name, for people, and its SHA-256, for certainty."""

    name: str
    sha256: str = ""
    """64 hex digits, or empty where the file was not hashed."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The picture that a rerender was made from."""

    name: str
    """File name without folder, as it was then."""
    latent_sha256: str = ""
    """Of its latent, where that is known: the same text stands in that picture's own record."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the pixels of one picture, as it was rendered."""

    prompt: str
    seed: int
    width: int
    """Pixels; a multiple of 8."""
    height: int
    steps: int
    sigmas: tuple[float, ...]
    """Exact floats, falling from the first noise level to 0; one more than there are steps."""
    sampler: str
    scheduler: str
    """One of `SCHEDULERS`, or `custom` where the sigmas were given."""
    shift: float | None
    """mu of the time shift sigma' = e^mu / (e^mu + 1/sigma - 1); None for no shift."""
    guidance: float | None
    """Distilled guidance (dev); None where the model takes none."""
    cfg: float
    """True guidance: uncond + cfg * (cond - uncond). 1 means one forward a step."""
    negative: str
    noise_index: int
    """Item of a ComfyUI batch: the n-th draw of the seed's generator, from 0."""
    variant: str
    """`schnell` or `dev`."""
    transformer: WeightsStamp
    text_encoder: WeightsStamp
    clip: WeightsStamp
    dtype: str
    """What the transformer computed in: fp32, bf16 or fp16."""
    device: str
    """`cpu`, or the graphics card's name."""
    stored_dtype: str = ""
    """What most of the transformer is stored in, as safetensors names it: F8_E4M3, BF16, ..."""
    versions: dict[str, str] = field(default_factory=dict)
    """fluxsplit, torch, diffusers, transformers."""
    created: str = ""
    """UTC, ISO 8601."""
    start: Start | None = None
    """What was kept of another picture; None where the noise of the seed is all there was."""
    retried: str | None = None
    """The memory plan that ran out of memory before the one that made this; decides no pixel. None at the first try."""
    conditioning_sha256: str | None = None
    """Of the tensors of a saved conditioning that stood for the prompt; None where it was encoded for this picture."""

    def __post_init__(self) -> None:
        check_size(self.width, self.height)
        _check(0 <= self.seed <= MAX_SEED, f"seed {self.seed} is outside 0..2^64-1")
        _check(1 <= self.steps <= MAX_STEPS, f"steps {self.steps} is outside 1..{MAX_STEPS}")
        check_sigmas(self.sigmas)
        _check(len(self.sigmas) == self.steps + 1, f"{len(self.sigmas)} sigmas do not make {self.steps} steps")
        _check(self.sampler in SAMPLERS, f"sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        _check(
            self.scheduler in (*SCHEDULERS, "custom"),
            f"scheduler {self.scheduler!r} is not one of {', '.join(SCHEDULERS)}, custom",
        )
        _check(self.guidance is None or 0 <= self.guidance <= 1000, f"guidance {self.guidance} is outside 0..1000")
        _check(0 <= self.cfg <= 1000, f"cfg {self.cfg} is outside 0..1000")
        _check(0 <= self.noise_index < 10_000, f"noise index {self.noise_index} is outside 0..9999")
        for text in (self.prompt, self.negative):
            _check(len(text) <= MAX_TEXT_CHARS, f"a prompt of {len(text)} characters is over {MAX_TEXT_CHARS}")

    def to_object(self) -> dict[str, Any]:
        """The JSON object that `recipe_from_object` reads, with the schema's number."""
        table = {"fluxsplit": SCHEMA, **asdict(self)}
        for name in _OPTIONAL:
            if table[name] is None:
                del table[name]  # so that plain recipes are read by older versions too
        return table

    def to_json(self) -> str:
        """One line of JSON; floats are written so that they read back exactly."""
        return json.dumps(self.to_object(), ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """The recipe in `text`; raises FluxsplitError on anything that `to_json` could not have written."""
        return recipe_from_object(strict_json(text))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise FluxsplitError(message)


def check_sigmas(sigmas: tuple[float, ...]) -> None:
    """Refuse noise levels that no sampler can follow: they fall strictly, from at most 1 to exactly 0."""
    _check(2 <= len(sigmas) <= MAX_STEPS + 1, f"{len(sigmas)} sigmas given; at least 2 are needed")
    falling = all(a > b for a, b in itertools.pairwise(sigmas))
    _check(
        falling and sigmas[-1] == 0 and sigmas[0] <= 1,
        f"sigmas {', '.join(format(s, 'g') for s in sigmas[:8])} do not fall from at most 1 to 0",
    )


def check_size(width: int, height: int) -> None:
    """Raise UsageError, naming the nearest sizes that work, unless both sides are multiples of 8 in range."""
    for name, side in (("width", width), ("height", height)):
        if not 16 <= side <= MAX_SIDE_PX:
            raise UsageError(f"{name} {side} is outside 16..{MAX_SIDE_PX} pixels")
    if width % VAE_FACTOR or height % VAE_FACTOR:
        down = f"{width // 8 * 8}x{height // 8 * 8}"
        up = f"{-(-width // 8) * 8}x{-(-height // 8) * 8}"
        raise UsageError(f"size {width}x{height} is not a multiple of 8", f"the nearest that work are {down} and {up}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FluxsplitError(f"JSON names {twice[:80]!r} twice")
    return table


def _no_constant(name: str) -> float:
    raise FluxsplitError(f"JSON holds {name}, which is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise FluxsplitError(f"JSON number {text[:40]} is too large")
    return value


def strict_json(text: str) -> Any:
    """Parse JSON from a stranger: no NaN or infinity, no duplicate keys, no depth that exhausts the stack.

    Raises FluxsplitError.
    """
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise FluxsplitError("JSON is nested too deeply") from None
    except ValueError as error:
        raise FluxsplitError(f"JSON cannot be read: {str(error)[:200]}") from None


def _as_text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS:
        raise ValueError
    value.encode("utf-8")  # a lone surrogate cannot be written again
    return value


def _as_int(value: Any) -> int:
    if type(value) is not int:
        raise ValueError
    return value


def _as_float(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError
    return float(value)


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _as_sigmas(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) > MAX_STEPS + 1:
        raise ValueError
    return tuple(_as_float(sigma) for sigma in value)


def _as_stamp(value: Any) -> WeightsStamp:
    if not isinstance(value, dict) or set(value) != {"name", "sha256"}:
        raise ValueError
    name = _as_text(value["name"])
    if len(name) > MAX_NAME_CHARS:
        raise ValueError
    return WeightsStamp(name, _as_sha256(value["sha256"]) if value["sha256"] != "" else "")


def _as_sha256(value: Any) -> str:
    sha256 = _as_text(value)
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise ValueError
    return sha256


def _as_versions(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > 32:
        raise ValueError
    return {_as_text(name): _as_text(version) for name, version in value.items()}


_READERS: dict[str, Callable[[Any], Any]] = {
    "prompt": _as_text,
    "seed": _as_int,
    "width": _as_int,
    "height": _as_int,
    "steps": _as_int,
    "sigmas": _as_sigmas,
    "sampler": _as_text,
    "scheduler": _as_text,
    "shift": _optional(_as_float),
    "guidance": _optional(_as_float),
    "cfg": _as_float,
    "negative": _as_text,
    "noise_index": _as_int,
    "variant": _as_text,
    "transformer": _as_stamp,
    "text_encoder": _as_stamp,
    "clip": _as_stamp,
    "dtype": _as_text,
    "device": _as_text,
    "stored_dtype": _as_text,
    "versions": _as_versions,
    "created": _as_text,
    "start": start_from_object,
    "retried": _optional(_as_text),
    "conditioning_sha256": _optional(_as_sha256),
}
_OPTIONAL = {"start", "retried", "conditioning_sha256"}


def stamp_from_json(text: str, what: str) -> WeightsStamp:
    """The stamp in JSON text; raises FluxsplitError, which says `what` it is of."""
    try:
        return _as_stamp(strict_json(text))
    except (ValueError, FluxsplitError):
        raise FluxsplitError(f"what it says of {what} is {text[:80]!r}") from None


def parent_from_object(value: Any) -> Parent:
    """The parent in a parsed JSON object; raises FluxsplitError."""
    try:
        if not isinstance(value, dict) or set(value) != {"name", "latent_sha256"}:
            raise ValueError
        stamp = _as_stamp({"name": value["name"], "sha256": value["latent_sha256"]})
        if not stamp.name:
            raise ValueError
    except ValueError:
        raise FluxsplitError(f"what it says of its parent is {str(value)[:80]!r}") from None
    return Parent(stamp.name, stamp.sha256)


def parent_from_json(text: str) -> Parent:
    """The parent in JSON text; raises FluxsplitError."""
    return parent_from_object(strict_json(text))


def recipe_from_object(value: Any) -> Recipe:
    """The recipe in a parsed JSON object; raises FluxsplitError naming the field that is wrong."""
    if not isinstance(value, dict) or value.get("fluxsplit") != SCHEMA:
        found = value.get("fluxsplit") if isinstance(value, dict) else type(value).__name__
        raise FluxsplitError(f"recipe has schema {str(found)[:40]!r}, this version reads {SCHEMA}")
    names = set(value) - {"fluxsplit"}
    if names | _OPTIONAL != set(_READERS):
        odd = sorted((names | _OPTIONAL) ^ set(_READERS))[:5]
        raise FluxsplitError(f"recipe has unknown or missing fields: {', '.join(name[:40] for name in odd)}")
    read: dict[str, Any] = {}
    for name in names:
        try:
            read[name] = _READERS[name](value[name])
        except (ValueError, OverflowError):
            raise FluxsplitError(f"recipe field {name} holds {str(value[name])[:80]!r}") from None
    return Recipe(**read)


assert {f.name for f in fields(Recipe)} == set(_READERS), "every field of a recipe has a reader"
