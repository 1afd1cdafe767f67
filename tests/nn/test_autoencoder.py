"""The autoencoders: their sizes and shapes, the KL one's posterior, the VQ one's codebook."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn.autoencoder import IdentityAutoencoder, KLAutoencoder, VQAutoencoder, kl_divergence, sample_moments

pytestmark = pytest.mark.usefixtures("quick_compilation")


SMALL = KLAutoencoder(8, (1, 2), 1, (), True, 4, 3, 2)
SMALL_VQ = VQAutoencoder(8, (1, 2), 1, (), True, 4, 3, 2, codebook_size=16)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_kl_f8_has_the_published_number_of_parameters() -> None:
    network = KLAutoencoder()
    assert network.factor == 8
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 83_653_863


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (VQAutoencoder(channel_mult=(1, 2, 4), z_channels=3, latent_channels=3), 55_322_782),
        (VQAutoencoder(channel_mult=(1, 2, 4), z_channels=3, latent_channels=3, mid_attention=False), 53_219_486),
        (VQAutoencoder(channel_mult=(1, 2, 2, 4), attention_levels=(8,), codebook_size=16_384), 67_717_295),
        (
            VQAutoencoder(channel_mult=(1, 1, 2, 2, 4), attention_levels=(16,), z_channels=8, latent_channels=8, codebook_size=16_384),
            69_593_371,
        ),
    ],
    ids=["vq-f4", "vq-f4-noattn", "vq-f8", "vq-f16"],
)
def test_the_released_vq_models_have_their_number_of_parameters(network: VQAutoencoder, parameters: int) -> None:
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
    assert shapes["quantize"]["embedding"].shape == (network.codebook_size, network.latent_channels)


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


def test_vq_latents_are_quantised_where_decoding_begins() -> None:
    x = normal(0, 2, 16, 24, 3)
    params = jax.jit(SMALL_VQ.init)(jax.random.key(0), x)
    params["params"]["quantize"]["embedding"] = normal(1, 16, 3)
    run = partial(SMALL_VQ.apply, params)
    z = jax.jit(partial(run, method="moments"))(x)
    assert z.shape == (2, 4, 6, 3) and z.dtype == jnp.float32 and SMALL_VQ.factor == 4
    assert SMALL_VQ.sample(z, jax.random.key(0)) is z
    entries, indices = jax.jit(partial(run, method="lookup"))(z)
    assert indices.shape == (2, 4, 6) and not np.allclose(entries, z)
    images = jax.jit(partial(run, method="decode"))(z)
    assert images.shape == x.shape
    np.testing.assert_array_equal(images, jax.jit(partial(run, method="decode"))(entries))
    np.testing.assert_allclose(images, run(run(entries, method="features"), method="head"), atol=1e-5)
    np.testing.assert_allclose(images, jax.jit(run)(x), atol=1e-5)


def test_gradients_pass_through_the_codebook_to_vq_latents_as_if_it_were_not_there() -> None:
    x = normal(0, 1, 8, 8, 3)
    params = jax.jit(SMALL_VQ.init)(jax.random.key(0), x)
    params["params"]["quantize"]["embedding"] = normal(1, 16, 3)
    z = normal(2, 1, 2, 2, 3)
    run = partial(SMALL_VQ.apply, params)
    entries, _ = run(z, method="lookup")
    through = jax.grad(lambda z: jnp.sum(run(z, method="decode") ** 2))(z)
    without = jax.grad(lambda z: jnp.sum(run(run(z, method="features"), method="head") ** 2))(entries)
    np.testing.assert_allclose(through, without, rtol=1e-4, atol=1e-5)
    assert np.abs(through).max() > 0


def test_the_identity_leaves_pixels_as_they_are() -> None:
    network, x = IdentityAutoencoder(dtype=jnp.bfloat16), normal(0, 2, 6, 5, 3)
    assert network.init(jax.random.key(0), x) == {}
    assert (network.factor, network.latent_channels) == (1, 3)
    z = network.apply({"params": {}}, x, method="moments")
    np.testing.assert_array_equal(z, x)
    np.testing.assert_array_equal(network.apply({}, network.sample(z, jax.random.key(0)), method="decode"), x)
