"""What is computed anew in the backward pass, dropout's masks too, changes no gradient, and less is kept the more of it there is."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn.autoencoder import KLAutoencoder
from ldm_jax.nn.dit import DiT
from ldm_jax.nn.remat import check_remat
from ldm_jax.nn.text_encoder import TextTransformer
from ldm_jax.nn.unet import UNet
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = ("conv+dense+attention", "blocks", "full")


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def network(name: str, remat: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A small network with its inputs; denoisers with dropout."""
    t, context, keys = jnp.array([3.0, 700.0]), normal(1, 2, 3, 8), jax.random.split(jax.random.key(2), 2)
    if name == "unet":
        unet = UNet(3, 16, (1, 2), 2, (2,), head_channels=8, dropout=0.5, remat=remat)
        return unet, (normal(0, 2, 16, 16, 3), t), {"crossattn": context, "dropout_keys": keys}
    if name == "dit":
        return DiT(3, 32, 4, 2, dropout=0.5, remat=remat), (normal(0, 2, 16, 16, 3), t), {"dropout_keys": keys}
    if name == "text":
        return TextTransformer(20, 16, 32, 4, 2, 16, remat=remat), (jnp.arange(32).reshape(2, 16) % 20,), {}
    return KLAutoencoder(16, (1, 2), 1, (1,), z_channels=2, latent_channels=2, remat=remat), (normal(0, 2, 16, 16, 3),), {}


@cache
def gradient(name: str, remat: str) -> tuple[Any, int]:
    """Gradients of a mean square, and the bytes that their program needs besides its arguments and results."""
    module, inputs, named = network(name, remat)
    params = tiny.random_like(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **named)))
    program = jax.jit(jax.grad(lambda p: jnp.mean(module.apply(p, *inputs, **named) ** 2))).lower(params).compile()
    return program(params), program.memory_analysis().temp_size_in_bytes


FAST = {("text", "full"), ("text", "conv+dense+attention"), ("dit", "full"), ("autoencoder", "blocks")}


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        pytest.param(name, remat, marks=() if (name, remat) in FAST else pytest.mark.slow)
        for name in ("unet", "dit", "text", "autoencoder")
        for remat in SETTINGS
    ],
)
def test_gradients_are_the_same(name: str, remat: str) -> None:
    plain, again = gradient(name, "none")[0], gradient(name, remat)[0]
    assert jax.tree.structure(plain) == jax.tree.structure(again)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(np.abs(a).max()) + 1e-7)


@pytest.mark.slow
def test_less_is_kept() -> None:
    """Of what passes from the forward to the backward pass: XLA's own memory on a CPU says little."""

    def residuals(remat: str) -> int:
        module, inputs, named = network("unet", remat)
        params = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **named))
        pull_back = jax.eval_shape(lambda p: jax.vjp(lambda p: module.apply(p, *inputs, **named), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull_back))

    kept = [residuals(remat) for remat in ("none", "conv+dense+attention", "conv", "blocks", "full")]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept)
    assert kept[3] < kept[0] / 3


def test_unknown_settings() -> None:
    for remat in ("all", "conv+norm", ""):
        with pytest.raises(ValueError, match="is not one of none, blocks, full, or of conv, dense, attention"):
            check_remat(remat)
