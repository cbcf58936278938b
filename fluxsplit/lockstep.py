"""One pass over the weights, many pictures: what is streamed is paid for once a step, not once a picture.

In every round each picture that is not finished asks for one prediction. The block that is in memory is applied to
each of them in turn, a batch of one each, so that every picture has the bits that it would have alone; then the next
block comes. Pictures may differ in size, prompt, steps and sampler: those with fewer rounds finish earlier, and one
that fails leaves the others where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from fluxsplit.conditioning import Conditioning
from fluxsplit.errors import FluxsplitError
from fluxsplit.recipe import Recipe
from fluxsplit.sampling import SAMPLE, Ask, Sampling
from fluxsplit.starting_point import StartingPoint
from fluxsplit.transformer import Flux, Forward


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One picture, ready to be sampled."""

    recipe: Recipe
    conditioning: Conditioning
    negative: Conditioning | None
    """For true guidance; None where the recipe's cfg is 1."""
    start: StartingPoint


Steps = dict[int, int]
"""Finished steps of each picture, by its number."""
Ended = tuple[int, torch.Tensor | FluxsplitError]
"""A picture's number and its latent, fp32 [1, 16, h, w] in model space, or why it has none."""


def sample_together(
    flux: Flux,
    pictures: Mapping[int, Picture],
    on_round: Callable[[Steps], None],
    on_clean: Callable[[int, int, torch.Tensor], None] | None = None,
) -> Iterator[Ended]:
    """Sample pictures in lockstep, yielding each as it ends; `on_round` is told how far they are after each pass.

    `on_clean` is told a picture's number, its finished steps, and the latent that it expects at its end.
    """
    paths = {n: SAMPLE[p.recipe.sampler](p.start.latents, p.recipe.sigmas) for n, p in pictures.items()}
    asked = {number: next(path) for number, path in paths.items()}
    steps = dict.fromkeys(pictures, 0)
    while asked:
        ended: list[Ended] = []
        for number, answer in _predict(flux, pictures, asked).items():
            if on_clean is not None and isinstance(answer, torch.Tensor):
                on_clean(number, steps[number] + 1, answer)
            outcome = answer if isinstance(answer, FluxsplitError) else _advance(paths[number], answer)
            if isinstance(outcome, Ask):
                asked[number], steps[number] = outcome, outcome.step
            else:
                del asked[number]
                steps[number] = pictures[number].recipe.steps
                ended.append((number, outcome))
        on_round(steps)
        yield from ended


def _advance(path: Sampling, clean: torch.Tensor) -> Ask | torch.Tensor:
    """What the picture asks next, or its latent."""
    try:
        return path.send(clean)
    except StopIteration as end:
        latents: torch.Tensor = end.value
        return latents


def _predict(
    flux: Flux, pictures: Mapping[int, Picture], asked: Mapping[int, Ask]
) -> dict[int, torch.Tensor | FluxsplitError]:
    """The clean latent of everything that is asked, in one pass over the weights."""
    forwards = {number: _forwards(pictures[number], ask) for number, ask in asked.items()}
    velocities = iter(flux.velocities([forward for several in forwards.values() for forward in several]))
    answers: dict[int, torch.Tensor | FluxsplitError] = {}
    for number, ask in asked.items():
        picture = pictures[number]
        velocity = next(velocities)
        if picture.negative is not None:  # true guidance (Ho & Salimans, arXiv 2207.12598)
            unwanted = next(velocities)
            velocity = unwanted + picture.recipe.cfg * (velocity - unwanted)
        answers[number] = _clean(flux, picture, ask, velocity, forwards[number])
    return answers


def _forwards(picture: Picture, ask: Ask) -> list[Forward]:
    texts = [text for text in (picture.conditioning, picture.negative) if text is not None]
    return [Forward(ask.x, ask.sigma, text, picture.recipe.guidance) for text in texts]


def _clean(
    flux: Flux, picture: Picture, ask: Ask, velocity: torch.Tensor, forwards: list[Forward]
) -> torch.Tensor | FluxsplitError:
    if not bool(velocity.isfinite().all()):
        return _not_finite(flux, picture.recipe, ask, forwards)
    clean = ask.x - ask.sigma * velocity.to(ask.x.device)
    return clean if picture.start.guide is None else picture.start.guide(clean, ask.sigma)


def _not_finite(flux: Flux, recipe: Recipe, ask: Ask, forwards: list[Forward]) -> FluxsplitError:
    """Where it began, found by computing the step once more and looking at each block."""
    places = [place for forward in forwards if (place := flux.first_nonfinite(forward))]
    where = places[0] if places else "true guidance"
    hint = {"fp16": "try --dtype bf16 or fp32", "bf16": "try --dtype fp32"}.get(
        recipe.dtype, "the weights or the conditioning are damaged"
    )
    return FluxsplitError(
        f"step {ask.step + 1} of {recipe.steps} gave NaN or infinity in {recipe.dtype}, first in {where}", hint
    )
