"""Captioned scenes of coloured shapes, drawn on the fly with exact ground truth.

A scene is a pure function of (seed, index); its geometry is in units of a canvas of 64 x 64 px (x to the right,
y down) and a picture of any resolution is the same scene, scaled. Pairs of colour and shape with
(colour + shape) % 8 == 3 are held out of training: what a model makes of them measures composition.
"""

import dataclasses
import hashlib
import operator
import re
from typing import Any, Literal

import numpy as np

from ldm_jax.config import UserError

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 180),
    "orange": (245, 130, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "gray": (128, 128, 128),
    "pink": (250, 190, 200),
    "cyan": (150, 220, 230),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "ring", "cross")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
NUM_CLASSES = len(COLORS) * len(SHAPES)
CANVAS = 64

Pairs = Literal["seen", "held_out", "all"]

_COLOR_NAMES, _BACKGROUND_NAMES = tuple(COLORS), tuple(BACKGROUNDS)
_COLOR_RGB = np.array(list(COLORS.values()), np.float32)
_BACKGROUND_RGB = np.array(list(BACKGROUNDS.values()), np.uint8)
_SUPERSAMPLE = 4
# x0, y0, x1, y1 of each shape, in radii from its centre.
_EXTENTS = np.array([[-1, -1, 1, 1], [-0.9, -0.9, 0.9, 0.9], [-1.05, -1, 1.05, 0.8], [-1, -1, 1, 1], [-1, -1, 1, 1]], np.float32)


def held_out(color: int, shape: int) -> bool:
    """True for the pairs of colour and shape that never occur in training."""
    return (color + shape) % 8 == 3


@dataclasses.dataclass(frozen=True)
class Object:
    """One object; `color` and `shape` index COLORS and SHAPES; centre and radius in px of a canvas of 64."""

    color: int
    shape: int
    x: float
    y: float
    radius: float

    @property
    def label(self) -> int:
        """The class, in [0, NUM_CLASSES)."""
        return self.color * len(SHAPES) + self.shape


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a caption says: `objects` are (color, shape); `relation`, of the first to the second, only where stated."""

    background: int
    objects: tuple[tuple[int, int], ...]
    relation: int | None = None

    @property
    def held_out(self) -> bool:
        """True if any object is of a held-out pair."""
        return any(held_out(*pair) for pair in self.objects)

    def caption(self) -> str:
        """The caption in English; `parse_caption` reads it back."""
        names = [_with_article(f"{_COLOR_NAMES[color]} {SHAPES[shape]}") for color, shape in self.objects]
        if self.relation is not None:
            what = f"{names[0]} {RELATIONS[self.relation]} {names[1]}"
        elif len(names) > 1:
            what = f"{', '.join(names[:-1])} and {names[-1]}"
        else:
            what = names[0]
        return f"{what} on {_with_article(_BACKGROUND_NAMES[self.background])} background"


@dataclasses.dataclass(frozen=True)
class Scene:
    """A background (index into BACKGROUNDS) and its objects, in the order in which the caption names them."""

    background: int
    objects: tuple[Object, ...]

    def spec(self) -> Spec:
        """What the caption says of this scene."""
        relation = None
        if len(self.objects) == 2:
            first, second = self.objects
            relation = relation_between((first.x, first.y), (second.x, second.y))
        return Spec(self.background, tuple((o.color, o.shape) for o in self.objects), relation)

    def caption(self) -> str:
        """The caption, such as "a red circle left of a blue square on a pink background"."""
        return self.spec().caption()

    def label(self) -> int:
        """The class of the object of largest radius."""
        return max(self.objects, key=lambda o: o.radius).label


def relation_between(first: tuple[float, float], second: tuple[float, float]) -> int:
    """The index into RELATIONS that holds of two centres (x, y), by the larger of the two differences."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    if abs(dx) >= abs(dy):
        return 0 if dx > 0 else 1
    return 2 if dy > 0 else 3


def sample_scene(seed: int, index: int, counts: tuple[int, ...] = (1, 2, 3), pairs: Pairs = "seen") -> Scene:
    """The scene at `index` (>= 0) of the stream `seed` (>= 0).

    The number of objects is uniform over `counts`; a repeated count weighs more. `pairs`: "seen" has no held-out pair,
    "held_out" at least one, "all" any.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))
    count = counts[int(rng.random() * len(counts))]
    background = int(rng.random() * len(BACKGROUNDS))
    attributes, layout = _sample_pairs(rng, count, pairs), _sample_layout(rng, count)
    return Scene(background, tuple(Object(*pair, *place) for pair, place in zip(attributes, layout, strict=True)))


def _sample_pairs(rng: np.random.Generator, count: int, pairs: Pairs) -> list[tuple[int, int]]:
    """`count` pairs (color, shape) of different colours, uniform over the sets that `pairs` allows."""
    while True:
        colors = rng.random(len(COLORS)).argsort()[:count].tolist()
        shapes = (rng.random(count) * len(SHAPES)).astype(int).tolist()
        drawn = list(zip(colors, shapes, strict=True))
        if pairs == "all" or any(held_out(*pair) for pair in drawn) == (pairs == "held_out"):
            return drawn


def _sample_layout(rng: np.random.Generator, count: int) -> list[list[float]]:
    """[[x, y, radius], ...]: a uniform layout whose objects lie apart and, if two, in a clear relation."""
    first, second = np.triu_indices(count, 1)
    while True:
        u = rng.random((64, count, 3))
        radius = 9 + u[..., 2] * (11 if count == 1 else 4)
        margin = 1.05 * radius + 1
        centers = margin[..., None] + u[..., :2] * (CANVAS - 2 * margin)[..., None]
        delta = np.abs(centers[:, first] - centers[:, second])
        good = (np.hypot(delta[..., 0], delta[..., 1]) >= 1.3 * (radius[:, first] + radius[:, second]) + 1).all(1)
        if count == 2:
            good &= np.abs(delta[:, 0, 0] - delta[:, 0, 1]) >= 8
        if good.any():
            best = int(good.argmax())
            return np.concatenate([centers[best], radius[best, :, None]], 1).tolist()


def inside(shape: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points, in radii from the centre of a shape, lie in it; bool of the broadcast shape of x and y."""
    match SHAPES[shape]:
        case "circle":
            return x * x + y * y <= 1
        case "square":
            return (np.abs(x) <= 0.9) & (np.abs(y) <= 0.9)
        case "triangle":
            return (np.abs(x) <= 1.05 / 1.8 * (y + 1)) & (y <= 0.8)
        case "ring":
            square = x * x + y * y
            return (square <= 1) & (square >= 0.3)
        case _:
            ax, ay = np.abs(x), np.abs(y)
            return ((ax <= 0.33) & (ay <= 1)) | ((ax <= 1) & (ay <= 0.33))


def coverage(item: Object, resolution: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """How much of each pixel an object covers, by 4 x 4 samples.

    Returns the window (rows, columns) of the picture that holds the object and float32 [h, w] in [0, 1] for it.
    """
    scale = resolution / CANVAS
    x0, y0, x1, y1 = (np.array([item.x, item.y] * 2) + _EXTENTS[item.shape] * item.radius) * scale
    left, top = max(int(x0), 0), max(int(y0), 0)
    right, bottom = min(int(np.ceil(x1)), resolution), min(int(np.ceil(y1)), resolution)

    def samples(start: int, stop: int, center: float) -> np.ndarray:
        at = np.arange(start * _SUPERSAMPLE, stop * _SUPERSAMPLE, dtype=np.float32) + 0.5
        return (at / (_SUPERSAMPLE * scale) - center) / item.radius

    hits = inside(item.shape, samples(left, right, item.x)[None], samples(top, bottom, item.y)[:, None]).view(np.uint8)
    rows = hits.reshape(bottom - top, _SUPERSAMPLE, -1).sum(1, dtype=np.uint8)
    total = rows.reshape(bottom - top, -1, _SUPERSAMPLE).sum(2, dtype=np.uint8)
    return (slice(top, bottom), slice(left, right)), total.astype(np.float32) / _SUPERSAMPLE**2


def draw(scene: Scene, resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture, uint8 [resolution, resolution, 3], and its map of classes, uint8 [resolution, resolution]: 1 + class where an object
    covers half a pixel, else 0."""
    image = np.empty((resolution, resolution, 3), np.uint8)
    image[:] = _BACKGROUND_RGB[scene.background]
    labels = np.zeros((resolution, resolution), np.uint8)
    for item in scene.objects:
        window, cover = coverage(item, resolution)
        under = image[window].astype(np.float32)
        image[window] = under + cover[..., None] * (_COLOR_RGB[item.color] - under) + 0.5
        labels[window][cover >= 0.5] = 1 + item.label
    return image, labels


def boxes(scene: Scene) -> np.ndarray:
    """Tight boxes, float32 [n, 5]: class, x0, y0, x1, y1 with coordinates in [0, 1]."""
    corners = [np.array([o.x, o.y, o.x, o.y]) + _EXTENTS[o.shape] * o.radius for o in scene.objects]
    return np.concatenate([[[o.label] for o in scene.objects], np.array(corners) / CANVAS], 1).astype(np.float32)


_OBJECT = re.compile(rf"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})")
_BODY = re.compile(r"(.*) on an? (\w+) background\.?")


def parse_caption(text: str) -> Spec:
    """Reads a caption of this module's form back, whatever its case and spacing.

    "A, B and C" is read for any number of objects; raises ValueError for any other text.
    """
    body = _BODY.fullmatch(" ".join(text.lower().split()))
    if body is None or body[2] not in BACKGROUNDS:
        raise ValueError(f"caption {text!r} does not end in 'on a <{'|'.join(BACKGROUNDS)}> background'")
    relation = next((i for i, name in enumerate(RELATIONS) if f" {name} " in body[1]), None)
    parts = re.split(", | and ", body[1]) if relation is None else body[1].split(f" {RELATIONS[relation]} ")
    matches = [_OBJECT.fullmatch(part) for part in parts]
    if None in matches or (relation is not None and len(parts) != 2):
        raise ValueError(f"caption {text!r}: {body[1]!r} is not a list or a relation of objects such as 'a red circle'")
    objects = tuple((_COLOR_NAMES.index(m[1]), SHAPES.index(m[2])) for m in matches if m)
    return Spec(_BACKGROUND_NAMES.index(body[2]), objects, relation)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclasses.dataclass(frozen=True)
class ShapesSource:
    """Random-access source of `size` scenes: example i is a pure function of (seed, i), its size of `resolution`.

    Raises UserError for settings out of range.
    """

    size: int
    seed: int = 0
    resolution: int = 64
    counts: tuple[int, ...] = (1, 2, 3)
    pairs: Pairs = "seen"

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(self.counts))
        if self.size < 1 or self.resolution < 1 or self.seed < 0:
            raise UserError(f"shapes: size and resolution must be at least 1 and seed at least 0, got {self}")
        if not self.counts or not set(self.counts) <= {1, 2, 3}:
            raise UserError(f"shapes: counts must be one or more of 1, 2, 3, got {self.counts}")
        if self.pairs not in ("seen", "held_out", "all"):
            raise UserError(f"shapes: pairs must be 'seen', 'held_out' or 'all', got {self.pairs!r}")

    def __len__(self) -> int:
        return self.size

    def scene(self, index: int) -> Scene:
        """The scene of an example; raises IndexError outside [0, size)."""
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"example {index} of a source of {self.size}")
        return sample_scene(self.seed, index, self.counts, self.pairs)

    def caption(self, index: int) -> str:
        """The caption of an example, without drawing it."""
        return self.scene(index).caption()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """image uint8 [r,r,3], text, label (of the largest object), boxes float32 [n,5], segmentation uint8 [r,r]."""
        scene = self.scene(index)
        image, segmentation = draw(scene, self.resolution)
        return {
            "image": image,
            "text": scene.caption(),
            "label": scene.label(),
            "boxes": boxes(scene),
            "segmentation": segmentation,
        }

    def fingerprint(self) -> str:
        """Names the content: equal for sources of equal settings, 16 hexadecimal digits."""
        return hashlib.sha256(f"shapes 1 {self!r}".encode()).hexdigest()[:16]
