"""Random holes for inpainting: strokes and boxes as in LaMa (Suvorov et al., arXiv 2109.07161), and bands for outpainting.

A hole is drawn as a figure in the plane and then read at the centres of pixels, so that what a generator draws is the same at any
resolution.
"""

import dataclasses

import numpy as np

REFERENCE = 256
"""Lengths in this file are in pixels of a picture whose short side has this many, and scale with the picture."""

TRIES = 20
"""Figures that are drawn at most until one has a share within the bounds."""


@dataclasses.dataclass(frozen=True)
class Strokes:
    """Polygonal chains of thick lines with rounded ends and joints; each range holds its ends.

    Attributes:
        count: chains.
        width: of a line, pixels of `REFERENCE`; at least one pixel of the picture.
        length: of a line, pixels of `REFERENCE`.
        lines: of a chain.
    """

    count: tuple[int, int]
    width: tuple[float, float]
    length: tuple[float, float]
    lines: tuple[int, int] = (1, 5)

    def draw(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """The union of the chains, bool [height, width]. A chain begins anywhere, turns anywhere and stops at the border."""
        scale, border = _scale(height, width), np.array([width, height], np.float64)
        hole = np.zeros((height, width), bool)
        for _ in range(rng.integers(*self.count, endpoint=True)):
            start = rng.random(2) * border
            for _ in range(rng.integers(*self.lines, endpoint=True)):
                angle = rng.uniform(0, 2 * np.pi)
                step = scale * rng.uniform(*self.length) * np.array([np.cos(angle), np.sin(angle)])
                end = np.clip(start + step, 0, border)
                _draw_line(hole, start, end, radius=max(scale * rng.uniform(*self.width), 1) / 2)
                start = end
        return hole


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Rectangles that may overlap; each range holds its ends.

    Attributes:
        count: rectangles.
        side: of a rectangle, each direction on its own, pixels of `REFERENCE`; at most what the margin leaves.
        margin: pixels of `REFERENCE` between a rectangle and the border.
    """

    count: tuple[int, int]
    side: tuple[float, float]
    margin: float = 0

    def draw(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """The union of the rectangles, bool [height, width]."""
        scale, border = _scale(height, width), np.array([width, height], np.float64)
        hole = np.zeros((height, width), bool)
        for _ in range(rng.integers(*self.count, endpoint=True)):
            room = border - 2 * scale * self.margin
            size = np.minimum(scale * rng.uniform(*self.side, 2), room)
            corner = scale * self.margin + rng.random(2) * (room - size)
            (left, top), (right, bottom) = _pixels(corner), _pixels(corner + size)
            hole[top:bottom, left:right] = True
        return hole


@dataclasses.dataclass(frozen=True)
class Bands:
    """Bands along sides of the picture, which is to be continued there; each range holds its ends.

    Attributes:
        count: sides, of four.
        depth: of a band, in shares of the picture across it.
    """

    count: tuple[int, int]
    depth: tuple[float, float]

    def draw(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        """The union of the bands, bool [height, width]."""
        hole = np.zeros((height, width), bool)
        for side in rng.permutation(4)[: rng.integers(*self.count, endpoint=True)]:
            turned = np.rot90(hole, side)  # a view whose upper side is the one to cover
            turned[: _pixels(rng.uniform(*self.depth) * turned.shape[0])] = True
        return hole


@dataclasses.dataclass(frozen=True)
class HoleSettings:
    """What holes are made of.

    Attributes:
        figures: (weight, figure) pairs, of which each hole has one, drawn by weight.
        min_share: least share of the picture in the hole.
        max_share: greatest share of the picture in the hole.
    """

    figures: tuple[tuple[float, Strokes | Boxes | Bands], ...]
    min_share: float = 0.01
    max_share: float = 0.5


# Numbers and weights of LaMa's published masks at 256 pixels (random_thin_256, random_medium_256 and random_thick_256), at most half of
# the picture as there. Its lines take one of a few directions each; here every direction is as likely.
_WIDE_BOXES = Boxes(count=(1, 3), side=(30, 150), margin=10)
HOLES: dict[str, HoleSettings] = {
    "thin": HoleSettings(((1.0, Strokes(count=(4, 50), width=(5, 15), length=(10, 50))),)),
    "medium": HoleSettings(
        ((1.0, Strokes(count=(4, 5), width=(5, 55), length=(10, 110))), (0.3, Boxes(count=(1, 5), side=(10, 50)))),
    ),
    "wide": HoleSettings(((1.0, Strokes(count=(1, 5), width=(5, 105), length=(10, 210))), (0.3, _WIDE_BOXES))),
    "boxes": HoleSettings(((1.0, _WIDE_BOXES),)),
    "half": HoleSettings(((1.0, Bands(count=(1, 1), depth=(0.5, 0.5))),), max_share=0.6),
    "outpaint": HoleSettings(((1.0, Bands(count=(1, 4), depth=(0.1, 0.4))),), max_share=0.8),
}
"""Kinds of holes by name."""


def draw_hole(rng: np.random.Generator, height: int, width: int, settings: HoleSettings) -> np.ndarray:
    """A random hole in a picture.

    Figures are drawn until one covers a share of the picture within the bounds; where none of `TRIES` does, the one whose share is
    nearest to them is taken.

    Args:
        rng: which alone decides what is drawn.
        height: of the picture, pixels.
        width: of the picture, pixels.
        settings: such as one of `HOLES`.

    Returns:
        bool [height, width], True in the hole; some pixels are, and some are not.

    Raises:
        ValueError: a picture of a single pixel, which has no part to fill in and another to keep.
    """
    if height * width < 2:
        raise ValueError(f"a picture of {width} x {height} pixels has no room for a hole")
    weights = np.array([weight for weight, _ in settings.figures])
    # Where every figure covers nothing or everything, as in a picture of very few pixels, its first half is the hole.
    best, distance = np.arange(height * width).reshape(height, width) < height * width // 2, np.inf
    for _ in range(TRIES):
        _, figure = settings.figures[rng.choice(len(weights), p=weights / weights.sum())]
        hole = figure.draw(rng, height, width)
        share = hole.mean()
        outside = max(settings.min_share - share, share - settings.max_share, 0.0)
        if 0 < share < 1 and outside < distance:
            best, distance = hole, outside
        if distance == 0:
            break
    return best


def _scale(height: int, width: int) -> float:
    return min(height, width) / REFERENCE


def _pixels(at: np.ndarray | float) -> np.ndarray:
    """How many pixels of a line have their centres before these places; a span between two places holds the pixels between."""
    return np.ceil(np.asarray(at) - 0.5).astype(int)


def _draw_line(hole: np.ndarray, start: np.ndarray, end: np.ndarray, radius: float) -> None:
    """Sets the pixels, in place, whose centres are within a radius of the line between two points (x, y), in pixels."""
    left, top = _pixels(np.minimum(start, end) - radius).clip(0)
    right, bottom = _pixels(np.maximum(start, end) + radius) + 1
    part = hole[top:bottom, left:right]
    x = np.arange(left, left + part.shape[1]) + 0.5 - start[0]
    y = np.arange(top, top + part.shape[0])[:, None] + 0.5 - start[1]
    dx, dy = end - start
    along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, np.finfo(float).tiny), 0, 1)
    part |= (x - along * dx) ** 2 + (y - along * dy) ** 2 <= radius**2
