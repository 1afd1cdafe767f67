"""What a network predicts, and the exact conversions between predictions.

Every prediction is a combination p = c x_0 + d eps whose coefficients depend on alpha(t) and sigma(t) only. Together with
x_t = alpha x_0 + sigma eps that is a 2x2 linear system for (x_0, eps) with determinant alpha d - sigma c:

    kind   p                         c        d       determinant
    eps    eps                       0        1       alpha
    x0     x_0                       1        0       -sigma
    v      alpha eps - sigma x_0     -sigma   alpha   alpha^2 + sigma^2     (Salimans & Ho, arXiv 2202.00512)
    flow   eps - x_0                 -1       1       alpha + sigma         (Liu et al., arXiv 2209.03003)
    edm    (sigma x_0 - alpha s^2 eps)/(s n)                  -n/s          (Karras et al., arXiv 2206.00364, eq. 7 and table 1)

with s the standard deviation of the data and n = sqrt(sigma^2 + alpha^2 s^2), so that 'edm' is the network behind the preconditioning:
x_0 = c_skip x_t + c_out p for alpha = 1, of unit variance; with s = 1 on a variance-preserving process it is -v.

v, flow and edm are regular at both ends. Where the determinant is 0 (eps at zero SNR, x0 without noise) a prediction determines
nothing but itself: the conversions return it for its own kind and 0, the mean of standardised data and of noise, for the other.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.process import Array, Process, expand
from ldm_jax.diffusion.schedules import lookup


def _edm(alpha: Array, sigma: Array, data: float) -> tuple[Array, Array]:
    size = (sigma**2 + (alpha * data) ** 2) ** 0.5
    return sigma / (data * size), -alpha * data / size


PREDICTIONS: dict[str, Callable[[Array, Array, float], tuple[Array, Array]]] = {
    "eps": lambda alpha, sigma, data: (0.0 * alpha, 1.0 + 0.0 * sigma),
    "x0": lambda alpha, sigma, data: (1.0 + 0.0 * alpha, 0.0 * sigma),
    "v": lambda alpha, sigma, data: (-sigma, alpha),
    "flow": lambda alpha, sigma, data: (-1.0 + 0.0 * alpha, 1.0 + 0.0 * sigma),
    "edm": _edm,
}


def coefficients(prediction: str, alpha: Array, sigma: Array, data: float = 1.0) -> tuple[Array, Array]:
    """(c, d) of p = c x_0 + d eps, shaped as alpha; `data` is the data's standard deviation. Raises ValueError for an unknown kind."""
    return lookup("prediction", PREDICTIONS, prediction)(alpha, sigma, data)


def determinant(prediction: str, alpha: Array, sigma: Array, data: float = 1.0) -> Array:
    """alpha d - sigma c: 0 where the prediction does not determine x_0 and eps."""
    c, d = coefficients(prediction, alpha, sigma, data)
    return alpha * d - sigma * c


def target(prediction: str, process: Process, x0: jax.Array, eps: jax.Array, t: Array) -> jax.Array:
    """What the network should answer.

    Args:
      prediction: a key of `PREDICTIONS`.
      x0, eps: [B, ...], data and its noise.
      t: [B] or scalar, in the process's units.

    Returns: [B, ...] in promote_types(x0.dtype, float32).
    """
    dtype = jnp.promote_types(x0.dtype, jnp.float32)
    c, d = coefficients(prediction, process.alpha(t), process.sigma(t), process.sigma_data)
    return expand(c, x0).astype(dtype) * x0 + expand(d, x0).astype(dtype) * eps


def solve(prediction: str, alpha: Array, sigma: Array, pred: jax.Array, x_t: jax.Array, data: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """x_0 and eps that a prediction stands for.

    Args:
      prediction: a key of `PREDICTIONS`.
      alpha, sigma: [B] or scalars, the process at the time of x_t.
      pred, x_t: [B, ...], the network's answer and its input.
      data: standard deviation of the data, for 'edm'.

    Returns: (x_0, eps), each [B, ...] in promote_types(x_t.dtype, float32).
    """
    dtype = jnp.promote_types(x_t.dtype, jnp.float32)
    alpha, sigma = expand(alpha, x_t).astype(dtype), expand(sigma, x_t).astype(dtype)
    x_t, pred = x_t.astype(dtype), pred.astype(dtype)
    c, d = coefficients(prediction, alpha, sigma, data)
    det = alpha * d - sigma * c
    singular = det == 0
    inverse = 1 / jnp.where(singular, 1, det)
    x0 = jnp.where(singular, c * pred, (d * x_t - sigma * pred) * inverse)
    eps = jnp.where(singular, d * pred, (alpha * pred - c * x_t) * inverse)
    return x0, eps


def to_x0(prediction: str, process: Process, pred: jax.Array, x_t: jax.Array, t: Array) -> jax.Array:
    """The x_0 [B, ...] that `pred` stands for at x_t and t ([B] or scalar); for eps at zero SNR, 0."""
    return solve(prediction, process.alpha(t), process.sigma(t), pred, x_t, process.sigma_data)[0]


def to_eps(prediction: str, process: Process, pred: jax.Array, x_t: jax.Array, t: Array) -> jax.Array:
    """The eps [B, ...] that `pred` stands for at x_t and t ([B] or scalar); for x0 without noise, 0."""
    return solve(prediction, process.alpha(t), process.sigma(t), pred, x_t, process.sigma_data)[1]
