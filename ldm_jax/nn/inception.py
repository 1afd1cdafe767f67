"""Inception-v3 as the FID is defined by it: the network of 2015-12-05 (Szegedy et al., arXiv 1512.00567), not torchvision's.

It differs from the published architecture in its pooling: averages leave out the padding, and the last block's pooling branch takes the
maximum. Batch norms are constant, and so part of the convolutions here.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]

SIDE = 299  # pixels
FEATURES, SPATIAL, CLASSES = 2048, 17 * 17 * 7, 1008

_ROW, _COLUMN = (1, 7), (7, 1)


def resize(images: jax.Array, side: int = SIDE) -> jax.Array:
    """Images float [N,H,W,C] at [N,side,side,C] as TensorFlow 1 resized them: bilinear, from pixel i * H / side, without half-pixel centres
    and without a filter where the picture gets smaller. Not rounded."""
    for axis in (1, 2):
        size = images.shape[axis]
        places = np.arange(side) * size / side
        low = np.floor(places).astype(int)
        share = jnp.asarray((places - low).reshape(-1, *(1,) * (3 - axis)), images.dtype)
        below, above = (jnp.take(images, index, axis=axis) for index in (low, np.minimum(low + 1, size - 1)))
        images = below + (above - below) * share
    return images


def _convolve(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated` of channels last; of one pixel it is a matrix product, which XLA is faster at on CPUs."""
    if kernel.shape[:2] != (1, 1):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel[0, 0], precision=options["precision"])
    return flat.reshape(*x.shape[:-1], -1)


class Conv(nn.Module):
    """A convolution with the batch norm that followed it, and ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # A convolution without padding is one with it, whose rim is cut off: on CPUs XLA is two to three times as fast at it.
        cut = 0 if self.same or self.stride > 1 else self.kernel[0] // 2
        padding = [(k // 2, k // 2) for k in self.kernel] if self.same or cut else "VALID"
        settings: Any = {"precision": jax.lax.Precision.HIGHEST, "conv_general_dilated": _convolve}
        conv = nn.Conv(self.features, self.kernel, self.stride, padding, **settings, name="conv")
        y = nn.relu(conv(x))
        return y[:, cut : y.shape[1] - cut, cut : y.shape[2] - cut]


def _average(x: jax.Array) -> jax.Array:
    """The mean of 3x3 pixels, of those that there are."""
    for axis in (1, 2):
        counts = np.full(x.shape[axis], 3.0)
        counts[[0, -1]] = 2
        pads = [(int(a == axis),) * 2 for a in range(4)]
        x = sum(_threes(jnp.pad(x, pads), axis), start=jnp.zeros_like(x)) / jnp.asarray(counts.reshape(-1, *(1,) * (3 - axis)), x.dtype)
    return x


def _maximum(x: jax.Array, stride: int = 2) -> jax.Array:
    """The maximum of 3x3 pixels: of those that there are, or with a stride where all are."""
    for axis in (1, 2):
        if stride == 1:
            x = jnp.pad(x, [(int(a == axis),) * 2 for a in range(4)], constant_values=-jnp.inf)
        first, second, third = _threes(x, axis, stride)
        x = jnp.maximum(jnp.maximum(first, second), third)
    return x


def _threes(x: jax.Array, axis: int, stride: int = 1) -> list[jax.Array]:
    """The pixels of each window of three, one array for each place in it; slices, as XLA's window reductions are slow on CPUs."""
    last = (x.shape[axis] - 3) // stride * stride
    return [jax.lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(3)]


Branch = tuple[tuple[str, int, tuple[int, int]], ...]


class Mixed(nn.Module):
    """Branches of convolutions side by side; those of `halved` end with a stride of 2, beside a maximum of 2.

    Attributes:
      branches: (name, features, kernel) of the convolutions of each.
      pool: features of the convolution after the pooling branch; 0: a maximum with stride 2 and none.
      maximum: that branch takes the maximum and not the average.
    """

    branches: tuple[Branch, ...]
    pool: int
    maximum: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        parts = []
        for branch in self.branches:
            y = x
            for i, (name, features, kernel) in enumerate(branch):
                last = i == len(branch) - 1 and not self.pool
                y = Conv(features, kernel, 2 if last else 1, not last, name=name)(y)
            parts.append(y)
        if not self.pool:
            return jnp.concatenate([*parts, _maximum(x)], -1)
        pooled = _maximum(x, 1) if self.maximum else _average(x)
        return jnp.concatenate([*parts, Conv(self.pool, name="branch_pool")(pooled)], -1)


class Forked(nn.Module):
    """The last two blocks, in which two branches fork at their ends."""

    maximum: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = Conv(384, name="branch3x3_1")(x)
        z = Conv(384, (3, 3), name="branch3x3dbl_2")(Conv(448, name="branch3x3dbl_1")(x))
        parts = [Conv(320, name="branch1x1")(x)]
        parts += [Conv(384, (1, 3), name="branch3x3_2a")(y), Conv(384, (3, 1), name="branch3x3_2b")(y)]
        parts += [Conv(384, (1, 3), name="branch3x3dbl_3a")(z), Conv(384, (3, 1), name="branch3x3dbl_3b")(z)]
        pooled = _maximum(x, 1) if self.maximum else _average(x)
        return jnp.concatenate([*parts, Conv(192, name="branch_pool")(pooled)], -1)


def _squares(pool: int) -> Mixed:
    small: Branch = (("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5)))
    double: Branch = (("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3)))
    return Mixed(((("branch1x1", 64, (1, 1)),), small, double), pool)


def _stripes(width: int) -> Mixed:
    single: Branch = (("branch7x7_1", width, (1, 1)), ("branch7x7_2", width, _ROW), ("branch7x7_3", 192, _COLUMN))
    kernels = (((1, 1), width), (_COLUMN, width), (_ROW, width), (_COLUMN, width), (_ROW, 192))
    double: Branch = tuple((f"branch7x7dbl_{i}", features, kernel) for i, (kernel, features) in enumerate(kernels, 1))
    return Mixed(((("branch1x1", 192, (1, 1)),), single, double), 192)


def _halving(third: bool) -> Mixed:
    """The blocks after which the grid has half the side: of 17 and, `third`, of 8."""
    if not third:
        double: Branch = (("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3)))
        return Mixed(((("branch3x3", 384, (3, 3)),), double), 0)
    single: Branch = (("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3)))
    stripes = tuple((f"branch7x7x3_{i}", 192, kernel) for i, kernel in enumerate(((1, 1), _ROW, _COLUMN, (3, 3)), 1))
    return Mixed((single, stripes), 0)


class Inception(nn.Module):
    """Images float32 [N,H,W,3] in [0, 255], of any size, to what is measured of them, in float32:

    `pool` [N,2048] (the FID's), `spatial` [N,2023] (sFID's: the first 7 channels of a grid of 17 x 17, row by row) and `logits` [N,1008]
    without a bias (the Inception score's).
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        x = (resize(images) - 128) / 128
        x = Conv(32, (3, 3), 2, False, name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), 1, False, name="Conv2d_2a_3x3")(x)
        x = _maximum(Conv(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = Conv(80, name="Conv2d_3b_1x1")(x)
        x = _maximum(Conv(192, (3, 3), 1, False, name="Conv2d_4a_3x3")(x))
        blocks: dict[str, nn.Module] = {"5b": _squares(32), "5c": _squares(64), "5d": _squares(64), "6a": _halving(False)}
        blocks |= {"6b": _stripes(128), "6c": _stripes(160), "6d": _stripes(160), "6e": _stripes(192), "7a": _halving(True)}
        blocks |= {"7b": Forked(False), "7c": Forked(True)}
        spatial = x
        for name, block in blocks.items():
            x = block.copy(name=f"Mixed_{name}")(x)
            if name == "6d":
                spatial = x[..., :7].reshape(len(x), -1)
        pool = x.mean((1, 2))
        logits = nn.Dense(CLASSES, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")(pool)
        return {"pool": pool, "spatial": spatial, "logits": logits}


def abstract_params() -> Any:
    """Shapes and types of the parameters."""
    return jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))["params"]


def params_from_state_dict(state: Mapping[str, np.ndarray]) -> Params:
    """The parameters float32 from the torch weights `pt_inception-2015-12-05-6726825d.pth`, batch norms folded in float64.

    Raises ValueError with one list of all that is missing, of another shape, or not expected.
    """
    wanted = torch_shapes()
    free = {name for name in state if name.endswith(".num_batches_tracked")} | {"fc.bias"}
    wrong = [
        f"{name}: {list(state[name].shape)} there, {list(shape)} here"
        for name, shape in wanted.items()
        if name in state and state[name].shape != shape
    ]
    wrong += [f"{name}: missing" for name in wanted if name not in state]
    wrong += [f"{name}: not expected" for name in state if name not in wanted and name not in free]
    if wrong:
        raise ValueError(
            f"these are not the weights of the FID's Inception: {'; '.join(wrong[:5])}"
            + (f"; {len(wrong) - 5} more" if len(wrong) > 5 else "")
        )
    params: Params = {"fc": {"kernel": np.asarray(state["fc.weight"].T, np.float32)}}
    for path in _convolutions():
        name = ".".join(path)
        gain, offset, mean, variance = (state[f"{name}.bn.{part}"].astype(np.float64) for part in _NORM)
        scale = gain / np.sqrt(variance + 1e-3)
        kernel = state[f"{name}.conv.weight"].astype(np.float64).transpose(2, 3, 1, 0) * scale
        leaf: Any = params
        for part in path:
            leaf = leaf.setdefault(part, {})
        leaf["conv"] = {"kernel": kernel.astype(np.float32), "bias": (offset - mean * scale).astype(np.float32)}
    return params


_NORM = ("weight", "bias", "running_mean", "running_var")


def _convolutions() -> list[tuple[str, ...]]:
    """Where the parameters of each convolution lie."""
    leaves = jax.tree_util.tree_flatten_with_path(abstract_params())[0]
    return [tuple(key.key for key in path[:-2]) for path, _ in leaves if path[-1].key == "kernel" and path[0].key != "fc"]


def torch_shapes() -> dict[str, tuple[int, ...]]:
    """Of the tensors that are read, by torch's names."""
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (CLASSES, FEATURES)}
    params = abstract_params()
    for path in _convolutions():
        leaf, name = params, ".".join(path)
        for part in path:
            leaf = leaf[part]
        height, width, given, made = leaf["conv"]["kernel"].shape
        shapes[f"{name}.conv.weight"] = (made, given, height, width)
        shapes |= {f"{name}.bn.{part}": (made,) for part in _NORM}
    return shapes
