"""Attention: one dispatcher to the fused kernels, and the blocks of the paper's UNet (Rombach et al. 2022, section 3.3, appendix E.2.1)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nn.layers import Array, Dense, Dropout, Dtype, Initializer, fan_in_uniform, gelu, norm, norm_groups, zeros
from ldm_jax.nn.remat import kept

# Below this many query positions the logits are small and XLA's own fusion is as fast as cuDNN's kernel.
_FUSED_FROM = 1024

# Above this many logits a head, which is above the size of any training, they are never held all at once.
_WHOLE_UP_TO = 2**26


def attention(q: Array, k: Array, v: Array, bias: Array | None = None, scale: float | None = None) -> Array:
    """softmax(scale q k^T + bias) v for q [B,T,N,D], k and v [B,S,N,D]; softmax in at least float32. Returns [B,T,N,D] in q's dtype.

    Args:
      bias: of a shape that broadcasts to [B,N,T,S].
      scale: 1/sqrt(D) where None.
    """
    head_dim = q.shape[-1]
    fused = (
        bias is None
        and jax.default_backend() == "gpu"
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[1] >= _FUSED_FROM
        and head_dim % 8 == 0
        and head_dim <= 128  # the limit of every generation since Ampere, backward pass included
    )
    if fused:
        return kept(jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn"), "attention")
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # Heads before positions: one batched matrix product, twice as fast on CPU as with the heads between.
    q, k, v = (a.swapaxes(1, 2) for a in (q * (head_dim**-0.5 if scale is None else scale), k, v))

    def attend(q: Array) -> Array:
        logits = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=wide)
        weights = jax.nn.softmax(logits if bias is None else logits + bias)
        return jnp.matmul(weights.astype(v.dtype), v)

    queries, keys = q.shape[2], k.shape[2]
    if bias is None and queries * keys > _WHOLE_UP_TO:
        return kept(_by_chunks(attend, q, max(1, _WHOLE_UP_TO // 4 // keys)).swapaxes(1, 2), "attention")
    return kept(attend(q).swapaxes(1, 2), "attention")


def _by_chunks(attend: Callable[[Array], Array], q: Array, size: int) -> Array:
    """`attend` of `size` queries after `size` others: q [B,N,T,D] to [B,N,T,D]; the backward pass computes each chunk anew."""
    chunks = -(-q.shape[2] // size)
    filled = jnp.pad(q, ((0, 0), (0, 0), (0, chunks * size - q.shape[2]), (0, 0)))
    parts = jnp.moveaxis(filled.reshape(*q.shape[:2], chunks, size, q.shape[3]), 2, 0)
    y = jnp.moveaxis(jax.lax.map(jax.checkpoint(attend), parts), 0, 2)
    return y.reshape(*q.shape[:2], chunks * size, -1)[:, :, : q.shape[2]]


def mask_bias(mask: Array, dtype: Dtype) -> Array:
    """The bias for `attention` in `dtype` that lets it see only where the mask is true; 0 and the least finite number.

    A query that sees nothing thus gets the mean of all values and not NaN.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.where(mask, jnp.zeros((), wide), jnp.finfo(wide).min)


class MultiHeadAttention(nn.Module):
    """Multi-head attention from x [B,T,C] to context [B,S,D] (None: to x itself); returns [B,T,C].

    Attributes:
      qkv_bias, out_bias: queries, keys and values have biases; the output has one.
      scale: of the logits, 1/sqrt(head_dim) where None.
      qk_norm: each head's queries and keys pass an RMS norm with a learned scale, which bounds the logits (Esser et al. 2024, sec. 5.3.2).
    """

    num_heads: int
    head_dim: int
    dtype: Dtype = jnp.float32
    qkv_bias: bool = False
    qk_norm: bool = False
    kernel_init: Initializer = fan_in_uniform
    out_bias: bool = True
    scale: float | None = None

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, bias: Array | None = None) -> Array:
        context = x if context is None else context
        inner = self.num_heads * self.head_dim

        def project(name: str, y: Array) -> Array:
            y = Dense(inner, self.qkv_bias, self.kernel_init, self.dtype, name=name)(y)
            y = y.reshape(*y.shape[:2], self.num_heads, self.head_dim)
            return nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name=f"{name}_norm")(y) if self.qk_norm and name != "v" else y

        y = attention(project("q", x), project("k", context), project("v", context), bias, self.scale)
        return Dense(x.shape[-1], self.out_bias, self.kernel_init, self.dtype, name="out")(y.reshape(*y.shape[:2], inner))


class GEGLU(nn.Module):
    """Feed-forward with a gated GELU (Shazeer 2020): [B,T,C] to [B,T,C], hidden width 4C."""

    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, dropout_keys: Array | None = None) -> Array:
        width = x.shape[-1]
        h = Dense(8 * width, dtype=self.dtype, name="proj")(x)
        value, gate = jnp.split(h, 2, axis=-1)
        h = Dropout(self.dropout)(value * gelu(gate), dropout_keys)
        return Dense(width, dtype=self.dtype, name="out")(h)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward; pre-norm (appendix E.2.1, table 16)."""

    num_heads: int
    head_dim: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array | None, dropout_keys: Array | None = None) -> Array:
        def normed(name: str, y: Array) -> Array:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=name)(y)

        x = x + MultiHeadAttention(self.num_heads, self.head_dim, self.dtype, name="attn1")(normed("norm1", x))
        x = x + MultiHeadAttention(self.num_heads, self.head_dim, self.dtype, name="attn2")(normed("norm2", x), context)
        return x + GEGLU(self.dropout, self.dtype, name="ff")(normed("norm3", x), dropout_keys)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map [B,H,W,C] with cross-attention to context [B,L,D]."""

    num_heads: int
    head_dim: int
    depth: int = 1
    dropout: float = 0.0
    groups: int = 0  # of the norm; 0 is `norm_groups`' own rule
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array | None, dropout_keys: Array | None = None) -> Array:
        b, height, width, channels = x.shape
        inner = self.num_heads * self.head_dim
        h = norm(self.dtype, 1e-6, "norm", norm_groups(channels, self.groups))(x).reshape(b, height * width, channels)
        h = Dense(inner, dtype=self.dtype, name="proj_in")(h)
        for i in range(self.depth):
            h = TransformerBlock(self.num_heads, self.head_dim, self.dropout, self.dtype, name=f"block_{i}")(h, context, dropout_keys)
        h = Dense(channels, kernel_init=zeros, dtype=self.dtype, name="proj_out")(h)
        return x + h.reshape(x.shape)


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map [B,H,W,C], as in ADM and in the autoencoder's middle."""

    num_heads: int = 1
    epsilon: float = 1e-5
    zero_init: bool = True
    groups: int = 0  # of the norm; 0 is `norm_groups`' own rule
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, height, width, channels = x.shape
        h = norm(self.dtype, self.epsilon, "norm", norm_groups(channels, self.groups))(x).reshape(b, height * width, channels)
        shape = (b, height * width, self.num_heads, channels // self.num_heads)
        q, k, v = (Dense(channels, dtype=self.dtype, name=n)(h).reshape(shape) for n in "qkv")
        h = attention(q, k, v).reshape(h.shape)
        init = zeros if self.zero_init else fan_in_uniform
        return x + Dense(channels, kernel_init=init, dtype=self.dtype, name="out")(h).reshape(x.shape)
