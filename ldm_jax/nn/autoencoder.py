"""The first stage's autoencoders, a class for each kind of latents (Rombach et al. 2022, section 3.1 and appendix G; Esser et al. 2021)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ldm_jax.nn.attention import AttentionBlock
from ldm_jax.nn.layers import Array, Conv, Dtype, ResBlock, depth_to_space, norm, norm_groups, space_to_depth
from ldm_jax.nn.quantize import Codebook, straight_through
from ldm_jax.nn.remat import check_remat, rematted, rematted_group

_EPS = 1e-6


class Encoder(nn.Module):
    """Images [B,H,W,3] to features [B,H/f,W/f,out_channels], f = patch_size * 2**(levels - 1). Other fields as in `KLAutoencoder`.

    Parts: "above" the latents' size ends with the last downsampling, and "below" begins there.
    """

    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    mid_attention: bool
    out_channels: int
    patch_size: int
    norm_groups: int
    dtype: Dtype
    remat: str

    @nn.compact
    def __call__(self, x: Array, part: str = "all") -> Array:
        h = x if part == "below" else self._above(x)
        return h if part == "above" else self._below(h)

    def _above(self, x: Array) -> Array:
        h = Conv(self.channels, dtype=self.dtype, name="conv_in")(space_to_depth(x, self.patch_size))
        for level in range(len(self.channel_mult) - 1):
            h = _level(self, h, "down", level, self.num_res_blocks)
            # The reference pads right and bottom only.
            h = Conv(h.shape[-1], stride=2, padding=(0, 1), dtype=self.dtype, name=f"down_{level}_downsample")(h)
        return h

    def _below(self, h: Array) -> Array:
        h = _level(self, h, "down", len(self.channel_mult) - 1, self.num_res_blocks)
        h = _middle(self, h)
        h = nn.silu(norm(self.dtype, _EPS, "norm_out", norm_groups(h.shape[-1], self.norm_groups))(h))
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(h)


class Decoder(nn.Module):
    """Latents [B,h,w,z] to the features [B,H/p,W/p,channels] that the last convolution turns into pixels.

    Parts: "below", at the latents' size, ends before the first upsampling, and "above" begins with it.
    """

    channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_levels: tuple[int, ...]
    mid_attention: bool
    patch_size: int
    norm_groups: int
    dtype: Dtype
    remat: str

    @nn.compact
    def __call__(self, z: Array, part: str = "all") -> Array:
        h = z if part == "above" else self._below(z)
        return h if part == "below" else self._above(h)

    def _below(self, z: Array) -> Array:
        h = Conv(self.channels * self.channel_mult[-1], dtype=self.dtype, name="conv_in")(z)
        h = _middle(self, h)
        return _level(self, h, "up", len(self.channel_mult) - 1, self.num_res_blocks + 1)

    def _above(self, h: Array) -> Array:
        for level in reversed(range(len(self.channel_mult) - 1)):
            h = Conv(h.shape[-1], upsample=True, dtype=self.dtype, name=f"up_{level + 1}_upsample")(h)
            h = _level(self, h, "up", level, self.num_res_blocks + 1)
        return nn.silu(norm(self.dtype, _EPS, "norm_out", norm_groups(h.shape[-1], self.norm_groups))(h))


def _level(net: Encoder | Decoder, h: Array, way: str, level: int, blocks: int) -> Array:
    """The residual blocks of a level, with attention where the network has it."""
    return rematted_group(_blocks, net.remat, (2, 3, 4))(net, h, way, level, blocks)


def _blocks(net: Encoder | Decoder, h: Array, way: str, level: int, blocks: int) -> Array:
    width = net.channels * net.channel_mult[level]
    for i in range(blocks):
        name = f"{way}_{level}_{i}"
        block = rematted(ResBlock, net.remat)
        h = block(width, _EPS, zero_init=False, groups=net.norm_groups, dtype=net.dtype, name=f"{name}_res")(h)
        if net.patch_size * 2**level in net.attention_levels:
            h = rematted(AttentionBlock, net.remat)(1, _EPS, False, net.norm_groups, net.dtype, name=f"{name}_attn")(h)
    return h


def _middle(net: Encoder | Decoder, h: Array) -> Array:
    block, shared = rematted(ResBlock, net.remat), {"zero_init": False, "groups": net.norm_groups, "dtype": net.dtype}
    h = block(h.shape[-1], _EPS, **shared, name="mid_block_1")(h)
    if net.mid_attention:
        h = rematted(AttentionBlock, net.remat)(1, _EPS, **shared, name="mid_attn_1")(h)
    return block(h.shape[-1], _EPS, **shared, name="mid_block_2")(h)


class Autoencoder(nn.Module):
    """What the first stage asks of an autoencoder; the latents of those below are raw.

    Images are float [B,H,W,3] in [-1, 1]. `moments` are what is kept of an image to draw its latents [B,h,w,c] from: here the latents
    themselves, which leave nothing to draw.
    """

    @property
    def factor(self) -> int:
        """Pixels a latent position stands for, along each axis."""
        raise NotImplementedError

    @property
    def latent_channels(self) -> int:
        raise NotImplementedError

    def check(self) -> None:
        """Raises ValueError where a setting is wrong or would have no effect."""

    def moments(self, images: Array) -> Array:
        """Images to moments, in at least float32."""
        return self.encode_below(self.encode_above(images))

    def encode_above(self, images: Array) -> Array:
        """The part of `moments` above the latents' size, which large images pass window by window: to features [B,h,w,C]."""
        raise NotImplementedError

    def encode_below(self, h: Array) -> Array:
        """The rest of `moments`, at the latents' size, where attention sees the whole image."""
        raise NotImplementedError

    def sample(self, moments: Array, key: jax.Array | None = None) -> Array:
        """Latents [B,h,w,c] of moments: the mode, or a draw where a key is given. Needs no parameters."""
        return moments

    def mean_and_variance(self, moments: Array) -> tuple[Array, Array]:
        """Of the latents [B,h,w,c] that `sample` draws. Needs no parameters."""
        return moments, jnp.zeros_like(moments)

    def features(self, z: Array) -> Array:
        """Latents, quantised where that is needed, to what the last convolution reads."""
        raise NotImplementedError

    def head(self, features: Array) -> Array:
        """The last convolution: features to images [B,H,W,3], not clipped, in at least float32."""
        raise NotImplementedError

    def decode(self, z: Array) -> Array:
        """Latents [B,h,w,c] to images [B,H,W,3], not clipped."""
        return self.decode_above(self.decode_below(z))

    def decode_below(self, z: Array) -> Array:
        """The part of `decode` at the latents' size, where attention sees the whole image: to features [B,h,w,C]."""
        raise NotImplementedError

    def decode_above(self, h: Array) -> Array:
        """The rest of `decode`, above the latents' size, which large images pass window by window."""
        raise NotImplementedError

    def __call__(self, images: Array) -> Array:
        return self.decode(self.sample(self.moments(images)))


class IdentityAutoencoder(Autoencoder):
    """Pixels are the latents (the paper's LDM-1): factor 1, three channels, no parameters."""

    dtype: Dtype = jnp.float32

    factor = 1
    latent_channels = 3

    def encode_above(self, images: Array) -> Array:
        return images.astype(jnp.promote_types(self.dtype, jnp.float32))

    def encode_below(self, h: Array) -> Array:
        return h

    def features(self, z: Array) -> Array:
        return z

    def head(self, features: Array) -> Array:
        return features.astype(jnp.promote_types(self.dtype, jnp.float32))

    def decode_below(self, z: Array) -> Array:
        return z

    def decode_above(self, h: Array) -> Array:
        return self.head(h)


class _Convolutional(Autoencoder):
    """Encoder, decoder and the 1x1 convolutions on both sides of the latents; fields as in `KLAutoencoder`."""

    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    mid_attention: bool = True
    z_channels: int = 4
    latent_channels: int = 4
    patch_size: int = 1
    norm_groups: int = 0
    quant_conv: bool = True
    dtype: Dtype = jnp.float32
    remat: str = "none"

    numbers_a_latent = 1  # of the moments

    @property
    def factor(self) -> int:
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)

    def check(self) -> None:
        check_remat(self.remat)
        factors = [self.patch_size * 2**i for i in range(len(self.channel_mult))]
        unmatched = sorted(set(self.attention_levels) - set(factors))
        if unmatched:
            raise ValueError(f"attention_levels {unmatched} match no level; the factors of this autoencoder are {factors}")
        if not self.quant_conv and self.z_channels != self.latent_channels:
            raise ValueError(f"without quant_conv, z_channels ({self.z_channels}) must be latent_channels ({self.latent_channels})")

    def setup(self) -> None:
        shared = (self.channels, self.channel_mult, self.num_res_blocks, self.attention_levels, self.mid_attention)
        n = self.numbers_a_latent
        last = (self.patch_size, self.norm_groups, self.dtype, self.remat)
        self.encoder = Encoder(*shared, n * self.z_channels, *last)
        self.decoder = Decoder(*shared, *last)
        if self.quant_conv:
            self.to_latents = Conv(n * self.latent_channels, 1, bias_init=self._moments_bias, dtype=self.dtype, name="quant_conv")
            self.from_latents = Conv(self.z_channels, 1, dtype=self.dtype, name="post_quant_conv")
        self.conv_out = Conv(3 * self.patch_size**2, dtype=self.dtype)

    def _moments_bias(self, key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
        return jnp.zeros(shape, dtype)

    def encode_above(self, images: Array) -> Array:
        return self.encoder(images.astype(self.dtype), "above")

    def encode_below(self, h: Array) -> Array:
        moments = self.encoder(h, "below")
        return _wide(self.to_latents(moments) if self.quant_conv else moments)

    def _enter(self, z: Array) -> Array:
        z = z.astype(self.dtype)
        return self.from_latents(z) if self.quant_conv else z

    def features(self, z: Array) -> Array:
        return self.decoder(self._enter(z))

    def decode_below(self, z: Array) -> Array:
        return self.decoder(self._enter(z), "below")

    def decode_above(self, h: Array) -> Array:
        return self.head(self.decoder(h, "above"))

    def head(self, features: Array) -> Array:
        return _wide(depth_to_space(self.conv_out(features), self.patch_size))


class KLAutoencoder(_Convolutional):
    """Encoder to a diagonal Gaussian over latents, decoder back to images; moments [B,h,w,2c] are its mean and log-variance.

    Attributes:
      channels, channel_mult: width of the first level, and its multiples at each level.
      num_res_blocks: residual blocks a level in the encoder; the decoder has one more.
      attention_levels: downsampling factors with attention, besides the middle (`mid_attention`).
      z_channels, latent_channels: channels inside, and of the latent (`embed_dim` of the released configurations).
      patch_size: pixels folded into channels before the first convolution; 1 in the paper, 4 makes small models much faster on a CPU.
      norm_groups: of every norm; 0 is 32, or fewer in narrow networks.
      quant_conv: 1x1 convolutions on both sides of the latents, as in the paper; autoencoders of 2024 and later have none.
      remat: which activations are kept for the backward pass, see `nn.remat`.
      init_log_var: the posterior's log-variance in an untrained network. At 0, the paper's, noise hides the latents from the decoder at
        first; -6 saves a small model half of its steps.
    """

    init_log_var: float = 0.0

    numbers_a_latent = 2

    def check(self) -> None:
        super().check()
        if self.init_log_var and not self.quant_conv:
            raise ValueError("init_log_var is the bias of quant_conv, which this autoencoder has not: leave it at 0")

    def _moments_bias(self, key: Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> Array:
        return jnp.repeat(jnp.array([0.0, self.init_log_var], dtype), shape[0] // 2)

    def encode_below(self, h: Array) -> Array:
        """Features to [B,h,w,2c]: mean and log-variance (clamped to [-30, 20]) of the posterior, in at least float32."""
        mean, log_var = jnp.split(super().encode_below(h), 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(log_var, -30.0, 20.0)], axis=-1)

    def sample(self, moments: Array, key: jax.Array | None = None) -> Array:
        return jnp.split(moments, 2, axis=-1)[0] if key is None else sample_moments(moments, key)

    def mean_and_variance(self, moments: Array) -> tuple[Array, Array]:
        mean, log_var = jnp.split(moments, 2, axis=-1)
        return mean, jnp.exp(log_var)


class VQAutoencoder(_Convolutional):
    """Latents that the decoder replaces by the nearest entries of a codebook; fields as in `KLAutoencoder`, but for `codebook_size`.

    Latents are those before quantisation, which `decode` begins with: what the denoiser makes is quantised with it (section 3.1).
    """

    codebook_size: int = 8192

    def setup(self) -> None:
        super().setup()
        self.quantize = Codebook(self.codebook_size, self.latent_channels)

    def lookup(self, z: Array) -> tuple[Array, Array]:
        """Latents [B,h,w,c] to their entries [B,h,w,c] and the indices of these, int32 [B,h,w]."""
        return self.quantize(z)

    def decode_below(self, z: Array) -> Array:
        """Of latents [B,h,w,c] that are not quantised yet; gradients pass straight through the codebook."""
        return super().decode_below(straight_through(z, self.lookup(z)[0]))


def sample_moments(moments: Array, key: jax.Array) -> Array:
    """Draws raw latents [B,h,w,c] from moments [B,h,w,2c] (Kingma & Welling 2014, equation 4)."""
    mean, log_var = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * log_var) * jax.random.normal(key, mean.shape, mean.dtype)


def kl_divergence(moments: Array) -> Array:
    """KL(N(mean, var) || N(0, 1)) summed over an example's positions and channels: moments [B,h,w,2c] to [B], in nats."""
    mean, log_var = jnp.split(moments, 2, axis=-1)
    return 0.5 * jnp.sum(mean**2 + jnp.exp(log_var) - 1.0 - log_var, axis=(1, 2, 3))


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
