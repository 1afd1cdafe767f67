"""Exact search against sorting all similarities."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax import nearest as module
from ldm_jax.nearest import nearest


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), queries=st.integers(1, 9), rows=st.integers(4, 40), count=st.integers(1, 4))
def test_it_is_exact_whatever_the_blocks(seed: int, queries: int, rows: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    q, d = rng.normal(size=(queries, 5)), rng.normal(size=(rows, 5))
    similarity = (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (d / np.linalg.norm(d, axis=1, keepdims=True)).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_QUERIES", 4)
        patch.setattr(module, "_DATABASE", 7)
        found = nearest(q, d, count)
    assert found.shape == (queries, count) and found.dtype == np.int32
    best = np.sort(similarity, axis=1)[:, ::-1][:, :count]
    np.testing.assert_allclose(np.take_along_axis(similarity, found, axis=1), best, atol=1e-6)
    assert all(len(set(row)) == count for row in found.tolist())


def test_a_picture_is_not_its_own_neighbour() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 4))
    assert (nearest(rows, rows, 1)[:, 0] == np.arange(20)).all()
    found = nearest(rows, rows, 19, own=np.arange(20))
    assert all(set(row) == set(range(20)) - {i} for i, row in enumerate(found.tolist()))


def test_only_directions_count() -> None:
    database = np.array([[1.0, 0.1], [10.0, 0.0], [0.0, 1.0]])
    assert nearest(np.array([[5.0, 0.0]]), database, 3).tolist() == [[1, 0, 2]]


@pytest.mark.parametrize(
    ("queries", "database", "count", "message"),
    [
        (np.ones((2, 3)), np.ones((4, 2)), 1, "rows of one width"),
        (np.ones((2, 3)), np.ones((4, 3)), 5, "5 neighbours of a database of 4"),
        (np.ones((2, 3)), np.ones((4, 3)), 0, "0 neighbours"),
        (np.zeros((2, 3)), np.ones((4, 3)), 1, "zero or not finite"),
        (np.ones((2, 3)), np.full((4, 3), np.nan), 1, "zero or not finite"),
    ],
)
def test_bad_input(queries: np.ndarray, database: np.ndarray, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest(queries, database, count)
