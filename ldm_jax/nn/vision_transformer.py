"""The vision transformers that image features come from: DINOv2 (Oquab et al. 2023) and the image tower of CLIP (Radford et al. 2021).

Both are the ViT of Dosovitskiy et al. 2021 and differ in details that are fields here. Features are compared across programs and devices,
so whoever calls sets `jax.default_matmul_precision("float32")` and leaves `dtype` at float32: accelerators multiply with fewer bits
otherwise.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.nn.attention import MultiHeadAttention
from ldm_jax.nn.clip_text import ACTIVATIONS
from ldm_jax.nn.layers import Array, Dense, Dtype, space_to_depth

SWIGLU = "swiglu"

# Means and standard deviations of red, green and blue in [0, 1] that the networks were trained with: DINOv2's are ImageNet's.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_small = nn.initializers.normal(0.02)


class VisionTransformer(nn.Module):
    """Normalised images [N,S,S,3], S = image_size, to features [N,width] in `dtype`, or [N,projection] where there is a projection.

    They are the class token behind the last layer and the final norm. What else the last layer would say of the patches is not computed.
    Raises ValueError for settings that do not go together and for images of another size.

    Attributes:
      image_size, patch_size: pixels on a side of an image, which is a multiple, and of a token.
      num_heads: of width/num_heads channels each.
      hidden: width of the feed-forward between its two maps.
      activation: a key of `ACTIVATIONS`, or "swiglu": of 2 * hidden outputs of the first map, half are gates (Shazeer 2020; in DINOv2's
        largest network).
      pre_norm: a norm before the first layer (CLIP).
      layer_scale: learned scales of every branch's channels (Touvron et al. 2021, "Going deeper with image transformers"; DINOv2).
      patch_bias: the map of patches has a bias (DINOv2).
      projection: outputs of a last linear map without a bias (CLIP); 0 is none.
      epsilon: of the norms; 1e-6 in DINOv2, 1e-5 in CLIP.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    hidden: int
    activation: str = "gelu"
    pre_norm: bool = False
    layer_scale: bool = False
    patch_bias: bool = True
    projection: int = 0
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @property
    def grid(self) -> int:
        """Tokens on a side of an image: the table of positions has `grid`**2 rows after that of the class token."""
        return self.image_size // self.patch_size

    def check(self) -> None:
        """Raises ValueError where a setting is wrong."""
        if min(self.image_size, self.patch_size, self.width, self.depth, self.num_heads, self.hidden) < 1:
            raise ValueError("sizes, width, depth, num_heads and hidden are to be positive")
        if self.image_size % self.patch_size:
            raise ValueError(f"images of {self.image_size} px are not divisible into patches of {self.patch_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible into {self.num_heads} heads")
        if self.activation not in (*ACTIVATIONS, SWIGLU):
            raise ValueError(f"activation {self.activation!r} is not one of {', '.join((*ACTIVATIONS, SWIGLU))}")

    @nn.compact
    def __call__(self, images: Array) -> Array:
        self.check()
        if images.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(f"images are {list(images.shape)}, not [N,{self.image_size},{self.image_size},3]")
        x = self._tokens(images)
        if self.pre_norm:
            x = self._norm("pre_norm", x)
        for i in range(self.depth):
            h = self._norm(f"layer_{i}_norm1", x)
            read = 1 if i == self.depth - 1 else None  # of the last layer only the class token is read
            attend = MultiHeadAttention(self.num_heads, self.width // self.num_heads, self.dtype, qkv_bias=True, name=f"layer_{i}_attn")
            x = x[:, :read] + self._scaled(f"layer_{i}_scale1", attend(h[:, :read], h))
            x = x + self._scaled(f"layer_{i}_scale2", self._feed_forward(f"layer_{i}", self._norm(f"layer_{i}_norm2", x)))
        y = self._norm("final_norm", x[:, 0])
        return Dense(self.projection, False, dtype=self.dtype, name="projection")(y) if self.projection else y

    def _tokens(self, images: Array) -> Array:
        """The class token and the patches, in row order, at their places: [N,1+grid*grid,width]."""
        place = self.param("position_embedding", _small, (1 + self.grid**2, self.width))
        first = self.param("class_embedding", _small, (self.width,))
        patches = space_to_depth(jnp.asarray(images, self.dtype), self.patch_size).reshape(len(images), self.grid**2, -1)
        patches = Dense(self.width, self.patch_bias, dtype=self.dtype, name="patches")(patches)
        first = jnp.broadcast_to(jnp.asarray(first, self.dtype), (len(images), 1, self.width))
        return jnp.concatenate([first, patches], axis=1) + jnp.asarray(place, self.dtype)

    def _feed_forward(self, name: str, x: Array) -> Array:
        gated = self.activation == SWIGLU
        h = Dense((1 + gated) * self.hidden, dtype=self.dtype, name=f"{name}_ff_in")(x)
        if gated:
            gate, value = jnp.split(h, 2, axis=-1)
            h = nn.silu(gate) * value
        else:
            h = ACTIVATIONS[self.activation](h)
        return Dense(self.width, dtype=self.dtype, name=f"{name}_ff_out")(h)

    def _scaled(self, name: str, x: Array) -> Array:
        return x * jnp.asarray(self.param(name, nn.initializers.ones, (self.width,)), self.dtype) if self.layer_scale else x

    def _norm(self, name: str, x: Array) -> Array:
        return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, use_fast_variance=False, name=name)(x)


def preprocess(images: Array | np.ndarray, size: int, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Images [N,H,W,3] of any real type in [0, 255] to what a `VisionTransformer` takes, [N,size,size,3] in at least float32.

    The shorter side becomes `size` by the antialiased bicubic filter of Pillow (a = -1/2), the longer one keeps its proportion, rounded
    down, and the centre is cut out. Values are cut off at 0 and 255 but not rounded to whole ones, divided by 255 and normalised by `mean`
    and `std`. In full precision, whatever the caller's default is.

    Raises ValueError for images of another shape and a size that is not positive.
    """
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:] or size < 1:
        raise ValueError(f"images are {list(images.shape)}, not [N,H,W,3], or the size {size} is not positive")
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    short = min(images.shape[1:3])
    rows, columns = (jnp.asarray(_resize_weights(side, size * side // short, size), dtype) for side in images.shape[1:3])
    x = jnp.einsum("ah,bw,nhwc->nabc", rows, columns, images.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return (jnp.clip(x, 0, 255) / 255 - jnp.asarray(mean, dtype)) / jnp.asarray(std, dtype)


def _resize_weights(before: int, after: int, kept: int) -> np.ndarray:
    """What the middle `kept` of `after` pixels take of each of `before` ones: float64 [kept,before], of which each row sums to 1.

    Made on the host: places computed in float32 cost a hundredth of a grey level.
    """
    step = before / after
    centres = ((after - kept) // 2 + np.arange(kept) + 0.5) * step
    weights = cubic((centres[:, None] - (np.arange(before) + 0.5)) / max(step, 1), -0.5)
    return weights / weights.sum(1, keepdims=True)


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The kernel of cubic convolution at distances x, in pixels, with slope `a` at 1 (Keys 1981, equation 15 at a = -1/2)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
