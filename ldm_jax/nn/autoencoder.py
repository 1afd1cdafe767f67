"""The KL autoencoder of the first stage (Rombach et al. 2022, section 3.1 and appendix G; Esser et al. 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nn.attention import AttentionBlock
from ldm_jax.nn.layers import Array, Conv, Dtype, ResBlock, depth_to_space, norm, norm_groups, space_to_depth

_EPS = 1e-6


class Encoder(nn.Module):
    """Images [B,H,W,3] to features [B,H/f,W/f,z_channels * 2], f = patch_size * 2**(levels - 1). Fields as in `KLAutoencoder`."""

    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    mid_attention: bool
    z_channels: int
    patch_size: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = Conv(self.channels, dtype=self.dtype, name="conv_in")(space_to_depth(x, self.patch_size))
        factor = self.patch_size
        for level, mult in enumerate(self.channel_mult):
            for i in range(self.num_res_blocks):
                name = f"down_{level}_{i}"
                block = ResBlock(self.channels * mult, _EPS, zero_init=False, dtype=self.dtype, name=f"{name}_res")
                h = block(h)
                if factor in self.attention_levels:
                    h = AttentionBlock(epsilon=_EPS, zero_init=False, dtype=self.dtype, name=f"{name}_attn")(h)
            if level + 1 < len(self.channel_mult):
                # The reference pads right and bottom only.
                h = Conv(h.shape[-1], stride=2, padding=(0, 1), dtype=self.dtype, name=f"down_{level}_downsample")(h)
                factor *= 2
        h = _middle(h, self.mid_attention, self.dtype)
        h = nn.silu(norm(self.dtype, _EPS, "norm_out", norm_groups(h.shape[-1]))(h))
        return Conv(2 * self.z_channels, dtype=self.dtype, name="conv_out")(h)


class Decoder(nn.Module):
    """Latents [B,h,w,z] to the features [B,H/p,W/p,channels] that the last convolution turns into pixels."""

    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    mid_attention: bool
    patch_size: int
    dtype: Dtype

    @nn.compact
    def __call__(self, z: Array) -> Array:
        h = Conv(self.channels * self.channel_mult[-1], dtype=self.dtype, name="conv_in")(z)
        h = _middle(h, self.mid_attention, self.dtype)
        factor = self.patch_size * 2 ** (len(self.channel_mult) - 1)
        for level, mult in reversed(list(enumerate(self.channel_mult))):
            for i in range(self.num_res_blocks + 1):
                name = f"up_{level}_{i}"
                block = ResBlock(self.channels * mult, _EPS, zero_init=False, dtype=self.dtype, name=f"{name}_res")
                h = block(h)
                if factor in self.attention_levels:
                    h = AttentionBlock(epsilon=_EPS, zero_init=False, dtype=self.dtype, name=f"{name}_attn")(h)
            if level:
                h = Conv(h.shape[-1], upsample=True, dtype=self.dtype, name=f"up_{level}_upsample")(h)
                factor //= 2
        return nn.silu(norm(self.dtype, _EPS, "norm_out", norm_groups(h.shape[-1]))(h))


def _middle(h: Array, with_attention: bool, dtype: Dtype) -> Array:
    h = ResBlock(h.shape[-1], _EPS, zero_init=False, dtype=dtype, name="mid_block_1")(h)
    if with_attention:
        h = AttentionBlock(epsilon=_EPS, zero_init=False, dtype=dtype, name="mid_attn_1")(h)
    return ResBlock(h.shape[-1], _EPS, zero_init=False, dtype=dtype, name="mid_block_2")(h)


class KLAutoencoder(nn.Module):
    """Encoder to a diagonal Gaussian over raw latents, decoder back to images. Images are float [B,H,W,3] in [-1, 1], NHWC.

    Attributes:
      channels, channel_mult: width of the first level, and its multiples at each level.
      num_res_blocks: residual blocks a level in the encoder; the decoder has one more.
      attention_levels: downsampling factors with attention, besides the middle (`mid_attention`).
      z_channels, latent_channels: channels inside, and of the latent (`embed_dim` of the released configurations).
      init_log_var: the posterior's log-variance in an untrained network. At 0, the paper's, noise hides the latents from the decoder at
        first; -6 saves a small model half of its steps.
      patch_size: pixels folded into channels before the first convolution; 1 in the paper, 4 makes small models much faster on a CPU.
    """

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    mid_attention: bool = True
    z_channels: int = 4
    latent_channels: int = 4
    patch_size: int = 1
    init_log_var: float = 0.0
    dtype: Dtype = jnp.float32

    @property
    def factor(self) -> int:
        """Pixels a latent position stands for, along each axis."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)

    def check(self) -> None:
        """Raises ValueError where a setting would have no effect."""
        factors = [self.patch_size * 2**i for i in range(len(self.channel_mult))]
        unmatched = sorted(set(self.attention_levels) - set(factors))
        if unmatched:
            raise ValueError(f"attention_levels {unmatched} match no level; the factors of this autoencoder are {factors}")

    def setup(self) -> None:
        shared = (self.channels, self.channel_mult, self.num_res_blocks, self.attention_levels, self.mid_attention)
        self.encoder = Encoder(*shared, self.z_channels, self.patch_size, self.dtype)
        self.decoder = Decoder(*shared, self.patch_size, self.dtype)
        self.quant_conv = Conv(2 * self.latent_channels, 1, bias_init=self._moments_bias, dtype=self.dtype)
        self.post_quant_conv = Conv(self.z_channels, 1, dtype=self.dtype)
        self.conv_out = Conv(3 * self.patch_size**2, dtype=self.dtype)

    def _moments_bias(self, key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
        return jnp.repeat(jnp.array([0.0, self.init_log_var], dtype), shape[0] // 2)

    def moments(self, images: Array) -> Array:
        """[B,H,W,3] to [B,h,w,2c]: mean and log-variance (clamped to [-30, 20]) of the posterior, in at least float32."""
        m = self.quant_conv(self.encoder(images.astype(self.dtype)))
        mean, log_var = jnp.split(m.astype(jnp.promote_types(self.dtype, jnp.float32)), 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(log_var, -30.0, 20.0)], axis=-1)

    def features(self, z: Array) -> Array:
        """Raw latents [B,h,w,c] to what the last convolution reads."""
        return self.decoder(self.post_quant_conv(z.astype(self.dtype)))

    def head(self, features: Array) -> Array:
        """The last convolution: features to images [B,H,W,3], not clipped, in at least float32."""
        x = depth_to_space(self.conv_out(features), self.patch_size)
        return x.astype(jnp.promote_types(self.dtype, jnp.float32))

    def decode(self, z: Array) -> Array:
        """Raw latents [B,h,w,c] to images [B,H,W,3], not clipped."""
        return self.head(self.features(z))

    def __call__(self, images: Array) -> Array:
        mean, _ = jnp.split(self.moments(images), 2, axis=-1)
        return self.decode(mean)


def sample_moments(moments: Array, key: jax.Array) -> Array:
    """Draws raw latents [B,h,w,c] from moments [B,h,w,2c] (Kingma & Welling 2014, equation 4)."""
    mean, log_var = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * log_var) * jax.random.normal(key, mean.shape, mean.dtype)


def kl_divergence(moments: Array) -> Array:
    """KL(N(mean, var) || N(0, 1)) summed over an example's positions and channels: moments [B,h,w,2c] to [B], in nats."""
    mean, log_var = jnp.split(moments, 2, axis=-1)
    return 0.5 * jnp.sum(mean**2 + jnp.exp(log_var) - 1.0 - log_var, axis=(1, 2, 3))
