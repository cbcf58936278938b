"""Where model files lie on a machine: ComfyUI's folders and the Hugging Face cache.

Nothing is opened here but ComfyUI's `extra_model_paths.yaml`, of which the subset that its example shows is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from fluxsplit.errors import ModelFileMissing

COMFYUI_KINDS = {
    "transformer": ("checkpoints", "unet", "diffusion_models"),
    "t5": ("text_encoders", "clip", "checkpoints"),
    "clip": ("text_encoders", "clip", "checkpoints"),
    "vae": ("vae", "checkpoints"),
    "upscaler": ("upscale_models",),
    "vae_approx": ("vae_approx",),
}
"""ComfyUI's folders in which a part may lie (ComfyUI `folder_paths.py`)."""
WEIGHT_SUFFIXES = (".safetensors", ".sft")
MAX_DEPTH = 4
MAX_FILES = 2000
_MAX_YAML_BYTES = 1_000_000


def comfyui_root(configured: str = "") -> Path | None:
    """ComfyUI's folder: the configured one, else `~/ComfyUI` or `./ComfyUI`; None where there is none.

    Raises ModelFileMissing where the configured one is no ComfyUI.
    """
    if configured:
        root = Path(configured).expanduser()
        if not (root / "models").is_dir():
            raise ModelFileMissing(f"{root} is no ComfyUI folder: it holds no models folder", "see --comfyui")
        return root
    for root in (Path("~/ComfyUI").expanduser(), Path.cwd() / "ComfyUI"):
        if (root / "models").is_dir():
            return root
    return None


def comfyui_folders(root: Path | None, kind: str) -> list[Path]:
    """The existing folders in which ComfyUI keeps parts of a kind, those of `extra_model_paths.yaml` included."""
    if root is None:
        return []
    extra = extra_model_paths(root / "extra_model_paths.yaml")
    folders: list[Path] = []
    for name in COMFYUI_KINDS[kind]:
        folders += [root / "models" / name, *extra.get(name, [])]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def extra_model_paths(file: Path) -> dict[str, list[Path]]:
    """Folders by ComfyUI's name for what they hold; empty where there is no such file.

    The subset of YAML that is read: sections at the left margin, `key: value` below them, and `key: |` with one
    folder a line. Whatever else the file holds is passed over.
    """
    try:
        with file.open(encoding="utf-8", errors="replace") as stream:
            lines = stream.read(_MAX_YAML_BYTES).splitlines()
    except OSError:
        return {}
    folders: dict[str, list[Path]] = {}
    base, block = "", ""
    entries: list[tuple[str, str]] = []
    for line in [*lines, "end:"]:
        if line[:1] not in ("", " ", "\t", "#"):  # a new section: the last one is complete
            for key, value in entries:
                folders.setdefault(key, []).append(file.parent / Path(base).expanduser() / value)
            base, block, entries = "", "", []
            continue
        text = line.split(" #")[0].strip()
        if not text or text.startswith("#"):
            continue
        key, colon, value = text.partition(":")
        is_key = bool(colon) and (not value or value.startswith(" "))
        value = value.strip().strip("\"'") if is_key else text
        if is_key:
            block = key.strip()
        if is_key and block == "base_path":
            base = value
        elif block and value not in ("", "|", ">", "true", "false"):
            entries.append((block, value))
    return folders


def is_hidden(file: Path) -> bool:
    """Whether a name begins with a dot, as `._x.safetensors` that macOS puts beside `x.safetensors` on other disks."""
    return file.name.startswith(".")


def weight_files(folder: Path, depth: int = MAX_DEPTH, suffixes: tuple[str, ...] = WEIGHT_SUFFIXES) -> Iterator[Path]:
    """Weight files in a folder and, down to `depth`, below it, sorted; links are followed as ComfyUI does."""
    count = 0
    for current, below, names in os.walk(folder, followlinks=True):
        below.sort()
        if len(Path(current).relative_to(folder).parts) >= depth:
            below.clear()
        for name in sorted(names):
            file = Path(current) / name
            if name.lower().endswith(suffixes) and not is_hidden(file) and count < MAX_FILES:
                count += 1
                yield file


def safetensors_below(folder: Path) -> list[Path]:
    """The safetensors files of a diffusers folder, in order of their parts, the same on every system."""
    found = (file for file in folder.rglob("*.safetensors") if not is_hidden(file))
    return sorted(found, key=lambda file: file.relative_to(folder).parts)


def hugging_face_hub(environment: Mapping[str, str]) -> Path:
    """Where the Hugging Face cache keeps repositories (huggingface_hub `constants.py`)."""
    if folder := environment.get("HF_HUB_CACHE"):
        return Path(folder).expanduser()
    if folder := environment.get("HF_HOME"):
        return Path(folder).expanduser() / "hub"
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def t5_tokenizer_candidates(model: Path | None, comfyui: Path | None, hub: Path) -> Iterator[Path]:
    """Where T5's `tokenizer.json` may be, nearest to the model first."""
    for folder in _around(model):
        yield folder / "tokenizers" / "t5xxl" / "tokenizer.json"
        yield folder / "tokenizer_2" / "tokenizer.json"
    if comfyui is not None:
        yield comfyui / "comfy" / "text_encoders" / "t5_tokenizer" / "tokenizer.json"
    yield from sorted(hub.glob("models--*FLUX.1*/snapshots/*/tokenizer_2/tokenizer.json"))
    yield from sorted(hub.glob("models--google--t5-v1_1-xxl/snapshots/*/tokenizer.json"))


def clip_tokenizer_candidates(model: Path | None, comfyui: Path | None, hub: Path) -> Iterator[Path]:
    """Folders that may hold CLIP's `vocab.json` and `merges.txt`, nearest to the model first."""
    for folder in _around(model):
        yield folder / "tokenizers" / "clip_l"
        yield folder / "tokenizer"
    if comfyui is not None:
        yield comfyui / "comfy" / "sd1_tokenizer"
    yield from sorted(hub.glob("models--*FLUX.1*/snapshots/*/tokenizer"))
    yield from sorted(hub.glob("models--openai--clip-vit-large-patch14/snapshots/*"))


def _around(model: Path | None) -> list[Path]:
    """The folders nearest to a model: itself where it is one, and the one that it lies in."""
    if model is None:
        return []
    return [model, model.parent] if model.is_dir() else [model.parent]
