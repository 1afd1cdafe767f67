"""CLIP's text encoder against its definition in numpy; what it sees, what it skips, its types, and bad settings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from ldm_jax.nn.clip_text import CLIPText

SIZES: dict[str, Any] = {"vocab_size": 11, "max_length": 7, "width": 12, "depth": 3, "num_heads": 3}
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 10, 0]], np.int32)


def random_params(network: CLIPText) -> dict[str, Any]:
    """Every parameter random: scales about 1, the others small."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0), TOKENS)["params"]

    def draw(path: Any, leaf: Any) -> np.ndarray:
        return (rng.normal(size=leaf.shape) * 0.4 + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def run(params: Any, tokens: np.ndarray = TOKENS, **settings: Any) -> jax.Array:
    network = CLIPText(**SIZES | settings)
    return jax.jit(lambda p, t: network.apply({"params": p}, t))(params, tokens)


def definition(params: dict[str, Any], tokens: np.ndarray, layers: int, activation: str) -> np.ndarray:
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    heads, width, length = SIZES["num_heads"], SIZES["width"], tokens.shape[1]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p[name]["scale"] + p[name]["bias"]

    def linear(w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return x @ w["kernel"] + w["bias"]

    x = p["token_embedding"][tokens] + p["position_embedding"][:length]
    for i in range(layers):
        weights, h = p[f"layer_{i}_attn"], norm(f"layer_{i}_norm1", x)
        q, k, v = (linear(weights[n], h).reshape(-1, length, heads, width // heads) for n in "qkv")
        y = np.zeros_like(q)
        for t in range(length):  # a query sees the keys up to its own
            logits = np.einsum("bnd,bsnd->bns", q[:, t], k[:, : t + 1]) / np.sqrt(width // heads)
            attended = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            y[:, t] = np.einsum("bns,bsnd->bnd", attended, v[:, : t + 1])
        x = x + linear(weights["out"], y.reshape(x.shape))
        h = linear(p[f"layer_{i}_ff_in"], norm(f"layer_{i}_norm2", x))
        h = h / (1 + np.exp(-1.702 * h)) if activation == "quick_gelu" else h * (1 + erf(h / np.sqrt(2))) / 2
        x = x + linear(p[f"layer_{i}_ff_out"], h)
    return norm("final_norm", x)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("skip_last", [0, 1])
def test_equals_its_definition(activation: str, skip_last: int) -> None:
    params = random_params(CLIPText(**SIZES, skip_last=skip_last))
    found = run(params, activation=activation, skip_last=skip_last)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, definition(params, TOKENS, 3 - skip_last, activation), atol=2e-5)


def test_a_token_changes_its_own_and_later_embeddings_only() -> None:
    params, changed = random_params(CLIPText(**SIZES)), TOKENS.copy()
    changed[:, 4] = 7
    before, after = run(params), run(params, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before - after)[:, 4:].max(-1).min() > 1e-3


def test_a_shorter_text_has_the_embeddings_of_its_beginning() -> None:
    params = random_params(CLIPText(**SIZES))
    np.testing.assert_allclose(run(params, TOKENS[:, :4]), run(params)[:, :4], atol=1e-5)


def test_layers_that_are_skipped_do_not_exist() -> None:
    whole, skipping = random_params(CLIPText(**SIZES)), random_params(CLIPText(**SIZES, skip_last=2))
    assert whole.keys() - skipping.keys() == {name for name in whole if name.startswith(("layer_1_", "layer_2_"))}


def test_bfloat16_is_close() -> None:
    params = random_params(CLIPText(**SIZES))
    full, low = run(params), run(params, dtype=jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    assert np.linalg.norm(low.astype(jnp.float32) - full) < 2e-2 * np.linalg.norm(full)


def test_float64_is_float64_throughout() -> None:
    params = random_params(CLIPText(**SIZES))
    with jax.enable_x64(True):
        found = run(jax.tree.map(lambda a: a.astype(np.float64), params), dtype=jnp.float64)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, definition(params, TOKENS, 3, "quick_gelu"), atol=1e-12)


@pytest.mark.parametrize("wrong", [{"num_heads": 5}, {"skip_last": 3}, {"skip_last": -1}, {"activation": "relu"}])
def test_settings_that_do_not_go_together_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="heads do not divide, fewer layers than it skips, or an unknown activation"):
        jax.eval_shape(CLIPText(**SIZES | wrong).init, jax.random.key(0), TOKENS)
