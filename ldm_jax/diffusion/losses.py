"""Training times, the forward process, and the loss of a prediction with its weighting over noise levels."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from ldm_jax.diffusion.prediction import coefficients, determinant, target
from ldm_jax.diffusion.process import Array, Process, expand
from ldm_jax.diffusion.schedules import lookup


@dataclass(frozen=True)
class TimeSampling:
    """The law of training times, as fractions u in [0, 1] that `Process.time_at` turns into t.

    Attributes:
      kind: 'uniform', independent draws; 'stratified', u_i = (i/B + offset) mod 1 with one offset for the batch, uniform
        for each example and evenly spread over the batch (Kingma et al., arXiv 2107.00630, appendix I.1);
        'logit_normal', logit(u) ~ N(mean, std^2) (Esser et al., arXiv 2403.03206, eq. 19).
      mean, std: of 'logit_normal'.
    """

    kind: str = "uniform"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        lookup("time sampling", TIME_SAMPLINGS, self.kind)
        if not self.std > 0:
            raise ValueError(f"std of the time sampling must be positive, got {self.std}")


def _uniform(settings: TimeSampling, key: jax.Array, batch: int) -> jax.Array:
    return jax.random.uniform(key, (batch,))


def _stratified(settings: TimeSampling, key: jax.Array, batch: int) -> jax.Array:
    return (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0


def _logit_normal(settings: TimeSampling, key: jax.Array, batch: int) -> jax.Array:
    return jax.nn.sigmoid(settings.mean + settings.std * jax.random.normal(key, (batch,)))


TIME_SAMPLINGS: dict[str, Callable[[TimeSampling, jax.Array, int], jax.Array]] = {
    "uniform": _uniform,
    "stratified": _stratified,
    "logit_normal": _logit_normal,
}


def sample_times(settings: TimeSampling, process: Process, key: jax.Array, batch: int) -> jax.Array:
    """Training times t, float [batch], for the global batch, in the process's units."""
    return process.time_at(TIME_SAMPLINGS[settings.kind](settings, key, batch))


@dataclass(frozen=True)
class DiffusionLoss:
    """What the network predicts and how its errors count.

    Attributes:
      prediction: 'eps', 'x0', 'v' or 'flow'; what the network's output means.
      loss: 'l1', 'l2' or 'huber', elementwise on the prediction.
      weighting: 'none', or 'min_snr' (Hang et al., arXiv 2303.09556), which multiplies the loss whatever its kind.
      gamma: the cap of 'min_snr' on the signal-to-noise ratio.
      huber_delta: where 'huber' turns from squares to lines.
      times: the law of training times.
    """

    prediction: str = "eps"
    loss: str = "l2"
    weighting: str = "none"
    gamma: float = 5.0
    huber_delta: float = 1.0
    times: TimeSampling = field(default_factory=TimeSampling)

    def __post_init__(self) -> None:
        coefficients(self.prediction, 1.0, 0.0)
        lookup("loss", ELEMENTWISE, self.loss)
        lookup("weighting", WEIGHTINGS, self.weighting)
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


def _min_snr(settings: DiffusionLoss, alpha: Array, sigma: Array) -> Array:
    """min(SNR, gamma) on the squared error of x_0, expressed for the network's own prediction.

    At fixed x_t an error of x_0 is -sigma/determinant times one of the prediction, so the weight is
    min(SNR, gamma) sigma^2/det^2 = min(alpha^2, gamma sigma^2)/det^2: min(SNR, gamma)/SNR for eps, min(SNR, gamma)/(SNR + 1)
    for v. Limits where det = 0: 1 for eps at zero SNR, gamma for x0 without noise. For v the weight is 0 at zero SNR.
    """
    c, d = coefficients(settings.prediction, alpha, sigma)
    det = determinant(settings.prediction, alpha, sigma)
    weight = jnp.minimum(alpha**2, settings.gamma * sigma**2) / jnp.where(det == 0, 1, det) ** 2
    return jnp.where(det == 0, d**2 + settings.gamma * c**2, weight)


WEIGHTINGS: dict[str, Callable[[DiffusionLoss, Array, Array], Array]] = {
    "none": lambda settings, alpha, sigma: jnp.ones_like(alpha),
    "min_snr": _min_snr,
}


def loss_weight(process: Process, settings: DiffusionLoss, t: Array) -> jax.Array:
    """The weight of the loss at each t, shaped as t; finite at every t."""
    return WEIGHTINGS[settings.weighting](settings, process.alpha(t), process.sigma(t))


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
