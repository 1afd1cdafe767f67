"""The table of classes, and the rescaler of maps against bilinear interpolation as torch defines it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.nn.embedders import ClassEmbedder, SpatialRescaler


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- ClassEmbedder ---


def test_a_class_is_a_row_of_the_table() -> None:
    table, labels = normal(5, 3), np.array([4, 0, 4, 2], np.int32)
    found = ClassEmbedder(5, 3).apply({"params": {"embedding": table}}, labels)
    np.testing.assert_array_equal(found, table[labels])


def test_only_the_rows_that_are_read_learn() -> None:
    """The row of "no class", the last one here, learns from dropped labels like any other from its own."""
    table, weights, labels = normal(5, 3), normal(4, 3, seed=1), np.array([4, 0, 4, 2], np.int32)
    gradient = jax.grad(lambda t: (ClassEmbedder(5, 3).apply({"params": {"embedding": t}}, labels) * weights).sum())(table)
    expected = np.zeros_like(table)
    np.add.at(expected, labels, weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    assert not gradient[1].any() and not gradient[3].any() and gradient[4].any()


@pytest.mark.parametrize("stddev", [1.0, 0.02])
def test_the_untrained_table_is_normal(stddev: float) -> None:
    table = np.asarray(ClassEmbedder(200, 300, stddev).init(jax.random.key(0), jnp.zeros(1, jnp.int32))["params"]["embedding"])
    assert table.shape == (200, 300) and table.dtype == np.float32
    np.testing.assert_allclose([table.mean() / stddev, table.std() / stddev], [0, 1], atol=0.02)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_embeddings_are_of_the_compute_type(dtype: Any) -> None:
    table = normal(5, 3)
    found = ClassEmbedder(5, 3, dtype=dtype).apply({"params": {"embedding": table}}, np.array([1], np.int32))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, jnp.asarray(table[1:2], dtype))


# --- SpatialRescaler ---


def bilinear(x: np.ndarray, factor: float) -> np.ndarray:
    """[H,W,C] at `factor` times the size, as torch's `interpolate(scale_factor=factor, mode="bilinear", align_corners=False)`.

    The centre of pixel i of the result lies at (i + 0.5) / factor - 0.5 of the source, which is 0 at the centre of its first pixel; what
    lies outside is the edge.
    """

    def matrix(size: int) -> np.ndarray:
        rows = np.zeros((int(size * factor), size))
        for i, row in enumerate(rows):
            place = max((i + 0.5) / factor - 0.5, 0.0)
            left = int(place)
            row[left] += 1 - (place - left)
            row[min(left + 1, size - 1)] += place - left
        return rows

    return np.einsum("ih,jw,hwc->ijc", matrix(x.shape[0]), matrix(x.shape[1]), x.astype(np.float64))


@settings(deadline=None, max_examples=20)
@given(stages=st.integers(0, 3), height=st.integers(1, 3), width=st.integers(1, 3), channels=st.integers(1, 4), features=st.integers(1, 4))
def test_the_rescaler_is_bilinear_interpolation_and_a_map_of_channels(
    stages: int, height: int, width: int, channels: int, features: int
) -> None:
    x, kernel = normal(2, height * 2**stages, width * 2**stages, channels), normal(channels, features, seed=1)
    found = SpatialRescaler(stages, features).apply({"params": {"channel_mapper": {"kernel": kernel}}}, x)
    assert found.shape == (2, height, width, features)
    for image, rescaled in zip(x, np.asarray(found), strict=True):
        for _ in range(stages):
            image = bilinear(image, 0.5)
        np.testing.assert_allclose(rescaled, image @ kernel, rtol=1e-4, atol=1e-5)


def test_interpolation_by_other_factors_differs() -> None:
    """The interpolation above is one: not every second pixel, and exact on linear ramps inside."""
    ramp = np.arange(8.0)[:, None, None] * np.ones((1, 8, 1))
    np.testing.assert_allclose(bilinear(ramp, 0.5)[:, 0, 0], [0.5, 2.5, 4.5, 6.5])
    np.testing.assert_allclose(bilinear(ramp, 2)[:3, 0, 0], [0, 0.25, 0.75])


def test_the_rescaler_has_one_matrix_without_bias() -> None:
    shapes = jax.eval_shape(SpatialRescaler(2, 3).init, jax.random.key(0), jnp.zeros((1, 8, 8, 182)))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == {"channel_mapper": {"kernel": (182, 3)}}
    nothing = SpatialRescaler(1, 3).apply({"params": {"channel_mapper": {"kernel": normal(4, 3)}}}, np.zeros((1, 4, 4, 4), np.float32))
    assert not np.asarray(nothing).any()


def test_a_map_that_cannot_be_halved_is_an_error() -> None:
    with pytest.raises((TypeError, ValueError), match="reshape"):
        SpatialRescaler(1, 3).apply({"params": {"channel_mapper": {"kernel": normal(4, 3)}}}, normal(1, 5, 4, 4))
