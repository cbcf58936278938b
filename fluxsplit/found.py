"""Recipes of any tool, found in pictures and latents: containers told by content, one reader for each tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from fluxsplit import exif
from fluxsplit.alpha_text import hidden_text
from fluxsplit.errors import FluxsplitError
from fluxsplit.found_a1111 import read_a1111
from fluxsplit.found_comfy import read_comfy, with_picture_size
from fluxsplit.found_others import (
    read_draw_things,
    read_fooocus,
    read_invokeai,
    read_mflux,
    read_novelai,
    read_swarmui,
    texts_in,
)
from fluxsplit.found_recipe import FoundRecipe, found_of_recipe
from fluxsplit.latents import SUFFIXES, read_latents
from fluxsplit.metadata import PARAMETERS_KEY, RECORD_KEY, record_from_json
from fluxsplit.picture_text import PictureText, first_bytes, picture_kind, read_picture_text
from fluxsplit.recipe import VAE_FACTOR
from fluxsplit.torch_file import ZIP_MAGIC
from fluxsplit.xmp import xmp_text

__all__ = ["FoundRecipe", "found_in", "read_found"]

_COMMENT_READERS: tuple[Callable[[str], FoundRecipe], ...] = (
    read_swarmui,
    read_mflux,
    read_draw_things,
    read_fooocus,
    read_a1111,
)
"""For a text of which only the place is known: each reader takes its own and leaves the rest."""


def read_found(path: str | Path) -> FoundRecipe:
    """What the picture or latent at `path` says of how it was made; `tool` is None where it says nothing.

    Raises UsageError where there is no such file, and FluxsplitError where it is damaged, hostile, or neither a
    picture nor a latent.
    """
    path = Path(path)
    start = first_bytes(path)
    if picture_kind(start):
        return found_in(read_picture_text(path), path)
    if not start.startswith(ZIP_MAGIC) and start[8:9] != b"{" and path.suffix.lower() not in SUFFIXES.values():
        raise FluxsplitError(f"{path.name} is no picture that is known, and no latent", "PNG, JPEG and WebP are known")
    return _in_latent(path)


def found_in(picture: PictureText, path: Path) -> FoundRecipe:
    """The recipe in a picture's texts, else in its alpha channel; raises FluxsplitError where our record is damaged."""
    found = FoundRecipe()
    if RECORD_KEY in picture.texts:
        try:
            record = record_from_json(picture.texts[RECORD_KEY])
        except FluxsplitError as error:
            raise FluxsplitError(f"{path.name} is refused: {error.message}", error.hint) from None
        if record.recipe is not None:
            found = found_of_recipe(record.recipe)
    if found.tool is None:
        found = _foreign(picture)
    if found.tool is None and picture.alpha and (text := hidden_text(path)):
        found = _foreign(replace(picture, texts=texts_in(text)))
    width, height = picture.width, picture.height
    return _with_start_told(replace(found, container=picture.container, picture_width=width, picture_height=height))


def _with_start_told(found: FoundRecipe) -> FoundRecipe:
    """With the size of the file where there is no other, and a warning where not all was drawn from noise."""
    found = with_picture_size(found)
    if found.recipe is not None or found.denoise is None or not 0 < found.denoise < 0.9995:
        return found
    from_another = (
        f"it was drawn with denoise {found.denoise:.3g} from another picture or an earlier pass, "
        "which the file does not hold; its seed alone gives another picture"
    )
    return replace(found, warnings=(*found.warnings, from_another))


def _foreign(picture: PictureText) -> FoundRecipe:
    texts = picture.texts
    candidates: list[Callable[[], FoundRecipe]] = []
    if texts.get("fooocus_scheme") == "fooocus":
        candidates.append(lambda: read_fooocus(texts.get(PARAMETERS_KEY, "")))
    if PARAMETERS_KEY in texts:
        candidates.append(lambda: _comment(_as_utf8(texts[PARAMETERS_KEY])))
    if "invokeai_metadata" in texts:
        candidates.append(lambda: read_invokeai(texts["invokeai_metadata"]))
    if "Comment" in texts:
        candidates.append(lambda: read_novelai(texts))
    prompt, workflow = _comfy_texts(picture)
    if prompt or workflow:
        candidates.append(lambda: read_comfy(prompt, workflow))
    for text in _loose_texts(picture):
        candidates.append(lambda text=text: _comment(text))  # type: ignore[misc]
    for candidate in candidates:
        found = candidate()
        if found.tool is not None:
            return found
    return FoundRecipe()


def _comment(text: str) -> FoundRecipe:
    for read in _COMMENT_READERS:
        found = read(text)
        if found.tool is not None:
            return found
    return FoundRecipe()


def _as_utf8(text: str) -> str:
    """stable-diffusion.cpp writes UTF-8 into tEXt, which is Latin-1: read back what was meant."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _comfy_texts(picture: PictureText) -> tuple[str, str]:
    """ComfyUI's two graphs: PNG texts, or `prompt:{…}` and `workflow:{…}` in two EXIF tags of a WebP."""
    prompt, workflow = picture.texts.get("prompt", ""), picture.texts.get("workflow", "")
    for tag in (exif.MODEL, exif.MAKE, exif.IMAGE_DESCRIPTION):
        key, colon, value = exif.plain_text(picture.exif.get(tag, b"")).partition(":")
        if colon and value.lstrip().startswith("{"):
            prompt = value if key.lower() == "prompt" and not prompt else prompt
            workflow = value if key.lower() == "workflow" and not workflow else workflow
    return prompt, workflow


def _loose_texts(picture: PictureText) -> list[str]:
    """Texts whose place does not tell their writer, most likely first."""
    texts = []
    if comment := picture.exif.get(exif.USER_COMMENT):
        texts.append(exif.comment_text(comment))
    texts += [xmp_text(picture.xmp, name) for name in ("sdcpp:parameters", "exif:UserComment")]
    key, zero, text = picture.comment.partition("\0")
    texts.append(text.rstrip("\0") if zero and key == PARAMETERS_KEY else picture.comment)
    texts += [exif.plain_text(picture.exif.get(tag, b"")) for tag in (exif.IMAGE_DESCRIPTION, exif.MODEL)]
    return [text for text in texts if text]


def _in_latent(path: Path) -> FoundRecipe:
    """Of a batch, what its pictures have in common: the first one's noise index stands for all."""
    first = read_latents(path)[0]
    found = found_of_recipe(first.recipe) if first.recipe is not None else _comfy_latent(first.foreign)
    height, width = (side * VAE_FACTOR for side in first.shape[2:])
    return _with_start_told(replace(found, container="latent", picture_width=width, picture_height=height))


def _comfy_latent(foreign: Mapping[str, str]) -> FoundRecipe:
    return read_comfy(foreign.get("prompt", ""), foreign.get("workflow", ""))
