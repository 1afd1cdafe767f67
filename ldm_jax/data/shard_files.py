"""Files that hold many examples each: finding them, and telling one state of them from another."""

import glob
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.config import UserError


def find_files(path: str | Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    """The files that end so below a folder, or that a pattern matches, sorted. Raises UserError where there are none."""
    given = Path(path)
    found = given.rglob("*") if given.is_dir() else [given] if given.is_file() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(file for file in found if file.name.endswith(suffixes) and not file.name.startswith(".") and file.is_file())
    if not files:
        raise UserError(f"data.path: no {what} ({', '.join(suffixes)}) in {str(path)!r}; give their folder, or a pattern of them")
    return files


def place(ends: np.ndarray, index: int) -> tuple[int, int]:
    """The file that holds an example, and its number there; `ends` [files] counts the examples up to the end of each."""
    file = int(np.searchsorted(ends, index, side="right"))
    return file, index - (int(ends[file - 1]) if file else 0)


def files_hash(files: list[Path], about: Any) -> str:
    """16 hexadecimal digits that change with the files' names, sizes and modification times, and with a JSON value."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([about, stats]).encode()).hexdigest()[:16]
