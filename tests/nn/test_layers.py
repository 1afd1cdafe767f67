"""Layers against closed forms and plain implementations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.nn.layers import (
    Conv,
    Dense,
    Dropout,
    ResBlock,
    depth_to_space,
    downsample_mean,
    norm,
    norm_groups,
    space_to_depth,
    timestep_embedding,
    upsample_nearest,
)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def randomised(params: dict, seed: int = 0) -> dict:
    """Every parameter random, also those that begin at zero or one."""
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [0.3 * normal(seed + i, *leaf.shape) for i, leaf in enumerate(leaves)])


def test_a_folded_upsampling_equals_upsampling_and_convolving() -> None:
    x = normal(0, 2, 5, 7, 3)
    conv, folded = Conv(4), Conv(4, upsample=True)
    params = randomised(conv.init(jax.random.key(0), x))
    np.testing.assert_allclose(folded.apply(params, x), conv.apply(params, upsample_nearest(x)), atol=1e-5)


def test_few_channels_in_bfloat16_are_padded_and_change_nothing() -> None:
    x = normal(0, 1, 6, 6, 3)
    params = randomised(Conv(5).init(jax.random.key(0), x))
    low = Conv(5, dtype=jnp.bfloat16).apply(params, x)
    assert low.dtype == jnp.bfloat16
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), (params, x))
    np.testing.assert_allclose(low.astype(jnp.float32), Conv(5).apply(*rounded), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("stride", "padding"), [(1, (1, 1)), (2, (1, 1)), (2, (0, 1))])
def test_convolutions_equal_sums_over_taps(stride: int, padding: tuple[int, int]) -> None:
    x = normal(0, 1, 6, 6, 2)
    conv = Conv(3, stride=stride, padding=padding)
    params = randomised(conv.init(jax.random.key(0), x))
    kernel, bias = np.asarray(params["params"]["kernel"]), np.asarray(params["params"]["bias"])
    padded = np.pad(np.asarray(x), ((0, 0), padding, padding, (0, 0)))
    size = (padded.shape[1] - 3) // stride + 1
    expected = np.zeros((1, size, size, 3)) + bias
    for i in range(size):
        for j in range(size):
            patch = padded[0, i * stride : i * stride + 3, j * stride : j * stride + 3]
            expected[0, i, j] += np.einsum("hwc,hwco->o", patch, kernel)
    np.testing.assert_allclose(conv.apply(params, x), expected, atol=1e-5)


def test_dense_and_1x1_convolution_are_matrix_products() -> None:
    x = normal(0, 2, 3, 5, 4)
    params = randomised(Dense(6).init(jax.random.key(0), x))
    kernel, bias = params["params"]["kernel"], params["params"]["bias"]
    expected = jnp.einsum("bhwc,co->bhwo", x, kernel) + bias
    np.testing.assert_allclose(Dense(6).apply(params, x), expected, atol=1e-5)
    np.testing.assert_allclose(Conv(6, 1).apply({"params": {"kernel": kernel[None, None], "bias": bias}}, x), expected, atol=1e-5)


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 3))
@settings(deadline=None, max_examples=20)
def test_depth_to_space_inverts_space_to_depth(height: int, width: int, size: int, channels: int) -> None:
    x = np.arange(height * width * size**2 * channels).reshape(1, height * size, width * size, channels)
    folded = space_to_depth(jnp.asarray(x), size)
    assert folded.shape == (1, height, width, size * size * channels)
    np.testing.assert_array_equal(folded[0, 0, 0], x[0, :size, :size].ravel())
    np.testing.assert_array_equal(depth_to_space(folded, size), x)


def test_resampling() -> None:
    x = normal(0, 1, 4, 4, 3)
    up = upsample_nearest(x)
    np.testing.assert_array_equal(up, np.repeat(np.repeat(np.asarray(x), 2, 1), 2, 2))
    np.testing.assert_allclose(downsample_mean(up), x, atol=1e-6)


def test_timestep_embedding_closed_form() -> None:
    t = jnp.array([0.0, 1.0, 500.0])
    e = np.asarray(timestep_embedding(t, 8))
    frequencies = 10_000.0 ** (-np.arange(4) / 4)
    angles = np.asarray(t)[:, None] * frequencies
    np.testing.assert_allclose(e, np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=1e-4)
    assert timestep_embedding(t.astype(jnp.bfloat16), 8).dtype == jnp.float32


def test_group_norm_statistics_are_float32_and_safe_at_large_means() -> None:
    x = (normal(0, 1, 8, 8, 8) + 300.0).astype(jnp.float32)
    module = norm(jnp.float32, 1e-6, "norm", 4)
    y = np.asarray(module.apply(module.init(jax.random.key(0), x), x), np.float64)
    groups = np.asarray(x, np.float64).reshape(1, 64, 4, 2)
    expected = (groups - groups.mean((1, 3), keepdims=True)) / np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(y.reshape(1, 64, 4, 2), expected, atol=1e-3)


@pytest.mark.parametrize(("channels", "groups"), [(320, 32), (128, 32), (192, 32), (96, 16), (64, 16), (32, 8), (8, 2), (4, 1)])
def test_the_papers_32_groups_and_fewer_for_narrow_networks(channels: int, groups: int) -> None:
    assert norm_groups(channels) == groups


@pytest.mark.parametrize("resample", [None, "up", "down"])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_res_blocks_begin_as_the_identity_and_use_the_embedding(resample: str | None, scale_shift: bool) -> None:
    x, emb = normal(0, 2, 4, 4, 8), normal(1, 2, 16)
    block = ResBlock(8, 1e-5, scale_shift=scale_shift, resample=resample)
    params = block.init(jax.random.key(0), x, emb)
    expected = {None: x, "up": upsample_nearest(x), "down": downsample_mean(x)}[resample]
    np.testing.assert_array_equal(block.apply(params, x, emb), expected)
    params = randomised(params)
    assert np.abs(block.apply(params, x, emb) - block.apply(params, x, emb + 1)).max() > 1e-3


def test_dropout_acts_only_when_asked() -> None:
    x = normal(0, 1, 4, 4, 8)
    block = ResBlock(8, 1e-5, dropout=0.5)
    params = randomised(block.init(jax.random.key(0), x))
    drop = [block.apply(params, x, None, keys(i)) for i in (0, 1)]
    assert np.abs(drop[0] - drop[1]).max() > 1e-3
    np.testing.assert_array_equal(block.apply(params, x), ResBlock(8, 1e-5).apply(params, x, None, keys(0)))


def keys(*seeds: int) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.array(seeds))


class TwoDropouts(nn.Module):
    rate: float

    def setup(self) -> None:
        self.first, self.second = Dropout(self.rate), Dropout(self.rate)

    def __call__(self, x: jax.Array, keys: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return self.first(x, keys), self.second(x, keys)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_a_share_of_one_minus_its_rate_and_scales_it_up(rate: float) -> None:
    x = 1 + normal(0, 8, 50, 50, 2) ** 2
    y = np.asarray(Dropout(rate).apply({}, x, keys(*range(8))))
    kept = y != 0
    np.testing.assert_allclose(y[kept], x[kept] / (1 - rate), rtol=1e-6)
    deviation = (rate * (1 - rate) / 5000) ** 0.5  # of an example's share, of a mean of 5000
    assert np.abs(kept.reshape(8, -1).mean(1) - (1 - rate)).max() < 5 * deviation
    low = Dropout(rate).apply({}, x.astype(jnp.bfloat16), keys(*range(8)))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low != 0, kept)


def test_dropout_of_nothing_of_everything_and_without_keys() -> None:
    x = normal(0, 2, 5, 3)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, keys(0, 1)), x)
    np.testing.assert_array_equal(Dropout(0.5).apply({}, x, None), x)
    value, gradient = jax.value_and_grad(lambda x: Dropout(1.0).apply({}, x, keys(0, 1)).sum())(x)
    assert value == 0 and not gradient.any()


def test_masks_differ_between_layers_and_examples_and_are_as_good_as_independent() -> None:
    x = jnp.ones((3, 40, 50))
    masks = np.stack(TwoDropouts(0.5).apply({}, x, keys(7, 8, 9))).reshape(6, -1) - 1
    correlations = masks @ masks.T / masks.shape[1]
    np.testing.assert_allclose(correlations, np.eye(6), atol=5 / 2000**0.5)


def test_an_examples_mask_depends_on_its_key_and_not_on_its_neighbours() -> None:
    x = jnp.ones((4, 6, 5))
    drop = jax.jit(lambda x, keys: Dropout(0.5).apply({}, x, keys))
    whole = drop(x, keys(5, 6, 7, 8))
    np.testing.assert_array_equal(jnp.concatenate([drop(x[:2], keys(5, 6)), drop(x[2:], keys(7, 8))]), whole)
    np.testing.assert_array_equal(drop(x, keys(8, 6, 7, 5))[jnp.array([3, 1, 2, 0])], whole)
