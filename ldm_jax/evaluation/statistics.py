"""Mean and covariance of many rows, gathered in float64 as they come, in parts that are joined."""

from collections.abc import Iterable

import numpy as np

from ldm_jax.evaluation.stored import Gaussian


class Moments:
    """Number, mean and scatter (the sum of centred outer products) of the rows added so far.

    Parts are joined as in Chan et al. 1979, which subtracts no large numbers from each other: with rows far from zero, sums of squares
    would lose the digits that the Fréchet distance is made of.
    """

    def __init__(self, width: int) -> None:
        self.number, self.mean, self.scatter = 0, np.zeros(width), np.zeros((width, width))

    def add(self, rows: np.ndarray) -> None:
        """Takes rows [n,d] of any float type."""
        rows = np.asarray(rows, np.float64)
        if not len(rows):
            return
        mean = rows.mean(0)
        centred = rows - mean
        self._join(len(rows), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Takes the rows of another."""
        self._join(other.number, other.mean, other.scatter)

    def _join(self, number: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.number + number
        if not total:
            return
        apart = mean - self.mean
        self.mean = self.mean + apart * (number / total)
        self.scatter += scatter
        self.scatter += np.outer(apart * (self.number * number / total), apart)
        self.number = total

    def gaussian(self) -> Gaussian:
        """With the unbiased covariance. Raises ValueError for fewer than two rows."""
        if self.number < 2:
            raise ValueError(f"{self.number} rows have no covariance")
        return Gaussian(self.number, self.mean, self.scatter / (self.number - 1))


def gaussian_of(parts: Iterable[np.ndarray]) -> Gaussian:
    """Of rows that come in parts [n,d], one part in memory at a time. Raises ValueError for fewer than two rows."""
    moments = None
    for rows in parts:
        moments = moments or Moments(rows.shape[1])
        moments.add(rows)
    if moments is None:
        raise ValueError("no rows have no covariance")
    return moments.gaussian()
