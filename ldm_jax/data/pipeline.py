"""Batches whose content is a pure function of (seed, step).

The step, not an iterator's history, says which examples a batch holds, so a run goes on anywhere, on any number of
hosts, and nothing about the data needs to be saved.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.data.derive import Derived
from ldm_jax.data.order import coin_flips, permuted, turn
from ldm_jax.data.reader import Source
from ldm_jax.data.transforms import mirror

Batch = dict[str, Any]
Item = TypeVar("Item")
Read = TypeVar("Read")

RAGGED_KEYS = ("boxes",)
"""Entries that stay a list, one array an example, because their lengths differ."""

Derivation = Callable[[dict[str, Any], int, int], dict[str, Any]]  # (example, seed, position in the order) -> example


class Batches:
    """Batches of a source in an order that (seed, step) alone decides.

    Every epoch is a new permutation of the source; a batch may straddle two epochs, so no example is left out. Where the source has
    `buckets`, a batch is of one of them, the turns being shared out by `order.turn`, and each bucket has epochs of its own.

    Args:
        source: examples; where it has `__getitems__(indices)`, a batch is read in one call. A source with a true
            attribute `mirrored` stores both views of each example and is asked for `read(indices, flips)`.
        batch_size: examples in the global batch.
        seed: of the order and of the flips.
        rows: those of the global batch that this host reads, ascending; None: all.
        derive: applied to each example after mirroring, and after what a `Derived` source draws for it, in order.
        transform: applied to each stacked batch in the worker thread (tokenising, say).
        shuffle: False reads in the order of the source.
        flip: mirrors each example with probability 1/2, a pure function of (seed, position in the order).
        workers: threads that read ahead; decoding, resizing and reading release the interpreter lock.
        prefetch: batches that are ready or being read ahead of the one in use; at least one for each thread.

    Raises:
        UserError: a latent cache without mirrored views is to be flipped.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        rows: Sequence[int] | np.ndarray | None = None,
        derive: Sequence[Derivation] = (),
        transform: Callable[[Batch], Batch] | None = None,
        shuffle: bool = True,
        flip: bool = False,
        workers: int = 2,
        prefetch: int = 2,
    ) -> None:
        if flip and not getattr(source, "mirrored", True):
            raise UserError("data.flip: the latent cache holds no mirrored views; encode again with flips")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._buckets = getattr(source, "buckets", None)
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
        self._below = source.below if isinstance(source, Derived) else source
        self._derive: Sequence[Derivation] = (source.derive, *derive) if isinstance(source, Derived) else derive
        self._transform, self._shuffle, self._flip = transform, shuffle, flip
        self._workers, self._prefetch = max(workers, 1), max(prefetch, workers, 1)

    def _positions(self, step: int) -> np.ndarray:
        return step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)

    def indices(self, step: int) -> np.ndarray:
        """Source indices of the global batch of a step, int64 [batch_size]."""
        first, count, nth = 0, len(self.source), step
        if self._buckets:
            bucket, nth = turn(self._buckets, self.batch_size, self.seed, step, self._shuffle)
            first, count = bucket.start, bucket.number
        epochs, offsets = np.divmod(self._positions(nth), count)
        return first + (permuted(offsets, epochs, count, self.seed) if self._shuffle else offsets)

    def batch(self, step: int) -> Batch:
        """This host's share of the batch of a step: stacked arrays, lists of str, lists of ragged arrays."""
        indices, positions = self.indices(step)[self._rows], self._positions(step)[self._rows]
        flips = coin_flips(self.seed, positions) if self._flip else np.zeros(len(indices), bool)
        examples = read_examples(self._below, indices, flips)
        for derive in self._derive:
            examples = [derive(example, self.seed, int(position)) for example, position in zip(examples, positions, strict=True)]
        batch = stack(examples)
        return batch if self._transform is None else self._transform(batch)

    def iterate(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yields batch(start_step), batch(start_step + 1), ... for ever, read ahead by threads that end with it."""
        return read_ahead(self.batch, itertools.count(start_step), self._workers, self._prefetch)


def read_ahead(read: Callable[[Item], Read], items: Iterable[Item], workers: int, ahead: int) -> Generator[Read, None, None]:
    """Yields read(item) of each item in order, read by threads that end with it; `ahead` are ready or being read besides the one in use."""
    pool, rest = ThreadPoolExecutor(workers, thread_name_prefix="reader"), iter(items)
    pending: deque[Future[Read]] = deque()
    try:
        while True:
            pending.extend(pool.submit(read, item) for item in itertools.islice(rest, ahead + 1 - len(pending)))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_examples(source: Any, indices: np.ndarray, flips: np.ndarray) -> list[dict[str, Any]]:
    """Examples of a source, those with a true flip mirrored (or read from where their mirrored view is stored)."""
    if getattr(source, "mirrored", False):
        return source.read(indices, flips)
    read = getattr(source, "__getitems__", lambda wanted: [source[index] for index in wanted])
    examples = read(indices.tolist())
    return [mirror(example) if flip else example for example, flip in zip(examples, flips, strict=True)]


def stack(examples: list[dict[str, Any]]) -> Batch:
    """One batch of examples: numbers and arrays are stacked (int32, float32), texts, lists of texts and `RAGGED_KEYS` stay lists.

    Raises:
        UserError: examples with different entries, or arrays of different shapes under one key.
    """
    keys = examples[0].keys()
    if any(example.keys() != keys for example in examples):
        raise UserError(f"data: examples differ in their entries: {sorted({tuple(sorted(e)) for e in examples})}")
    return {key: _stack_values(key, [example[key] for example in examples]) for key in keys}


def _stack_values(key: str, values: list[Any]) -> Any:
    if key in RAGGED_KEYS or isinstance(values[0], str | list):
        return values
    arrays = [np.asarray(value) for value in values]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise UserError(f"data: {key!r} has different shapes in one batch, {sorted(shapes)}; crop to one resolution")
    stacked = np.stack(arrays)
    narrow = {np.dtype(np.int64): np.int32, np.dtype(np.float64): np.float32}
    return stacked.astype(narrow.get(stacked.dtype, stacked.dtype), copy=False)
