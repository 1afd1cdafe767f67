"""Windows cover and weigh every position once, and networks on windows agree with networks on the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.nn.layers import downsample_mean, upsample_nearest
from ldm_jax.nn.tiling import Tiling, axis, blended, tiled_denoise, windows
from ldm_jax.nn.unet import UNet

pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


TILINGS = st.integers(1, 20).flatmap(lambda size: st.builds(Tiling, st.just(size), st.integers(0, size - 1)))


@given(st.integers(1, 100), TILINGS, st.sampled_from([1, 2, 8]))
@settings(deadline=None)
def test_windows_cover_an_axis_and_their_weights_sum_to_one(length: int, tiling: Tiling, factor: int) -> None:
    along = axis(length, tiling)
    assert along.size == min(tiling.size, length)
    assert along.starts[0] == 0 and along.starts[-1] + along.size == length
    assert (np.diff(along.starts) > 0).all() and (np.diff(along.starts) <= along.size - tiling.overlap).all()
    weights, total = along.weights(factor), np.zeros(length * factor)
    assert weights.shape == (len(along.starts), along.size * factor) and (weights > 0).all()
    for start, weight in zip(along.starts, weights, strict=True):
        total[start * factor : (start + along.size) * factor] += weight
    np.testing.assert_allclose(total, 1, rtol=1e-12)


@given(st.integers(1, 200), TILINGS)
@settings(deadline=None)
def test_there_are_no_more_windows_than_needed(length: int, tiling: Tiling) -> None:
    count = len(axis(length, tiling).starts)
    assert count == 1 or tiling.size + (count - 2) * (tiling.size - tiling.overlap) < length


def test_weights_fall_towards_inner_borders_only() -> None:
    first, middle, last = axis(20, Tiling(8, 2)).weights(4)
    assert (first[:24] == 1).all() and (np.diff(first[24:]) < 0).all() and first[-1] < 0.001
    assert (np.diff(middle[:8]) > 0).all() and (middle[8:24] == 1).all() and (np.diff(middle[24:]) < 0).all()
    assert (last[8:] == 1).all() and last[0] < 0.001


@pytest.mark.parametrize("bad", [(4, 4), (4, -1), (0, 0)])
def test_windows_that_cannot_overlap_so_are_refused(bad: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot overlap"):
        Tiling(*bad)


def test_arrays_off_the_cells_are_refused() -> None:
    over = windows(4, 6, Tiling(3, 1))
    assert over.factor(jnp.zeros((1, 8, 12, 3))) == 2
    for shape in ((1, 8, 6, 3), (1, 9, 12, 3)):
        with pytest.raises(ValueError, match="does not lie on 4x6 cells"):
            over.factor(jnp.zeros(shape))


@given(st.integers(1, 12), st.integers(1, 12), TILINGS)
@settings(deadline=None, max_examples=10)
def test_the_identity_stays_the_identity(height: int, width: int, tiling: Tiling) -> None:
    x = normal(0, 2, height, width, 3)
    np.testing.assert_allclose(blended(lambda w: w, x, windows(height, width, tiling)), x, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sizes_may_change_and_several_arrays_are_cut_together(dtype: jnp.dtype) -> None:
    pixels, cells = normal(0, 2, 20, 28, 3).astype(dtype), normal(1, 2, 10, 14, 3).astype(dtype)
    over = windows(10, 14, Tiling(4, 1))
    y = blended(lambda w: upsample_nearest(upsample_nearest(w["cells"]) + w["pixels"]), {"pixels": pixels, "cells": cells}, over)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, upsample_nearest(upsample_nearest(cells) + pixels).astype(jnp.float32), rtol=1e-6)
    np.testing.assert_allclose(blended(downsample_mean, pixels, over), downsample_mean(pixels).astype(jnp.float32), rtol=1e-6)


def convolutions(x: jax.Array) -> jax.Array:
    """Three convolutions: each value depends on what is at most 3 positions away."""
    for i in range(3):
        kernel = normal(i, 3, 3, x.shape[-1], 4) / 4
        x = jnp.tanh(jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    return x


def test_a_local_network_equals_the_whole_but_next_to_window_borders() -> None:
    over = windows(25, 31, Tiling(12, 4))
    x = normal(9, 1, 25, 31, 2)
    error = np.abs(jax.jit(lambda x: blended(convolutions, x, over))(x) - jax.jit(convolutions)(x)).max((0, 3))
    seen = np.ones(error.shape, bool)  # by windows that hold all that the value depends on, or not at all
    for top, left in over.corners:
        complete = np.zeros_like(seen)
        rows = slice(top + 3 * (top > 0), top + 12 - 3 * (top + 12 < 25))
        columns = slice(left + 3 * (left > 0), left + 12 - 3 * (left + 12 < 31))
        complete[rows, columns] = True
        inside = np.zeros_like(seen)
        inside[top : top + 12, left : left + 12] = True
        seen &= complete | ~inside
    assert 0.2 < seen.mean() < 0.9
    assert error[seen].max() < 1e-6
    assert error.max() > 1e-4


def test_memory_and_program_do_not_grow_with_the_number_of_windows() -> None:
    """Beside input and output, of which the program has a few copies at most."""

    def compiled(length: int) -> tuple[int, int, int]:
        x = jax.ShapeDtypeStruct((1, length, length, 64), jnp.float32)
        network = lambda w: (w @ jnp.ones((64, 1024)) > 0).astype(jnp.float32) @ jnp.ones((1024, 1))  # noqa: E731
        lowered = jax.jit(lambda x: blended(network, x, windows(length, length, Tiling(16, 4)))).lower(x)
        memory = lowered.compile().memory_analysis()
        return lowered.as_text().count("dot_general"), memory.temp_size_in_bytes, memory.output_size_in_bytes

    small, large = compiled(40), compiled(160)
    assert small[0] == large[0] == 2
    assert large[1] - small[1] < 3 * large[2]
    assert large[1] < 160 * 160 * 1024 * 4 / 8


def test_a_tiled_denoiser_cuts_what_is_joined_and_gives_the_rest_whole() -> None:
    x, concat, context, vector = normal(0, 2, 9, 14, 4), normal(1, 2, 9, 14, 1), normal(2, 2, 5, 4), normal(3, 2, 4)
    t = jnp.array([0.2, 0.7])

    def pointwise(x: jax.Array, t: jax.Array, condition: dict) -> jax.Array:
        rest = condition["crossattn"].sum(1) + condition["vector"] * t[:, None]
        return jnp.tanh(x * condition["concat"]) + rest[:, None, None]

    seen = []

    def noting(x: jax.Array, t: jax.Array, condition: dict) -> jax.Array:
        seen.append((x.shape, condition["concat"].shape, condition["crossattn"].shape, condition["vector"].shape))
        return pointwise(x, t, condition)

    condition = {"crossattn": context, "concat": concat, "vector": vector}
    y = jax.jit(tiled_denoise(noting, Tiling(6, 2)))(x, t, condition)
    np.testing.assert_allclose(y, pointwise(x, t, condition), atol=1e-5)
    assert set(seen) == {((2, 6, 6, 4), (2, 6, 6, 1), (2, 5, 4), (2, 4))}


@pytest.mark.slow
def test_a_unet_runs_at_other_sizes_whole_and_by_windows() -> None:
    network = UNet(3, 8, (1, 2), 1, (2,), head_channels=8)
    t, context = jnp.array([3.0]), normal(1, 1, 5, 6)
    params = jax.jit(network.init)(jax.random.key(0), normal(0, 1, 8, 8, 3), t, context)
    params = jax.tree.map(lambda a: a + 0.1 * normal(a.size, *a.shape), params)

    @jax.jit
    def denoise(x: jax.Array, t: jax.Array, condition: dict) -> jax.Array:
        return network.apply(params, x, t, **condition)

    condition = {"crossattn": context}
    large = normal(2, 1, 12, 20, 3)
    whole, tiled = denoise(large, t, condition), jax.jit(tiled_denoise(denoise, Tiling(8, 4)))(large, t, condition)
    assert whole.shape == tiled.shape == large.shape
    # The corner belongs to one window alone.
    np.testing.assert_allclose(tiled[:, :4, :4], denoise(large[:, :8, :8], t, condition)[:, :4, :4], atol=1e-5)
