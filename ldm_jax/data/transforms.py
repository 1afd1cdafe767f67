"""Transforms of one example on the host: cropping to a resolution and mirroring. NumPy and Pillow only."""

from typing import Any

import numpy as np
from PIL import Image

SPATIAL_KEYS = ("image", "segmentation", "mask", "low_res")
"""Entries of an example whose first two axes are the height and width of the picture."""


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
    if image.shape[:2] == (resolution, resolution):
        return image
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * resolution:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = resolution / min(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    array = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - resolution) // 2, (array.shape[1] - resolution) // 2
    return array[top : top + resolution, left : left + resolution]


def mirror(example: dict[str, Any]) -> dict[str, Any]:
    """The example seen in a mirror: pictures, maps and boxes are flipped left to right, the rest is kept.

    Captions are not rewritten, so data whose captions speak of left and right should not be mirrored.
    """
    flipped = {key: value[:, ::-1] if key in SPATIAL_KEYS else value for key, value in example.items()}
    if "boxes" in example:
        label, x0, y0, x1, y1 = np.asarray(example["boxes"], np.float32).reshape(-1, 5).T
        flipped["boxes"] = np.stack([label, 1 - x1, y0, 1 - x0, y1], axis=-1)
    return flipped
