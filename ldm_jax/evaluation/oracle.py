"""The prompt oracle: reads a picture of `data.shapes` back without any learned model and holds it against its caption.

Colours are read by linear unmixing: a pixel at the rim of an object, or of a blurred one, is background + a (colour -
background) with a in [0, 1], so rims never look like a third colour. Shapes are read by the overlap (IoU) of a
connected component with templates rendered by the data's own renderer.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from scipy import ndimage

from ldm_jax.data import shapes

METRICS = ("background", "count", "color", "shape", "binding", "relation", "all", "all_with_relation")
# In px of a canvas of 64 (the smallest object drawn covers 153): a component below it is no object.
MIN_AREA = 30
# A component that overlaps its best template by less is of no known shape. Drawn shapes reach 0.8 under a blur of
# 1.5 px and noise of 15/255; half a disc and an ellipse of axes 2 : 1 stay below 0.65.
MIN_IOU = 0.7

_SMOOTHING = 0.8
_COLORS = np.array(list(shapes.COLORS.values()), np.float32)
_BACKGROUNDS = np.array(list(shapes.BACKGROUNDS.values()), np.float32)
# Area in r^2, and how far the centroid lies below the centre in r.
_AREA = {"circle": np.pi, "square": 3.24, "triangle": 1.89, "ring": 0.7 * np.pi, "cross": 8 * 0.33 - 4 * 0.33**2}
_SINK = {"circle": 0.0, "square": 0.0, "triangle": 0.2, "ring": 0.0, "cross": 0.0}


@dataclasses.dataclass(frozen=True)
class Found:
    """An object as read: `shape` is -1 where it looks like none; centre and radius in px and area in px^2 of a canvas of 64.

    `box` is x0, y0, x1, y1 in [0, 1]: that of the shape it looks like, which is finer than a pixel, or of its pixels where it looks like
    none; such a one has the radius of a disc of its area.
    """

    color: int
    shape: int
    x: float
    y: float
    area: float
    radius: float
    box: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Reading:
    """A picture as read: the index of its background and its objects, the largest first."""

    background: int
    objects: tuple[Found, ...]


def read_scene(image: np.ndarray) -> Reading:
    """Reads a square picture, uint8 [H, H, 3], H >= 16; raises ValueError for any other shape or dtype."""
    return read_parts(image)[0]


def read_parts(image: np.ndarray) -> tuple[Reading, np.ndarray]:
    """`read_scene`, and which object of the reading each pixel of the picture belongs to, int [H, H]: its index, or -1 for none."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.shape[0] == image.shape[1] >= 16:
        raise ValueError(f"the oracle reads uint8 [H, H, 3] with H >= 16, not {image.dtype} {list(image.shape)}")
    pixels = image
    if len(pixels) < shapes.CANVAS:
        pixels = ndimage.zoom(pixels, (2, 2, 1), np.float32, order=1, mode="nearest", grid_mode=True)
    while len(pixels) >= 128 and len(pixels) % 2 == 0:
        pixels = np.stack([pixels[i::2, j::2] for i in (0, 1) for j in (0, 1)]).mean(0)
    sigma = _SMOOTHING * len(pixels) / shapes.CANVAS
    smooth = ndimage.gaussian_filter(pixels, (sigma, sigma, 0), output=np.float32, mode="nearest")
    background, colors = _unmix(smooth)
    found = [(_fit(mask, color), mask) for color in range(len(_COLORS)) for mask in _components(colors == color)]
    found.sort(key=lambda pair: -pair[0].area)
    parts = np.full(colors.shape, -1)
    for index, (_, mask) in enumerate(found):
        parts[mask] = index
    nearest = (2 * np.arange(len(image)) + 1) * len(parts) // (2 * len(image))
    return Reading(background, tuple(item for item, _ in found)), parts[np.ix_(nearest, nearest)]


def _unmix(pixels: np.ndarray) -> tuple[int, np.ndarray]:
    """The background's index, and int [H, W]: the colour that makes up half or more of a pixel, else -1."""
    palette = np.concatenate([_BACKGROUNDS, _COLORS])
    nearest = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
    background = int(np.bincount(nearest.ravel(), minlength=len(palette))[: len(_BACKGROUNDS)].argmax())
    rays = _COLORS - _BACKGROUNDS[background]
    offsets = pixels - _BACKGROUNDS[background]
    share = np.clip(offsets @ rays.T / (rays**2).sum(1), 0, 1)
    # |offset - share * ray|^2 without |offset|^2, which is the same for all colours.
    color = (share**2 * (rays**2).sum(1) - 2 * share * (offsets @ rays.T)).argmin(-1)
    return background, np.where(np.take_along_axis(share, color[..., None], -1)[..., 0] >= 0.5, color, -1)


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The masks, bool [H, W], of the 8-connected parts of a mask that are large enough to be objects."""
    parts, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = np.bincount(parts.ravel())[1:] * (shapes.CANVAS / len(mask)) ** 2
    return [parts == 1 + i for i in np.flatnonzero(areas >= MIN_AREA)]


def _fit(mask: np.ndarray, color: int) -> Found:
    """The best of the five shapes at three scales each, placed by the centroid and area of a component."""
    unit = shapes.CANVAS / len(mask)
    area = float(mask.sum()) * unit**2
    rows, columns = np.nonzero(mask)
    x, y = float(columns.mean() + 0.5) * unit, float(rows.mean() + 0.5) * unit
    ends = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    best, found = MIN_IOU, Found(color, -1, x, y, area, (area / np.pi) ** 0.5, _box(ends, len(mask)))
    for shape, name in enumerate(shapes.SHAPES):
        radius = (area / _AREA[name]) ** 0.5
        templates = [shapes.Object(color, shape, x, y - _SINK[name] * s * radius, s * radius) for s in (1.0, 0.95, 1.05)]
        overlap = max(_iou(mask, template) for template in templates)
        if overlap > best:
            # The area says more of the radius than the overlap does.
            box = _box(shapes.boxes(shapes.Scene(0, (templates[0],)))[0, 1:], 1)
            best, found = overlap, Found(color, shape, x, templates[0].y, area, radius, box)
    return found


def _box(corners: Iterable[float], size: int) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of a picture of that size as Python's floats in [0, 1]."""
    x0, y0, x1, y1 = (min(max(float(corner) / size, 0.0), 1.0) for corner in corners)
    return x0, y0, x1, y1


def _iou(mask: np.ndarray, template: shapes.Object) -> float:
    window, cover = shapes.coverage(template, len(mask))
    hit = float(cover[mask[window]].sum())
    return hit / (float(mask.sum()) + float(cover.sum()) - hit)


def score(image: np.ndarray, spec: shapes.Spec) -> dict[str, bool | None]:
    """Holds a picture, uint8 [H, H, 3], against what was asked for.

    background: the right one. count: the right number of objects. color, shape, binding: the multiset of the objects'
    colours, of their shapes, of their pairs (colour, shape) is that of `spec`. relation: binding, and the stated
    relation holds by the larger difference of the centres; None where none is stated. all: background, count and
    binding. all_with_relation: all, and relation where stated.
    """
    return score_reading(read_scene(image), spec)


def score_reading(reading: Reading, spec: shapes.Spec) -> dict[str, bool | None]:
    """`score` of a picture that has been read."""
    pairs = [(o.color, o.shape) for o in reading.objects]
    background, count = reading.background == spec.background, len(pairs) == len(spec.objects)
    binding = Counter(pairs) == Counter(spec.objects)
    everything = background and count and binding
    relation = None if spec.relation is None else binding and _relation_holds(reading, spec)
    return {
        "background": background,
        "count": count,
        "color": Counter(c for c, _ in pairs) == Counter(c for c, _ in spec.objects),
        "shape": Counter(s for _, s in pairs) == Counter(s for _, s in spec.objects),
        "binding": binding,
        "relation": relation,
        "all": everything,
        "all_with_relation": everything and relation is not False,
    }


def _relation_holds(reading: Reading, spec: shapes.Spec) -> bool:
    """For a reading whose pairs are those of `spec`; of two equal objects either may be the first."""
    orders = (reading.objects, reading.objects[::-1])
    return any(
        tuple((o.color, o.shape) for o in order) == spec.objects
        and shapes.relation_between((order[0].x, order[0].y), (order[1].x, order[1].y)) == spec.relation
        for order in orders
    )


Row = dict[str, float]
Table = dict[str, Row]


def score_table(images: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str]) -> Table:
    """Scores pictures of captions by kind of caption.

    Returns {"<number of objects> <seen | held-out | all>": row}; a row has `n`, the mean of each of METRICS (relation
    only where stated) and its standard error sqrt(p (1 - p) / n) as `<metric>_se`. "held-out": the caption has an
    object of a held-out pair. Raises ValueError for captions that `parse_caption` cannot read or of another number.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images for {len(captions)} captions")
    groups: dict[tuple[int, str], list[dict[str, bool | None]]] = {}
    for image, caption in zip(images, captions, strict=True):
        spec = shapes.parse_caption(caption)
        result = score(image, spec)
        for kind in ("held-out" if spec.held_out else "seen", "all"):
            groups.setdefault((len(spec.objects), kind), []).append(result)
    order = {"seen": 0, "held-out": 1, "all": 2}
    keys = sorted(groups, key=lambda key: (key[0], order[key[1]]))
    return {f"{count} {kind}": _row(groups[count, kind]) for count, kind in keys}


def _row(results: list[dict[str, bool | None]]) -> Row:
    row: Row = {"n": len(results)}
    for metric in METRICS:
        values = [bool(result[metric]) for result in results if result[metric] is not None]
        if values:
            p = float(np.mean(values))
            row |= {metric: p, f"{metric}_se": (p * (1 - p) / len(values)) ** 0.5}
    return row


@functools.cache
def chance(count: int, scenes: int = 5000) -> Row:
    """What a guesser gets who draws a training scene of the right number of objects, whatever the (seen) caption says.

    Such a guess is right if two independent scenes agree, estimated over all pairs of `scenes` scenes of a fixed seed.
    """
    specs = [shapes.sample_scene(2**32, i, (count,)).spec() for i in range(scenes)]
    backgrounds = [spec.background for spec in specs]
    bindings = [tuple(sorted(spec.objects)) for spec in specs]
    row: Row = {
        "background": _agreement(backgrounds),
        "count": 1.0,
        "color": _agreement([tuple(sorted(c for c, _ in spec.objects)) for spec in specs]),
        "shape": _agreement([tuple(sorted(s for _, s in spec.objects)) for spec in specs]),
        "binding": _agreement(bindings),
        "all": _agreement(list(zip(backgrounds, bindings, strict=True))),
    }
    # With its objects sorted, "A above B" and "B below A" are the same statement; relations come in opposite pairs.
    relations = [s.relation if s.relation is None or s.objects[0] < s.objects[1] else s.relation ^ 1 for s in specs]
    if count == 2:
        row["relation"] = _agreement(list(zip(bindings, relations, strict=True)))
    row["all_with_relation"] = _agreement(list(zip(backgrounds, bindings, relations, strict=True)))
    return row


def _agreement(draws: Sequence[Hashable]) -> float:
    """The share of pairs of draws that are equal."""
    return sum(n * (n - 1) for n in Counter(draws).values()) / (len(draws) * (len(draws) - 1))


def format_table(table: Table) -> str:
    """The table as aligned text: a line for each row and, after each number of objects, its level of chance."""
    heads = {"all_with_relation": "all+rel"}
    lines = [f"{'objects':<12}{'n':>6}" + "".join(f"{heads.get(m, m):>15}" for m in METRICS)]
    for name, row in table.items():
        lines.append(f"{name:<12}{row['n']:>6.0f}" + "".join(f"{_cell(row, metric):>15}" for metric in METRICS))
        count, kind = name.split()
        if kind == "all":
            level = chance(int(count))
            lines.append(f"{count + ' chance':<18}" + "".join(f"{_cell(level, metric):>15}" for metric in METRICS))
    return "\n".join(lines)


def _cell(row: Row, metric: str) -> str:
    if metric not in row:
        return "-"
    if f"{metric}_se" not in row:
        return f"{row[metric]:.2g}"
    return f"{row[metric]:.3f} ± {row[f'{metric}_se']:.3f}"
