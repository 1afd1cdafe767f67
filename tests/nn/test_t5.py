"""T5's encoder against its definition in numpy: buckets of distances, masks, what it cannot tell apart, and types."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_jax.nn.t5 import T5Encoder, relative_buckets

SIZES: dict[str, Any] = {"vocab_size": 11, "width": 10, "depth": 2, "num_heads": 3, "head_dim": 4, "ff_width": 14}
SIZES |= {"num_buckets": 8, "max_distance": 6}  # small enough for a short text to reach the last bucket
TOKENS = np.random.default_rng(1).integers(0, 11, (2, 9)).astype(np.int32)
MASK = np.arange(9) < np.array([[5], [9]])


def random_params() -> dict[str, Any]:
    """Every parameter random: scales about 1, the others small."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(T5Encoder(**SIZES).init, jax.random.key(0), TOKENS)["params"]

    def draw(path: Any, leaf: Any) -> np.ndarray:
        return (rng.normal(size=leaf.shape) * 0.4 + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def run(params: Any, tokens: np.ndarray = TOKENS, mask: Any = None, dtype: Any = jnp.float32) -> jax.Array:
    network = T5Encoder(**SIZES, dtype=dtype)
    return jax.jit(lambda p, t, m: network.apply({"params": p}, t, m))(params, tokens, mask)


def bucket(key: int, query: int, num_buckets: int, max_distance: int) -> int:
    """The rule, in integers: in each half, `exact` buckets of one distance each; then bucket exact + j begins at the distance
    exact (max_distance / exact)^(j / wide), for `wide` buckets of which the last has no end."""
    half = num_buckets // 2
    exact = half // 2
    wide, distance = half - exact, abs(key - query)
    if distance >= exact:
        begun = [j for j in range(wide) if distance**wide * exact**j >= max_distance**j * exact**wide]
        distance = exact + begun[-1]
    return distance + (half if key > query else 0)


def definition(params: dict[str, Any], tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    length, split = tokens.shape[1], (*tokens.shape, SIZES["num_heads"], SIZES["head_dim"])
    bias = np.zeros((SIZES["num_heads"], length, length))
    for query, key in itertools.product(range(length), repeat=2):
        bias[:, query, key] = p["position_bias"][bucket(key, query, SIZES["num_buckets"], SIZES["max_distance"])]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[name]["scale"]

    x = p["token_embedding"][tokens]
    for i in range(SIZES["depth"]):
        weights, h = p[f"layer_{i}_attn"], norm(f"layer_{i}_norm1", x)
        q, k, v = ((h @ weights[n]["kernel"]).reshape(split) for n in "qkv")
        attended = np.exp(np.einsum("btnd,bsnd->bnts", q, k) + bias) * mask[:, None, None]
        y = np.einsum("bnts,bsnd->btnd", attended / attended.sum(-1, keepdims=True), v)
        x = x + y.reshape(*tokens.shape, -1) @ weights["out"]["kernel"]
        h = norm(f"layer_{i}_norm2", x)
        gate, value = (h @ p[f"layer_{i}_ff_{n}"]["kernel"] for n in ("gate", "in"))
        gate = gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2
        x = x + (gate * value) @ p[f"layer_{i}_ff_out"]["kernel"]
    return norm("final_norm", x)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 6), (16, 100), (32, 20), (64, 512)])
def test_buckets_follow_the_rule(num_buckets: int, max_distance: int) -> None:
    distances = np.arange(-700, 701)
    expected = [bucket(int(d), 0, num_buckets, max_distance) for d in distances]
    found = relative_buckets(distances, num_buckets, max_distance)
    np.testing.assert_array_equal(found, expected)
    assert set(found) == set(range(num_buckets)) - {num_buckets // 2}  # distance 0 of keys that come after does not occur


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_buckets_grow_with_the_distance_on_either_side(a: int, b: int) -> None:
    near, far = sorted((a, b))
    before = relative_buckets(np.array([-near, -far]))
    assert before[0] <= before[1] <= 15
    np.testing.assert_array_equal(relative_buckets(np.array([near, far])), before + 16 * (np.array([near, far]) > 0))


@pytest.mark.parametrize("masked", [False, True])
def test_equals_its_definition(masked: bool) -> None:
    params = random_params()
    found = run(params, mask=MASK if masked else None)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, definition(params, TOKENS, MASK if masked else np.ones_like(MASK)), atol=5e-5)


def test_tokens_under_the_mask_change_nothing() -> None:
    params, changed = random_params(), TOKENS.copy()
    changed[0, 5:] = (changed[0, 5:] + 1) % 11
    before, after = run(params, mask=MASK), run(params, changed, MASK)
    np.testing.assert_array_equal(before[MASK], after[MASK])
    assert np.abs(run(params) - run(params, changed))[MASK].max() > 1e-3  # without the mask they do
    np.testing.assert_allclose(before[:1, :5], run(params, TOKENS[:1, :5]), atol=1e-5)


def test_only_distances_count() -> None:
    """The same text behind padding that nothing sees has the same embeddings."""
    params = random_params()
    shifted = np.pad(TOKENS, ((0, 0), (4, 0)))
    found = run(params, shifted, np.arange(13) >= np.array([[4], [4]]))
    np.testing.assert_allclose(found[:, 4:], run(params), atol=2e-5)


def test_masks_of_numbers_and_of_nothing() -> None:
    params = random_params()
    np.testing.assert_array_equal(run(params, mask=MASK.astype(np.int32)), run(params, mask=MASK))
    np.testing.assert_array_equal(run(params, mask=np.ones_like(MASK)), run(params))
    assert np.isfinite(run(params, mask=np.zeros_like(MASK))).all()


def test_bfloat16_is_close() -> None:
    params = random_params()
    full, low = run(params, mask=MASK), run(params, mask=MASK, dtype=jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    assert np.linalg.norm(low.astype(jnp.float32) - full) < 3e-2 * np.linalg.norm(full)


def test_float64_is_float64_throughout() -> None:
    params = random_params()
    with jax.enable_x64(True):
        found = run(jax.tree.map(lambda a: a.astype(np.float64), params), mask=MASK, dtype=jnp.float64)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, definition(params, TOKENS, MASK), atol=1e-12)
