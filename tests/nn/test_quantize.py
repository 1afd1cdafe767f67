"""Vector quantisation against brute force in numpy and closed forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn.quantize import (
    Codebook,
    clusters,
    clusters_of,
    codebook_loss,
    means,
    nearest,
    perplexity,
    straight_through,
    usage,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def lookup(z: Any, embedding: Any) -> tuple[jax.Array, jax.Array]:
    return Codebook(*embedding.shape).apply({"params": {"embedding": embedding}}, z)


@pytest.mark.parametrize(("size", "features", "scale"), [(1, 3, 1.0), (7, 3, 1.0), (300, 4, 1e-3), (64, 1, 30.0)])
def test_each_latent_takes_the_entry_at_the_smallest_distance(size: int, features: int, scale: float) -> None:
    z, embedding = normal(0, 3, 5, 4, features, scale=scale), normal(1, size, features, scale=scale)
    distances = np.square(z[..., None, :].astype(np.float64) - embedding).sum(-1)
    indices = np.asarray(jax.jit(nearest)(z, embedding))
    assert indices.shape == (3, 5, 4) and indices.dtype == np.int32
    chosen = np.take_along_axis(distances, indices[..., None], -1)[..., 0]
    assert (chosen <= distances.min(-1) + 1e-5 * scale**2).all()
    assert (indices == distances.argmin(-1)).mean() > 0.95  # but for distances that are equal in float32
    entries, same = lookup(z, embedding)
    np.testing.assert_array_equal(same, indices)
    np.testing.assert_array_equal(entries, embedding[indices])


def test_an_entry_is_its_own_and_of_equal_ones_the_first_is_taken() -> None:
    embedding = normal(0, 6, 3)
    embedding[4] = embedding[1]
    _, indices = lookup(embedding.reshape(1, 2, 3, 3), embedding)
    np.testing.assert_array_equal(indices, [[[0, 1, 2], [3, 1, 5]]])


def test_distances_are_float32_for_bfloat16_latents() -> None:
    """Entries that bfloat16 cannot tell apart."""
    embedding = jnp.array([[1.0, 1.0], [1.001, 1.001], [1.002, 1.002]])
    z = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    entries, indices = lookup(z, embedding)
    assert entries.dtype == jnp.float32 and int(indices[0, 0, 0]) == 0
    np.testing.assert_array_equal(entries[0, 0, 0], embedding[0])


def test_an_untrained_codebook_is_uniform_about_zero() -> None:
    params = Codebook(500, 8).init(jax.random.key(0), jnp.zeros((1, 1, 1, 8)))["params"]
    embedding = np.asarray(params["embedding"]) * 500
    assert embedding.shape == (500, 8) and np.abs(embedding).max() <= 1
    np.testing.assert_allclose(embedding.std(), 1 / np.sqrt(3), rtol=0.05)


def test_straight_through_is_the_entry_forward_and_the_identity_backward() -> None:
    z, embedding, weight = normal(0, 2, 3, 3, 4, scale=1e3), normal(1, 9, 4), normal(2, 2, 3, 3, 4)

    def weighed(z: jax.Array, embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
        quantised = straight_through(z, lookup(z, embedding)[0])
        return jnp.sum(weight * quantised), quantised

    (d_z, d_embedding), quantised = jax.jit(jax.grad(weighed, argnums=(0, 1), has_aux=True))(z, embedding)
    np.testing.assert_array_equal(quantised, lookup(z, embedding)[0])
    np.testing.assert_array_equal(d_z, weight)
    np.testing.assert_array_equal(d_embedding, 0)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_loss_and_its_gradients_have_their_closed_forms(legacy: bool) -> None:
    z, embedding, beta, values = normal(0, 2, 3, 4, 5), normal(1, 7, 5), 0.3, 3 * 4 * 5

    def loss(z: jax.Array, embedding: jax.Array) -> jax.Array:
        return jnp.sum(codebook_loss(z, lookup(z, embedding)[0], beta, legacy))

    entries, indices = (np.asarray(a) for a in lookup(z, embedding))
    each = codebook_loss(z, entries, beta, legacy)
    np.testing.assert_allclose(each, (1 + beta) * np.square(z - entries).mean((1, 2, 3)), rtol=1e-5)
    d_z, d_embedding = jax.jit(jax.grad(loss, argnums=(0, 1)))(z, embedding)
    moves_encoder, moves_codebook = (1.0, beta) if legacy else (beta, 1.0)
    np.testing.assert_allclose(d_z, moves_encoder * 2 * (z - entries) / values, rtol=1e-5, atol=1e-8)
    expected = np.zeros_like(embedding)
    np.add.at(expected, indices.ravel(), (moves_codebook * 2 * (entries - z) / values).reshape(-1, 5))
    np.testing.assert_allclose(d_embedding, expected, rtol=1e-4, atol=1e-7)


def test_clusters_are_counts_and_sums_and_average_over_parts_of_a_batch() -> None:
    z, n = normal(0, 4, 3, 3, 2), 5
    indices = np.random.default_rng(1).integers(0, n - 1, (4, 3, 3))  # the last entry has none
    made = clusters(z, indices, n)
    counts = np.bincount(indices.ravel(), minlength=n)
    np.testing.assert_allclose(made["size"], counts * n / indices.size, rtol=1e-6)
    assert float(made["size"].mean()) == pytest.approx(1) and made["size"][n - 1] == 0
    for k in range(n):
        np.testing.assert_allclose(made["sum"][k], z[indices == k].sum(0) * n / indices.size, rtol=1e-4, atol=1e-6)
    halves = [clusters(z[i::2], indices[i::2], n) for i in (0, 1)]
    for name, whole in made.items():
        np.testing.assert_allclose((halves[0][name] + halves[1][name]) / 2, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "expected", "used"),
    [
        ([1, 1, 1, 1], 4, 1),
        ([4, 0, 0, 0], 1, 0.25),
        ([2, 0, 2, 0], 2, 0.5),
        ([2, 1, 1, 0], 2**1.5, 0.75),
    ],
)
def test_perplexity_and_usage_of_known_clusters(size: list[float], expected: float, used: float) -> None:
    assert float(perplexity(jnp.array(size, jnp.float32))) == pytest.approx(expected, rel=1e-6)
    assert float(usage(jnp.array(size, jnp.float32))) == used


def test_moving_averages_begin_at_the_entries_and_end_at_the_clusters_means() -> None:
    rng = np.random.default_rng(0)
    centers = np.array([[-3.0, 0], [3, 0], [0, 4]])
    spread = 0.3 * rng.normal(size=(3, 64, 2))
    points = (centers[:, None] + spread).reshape(3, 8, 8, 2).astype(np.float32)
    start = jnp.asarray([[-1.0, 0.5], [1.0, 0.5], [0.0, 1.5], [50.0, 50.0]])  # nothing ever takes the last
    averages = clusters_of(start)
    np.testing.assert_allclose(means(averages), start, rtol=1e-6)

    @jax.jit
    def follow(averages: Any) -> Any:
        _, indices = lookup(points, means(averages))
        return jax.tree.map(lambda m, b: m + 0.2 * (b - m), averages, clusters(points, indices, 4))

    for _ in range(150):
        averages = follow(averages)
    entries = np.asarray(means(averages))
    np.testing.assert_allclose(entries[:3], points.mean((1, 2)), atol=1e-3)
    assert np.abs(entries[3]).max() < 1
    np.testing.assert_allclose(averages["size"], [4 / 3, 4 / 3, 4 / 3, 0], atol=1e-3)
