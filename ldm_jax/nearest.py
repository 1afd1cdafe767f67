"""Exact nearest neighbours by cosine similarity, in blocks, so that memory does not grow with the data."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_QUERIES, _DATABASE = 1024, 65_536  # rows of a block of each


def nearest(queries: np.ndarray, database: np.ndarray, count: int, own: np.ndarray | None = None) -> np.ndarray:
    """The rows of a database that are most like each query, the most alike first; of equal ones the first.

    Args:
      queries: float [M,D]; only directions count.
      database: float [N,D]; may be memory-mapped.
      count: neighbours of a query, at most N, or N - 1 where each query has a row of its own.
      own: int [M], the row that is not a neighbour of each query since it is the query itself; -1 for none.

    Returns int32 [M,count]. Raises ValueError for shapes that do not fit, rows that are zero or not finite, or too few rows.
    """
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1]:
        raise ValueError(f"embeddings must be rows of one width, not {list(queries.shape)} and {list(database.shape)}")
    if not 1 <= count <= len(database) - (own is not None):
        raise ValueError(f"{count} neighbours of a database of {len(database)}")
    own = np.full(len(queries), -1) if own is None else own
    return np.concatenate(
        [_nearest(block, own[start : start + len(block)], database, count) for start, block in _blocks(queries, _QUERIES)]
    )


def _nearest(queries: np.ndarray, own: np.ndarray, database: np.ndarray, count: int) -> np.ndarray:
    best = jnp.full((len(queries), count), -jnp.inf), jnp.full((len(queries), count), -1, jnp.int32)
    unit = _unit(queries)
    for start, block in _blocks(database, _DATABASE):
        best = _merged(best, unit, _unit(block), jnp.asarray(own, jnp.int32), start)
    return np.asarray(best[1])


@partial(jax.jit, donate_argnums=0)
def _merged(
    best: tuple[jax.Array, jax.Array], queries: jax.Array, block: jax.Array, own: jax.Array, start: int
) -> tuple[jax.Array, jax.Array]:
    """The best scores and rows so far, with those of a block that begins at a row; earlier rows win among equals."""
    rows = jnp.arange(len(block), dtype=jnp.int32) + start
    scores = jnp.where(rows == own[:, None], -jnp.inf, jnp.matmul(queries, block.T, precision="highest"))
    top, places = jax.lax.top_k(scores, min(best[0].shape[1], len(block)))
    joined, among = jnp.concatenate([best[0], top], axis=1), jnp.concatenate([best[1], rows[places]], axis=1)
    values, order = jax.lax.top_k(joined, best[0].shape[1])
    return values, jnp.take_along_axis(among, order, axis=1)


def _blocks(rows: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(rows), size):
        yield start, np.asarray(rows[start : start + size], np.float32)


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.all(np.isfinite(lengths) & (lengths > 0)):
        raise ValueError("an embedding is zero or not finite")
    return rows / lengths
