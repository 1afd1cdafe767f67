"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598), both halves in one doubled batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.process import expand

Conditioning = Any  # a pytree of arrays [B, ...], usually a dict
Denoise = Callable[[jax.Array, jax.Array], jax.Array]
ConditionalDenoise = Callable[[jax.Array, jax.Array, Conditioning], jax.Array]


def guided(denoise: ConditionalDenoise, cond: Conditioning, null: Conditioning, scale: float | int | jax.Array) -> Denoise:
    """A denoiser that answers null + scale (cond - null), on the network's raw prediction.

    Every prediction is affine in x_0 at fixed x_t with the same coefficients for both halves, so guiding eps, x0, v or flow
    is the same thing.

    Args:
      denoise: (x_t [B, ...], t [B], cond) -> prediction [B, ...].
      cond: the conditioning, arrays [B, ...].
      null: the unconditional or the negative prompt's conditioning, of the same structure and shapes.
      scale: 1 is the conditional model, 0 the unconditional one, more is stronger guidance. A Python number, a scalar
        or one per image [B]. The Python numbers 1 and 0 run a batch that is not doubled.

    Returns: (x_t [B, ...], t [B] or scalar) -> [B, ...] in promote_types(prediction dtype, float32).
    Raises: ValueError where cond and null differ in structure or shapes, or scale is neither a scalar nor [B].
    """
    _check_alike(cond, null)
    if isinstance(scale, float | int) and scale in (0, 1):
        only = cond if scale == 1 else null
        return lambda x, t: _at_least_float32(denoise(x, t, only))
    scale = jnp.asarray(scale)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)

    def denoise_guided(x: jax.Array, t: jax.Array) -> jax.Array:
        if scale.shape not in ((), x.shape[:1]):
            raise ValueError(f"guidance scale has shape {scale.shape}: give a scalar or one per image [{x.shape[0]}]")
        t = jnp.broadcast_to(t, x.shape[:1])
        pred = _at_least_float32(denoise(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both))
        conditional, unconditional = jnp.split(pred, 2)
        return unconditional + expand(scale, x).astype(pred.dtype) * (conditional - unconditional)

    return denoise_guided


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_alike(cond: Conditioning, null: Conditioning) -> None:
    structures: tuple[Any, Any] = jax.tree.structure(cond), jax.tree.structure(null)
    if structures[0] != structures[1]:
        raise ValueError(f"guidance needs cond and null of one structure, got {structures[0]} and {structures[1]}")
    for (path, a), b in zip(jax.tree.leaves_with_path(cond), jax.tree.leaves(null), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(f"guidance: cond{jax.tree_util.keystr(path)} has shape {jnp.shape(a)}, null {jnp.shape(b)}")
