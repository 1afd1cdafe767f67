"""Batches whose content is a pure function of (seed, step).

The step, not an iterator's history, says which examples a batch holds, so a run goes on anywhere, on any number of
hosts, and nothing about the data needs to be saved.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from ldm_jax.config import UserError
from ldm_jax.data.derive import Derived
from ldm_jax.data.reader import Source
from ldm_jax.data.transforms import mirror

Batch = dict[str, Any]

RAGGED_KEYS = ("boxes",)
"""Entries that stay a list, one array an example, because their lengths differ."""

Derivation = Callable[[dict[str, Any], int, int], dict[str, Any]]  # (example, seed, position in the order) -> example


class Batches:
    """Batches of a source in an order that (seed, step) alone decides.

    Every epoch is a new permutation of the source; a batch may straddle two epochs, so no example is left out.

    Args:
        source: examples; where it has `__getitems__(indices)`, a batch is read in one call. A source with a true
            attribute `mirrored` stores both views of each example and is asked for `read(indices, flips)`.
        batch_size: examples in the global batch.
        seed: of the order and of the flips.
        process_index: this host, of
        process_count: hosts, each of which reads its contiguous share of the rows of the global batch.
        derive: applied to each example after mirroring, and after what a `Derived` source draws for it, in order.
        transform: applied to each stacked batch in the worker thread (tokenising, say).
        shuffle: False reads in the order of the source.
        flip: mirrors each example with probability 1/2, a pure function of (seed, position in the order).
        workers: threads that read ahead; decoding, resizing and reading release the interpreter lock.
        prefetch: batches that are ready or being read ahead of the one in use.

    Raises:
        UserError: the batch does not divide among the hosts, or a latent cache without mirrored views is to be flipped.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        derive: Sequence[Derivation] = (),
        transform: Callable[[Batch], Batch] | None = None,
        shuffle: bool = True,
        flip: bool = False,
        workers: int = 2,
        prefetch: int = 2,
    ) -> None:
        if batch_size % process_count:
            raise UserError(f"the global batch of {batch_size} examples does not divide among {process_count} hosts")
        if flip and not getattr(source, "mirrored", True):
            raise UserError("data.flip: the latent cache holds no mirrored views; encode again with flips")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._share = slice(*(batch_size * p // process_count for p in (process_index, process_index + 1)))
        self._below = source.below if isinstance(source, Derived) else source
        self._derive: Sequence[Derivation] = (source.derive, *derive) if isinstance(source, Derived) else derive
        self._transform, self._shuffle, self._flip = transform, shuffle, flip
        self._workers, self._prefetch = max(workers, 1), max(prefetch, 1)

    def _positions(self, step: int) -> np.ndarray:
        return step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)

    def indices(self, step: int) -> np.ndarray:
        """Source indices of the global batch of a step, int64 [batch_size]."""
        epochs, offsets = np.divmod(self._positions(step), len(self.source))
        if not self._shuffle:
            return offsets
        return permuted(offsets, epochs, len(self.source), self.seed)

    def batch(self, step: int) -> Batch:
        """This host's share of the batch of a step: stacked arrays, lists of str, lists of ragged arrays."""
        indices, positions = self.indices(step)[self._share], self._positions(step)[self._share]
        flips = coin_flips(self.seed, positions) if self._flip else np.zeros(len(indices), bool)
        examples = read_examples(self._below, indices, flips)
        for derive in self._derive:
            examples = [derive(example, self.seed, int(position)) for example, position in zip(examples, positions, strict=True)]
        batch = stack(examples)
        return batch if self._transform is None else self._transform(batch)

    def iterate(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yields batch(start_step), batch(start_step + 1), ... for ever, read ahead by threads that end with it."""
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="batches")
        pending: deque[Future[Batch]] = deque()
        step = start_step
        try:
            while True:
                while len(pending) <= self._prefetch:
                    pending.append(pool.submit(self.batch, step))
                    step += 1
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def permuted(offsets: np.ndarray, epochs: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Where the permutation of each epoch sends each offset; every epoch of every seed has its own permutation.

    Args:
        offsets: int [n], places within an epoch, in [0, size).
        epochs: int [n].
        size: length of an epoch, at most 2**32.
        seed: of the order.

    Returns:
        int64 [n] in [0, size).
    """
    from grain.experimental import index_shuffle  # importing grain takes a second

    # The hash keeps epoch 1 of seed 0 apart from epoch 0 of seed 1.
    seeds = {epoch: int(np.random.SeedSequence([seed, int(epoch)]).generate_state(1)[0]) for epoch in np.unique(epochs)}
    shuffled = [
        index_shuffle(int(offset), max_index=size - 1, seed=seeds[epoch], rounds=4) for offset, epoch in zip(offsets, epochs, strict=True)
    ]
    return np.array(shuffled, np.int64)


def coin_flips(seed: int, positions: np.ndarray) -> np.ndarray:
    """Fair coins, bool [n], a pure function of (seed, position): the top bit of the SplitMix64 hash."""
    key = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    z = key + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(63)).astype(bool)


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
