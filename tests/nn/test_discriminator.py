"""The patch discriminator: shapes, receptive field, initialisation, normalisation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn.discriminator import PatchDiscriminator


def _images(size: int, batch: int = 2, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (batch, size, size, 3)), jnp.float32)


def _params(model: PatchDiscriminator, images: jax.Array) -> Any:
    """Weights drawn by numpy, which compiles nothing."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.05, leaf.shape), leaf.dtype), shapes)


def test_paper_discriminator_has_its_layers_and_2_8_million_parameters() -> None:
    shapes = jax.eval_shape(PatchDiscriminator().init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))["params"]
    kernels = {name: layer["kernel"].shape for name, layer in shapes.items() if "kernel" in layer}
    assert list(kernels.values()) == [
        (4, 4, 3, 64),
        (4, 4, 64, 128),
        (4, 4, 128, 256),
        (4, 4, 256, 512),
        (4, 4, 512, 1),
    ]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 2_765_633
    assert ["bias" in shapes[name] for name in kernels] == [True, False, False, False, True]


@pytest.mark.parametrize(("size", "expected"), [(24, 1), (32, 2), (65, 6), (256, 30)])
def test_logit_map_has_the_documented_size(size: int, expected: int) -> None:
    model = PatchDiscriminator(features=4)
    out = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], jnp.zeros((2, size, size, 3)))
    assert out.shape == (2, expected, expected, 1)


def test_a_logit_sees_a_patch_of_70_pixels() -> None:
    model = PatchDiscriminator(features=2, norm="none")
    images = _images(128, batch=1)
    params = _params(model, images)
    seen = jax.jit(jax.grad(lambda x: model.apply(params, x)[0, 7, 7, 0]))(images)[0]
    rows = np.flatnonzero(np.abs(np.asarray(seen)).sum((1, 2)))
    assert rows[-1] - rows[0] + 1 == 70


def test_initialisation_is_normal_with_deviation_0_02() -> None:
    params = jax.jit(PatchDiscriminator(features=64, num_layers=1).init)(jax.random.key(0), _images(32))["params"]
    kernel = np.asarray(params["Conv_1"]["kernel"])
    assert abs(kernel.std() - 0.02) < 5e-4 and abs(kernel.mean()) < 5e-4
    scales = np.asarray(params["_Norm_0"]["scale"])
    assert abs(scales.mean() - 1) < 0.01 and 0.01 < scales.std() < 0.03
    assert not params["_Norm_0"]["bias"].any()


def test_images_share_statistics_with_batch_norm_only() -> None:
    images = _images(8, batch=4)
    changed = images.at[3].set(_images(8, batch=1, seed=9)[0])
    for norm, independent in (("batch", False), ("group", True), ("none", True)):
        model = PatchDiscriminator(features=4, num_layers=1, norm=norm)
        params, apply = _params(model, images), jax.jit(model.apply)
        before, after = apply(params, images)[:3], apply(params, changed)[:3]
        assert np.allclose(before, after, atol=1e-6) == independent, norm


def test_group_norm_equals_flax() -> None:
    from flax import linen as nn

    from ldm_jax.nn.discriminator import _Norm

    x = jnp.asarray(np.random.default_rng(0).normal(3, 1, (2, 5, 5, 128)), jnp.float32)
    params = {"params": {"scale": jnp.linspace(0.5, 1.5, 128), "bias": jnp.linspace(-1, 1, 128)}}
    expected = nn.GroupNorm(num_groups=32, epsilon=1e-5).apply(params, x)
    np.testing.assert_allclose(_Norm("group").apply(params, x), expected, atol=2e-5)
    batch = _Norm("batch").apply(params, x) - params["params"]["bias"]
    batch = np.asarray(batch / params["params"]["scale"])
    np.testing.assert_allclose(batch.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(batch.std((0, 1, 2)), 1, atol=1e-4)


def test_logits_are_float32_in_bfloat16_and_float64_in_float64() -> None:
    images = _images(32)
    model = PatchDiscriminator(features=8)
    params = _params(model, images)
    full = jax.jit(model.apply)(params, images)
    half = jax.jit(PatchDiscriminator(features=8, dtype=jnp.bfloat16).apply)(params, images)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.05)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        double = jax.jit(PatchDiscriminator(features=8, dtype=jnp.float64).apply)(wide, images.astype(jnp.float64))
        assert double.dtype == jnp.float64
        np.testing.assert_allclose(double, full, atol=1e-4)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="needs images of 24 px, not 16x40"):
        PatchDiscriminator(features=4).init(jax.random.key(0), jnp.zeros((1, 16, 40, 3)))
    with pytest.raises(ValueError, match="'layer' is none of"):
        PatchDiscriminator(norm="layer").init(jax.random.key(0), _images(32))
