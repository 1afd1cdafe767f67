"""Transforms of one example on the host: crops, sizes and mirroring. NumPy and Pillow only.

A crop acts on all entries of an example at once: the picture is resampled, its maps take the label of the nearest pixel, and `crop`
says which part of the whole picture is left. Boxes stay in shares of the whole picture, so that a layout can tell a model both where
the objects are and which part of the scene it is to paint.
"""

from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.config import UserError

SPATIAL_KEYS = ("image", "segmentation", "mask", "low_res")
"""Entries of an example whose first two axes are the height and width of the picture."""

WHOLE = (0.0, 0.0, 1.0, 1.0)
"""The `crop` of an example that shows its whole picture: x0, y0, x1, y1."""


def center_crop(image: np.ndarray, resolution: int) -> np.ndarray:
    """The central square of a picture at a resolution, resized as in ADM (Dhariwal & Nichol, arXiv 2105.05233).

    The picture is halved with a box filter while its short side is at least twice the target, then resized with a
    bicubic filter so that its short side is the target, then cropped.

    Args:
        image: uint8 [H, W, 3].
        resolution: side of the square, pixels.

    Returns:
        uint8 [resolution, resolution, 3]; the picture itself where it already has that size.
    """
    return _cover(image, resolution, resolution)


def center_crop_example(example: dict[str, Any], resolution: int) -> dict[str, Any]:
    """`center_crop` of an example: [resolution, resolution] of every map, and `crop`. Otherwise as `fit`."""
    return fit(example, resolution, resolution)


def fit(example: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """The centre of an example at the size, and thus the aspect ratio, of a bucket.

    The picture is resized as in `center_crop`, until it just covers [height, width], and what juts out is cut off on both sides. Maps
    take, for each pixel of the result, the value at the pixel's centre.

    Args:
        example: `image` uint8 [H, W, 3], where present `segmentation` and `mask` [H, W], and `crop` float32 [4] of an earlier crop.
        height: of the result, pixels.
        width: of the result, pixels.

    Returns:
        The example with its maps of [height, width] and `crop` float32 [4]: x0, y0, x1, y1 of what is left, in shares of the whole
        picture, within the earlier `crop` if there is one. A picture that already has that size stays the same object.

    Raises:
        ValueError: a map has another size than the picture.
    """
    image_height, image_width = _size(example)
    _, (covering_height, covering_width) = _covering_size(image_height, image_width, height, width)
    top, left = (covering_height - height) // 2, (covering_width - width) // 2
    at = np.ix_(_centers(top, height, covering_height, image_height), _centers(left, width, covering_width, image_width))
    maps = {key: example[key][at] for key in SPATIAL_KEYS if key in example and key != "image"}
    window = np.array([left, top, left + width, top + height]) / [covering_width, covering_height, covering_width, covering_height]
    return {**example, **maps, "image": _cover(example["image"], height, width), "crop": _within(example, window)}


def crop(example: dict[str, Any], left: int, top: int, side: int, resolution: int) -> dict[str, Any]:
    """A square window of an example, `side` pixels wide, resized to a resolution. Otherwise as `fit`.

    Raises:
        ValueError: the window is not inside the picture, or a map has another size than the picture.
    """
    height, width = _size(example)
    if side < 1 or left < 0 or top < 0 or left + side > width or top + side > height:
        raise ValueError(f"a window of side {side} at left {left}, top {top} is not inside a picture of {width} x {height} pixels")
    cut = {key: example[key][top : top + side, left : left + side] for key in SPATIAL_KEYS if key in example}
    window = np.array([left, top, left + side, top + side]) / [width, height, width, height]
    return fit({**example, **cut, "crop": _within(example, window)}, resolution, resolution)


def random_window(rng: np.random.Generator, height: int, width: int, min_share: float) -> tuple[int, int, int]:
    """(left, top, side) of a random square window, in pixels of a picture of [height, width].

    The side is uniform in [min_share, 1] of the short side, in whole pixels, and the place is uniform among those inside the picture.

    Raises:
        UserError: min_share is not in (0, 1].
    """
    if not 0 < min_share <= 1:
        raise UserError(f"random crop: the least share of the short side is {min_share}; it must be in (0, 1]")
    short = min(height, width)
    side = int(rng.integers(int(np.ceil(min_share * short)), short + 1))
    return int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1)), side


def random_crop(example: dict[str, Any], resolution: int, rng: np.random.Generator, min_share: float) -> dict[str, Any]:
    """`crop` of a `random_window`: [resolution, resolution] of every map, and `crop`."""
    return crop(example, *random_window(rng, *_size(example), min_share), resolution)


def mirror(example: dict[str, Any]) -> dict[str, Any]:
    """The example seen in a mirror: pictures, maps, boxes and `crop` are flipped left to right, the rest is kept.

    Captions are not rewritten, so data whose captions speak of left and right should not be mirrored.
    """
    flipped = {key: value[:, ::-1] if key in SPATIAL_KEYS else value for key, value in example.items()}
    if "boxes" in example:
        label, x0, y0, x1, y1 = np.asarray(example["boxes"], np.float32).reshape(-1, 5).T
        flipped["boxes"] = np.stack([label, 1 - x1, y0, 1 - x0, y1], axis=-1)
    if "crop" in example:
        x0, y0, x1, y1 = example["crop"]
        flipped["crop"] = np.array([1 - x1, y0, 1 - x0, y1], np.float32)
    return flipped


def _size(example: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of the picture. Raises ValueError where a map has another size."""
    height, width = example["image"].shape[:2]
    for key in SPATIAL_KEYS:
        if key in example and example[key].shape[:2] != (height, width):
            raise ValueError(f"{key!r} has the shape {example[key].shape}, but the picture has {height} rows and {width} columns")
    return height, width


def _covering_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, tuple[int, int]]:
    """How often a picture is halved, and the (height, width) to which it is then resized, so that it just covers the target."""
    halvings = 0
    while height >= 2 * target_height and width >= 2 * target_width:
        height, width, halvings = height // 2, width // 2, halvings + 1
    scale = max(target_height / height, target_width / width)
    return halvings, (round(height * scale), round(width * scale))


def _cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre of a picture that was resized to just cover [height, width]; the picture itself where it has that size."""
    if image.shape[:2] == (height, width):
        return image
    halvings, (covering_height, covering_width) = _covering_size(image.shape[0], image.shape[1], height, width)
    picture = Image.fromarray(image)
    for _ in range(halvings):
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    array = np.asarray(picture.resize((covering_width, covering_height), Image.Resampling.BICUBIC))
    top, left = (covering_height - height) // 2, (covering_width - width) // 2
    return array[top : top + height, left : left + width]


def _centers(start: int, count: int, resized: int, length: int) -> np.ndarray:
    """Indices, of `length` pixels, under the centres of pixels start ... start + count - 1 of the same line resized to `resized`."""
    return (2 * np.arange(start, start + count) + 1) * length // (2 * resized)


def _within(example: dict[str, Any], window: np.ndarray) -> np.ndarray:
    """A window, x0, y0, x1, y1 in shares of what an example shows, in shares of the whole picture: float32 [4]."""
    shown = np.asarray(example.get("crop", WHOLE), np.float64).reshape(2, 2)
    return (shown[0] + window.reshape(2, 2) * (shown[1] - shown[0])).ravel().astype(np.float32)
