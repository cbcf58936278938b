"""What a command that renders is going to do, as `cli_sample` plans it and `dry_run` shows it."""

from __future__ import annotations

from dataclasses import dataclass

from fluxsplit.conditioning_cache import Encoders
from fluxsplit.jobs import ImageJob, ModelFiles


@dataclass(frozen=True, slots=True)
class Plan:
    """What a `sample` command is going to do."""

    files: ModelFiles
    prompts: tuple[str, ...]
    """Texts to encode, negatives among them; none where a conditioning is given."""
    conditionings: tuple[str, ...]
    """One file for each of them: where it is kept, or empty for the folder that is removed at the end."""
    images: tuple[ImageJob, ...]
    """Their conditioning is the text itself where it is still to be encoded."""
    out: str
    format: str
    dtype: str
    device: str
    notes: tuple[str, ...]
    vram: str = "auto"
    peek: bool = False
    """Whether the sample stage draws a linear peek beside each latent."""
    taef1: str = ""
    """The decoder that draws peeks instead, after sampling; empty where there is none or none is wanted."""
    peek_steps: bool = False
    cache: bool = True
    """Whether encoded prompts are taken from the cache and kept there."""
    encoders: Encoders | None = None
    """What encoded the prompts, where a recipe says it; None for the encoders in `files`."""
