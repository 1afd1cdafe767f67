"""The forward process, and the loss of a prediction with its weighting over noise levels."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.checks import check_finite
from ldm_jax.diffusion.prediction import coefficients, determinant, target
from ldm_jax.diffusion.process import Array, Process, expand
from ldm_jax.diffusion.schedules import lookup
from ldm_jax.diffusion.times import TimeSampling


@dataclass(frozen=True)
class DiffusionLoss:
    """What the network predicts and how its errors count.

    Attributes:
      prediction: a key of `prediction.PREDICTIONS`; what the network's output means.
      loss: 'l1', 'l2' or 'huber', elementwise on the prediction.
      weighting: a key of `WEIGHTINGS`; it multiplies the loss whatever its kind.
      gamma: the cap of 'min_snr' and 'soft_min_snr' on the signal-to-noise ratio; the exponent of 'p2'.
      weight_offset: k of 'p2'; b of 'sigmoid', a log-SNR of which what lies beyond +-60 counts as that.
      vlb_weight: factor of the variational bound's weight, which is added to the weighting's (the paper's code: original_elbo_weight); of
        discrete processes.
      huber_delta: where 'huber' turns from squares to lines.
      times: the law of training times.
    """

    prediction: str = "eps"
    loss: str = "l2"
    weighting: str = "none"
    gamma: float = 5.0
    weight_offset: float = 1.0
    vlb_weight: float = 0.0
    huber_delta: float = 1.0
    times: TimeSampling = field(default_factory=TimeSampling)

    def __post_init__(self) -> None:
        coefficients(self.prediction, 1.0, 0.0)
        lookup("loss", ELEMENTWISE, self.loss)
        lookup("weighting", WEIGHTINGS, self.weighting)
        check_finite(self, "the diffusion loss")
        if self.vlb_weight < 0 or (self.weighting == "p2" and not self.weight_offset > 0):
            raise ValueError(f"vlb_weight must not be negative, and p2's offset be positive: {self.vlb_weight}, {self.weight_offset}")
        for name in ("gamma", "huber_delta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of the diffusion loss must be positive, got {getattr(self, name)}")


def _huber(error: jax.Array, settings: DiffusionLoss) -> jax.Array:
    """Equal to l2 below delta (twice Huber's own scale), so that switching the loss keeps the learning rate."""
    size, delta = jnp.abs(error), settings.huber_delta
    return jnp.where(size <= delta, error**2, delta * (2 * size - delta))


ELEMENTWISE: dict[str, Callable[[jax.Array, DiffusionLoss], jax.Array]] = {
    "l1": lambda error, settings: jnp.abs(error),
    "l2": lambda error, settings: error**2,
    "huber": _huber,
}


class _Noise(NamedTuple):
    """A noise level: alpha, sigma, the standard deviation of the data, and `Process.turning`."""

    alpha: Array
    sigma: Array
    data: float
    turning: Array


# Weights of the squared error of x_0, times sigma^2: that is regular at both ends, where the weights themselves need not be.
WEIGHTINGS: dict[str, Callable[[DiffusionLoss, _Noise], Array] | None] = {
    # Every element of the network's own prediction counts alike.
    "none": None,
    # min(SNR, gamma): Hang et al., arXiv 2303.09556, eq. 6.
    "min_snr": lambda s, at: jnp.minimum(at.alpha**2, s.gamma * at.sigma**2),
    # SNR gamma/(SNR + gamma): Crowson et al., arXiv 2401.11605, section 3.4.
    "soft_min_snr": lambda s, at: s.gamma * at.alpha**2 * at.sigma**2 / (at.alpha**2 + s.gamma * at.sigma**2),
    # SNR/(k + SNR)^gamma, that is 1/(k + SNR)^gamma on eps: Choi et al., arXiv 2204.00227, eq. 8.
    "p2": lambda s, at: at.alpha**2 * (at.sigma**2 / (s.weight_offset * at.sigma**2 + at.alpha**2)) ** s.gamma,
    # (r^2 + s^2)/(r s)^2 with r = sigma/alpha: Karras et al., arXiv 2206.00364, table 1; 1 on the 'edm' prediction.
    "edm": lambda s, at: (at.sigma**2 + (at.alpha * at.data) ** 2) / at.data**2,
    # sigmoid(b - lambda) on eps for each log-SNR lambda alike, so times the fall of lambda with the fraction of time, one over its density:
    # Kingma & Gao, arXiv 2303.00848, eq. 8 and section 6. Under uniform fractions every process then has the same loss; another law of
    # times weighs by its density of fractions besides.
    "sigmoid": lambda s, at: at.alpha * at.sigma * at.turning / (at.sigma**2 + at.alpha**2 * math.exp(min(max(-s.weight_offset, -60), 60))),
}
_NEAR = 1e-4  # alpha or sigma where the prediction says nothing of x_0: the weight is taken near there, and finite where its limit is not


def loss_weight(process: Process, settings: DiffusionLoss, t: Array) -> jax.Array:
    """The weight of the loss at each t, without the bound's, shaped as t; finite at every t.

    At fixed x_t an error of x_0 is -sigma/determinant times one of the prediction, so a weight w on x_0 is w sigma^2/determinant^2 on the
    prediction: with 'min_snr' min(SNR, gamma)/SNR for eps, min(SNR, gamma)/(SNR + 1) for v.
    """
    at, det = _noise(process, settings.prediction, t)
    own = WEIGHTINGS[settings.weighting]
    return jnp.ones_like(at.alpha) if own is None else own(settings, at) / det**2


def _noise(process: Process, prediction: str, t: Array) -> tuple[_Noise, Array]:
    """The noise levels, and the determinant of the prediction there, which is not 0."""
    alpha, sigma, data = process.alpha(t), process.sigma(t), process.sigma_data
    singular = determinant(prediction, alpha, sigma, data) == 0
    alpha, sigma = (jnp.where(singular, jnp.maximum(value, _NEAR), value) for value in (alpha, sigma))
    return _Noise(alpha, sigma, data, process.turning(t)), determinant(prediction, alpha, sigma, data)


def bound_weight(process: Process, settings: DiffusionLoss, t: Array) -> jax.Array:
    """`vlb_weight` times the weight of the variational bound at each t, shaped as t.

    On x_0 it is half the loss of signal-to-noise ratio in the step to t (Kingma et al., arXiv 2107.00630, eq. 14). Times 0 and 1 share the
    weight of 1: the first term of the bound is of another kind, and infinite here. Raises ValueError for a process of continuous time.
    """
    if not settings.vlb_weight:
        return jnp.zeros_like(process.alpha(t))
    if process.num_times is None:
        raise ValueError("vlb_weight is of discrete processes: leave it at 0")
    later = jnp.maximum(jnp.asarray(t), 1.0)

    def snr(t: jax.Array) -> jax.Array:
        return (process.alpha(t) / process.sigma(t)) ** 2

    at, det = _noise(process, settings.prediction, t)
    return settings.vlb_weight * 0.5 * (snr(later - 1) - snr(later)) * at.sigma**2 / det**2


def noised(process: Process, x0: jax.Array, eps: jax.Array, t: Array) -> jax.Array:
    """x_t = alpha(t) x_0 + sigma(t) eps: x0, eps [B, ...], t [B] -> [B, ...] in promote_types(x0.dtype, float32)."""
    dtype = jnp.promote_types(x0.dtype, jnp.float32)
    return expand(process.alpha(t), x0).astype(dtype) * x0 + expand(process.sigma(t), x0).astype(dtype) * eps


def per_example(
    process: Process, settings: DiffusionLoss, pred: jax.Array, x0: jax.Array, eps: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Loss of each example, the mean over its elements: weighted, and the variational bound's share, which is added to it.

    Args:
      pred: [B, ...], the network's answer at `noised(process, x0, eps, t)`.
      x0, eps: [B, ...], data and noise.
      t: [B], in the process's units.

    Returns: two of [B] in promote_types(pred.dtype, float32).
    """
    dtype = jnp.promote_types(pred.dtype, jnp.float32)
    error = pred.astype(dtype) - target(settings.prediction, process, x0, eps, t).astype(dtype)
    loss = ELEMENTWISE[settings.loss](error, settings).mean(axis=tuple(range(1, error.ndim)))
    return loss * loss_weight(process, settings, t).astype(dtype), loss * bound_weight(process, settings, t).astype(dtype)


def training_noise(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, offset: float, perturbation: float
) -> tuple[jax.Array, jax.Array]:
    """(eps, the noise that x_t is made of), each `shape` [B, ..., C].

    Args:
      offset: standard deviation of what is added to all of a channel, so that the network learns an image's brightness too.
      perturbation: standard deviation of noise that is in x_t but not in the target (Ning et al., arXiv 2301.11706, eq. 5).
    """
    keys = jax.random.split(key, 3) if offset or perturbation else [key]
    eps = jax.random.normal(keys[0], shape, dtype)
    if offset:
        eps += offset * jax.random.normal(keys[1], (shape[0], *[1] * (len(shape) - 2), shape[-1]), dtype)
    return eps, eps + perturbation * jax.random.normal(keys[2], shape, dtype) if perturbation else eps


def bucketed(loss: jax.Array, fraction: jax.Array, buckets: int) -> tuple[jax.Array, jax.Array]:
    """Loss by noise level: sums and counts, so that means over devices and steps are exact.

    Args:
      loss: [B].
      fraction: [B] in [0, 1], `process.fraction_of(t)`.
      buckets: equal parts of [0, 1], least noisy first.

    Returns: (sums, counts), each [buckets] in loss's dtype.
    """
    index = jnp.clip((fraction * buckets).astype(jnp.int32), 0, buckets - 1)
    member = index[:, None] == jnp.arange(buckets)
    # Selected, not multiplied: a NaN then stays in its own bucket.
    return jnp.where(member, loss[:, None], 0).sum(axis=0), member.sum(axis=0).astype(loss.dtype)
