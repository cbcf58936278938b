"""What the pictures of one command come to, for the memory plan: sizes, tokens, and how many texts and steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluxsplit.conditioning_header import length_of
from fluxsplit.jobs import ImageJob

PREPARED_TOGETHER = 4
"""Pictures whose modulations are computed in one pass over the matrices, where fewer advance together."""
MIN_TEXT_TOKENS = 256
"""ComfyUI pads to 256 for dev and schnell alike."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be computed: the pictures of one command."""

    sizes: tuple[tuple[int, int], ...]
    """Width and height in pixels of each picture, one entry each."""
    text_tokens: int
    forwards: int = 1
    """For each picture and prediction: 2 with true guidance."""
    times: int = 1
    """Embeddings of time, guidance and text that a picture has, whose modulations are kept from before its first step:
    its steps, for each of its texts."""
    texts: int = 1
    """Different texts of the command; pictures of one share their modulations."""


def work_of(images: Sequence[ImageJob], steps: int) -> Work:
    """The work of these pictures; `steps` is what the model takes where a picture does not say."""
    names = [image.conditioning for image in images]
    negatives = {image.negative_conditioning for image in images} - {""}
    forwards = 2 if any(image.cfg != 1 for image in images) else 1
    return Work(
        sizes=tuple((image.width, image.height) for image in images),
        text_tokens=max(map(text_tokens, {*names, *negatives})),
        forwards=forwards,
        times=forwards * max(_steps(image) or steps for image in images),
        texts=len(set(names)),
    )


def _steps(image: ImageJob) -> int:
    levels = image.recorded_sigmas or image.sigmas
    return len(levels) - 1 if levels else image.steps or 0


def text_tokens(conditioning: str) -> int:
    """Of a conditioning file; where it cannot be read, which is reported when its picture is made, and where there is
    none yet, as many as T5's shortest text is padded to."""
    return (length_of(conditioning) if conditioning else None) or MIN_TEXT_TOKENS


def tokens_of(width: int, height: int, text_tokens: int) -> int:
    """Image and text tokens of a picture."""
    return -(-width // 16) * -(-height // 16) + text_tokens
