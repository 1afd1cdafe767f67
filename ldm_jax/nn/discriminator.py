"""The patch discriminator of the first stage (Isola et al., arXiv 1611.07004; Esser et al., arXiv 2012.09841)."""

import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

NormKind = Literal["batch", "group", "none"]


class PatchDiscriminator(nn.Module):
    """4x4 convolutions whose every output judges one overlapping patch of the image (70 px wide with three layers).

    `features` channels after the first convolution, doubled by each of the `num_layers` - 1 that halve the resolution
    too and by the one after them, up to 8 `features`. `norm` is "batch" (the paper's), "group" (no image sees another:
    results do not depend on how a batch is cut into micro-batches) or "none".
    """

    features: int = 64
    num_layers: int = 3
    norm: NormKind = "batch"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images [B,H,W,C] in [-1, 1] to logits [B,h,w,1], h = H // 2**num_layers - 2.

        Logits are in `promote_types(dtype, float32)`. Raises ValueError for images too small to give one logit and for an unknown `norm`.
        """
        if self.norm not in ("batch", "group", "none"):
            raise ValueError(f"discriminator norm {self.norm!r} is none of 'batch', 'group', 'none'")
        smallest = 3 * 2**self.num_layers
        if min(images.shape[1:3]) < smallest:
            height, width = images.shape[1:3]
            raise ValueError(
                f"a discriminator of {self.num_layers} layers needs images of {smallest} px, not {height}x{width}: use fewer layers"
            )
        x = nn.leaky_relu(self._conv(self.features, stride=2, use_bias=True)(images), 0.2)
        for layer in range(1, self.num_layers + 1):
            channels = self.features * min(2**layer, 8)
            # Batch norm takes the mean away, and a bias with it.
            x = self._conv(channels, stride=2 if layer < self.num_layers else 1, use_bias=self.norm != "batch")(x)
            if self.norm != "none":
                x = _Norm(self.norm)(x)
            x = nn.leaky_relu(x, 0.2)
        logits = self._conv(1, stride=1, use_bias=True)(x)
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))

    def _conv(self, channels: int, stride: int, use_bias: bool) -> nn.Conv:
        init = nn.initializers.normal(0.02)
        return nn.Conv(channels, (4, 4), (stride, stride), padding=1, use_bias=use_bias, kernel_init=init, dtype=self.dtype)


class _Norm(nn.Module):
    """Batch or group normalisation by the statistics of the input at hand, then scale and bias.

    Batch norm keeps no running statistics: a discriminator only ever acts on training batches, so nothing would read
    them. On a mesh the mean over the batch axis is over the global batch.
    """

    kind: NormKind

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", lambda key: 1 + 0.02 * jax.random.normal(key, (channels,)))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        groups, axes = (channels, (0, 1, 2, 4)) if self.kind == "batch" else (_groups(channels), (1, 2, 4))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        grouped = wide.reshape(*x.shape[:-1], groups, channels // groups)
        centred = grouped - grouped.mean(axes, keepdims=True)
        variance = jnp.square(centred).mean(axes, keepdims=True)
        normal = (centred * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape)
        return (normal * scale + bias).astype(x.dtype)


def _groups(channels: int) -> int:
    """Up to 32, and of 4 channels or more: a group of one channel would take the bias before it away."""
    return max(1, math.gcd(128, channels) // 4)
