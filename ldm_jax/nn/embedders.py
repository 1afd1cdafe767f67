"""Small networks of conditioners: a table of classes, embeddings of boxes, and the paper's rescaler of semantic maps (Rombach et al. 2022,
appendix E.2.2)."""

import math

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.nn.layers import Array, Dense, Dtype, downsample_mean, gelu, share_waves


class ClassEmbedder(nn.Module):
    """Classes int32 [B], in [0, rows), to embeddings [B,width]. The untrained table is normal, of standard deviation `stddev`."""

    rows: int
    width: int
    stddev: float = 1.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, label: Array) -> Array:
        table = self.param("embedding", nn.initializers.normal(self.stddev), (self.rows, self.width))
        return jnp.asarray(table, self.dtype)[label]


class BoxEmbedder(nn.Module):
    """Boxes to an embedding each, of the class and of waves of centre and size, one perceptron for all (Li et al. 2023, GLIGEN, eq. 5).

    Token ids int32 [B,L], of `BoxesConditioner`, to [B,max_objects + 1,width], the last for the window that is drawn. An id of
    `vocab_size` - 1 in place of a class says that there is no box. With class and corners in one embedding, attention that looks for a
    place finds what belongs there; from tokens of their own a network must first learn which of them make a box.
    """

    vocab_size: int
    max_length: int
    width: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        b, nothing = tokens.shape[0], self.vocab_size - 1
        window = jnp.concatenate([jnp.full((b, 1), nothing, tokens.dtype), tokens[:, -2:]], axis=1)
        label, first, second = jnp.moveaxis(jnp.concatenate([tokens[:, :-2], window], axis=1).reshape(b, -1, 3), -1, 0)
        known = (label != nothing).at[:, -1].set(True)
        table = self.param("class_embedding", nn.initializers.normal(1.0), (self.vocab_size, self.width))
        features = jnp.concatenate([table[label], self._waves(first, second) * known[..., None]], axis=-1)
        x = Dense(self.width, dtype=self.dtype, name="box_in")(jnp.asarray(features, self.dtype))
        h = Dense(4 * self.width, dtype=self.dtype, name="ff_in")(self._normed("norm", x))
        x = x + Dense(self.width, dtype=self.dtype, name="ff_out")(gelu(h))
        return self._normed("final_norm", x)

    def _normed(self, name: str, x: Array) -> Array:
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=name)(x)

    def _waves(self, first: Array, second: Array) -> Array:
        """Cells of two corners [B,n] to `share_waves` [B,n,8 * (width // 4)] of centre and size."""
        sections = math.isqrt(self.vocab_size - 1)
        corners = jnp.stack([jnp.stack([cell % sections, cell // sections], -1) / (sections - 1) for cell in (first, second)])
        about = jnp.concatenate([corners.mean(0), corners[1] - corners[0]], axis=-1)
        return share_waves(about, self.width // 4).reshape(*first.shape, -1)


class SpatialRescaler(nn.Module):
    """Maps [B,H,W,C] to [B,H/2**stages,W/2**stages,channels]: halved by bilinear interpolation, then one linear map of the channels.

    Bilinear interpolation to one half without antialiasing is the mean of two by two pixels.
    """

    stages: int
    channels: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(self.stages):
            x = downsample_mean(x)
        return Dense(self.channels, use_bias=False, dtype=self.dtype, name="channel_mapper")(x)
