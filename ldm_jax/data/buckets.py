"""Aspect-ratio buckets: pictures at a few fixed sizes, each at the one nearest to its own shape, and batches of one size."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm_jax.data.kept import kept
from ldm_jax.data.order import Bucket
from ldm_jax.data.pipeline import read_ahead
from ldm_jax.data.reliable import Layer
from ldm_jax.data.transforms import fit

Size = Sequence[int]  # height, width


class Bucketed(Layer):
    """A source in the order of its buckets, each picture with its maps fitted to the size of its own (`transforms.fit`).

    Args:
        below: examples of any sizes.
        sizes: (height, width) of the buckets, in pixels.
        least: a bucket of fewer pictures is left out, theirs going to the nearest of the others; the size of a batch.
        directory: where the sizes of the pictures are kept, read once from the heads of their files.
        workers: threads that read them.
    """

    def __init__(self, below: Any, sizes: Sequence[Size], least: int, directory: Path, workers: int) -> None:
        super().__init__(below)
        path = directory / f"sizes-{below.fingerprint()}.npy"
        self._order, self._buckets = arrange(kept(path, lambda: picture_sizes(below, workers)), sizes, least)
        self._sizes = np.repeat([bucket[:2] for bucket in self._buckets], [bucket.number for bucket in self._buckets], axis=0)

    @property
    def buckets(self) -> list[Bucket]:
        return self._buckets

    def __getitem__(self, index: int) -> dict[str, Any]:
        height, width = self._sizes[index].tolist()
        return fit(self.below[int(self._order[index])], height, width)

    def caption(self, index: int) -> Any:
        return super().caption(int(self._order[index]))

    def name(self, index: int) -> str:
        return super().name(int(self._order[index]))

    def size(self, index: int) -> tuple[int, int]:
        height, width = self._sizes[index].tolist()
        return height, width

    def fingerprint(self) -> str:
        """That of the source below, with the buckets."""
        return "-".join([self.below.fingerprint(), *(f"{b.number}of{b.height}x{b.width}" for b in self._buckets)])


def picture_sizes(source: Any, workers: int) -> np.ndarray:
    """Height and width of every picture of a source, int32 [N,2], with a progress bar."""
    indices = tqdm(range(len(source)), desc="sizes of pictures", unit="image", mininterval=5)
    with closing(read_ahead(Layer(source).size, indices, max(workers, 1), 64)) as sizes:
        return np.array(list(sizes), np.int32)


def arrange(pictures: np.ndarray, sizes: Sequence[Size], least: int) -> tuple[np.ndarray, list[Bucket]]:
    """Which picture comes where when each goes to the bucket with the nearest ratio of sides, and the buckets, in the order of `sizes`.

    Nearest in the logarithm, so that 1:2 is as far from 1:1 as 2:1 is; of equals the first. While a bucket has fewer pictures than `least`,
    the smallest is left out, but never the last.

    Args:
        pictures: heights and widths, int [N,2].
        sizes: heights and widths of the buckets.
        least: pictures a bucket has.

    Returns:
        int64 [N], a permutation, in which the pictures of a bucket keep their order; and the buckets, which cover [0, N).
    """
    left = [tuple(size) for size in sizes]
    while True:
        nearest = np.abs(_log_ratio(pictures)[:, None] - _log_ratio(np.array(left))).argmin(axis=1)
        counts = np.bincount(nearest, minlength=len(left))
        if counts.min() >= least or len(left) == 1:
            break
        del left[int(counts.argmin())]
    stops = np.cumsum(counts).tolist()
    buckets = [Bucket(height, width, stop - count, stop) for (height, width), stop, count in zip(left, stops, counts.tolist(), strict=True)]
    return np.argsort(nearest, kind="stable"), buckets


def _log_ratio(sizes: np.ndarray) -> np.ndarray:
    return np.log(sizes[:, 0] / sizes[:, 1])
