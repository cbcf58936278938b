"""Which file an upscaler's name or number means: the published Real-ESRGAN weights, found on the machine or fetched.

Sizes and SHA-256 are those under which other programs pin the files of Real-ESRGAN's releases; for each of them
several independent ones agree. Nothing is downloaded unless `--fetch` asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fluxsplit import places
from fluxsplit.download import download
from fluxsplit.errors import ModelFileMissing
from fluxsplit.fingerprint import cache_folder, file_sha256
from fluxsplit.jobs import absolute
from fluxsplit.state_dict import SUFFIXES, check_container

_RELEASES = "https://github.com/xinntao/Real-ESRGAN/releases/download"
PACKAGED = Path(__file__).parent / "demo" / "upscaler-2x.safetensors"


@dataclass(frozen=True, slots=True)
class Published:
    """A file of Real-ESRGAN's releases (BSD-3-Clause)."""

    file: str
    scale: int
    release: str
    size_bytes: int
    sha256: str
    short: str
    """Another name for it."""

    @property
    def url(self) -> str:
        """Where it was published."""
        return f"{_RELEASES}/{self.release}/{self.file}"


PUBLISHED = (
    Published(
        "RealESRGAN_x2plus.pth",
        2,
        "v0.2.1",
        67061725,
        "49fafd45f8fd7aa8d31ab2a22d14d91b536c34494a5cfe31eb5d89c2fa266abb",
        "x2plus",
    ),
    Published(
        "RealESRGAN_x4plus.pth",
        4,
        "v0.1.0",
        67040989,
        "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",
        "x4plus",
    ),
    Published(
        "RealESRGAN_x4plus_anime_6B.pth",
        4,
        "v0.2.2.4",
        17938799,
        "f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da",
        "anime",
    ),
    Published(
        "realesr-general-x4v3.pth",
        4,
        "v0.2.5.0",
        4885111,
        "8dc7edb9ac80ccdc30c3a5dca6616509367f05fbc184ad95b731f05bece96292",
        "general",
    ),
    Published(
        "realesr-animevideov3.pth",
        4,
        "v0.2.5.0",
        2504012,
        "b8a8376811077954d82ca3fcf476f1ac3da3e8a68a4f4d71363008000a18b75d",
        "animevideo",
    ),
)
_BY_NUMBER = {2: ("x2plus", "x4plus", "general"), 4: ("x4plus", "general")}
"""What a number means, the best first; a network of 4x is followed by halving."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The weights to enlarge with."""

    path: str
    factor: int
    """How much larger the result is to be; 0 for as much as the network makes it."""
    published: Published | None
    note: str = ""
    """A line for the person."""


def choose(wanted: str, comfyui: Path | None, fetch: bool, on_bytes: Callable[[str, int, int], None]) -> Chosen:
    """The file that `wanted` means: 2, 4, a name of `PUBLISHED`, a file's name in ComfyUI's folders, or a path.

    With `fetch`, a published file that is nowhere as it was published is downloaded; `on_bytes` is told name, done and
    total. Raises ModelFileMissing, saying where it looked, FluxsplitError for a path to what is no weight file.
    """
    if wanted in ("2", "4"):
        return _by_number(int(wanted), comfyui, fetch, on_bytes)
    path = Path(wanted).expanduser()
    if path.is_file():
        check_container(path)  # before anything is made that is to be enlarged
        return Chosen(absolute(path), 0, known(path.name))
    published = known(wanted)
    names = (published.file,) if published else (wanted, *(wanted + suffix for suffix in SUFFIXES))
    found = find(names, comfyui)
    if found is not None and not (fetch and published and file_sha256(found) != published.sha256):
        return Chosen(absolute(found), 0, published)
    if published and fetch:
        return Chosen(str(_fetched(published, on_bytes)), 0, published)
    raise _missing(wanted, comfyui, published)


def _by_number(number: int, comfyui: Path | None, fetch: bool, on_bytes: Callable[[str, int, int], None]) -> Chosen:
    candidates = [known(short) for short in _BY_NUMBER[number]]
    for published in candidates:
        assert published is not None
        found = find((published.file,), comfyui)
        if found is not None and not (fetch and file_sha256(found) != published.sha256):
            note = f"no {number}x weights found: {found.name}, then halved" if published.scale > number else ""
            return Chosen(absolute(found), number, published, note)
    best = candidates[0]
    assert best is not None
    if fetch:
        return Chosen(str(_fetched(best, on_bytes)), number, best)
    if number == 2 and PACKAGED.is_file():
        note = (
            "no Real-ESRGAN weights found: using the small upscaler in this package, made for drawings of flat shapes; "
            f"--fetch gets {best.file} ({best.size_bytes / 1e6:.0f} MB)"
        )
        return Chosen(absolute(PACKAGED), number, None, note)
    raise _missing(str(number), comfyui, best)


def known(name: str) -> Published | None:
    """The published file of that name, with or without its ending, or short name."""
    low = name.lower()
    for published in PUBLISHED:
        if low in (published.file.lower(), published.file.lower().removesuffix(".pth"), published.short):
            return published
    return None


def folders(comfyui: Path | None) -> list[Path]:
    """Where upscalers are looked for: what was fetched before, then ComfyUI's folders."""
    return [own_folder(), *places.comfyui_folders(comfyui, "upscaler")]


def own_folder() -> Path:
    """Where `--fetch` puts what it gets."""
    return cache_folder() / "models" / "upscale_models"


def find(names: tuple[str, ...], comfyui: Path | None) -> Path | None:
    """The first file of one of the names in the folders, or in a repository of the Hugging Face cache."""
    low = [name.lower() for name in names]
    for folder in folders(comfyui):
        for file in places.weight_files(folder, suffixes=SUFFIXES) if folder.is_dir() else ():
            if file.name.lower() in low:
                return file
    hub = places.hugging_face_hub(os.environ)
    for name in names if hub.is_dir() else ():
        if not set(name) & set("/\\*?[]"):
            for file in sorted(hub.glob(f"models--*/snapshots/*/{name}")):
                return file
    return None


def _fetched(published: Published, on_bytes: Callable[[str, int, int], None]) -> Path:
    target = own_folder() / published.file
    return download(
        published.url,
        target,
        published.size_bytes,
        published.sha256,
        lambda done: on_bytes(published.file, done, published.size_bytes),
    )


def _missing(wanted: str, comfyui: Path | None, published: Published | None) -> ModelFileMissing:
    looked = ", ".join(map(str, folders(comfyui)))
    names = ", ".join(item.short for item in PUBLISHED)
    hint = f"name a .pth or .safetensors file, 2, 4, or one of {names}"
    if published:
        hint = f"--fetch downloads {published.file} ({published.size_bytes / 1e6:.0f} MB) from {published.url}"
    return ModelFileMissing(f"upscaler {wanted}: no such file, and none of that name in {looked}", hint)
