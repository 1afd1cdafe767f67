"""LPIPS, version 0.1: weighted squared differences of VGG16 features (Zhang et al., arXiv 1801.03924, eq. 1)."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Channels of the convolutions between two poolings; the features compared are those at the end of each row.
_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Index of each convolution in torchvision's `vgg16().features`, which counts ReLUs and poolings too.
_TORCH_INDEX = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
# ImageNet's mean and standard deviation, moved from [0, 1] to [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_CONVOLUTION = re.compile(r"(?:^|\.)(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))$")
_HEAD = re.compile(r"(?:^|\.)(lin\d\.model\.1\.weight)$")

Params = dict[str, Any]


def lpips(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The distance of each image x from y, both [B,H,W,3] in [-1, 1] with H, W >= 16: [B], >= 0, in
    `promote_types(dtype, float32)`.

    `params` is {"convolutions": 13 of {"kernel" [3,3,I,O], "bias" [O]}, "heads": 5 of [C]}. Gradients reach both
    images; take them with respect to one only and the other's features cost a forward pass alone.
    """
    distances = [
        jnp.mean(jnp.square(_unit(a) - _unit(b)) @ head.astype(a.dtype), axis=(1, 2))
        for a, b, head in zip(_features(params, x), _features(params, y), params["heads"], strict=True)
    ]
    return sum(distances[1:], start=distances[0])


def params_from_state_dict(state: Mapping[str, np.ndarray]) -> Params:
    """The parameters of `lpips` from named torch tensors, float32.

    Read are torchvision's VGG16 (`features.N.weight`), the heads that package lpips ships (`linK.model.1.weight`), and
    files that hold both with VGG16 under `net.sliceN.M`, as package lpips and taming-transformers save them; any prefix
    may stand before; other keys are left.

    Raises ValueError with one list of all keys that are missing or have another shape.
    """
    found = {f"features.{match[1]}": value for key, value in state.items() if (match := _CONVOLUTION.search(key))}
    found |= {match[1]: value for key, value in state.items() if (match := _HEAD.search(key))}
    expected = _torch_shapes()
    wrong = [
        f"{key} has shape {found[key].shape} instead of {shape}" if key in found else f"{key} is missing"
        for key, shape in expected.items()
        if key not in found or found[key].shape != shape
    ]
    if wrong:
        raise ValueError(f"these are not the weights of LPIPS with VGG16: {'; '.join(wrong)}")
    arrays = {key: jnp.asarray(found[key], jnp.float32) for key in expected}
    return {
        "convolutions": [
            {"kernel": arrays[f"features.{n}.weight"].transpose(2, 3, 1, 0), "bias": arrays[f"features.{n}.bias"]} for n in _TORCH_INDEX
        ],
        "heads": [arrays[f"lin{k}.model.1.weight"].reshape(-1) for k in range(len(_BLOCKS))],
    }


def random_params(key: jax.Array) -> Params:
    """Untrained float32 parameters of `lpips` (He initialisation, heads in [0, 1)), for tests and benchmarks."""
    convolution_key, head_key = jax.random.split(key)
    widths = [width for block in _BLOCKS for width in block]
    shapes = [(3, 3, channels, width) for channels, width in zip([3, *widths], widths, strict=False)]
    # One draw for all layers: a draw for each would take seconds to compile.
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    noise = jnp.split(jax.random.normal(convolution_key, (ends[-1],)), ends[:-1])
    heads = [jax.random.uniform(jax.random.fold_in(head_key, k), (block[-1],)) for k, block in enumerate(_BLOCKS)]
    return {
        "convolutions": [
            {"kernel": values.reshape(shape) * math.sqrt(2 / math.prod(shape[:3])), "bias": jnp.zeros(shape[3])}
            for values, shape in zip(noise, shapes, strict=True)
        ],
        "heads": heads,
    }


def _features(params: Params, images: jax.Array) -> list[jax.Array]:
    """Outputs of the last ReLU of each block, [B,H/2**k,W/2**k,C] for k = 0..4."""
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    x = (images.astype(dtype) - jnp.asarray(_SHIFT, dtype)) / jnp.asarray(_SCALE, dtype)
    convolutions = iter(params["convolutions"])
    outputs: list[jax.Array] = []
    for block in _BLOCKS:
        if outputs:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for _ in block:
            layer = next(convolutions)
            kernel, bias = layer["kernel"].astype(dtype), layer["bias"].astype(dtype)
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.relu(x + bias)
        outputs.append(x)
    return outputs


def _unit(features: jax.Array) -> jax.Array:
    """Features of length one along the channels."""
    squared = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    # The floor lies below what float32 features can matter at; it keeps the root's gradient finite where all features
    # are zero.
    return features / (jnp.sqrt(jnp.maximum(squared, 1e-30)) + 1e-10)


def _torch_shapes() -> dict[str, tuple[int, ...]]:
    widths = [width for block in _BLOCKS for width in block]
    shapes: dict[str, tuple[int, ...]] = {}
    for n, channels, width in zip(_TORCH_INDEX, [3, *widths], widths, strict=False):
        shapes |= {f"features.{n}.weight": (width, channels, 3, 3), f"features.{n}.bias": (width,)}
    return shapes | {f"lin{k}.model.1.weight": (1, block[-1], 1, 1) for k, block in enumerate(_BLOCKS)}
