"""Vector quantisation: a codebook of vectors, of which every latent takes the nearest (van den Oord et al. 2017, arXiv 1711.00937).

What a batch puts on the entries is a dict of *clusters*, whose averages over equal parts of a batch are those of the whole:

* `size` [n]: latents that took the entry, as a multiple of the average entry's, so that its mean is 1;
* `sum` [n,d]: `size` times the mean of these latents.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nn.layers import Array, Dtype

Clusters = dict[str, Array]
_SMOOTHING = 1e-5  # of cluster sizes, whose mean is 1


class Codebook(nn.Module):
    """`size` entries of `features` numbers: the parameter `embedding` [size, features], at first uniform in [-1/size, 1/size]."""

    size: int
    features: int

    @nn.compact
    def __call__(self, z: Array) -> tuple[Array, Array]:
        """Latents [B,h,w,d] to the entry that each takes [B,h,w,d], in at least float32, and its index int32 [B,h,w].

        Gradients reach the codebook through the entries, and nothing reaches z.
        """
        embedding = _wide(self.param("embedding", _uniform, (self.size, self.features)), z.dtype)
        indices = nearest(z, embedding)
        return embedding[indices], indices


def _uniform(key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -1.0 / shape[0], 1.0 / shape[0])


def nearest(z: Array, embedding: Array) -> Array:
    """Index of the entry nearest by L2, the first of equal ones: latents [B,h,w,d] and entries [n,d] to int32 [B,h,w].

    Distances are in at least float32 and taken row by row, so that no more than [B,w,n] of them exist at a time: those of a batch of
    64x64 latents to 8192 entries would fill gigabytes.
    """
    z, embedding = (jax.lax.stop_gradient(_wide(a, z.dtype)) for a in (z, embedding))
    squares = jnp.sum(jnp.square(embedding), axis=-1)

    def row(z: Array) -> Array:
        # |z - e|^2 without |z|^2, which is the same for all entries. Full precision, as accelerators would round the factors.
        distances = squares - 2.0 * jnp.matmul(z, embedding.T, precision="highest")
        return jnp.argmin(distances, axis=-1).astype(jnp.int32)

    return jax.lax.map(row, z.swapaxes(0, 1)).swapaxes(0, 1)


def straight_through(z: Array, entries: Array) -> Array:
    """The entries exactly, with the gradient passed on to z as if nothing had been quantised (section 3.2)."""
    return jax.lax.stop_gradient(entries) + (z - jax.lax.stop_gradient(z))


def codebook_loss(z: Array, entries: Array, beta: float = 0.25, legacy_beta: bool = False) -> Array:
    """|sg(z) - e|^2 + beta |z - sg(e)|^2 (equation 3) as a mean over each example's values: [B,h,w,d] twice to [B].

    `legacy_beta` puts beta on the first term, which moves the codebook, in place of the second, which holds the encoder to it: so were all
    released VQ models trained.
    """
    moves_codebook, moves_encoder = (beta, 1.0) if legacy_beta else (1.0, beta)
    codebook = jnp.mean(jnp.square(jax.lax.stop_gradient(z) - entries), axis=(1, 2, 3))
    commitment = jnp.mean(jnp.square(z - jax.lax.stop_gradient(entries)), axis=(1, 2, 3))
    return moves_codebook * codebook + moves_encoder * commitment


def clusters(z: Array, indices: Array, size: int) -> Clusters:
    """The clusters of a batch of latents [B,h,w,d] by the indices [B,h,w] of the entries they took; not differentiated."""
    flat, index = jax.lax.stop_gradient(z).reshape(-1, z.shape[-1]), indices.reshape(-1)
    scale = size / index.size
    counts = jnp.zeros(size, z.dtype).at[index].add(1.0)
    sums = jnp.zeros((size, z.shape[-1]), z.dtype).at[index].add(flat)
    return {"size": counts * scale, "sum": sums * scale}


def perplexity(size: Array) -> Array:
    """exp of the entropy of cluster sizes [n]: from 1, one entry has all, to n, all have as many."""
    return jnp.exp(jnp.sum(jax.scipy.special.entr(size / jnp.sum(size))))


def usage(size: Array) -> Array:
    """Share of the entries that have any latent, by cluster sizes [n]."""
    return jnp.mean((size > 0).astype(size.dtype))


def clusters_of(embedding: Array) -> Clusters:
    """Clusters of equal size about the entries [n,d]: where moving averages begin."""
    return {"size": jnp.ones(embedding.shape[0], embedding.dtype), "sum": jnp.copy(embedding)}


def means(averages: Clusters) -> Array:
    """The entries [n,d] that moving averages of clusters stand for: sum over size (appendix A.1, equations 6 to 8).

    Sizes have Laplace smoothing (Razavi et al. 2019, arXiv 1906.00446, and its code), so that an entry that nothing takes any more goes to
    the origin instead of dividing by zero.
    """
    smoothed = (averages["size"] + _SMOOTHING) / (1.0 + _SMOOTHING)
    return averages["sum"] / smoothed[:, None]


def _wide(x: Array, dtype: Dtype) -> Array:
    return x.astype(jnp.promote_types(dtype, jnp.float32))
