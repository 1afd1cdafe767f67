"""A small network in Inception's place, and pictures in memory, for tests of what is done with features."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.evaluation.extractors import Extractor
from ldm_jax.evaluation.pictures import Pictures


class InMemory(Pictures):
    """Pictures uint8 [N,H,W,3]; `reads` counts how often each was read."""

    def __init__(self, images: np.ndarray, name: str = "some") -> None:
        self._images, self._name = images, name
        self.size, self.provenance, self.reads = images.shape[1:3], {}, np.zeros(len(images), int)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, start: int, stop: int) -> np.ndarray:
        self._check(start, stop)
        self.reads[start:stop] += 1
        return self._images[start:stop]

    def fingerprint(self) -> str:
        return self._name

    def describe(self) -> str:
        return f"{len(self)} pictures"


def images(seed: int, number: int, side: int = 10, brightness: int = 256) -> np.ndarray:
    """Random pictures, each of another brightness and contrast."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, brightness, (number, side, side, 3))
    return (noise * rng.uniform(0.2, 1, (number, 1, 1, 3))).astype(np.uint8)


def tiny_inception(weights: str = "w") -> Extractor:
    """A random convolutional network with the names of Inception's features, [N,6], [N,5] and [N,4]."""
    rng = np.random.default_rng(5)
    shapes = {"first": (3, 3, 3, 8), "second": (3, 3, 8, 6), "head": (6, 4)}
    params = {name: (2 * rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype(np.float32) for name, shape in shapes.items()}

    def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest")

    def function(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        x = jnp.tanh(convolved(x.astype(jnp.float32) / 128 - 1, params["first"]))
        x = jnp.exp(0.5 * convolved(x, params["second"]))
        pool = x.mean((1, 2))
        return {
            "inception": pool,
            "inception_spatial": x[:, 0, 0, :5],
            "inception_logits": 3 * jnp.dot(pool, params["head"], precision="highest"),
        }

    return Extractor("inception", function, params, weights, "as they are")
