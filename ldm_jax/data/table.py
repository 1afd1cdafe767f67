"""Hugging Face data sets: folders of parquet or arrow files."""

import itertools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.data.reader import Reader, as_text, captions, check_complete, class_numbers
from ldm_jax.data.shard_files import files_hash, find_files, place
from ldm_jax.data.table_files import TableFile, open_table

_SUFFIXES = (".parquet", ".arrow")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev")


class TableSource(Reader):
    """The rows of parquet or arrow files, in the order of the files' names.

    Columns: pictures and maps are `{"bytes", "path"}` as `datasets.Image` stores them, plain bytes, or paths relative to the folder;
    captions are texts or lists of texts; classes numbers or names; boxes rows of class, x0, y0, x1, y1 in shares of the picture.

    Args:
        path: the folder of the files, one file, or a pattern of them.
        split: where files or their folders are named after splits ("train-00000-of-00002.parquet", "train/data.arrow"), the one to read.
        keys: the column of each field, "image" and those of `needs`.
        needs: the fields to read.

    Raises:
        UserError: there are no files, or none of the split; one is damaged or lacks a column; or a row lacks what is asked for.
    """

    def __init__(self, path: str | Path, split: str, keys: Mapping[str, str], needs: Collection[str] = ()) -> None:
        super().__init__(needs)
        self.root = Path(path) if Path(path).is_dir() else Path(path).parent
        files = [file for file in find_files(path, _SUFFIXES, "tables") if not file.name.startswith("cache-")]  # left by `Dataset.map`
        self._files = _of_split(files, self.root, split)
        self._keys = {field: keys.get(field) or field for field in ("image", *self.needs)}
        self._tables = [open_table(file) for file in self._files]
        for table in self._tables:
            if missing := [key for key in self._keys.values() if key not in table.columns]:
                which = next(field for field, key in self._keys.items() if key == missing[0])
                raise UserError(f"data.{which}_key: {table.path} has no column {missing[0]!r}, only {', '.join(table.columns)}")
        self._ends = np.cumsum([table.num_rows for table in self._tables])
        if not len(self):
            raise UserError(f"data.path: the tables of {str(path)!r} have no rows")
        self.classes: list[str] = []
        self._several = "text" in self.needs and any(table.is_list(self._keys["text"]) for table in self._tables)
        self._labels = self._read_labels() if "label" in self.needs else np.zeros(0, np.int64)
        for field in ("text", "label", "boxes"):
            if field in self.needs:
                missing = [self.name(index) for index in self._rows_without(field)]
                remedy = f"fill the column {self._keys[field]!r}, or leave out those rows"
                check_complete(str(path), len(self), missing, field, remedy)

    def _rows_without(self, field: str) -> list[int]:
        """Rows whose caption is empty or whose cell of another field is null. Maps are not looked at: it would take reading all of them."""
        values = itertools.chain.from_iterable(table.values(self._keys[field]) for table in self._tables)
        return [row for row, value in enumerate(values) if (not captions(value) if field == "text" else value is None)]

    def _read_labels(self) -> np.ndarray:
        """int64 [n], 0 where there is none; the names of the classes as the column's own type says, else those that occur."""
        values = [value for table in self._tables for value in table.values(self._keys["label"])]
        numbers, names = class_numbers([value for value in values if value is not None])
        self.classes = names or self._tables[0].class_names(self._keys["label"])
        labels = np.zeros(len(values), np.int64)
        labels[[value is not None for value in values]] = numbers
        return labels

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[TableFile, int]:
        """The table of a row and its number there."""
        table, row = place(self._ends, index)
        return self._tables[table], row

    def read(self, index: int, fields: Collection[str]) -> dict[str, Any]:
        table, row = self._place(index)
        stored = {field: self._keys[field] for field in fields if field != "label"}
        cells = table.row(row, tuple(stored.values()))
        example = {field: cells[key] for field, key in stored.items()}
        for field in ("image", "segmentation", "mask"):
            if field in example:
                example[field] = self._file_bytes(example[field])
        if "text" in example:
            example["text"] = as_text(captions(example["text"]), self._several)
        return example | ({"label": int(self._labels[index])} if "label" in fields else {})

    def _file_bytes(self, cell: Any) -> bytes | None:
        """The bytes of an image file in a cell, or those of the file that it names."""
        if isinstance(cell, dict):
            cell = cell.get("bytes") or cell.get("path")
        return (self.root / cell).read_bytes() if isinstance(cell, str) else cell

    def name(self, index: int) -> str:
        """The file and the number of the row in it."""
        table, row = self._place(index)
        return f"{table.path.name}:{row}"

    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and modification times, and of the columns that are read."""
        return f"table-{files_hash(self._files, self._keys)}"


def _of_split(files: list[Path], root: Path, split: str) -> list[Path]:
    """The files of a split; all where none is named after any. Raises UserError where only other splits are there."""

    def named(file: Path, names: Collection[str]) -> bool:
        parts = file.relative_to(root).parts if file.is_relative_to(root) else (file.name,)
        return any(re.match(rf"({'|'.join(map(re.escape, names))})([-_.]|$)", part) for part in parts)

    chosen = [file for file in files if named(file, (split,))]
    if not chosen and (others := [file for file in files if named(file, _SPLITS)]):
        raise UserError(f"data.split: no file of {str(root)!r} is named after the split {split!r}; there is {others[0].name}")
    return chosen or files
