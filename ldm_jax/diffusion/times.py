"""Laws of training times: which noise levels the network is shown."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.checks import check_finite
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.schedules import lookup


@dataclass(frozen=True)
class TimeSampling:
    """The law of training times.

    Attributes:
      kind: of fractions u in [0, 1] that `Process.time_at` turns into t: 'uniform', independent draws; 'stratified', u_i = (i/B + offset)
        mod 1 with one offset for the batch, uniform for each example and evenly spread over the batch (Kingma et al., arXiv 2107.00630,
        appendix I.1); 'logit_normal', logit(u) ~ N(mean, std^2) (Esser et al., arXiv 2403.03206, eq. 19); 'mode', u = f(v) for uniform v
        with f(v) = 1 - v - mode_scale (cos^2(pi v/2) - 1 + v) (the same, eq. 20).
        Of noise itself, cut off at the process's ends: 'log_normal', log(sigma/alpha) ~ N(mean, std^2); 'edm' and 'edm2', the laws of
        Karras et al., arXiv 2206.00364, table 1 (-1.2 and 1.2) and arXiv 2312.02696 (-0.4 and 1.0), which were found for data of standard
        deviation 0.5 and are kept in units of the process's `sigma_data`: log(sigma/(2 alpha sigma_data)) has that mean and deviation.
      mean, std: of 'logit_normal' and 'log_normal'.
      mode_scale: of 'mode', -1 to 2/(pi - 2); above 0 more of the middle, below 0 more of the ends.

    Raises ValueError at construction for an unknown kind or values out of range.
    """

    kind: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 0.0

    def __post_init__(self) -> None:
        lookup("time sampling", TIME_SAMPLINGS, self.kind)
        check_finite(self, "the time sampling")
        if not self.std > 0:
            raise ValueError(f"std of the time sampling must be positive, got {self.std}")
        if not -1 <= self.mode_scale <= 2 / (np.pi - 2):
            raise ValueError(f"mode_scale of the time sampling must be in [-1, {2 / (np.pi - 2):.4g}], got {self.mode_scale}")


Law = Callable[[TimeSampling, Process, jax.Array, int], jax.Array]


def _fractions(draw: Callable[[TimeSampling, jax.Array, int], jax.Array]) -> Law:
    return lambda settings, process, key, batch: process.time_at(draw(settings, key, batch))


def _uniform(settings: TimeSampling, key: jax.Array, batch: int) -> jax.Array:
    return jax.random.uniform(key, (batch,))


def _stratified(settings: TimeSampling, key: jax.Array, batch: int) -> jax.Array:
    return (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0


def _logit_normal(settings: TimeSampling, key: jax.Array, batch: int) -> jax.Array:
    return jax.nn.sigmoid(settings.mean + settings.std * jax.random.normal(key, (batch,)))


def _mode(settings: TimeSampling, key: jax.Array, batch: int) -> jax.Array:
    v = jax.random.uniform(key, (batch,))
    return 1 - v - settings.mode_scale * (jnp.cos(jnp.pi / 2 * v) ** 2 - 1 + v)


def _log_normal(settings: TimeSampling, process: Process, key: jax.Array, batch: int) -> jax.Array:
    return _at_log_ratio(process, settings.mean + settings.std * jax.random.normal(key, (batch,)))


def _published(mean: float, std: float) -> Law:
    """A law that was found for data of standard deviation 0.5."""

    def law(settings: TimeSampling, process: Process, key: jax.Array, batch: int) -> jax.Array:
        return _at_log_ratio(process, np.log(2 * process.sigma_data) + mean + std * jax.random.normal(key, (batch,)))

    return law


def _at_log_ratio(process: Process, log_ratio: jax.Array) -> jax.Array:
    t = jnp.clip(process.time_of_ratio(jnp.exp(log_ratio)), process.t_min, process.t_max)
    return t if process.num_times is None else jnp.round(t)


TIME_SAMPLINGS: dict[str, Law] = {
    "uniform": _fractions(_uniform),
    "stratified": _fractions(_stratified),
    "logit_normal": _fractions(_logit_normal),
    "mode": _fractions(_mode),
    "log_normal": _log_normal,
    "edm": _published(-1.2, 1.2),
    "edm2": _published(-0.4, 1.0),
}


def sample_times(settings: TimeSampling, process: Process, key: jax.Array, batch: int) -> jax.Array:
    """Training times t, float [batch], for the global batch, in the process's units."""
    return TIME_SAMPLINGS[settings.kind](settings, process, key, batch)
