"""Layers shared by the networks: convolutions, norms, residual blocks, resampling, timestep embedding.

All feature maps are NHWC. `dtype` is the compute type; parameters keep their own type (float32 unless the caller casts them), and norm
statistics are taken in at least float32.
"""

import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.nn.remat import kept

Array = jax.Array
Dtype = Any
Initializer = Callable[..., Any]

zeros: Initializer = nn.initializers.zeros_init()
fan_in_uniform: Initializer = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")  # torch's Conv2d and Linear

# Row taps of a 3x3 kernel that each of the two output phases sees after a nearest 2x upsampling: phase 0 reads inputs (i-1, i), phase 1
# reads (i, i+1).
_PHASES = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


class Conv(nn.Module):
    """A square convolution, [B,H,W,C] to [B,H',W',features]; a 1x1 one is a matrix product.

    Attributes:
      padding: pixels added (before, after) on both axes.
      upsample: fold a nearest 2x upsampling in front of a 3x3 convolution into four 2x2 convolutions on the small map: the same values for
        16/36 of the operations, and the upsampled map is never stored.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    upsample: bool = False
    kernel_init: Initializer = fan_in_uniform
    bias_init: Initializer = zeros
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        k, channels = self.kernel_size, x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (k, k, channels, self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, kernel, bias))
        if k == 1:
            return kept(_matmul(x, kernel[0, 0]) + bias, "dense")
        if self.dtype == jnp.bfloat16 and channels < 8:
            # bfloat16 convolutions of fewer than 8 channels miss the tensor cores, and XLA pads only float16 by itself.
            missing = ((0, 0), (0, 0), (0, 8 - channels), (0, 0))
            x, kernel = jnp.pad(x, ((0, 0),) * 3 + missing[2:3]), jnp.pad(kernel, missing)
        if self.upsample:
            return kept(_upsampled_conv(x, kernel) + bias, "conv")
        return kept(_conv(x, kernel, self.stride, (self.padding, self.padding)) + bias, "conv")


class Dense(nn.Module):
    """A linear map of the last axis, as one matrix product over all leading axes.

    With the leading axes apart, the gradient of the kernel contracts over several of them, which XLA's CPU backend does three times slower.
    """

    features: int
    use_bias: bool = True
    kernel_init: Initializer = fan_in_uniform
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = _matmul(jnp.asarray(x, self.dtype), jnp.asarray(kernel, self.dtype))
        return kept(y + jnp.asarray(self.param("bias", zeros, (self.features,)), self.dtype) if self.use_bias else y, "dense")


def _matmul(x: Array, kernel: Array) -> Array:
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def _conv(x: Array, kernel: Array, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _upsampled_conv(x: Array, kernel: Array) -> Array:
    b, h, w, _ = x.shape
    taps = jnp.einsum("apk,bql,klio->abpqio", *(jnp.asarray(_PHASES, kernel.dtype),) * 2, kernel)
    pads = ((1, 0), (0, 1))
    phases = [[_conv(x, taps[i, j], 1, (pads[i], pads[j])) for j in range(2)] for i in range(2)]
    y = jnp.stack([jnp.stack(row, axis=3) for row in phases], axis=2)  # [B, h, 2, w, 2, C]
    return y.reshape(b, 2 * h, 2 * w, -1)


def norm(dtype: Dtype, epsilon: float, name: str, groups: int = 32) -> nn.GroupNorm:
    """GroupNorm with two-pass variance in at least float32, in the compute type outside."""
    return nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def norm_groups(channels: int, fixed: int = 0) -> int:
    """32 groups as in the paper, or for narrow networks the largest power of two below that leaves at least 4 channels in a group.

    `fixed` is the answer where it is not 0: what networks of other programs have, however narrow they are.
    """
    if fixed:
        return fixed
    groups = 32
    while groups > 1 and (channels % groups or (channels < 128 and channels // groups < 4)):
        groups //= 2
    return groups


def gelu(x: Array) -> Array:
    """x Phi(x) (Hendrycks & Gimpel 2016), in at least float32 inside.

    By erf: erfc, which `jax.nn.gelu` calls, takes several times as long on a CPU.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * np.sqrt(0.5).astype(wide.dtype)))).astype(x.dtype)


def share_waves(shares: Array, rates: int) -> Array:
    """Sines, then cosines, [...,2 * rates] of shares [...] of a picture, in waves of 4 pictures' length to a quarter of one."""
    angles = shares[..., None] * (jnp.pi / 2 * 16 ** jnp.linspace(0, 1, rates))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def timestep_embedding(t: Array, dim: int, max_period: float = 10_000.0) -> Array:
    """Sinusoidal features [cos, sin] of t ([B], any real) -> [B, dim] in at least float32 (Vaswani et al. 2017, section 3.5)."""
    half = dim // 2
    t = t.astype(jnp.promote_types(t.dtype, jnp.float32))
    angles = t[:, None] * jnp.exp(-np.log(max_period) * jnp.arange(half, dtype=t.dtype) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def upsample_nearest(x: Array) -> Array:
    """[B,H,W,C] to [B,2H,2W,C] by broadcasting: a gather (`jax.image.resize`) would have a scatter for its gradient."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def downsample_mean(x: Array) -> Array:
    """2x2 average pooling, [B,H,W,C] to [B,H/2,W/2,C]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def space_to_depth(x: Array, size: int) -> Array:
    """[B,H,W,C] to [B,H/size,W/size,size*size*C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // size, w // size, size * size * c)


def depth_to_space(x: Array, size: int) -> Array:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, size, size, c // size**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * size, w * size, c // size**2)


class Dropout(nn.Module):
    """Zeroes elements with probability `rate` and divides the others by 1 - rate (Srivastava et al. 2014); without keys, x as it is.

    `keys` are typed PRNG keys [B], one an example of x [B, ...]. A mask is drawn from the example's key and the module's path in the
    network, so it is the same in whatever batch or micro-batch and on whatever device the example lies.
    """

    rate: float

    def __call__(self, x: Array, keys: Array | None) -> Array:
        if keys is None or self.rate == 0:
            return x
        if self.rate == 1:
            return jnp.zeros_like(x)
        layer = zlib.crc32("/".join(self.path).encode())
        keep = 1 - self.rate
        mask = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, layer), keep, x.shape[1:]))(keys)
        return jnp.where(mask, x / keep, jnp.zeros((), x.dtype))


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with a skip connection; the time embedding enters between (Dhariwal & Nichol 2021).

    Attributes:
      resample: "down" (average pooling) or "up" (nearest) inside the block, as ADM's resblock_updown; None keeps the size.
      scale_shift: the embedding scales and shifts the second norm's output instead of being added before it.
      groups: of the norms; 0 is `norm_groups`' own rule.
    """

    features: int
    epsilon: float
    dropout: float = 0.0
    scale_shift: bool = False
    resample: str | None = None
    zero_init: bool = True
    groups: int = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, emb: Array | None = None, dropout_keys: Array | None = None) -> Array:
        h = nn.silu(norm(self.dtype, self.epsilon, "norm1", norm_groups(x.shape[-1], self.groups))(x))
        if self.resample == "down":
            h, x = downsample_mean(h), downsample_mean(x)
        if self.resample == "up":
            x = upsample_nearest(x)
        h = Conv(self.features, upsample=self.resample == "up", dtype=self.dtype, name="conv1")(h)
        second = norm(self.dtype, self.epsilon, "norm2", norm_groups(self.features, self.groups))
        if emb is None:
            h = second(h)
        else:
            width = self.features * (2 if self.scale_shift else 1)
            e = Dense(width, dtype=self.dtype, name="emb")(nn.silu(emb))[:, None, None]
            if self.scale_shift:
                scale, shift = jnp.split(e, 2, axis=-1)
                h = second(h) * (1 + scale) + shift
            else:
                h = second(h + e)
        h = Dropout(self.dropout)(nn.silu(h), dropout_keys)
        h = Conv(self.features, kernel_init=zeros if self.zero_init else fan_in_uniform, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, dtype=self.dtype, name="skip")(x)
        return x + h
