"""Prompts for scenes of shapes: a small grammar with synonyms and several sentence forms.

Every word carries the slot it speaks about (0 none, 1 and 2 the objects, 3 the background,
4 the relation): the text encoders are taught to tell these apart before any picture is drawn.
"""

from __future__ import annotations

import numpy as np

from shapes import RELATIONS, Scene, Thing

Tagged = list[tuple[str, int]]

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("red", "red", "red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink",),
    "black": ("black",),
    "white": ("white",),
    "gray": ("gray", "grey"),
}
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "circle", "disc", "dot", "ball"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "ring", "donut"),
    "cross": ("cross", "cross", "plus"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium",),
    "large": ("large", "large", "big", "huge"),
}
PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "top left": ("in the top left", "in the top left corner"),
    "top right": ("in the top right", "in the top right corner"),
    "bottom left": ("in the bottom left", "in the bottom left corner"),
    "bottom right": ("in the bottom right", "in the bottom right corner"),
}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "above": ("above", "above", "over", "on top of"),
    "below": ("below", "below", "under", "beneath"),
    "left": ("to the left of", "left of", "to the left of"),
    "right": ("to the right of", "right of", "to the right of"),
}
PREFIXES = ("a picture of", "an image of", "a drawing of", "a painting of", "a photo of")
OTHER_WORDS = tuple("a an the and next beside with on against background , . on of to is there".split())  # noqa: SIM905


def vocabulary() -> list[str]:
    """Every word the grammar can produce, sorted."""
    tables = (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, PLACE_WORDS, RELATION_WORDS)
    phrases = [phrase for table in tables for words in table.values() for phrase in words]
    words = {word for phrase in (*phrases, *PREFIXES) for word in phrase.split()}
    return sorted(words | set(OTHER_WORDS))


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _tag(text: str, slot: int) -> Tagged:
    return [(word, slot) for word in text.split()]


def _object(rng: np.random.Generator, thing: Thing, slot: int) -> Tagged:
    words = []
    if thing.size != "medium" or rng.random() < 0.3:
        words.append(_pick(rng, SIZE_WORDS[thing.size]))
    words.append(_pick(rng, COLOUR_WORDS[thing.colour]))
    words.append(_pick(rng, SHAPE_WORDS[thing.shape]))
    if rng.random() < 0.9:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    tagged = _tag(" ".join(words), slot)
    if thing.place:
        tagged += _tag(_pick(rng, PLACE_WORDS[thing.place]), slot)
    return tagged


def _things(rng: np.random.Generator, scene: Scene) -> Tagged:
    first = _object(rng, scene.things[0], 1)
    if len(scene.things) == 1:
        return first
    if scene.relation == "left" and rng.random() < 0.2:
        joint = _pick(rng, ("and", "next to", "beside"))  # side by side, in reading order
    else:
        joint = _pick(rng, RELATION_WORDS[scene.relation])
    return first + _tag(joint, 4) + _object(rng, scene.things[1], 2)


def caption(rng: np.random.Generator, scene: Scene) -> Tagged:  # noqa: PLR0911
    """A prompt for the scene, word by word, with the slot of each word."""
    things = _things(rng, scene)
    if rng.random() < 0.08:
        things = _tag(_pick(rng, PREFIXES), 0) + things
    ground = _pick(rng, COLOUR_WORDS[scene.background])
    form = rng.random()
    if scene.background == "white" and form < 0.25:
        return things
    if form < 0.7:
        return things + _tag(f"on a {ground} background".replace("a orange", "an orange"), 3)
    if form < 0.78:
        return things + _tag(f"on {ground}", 3)
    if form < 0.84:
        return things + _tag(f"against a {ground} background", 3)
    if form < 0.9:
        return things + _tag(f", {ground} background", 3)
    if form < 0.95:
        return _tag(f"a {ground} background with", 3) + things
    return _tag(f"{ground} background ,", 3) + things


def to_text(tagged: Tagged) -> str:
    """The prompt as one string."""
    return " ".join(word for word, _ in tagged).replace(" ,", ",")


def relation_names() -> tuple[str, ...]:
    """Relations with "none" first, as the encoders' heads number them."""
    return ("", *RELATIONS)
