"""Scenes of flat coloured shapes: what they hold, how they are drawn, and how a picture is checked.

The demo model learns this small world. A `Scene` says only what a prompt says; `layout` picks the
rest (positions and radii) from a random generator, so that seeds differ while a caption all but
fixes the picture. All lengths are fractions of the shorter side, the origin is the frame's centre:
a scene looks alike at every size and ratio.

The checker works on pixels alone: it takes the background from the border, cuts out what differs
from it, and fits each outline with every shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Array = npt.NDArray[Any]  # float32 or float64
Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 40),
    "green": (30, 165, 70),
    "blue": (40, 80, 225),
    "purple": (130, 45, 175),
    "pink": (250, 130, 190),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = tuple(name for name in PALETTE if name != "gray")
BACKGROUNDS = ("white", "black", "gray", "yellow", "blue", "green", "pink")
SIZES = ("small", "medium", "large")
RELATIONS = ("above", "below", "left", "right")
PLACES: dict[str, tuple[int, int]] = {
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "top left": (-1, -1),
    "top right": (1, -1),
    "bottom left": (-1, 1),
    "bottom right": (1, 1),
}
DIRECTIONS = {"above": (0, -1), "below": (0, 1), "left": (-1, 0), "right": (1, 0)}

SINGLE_RADIUS = {"small": 0.14, "medium": 0.2, "large": 0.28}
PAIR_RADIUS = {"small": 0.13, "medium": 0.165, "large": 0.205}
EXTENT = 1.06  # how far a shape reaches beyond its nominal radius
MARGIN = 0.02
MIN_CONTRAST = 105.0  # RGB distance below which a colour is not used on a background
FIT_IOU = 0.7  # an outline that fits no shape this well is no shape


@dataclass(frozen=True, slots=True)
class Thing:
    """One object as a prompt names it; `place` is empty when not stated."""

    shape: str
    colour: str
    size: str = "medium"
    place: str = ""


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two things on a background; `relation` is where the first lies, seen from the second."""

    background: str
    things: tuple[Thing, ...]
    relation: str = ""


@dataclass(frozen=True, slots=True)
class Placed:
    """A thing with its centre and radius, in shorter sides from the frame's centre."""

    thing: Thing
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Found:
    """One object found in a picture."""

    shape: str
    colour: str
    x: float
    y: float
    area: float
    fit: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What of a scene a picture shows; per-object tuples follow the scene's order."""

    background: bool
    colours: tuple[bool, ...]
    shapes: tuple[bool, ...]
    relation: bool | None
    place: bool | None
    count: int
    expected: int

    @property
    def duplicated(self) -> bool:
        """Whether there are more objects than asked for."""
        return self.count > self.expected

    @property
    def right(self) -> bool:
        """Whether everything the prompt says is there."""
        parts = (self.background, *self.colours, *self.shapes, self.count == self.expected)
        return all(parts) and self.relation is not False and self.place is not False


# -- which scenes exist, and which are held out ------------------------------------------------


def contrast(colour: str, background: str) -> float:
    """RGB distance of two palette colours."""
    return math.dist(PALETTE[colour], PALETTE[background])


def allowed(colour: str, background: str) -> bool:
    """Whether an object of this colour can be seen on this background."""
    return contrast(colour, background) >= MIN_CONTRAST


def held_out(colour: str, shape: str, background: str) -> bool:
    """Whether this combination, one in ten, is kept out of training."""
    key = COLOURS.index(colour) * 3 + SHAPES.index(shape) * 7 + BACKGROUNDS.index(background)
    return key % 10 == 4


def is_test_scene(scene: Scene) -> bool:
    """Whether any object of the scene is a held-out combination."""
    return any(held_out(t.colour, t.shape, scene.background) for t in scene.things)


def _random_thing(rng: np.random.Generator, background: str) -> Thing:
    colours = [c for c in COLOURS if allowed(c, background)]
    size = str(rng.choice(SIZES, p=(0.27, 0.46, 0.27)))
    return Thing(str(rng.choice(SHAPES)), str(rng.choice(colours)), size)


def random_scene(rng: np.random.Generator, things: int, test: bool = False) -> Scene:
    """A random scene of one or two things, from the training or the held-out split."""
    while True:
        weights = (0.28, *([0.12] * 6))
        background = str(rng.choice(BACKGROUNDS, p=weights))
        chosen = tuple(_random_thing(rng, background) for _ in range(things))
        relation = str(rng.choice(RELATIONS)) if things == 2 else ""
        if things == 1 and rng.random() < 0.45:
            place = str(rng.choice(tuple(PLACES)))
            chosen = (Thing(chosen[0].shape, chosen[0].colour, chosen[0].size, place),)
        if things == 2 and chosen[0].colour == chosen[1].colour and rng.random() < 0.7:
            continue
        scene = Scene(background, chosen, relation)
        if is_test_scene(scene) == test:
            return scene


def _clamp(value: float, half_frame: float, radius: float) -> float:
    room = max(half_frame - MARGIN - EXTENT * radius, 0.0)
    return min(max(value, -room), room)


def _layout_single(scene: Scene, rng: np.random.Generator, width: float, height: float) -> list[Placed]:
    thing = scene.things[0]
    radius = SINGLE_RADIUS[thing.size] * rng.uniform(0.96, 1.04)
    spread = 0.04 if thing.place else 0.07
    column, row = PLACES[thing.place or "center"]
    x = column * 0.27 * width + rng.uniform(-spread, spread)
    y = row * 0.27 * height + rng.uniform(-spread, spread)
    x, y = _clamp(x, width / 2, radius), _clamp(y, height / 2, radius)
    return [Placed(thing, x, y, radius)]


def layout(scene: Scene, rng: np.random.Generator, width: float, height: float) -> list[Placed]:
    """Positions and radii for a frame of `width` x `height` shorter sides."""
    if len(scene.things) == 1:
        return _layout_single(scene, rng, width, height)
    radii = [PAIR_RADIUS[t.size] * rng.uniform(0.97, 1.03) for t in scene.things]
    dx, dy = DIRECTIONS[scene.relation]
    along = width if dx else height
    across = height if dx else width
    reach = EXTENT * sum(radii)
    gap = min(rng.uniform(0.09, 0.12), along - 2 * MARGIN - 2 * reach)
    room = along / 2 - MARGIN - reach - gap / 2
    middle = rng.uniform(-1, 1) * min(room, 0.04)
    offset = rng.uniform(-0.04, 0.04)
    placed = []
    # The first lies towards `relation`; edges, not centres, are what the gap separates.
    starts = (gap / 2 + EXTENT * radii[0], -(gap / 2 + EXTENT * radii[1]))
    shift = EXTENT * (radii[1] - radii[0])  # keeps the two, taken together, in the middle
    for thing, radius, start in zip(scene.things, radii, starts, strict=True):
        position = (start + shift) * (dx + dy) + middle
        side = _clamp(offset + rng.uniform(-0.02, 0.02), across / 2, radius)
        x, y = (position, side) if dx else (side, position)
        placed.append(Placed(thing, x, y, radius))
    return placed


# -- drawing -----------------------------------------------------------------------------------


def _star_distance(x: Array, y: Array, radius: float) -> Array:
    """Distance to a five-pointed star: fold the plane into one half spike, then one edge."""
    sector = math.pi / 5
    angle = np.arctan2(x, -y)
    folded = np.abs((angle + sector) % (2 * sector) - sector)
    length = np.hypot(x, y)
    px, py = length * np.cos(folded), length * np.sin(folded)
    inner = 0.46 * radius
    qx, qy = inner * math.cos(sector), inner * math.sin(sector)
    ex, ey = qx - radius, qy
    norm = math.hypot(ex, ey)
    return np.asarray((ey * (px - radius) - ex * py) / norm, np.float32)


def distance(shape: str, x: Array, y: Array, radius: float) -> Array:
    """Signed distance (negative inside) of points to a shape around the origin."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.88 * radius
    if shape == "triangle":
        below = y - 0.3 * radius  # from the centroid; this centres the bounding box
        slope = math.sqrt(3) / 2 * np.abs(x) - 0.5 * below
        return np.maximum(slope, below) - 0.6 * radius
    if shape == "star":
        return _star_distance(x, y - 0.08 * radius, 1.18 * radius)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.77 * radius) - 0.27 * radius
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        long, short = np.maximum(ax, ay), np.minimum(ax, ay)
        return np.maximum(long - 1.04 * radius, short - 0.35 * radius)
    raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")


def draw(placed: Sequence[Placed], background: str, width_px: int, height_px: int) -> Array:
    """The anti-aliased picture, float32 in -1..1, [H, W, 3]."""
    short = min(width_px, height_px)
    xs = (np.arange(width_px, dtype=np.float32) + 0.5 - width_px / 2) / short
    ys = (np.arange(height_px, dtype=np.float32) + 0.5 - height_px / 2) / short
    image = np.empty((height_px, width_px, 3), np.float32)
    image[:] = np.asarray(PALETTE[background], np.float32) / 127.5 - 1
    for item in placed:
        # Only the box around the object is touched.
        reach = 1.25 * item.radius + 2 / short
        cols = slice(*np.searchsorted(xs, (item.x - reach, item.x + reach)))
        rows = slice(*np.searchsorted(ys, (item.y - reach, item.y + reach)))
        x, y = xs[None, cols] - np.float32(item.x), ys[rows, None] - np.float32(item.y)
        inside = distance(item.thing.shape, x, y, item.radius)
        cover = np.clip(0.5 - inside * short, 0, 1)[..., None]
        colour = np.asarray(PALETTE[item.thing.colour], np.float32) / 127.5 - 1
        image[rows, cols] += cover * (colour - image[rows, cols])
    return image


def picture(scene: Scene, rng: np.random.Generator, width_px: int, height_px: int) -> Array:
    """Lay a scene out and draw it."""
    short = min(width_px, height_px)
    placed = layout(scene, rng, width_px / short, height_px / short)
    return draw(placed, scene.background, width_px, height_px)


def to_pixels(image: Array) -> Pixels:
    """-1..1 floats as 8-bit pixels."""
    return np.asarray(np.clip((image + 1) * 127.5 + 0.5, 0, 255), np.uint8)


# -- checking ----------------------------------------------------------------------------------


def nearest_colour(rgb: Sequence[float], names: Sequence[str] = tuple(PALETTE)) -> str:
    """The palette name nearest to an RGB value."""
    return min(names, key=lambda name: math.dist(PALETTE[name], [float(v) for v in rgb]))


def _unit_grid() -> tuple[Array, Array]:
    line = np.linspace(-1.5, 1.5, 301, dtype=np.float32)
    return line[None, :], line[:, None]


def _unit_moments() -> dict[str, tuple[float, float]]:
    """Area and vertical centroid of every shape at radius 1."""
    x, y = _unit_grid()
    moments = {}
    for shape in SHAPES:
        inside = distance(shape, x, y, 1.0) < 0
        centre = float((np.broadcast_to(y, inside.shape)[inside]).mean())
        moments[shape] = (float(inside.sum()) * 0.01**2, centre)
    return moments


_MOMENTS = _unit_moments()


def fit_shape(mask: Mask) -> tuple[str, float]:
    """The shape whose outline covers a mask best, and the overlap (intersection over union)."""
    rows, cols = np.nonzero(mask)
    area = float(len(rows))
    cy, cx = float(rows.mean()), float(cols.mean())
    y = np.arange(mask.shape[0], dtype=np.float32)[:, None] - cy
    x = np.arange(mask.shape[1], dtype=np.float32)[None, :] - cx
    best = ("", 0.0)
    for shape, (unit_area, unit_y) in _MOMENTS.items():
        radius = math.sqrt(area / unit_area)
        for scale in (0.94, 1.0, 1.06):
            inside = distance(shape, x, y + unit_y * radius, radius * scale) < 0
            union = float((inside | mask).sum())
            overlap = float((inside & mask).sum()) / union
            if overlap > best[1]:
                best = (shape, overlap)
    return best


def find_objects(pixels: Pixels) -> tuple[str, list[Found]]:
    """The background's colour name and the objects on it, largest first."""
    stride = max(min(pixels.shape[:2]) // 192, 1)
    small = pixels[::stride, ::stride].astype(np.float32)
    height, width = small.shape[:2]
    short = min(height, width)
    border = np.concatenate([small[:2].reshape(-1, 3), small[-2:].reshape(-1, 3)])
    border = np.concatenate([border, small[:, :2].reshape(-1, 3), small[:, -2:].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    mask = np.linalg.norm(small - ground, axis=-1) > 55
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    found = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        part = np.pad(labels[box] == index, 4)
        area = float(part.sum()) / short**2
        if area < 0.01:
            continue
        inner = ndimage.binary_erosion(part, iterations=2)
        inner = inner if inner.sum() > 8 else part
        rgb = np.median(small[box][inner[4:-4, 4:-4]], axis=0)
        y = ((box[0].start + box[0].stop) / 2 - height / 2) / short
        x = ((box[1].start + box[1].stop) / 2 - width / 2) / short
        shape, fit = fit_shape(part)
        found.append(Found(shape, nearest_colour(rgb), float(x), float(y), area, fit))
    return nearest_colour(ground), sorted(found, key=lambda item: -item.area)


def _relation_holds(relation: str, first: Found, second: Found) -> bool:
    dx, dy = DIRECTIONS[relation]
    ahead = (first.x - second.x) * dx + (first.y - second.y) * dy
    aside = abs((first.x - second.x) * dy) + abs((first.y - second.y) * dx)
    return ahead > 0.1 and ahead > aside


def _place_holds(place: str, found: Found, width: float, height: float) -> bool:
    column, row = PLACES[place]
    near = (round(found.x / width / 0.2), round(found.y / height / 0.2))
    limited = tuple(max(-1, min(1, value)) for value in near)
    return limited == (column, row)


def check(scene: Scene, pixels: Pixels) -> Verdict:
    """Compare a picture with the scene its prompt describes."""
    background, found = find_objects(pixels)
    expected = len(scene.things)

    def score(item: Found | None, thing: Thing) -> tuple[bool, bool]:
        if item is None:
            return False, False
        return item.colour == thing.colour, item.shape == thing.shape and item.fit >= FIT_IOU

    candidates: list[Found | None] = [*found[:4]]
    candidates += [None] * max(0, expected - len(candidates))
    best = max(
        permutations(candidates, expected),
        key=lambda order: sum(sum(score(item, t)) for item, t in zip(order, scene.things, strict=True)),
    )
    scores = [score(item, t) for item, t in zip(best, scene.things, strict=True)]
    relation: bool | None = None
    place: bool | None = None
    if scene.relation:
        first, second = best
        both = first is not None and second is not None
        relation = both and _relation_holds(scene.relation, first, second)  # type: ignore[arg-type]
    elif scene.things[0].place:
        height, width = (side / min(pixels.shape[:2]) for side in pixels.shape[:2])
        only = best[0]
        place = only is not None and _place_holds(scene.things[0].place, only, width, height)
    colours = tuple(colour for colour, _ in scores)
    shapes = tuple(shape for _, shape in scores)
    right = background == scene.background
    return Verdict(right, colours, shapes, relation, place, len(found), expected)
