"""Defaults: flags over `FLUXSPLIT_*` over `./fluxsplit.toml` over the user's `config.toml`; and workflow files.

Every setting has the name of its flag. Keys at the top of a file hold for every command, those in `[sample]`
and `[decode]` for one. `FLUXSPLIT_MODEL` is the key `model`, `FLUXSPLIT_SAMPLE_STEPS` is `steps` in `[sample]`.
A key that is not known is an error, since a setting that is silently ignored renders the wrong picture.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fluxsplit.errors import UsageError

Reader = Callable[[Any], Any]
Values = dict[str, Any]
PREFIX = "FLUXSPLIT_"
COMMANDS = ("sample", "preview", "rerender", "decode", "encode", "upscale", "peek")
MAX_FILE_BYTES = 1_000_000
_OTHER_VARIABLES = {"FLUXSPLIT_CACHE", "FLUXSPLIT_PROGRESS"}
"""Ours, but no settings: read where they are used."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text in quotes")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, str):
        with suppress(ValueError):
            value = int(value)
    if type(value) is not int:
        raise ValueError("a whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if type(value) not in (int, float):
        raise ValueError("a number")
    return float(value)


def _switch(value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [_text(item) for item in values]


def _seeds(value: Any) -> list[str]:
    """Seeds and ranges: `7`, `"7..15"` or a list of them; as text, which holds 64 bits where TOML's integers do not."""
    values = value if isinstance(value, list) else [value]
    if not all(type(item) in (int, str) for item in values):
        raise ValueError("whole numbers or ranges as 7..15")
    return [str(item) for item in values]


def _numbers(value: Any) -> str:
    """Sigmas as the flag takes them: numbers with commas."""
    if isinstance(value, list) and all(type(item) in (int, float) for item in value):
        return ", ".join(repr(float(item)) for item in value)
    return _text(value)


def _number_or_text(value: Any) -> str:
    return repr(float(value)) if type(value) in (int, float) else _text(value)


def _integer_or_text(value: Any) -> str:
    return str(value) if type(value) is int else _text(value)


_FILES: dict[str, Reader] = {
    "model": _text,
    "text_encoder": _text,
    "clip": _text,
    "vae": _text,
    "tokenizers": _text,
    "comfyui": _text,
}
_EVERYWHERE: dict[str, Reader] = {"device": _text, "quiet": _switch}
SHARED: dict[str, Reader] = (
    _FILES | _EVERYWHERE | {"vram": _text, "vae_dtype": _text, "format": _text, "cache": _switch}
)
"""What means the same to every command that has it; each takes of these what is in its own table."""
_SAMPLE: dict[str, Reader] = {
    "cfg": _number,
    "negative": _text,
    "count": _integer,
    "size": _text,
    "steps": _integer,
    "guidance": _number,
    "scheduler": _text,
    "sigmas": _numbers,
    "shift": _number_or_text,
    "sampler": _text,
    "noise_index": _integer,
    "dtype": _text,
    "vram": _text,
    "out": _text,
    "format": _text,
    "skip_existing": _switch,
    "peek": _switch,
    "peek_steps": _switch,
    "cache": _switch,
}
_NOT_OF_PREVIEWS = ("noise_index", "peek", "peek_steps")
_PREVIEW = {key: reader for key, reader in _SAMPLE.items() if key not in _NOT_OF_PREVIEWS} | {
    "vae_dtype": _text,
    "vram": _text,
}
_UPSCALE: dict[str, Reader] = {"upscale": _integer_or_text, "upscale_to": _text, "fetch": _switch}
_ENLARGE: dict[str, Reader] = _UPSCALE | {"upscale_tile": _integer_or_text}
_RERENDER: dict[str, Reader] = {
    "keep": _text,
    "strength": _number,
    "fit": _text,
    "low_frequency_guidance": _number,
    "scale": _number,
    "dtype": _text,
    "vae_dtype": _text,
    "vram": _text,
    "out": _text,
    "cache": _switch,
} | _ENLARGE
_DECODE: dict[str, Reader] = {
    "vae_dtype": _text,
    "vram": _text,
    "tile": _integer,
    "out": _text,
    "overwrite": _switch,
    "delete_latents": _switch,
} | _ENLARGE
_ENCODE: dict[str, Reader] = {"vae_dtype": _text, "vram": _text, "fit": _text, "out": _text, "format": _text}
_UPSCALE_ALONE: dict[str, Reader] = {
    "comfyui": _text,
    "dtype": _text,
    "out": _text,
    "overwrite": _switch,
    "tile": _integer_or_text,
    "vram": _text,
} | _EVERYWHERE
_PEEK: dict[str, Reader] = {
    "decoder": _text,
    "comfyui": _text,
    "out": _text,
    "overwrite": _switch,
} | _EVERYWHERE
_VAE_FILES = {name: _FILES[name] for name in ("model", "vae", "comfyui")}
DEFAULTS: dict[str, dict[str, Reader]] = {
    "": SHARED,
    "sample": _FILES | _EVERYWHERE | _SAMPLE,
    "preview": _FILES | _EVERYWHERE | _PREVIEW,
    "rerender": _FILES | _EVERYWHERE | _RERENDER,
    "decode": _VAE_FILES | _EVERYWHERE | _DECODE,
    "encode": _VAE_FILES | _EVERYWHERE | _ENCODE,
    "upscale": _UPSCALE | _UPSCALE_ALONE,
    "peek": _PEEK,
}
"""What settings files may set, by table; the empty name stands for keys at the top."""

_RECIPE = (
    "negative",
    "size",
    "steps",
    "guidance",
    "cfg",
    "sampler",
    "scheduler",
    "shift",
    "sigmas",
    "noise_index",
)
"""What a picture says of itself: overridden for one run, not by a default."""
_ONCE: dict[str, dict[str, Reader]] = {
    "sample": {
        "prompt": _texts,
        "prompt_file": _text,
        "seed": _seeds,
        "conditioning": _text,
        "save_conditioning": _text,
        "dry_run": _switch,
        "json": _switch,
    },
    "rerender": {
        "images": _texts,
        "from": _texts,
        "from_picks": _text,
        "prompt": _texts,
        "seed": _seeds,
        "count": _integer,
        "conditioning": _text,
        **{name: _SAMPLE[name] for name in _RECIPE},
        "dry_run": _switch,
        "json": _switch,
    },
    "preview": {
        "prompt": _texts,
        "prompt_file": _text,
        "seed": _seeds,
        "conditioning": _text,
        "dry_run": _switch,
        "json": _switch,
    },
    "decode": {"latents": _texts, "dry_run": _switch, "json": _switch},
    "encode": {"pictures": _texts, "size": _text, "dry_run": _switch, "json": _switch},
    "upscale": {"pictures": _texts, "dry_run": _switch, "json": _switch},
    "peek": {"latents": _texts, "json": _switch},
}
"""What belongs to one run: on the command line or in a workflow file, never in the defaults."""
_ONE_RUN = "it belongs to one run: give it as a flag, or in a workflow for `fluxsplit run`"
WORKFLOW: dict[str, dict[str, Reader]] = {name: DEFAULTS[name] | _ONCE[name] for name in COMMANDS}


def defaults(command: str, environment: Mapping[str, str], folder: Path | None = None) -> Values:
    """The settings of a command from the environment and the settings files, nearest first.

    Raises UsageError for a key that is not known and a value that cannot be used, naming where it stands.
    """
    values: Values = {}
    for file in _files(environment, folder):
        values |= _of_command(command, _read_tables(file))
    return values | _of_command(command, _environment_tables(environment))


def set_in(command: str, key: str, environment: Mapping[str, str], folder: Path | None = None) -> str:
    """Where the value that `defaults` has for a key was set: a variable's name or a file's; empty for nowhere."""
    of_command, of_all = f"{PREFIX}{command}_{key}".upper(), f"{PREFIX}{key}".upper()
    for variable in (of_command, *([of_all] if key in SHARED and of_all not in _OTHER_VARIABLES else [])):
        if variable in environment:
            return variable
    files: list[Path] = []
    with suppress(UsageError):  # changed since they were read
        files = [file for file in _files(environment, folder) if key in _of_command(command, _read_tables(file))]
    return str(files[-1]) if files else ""


def _files(environment: Mapping[str, str], folder: Path | None) -> list[Path]:
    """The settings files that there are, the nearest last."""
    files = user_config(environment), (folder or Path.cwd()) / "fluxsplit.toml"
    return [file for file in files if file.is_file()]


def read_workflow(file: Path) -> tuple[str, Values]:
    """Command and settings of a workflow file, which holds one table, named as its command."""
    table = _load(file)
    if len(table) != 1 or not isinstance(table.get(next(iter(table))), dict) or next(iter(table)) not in COMMANDS:
        found = ", ".join(map(repr, list(table)[:5])) or "nothing"
        raise UsageError(f"{file} holds {found}", f"a workflow is one table, {_tables_text()}")
    command, settings = next(iter(table.items()))
    return command, _read_values(settings, WORKFLOW[command], f"[{command}] of {file}")


def _tables_text() -> str:
    return " or ".join(f"[{name}]" for name in COMMANDS)


def user_config(environment: Mapping[str, str]) -> Path:
    """Where the user's settings are: XDG's folder, or what the platform has in its place."""
    if folder := environment.get("XDG_CONFIG_HOME"):
        return Path(folder) / "fluxsplit" / "config.toml"
    if sys.platform == "win32" and (folder := environment.get("APPDATA")):
        return Path(folder) / "fluxsplit" / "config.toml"
    home = Path(environment.get("HOME") or environment.get("USERPROFILE") or Path.home())
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "fluxsplit" / "config.toml"
    return home / ".config" / "fluxsplit" / "config.toml"


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known word nearest to `name`, or all of them where none is near."""
    words = list(known)
    return similar(name, words) or f"known are {', '.join(words)}"


def similar(name: str, known: Iterable[str]) -> str:
    """A hint that names the known word nearest to `name`; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else ""


def _of_command(command: str, tables: dict[str, Values]) -> Values:
    shared = {name: value for name, value in tables.get("", {}).items() if name in DEFAULTS[command]}
    return shared | tables.get(command, {})


def _read_tables(file: Path) -> dict[str, Values]:
    content = _load(file)
    tables = {name: value for name, value in content.items() if name in COMMANDS}
    top = {name: value for name, value in content.items() if name not in COMMANDS}
    read = {"": _read_values(top, SHARED, str(file))}
    for command, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{command} in {file} is not a table", f"write [{command}] on a line of its own")
        read[command] = _read_values(table, DEFAULTS[command], f"[{command}] of {file}")
    return read


def _environment_tables(environment: Mapping[str, str]) -> dict[str, Values]:
    names = {
        PREFIX + (f"{table}_{key}" if table else key).upper(): (table, key)
        for table, readers in DEFAULTS.items()
        for key in readers
    }
    tables: dict[str, Values] = {}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX) or variable in _OTHER_VARIABLES:
            continue
        if variable not in names:
            of_commands = [name for name in names if name.endswith("_" + variable.removeprefix(PREFIX))]
            hint = f"it is {' or '.join(of_commands)}" if of_commands else _unknown_variable_hint(variable, names)
            raise UsageError(f"environment variable {variable} is not a setting", hint)
        table, key = names[variable]
        tables.setdefault(table, {})[key] = _read(key, value, DEFAULTS[table][key], f"the environment ({variable})")
    return tables


def _unknown_variable_hint(variable: str, names: Iterable[str]) -> str:
    command, _, key = variable.removeprefix(PREFIX).lower().partition("_")
    return _ONE_RUN if key in _ONCE.get(command, ()) else nearest(variable, names)


def _load(file: Path) -> Values:
    import tomllib  # noqa: PLC0415  most runs have no settings file

    text = ""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{file} is larger than any settings file ({file.stat().st_size} bytes)")
        text = file.read_text("utf-8-sig")
        return tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError among them
        hint = r"write paths in single quotes, as 'C:\models\flux.safetensors'" if "\\" in text else ""
        raise UsageError(f"{file} is not valid TOML: {error}", hint) from None


def _read_values(table: Values, readers: Mapping[str, Reader], where: str) -> Values:
    values: Values = {}
    for spelled, value in table.items():
        key = spelled.replace("-", "_")
        if key not in readers:
            known = any(key in table for table in WORKFLOW.values())
            what = f"setting {spelled!r} is out of place" if known else f"unknown setting {spelled!r}"
            raise UsageError(f"{what} in {where}", _unknown_hint(key, readers))
        if key in values:
            raise UsageError(f"setting {spelled!r} stands twice in {where}")
        values[key] = _read(spelled, value, readers[key], where)
    return values


def _unknown_hint(key: str, readers: Mapping[str, Reader]) -> str:
    tables = [table for table, known in DEFAULTS.items() if table and key in known]
    if tables and readers is SHARED:
        return f"it belongs in {' or '.join(f'[{table}]' for table in tables)}"
    if any(key in once for once in _ONCE.values()):
        return _ONE_RUN
    known = dict.fromkeys((*readers, *(name for once in _ONCE.values() for name in once)))
    return similar(key.replace("_", "-"), (name.replace("_", "-") for name in known)) or nearest(key, readers)


def _read(key: str, value: Any, reader: Reader, where: str) -> Any:
    try:
        return reader(value)
    except (ValueError, OverflowError) as error:
        wanted = f", not {error}" if isinstance(error, ValueError) and len(str(error)) < 40 else ""
        raise UsageError(f"setting {key!r} in {where} is {str(value)[:80]!r}{wanted}") from None
