"""Arrays that are made once and kept in a file."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ldm_jax.paths import local_copy, make_directory, write_bytes


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes a `.npy` file complete or not at all. Raises UserError where the disk does not take it."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_bytes(path, buffer.getvalue())


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in a file, read as far as it is looked at; made and written where there is none. Raises UserError where it
    cannot be."""
    if not path.exists():
        make_directory(path.parent)
        write_array(path, make())
    with local_copy(path) as file:  # what is mapped stays, even where its name goes
        return np.load(file, mmap_mode="r")
