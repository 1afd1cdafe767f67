"""In which order examples are read: pure functions of (seed, position), so that a run goes on from any step without a history."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Bucket(NamedTuple):
    """The examples start ... stop - 1 of a source, whose pictures are [height, width]."""

    height: int
    width: int
    start: int
    stop: int

    @property
    def number(self) -> int:
        return self.stop - self.start


def turn(buckets: Sequence[Bucket], batch_size: int, seed: int, step: int, shuffle: bool) -> tuple[Bucket, int]:
    """The bucket that the batch of a step is of, and how many batches of that bucket came before.

    In a cycle each bucket has as many turns as it fills batches, rounded but never none; their order is another in each cycle.
    """
    ends = np.cumsum([max(1, round(bucket.number / batch_size)) for bucket in buckets])
    cycle, place = divmod(step, int(ends[-1]))
    if shuffle:
        place = int(permuted(np.array([place]), np.array([cycle]), int(ends[-1]), seed)[0])
    chosen = int(np.searchsorted(ends, place, side="right"))
    first = int(ends[chosen - 1]) if chosen else 0
    return buckets[chosen], cycle * (int(ends[chosen]) - first) + place - first


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
