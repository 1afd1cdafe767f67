"""Whether a condition is obeyed: pictures made under a condition of drawn scenes, held against the scenes themselves.

Pictures are read back by the oracle, so that nothing here is learnt. A score of a picture needs no other, and three sets of pictures of the
same scenes (under their conditions, under those of other scenes, and the best that can be had) are compared by `comparison.compare`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage, optimize

from ldm_jax.data import shapes
from ldm_jax.data.shapes import Pairs, ShapesSource
from ldm_jax.evaluation import oracle
from ldm_jax.evaluation.oracle import Found, Reading

# Of scenes: none is drawn for training, which uses `data.seed`, below it.
SEED = 1_000_003
# In a map of classes: an object that looks like none of the shapes.
UNKNOWN = 255
# Of the pixels of a partly hidden object, the shares that a hole covers: with less there is nothing to do, with more nothing to go by.
HIDDEN = (0.2, 0.8)
# In levels of a channel. Noise of 8 levels stays below it; two backgrounds differ by 92 and more.
TOLERANCE = 32

Example = Mapping[str, Any]
Scores = dict[str, np.ndarray]


def fresh_examples(resolution: int, number: int, counts: Sequence[int], pairs: Pairs, seed: int = SEED) -> list[dict[str, Any]]:
    """`number` examples of `ShapesSource` that no model was trained on, unless `data.seed` was that seed. Raises UserError."""
    source = ShapesSource(number, seed, resolution, tuple(counts), pairs)
    return [source[i] for i in range(number)]


def shuffled(examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The examples turned by half their number: none is in its place, and those in a run of one kind move to another kind.

    Raises ValueError for fewer than two.
    """
    if len(examples) < 2:
        raise ValueError(f"{len(examples)} examples cannot change places")
    half = len(examples) // 2
    return [*examples[half:], *examples[:half]]


def bicubic(low_res: np.ndarray, size: int) -> np.ndarray:
    """uint8 [h, w, 3] at another size, uint8 [size, size, 3]: what super-resolution is to be better than."""
    return np.asarray(Image.fromarray(low_res).resize((size, size), Image.Resampling.BICUBIC))


def segment(image: np.ndarray) -> np.ndarray:
    """The map of classes read off a picture, uint8 [H, H] of uint8 [H, H, 3]: 1 + class in an object, UNKNOWN in one of no shape, else 0.

    Raises as `oracle.read_scene`.
    """
    reading, parts = oracle.read_parts(image)
    values = [UNKNOWN if item.shape < 0 else 1 + item.color * len(shapes.SHAPES) + item.shape for item in reading.objects]
    return np.array([*values, 0], np.uint8)[parts]


def scores(condition: str, images: np.ndarray, examples: Sequence[Example]) -> Scores:
    """How well pictures obey the condition they were made under; a score of 1 is the best but for `psnr` (dB) and `change` (levels).

    label: `class`, and its `color` and `shape`, of the object read with the largest radius; `count`, whether there are as many as in the
      scene.
    boxes: `iou`, the boxes read matched one to one with those given, what is left over of either counting as 0; `count`; `color`, `shape`
      and `class` of the object matched with a box, where its centre is in the box.
    segmentation: of the map read off the picture, `pixels` that agree, `object_pixels` (those where an object is asked for) and `iou`, the
      mean over the classes in either map without the background.
    low_res: `psnr` against the scene's picture, and the oracle's scores of its caption.
    mask: in the hole, `psnr` and `background`, the share of pixels 2 px (of 64) off the objects within TOLERANCE of it. Of objects that
      the hole hides a share in HIDDEN of: `color`, the share of their hidden pixels that are read as an object of their colour, and
      `shape` and `object` (shape, colour, and a box of IoU >= 0.5), of the object read in most of their pixels. `change`: the largest
      difference outside the hole, which must be 0.
    text: the oracle's scores of the caption, each as "<score> seen" or "<score> held-out" after the pairs of colour and shape.
    neighbors: `background` as in the query; `colors`, the Jaccard index of the sets of colours; `nearer`, the share of the other queries
      that are farther from the picture than its own, by the mean colours of 8 x 8 parts.
    "" (none): `background`, all but 5 % of the pixels off the objects within TOLERANCE of one; `count`, one to three objects; `shapes`,
      each of a known shape; `valid`, all three.

    Args:
      condition: one of the above.
      images: uint8 [N, H, H, 3], N >= 1.
      examples: N examples of `ShapesSource`; for "mask" with `mask` [H, H], 0 outside the hole, and for "neighbors" with `query`, uint8
        [H, H, 3], the picture whose neighbours they are. For "" they are not looked at.

    Returns:
      float64 [N] for each score, NaN where it does not apply. A `psnr` takes a mean square of at least 1/12 for the difference, that of
      rounding to levels, and so is at most 58.9 dB; what a first stage makes of the scene is a fairer ceiling.

    Raises:
      ValueError: for another condition, pictures that the oracle does not read or of another number, and examples that lack an entry.
    """
    if condition not in _MEASURES:
        raise ValueError(f"no scores for condition {condition!r}; there are some for {', '.join(map(repr, _MEASURES))}")
    if len(images) != len(examples) or not len(images):
        raise ValueError(f"{len(images)} images for {len(examples)} examples")
    measure, needs = _MEASURES[condition]
    for key in needs:
        if any(key not in example for example in examples):
            raise ValueError(f"condition {condition!r} is scored on examples with {key!r}")
    rows = [measure(image, example) for image, example in zip(images, examples, strict=True)]
    result = {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}
    if condition == "neighbors":
        result["nearer"] = _nearer(images, [example["query"] for example in examples])
    return result


def total_variation(images: np.ndarray, counts: Sequence[int], pairs: Pairs) -> dict[str, float]:
    """How far pictures, uint8 [N, H, H, 3], are spread otherwise than drawn scenes, in `background`, `color`, `shape` and `count`.

    Half the sum of the differences of frequencies, in [0, 1]: 0 for equal ones, and above it by chance for few pictures. The scenes' are
    those of 5000 of a fixed seed; colours are not uniform among them, as some lose a shape to the held-out pairs.
    """
    ours, theirs = _frequencies([oracle.read_scene(image) for image in images]), _drawn_frequencies(tuple(counts), pairs)
    return {name: float(np.abs(ours[name] - theirs[name]).sum() / 2) for name in ours}


@functools.cache
def _drawn_frequencies(counts: tuple[int, ...], pairs: Pairs) -> Scores:
    return _frequencies([shapes.sample_scene(2**32, i, counts, pairs) for i in range(5000)])


def _frequencies(scenes: Sequence[Reading] | Sequence[shapes.Scene]) -> Scores:
    objects = [item for scene in scenes for item in scene.objects]
    draws = {
        "background": ([scene.background for scene in scenes], len(shapes.BACKGROUNDS)),
        "color": ([item.color for item in objects], len(shapes.COLORS)),
        "shape": ([item.shape % (1 + len(shapes.SHAPES)) for item in objects], 1 + len(shapes.SHAPES)),  # the last: none
        "count": ([min(len(scene.objects), 4) for scene in scenes], 5),
    }
    return {name: np.bincount(np.array(values, int), minlength=size) / max(len(values), 1) for name, (values, size) in draws.items()}


def _is_class(item: Found, label: int) -> dict[str, float]:
    color, shape = divmod(label, len(shapes.SHAPES))
    return {"class": item.color == color and item.shape == shape, "color": item.color == color, "shape": item.shape == shape}


_NOTHING = Found(-1, -1, 0.0, 0.0, 0.0, 0.0, (0.0, 0.0, 0.0, 0.0))


def _label(image: np.ndarray, example: Example) -> dict[str, float]:
    objects = oracle.read_scene(image).objects
    row = _is_class(max(objects, key=lambda item: item.radius, default=_NOTHING), int(example["label"]))
    return {**row, "count": len(objects) == len(example["boxes"])}


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes x0, y0, x1, y1: [n, 4] and [m, 4] to [n, m]; 0 for two without area."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = np.prod(np.clip(high - low, 0, None), -1)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], -1) for boxes in (first, second)]
    return both / np.maximum(areas[0][:, None] + areas[1][None] - both, np.finfo(np.float64).tiny)


def _boxes(image: np.ndarray, example: Example) -> dict[str, float]:
    given = np.asarray(example["boxes"], np.float64)
    objects = oracle.read_scene(image).objects
    overlap = box_iou(given[:, 1:], np.array([item.box for item in objects]).reshape(-1, 4))
    # One more of no overlap for each box given, so that each is matched.
    overlap, objects = np.pad(overlap, ((0, 0), (0, len(given)))), objects + (_NOTHING,) * len(given)
    matches = list(zip(*optimize.linear_sum_assignment(overlap, maximize=True), strict=True))
    right = [_is_class(objects[j] if _centred(objects[j], given[i, 1:]) else _NOTHING, int(given[i, 0])) for i, j in matches]
    found = len(objects) - len(given)
    return {
        "iou": float(sum(overlap[match] for match in matches) / max(len(given), found, 1)),
        "count": found == len(given),
        **{name: float(np.mean([row[name] for row in right])) if right else np.nan for name in ("color", "shape", "class")},
    }


def _centred(item: Found, box: np.ndarray) -> bool:
    x, y = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
    return bool(box[0] <= x <= box[2] and box[1] <= y <= box[3])


def _segmentation(image: np.ndarray, example: Example) -> dict[str, float]:
    given, read = np.asarray(example["segmentation"]), segment(image)
    classes = np.setdiff1d(np.union1d(given, read), [0])
    overlaps = [((given == c) & (read == c)).sum() / ((given == c) | (read == c)).sum() for c in classes]
    return {
        "pixels": float((given == read).mean()),
        "object_pixels": _mean(given == read, given != 0),
        "iou": float(np.mean(overlaps)) if overlaps else np.nan,
    }


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    """The mean over the pixels chosen; NaN for none."""
    return float(values[where].mean()) if where.any() else np.nan


def _psnr(image: np.ndarray, truth: np.ndarray, where: np.ndarray) -> float:
    square = _mean((image.astype(np.float64) - truth) ** 2, where)
    return float(10 * np.log10(255**2 / np.maximum(square, 1 / 12)))


def _low_res(image: np.ndarray, example: Example) -> dict[str, float]:
    row = {"psnr": _psnr(image, example["image"], np.ones(image.shape[:2], bool)), **_oracle(image, example["text"])}
    return {name: value for name, value in row.items() if "relation" not in name}


def _oracle(image: np.ndarray, caption: str) -> dict[str, float]:
    result = oracle.score(image, shapes.parse_caption(caption))
    return {name: np.nan if value is None else value for name, value in result.items()}


def _text(image: np.ndarray, example: Example) -> dict[str, float]:
    kind = "held-out" if shapes.parse_caption(example["text"]).held_out else "seen"
    row = _oracle(image, example["text"])
    return {f"{name} {k}": value if k == kind else np.nan for k in ("seen", "held-out") for name, value in row.items()}


def _mask(image: np.ndarray, example: Example) -> dict[str, float]:
    truth, labels, hole = example["image"], np.asarray(example["segmentation"]), np.asarray(example["mask"]) != 0
    reading, parts = oracle.read_parts(image)
    objects = (*reading.objects, _NOTHING)
    colors = np.array([item.color for item in objects])[parts]
    rows = []
    for label, *box in np.asarray(example["boxes"], np.float64):
        pixels = labels == 1 + int(label)
        if HIDDEN[0] <= _mean(hole, pixels) <= HIDDEN[1]:
            # parts are -1 where there is no object, which is the last of the objects too.
            item = objects[np.bincount(parts[pixels] + 1, minlength=1).argmax() - 1]
            right = _is_class(item, int(label))
            whole = box_iou(np.array([box]), np.array([item.box]))[0, 0] >= 0.5
            color = float((colors[pixels & hole] == int(label) // len(shapes.SHAPES)).mean())
            rows.append({"color": color, "shape": right["shape"], "object": right["class"] and whole})
    off, ground = _off_objects(labels != 0), list(shapes.BACKGROUNDS.values())[shapes.parse_caption(example["text"]).background]
    return {
        "psnr": _psnr(image, truth, hole),
        "background": _mean(_near(image, ground), hole & off),
        **{name: float(np.mean([row[name] for row in rows])) if rows else np.nan for name in ("color", "shape", "object")},
        "change": float(np.abs(image.astype(int) - truth)[~hole].max(initial=0)),
    }


def _off_objects(objects: np.ndarray) -> np.ndarray:
    """Pixels 2 px of a canvas of 64 and more off those of objects, whose rims are of neither colour; bool [H, H] of bool [H, H]."""
    return ~ndimage.binary_dilation(objects, np.ones((3, 3)), iterations=max(2 * len(objects) // shapes.CANVAS, 1))


def _near(image: np.ndarray, color: Sequence[int]) -> np.ndarray:
    return (np.abs(image.astype(int) - np.array(color)) <= TOLERANCE).all(-1)


def _neighbors(image: np.ndarray, example: Example) -> dict[str, float]:
    ours, theirs = oracle.read_scene(image), oracle.read_scene(example["query"])
    first, second = ({item.color for item in reading.objects} for reading in (ours, theirs))
    return {
        "background": ours.background == theirs.background,
        "colors": len(first & second) / len(first | second) if first | second else 1.0,
    }


def _nearer(images: np.ndarray, queries: Sequence[np.ndarray]) -> np.ndarray:
    """float64 [N]: the share of the other queries whose embedding is farther from a picture's than its own query's, of equal ones half."""
    ours, theirs = _embedding(images), _embedding(np.stack(queries))
    squares = (ours**2).sum(1)[:, None] - 2 * ours @ theirs.T + (theirs**2).sum(1)
    own = np.diagonal(squares)[:, None]
    farther = (squares > own) + 0.5 * (squares == own)
    return (farther.sum(1) - 0.5) / (len(queries) - 1) if len(queries) > 1 else np.full(1, np.nan)


def _embedding(images: np.ndarray) -> np.ndarray:
    """float64 [N, 192]: the mean colours of 8 x 8 parts of pictures, uint8 [N, H, W, 3]."""
    rows, columns = (np.arange(8) * size // 8 for size in images.shape[1:3])
    sums = np.add.reduceat(np.add.reduceat(images.astype(np.float64), rows, 1), columns, 2)
    areas = np.diff(rows, append=images.shape[1])[:, None] * np.diff(columns, append=images.shape[2])
    return (sums / areas[..., None]).reshape(len(images), -1)


def _unconditional(image: np.ndarray, example: Example) -> dict[str, float]:
    reading, parts = oracle.read_parts(image)
    ground = list(shapes.BACKGROUNDS.values())[reading.background]
    row = {
        "background": _mean(_near(image, ground), _off_objects(parts >= 0)) >= 0.95,
        "count": 1 <= len(reading.objects) <= 3,
        "shapes": all(item.shape >= 0 for item in reading.objects),
    }
    return {**row, "valid": all(row.values())}


_MEASURES: dict[str, tuple[Callable[[np.ndarray, Example], dict[str, float]], tuple[str, ...]]] = {
    "label": (_label, ("label", "boxes")),
    "boxes": (_boxes, ("boxes",)),
    "segmentation": (_segmentation, ("segmentation",)),
    "low_res": (_low_res, ("image", "text")),
    "mask": (_mask, ("image", "text", "boxes", "segmentation", "mask")),
    "text": (_text, ("text",)),
    "neighbors": (_neighbors, ("query",)),
    "": (_unconditional, ()),
}
