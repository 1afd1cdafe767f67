"""The text encoder of CLIP (Radford et al. 2021, section 2.4), and of OpenCLIP: what Stable Diffusion reads its captions with."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.nn.attention import MultiHeadAttention, mask_bias
from ldm_jax.nn.layers import Array, Dense, Dtype, gelu


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the approximation of the GELU (Hendrycks & Gimpel 2016, section 2) that CLIP was trained with."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


class CLIPText(nn.Module):
    """Token ids int32 [B,L], L <= max_length, to embeddings [B,L,width] in `dtype`: a causal pre-norm transformer and a final norm.

    Raises ValueError for settings that do not go together.

    Attributes:
      vocab_size, max_length: sizes of the token and position tables.
      depth: layers of the published network.
      num_heads: of width/num_heads channels each.
      activation: a key of `ACTIVATIONS`.
      skip_last: the final norm is of the output of layer depth - skip_last, and the layers after it do not exist here, for nothing reads
        them. 0 in Stable Diffusion 1, 1 in Stable Diffusion 2.
    """

    vocab_size: int
    max_length: int
    width: int
    depth: int
    num_heads: int
    activation: str = "quick_gelu"
    skip_last: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        if self.width % self.num_heads or not 0 <= self.skip_last < self.depth or self.activation not in ACTIVATIONS:
            raise ValueError(f"{self} has a width that its heads do not divide, fewer layers than it skips, or an unknown activation")
        length = tokens.shape[1]
        table = self.param("token_embedding", nn.initializers.normal(0.02), (self.vocab_size, self.width))
        positions = self.param("position_embedding", nn.initializers.normal(0.01), (self.max_length, self.width))
        x = jnp.asarray(table[tokens] + positions[:length], self.dtype)
        causal = mask_bias(jnp.tri(length, dtype=bool), self.dtype)

        def normed(name: str, y: Array) -> Array:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=name)(y)

        for i in range(self.depth - self.skip_last):
            attend = MultiHeadAttention(self.num_heads, self.width // self.num_heads, self.dtype, qkv_bias=True, name=f"layer_{i}_attn")
            x = x + attend(normed(f"layer_{i}_norm1", x), bias=causal)
            h = Dense(4 * self.width, dtype=self.dtype, name=f"layer_{i}_ff_in")(normed(f"layer_{i}_norm2", x))
            x = x + Dense(self.width, dtype=self.dtype, name=f"layer_{i}_ff_out")(ACTIVATIONS[self.activation](h))
        return normed("final_norm", x)
