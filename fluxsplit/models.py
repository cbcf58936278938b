"""Which files are meant: the parts of a model and its tokenizers, named or found, told by their keys.

A part that is not named is looked for in the model's own file, beside it, then in ComfyUI's folders. A file found
that way must fit: its width, read from the tensors, is the one that the transformer takes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from fluxsplit import checkpoint, places
from fluxsplit.checkpoint import Part
from fluxsplit.errors import FluxsplitError, ModelFileMissing
from fluxsplit.jobs import ModelFiles, absolute
from fluxsplit.recipe import LATENT_CHANNELS

DEMO = "demo"
"""What the demo model is called where a model or a VAE is named."""
DEMO_FILE = "flux-demo.safetensors"
DEMO_FOLDER = Path(__file__).parent / "demo"
TEXT = ("t5", "clip")
_TITLES = {"transformer": "transformer", "t5": "T5 text encoder", "clip": "CLIP-L text encoder", "vae": "VAE"}
_FLAGS = {"transformer": "--model", "t5": "--text-encoder", "clip": "--clip", "vae": "--vae"}
_PUBLISHED = {
    "transformer": "flux1-schnell-fp8.safetensors (17.2 GB, everything in one file) is in the Hugging Face repository "
    "Comfy-Org/flux1-schnell",
    "t5": "t5xxl_fp8_e4m3fn.safetensors (4.9 GB) is in the Hugging Face repository comfyanonymous/flux_text_encoders",
    "clip": "clip_l.safetensors (246 MB) is in the Hugging Face repository comfyanonymous/flux_text_encoders",
    "vae": "ae.safetensors (335 MB), which is FLUX.1's, is in split_files/vae of the Hugging Face repository "
    "Comfy-Org/z_image_turbo",
}
_TOKENIZERS = (
    "tokenizer_2/tokenizer.json (2.4 MB), tokenizer/vocab.json and tokenizer/merges.txt (1.6 MB) are in the Hugging "
    "Face repository black-forest-labs/FLUX.1-schnell: give --tokenizers a folder that holds them as "
    "t5xxl/tokenizer.json, clip_l/vocab.json and clip_l/merges.txt"
)
_USUAL_NAMES = {"clip": ("clip_l.safetensors",), "vae": ("ae.safetensors", "flux_vae.safetensors")}
"""Decide only between files that fit equally well: a VAE of Stable Diffusion 3 has the very keys of Flux's."""
_WIDTHS = {
    "t5": ("shared.weight", "context_embedder.weight", 1),
    "clip": ("embeddings.position_embedding.weight", "time_text_embed.text_embedder.linear_1.weight", 1),
    "vae": ("decoder.conv_in.weight", "x_embedder.weight", 4),
}
"""For each part its tensor and the transformer's tensor whose second sizes must agree, divided by the number."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was named, by flags or settings; empty stands for what is to be found."""

    model: str = ""
    text_encoder: str = ""
    clip: str = ""
    vae: str = ""
    tokenizers: str = ""
    comfyui: str = ""

    def named(self, kind: str) -> str:
        """The file named for a part."""
        return {"transformer": self.model, "t5": self.text_encoder, "clip": self.clip, "vae": self.vae}[kind]


def demo_files() -> ModelFiles:
    """The small Flux inside this package; raises ModelFileMissing where the package lacks it."""
    file, tokenizers = DEMO_FOLDER / DEMO_FILE, DEMO_FOLDER / "tokenizers"
    if not file.is_file():
        raise ModelFileMissing(f"the demo model {file} is missing", "install fluxsplit again, or name a --model")
    one = absolute(file)
    t5, clip = absolute(tokenizers / "t5xxl" / "tokenizer.json"), absolute(tokenizers / "clip_l")
    return ModelFiles(one, one, one, one, t5, clip, is_demo=True)


def resolve(wanted: Wanted, need: Collection[str]) -> ModelFiles:
    """The files of the parts in `need` (transformer, t5, clip, vae), with the tokenizers that text encoders take.

    Without a model this is the demo model. Raises ModelFileMissing, saying where it looked and what to get, and
    FluxsplitError for a file that is not what it was named as.
    """
    if wanted.model in ("", DEMO):
        return demo_files()
    comfyui = places.comfyui_root(wanted.comfyui)
    model = find_named(wanted.model, "transformer", comfyui)
    transformer = checkpoint.part(model, "transformer") if "transformer" in need else None
    files = {kind: str(_find(kind, wanted, model, transformer, comfyui)) for kind in (*TEXT, "vae") if kind in need}
    if "vae" not in need:  # sampling needs only its scale, which an unusual VAE writes into its own file
        files["vae"] = str(find_named(wanted.vae, "vae", comfyui)) if wanted.vae else _inside(model, "vae")
    t5_tokenizer = clip_tokenizer = ""
    if set(TEXT) & set(need):
        t5_tokenizer, clip_tokenizer = find_tokenizers(wanted.tokenizers, model, comfyui)
    found = {kind: absolute(path) if path else "" for kind, path in files.items()}
    return ModelFiles(
        absolute(model), found.get("t5", ""), found.get("clip", ""), found["vae"], t5_tokenizer, clip_tokenizer
    )


def resolve_vae(wanted: Wanted) -> str:
    """The file of the VAE to decode with: named, inside or beside the model, or ComfyUI's."""
    comfyui = places.comfyui_root(wanted.comfyui)
    model = find_named(wanted.model, "transformer", comfyui) if wanted.model and not wanted.vae else None
    return absolute(_find("vae", wanted, model, None, comfyui))


def find_named(name: str, kind: str, comfyui: Path | None) -> Path:
    """The file or folder that a person named: a path, or a name below one of ComfyUI's folders."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name == DEMO and kind in ("transformer", "vae"):
        return Path(demo_files().transformer)
    looked = []
    if not path.is_absolute():
        for folder in places.comfyui_folders(comfyui, kind):
            looked.append(folder)
            for candidate in (folder / name, folder / f"{name}.safetensors"):
                if candidate.exists():
                    return candidate
            for file in places.weight_files(folder):
                if name in (file.name, file.stem):
                    return file
    where = f"it is neither a path nor in {_listed(looked)}" if looked else "there is no such file or folder"
    if not path.is_absolute() and name.count("/") == 1 and not name.endswith(places.WEIGHT_SUFFIXES):
        where += ", and fluxsplit fetches none from the hub"
    raise ModelFileMissing(f"{_FLAGS[kind]} {name}: {where}", _PUBLISHED[kind])


def find_tokenizers(named: str, model: Path | None, comfyui: Path | None) -> tuple[str, str]:
    """T5's `tokenizer.json` and the folder of CLIP's `vocab.json` and `merges.txt`."""
    if named:
        folder = Path(named).expanduser()
        t5s, clips = [folder / "t5xxl" / "tokenizer.json"], [folder / "clip_l"]
    else:
        hub = places.hugging_face_hub(os.environ)
        t5s = list(places.t5_tokenizer_candidates(model, comfyui, hub))
        clips = list(places.clip_tokenizer_candidates(model, comfyui, hub))
    t5 = next((file for file in t5s if file.is_file()), None)
    clip = next((folder for folder in clips if _is_clip_tokenizer(folder)), None)
    if t5 is None or clip is None:
        what = "T5's tokenizer.json" if t5 is None else "CLIP's vocab.json and merges.txt"
        looked = _listed(t5s if t5 is None else clips)
        raise ModelFileMissing(f"{what} not found in {looked}", _TOKENIZERS)
    return absolute(t5), absolute(clip)


def _is_clip_tokenizer(folder: Path) -> bool:
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


def _find(kind: str, wanted: Wanted, model: Path | None, transformer: Part | None, comfyui: Path | None) -> Path:
    """The file of one part; what was named must hold it and fit, what is found does."""
    if wanted.named(kind):
        path = find_named(wanted.named(kind), kind, comfyui)
        _check_fit(path, kind, checkpoint.part(path, kind), transformer)
        return path
    looked: list[Path] = []
    rivals: list[Path] = []
    for group in _groups(kind, wanted, model, comfyui, looked):
        fitting = {path: part for path in group if (part := _held(path, kind)) and _fits(part, kind, transformer)}
        chosen = _choose(kind, fitting)
        if chosen is not None:
            return chosen
        rivals += fitting
    if rivals:
        names = ", ".join(str(path) for path in rivals[:4])
        raise ModelFileMissing(f"{len(rivals)} files hold a {_TITLES[kind]}: {names}", f"name one with {_FLAGS[kind]}")
    where = f" in {_listed(looked)}" if looked else ""
    without = ", or give a prompt that is encoded already by --conditioning" if kind in ("t5", "clip") else ""
    hint = f"{_PUBLISHED[kind]}; name it with {_FLAGS[kind]}{without}"
    raise ModelFileMissing(f"no {_TITLES[kind]} found{where}", hint)


def _groups(
    kind: str, wanted: Wanted, model: Path | None, comfyui: Path | None, looked: list[Path]
) -> Iterator[list[Path]]:
    """Places where a part may be, nearest first; `looked` keeps what to tell where none has it."""
    if model is not None:
        looked.append(model)
        yield [model]
    other = wanted.clip if kind == "t5" else wanted.text_encoder
    if kind in TEXT and other:
        yield [find_named(other, kind, comfyui)]
    if model is not None:
        folder = model.parent
        looked.append(folder)
        yield [folder] if (folder / "model_index.json").is_file() else list(places.weight_files(folder, depth=0))
    for folder in places.comfyui_folders(comfyui, kind):
        looked.append(folder)
        yield list(places.weight_files(folder))


def _held(path: Path, kind: str) -> Part | None:
    """The part in a file that nobody named; one that cannot be read or is of a foreign kind holds none."""
    try:
        return checkpoint.find_part(path, kind)
    except FluxsplitError:
        return None


def _inside(model: Path, kind: str) -> str:
    return str(model) if _held(model, kind) else ""


def _choose(kind: str, fitting: dict[Path, Part]) -> Path | None:
    """One of several files that fit: the usual name, the smallest T5; otherwise the person must say."""
    if len(fitting) == 1:
        return next(iter(fitting))
    for name in _USUAL_NAMES.get(kind, ()):
        if usual := [path for path in fitting if path.name.lower() == name]:
            return usual[0]
    if kind == "t5" and fitting:  # the same weights in several precisions
        return min(fitting, key=lambda path: (_bytes(fitting[path]), path.name))
    return None


def _bytes(part: Part) -> int:
    return sum(source.tensor.end - source.tensor.start for source in part.sources.values())


def _width(part: Part, name: str) -> int:
    shape = part.sources[name].shape if name in part.sources else ()
    return shape[1] if len(shape) > 1 else 0


def _widths(part: Part, kind: str, transformer: Part | None) -> tuple[int, int]:
    """The width that a part has and the one that is needed, 0 where that is unknown."""
    own, needed, divisor = _WIDTHS[kind]
    if transformer is not None:
        return _width(part, own), _width(transformer, needed) // divisor
    return _width(part, own), LATENT_CHANNELS if kind == "vae" else 0


def _fits(part: Part, kind: str, transformer: Part | None) -> bool:
    has, needs = _widths(part, kind, transformer)
    return needs in (0, has)


def _check_fit(path: Path, kind: str, part: Part, transformer: Part | None) -> None:
    if not _fits(part, kind, transformer):
        has, needs = _widths(part, kind, transformer)
        raise FluxsplitError(
            f"{path.name} holds a {_TITLES[kind]} of width {has}, the model takes {needs}",
            f"name another with {_FLAGS[kind]}",
        )


def _listed(folders: list[Path]) -> str:
    shown = [str(folder) for folder in dict.fromkeys(folders)]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
