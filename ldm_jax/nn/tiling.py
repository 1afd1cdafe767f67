"""Networks on maps far larger than memory allows at once: overlapping windows of one shape, one after another, blended where they overlap.

Positions are counted in *cells*, the coarsest grid that all arrays share: latent positions for autoencoders and denoisers. An array of a
window may have several values a cell along each axis (an image has the autoencoder's factor).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Of the distance to a window's border in the weights. Values next to the border lack their surroundings and should hardly count (at 1 they
# make most of the error of a decoder with the right statistics), but with a large power the transition becomes a cut.
_POWER = 3


@dataclass(frozen=True)
class Tiling:
    """How large maps are cut.

    Attributes:
      size: cells of a window along each axis; maps that are not larger are one window.
      overlap: cells that neighbours share, at least.

    Raises ValueError at construction.
    """

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise ValueError(f"windows of {self.size} cannot overlap by {self.overlap}: give 0 <= overlap < size")


class Axis(NamedTuple):
    """Windows along an axis of `length` cells: where they start, int [n], and how many cells each has."""

    starts: np.ndarray
    size: int
    length: int

    def weights(self, factor: int) -> np.ndarray:
        """How much window i counts at its j-th value, float64 [n, size * factor] in [0, 1], with `factor` values a cell.

        At each position of the axis the weights of all windows that cover it sum to one. They fall towards a window's borders, but not
        towards those of the whole axis, where no neighbour takes over.
        """
        inside = np.arange(self.size * factor) + 0.5
        left = np.where(self.starts[:, None] > 0, inside, np.inf)
        right = np.where(self.starts[:, None] + self.size < self.length, inside[::-1], np.inf)
        nearest = np.minimum(np.minimum(left, right), self.size * factor)  # any bound above half of the size
        at = (self.starts * factor)[:, None] + np.arange(self.size * factor)
        powers = nearest**_POWER
        total = np.zeros(self.length * factor)
        np.add.at(total, at, powers)
        return powers / total[at]


def axis(length: int, tiling: Tiling) -> Axis:
    """The fewest windows that cover `length` cells, spread evenly."""
    size = min(tiling.size, length)
    gaps = -(-(length - size) // (tiling.size - tiling.overlap))
    return Axis(np.round(np.linspace(0, length - size, gaps + 1)).astype(np.int32), size, length)


class Windows(NamedTuple):
    """Windows over a map of [h, w] cells."""

    rows: Axis
    columns: Axis

    @property
    def corners(self) -> np.ndarray:
        """The first row and column of each window, int [n, 2]."""
        return np.stack(np.meshgrid(self.rows.starts, self.columns.starts, indexing="ij"), -1).reshape(-1, 2)

    def weights(self, factor: int) -> tuple[np.ndarray, np.ndarray]:
        """Of rows and of columns, float64 [n, size * factor] each; a window's weight at a position is their product."""
        rows, columns = self.rows.weights(factor), self.columns.weights(factor)
        return np.repeat(rows, len(columns), axis=0), np.tile(columns, (len(rows), 1))

    def factor(self, x: Array) -> int:
        """Values a cell of an array [B, h * factor, w * factor, C]."""
        factor = x.shape[1] // self.rows.length
        if x.shape[1:3] != (self.rows.length * factor, self.columns.length * factor):
            raise ValueError(f"an array of {x.shape[1]}x{x.shape[2]} does not lie on {self.rows.length}x{self.columns.length} cells")
        return factor

    def cut(self, x: Array, corner: Array) -> Array:
        """The window at `corner` of x [B, h * factor, w * factor, C]."""
        factor = self.factor(x)
        sizes = (x.shape[0], self.rows.size * factor, self.columns.size * factor, x.shape[3])
        return jax.lax.dynamic_slice(x, (0, corner[0] * factor, corner[1] * factor, 0), sizes)


def windows(height: int, width: int, tiling: Tiling) -> Windows:
    return Windows(axis(height, tiling), axis(width, tiling))


def blended(function: Callable[[Any], Array], x: Any, over: Windows) -> Array:
    """`function` of each window, blended.

    Args:
      function: of a window of x to [B, a, b, C], with a whole number of values a cell.
      x: one array [B, h * factor, w * factor, C], or a tree of such arrays, that are cut together.

    Returns [B, h * factor', w * factor', C], in at least float32. Besides x and it, memory holds one window's work.
    """

    def cut(corner: Array) -> Any:
        return jax.tree.map(lambda a: over.cut(a, corner), x)

    corners = jnp.asarray(over.corners)
    example = jax.eval_shape(lambda corner: function(cut(corner)), corners[0])
    factor, wide = example.shape[1] // over.rows.size, jnp.promote_types(example.dtype, jnp.float32)
    shape = (example.shape[0], over.rows.length * factor, over.columns.length * factor, example.shape[3])

    def add(total: Array, window: tuple[Array, Array, Array]) -> tuple[Array, None]:
        corner, rows, columns = window
        y = function(cut(corner)).astype(wide) * rows[:, None, None] * columns[:, None]
        at = (0, corner[0] * factor, corner[1] * factor, 0)
        return jax.lax.dynamic_update_slice(total, jax.lax.dynamic_slice(total, at, y.shape) + y, at), None

    rows, columns = (jnp.asarray(weights, wide) for weights in over.weights(factor))
    return jax.lax.scan(add, jnp.zeros(shape, wide), (corners, rows, columns))[0]


def tiled_denoise(denoise: Callable[..., Array], tiling: Tiling) -> Callable[..., Array]:
    """A denoiser of large latents from one of small: `denoise(x_t, t, condition)` on windows of [B,h,w,c], blended.

    Of the condition, what is joined to the latents ("concat", [B,h,w,c']) is cut as they are; each window sees the rest whole. The sampler
    sees one smooth field, so that neighbours agree on what they share (Bar-Tal et al. 2023, section 4).
    """

    def whole(x_t: Array, t: Array, condition: Mapping[str, Array]) -> Array:
        over = windows(x_t.shape[1], x_t.shape[2], tiling)
        local = {"concat": condition["concat"]} if "concat" in condition else {}
        return blended(lambda cut: denoise(cut[0], t, {**condition, **cut[1]}), (x_t, local), over)

    return whole
