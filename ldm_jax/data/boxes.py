"""Boxes of objects: rows of class, x0, y0, x1, y1 in shares of the picture; and the form in which COCO writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.config import UserError


def tidy_boxes(rows: Any) -> np.ndarray:
    """Boxes cut to the picture, those of which nothing is left omitted.

    Args:
        rows: [n, 5] of class, x0, y0, x1, y1, the coordinates in shares of the picture.

    Returns:
        float32 [m, 5], m <= n.

    Raises:
        ValueError: not rows of five finite numbers, or in pixels.
    """
    try:
        boxes = np.asarray(rows, np.float64) if np.size(rows) else np.zeros((0, 5))
    except TypeError as error:
        raise ValueError(f"its boxes are not numbers: {error}") from error
    if boxes.ndim != 2 or boxes.shape[1] != 5 or not np.isfinite(boxes).all():
        raise ValueError("its boxes are not rows of five numbers: class, x0, y0, x1, y1")
    if boxes.size and (boxes[:, 1:].min() < -1 or boxes[:, 1:].max() > 2):
        raise ValueError("its boxes are not in shares of the picture: coordinates lie in [0, 1], or not far outside")
    boxes = np.concatenate([boxes[:, :1], boxes[:, 1:].clip(0, 1)], axis=1).astype(np.float32)
    return boxes[(boxes[:, 1] < boxes[:, 3]) & (boxes[:, 2] < boxes[:, 4])]


def read_coco(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Boxes of pictures, and the names of their classes, from a JSON file in COCO's form.

    The file has `images` (id, file_name, width, height of the upright picture), `annotations` (image_id, category_id, `bbox` as x, y,
    width, height in pixels; those with a true `iscrowd` are left out) and `categories` (id, name), which become classes 0, 1, ... in the
    order of their ids.

    Returns:
        {file_name: float32 [n, 5]} of all pictures that the file lists, n = 0 for one without objects; names of the classes.

    Raises:
        UserError: the file is not of that form.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        categories = sorted(content["categories"], key=lambda category: category["id"])
        number = {category["id"]: index for index, category in enumerate(categories)}
        images = {image["id"]: image for image in content["images"]}
        rows: dict[Any, list[list[float]]] = {key: [] for key in images}
        for annotation in content["annotations"]:
            if annotation.get("iscrowd"):
                continue
            image, (x, y, width, height) = images[annotation["image_id"]], annotation["bbox"]
            corners = [x / image["width"], y / image["height"], (x + width) / image["width"], (y + height) / image["height"]]
            rows[annotation["image_id"]].append([number[annotation["category_id"]], *corners])
        boxes = {Path(image["file_name"]).as_posix(): tidy_boxes(rows[key]) for key, image in images.items()}
        return boxes, [str(category.get("name", category["id"])) for category in categories]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is not in COCO's form (images, annotations, categories): {type(error).__name__} {error}") from error
