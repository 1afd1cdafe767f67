"""One parquet or arrow file, read a row at a time.

An arrow file is mapped into memory, and a row read as it lies there. Parquet packs rows into groups, of which a reader takes all or
nothing: the groups that were read last are kept, so that rows in order cost nothing more, and rows at random places a group each.
"""

import bisect
import itertools
import json
import logging
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm_jax.config import UserError

logger = logging.getLogger(__name__)

_KEPT = 2**28  # bytes of row groups that are kept, of all files together; the last one always is
_LARGE = 2**26  # bytes of a row group above which reading at random places is slow


class TableFile(ABC):
    """One file. `schema` is its pyarrow schema."""

    def __init__(self, path: Path, schema: Any, num_rows: int) -> None:
        self.path, self.schema, self.num_rows = path, schema, num_rows

    @property
    def columns(self) -> list[str]:
        return self.schema.names

    @abstractmethod
    def row(self, row: int, columns: Sequence[str]) -> dict[str, Any]:
        """The cells of a row as Python values. Raises OSError or ValueError where they are damaged."""

    def values(self, column: str) -> Iterator[Any]:
        """The cells of a column, in order, as Python values. Raises UserError where they are damaged."""
        try:
            yield from self._values(column)
        except (OSError, ValueError) as error:
            raise UserError(f"data.path: the column {column!r} of {self.path} is damaged ({str(error).splitlines()[0]})") from error

    @abstractmethod
    def _values(self, column: str) -> Iterator[Any]: ...

    def is_list(self, column: str) -> bool:
        """Whether the cells are lists."""
        import pyarrow as pa

        return pa.types.is_list(self.schema.field(column).type) or pa.types.is_large_list(self.schema.field(column).type)

    def class_names(self, column: str) -> list[str]:
        """The names of the classes of a `datasets.ClassLabel` column, as Hugging Face notes them in the schema."""
        about = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = about.get("info", {}).get("features", {}).get(column, {})
        return feature.get("names", []) if isinstance(feature, dict) else []


def open_table(path: Path) -> TableFile:
    """A .parquet or .arrow file. Raises UserError where it is damaged, or pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path} is read with pyarrow, which is not installed: pip install pyarrow") from error
    try:
        return ParquetTable(path) if path.suffix == ".parquet" else ArrowTable(path)
    except (OSError, ValueError) as error:
        raise UserError(f"data.path: {path} is no whole {path.suffix[1:]} file ({str(error).splitlines()[0]})") from error


class ArrowTable(TableFile):
    """A file or stream of arrow's own format, as `Dataset.save_to_disk` writes it, mapped into memory."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        memory = pa.memory_map(str(path))
        try:
            self._table = pa.ipc.open_file(memory).read_all()
        except pa.ArrowInvalid:
            memory.seek(0)
            self._table = pa.ipc.open_stream(memory).read_all()
        super().__init__(path, self._table.schema, self._table.num_rows)

    def row(self, row: int, columns: Sequence[str]) -> dict[str, Any]:
        return {column: self._table.column(column)[row].as_py() for column in columns}

    def _values(self, column: str) -> Iterator[Any]:
        for chunk in self._table.column(column).chunks:
            yield from chunk.to_pylist()


class ParquetTable(TableFile):
    """A parquet file, read by row groups."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(path) as file:
            self._metadata = file.metadata
            super().__init__(path, file.schema_arrow, file.metadata.num_rows)
        groups = [self._metadata.row_group(group) for group in range(self._metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(group.num_rows for group in groups))
        if (largest := max((group.total_byte_size for group in groups), default=0)) > _LARGE:
            logger.warning(
                "%s has row groups of %d MiB, and each random picture costs reading one: copy the data to ArrayRecord (docs/data.md)",
                path,
                largest >> 20,
            )

    def row(self, row: int, columns: Sequence[str]) -> dict[str, Any]:
        group = bisect.bisect_right(self._ends, row)
        table = row_groups.table((self.path, group, tuple(columns)), lambda: self._read(group, columns))
        place = row - (self._ends[group - 1] if group else 0)
        return {column: table.column(column)[place].as_py() for column in columns}

    def _read(self, group: int, columns: Sequence[str]) -> Any:
        import pyarrow.parquet as parquet

        # A reader of its own: those of pyarrow are not for several threads.
        with parquet.ParquetFile(self.path, metadata=self._metadata) as file:
            return file.read_row_group(group, columns=list(columns), use_threads=False)

    def _values(self, column: str) -> Iterator[Any]:
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(self.path, metadata=self._metadata) as file:
            for batch in file.iter_batches(columns=[column], use_threads=False):
                yield from batch.column(0).to_pylist()


class _Groups:
    """The row groups that were read last, of all files."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._tables: OrderedDict[Any, Any] = OrderedDict()

    def table(self, key: Any, read: Callable[[], Any]) -> Any:
        """The table kept under the key, or read now; the oldest are given up for it."""
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        table = read()
        with self._lock:
            self._tables[key] = table
            while len(self._tables) > 1 and sum(kept.nbytes for kept in self._tables.values()) > self._limit:
                self._tables.popitem(last=False)
        return table

    def forget(self) -> None:
        """Gives up all of them."""
        with self._lock:
            self._tables.clear()


row_groups = _Groups(_KEPT)
