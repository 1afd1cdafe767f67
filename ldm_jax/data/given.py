"""What a user gives a model in files, one for each image: pictures, masks, maps of classes, boxes, embeddings."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.data.decode import BROKEN, DECODERS
from ldm_jax.data.transforms import fit


def read_picture(file: str, kind: str = "image") -> np.ndarray:
    """An `image` uint8 [H,W,3], a `segmentation` uint8 [H,W], or a `mask` bool [H,W], white in the hole. Raises UserError."""
    try:
        return DECODERS[kind](Path(file))
    except BROKEN as error:
        raise UserError(f"cannot read the picture {file}: {error}") from error


def fitted(pictures: dict[str, np.ndarray], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """An image and what lies over it, cropped at the centre to the shape of `size` (H, W) and resized to it. Raises UserError."""
    some = next(iter(pictures.values()))
    example = {"image": np.zeros((*some.shape[:2], 3), np.uint8), **pictures}
    try:
        made = fit(example, *size)
    except ValueError as error:
        sizes = " and ".join(f"the {name} is {p.shape[0]}x{p.shape[1]}" for name, p in pictures.items())
        raise UserError(f"{sizes}: one size is needed") from error
    return {name: made[name] for name in pictures}


def read_boxes(file: str) -> np.ndarray:
    """Boxes of one image, float32 [n,5] of class, x0, y0, x1, y1: a JSON list of {"class": 3, "box": [x0, y0, x1, y1]}, in shares of the
    picture. Raises UserError."""
    try:
        objects = json.loads(Path(file).read_text(encoding="utf-8"))
        rows = [[item["class"], *item["box"]] for item in objects]
        return np.array(rows, np.float32).reshape(len(rows), 5)
    except (OSError, ValueError, KeyError, TypeError) as error:
        form = '[{"class": 3, "box": [x0, y0, x1, y1]}, ...]'
        raise UserError(f"cannot read boxes from {file}, a list as {form}: {error}") from error


def read_neighbors(file: str) -> list[np.ndarray]:
    """Embeddings of neighbours: of `.npy` [n,D] one set, of [N,n,D] one for each image. Raises UserError."""
    try:
        loaded: Any = np.load(file)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read embeddings from {file} (.npy): {error}") from error
    if not isinstance(loaded, np.ndarray) or loaded.ndim not in (2, 3) or loaded.dtype.kind != "f":
        raise UserError(f"{file} must hold float [n,D] or [N,n,D], the embeddings of neighbours")
    return list(loaded[None] if loaded.ndim == 2 else loaded)
