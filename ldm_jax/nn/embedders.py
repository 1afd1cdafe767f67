"""Small networks of conditioners: a table of classes, and the paper's rescaler of semantic maps (Rombach et al. 2022, appendix E.2.2)."""

import flax.linen as nn
import jax.numpy as jnp

from ldm_jax.nn.layers import Array, Dense, Dtype, downsample_mean


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
