"""ArrayRecord files of examples, written and read."""

import itertools
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.data.reader import CALLED, FIELDS, Reader, as_text, captions
from ldm_jax.data.records import decode_example, encode_example
from ldm_jax.data.shard_files import files_hash, find_files, place
from ldm_jax.paths import replacing

_SUFFIXES = (".array_record", ".arrayrecord", ".array_records")
WRITER_OPTIONS = "group_size:1,uncompressed"  # a random read fetches its own record, and pictures are compressed already
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # random access: no reading ahead
_READER_BUFFER = 1 << 14  # bytes


class ArrayRecordSource(Reader):
    """The examples in ArrayRecord files that `write_records` wrote, in the order of the files' names.

    Args:
        path: the folder of the files, one file, or a pattern of them.
        needs: the fields to read.

    Raises:
        UserError: there are no files, one is damaged, or its records have not what is asked for.
    """

    def __init__(self, path: str | Path, needs: Collection[str] = ()) -> None:
        super().__init__(needs)
        self.files = find_files(path, _SUFFIXES, "ArrayRecord files")
        self._readers = [_open(file) for file in self.files]
        self._ends = np.cumsum([reader.num_records() for reader in self._readers])
        if not len(self):
            raise UserError(f"data.path: the ArrayRecord files of {str(path)!r} are empty")
        held = self._held()
        if missing := [field for field in self.needs if field not in held]:
            raise UserError(
                f"data.path: the {len(self)} records in {str(path)!r} have no {CALLED[missing[0]]}, the first is {self.name(0)!r};"
                f" they hold {', '.join(held)}: write them again with it (docs/data.md)"
            )

    def _held(self) -> list[str]:
        """The entries of the records: those of the first. Raises UserError where it is not one of `write_records`."""
        try:
            first = self._record(0)
        except (OSError, ValueError):
            first = {}
        if not isinstance(first, dict) or "image" not in first:
            raise UserError(
                f"data.path: {self.files[0]} holds no examples that write_records wrote; those of TFDS are read by data.source=tfds"
            )
        return list(first)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _record(self, index: int) -> dict[str, Any]:
        file, row = place(self._ends, index)
        try:
            return decode_example(self._readers[file].read([row])[0])
        except (RuntimeError, IndexError) as error:
            raise OSError(f"record {row} of {self.files[file]} cannot be read: {error}") from error

    def read(self, index: int, fields: Collection[str]) -> dict[str, Any]:
        record = self._record(index)
        example = {field: record.get(field) for field in fields}
        if "text" in fields:
            example["text"] = as_text(captions(record.get("text")), isinstance(record.get("text"), list))
        return example

    def name(self, index: int) -> str:
        """The file and the number of the record in it."""
        file, row = place(self._ends, index)
        return f"{self.files[file].name}:{row}"

    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and modification times, and of the fields that are asked for."""
        return f"array_record-{files_hash(self.files, self.needs)}"


def _open(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path), READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)
        if reader.num_records() == 0:
            reader.close()  # raises where opening found the file damaged
    except RuntimeError as error:
        raise UserError(f"data.path: {path} is no whole ArrayRecord file; copy or write it again") from error
    return reader


def write_records(directory: str | Path, examples: Iterable[dict[str, Any]], shard_size: int = 4096) -> int:
    """Writes examples as ArrayRecord files of `shard_size` records; the directory is there once all of them are.

    Args:
        directory: to be made.
        examples: dicts with `image` (the bytes of an image file, or uint8 [H, W, 3]) and any of `text` (str or list of them), `label`,
            `boxes` [n, 5], `segmentation` and `mask` (bytes or arrays), the same in all.

    Returns:
        the number of examples.

    Raises:
        UserError: the directory is there already or cannot be made, or an example has other entries than the first.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    if Path(directory).exists():
        raise UserError(f"{directory} is there already; name a new directory for the records")
    count, rows = 0, _alike(examples)
    with replacing(Path(directory)) as root:
        for shard in itertools.count():
            first = list(itertools.islice(rows, 1))
            if not first:
                return count
            writer = ArrayRecordWriter(str(root / f"data-{shard:05d}.array_record"), WRITER_OPTIONS)
            try:
                for example in itertools.chain(first, itertools.islice(rows, shard_size - 1)):
                    writer.write(encode_example(example))
                    count += 1
            finally:
                writer.close()
    return count


def _alike(examples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The examples. Raises UserError at one that has other entries than the first."""
    form: tuple[list[str], bool] | None = None
    for index, example in enumerate(examples):
        now = sorted(example), isinstance(example.get("text"), list)
        form = form or now
        if now != form or not {"image"} <= example.keys() <= {"image", *FIELDS}:
            raise UserError(
                f"records: example {index} has {', '.join(now[0])}, the first {', '.join(form[0])}; all must have the same of"
                f" {', '.join(FIELDS)} beside image, and text be a list in all or none"
            )
        yield example
