"""The encoder of T5, version 1.1 (Raffel et al. 2020; its feed-forward of Shazeer 2020)."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ldm_jax.nn.attention import MultiHeadAttention, mask_bias
from ldm_jax.nn.layers import Array, Dense, Dtype


def relative_buckets(relative: np.ndarray, num_buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """The bucket, in [0, num_buckets), of each relative position: the key's place minus the query's (Raffel et al. 2020, section 2.1).

    The upper half of the buckets is for keys that come after the query. In each half, the first half of the buckets is for one distance
    each, and the others widen geometrically up to `max_distance`; the last takes all that is farther.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    # The bounds are powers of two for the usual settings, which the logarithm to base two hits exactly and others may miss.
    wide = exact + np.log2(np.maximum(distance, exact) / exact) / np.log2(max_distance / exact) * (half - exact)
    return half * (relative > 0) + np.where(distance < exact, distance, np.minimum(wide.astype(np.int64), half - 1))


class T5Encoder(nn.Module):
    """Token ids int32 [B,L] to embeddings [B,L,width] in `dtype`: a pre-norm transformer with RMS norms, no biases, and a final norm.

    Places enter as a learned bias of the attention logits, one for each head and bucket of distances, the same in all layers. The logits
    are not divided by sqrt(head_dim).

    Attributes:
      num_heads, head_dim: whose product need not be the width.
      ff_width: of the hidden layer of the feed-forward, GELU (by tanh) of one linear map times another.
      num_buckets, max_distance: as in `relative_buckets`.
    """

    vocab_size: int
    width: int
    depth: int
    num_heads: int
    head_dim: int
    ff_width: int
    num_buckets: int = 32
    max_distance: int = 128
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, mask: Array | None = None) -> Array:
        """`mask` [B,L]: which tokens may be attended to (bool, or numbers of which 0 is no); None: all."""
        table = self.param("token_embedding", nn.initializers.normal(1.0), (self.vocab_size, self.width))
        x = jnp.asarray(table[tokens], self.dtype)
        bias = self._position_bias(tokens.shape[1])
        if mask is not None:
            bias = bias + mask_bias(mask[:, None, None] != 0, self.dtype)

        def dense(name: str, features: int, y: Array) -> Array:
            return Dense(features, use_bias=False, dtype=self.dtype, name=name)(y)

        def normed(name: str, y: Array) -> Array:
            return nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=name)(y)

        for i in range(self.depth):
            attend = MultiHeadAttention(self.num_heads, self.head_dim, self.dtype, out_bias=False, scale=1.0, name=f"layer_{i}_attn")
            x = x + attend(normed(f"layer_{i}_norm1", x), bias=bias)
            h = normed(f"layer_{i}_norm2", x)
            gate = nn.gelu(dense(f"layer_{i}_ff_gate", self.ff_width, h), approximate=True)
            x = x + dense(f"layer_{i}_ff_out", self.width, gate * dense(f"layer_{i}_ff_in", self.ff_width, h))
        return normed("final_norm", x)

    def _position_bias(self, length: int) -> Array:
        """[1,N,L,L] in at least float32."""
        table = self.param("position_bias", nn.initializers.normal(0.1), (self.num_buckets, self.num_heads))
        places = np.arange(length)
        buckets = relative_buckets(places[None, :] - places[:, None], self.num_buckets, self.max_distance)
        return jnp.asarray(table, jnp.promote_types(self.dtype, jnp.float32))[buckets].transpose(2, 0, 1)[None]
