"""DiT: a transformer over patches of the latent as the denoiser (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers")."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ldm_jax.nn.attention import MultiHeadAttention
from ldm_jax.nn.layers import Array, Dense, Dropout, Dtype, Initializer, depth_to_space, space_to_depth, timestep_embedding, zeros
from ldm_jax.nn.remat import check_remat, rematted, rematted_group

# Table 1; the number after the slash in a model's name ("DiT-XL/2") is its patch size.
SIZES: dict[str, dict[str, int]] = {
    "S": {"width": 384, "depth": 12, "num_heads": 6},
    "B": {"width": 768, "depth": 12, "num_heads": 12},
    "L": {"width": 1024, "depth": 24, "num_heads": 16},
    "XL": {"width": 1152, "depth": 28, "num_heads": 16},
}
_TIME_FEATURES = 256
_EPSILON = 1e-6

_xavier: Initializer = nn.initializers.xavier_uniform()
_small: Initializer = nn.initializers.normal(0.02)


def positions(height: int, width: int, dim: int) -> np.ndarray:
    """Fixed features of a grid's places in row order: float64 [height * width, dim], dim divisible by 4 (Vaswani et al. 2017, section 3.5).

    The first half tells the column and the second the row, each as all sines, then all cosines.
    """
    rates = 10_000.0 ** -(np.arange(dim // 4) / (dim // 4))

    def features(count: int) -> np.ndarray:
        angles = np.arange(count)[:, None] * rates
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    return np.concatenate([np.tile(features(width), (height, 1)), np.repeat(features(height), width, axis=0)], axis=1)


def _gelu_tanh(x: Array) -> Array:
    """The approximation of GELU by a tanh, which the released weights were trained with; in at least float32 inside."""
    return nn.gelu(x.astype(jnp.promote_types(x.dtype, jnp.float32)), approximate=True).astype(x.dtype)


def _modulated(x: Array, shift: Array, scale: Array, epsilon: float, dtype: Dtype) -> Array:
    """LayerNorm without parameters of its own, then a scale and a shift that the condition decides (adaLN)."""
    normed = nn.LayerNorm(epsilon=epsilon, use_scale=False, use_bias=False, use_fast_variance=False, dtype=dtype)(x)
    return normed * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Self-attention and feed-forward on tokens [B,T,C], with attention to a context [B,L,D] between them where one is given.

    Every branch has its own shift, scale and gate from emb [B,C], and all begin at zero, so the block begins as the identity (adaLN-zero,
    section 3.2, figure 3). Fields as in `DiT`.
    """

    num_heads: int
    mlp_ratio: float
    qk_norm: bool
    mlp_epsilon: float
    dropout: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array, emb: Array, context: Array | None = None, dropout_keys: Array | None = None) -> Array:
        width = x.shape[-1]
        count = 6 if context is None else 9
        parts = jnp.split(Dense(count * width, kernel_init=zeros, dtype=self.dtype, name="modulation")(emb)[:, None], count, axis=-1)

        def branch(x: Array, index: int, function: Callable[[Array], Array], epsilon: float = _EPSILON) -> Array:
            shift, scale, gate = parts[3 * index : 3 * index + 3]
            return x + gate * function(_modulated(x, shift, scale, epsilon, self.dtype))

        def attention(name: str) -> MultiHeadAttention:
            return MultiHeadAttention(
                self.num_heads, width // self.num_heads, self.dtype, qkv_bias=True, qk_norm=self.qk_norm, kernel_init=_xavier, name=name
            )

        def feed_forward(h: Array) -> Array:
            h = _gelu_tanh(Dense(int(self.mlp_ratio * width), kernel_init=_xavier, dtype=self.dtype, name="mlp_in")(h))
            h = Dropout(self.dropout)(h, dropout_keys)
            return Dense(width, kernel_init=_xavier, dtype=self.dtype, name="mlp_out")(h)

        x = branch(x, 0, attention("attn"))
        if context is not None:
            x = branch(x, 2, lambda h: attention("cross_attn")(h, context))
        return branch(x, 1, feed_forward, self.mlp_epsilon)


class DiT(nn.Module):
    """Predicts eps, v, x_0 or a velocity from x_t.

    A class, or another condition without places, enters as `vector`; the table of classes is the conditioner's.

    Attributes:
      out_channels: channels of the prediction, those of the latent.
      width, depth, num_heads: see `SIZES`; the default is XL.
      patch_size: latent pixels on a side of a token.
      learn_sigma: as many channels again for the variance, as the released weights have. They come second and are not returned.
      cross_attention: the blocks attend to `crossattn`.
      qk_norm: RMS norms of each head's queries and keys.
      legacy_frequencies: the time embedding's lowest frequency is 1/10000, as in diffusers' class, and not one step above it, as in the
        paper's code. Weights want those that they were trained with.
      mlp_epsilon: of the norm before the feed-forward; diffusers' configurations have 1e-5 there.
      remat: which activations are kept for the backward pass, see `nn.remat`; a group is of about sqrt(depth) blocks.
    """

    out_channels: int
    width: int = 1152
    depth: int = 28
    num_heads: int = 16
    patch_size: int = 2
    mlp_ratio: float = 4.0
    learn_sigma: bool = False
    cross_attention: bool = False
    qk_norm: bool = False
    legacy_frequencies: bool = False
    mlp_epsilon: float = _EPSILON
    dropout: float = 0.0
    remat: str = "none"
    dtype: Dtype = jnp.float32

    def check(self) -> None:
        """Raises ValueError where a setting is wrong."""
        if self.width % 4:
            raise ValueError(f"width {self.width} is not divisible by 4: rows and columns have sines and cosines")
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible into {self.num_heads} heads")
        for name in ("depth", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        if self.mlp_ratio * self.width < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves no hidden units")
        check_remat(self.remat)

    @property
    def multiple(self) -> int:
        """What a latent's height and width must be divisible by."""
        return self.patch_size

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        crossattn: Array | None = None,
        concat: Array | None = None,
        vector: Array | None = None,
        dropout_keys: Array | None = None,
    ) -> Array:
        """x [B,h,w,C] and t float [B] (in the embedding's units) to [B,h,w,out_channels].

        crossattn [B,L,D] is attended to, concat [B,h,w,C'] joins x, vector [B,width] is added to the time embedding. Dropout acts
        where it is given keys [B], one an example. Any h and w that patch_size divides will do. The result is in at least float32. Raises
        ValueError for inputs that do not fit the settings.
        """
        self._check_inputs(x, crossattn, vector)
        if concat is not None:
            x = jnp.concatenate([x, concat.astype(x.dtype)], axis=-1)
        size, dtype = self.patch_size, self.dtype
        grid = (x.shape[1] // size, x.shape[2] // size)
        emb = nn.silu(self._embedding(t, vector))

        tokens = Dense(self.width, kernel_init=_xavier, dtype=dtype, name="x_embed")(space_to_depth(x, size))
        tokens = tokens.reshape(x.shape[0], -1, self.width) + jnp.asarray(positions(*grid, self.width), dtype)
        group = math.isqrt(self.depth)
        for start in range(0, self.depth, group):
            blocks = rematted_group(DiT._blocks, self.remat, (1,))
            tokens = blocks(self, range(start, min(start + group, self.depth)), tokens, emb, crossattn, dropout_keys)

        final = Dense(2 * self.width, kernel_init=zeros, dtype=dtype, name="final_modulation")(emb)[:, None]
        shift, scale = jnp.split(final, 2, axis=-1)
        tokens = _modulated(tokens, shift, scale, _EPSILON, dtype)
        channels = self.out_channels * (2 if self.learn_sigma else 1)
        patches = Dense(size * size * channels, kernel_init=zeros, dtype=dtype, name="out")(tokens)
        y = depth_to_space(patches.reshape(x.shape[0], *grid, -1), size)[..., : self.out_channels]
        return y.astype(jnp.promote_types(dtype, jnp.float32))

    def _blocks(self, which: range, tokens: Array, emb: Array, context: Array | None, dropout_keys: Array | None) -> Array:
        cls = rematted(DiTBlock, self.remat)
        for i in which:
            block = cls(self.num_heads, self.mlp_ratio, self.qk_norm, self.mlp_epsilon, self.dropout, self.dtype, name=f"block_{i}")
            tokens = block(tokens, emb, context, dropout_keys)
        return tokens

    def _embedding(self, t: Array, vector: Array | None) -> Array:
        """What every modulation is computed from, [B,width]: the time, and the vector where one is given."""
        half = _TIME_FEATURES // 2
        longest = 10_000.0 ** (half / (half - 1)) if self.legacy_frequencies else 10_000.0
        features = timestep_embedding(t, _TIME_FEATURES, longest).astype(self.dtype)
        emb = Dense(self.width, kernel_init=_small, dtype=self.dtype, name="time_embed_0")(features)
        emb = Dense(self.width, kernel_init=_small, dtype=self.dtype, name="time_embed_2")(nn.silu(emb))
        return emb if vector is None else emb + vector.astype(emb.dtype)

    def _check_inputs(self, x: Array, crossattn: Array | None, vector: Array | None) -> None:
        if x.shape[1] % self.patch_size or x.shape[2] % self.patch_size:
            raise ValueError(f"a latent of {x.shape[1]}x{x.shape[2]} is not divisible into patches of {self.patch_size}")
        if crossattn is not None and not self.cross_attention:
            raise ValueError("crossattn is given, but cross_attention is off: it would be ignored")
        if crossattn is None and self.cross_attention:
            raise ValueError("cross_attention is on, but no crossattn is given")
        if vector is not None and vector.shape[-1] != self.width:
            raise ValueError(f"vector has {vector.shape[-1]} features; it is added to a time embedding of {self.width}")
