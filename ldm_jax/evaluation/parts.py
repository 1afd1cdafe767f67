"""Work in parts, each a file that is there whole or not at all: a killed job goes on where it was, and several processes share it."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax import paths
from ldm_jax.config import UserError
from ldm_jax.sharding.processes import from_first

ABOUT = "about.json"


def parts(number: int, size: int) -> list[tuple[int, int]]:
    """Where each part of `number` things begins and ends."""
    return [(start, min(start + size, number)) for start in range(0, number, size)]


def part_file(directory: Path, part: tuple[int, int]) -> Path:
    return directory / f"{part[0]:08d}-{part[1]:08d}.npz"


def claim(directory: Path, about: dict[str, Any]) -> None:
    """Makes the directory, or checks that what lies in it is of the same work. Raises UserError."""
    from_first(lambda: _claim(directory, about))  # before any process leaves a part in it


def _claim(directory: Path, about: dict[str, Any]) -> None:
    known = directory / ABOUT
    try:
        directory.mkdir(parents=True, exist_ok=True)
        there = json.loads(known.read_text()) if known.exists() else None
        others = paths.names(directory) if there is None else []
    except (OSError, ValueError) as error:
        raise UserError(f"cannot use {directory}: {error}; give another --output") from error
    if others:
        raise UserError(f"{directory} holds {others[0]} and is no part of an evaluation: give another --output")
    about = json.loads(json.dumps(about))  # tuples as lists, as they are read
    if there is not None and there != about:
        different = ", ".join(name for name in sorted({*there, *about}) if there.get(name) != about.get(name))
        raise UserError(f"{directory} holds the work of another job ({different} differ): remove it, or give another --output")
    paths.write_json(known, about)


def missing(directory: Path, number: int, size: int) -> list[tuple[int, int]]:
    """This process's parts that are not there yet."""
    own = parts(number, size)[jax.process_index() :: jax.process_count()]
    return [part for part in own if not part_file(directory, part).exists()]


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Arrays as .npz, whole or not at all. Raises UserError where the disk does not take them."""
    with paths.writing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load(path: Path) -> Any:
    """What `save` wrote, to be closed. On object storage it is read at once."""
    return np.load(io.BytesIO(path.read_bytes()) if paths.is_remote(path) else path)
