"""The paper's UNet: its size, its inputs, its errors."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn.unet import UNet, place_features

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL: dict[str, Any] = {
    "out_channels": 4,
    "channels": 16,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_levels": (1, 2),
    "head_channels": 8,
}
PAPER: dict[str, Any] = {"channels": 320, "channel_mult": (1, 2, 4, 4), "attention_levels": (1, 2, 4), "num_heads": 8, "head_channels": 0}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@cache
def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    return normal(0, 2, 8, 8, 4), jnp.array([3.0, 700.0]), normal(1, 2, 5, 12)


@cache
def random_params() -> Any:
    """Every parameter random: the output and the residual branches begin at zero."""
    shapes = jax.eval_shape(UNet(**SMALL).init, jax.random.key(0), *inputs())
    leaves, tree = jax.tree.flatten(shapes)
    return jax.tree.unflatten(tree, [0.2 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


def run(params: Any, *args: Any, **fields: Any) -> jax.Array:
    return jax.jit(UNet(**{**SMALL, **fields}).apply)(params, *args)


@pytest.mark.parametrize(("context", "count"), [(1280, 872_300_484), (768, 859_520_964)], ids=["laion-1p4b", "stable-diffusion-1"])
def test_the_published_numbers_of_parameters(context: int, count: int) -> None:
    network = UNet(4, **PAPER)
    network.check()
    x, c = jnp.zeros((1, 32, 32, 4)), jnp.zeros((1, 77, context))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1), c)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_a_fresh_network_predicts_zero() -> None:
    network = UNet(**SMALL)
    params = jax.jit(network.init)(jax.random.key(0), *inputs())
    assert not np.asarray(run(params, *inputs())).any()


def test_every_input_is_heard() -> None:
    x, t, c = inputs()
    base = run(random_params(), x, t, c)
    for changed in ((x + 1, t, c), (x, t + 100, c), (x, t, c.at[:, 0].add(1.0))):
        assert np.abs(run(random_params(), *changed) - base).max() > 1e-2


def test_examples_do_not_see_each_other() -> None:
    x, t, c = inputs()
    both = run(random_params(), x, t, c)
    alone = run(random_params(), x[1:], t[1:], c[1:])
    np.testing.assert_allclose(both[1:], alone, rtol=1e-3, atol=1e-3)


def test_bfloat16_is_close_and_its_output_is_float32() -> None:
    full, low = run(random_params(), *inputs()), run(random_params(), *inputs(), dtype=jnp.bfloat16)
    assert low.dtype == jnp.float32
    assert np.linalg.norm(low - full) / np.linalg.norm(full) < 2e-2


@pytest.mark.parametrize(
    "fields", [{"transformer_depth": 0}, {"scale_shift": True}, {"resblock_updown": True}, {"num_heads": 2, "head_channels": 0}]
)
def test_variants_keep_the_shape(fields: dict[str, Any]) -> None:
    network = UNet(**{**SMALL, **fields})
    network.check()
    x, t, c = inputs()
    context = c if network.transformer_depth else None
    out, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), x, t, context, normal(2, 2, 8, 8, 3), normal(3, 2, 7))
    assert out.shape == x.shape


def test_features_of_places_differ_and_are_shares_of_the_whole() -> None:
    small, wide = place_features(4, 8, 32), place_features(8, 16, 32)
    flat = small.reshape(32, -1)
    distances = np.linalg.norm(flat[:, None] - flat, axis=-1)
    assert distances[~np.eye(32, dtype=bool)].min() > 0.3
    # The middle of two places of the finer grid is the place of the coarser one: in the slowest wave nearly so.
    np.testing.assert_allclose(wide[:, :, 0].reshape(8, 8, 2).mean(-1)[::2], small[:, :, 0], atol=0.01)


def test_a_network_that_knows_its_places_is_not_the_same_everywhere() -> None:
    """The same latent everywhere, without padding's help: a 1x1 view of the middle of a large picture."""
    params = random_params()
    x = jnp.ones((2, 16, 16, 4))
    blind, knowing = (run(params, x, *inputs()[1:], places=places, attention_levels=(1, 2)) for places in (False, True))
    spread = [float(np.std(np.asarray(out)[:, 6:10:2, 6:10:2], axis=(1, 2)).mean()) for out in (blind, knowing)]
    assert spread[1] > 3 * spread[0]


def test_a_context_that_nothing_attends_to_is_an_error() -> None:
    with pytest.raises(ValueError, match="transformer_depth=0 leaves nothing that attends"):
        jax.eval_shape(UNet(**SMALL, transformer_depth=0).init, jax.random.key(0), *inputs())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_levels": (1, 4)}, r"attention_levels \[4\] match no level; the factors of this UNet are \[1, 2\]"),
        ({"num_heads": 2}, "give one of num_heads and head_channels"),
        ({"head_channels": 0}, "give one of num_heads and head_channels"),
        ({"head_channels": 12}, "width 16 at factor 1 is not divisible into heads"),
        ({"remat": "all"}, "remat 'all' is not one of none, blocks, full"),
    ],
)
def test_settings_without_effect_or_sense_are_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**{**SMALL, **fields}).check()


def test_dropout_of_an_example_depends_on_its_key_alone() -> None:
    """Not on its neighbours in the batch; another key, as the next step has, is another mask."""
    network = UNet(**SMALL, dropout=0.5)
    x, context, t = normal(0, 4, 8, 8, 4), normal(1, 4, 5, 12), jnp.array([3.0, 700.0, 20.0, 300.0])
    keys = jax.random.split(jax.random.key(0), 4)

    @jax.jit
    def run(rows: jax.Array, keys: jax.Array | None) -> jax.Array:
        return network.apply(random_params(), x[rows], t[rows], context[rows], dropout_keys=keys)

    whole = run(jnp.arange(4), keys)
    halves = [run(rows, keys[rows]) for rows in (jnp.array([0, 1]), jnp.array([2, 3]))]
    np.testing.assert_allclose(jnp.concatenate(halves), whole, atol=1e-5)
    others = [run(jnp.arange(4), jax.random.split(jax.random.key(1), 4)), run(jnp.arange(4), None)]
    assert all(np.abs(other - whole).max((1, 2, 3)).min() > 1e-2 for other in others)
