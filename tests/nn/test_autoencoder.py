"""The KL autoencoder: its size, its shapes, its posterior."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn.autoencoder import KLAutoencoder, kl_divergence, sample_moments
from tests import tiny


@pytest.fixture(autouse=True, scope="module")
def quick_compilation() -> Iterator[None]:
    with tiny.quick_compilation():
        yield


SMALL = KLAutoencoder(8, (1, 2), 1, (), True, 4, 3, 2)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_kl_f8_has_the_published_number_of_parameters() -> None:
    network = KLAutoencoder()
    assert network.factor == 8
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863


def test_shapes_and_types() -> None:
    x = normal(0, 2, 16, 24, 3)
    params = jax.jit(SMALL.init)(jax.random.key(0), x)
    moments = jax.jit(partial(SMALL.apply, method="moments"))(params, x)
    assert moments.shape == (2, 4, 6, 6) and SMALL.factor == 4
    images = SMALL.apply(params, moments[..., :3], method="decode")
    assert images.shape == x.shape
    features = SMALL.apply(params, moments[..., :3], method="features")
    np.testing.assert_array_equal(SMALL.apply({"params": {"conv_out": params["params"]["conv_out"]}}, features, method="head"), images)
    low = SMALL.clone(dtype=jnp.bfloat16).apply(params, x, method="moments")
    assert low.dtype == jnp.float32
    assert np.linalg.norm(low - moments) / np.linalg.norm(moments) < 3e-2


def test_a_level_without_match_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"attention_levels \[16\] match no level; the factors of this autoencoder are \[2, 4\]"):
        SMALL.clone(attention_levels=(16,)).check()


def test_log_variance_is_clamped() -> None:
    x = normal(0, 1, 8, 8, 3)
    params = jax.jit(SMALL.init)(jax.random.key(0), x)
    params["params"]["quant_conv"]["bias"] = jnp.array([0.0, 0, 0, 1e3, -1e3, 0])
    log_var = np.asarray(jax.jit(partial(SMALL.apply, method="moments"))(params, x))[..., 3:]
    assert (log_var[..., 0] == 20).all() and (log_var[..., 1] == -30).all()


def test_the_first_log_variance_is_what_was_asked_for_and_the_mean_is_left_alone() -> None:
    x = normal(0, 1, 8, 8, 3)

    def moments(init_log_var: float) -> np.ndarray:
        network = SMALL.clone(init_log_var=init_log_var)
        return np.asarray(jax.jit(lambda: network.apply(network.init(jax.random.key(0), x), x, method="moments"))())

    plain, low = moments(0.0), moments(-6.0)
    np.testing.assert_allclose(low[..., 3:] - plain[..., 3:], -6.0, rtol=1e-5)
    np.testing.assert_array_equal(low[..., :3], plain[..., :3])


def test_samples_have_the_moments_and_the_divergence_its_closed_form() -> None:
    moments = jnp.broadcast_to(jnp.array([1.5, -2.0, np.log(0.25), np.log(4.0)]), (1, 100, 100, 4))
    z = np.asarray(sample_moments(moments, jax.random.key(0)))
    np.testing.assert_allclose(z.mean((0, 1, 2)), [1.5, -2.0], atol=5 * 2 / 100)
    np.testing.assert_allclose(z.std((0, 1, 2)), [0.5, 2.0], rtol=0.05)
    each = 0.5 * (1.5**2 + 0.25 - 1 - np.log(0.25)) + 0.5 * (4 + 4 - 1 - np.log(4))
    np.testing.assert_allclose(kl_divergence(moments), [1e4 * each], rtol=1e-5)
