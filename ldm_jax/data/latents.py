"""The latent cache: moments of the first stage in ArrayRecord shards, keyed by a fingerprint, safe to kill at any time.

A shard is written under a temporary name, synchronised to disk and renamed, so a final name always means a whole shard
unless the disk itself lost data, which opening the shard shows: ArrayRecord keeps its index at the end of the file.
The marker `COMPLETE` is written last, and nothing reads a cache without it.

Records are uncompressed and one to a group: float32 moments hardly compress, and a random read then fetches only its
own record. ArrayRecord knows file systems only: on object storage a shard is written on the local disk and put there whole,
and each machine copies all of them before it reads (`local_shards`).
"""

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from ldm_jax import paths
from ldm_jax.data.array_record import READER_OPTIONS, WRITER_OPTIONS
from ldm_jax.data.local_shards import local_shards
from ldm_jax.data.order import Bucket
from ldm_jax.data.records import decode_example, encode_example
from ldm_jax.errors import UserError, first_line

FORMAT_VERSION = 1
MARKER = "COMPLETE"
HEADER = "cache.json"
_SUFFIX = ".array_record"

_ABANDONED = 3600  # seconds after which a shard that is not complete has no writer any more
_READER_BUFFER = 1 << 12  # bytes; less than a record, so that a random read fetches its record alone


def cache_fingerprint(**parts: Any) -> str:
    """16 hexadecimal digits that change with any of the parts, or with the format of the cache.

    Args:
        **parts: JSON values that decide what the cache holds: hash of the first stage's weights, fingerprint of the
            source, resolution, flips.
    """
    canonical = json.dumps({"format": FORMAT_VERSION, **parts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def weights_fingerprint(tree: Any) -> str:
    """16 hexadecimal digits of the paths, dtypes, shapes and bytes of a tree of arrays (nested mappings and sequences)."""
    digest = hashlib.sha256()
    for path, leaf in _leaves(tree, ()):
        array = np.asarray(leaf)
        digest.update(json.dumps([path, array.dtype.name, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, Mapping):
        children = sorted((str(key), value) for key, value in tree.items())
    elif isinstance(tree, list | tuple):
        children = [(str(index), value) for index, value in enumerate(tree)]
    else:
        yield path, tree
        return
    for key, child in children:
        yield from _leaves(child, (*path, key))


def is_complete(directory: str | Path, fingerprint: str) -> bool:
    """Whether the directory holds a finished cache with this fingerprint."""
    meta = _read_json(paths.resolve(directory) / MARKER)
    return meta is not None and meta.get("fingerprint") == fingerprint


def begin(directory: str | Path, meta: dict[str, Any], num_examples: int, shard_size: int = 4096) -> dict[str, Any]:
    """The header of a cache: the one that is there, or one that is written now. To be called by one host alone.

    Args:
        directory: of the cache, on a file system or gs://; made where it is missing.
        meta: JSON values kept with the cache; `fingerprint` is required, `flips` (False) says that each example is
            stored twice, as it is and mirrored.
        num_examples: examples of the source.
        shard_size: examples in a shard of a cache that is begun now; one that was begun before keeps its own.

    Raises:
        UserError: the directory holds another cache, or cannot be written.
    """
    root = paths.resolve(directory)
    made = {**meta, "num_examples": num_examples, "flips": meta.get("flips", False), "format": FORMAT_VERSION}
    with _reporting_disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
    header = _read_json(root / HEADER)
    if header is None:
        header = made | {"shard_size": shard_size, "num_shards": -(-num_examples // shard_size)}
        paths.write_json(root / HEADER, header)
    elif header.get("fingerprint") != meta["fingerprint"]:
        raise _stale(root, header.get("fingerprint"), meta["fingerprint"])
    elif different := sorted(name for name, value in made.items() if header.get(name) != value):
        name = different[0]
        raise UserError(
            f"the latent cache {root} was begun with {name}={header.get(name)}, and now it is {made[name]}: give another data.latents or"
            " delete it"
        )
    return header


class CacheWriter:
    """Writes a cache shard by shard; run again after a stop, it writes only what is missing.

    Every host makes a writer with the `header` that one of them has from `begin`, writes the shards that `missing_shards` gives it, and
    after all hosts are done one of them calls `finish`.
    """

    def __init__(self, directory: str | Path, header: dict[str, Any]) -> None:
        self.directory, self.meta = paths.resolve(directory), header
        self.views = 2 if header["flips"] else 1
        self.num_examples, self.shard_size, self.num_shards = (header[name] for name in ("num_examples", "shard_size", "num_shards"))

    def examples(self, shard: int) -> range:
        """Indices of the examples that a shard holds."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_examples))

    def missing_shards(self, process_index: int = 0, process_count: int = 1) -> list[int]:
        """Shards that this host has to write: of p, p + P, p + 2P, ... those that are not there or not whole."""
        own, there = range(process_index, self.num_shards, process_count), set(paths.names(self.directory))
        return [shard for shard in own if self._path(shard).name not in there or not self._is_whole(shard)]

    def _path(self, shard: int) -> Any:
        return _shard_path(self.directory, shard, self.num_shards)

    def _is_whole(self, shard: int) -> bool:
        """Of a shard that is there. Object storage has whole ones only."""
        path = self._path(shard)
        return paths.is_remote(path) or _count_records(path) == len(self.examples(shard)) * self.views

    @contextmanager
    def shard(self, shard: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """Gives a function that adds one example, in the order of `examples(shard)`, and commits the shard at the end.

        An example holds raw `moments`, [h, w, 2c] (mean, log-variance) or, where they are the latents, [h, w, c], beside the
        entries of its source; its `image` is not stored. Where the cache has flips, each example is followed by its mirrored view.

        Raises:
            UserError: no space left, or the directory cannot be written; nothing is left under the final name.
            ValueError: the number of examples added is not the shard's.
        """
        final = self._path(shard)
        temporary = paths.temporary_for(final)
        with _reporting_disk_errors(self.directory), _removed_on_error(temporary):
            writer = ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
            added = 0

            def add(example: Mapping[str, Any]) -> None:
                nonlocal added
                writer.write(encode_example({key: value for key, value in example.items() if key != "image"}))
                added += 1

            try:
                yield add
            finally:
                writer.close()
            expected = len(self.examples(shard)) * self.views
            if added != expected:
                raise ValueError(f"shard {shard} takes {expected} examples (views included), {added} were added")
            paths.commit(temporary, final)

    def finish(self, missing: Sequence[int] | None = None) -> None:
        """Marks the cache as complete, and removes what killed writers left: what another run is writing just now is younger.

        Args:
            missing: the shards that are, as each host has found of its own; None: looked for here, where other hosts' may not be seen yet.

        Raises:
            ValueError: shards are missing.
        """
        missing = self.missing_shards() if missing is None else missing
        if missing:
            raise ValueError(f"{self.directory}: {len(missing)} shards are not written, the first is {missing[0]}")
        for leftover in [] if paths.is_remote(self.directory) else Path(self.directory).glob(".*.tmp"):
            if time.time() - leftover.stat().st_mtime > _ABANDONED:
                leftover.unlink(missing_ok=True)
        paths.write_json(self.directory / MARKER, self.meta)


class LatentCache:
    """A finished cache as a source: `cache[i]` is the example i with `moments` [h, w, 2c] or [h, w, c] in place of `image`.

    `meta` is what the writer kept; `mirrored` says that both views of each example are there, for `read`; `buckets` is empty where all
    pictures have one size. One on object storage is first copied to a folder under `copies` (see `local_shards`).

    Raises:
        UserError: the cache is incomplete, its fingerprint is not the one asked for, or the copy cannot be made.
    """

    def __init__(self, directory: str | Path, fingerprint: str, copies: str = "") -> None:
        self.directory = paths.resolve(directory)
        meta = _read_json(self.directory / MARKER)
        if meta is None:
            raise UserError(f"the latent cache {self.directory} is not complete; run the encoding again to finish it")
        if meta["fingerprint"] != fingerprint:
            raise _stale(self.directory, meta["fingerprint"], fingerprint)
        self.meta = meta
        self.mirrored: bool = meta["flips"]
        self.buckets = [Bucket(*bucket) for bucket in meta.get("buckets", ())]
        self._views = 2 if self.mirrored else 1
        self._folder = local_shards(self.directory, _SUFFIX, copies)
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.meta["num_examples"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return self.read(indices)

    def read(self, indices: Sequence[int] | np.ndarray, flips: np.ndarray | None = None) -> list[dict[str, Any]]:
        """Examples in the order of the indices, with one read a shard.

        Args:
            indices: [n], in [0, len).
            flips: bool [n], True for the mirrored view; None for no flips. Only where `mirrored`.

        Raises:
            IndexError: an index out of range.
            UserError: a shard that is damaged or gone.
        """
        examples = np.asarray(indices, np.int64)
        if examples.size and not (examples.min() >= 0 and examples.max() < len(self)):
            raise IndexError(f"index out of range: the cache holds {len(self)} examples")
        shards, offsets = np.divmod(examples, self.meta["shard_size"])
        offsets = offsets * self._views + (0 if flips is None else flips)
        found: list[Any] = [None] * len(examples)
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard).tolist()
            for place, record in zip(places, self._read_shard(shard, offsets[places].tolist()), strict=True):
                found[place] = decode_example(record)
        return found

    def _read_shard(self, shard: int, offsets: list[int]) -> list[bytes]:
        path = _shard_path(self._folder, shard, self.meta["num_shards"])
        try:
            with self._lock:
                if shard not in self._readers:
                    self._readers[shard] = _open(path)
                reader = self._readers[shard]
            return reader.read(offsets)
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"the latent cache's shard {path} cannot be read ({first_line(error)}); delete it and the file "
                f"{self.directory / MARKER}, and run the encoding again"
            ) from error

    def fingerprint(self) -> str:
        """The fingerprint that the cache was written with."""
        return self.meta["fingerprint"]


def _shard_path(directory: Any, shard: int, num_shards: int) -> Any:
    return directory / f"shard-{shard:05d}-of-{num_shards:05d}{_SUFFIX}"


def _open(path: Any) -> ArrayRecordReader:
    return ArrayRecordReader(str(path), READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER)


def _count_records(path: Any) -> int:
    """Records of a shard; -1 where its index is damaged."""
    try:
        reader = _open(path)
        count = reader.num_records()
        reader.close()  # raises where opening found the file damaged
    except RuntimeError:
        return -1
    return count


def _stale(directory: Any, found: str | None, wanted: str) -> UserError:
    return UserError(
        f"the latent cache {directory} was made from other weights, data or settings (fingerprint {found}, wanted "
        f"{wanted}); give another data.latents or delete it"
    )


def _read_json(path: Any) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove {path.parent} and encode again") from error


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    """Leaves no temporary file behind where the block fails; after a commit there is none."""
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _reporting_disk_errors(directory: Any) -> Iterator[None]:
    """Turns a full disk and forbidden writing into one line. ArrayRecord reports both as RuntimeError."""
    full, forbidden = os.strerror(errno.ENOSPC), os.strerror(errno.EACCES)
    try:
        yield
    except (OSError, RuntimeError) as error:
        if full in str(error):
            raise UserError(f"no space left for the latent cache in {directory}; free some or move data.latents") from error
        if forbidden in str(error) or isinstance(error, FileExistsError | NotADirectoryError):
            raise UserError(f"the latent cache cannot be written in {directory}: {first_line(error)}") from error
        raise
