"""The text encoder that trains with the denoiser: the paper's BERTEmbedder (Rombach et al. 2022, appendix E.2.1, table 17)."""

import math

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.nn.attention import MultiHeadAttention
from ldm_jax.nn.layers import Array, Dense, Dtype, gelu
from ldm_jax.nn.remat import rematted, rematted_group

# Large beside what an untrained layer adds, so that tokens and places differ from the first step: with the usual 0.02, the layers' uniform
# attention drowns them, and a small model takes captions for bags of words for thousands of steps (docs/performance.md).
_embedding = nn.initializers.normal(1.0)


class TextTransformer(nn.Module):
    """Token ids int32 [B,L] to embeddings [B,L,width]: pre-norm transformer with learned positions and a final norm.

    As in the paper there is no padding mask.

    Attributes:
      vocab_size, max_length: sizes of the token and position tables.
      num_heads, head_dim: 8 x 64 at any width in the paper.
      remat: which activations are kept for the backward pass, see `nn.remat`; a block is a layer, a group of them about sqrt(depth).
    """

    vocab_size: int
    max_length: int
    width: int
    depth: int
    num_heads: int = 8
    head_dim: int = 64
    dtype: Dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        table = self.param("token_embedding", _embedding, (self.vocab_size, self.width))
        positions = self.param("position_embedding", _embedding, (self.max_length, self.width))
        x = jnp.asarray(table[tokens] + positions[: tokens.shape[1]], self.dtype)
        group = max(math.isqrt(self.depth), 1)
        for start in range(0, self.depth, group):
            layers = rematted_group(TextTransformer._layers, self.remat, (1,))
            x = layers(self, range(start, min(start + group, self.depth)), x)
        return self._norm("final_norm", x)

    def _norm(self, name: str, x: Array) -> Array:
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=name)(x)

    def _layers(self, which: range, x: Array) -> Array:
        for i in which:
            x = rematted(TextTransformer._layer, self.remat, (1,))(self, i, x)
        return x

    def _layer(self, i: int, x: Array) -> Array:
        attend = MultiHeadAttention(self.num_heads, self.head_dim, self.dtype, name=f"layer_{i}_attn")
        x = x + attend(self._norm(f"layer_{i}_norm1", x))
        h = Dense(4 * self.width, dtype=self.dtype, name=f"layer_{i}_ff_in")(self._norm(f"layer_{i}_norm2", x))
        return x + Dense(self.width, dtype=self.dtype, name=f"layer_{i}_ff_out")(gelu(h))
