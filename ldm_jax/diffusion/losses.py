"""The forward process, and the loss of a prediction with its weighting over noise levels."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

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
      weight_offset: k of 'p2', b of 'sigmoid'.
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


# Weights of the squared error of x_0, times sigma^2: that is regular at both ends, where the weights themselves need not be.
# Arguments: settings, alpha, sigma, standard deviation of the data.
WEIGHTINGS: dict[str, Callable[[DiffusionLoss, Array, Array, float], Array] | None] = {
    # Every element of the network's own prediction counts alike.
    "none": None,
    # min(SNR, gamma): Hang et al., arXiv 2303.09556, eq. 6.
    "min_snr": lambda s, alpha, sigma, data: jnp.minimum(alpha**2, s.gamma * sigma**2),
    # SNR gamma/(SNR + gamma): Crowson et al., arXiv 2401.11605, section 3.4.
    "soft_min_snr": lambda s, alpha, sigma, data: s.gamma * alpha**2 * sigma**2 / (alpha**2 + s.gamma * sigma**2),
    # SNR/(k + SNR)^gamma, that is 1/(k + SNR)^gamma on eps: Choi et al., arXiv 2204.00227, eq. 8.
    "p2": lambda s, alpha, sigma, data: alpha**2 * (sigma**2 / (s.weight_offset * sigma**2 + alpha**2)) ** s.gamma,
    # (r^2 + s^2)/(r s)^2 with r = sigma/alpha: Karras et al., arXiv 2206.00364, table 1; 1 on the 'edm' prediction.
    "edm": lambda s, alpha, sigma, data: (sigma**2 + (alpha * data) ** 2) / data**2,
    # SNR sigmoid(b - log SNR), that is sigmoid(b - log SNR) on eps: Kingma & Gao, arXiv 2303.00848, section 6.
    "sigmoid": lambda s, alpha, sigma, data: (alpha * sigma) ** 2 / (sigma**2 + alpha**2 * math.exp(-s.weight_offset)),
}
_NEAR = 1e-4  # alpha or sigma where the prediction says nothing of x_0: the weight is taken near there, and finite where its limit is not


def loss_weight(process: Process, settings: DiffusionLoss, t: Array) -> jax.Array:
    """The weight of the loss at each t, shaped as t; finite at every t.

    At fixed x_t an error of x_0 is -sigma/determinant times one of the prediction, so a weight w on x_0 is w sigma^2/determinant^2 on the
    prediction: with 'min_snr' min(SNR, gamma)/SNR for eps, min(SNR, gamma)/(SNR + 1) for v.
    """
    alpha, sigma, data = process.alpha(t), process.sigma(t), process.sigma_data
    singular = determinant(settings.prediction, alpha, sigma, data) == 0
    alpha, sigma = (jnp.where(singular, jnp.maximum(value, _NEAR), value) for value in (alpha, sigma))
    det = determinant(settings.prediction, alpha, sigma, data)
    own = WEIGHTINGS[settings.weighting]
    weight = jnp.ones_like(alpha) if own is None else own(settings, alpha, sigma, data) / det**2
    if settings.vlb_weight:
        weight += settings.vlb_weight * _vlb(process, t) * sigma**2 / det**2
    return weight


def _vlb(process: Process, t: Array) -> jax.Array:
    """Half the loss of signal-to-noise ratio in the step to t (Kingma et al., arXiv 2107.00630, eq. 14), the weight of the bound on x_0.

    Times 0 and 1 share the weight of 1: the first term of the bound is of another kind, and infinite here.
    """
    if process.num_times is None:
        raise ValueError("vlb_weight is of discrete processes: leave it at 0")
    later = jnp.maximum(jnp.asarray(t), 1.0)

    def snr(t: jax.Array) -> jax.Array:
        return (process.alpha(t) / process.sigma(t)) ** 2

    return 0.5 * (snr(later - 1) - snr(later))


def noised(process: Process, x0: jax.Array, eps: jax.Array, t: Array) -> jax.Array:
    """x_t = alpha(t) x_0 + sigma(t) eps: x0, eps [B, ...], t [B] -> [B, ...] in promote_types(x0.dtype, float32)."""
    dtype = jnp.promote_types(x0.dtype, jnp.float32)
    return expand(process.alpha(t), x0).astype(dtype) * x0 + expand(process.sigma(t), x0).astype(dtype) * eps


def per_example(process: Process, settings: DiffusionLoss, pred: jax.Array, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
    """Weighted loss of each example, the mean over its elements.

    Args:
      pred: [B, ...], the network's answer at `noised(process, x0, eps, t)`.
      x0, eps: [B, ...], data and noise.
      t: [B], in the process's units.

    Returns: [B] in promote_types(pred.dtype, float32).
    """
    dtype = jnp.promote_types(pred.dtype, jnp.float32)
    error = pred.astype(dtype) - target(settings.prediction, process, x0, eps, t).astype(dtype)
    loss = ELEMENTWISE[settings.loss](error, settings).mean(axis=tuple(range(1, error.ndim)))
    return loss * loss_weight(process, settings, t).astype(dtype)


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
