"""What people type, read strictly: seeds and ranges, sizes, noise levels, prompts, choices."""

from __future__ import annotations

import fnmatch
import json
import math
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fluxsplit.errors import FluxsplitError, UsageError
from fluxsplit.jobs import absolute
from fluxsplit.places import is_hidden
from fluxsplit.recipe import MAX_SEED, MAX_TEXT_CHARS, check_sigmas, check_size
from fluxsplit.settings import similar

MAX_IMAGES = 10_000
MAX_CFG = 1000
MAX_INPUT_CHARS = 100_000_000
_SIZE = re.compile(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", re.ASCII)
_SEED = re.compile(r"\s*(\d{1,30})\s*(?:\.\.\s*(\d{1,30})\s*)?", re.ASCII)
_FILE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".pt", ".safetensors", ".latent")
_MAX_SCANNED_CHARS = 10_000
_OTHERS_SYNTAX = {
    "a LoRA is named": re.compile(r"<lora:"),
    "an embedding is named": re.compile(r"\bembedding:\w", re.ASCII),
    "there is a choice as {a|b}": re.compile(r"\{[^{}|]{0,200}\|[^{}]{0,200}\}"),
    "there is a wildcard as __name__": re.compile(r"(?<!\w)__[\w/*-]{1,80}__(?!\w)", re.ASCII),
    "there is a BREAK": re.compile(r"\bBREAK\b"),
}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?", re.ASCII)


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of `WxH`; raises UsageError, with the nearest sizes that work."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise UsageError(f"size {text!r} is not WIDTHxHEIGHT", "write it as 1024x768")
    width, height = int(match[1]), int(match[2])
    check_size(width, height)
    return width, height


def parse_seeds(texts: Sequence[str], count: int, *, without: str = "one is drawn and told") -> list[int]:
    """Every seed of numbers and ranges `7..15`, each followed by its `count - 1` successors; none twice.

    `without` says what happens where none is given.
    """
    if not 1 <= count <= MAX_IMAGES:
        raise UsageError(f"count {count} is outside 1..{MAX_IMAGES}")
    seeds: dict[int, None] = {}
    for text in texts:
        match = _SEED.fullmatch(text)
        if not match:
            raise UsageError(
                f"seed {text[:40]!r} is neither a number nor a range", _seed_hint(text.strip().lower(), without)
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"seed range {text!r} runs backwards", f"write it as {last}..{first}")
        if last + count - 1 > MAX_SEED:
            what = f"seed {last}" if count == 1 else f"seed {last} with --count {count}"
            raise UsageError(f"{what} goes beyond 2^64-1", f"the largest seed is {MAX_SEED}")
        if last - first + count + len(seeds) > MAX_IMAGES:
            raise UsageError(
                f"{last - first + count} seeds are asked for", f"one run makes at most {MAX_IMAGES} images"
            )
        seeds.update(dict.fromkeys(range(first, last + count)))
    return list(seeds)


def _seed_hint(text: str, without: str) -> str:
    """How to write what other tools write otherwise."""
    if text in ("-1", "random", "rand", "randomize"):
        return f"give a number; without --seed {without}"
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and all(map(_SEED.fullmatch, parts)):
        more = " ..." if len(parts) > 3 else ""
        return f"give --seed once for each: {' '.join(f'--seed {part}' for part in parts[:3])}{more}"
    return "write it as 7 or 7..15"


def draw_seed() -> int:
    """A seed of 32 bits: more would lose digits in programs that keep seeds as JavaScript numbers."""
    return secrets.randbelow(2**32)


def parse_sigmas(text: str) -> tuple[float, ...]:
    """Noise levels with commas or spaces between them, falling from at most 1 to 0."""
    words = text.replace(",", " ").split()
    try:
        sigmas = tuple(float(word) for word in words)
    except ValueError:
        raise UsageError(f"sigmas {text[:80]!r} are not numbers", "write them as 1,0.75,0.5,0.25,0") from None
    try:
        check_sigmas(sigmas)
    except FluxsplitError as error:
        raise UsageError(error.message, "write them as 1,0.75,0.5,0.25,0") from None
    return sigmas


def parse_shift(text: str) -> float | None:
    """mu of the time shift; None for `auto`."""
    if text.strip().lower() == "auto":
        return None
    try:
        shift = float(text)
    except ValueError:
        raise UsageError(f"shift {text!r} is neither auto nor a number", "ComfyUI's usual shift is 1.15") from None
    if not math.isfinite(shift) or abs(shift) > 100:
        raise UsageError(f"shift {text} is outside -100..100")
    return shift


def check_choice(flag: str, value: str, known: Iterable[str]) -> str:
    """`value` if it is one of the known words; raises UsageError with the nearest."""
    words = list(known)
    if value not in words:
        raise UsageError(f"--{flag} {value!r} is not one of {', '.join(words)}", similar(value, words))
    return value


def check_device(name: str) -> str:
    """`name` if it may be a device; whether it is there only the stage can tell."""
    if not _DEVICE.fullmatch(name):
        raise UsageError(f"device {name!r} is not known", "use auto, cpu or cuda:N")
    return name


def check_cfg(cfg: float) -> None:
    """Raise UsageError for a strength of true guidance that is asked for and is none."""
    if 0 <= cfg < 1:
        raise UsageError(
            f"--cfg {cfg:g} would lead away from the prompt", "give --cfg 1 for no true guidance, which is the default"
        )
    check_range("cfg", cfg, 1, MAX_CFG)


def prompt_warnings(prompt: str) -> list[str]:
    """What to say of a prompt in which other programs would read more than text."""
    found = [what for what, pattern in _OTHERS_SYNTAX.items() if pattern.search(prompt[:_MAX_SCANNED_CHARS])]
    return [f"{what} in the prompt; fluxsplit has no such thing, and reads it as text" for what in found]


def check_range(flag: str, value: float, low: float, high: float) -> None:
    """Raise UsageError unless `value` lies in low..high (NaN does not)."""
    if not low <= value <= high:
        raise UsageError(f"--{flag} {value:.12g} is outside {low:g}..{high:g}")


def prompts_of_lines(lines: Iterable[str], where: str) -> list[str]:
    """One prompt a line; blank lines and those that start with # are skipped. Raises UsageError where none is left."""
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise UsageError(f"{where} holds no prompt", "write one prompt a line")
    return prompts


def gather_prompts(given: Sequence[str], file: str) -> list[str]:
    """Prompts of the command line, of a file, and of stdin where `-` or nothing is given; in that order."""
    prompts: list[str] = []
    for text in given:
        prompts += prompts_of_lines(read_stdin(), "stdin") if text == "-" else [text]
    if file == "-":
        prompts += prompts_of_lines(read_stdin(), "stdin")
    elif file:
        prompts += prompts_of_lines(_read_lines(Path(file).expanduser()), file)
    if not given and not file:
        piped = [] if sys.stdin is None or sys.stdin.isatty() else read_stdin()
        if not any(line.strip() for line in piped):
            raise UsageError("there is no prompt", 'give one, as --prompt "a red circle", or pipe prompts in')
        prompts = prompts_of_lines(piped, "stdin")
    return [check_prompt(prompt) for prompt in dict.fromkeys(prompts)]


def check_prompt(prompt: str) -> str:
    """`prompt` if it is text that can be kept; raises UsageError."""
    if len(prompt) > MAX_TEXT_CHARS:
        raise UsageError(f"a prompt of {len(prompt)} characters is over {MAX_TEXT_CHARS}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"prompt {prompt[:40]!r} is not valid text", "use a terminal set to UTF-8") from None
    return prompt


def read_stdin() -> list[str]:
    """The lines on stdin, as UTF-8 whatever the locale."""
    return _decoded(_stdin_bytes(), "stdin")


def read_names() -> list[str]:
    """The file names on stdin: one a line, as with `--json` or without, or divided by NUL (`find -print0`).

    In any encoding that files have here.
    """
    text = _stdin_bytes().decode("utf-8-sig", "surrogateescape")
    return text.split("\0") if "\0" in text else [_path_in(line) for line in text.splitlines()]


def _path_in(line: str) -> str:
    """The name on a line, be it one of those that `--json` prints."""
    if line.startswith('{"path": "'):
        with suppress(ValueError, RecursionError):
            return str(json.loads(line)["path"])
    return line


def _stdin_bytes() -> bytes:
    return sys.stdin.buffer.read(MAX_INPUT_CHARS) if hasattr(sys.stdin, "buffer") else sys.stdin.read().encode()


def gather_files(names: Sequence[str], in_folder: Callable[[Path], Iterable[Path]], what: str) -> list[Path]:
    """Files in the order given, each once: files, what `in_folder` finds in folders, and the lines of stdin for `-`.

    A folder that cannot be read stands for itself, for its reader to say so. Raises UsageError where there is none, or
    none of them exists; `what` says what they are for, as `latent file to decode`.
    """
    files: dict[Path, None] = {}
    for name in names:
        found = [Path(line) for line in read_names() if line] if name == "-" else named(name)
        for path in found:
            try:
                held = list(in_folder(path)) if path.is_dir() else [path]
            except OSError:
                held = [path]
            files.update(dict.fromkeys(held))
    if not files:
        raise UsageError(f"there is no {what}", "name files or folders, or - to read names from stdin")
    if not any(_may_exist(file) for file in files):
        first, others = next(iter(files)), len(files) - 1
        rest = {0: "", 1: ", nor does the other one"}.get(others, f", nor do the {others} others")
        raise UsageError(f"{first} does not exist{rest}")
    return list(files)


def _may_exist(file: Path) -> bool:
    """Whether a file is there, or is where nobody may look; its reader says that."""
    try:
        return file.exists()
    except OSError:
        return True


def out_folder(values: Mapping[str, Any], default: str = "") -> str:
    """The absolute folder that `--out` names, empty for none; raises UsageError where it looks like a file's name."""
    name = values.get("out") or default
    out = Path(absolute(name))
    if out.suffix.lower() in _FILE_SUFFIXES and not out.is_dir():
        raise UsageError(f"--out {name} is the name of a file", "give a folder; files are named by themselves")
    return str(out) if name else ""


def check_names_differ(files: Sequence[str | Path], folder: str) -> None:
    """Raise UsageError where two files' results would have one name in `folder` (empty: each file's own)."""
    first: dict[tuple[Path, str], Path] = {}
    for file in map(Path, files):
        other = first.setdefault((Path(folder) if folder else file.parent, file.stem.casefold()), file)
        if other != file:
            raise UsageError(
                f"with --overwrite {other} and {file} would be written to one name, and the first be lost",
                "drop --overwrite, or name them in two commands",
            )


def named(word: str) -> list[Path]:
    """The path that a word names; what matches it, where it is a pattern that the shell left alone, as on Windows.

    Raises UsageError where nothing matches.
    """
    path = Path(word).expanduser()
    if _may_exist(path) or not any(c in word for c in "*?["):
        return [path]
    root = Path(path.anchor or ".")
    pattern = path.relative_to(root) if path.anchor else path
    asked = [part for part in pattern.parts if part.startswith(".")]

    def is_asked(file: Path) -> bool:
        """Hidden files and folders are matched as a shell does it: by a pattern that begins with a dot."""
        hidden = [part for part in file.relative_to(root).parts if part.startswith(".")]
        return all(any(fnmatch.fnmatch(part, wanted) for wanted in asked) for part in hidden)

    matching = sorted(filter(is_asked, root.glob(str(pattern))))
    if not matching:
        raise UsageError(f"nothing matches {word}")
    return matching


def is_overview(file: Path) -> bool:
    """Whether a file is a contact sheet or a peek of ours by its name, and not a picture to go on with."""
    return file.name in ("sheet.png", "peek.png") or file.name.endswith(".peek.png")


def without_overviews(files: Sequence[Path], note: Callable[[str], None]) -> list[Path]:
    """Files that were named, less contact sheets and peeks, as a shell's pattern names these too; `note` is told which.

    Where there is nothing else they are meant.
    """
    kept = [file for file in files if not is_overview(file)]
    if not kept or len(kept) == len(files):
        return list(files)
    left = ", ".join(str(file) for file in files if is_overview(file))
    note(f"{left} left out, as an overview of pictures; name it alone to have it")
    return kept


def is_passed_over(file: Path) -> bool:
    """Whether a file is nothing to go on with where only its folder was named."""
    return is_hidden(file) or is_overview(file)


def files_in(folder: Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """Files in `folder` of these suffixes, in any case, by name, save passed over ones; raises UsageError for none."""
    found = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in suffixes and file.is_file() and not is_passed_over(file)
    )
    if not found:
        raise UsageError(f"{folder} holds no {what}", f"{what}s end in {', '.join(suffixes)}")
    return found


def _read_lines(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            return _decoded(stream.read(MAX_INPUT_CHARS), str(file))
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None


def _decoded(data: bytes, where: str) -> list[str]:
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{where} is not UTF-8 text", "save it as UTF-8") from None
