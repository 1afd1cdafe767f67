"""DiT: its published sizes, what it computes, its inputs, its errors."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.nn.attention import MultiHeadAttention
from ldm_jax.nn.dit import SIZES, DiT, DiTBlock, positions
from ldm_jax.nn.layers import depth_to_space, space_to_depth

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL: dict[str, Any] = {"out_channels": 3, "width": 16, "depth": 2, "num_heads": 2}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@cache
def inputs() -> dict[str, jax.Array]:
    return {"x": normal(0, 2, 4, 6, 3), "t": jnp.array([3.0, 700.0]), "vector": normal(1, 2, 16)}


def random_params(network: Any, *args: Any, **inputs: Any) -> Any:
    """Every parameter random: modulations and the output begin at zero."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(network.init, jax.random.key(0), *args, **inputs))
    return jax.tree.unflatten(tree, [0.2 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)])


@cache
def small_params() -> Any:
    return random_params(DiT(**SMALL), **inputs())


def run(params: Any, fields: dict[str, Any] | None = None, **changed: Any) -> jax.Array:
    return jax.jit(DiT(**SMALL | (fields or {})).apply)(params, **inputs() | changed)


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_the_published_numbers_of_parameters(size: str, millions: int) -> None:
    """Table 1 counts the table of 1001 classes and the variance's channels, for patches of 2 at 32x32."""
    network = DiT(4, **SIZES[size], learn_sigma=True)
    network.check()
    x, vector = jnp.zeros((1, 32, 32, 4)), jnp.zeros((1, network.width))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1), vector=vector)
    assert round((sum(leaf.size for leaf in jax.tree.leaves(shapes)) + 1001 * network.width) / 1e6) == millions


def test_a_fresh_network_predicts_zero_with_gradients_at_its_output_alone() -> None:
    """adaLN-zero: only the last linear map moves in the first update. With random parameters, all of them have a gradient."""
    network = DiT(**SMALL)
    params = jax.jit(network.init)(jax.random.key(0), **inputs())
    assert not np.asarray(run(params)).any()

    def moved(params: Any) -> set[str]:
        gradients = jax.jit(jax.grad(lambda p: jnp.mean((network.apply(p, **inputs()) - 1) ** 2)))(params)["params"]
        return {name for name, value in gradients.items() if any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(value))}

    assert moved(params) == {"out"}
    assert moved(small_params()) == set(params["params"])


def test_a_fresh_block_is_the_identity() -> None:
    x, emb, context = normal(0, 2, 6, 16), normal(1, 2, 16), normal(2, 2, 3, 5)
    block = DiTBlock(2, 4.0, False, 1e-6, 0.0, jnp.float32)
    for args in ((x, emb), (x, emb, context)):
        np.testing.assert_array_equal(block.apply(block.init(jax.random.key(0), *args), *args), x)


@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 4), h=st.integers(1, 3), w=st.integers(1, 3), channels=st.integers(1, 3))
def test_patches_go_back_where_they_came_from(size: int, h: int, w: int, channels: int) -> None:
    x = np.random.default_rng(0).normal(size=(2, h * size, w * size, channels))
    tokens = space_to_depth(x, size)
    assert tokens.shape == (2, h, w, size * size * channels)
    np.testing.assert_array_equal(depth_to_space(tokens, size), x)
    np.testing.assert_array_equal(tokens[1, h - 1, 0].reshape(size, size, channels), x[1, -size:, :size])


def test_positions_are_the_powers_of_one_rotation_for_each_rate() -> None:
    """The features of place n are those of place 1 to the n-th power, as complex numbers: first columns, then rows."""
    height, width, dim = 5, 7, 24
    grid = positions(height, width, dim).reshape(height, width, dim)
    assert grid.dtype == np.float64
    for values, axis in ((grid[..., : dim // 2], 1), (grid[..., dim // 2 :], 0)):
        sin, cos = np.split(values, 2, axis=-1)
        n = np.arange(values.shape[axis]).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        unit = np.array([np.exp(1j * 10_000 ** (-k / (dim // 4))) for k in range(dim // 4)])
        np.testing.assert_allclose(cos + 1j * sin, np.broadcast_to(unit**n, sin.shape), atol=1e-12)


def test_a_block_is_its_definition() -> None:
    """One block against numpy in float64, with attention as its own module (tested elsewhere)."""
    x, emb = normal(0, 2, 5, 16), normal(1, 2, 16)
    block = DiTBlock(2, 1.5, False, 1e-3, 0.0, jnp.float32)
    params = random_params(block, x, emb)
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split((emb @ w["modulation"]["kernel"] + w["modulation"]["bias"])[:, None], 6, -1)

    def normed(y: np.ndarray, epsilon: float) -> np.ndarray:
        return (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + epsilon)

    attention = MultiHeadAttention(2, 8, qkv_bias=True)
    expected = np.asarray(x, np.float64)
    h = normed(expected, 1e-6) * (1 + scale1) + shift1
    expected = expected + gate1 * np.asarray(attention.apply({"params": params["params"]["attn"]}, jnp.asarray(h, jnp.float32)))
    h = (normed(expected, 1e-3) * (1 + scale2) + shift2) @ w["mlp_in"]["kernel"] + w["mlp_in"]["bias"]
    assert h.shape[-1] == 24
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    expected = expected + gate2 * (h @ w["mlp_out"]["kernel"] + w["mlp_out"]["bias"])
    np.testing.assert_allclose(block.apply(params, x, emb), expected, atol=2e-5)


def test_biases_and_normed_queries_of_attention() -> None:
    """The logits of normed queries and keys do not grow with them; biases are added before the heads are split."""
    x = normal(0, 2, 5, 16)
    module = MultiHeadAttention(2, 8, qkv_bias=True, qk_norm=True)
    params = random_params(module, x)
    assert {name: sorted(leaves) for name, leaves in params["params"].items()} == {
        **{name: ["bias", "kernel"] for name in ("q", "k", "v", "out")},
        **{name: ["scale"] for name in ("q_norm", "k_norm")},
    }
    grown = jax.tree.map(lambda a: a, params)
    grown["params"]["q"] = jax.tree.map(lambda a: 100 * a, params["params"]["q"])
    np.testing.assert_allclose(module.apply(grown, x), module.apply(params, x), atol=1e-4)
    shifted = jax.tree.map(lambda a: a, params)
    shifted["params"]["v"]["bias"] = params["params"]["v"]["bias"] + 1
    expected = module.apply(params, x) + params["params"]["out"]["kernel"].sum(0)
    np.testing.assert_allclose(module.apply(shifted, x), expected, atol=1e-5)


def test_blocks_do_not_know_places() -> None:
    """A permutation of the tokens permutes what a block returns: places enter with the positions alone."""
    x, emb, context = normal(0, 2, 6, 16), normal(1, 2, 16), normal(2, 2, 3, 5)
    block, order = DiTBlock(2, 4.0, True, 1e-6, 0.0, jnp.float32), np.array([3, 0, 5, 1, 4, 2])
    params = random_params(block, x, emb, context)
    np.testing.assert_allclose(block.apply(params, x[:, order], emb, context), block.apply(params, x, emb, context)[:, order], atol=1e-5)


def test_every_input_is_heard_and_every_place() -> None:
    base, given_ = run(small_params()), inputs()
    for changed in ({"x": given_["x"] + 1}, {"t": given_["t"] + 100}, {"vector": -given_["vector"]}, {"vector": None}):
        assert np.abs(run(small_params(), **changed) - base).max() > 1e-2
    moved = np.roll(given_["x"], 2, axis=2)  # by one patch
    assert np.abs(run(small_params(), x=moved) - np.roll(base, 2, axis=2)).max() > 1e-2
    far = jax.jit(jax.jacrev(lambda x: run(small_params(), x=x)[0, 0, 0, 0]))(given_["x"])
    assert np.abs(far[0]).reshape(2, 2, 3, 2, 3).max((1, 3, 4)).min() > 1e-5  # every patch of the same example
    assert not far[1].any()  # nothing of the other


@pytest.mark.parametrize(("legacy", "last"), [(False, 10_000 ** (-127 / 128)), (True, 1e-4)], ids=["paper", "diffusers"])
def test_modulations_are_of_the_time_embedding_plus_the_vector(legacy: bool, last: float) -> None:
    """Against numpy in float64: frequencies from 1 to `last`, a layer, SiLU, a layer, the vector, SiLU, the modulation's layer."""
    network = DiT(**SMALL, legacy_frequencies=legacy)
    _, state = network.apply(small_params(), **inputs(), capture_intermediates=lambda module, _: module.name == "final_modulation")
    (found,) = state["intermediates"]["final_modulation"]["__call__"]

    def layer(name: str, h: np.ndarray) -> np.ndarray:
        leaves = small_params()["params"][name]
        return h @ np.asarray(leaves["kernel"], np.float64) + np.asarray(leaves["bias"])

    def silu(h: np.ndarray) -> np.ndarray:
        return h / (1 + np.exp(-h))

    angles = np.array([[3.0], [700.0]]) * np.geomspace(1, last, 128)
    emb = layer("time_embed_2", silu(layer("time_embed_0", np.concatenate([np.cos(angles), np.sin(angles)], 1))))
    np.testing.assert_allclose(found, layer("final_modulation", silu(emb + np.asarray(inputs()["vector"]))), atol=1e-3)


def test_variance_channels_come_second_and_stay_inside() -> None:
    params = random_params(DiT(**SMALL, learn_sigma=True), **inputs())
    both = run(params, {"out_channels": 6})
    np.testing.assert_array_equal(run(params, {"learn_sigma": True}), both[..., :3])


def test_concat_joins_the_channels_and_crossattn_is_attended_to() -> None:
    concat, context = normal(5, 2, 4, 6, 2), normal(6, 2, 3, 5)
    fields = {"cross_attention": True, "qk_norm": True}
    params = random_params(DiT(**SMALL, **fields), **inputs(), concat=concat, crossattn=context)
    base = run(params, fields, concat=concat, crossattn=context)
    assert base.shape == (2, 4, 6, 3)
    joined = jnp.concatenate([inputs()["x"], concat], -1)
    np.testing.assert_array_equal(run(params, fields, x=joined, crossattn=context), base)
    assert np.abs(run(params, fields, concat=concat, crossattn=context.at[:, 1].add(1.0)) - base).max() > 1e-2
    np.testing.assert_allclose(run(params, fields, concat=concat, crossattn=context[:, ::-1]), base, atol=1e-5)


def test_dropout_acts_where_it_is_asked_to() -> None:
    network = DiT(**SMALL, dropout=0.5)
    drawn = [network.apply(small_params(), **inputs(), dropout_keys=jax.random.split(jax.random.key(i), 2)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-2
    np.testing.assert_allclose(network.apply(small_params(), **inputs()), run(small_params()), atol=1e-5)


def test_bfloat16_is_close_and_its_output_is_float32() -> None:
    full, low = run(small_params()), run(small_params(), {"dtype": jnp.bfloat16})
    assert low.dtype == jnp.float32
    assert np.linalg.norm(low - full) / np.linalg.norm(full) < 2e-2


def test_float64_is_float64_throughout() -> None:
    """A derivative by central differences of 1e-6 has an error of 1e-9 or so, which float32 anywhere inside would drown."""
    with jax.enable_x64(True):
        network = DiT(**SMALL, dtype=jnp.float64)
        params, given_ = (jax.tree.map(lambda a: jnp.asarray(np.asarray(a), jnp.float64), tree) for tree in (small_params(), inputs()))
        along = jnp.asarray(np.random.default_rng(0).normal(size=given_["x"].shape))
        function = jax.jit(lambda s: network.apply(params, **given_ | {"x": given_["x"] + s * along}))
        _, expected = jax.jvp(function, (0.0,), (1.0,))
        assert expected.dtype == jnp.float64
        np.testing.assert_allclose((function(1e-6) - function(-1e-6)) / 2e-6, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 18}, "width 18 is not divisible by 4"),
        ({"num_heads": 3}, "width 16 is not divisible into 3 heads"),
        ({"num_heads": 0}, "width 16 is not divisible into 0 heads"),
        ({"depth": 0}, "depth 0 is not positive"),
        ({"patch_size": 0}, "patch_size 0 is not positive"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio 0.0 leaves no hidden units"),
        ({"remat": "all"}, "remat 'all' is not one of none, blocks, full"),
    ],
)
def test_settings_without_sense_are_errors(fields: dict[str, Any], message: str) -> None:
    DiT(**SMALL).check()
    with pytest.raises(ValueError, match=message):
        DiT(**SMALL | fields).check()


@pytest.mark.parametrize(
    ("fields", "changed", "message"),
    [
        ({"patch_size": 4}, {}, "a latent of 4x6 is not divisible into patches of 4"),
        ({}, {"crossattn": np.zeros((2, 3, 5))}, "crossattn is given, but cross_attention is off"),
        ({"cross_attention": True}, {}, "cross_attention is on, but no crossattn is given"),
        ({}, {"vector": np.zeros((2, 1))}, "vector has 1 features; it is added to a time embedding of 16"),
    ],
)
def test_inputs_that_do_not_fit_are_errors(fields: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(**SMALL | fields).init(jax.random.key(0), **inputs() | changed)
