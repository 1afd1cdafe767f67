"""Attention against numpy, and the blocks of the paper's UNet."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn.attention import GEGLU, AttentionBlock, MultiHeadAttention, SpatialTransformer, attention


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    logits = np.einsum("btnd,bsnd->bnts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_equals_numpy(dtype: jnp.dtype) -> None:
    q, k, v = (normal(i, 2, n, 3, 8).astype(dtype) for i, n in enumerate((5, 7, 7)))
    y = attention(q, k, v)
    assert y.dtype == dtype
    expected = plain(*(np.asarray(a, np.float64) for a in (q, k, v)))
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=1e-5 if dtype == jnp.float32 else 3e-2)


@pytest.mark.parametrize("queries", [8, 11])
def test_attention_by_chunks_of_queries_is_the_same(monkeypatch: pytest.MonkeyPatch, queries: int) -> None:
    q, k, v = normal(0, 2, queries, 3, 8), normal(1, 2, 7, 3, 8), normal(2, 2, 7, 3, 8)

    def run() -> tuple[jax.Array, tuple[jax.Array, ...]]:
        loss = lambda *args: jnp.sum(attention(*args) ** 2)  # noqa: E731
        return jax.jit(lambda *args: attention(*args))(q, k, v), jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    whole = run()
    monkeypatch.setattr("ldm_jax.nn.attention._WHOLE_UP_TO", 7 * queries - 1)  # chunks of 1 or 2 queries
    assert "while" in jax.jit(attention).lower(q, k, v).as_text()
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), run(), whole)


def test_multi_head_attention_equals_its_definition() -> None:
    x, context = normal(0, 2, 4, 6), normal(1, 2, 3, 5)
    module = MultiHeadAttention(2, 8)
    p = module.init(jax.random.key(0), x, context)
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), p["params"])
    read = {"q": np.asarray(x), "k": np.asarray(context), "v": np.asarray(context)}
    q, k, v = ((y @ w[name]["kernel"]).reshape(2, -1, 2, 8) for name, y in read.items())
    expected = plain(q, k, v).reshape(2, 4, 16) @ w["out"]["kernel"] + w["out"]["bias"]
    np.testing.assert_allclose(module.apply(p, x, context), expected, atol=1e-5)


def test_geglu_gates_the_first_half_by_the_exact_gelu_of_the_second() -> None:
    from scipy.special import erf

    x = normal(0, 1, 3, 4)
    module = GEGLU()
    p = module.init(jax.random.key(0), x)
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), p["params"])
    h = np.asarray(x, np.float64) @ w["proj"]["kernel"] + w["proj"]["bias"]
    value, gate = np.split(h, 2, -1)
    expected = (value * gate * 0.5 * (1 + erf(gate / np.sqrt(2)))) @ w["out"]["kernel"] + w["out"]["bias"]
    np.testing.assert_allclose(module.apply(p, x), expected, atol=1e-5)


def test_blocks_begin_as_the_identity_and_see_the_context() -> None:
    x, context = normal(0, 1, 4, 4, 8), normal(1, 1, 3, 5)
    transformer, block = SpatialTransformer(2, 4), AttentionBlock(2)
    p = transformer.init(jax.random.key(0), x, context)
    np.testing.assert_array_equal(transformer.apply(p, x, context), x)
    np.testing.assert_array_equal(block.apply(block.init(jax.random.key(0), x), x), x)
    p["params"]["proj_out"]["kernel"] = normal(2, 8, 8)
    assert np.abs(transformer.apply(p, x, context) - transformer.apply(p, x, context + 1)).max() > 1e-3


def test_self_attention_moves_with_its_positions() -> None:
    x = normal(0, 1, 4, 4, 8)
    block = AttentionBlock(2, zero_init=False)
    p = block.init(jax.random.key(0), x)
    np.testing.assert_allclose(block.apply(p, x[:, ::-1]), block.apply(p, x)[:, ::-1], atol=1e-5)
