"""What a file says of how its picture was made, whichever tool wrote it: every field may be missing."""

from __future__ import annotations

from dataclasses import dataclass

from fluxsplit.recipe import Recipe


@dataclass(frozen=True, slots=True)
class FoundRecipe:
    """A recipe as found: None is what the file does not say.

    `sampler` and `scheduler` are named as fluxsplit names them; where that took a guess, `notes` tells.
    """

    tool: str | None = None
    """`fluxsplit`, `ComfyUI`, `Forge`, ...; None where the file holds no recipe that is known."""
    prompt: str | None = None
    negative: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    """Distilled guidance, what Flux dev embeds."""
    cfg: float | None = None
    """True guidance; 1 means that the negative prompt did nothing."""
    sampler: str | None = None
    """One of `recipe.SAMPLERS`."""
    scheduler: str | None = None
    """One of `recipe.SCHEDULERS`, or `custom` where `sigmas` are given."""
    shift: float | None = None
    """mu of the time shift; None also where the model shifts nothing (see `recipe` for our own files)."""
    sigmas: tuple[float, ...] | None = None
    width: int | None = None
    """Pixels that were sampled; an upscaled picture is larger (`picture_width`)."""
    height: int | None = None
    noise_index: int | None = None
    """Item of a ComfyUI batch: the n-th draw of the seed's generator, from 0."""
    model: str | None = None
    """A name for people; it is never opened as a path."""
    model_hash: str | None = None
    """SHA-256, or its first hex digits."""
    denoise: float | None = None
    """Below 1 the picture was made from another one, which the file does not hold."""
    noise_source: str | None = None
    """`cpu` or `gpu`: where the seed's noise was drawn; a seed's noise on a GPU is not that of `sample`."""
    notes: tuple[str, ...] = ()
    """What was assumed, in words."""
    warnings: tuple[str, ...] = ()
    """Why the same settings will not give the same picture, in words."""
    recipe: Recipe | None = None
    """The exact recipe, where fluxsplit wrote the file."""
    container: str = ""
    """`PNG`, `JPEG`, `WebP` or `latent`."""
    picture_width: int | None = None
    """Pixels of the file itself."""
    picture_height: int | None = None


def found_of_recipe(recipe: Recipe) -> FoundRecipe:
    """The fields of a recipe of ours."""
    return FoundRecipe(
        tool="fluxsplit",
        prompt=recipe.prompt,
        negative=recipe.negative,
        seed=recipe.seed,
        steps=recipe.steps,
        guidance=recipe.guidance,
        cfg=recipe.cfg,
        sampler=recipe.sampler,
        scheduler=recipe.scheduler,
        shift=recipe.shift,
        sigmas=recipe.sigmas,
        width=recipe.width,
        height=recipe.height,
        noise_index=recipe.noise_index,
        model=recipe.transformer.name,
        model_hash=recipe.transformer.sha256 or None,
        denoise=1.0,
        noise_source="cpu",
        recipe=recipe,
    )
