"""The text encoder that trains with the denoiser: the paper's BERTEmbedder (Rombach et al. 2022, appendix E.2.1, table 17)."""

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.nn.attention import MultiHeadAttention
from ldm_jax.nn.layers import Array, Dense, Dtype, gelu

# Large beside what an untrained layer adds, so that tokens and places differ from the first step: with the usual 0.02, the layers' uniform
# attention drowns them, and a small model takes captions for bags of words for thousands of steps (docs/performance.md).
_embedding = nn.initializers.normal(1.0)


class TextTransformer(nn.Module):
    """Token ids int32 [B,L] to embeddings [B,L,width]: pre-norm transformer with learned positions and a final norm.

    As in the paper there is no padding mask.

    Attributes:
      vocab_size, max_length: sizes of the token and position tables.
      num_heads, head_dim: 8 x 64 at any width in the paper.
    """

    vocab_size: int
    max_length: int
    width: int
    depth: int
    num_heads: int = 8
    head_dim: int = 64
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        table = self.param("token_embedding", _embedding, (self.vocab_size, self.width))
        positions = self.param("position_embedding", _embedding, (self.max_length, self.width))
        x = jnp.asarray(table[tokens] + positions[: tokens.shape[1]], self.dtype)

        def normed(name: str, y: Array) -> Array:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=name)(y)

        for i in range(self.depth):
            x = x + MultiHeadAttention(self.num_heads, self.head_dim, self.dtype, name=f"layer_{i}_attn")(normed(f"layer_{i}_norm1", x))
            h = Dense(4 * self.width, dtype=self.dtype, name=f"layer_{i}_ff_in")(normed(f"layer_{i}_norm2", x))
            x = x + Dense(self.width, dtype=self.dtype, name=f"layer_{i}_ff_out")(gelu(h))
        return normed("final_norm", x)
