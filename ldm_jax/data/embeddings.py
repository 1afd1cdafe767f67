"""Embeddings of pictures: files of them, and the simplest there is, mean colours."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.config import UserError

_GRID = 8
COLOR_WIDTH = 3 * _GRID**2


def mean_colors(image: np.ndarray) -> np.ndarray:
    """The mean colours of 8 x 8 parts of a picture, uint8 [H,W,3] to float32 [192] of unit length.

    Each is taken from white, so that pictures differ in direction and none is zero but a white one, which is all of one number.
    """
    small = np.asarray(Image.fromarray(image).resize((_GRID, _GRID), Image.Resampling.BOX), np.float32)
    vector = 256.0 - small.ravel()
    return vector / np.linalg.norm(vector)


def read_embeddings(path: str | Path) -> np.ndarray:
    """Rows float [N,D] of a `.npy` file, memory-mapped, or of `embeddings` in a `.npz` file. Raises UserError."""
    try:
        loaded: Any = np.load(path, mmap_mode="r")
        rows = loaded if isinstance(loaded, np.ndarray) else loaded["embeddings"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"cannot read embeddings from {path} (.npy, or .npz with `embeddings`): {error}") from error
    if rows.ndim != 2 or rows.dtype.kind != "f" or not len(rows):
        raise UserError(f"{path} must hold float rows [N,D], not {rows.dtype} {list(rows.shape)}")
    return rows
