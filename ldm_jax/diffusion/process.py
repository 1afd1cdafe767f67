"""Diffusion processes x_t = alpha(t) x_0 + sigma(t) eps, eps ~ N(0, 1), discrete and continuous in one interface.

A process is a frozen, hashable dataclass, so it can be a static argument of `jax.jit`. Its methods are elementwise in t.
Given numpy arrays or Python numbers they compute on the host in float64; given jax arrays, in promote_types(t.dtype, float32).
"""

import functools
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import schedules
from ldm_jax.diffusion.checks import check_finite

Array = Any  # a jax array (traced or not), a numpy array or a Python number


class Process(Protocol):
    """What losses and samplers ask of a process; t is in the process's own units, larger is noisier."""

    @property
    def t_min(self) -> float:
        """The least noisy time that a network is asked for."""

    @property
    def t_max(self) -> float:
        """The noisiest time."""

    @property
    def t_clean(self) -> float:
        """The time at which alpha = 1 and sigma = 0, where samplers end; networks are never asked for it."""

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data that the process was made for; scaled latents have 1."""

    @property
    def num_times(self) -> int | None:
        """How many times there are, or None where time is continuous."""

    def alpha(self, t: Array) -> Array:
        """Scale of x_0 in x_t."""

    def sigma(self, t: Array) -> Array:
        """Standard deviation of the noise in x_t."""

    def log_snr(self, t: Array) -> Array:
        """log(alpha^2 / sigma^2): +inf where sigma is 0, -inf where alpha is 0."""

    def time_at(self, fraction: Array) -> Array:
        """The time at a fraction in [0, 1] of the way to noise; uniform fractions give the default law of training times."""

    def fraction_of(self, t: Array) -> Array:
        """The fraction in [0, 1] that `time_at` maps to t."""

    def turning(self, t: Array) -> Array:
        """2 (alpha sigma' - sigma alpha') with derivatives by the fraction of `time_at`: alpha sigma times the fall of log-SNR, or one over
        the density of log-SNR under uniform fractions, and finite at both ends."""

    def time_of_ratio(self, ratio: Array) -> Array:
        """The time at which sigma/alpha, noise in units of the signal, is `ratio` > 0; clipped to the process's own times."""

    def time_features(self, t: Array) -> Array:
        """What the network's sinusoidal embedding is fed: about 0..1000 whatever the process."""

    def input_scale(self, t: Array) -> Array:
        """What x_t is multiplied with for the network, so that its input has unit variance where the data has."""


def expand(coefficient: Array, x: jax.Array) -> jax.Array:
    """A coefficient that is a scalar or one per example [B], shaped to broadcast over x [B, ...]."""
    coefficient = jnp.asarray(coefficient)
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim)) if coefficient.ndim else coefficient


def _floating(t: Array) -> tuple[ModuleType, Array]:
    """The namespace (numpy or jax.numpy) that t belongs to, and t as floating point of at least 32 bits."""
    if isinstance(t, jax.Array):
        return jnp, t.astype(jnp.promote_types(t.dtype, jnp.float32))
    return np, np.asarray(t, np.float64)


class _Common:
    """What most processes share."""

    sigma_data = 1.0

    def log_snr(self: Process, t: Array) -> Array:
        namespace, t = _floating(t)
        with np.errstate(divide="ignore"):
            return 2 * (namespace.log(self.alpha(t)) - namespace.log(self.sigma(t)))

    def input_scale(self, t: Array) -> Array:
        namespace, t = _floating(t)
        return namespace.ones_like(t)


class _Continuous(_Common):
    """Continuous time, clean at 0."""

    t_clean = 0.0
    num_times: int | None = None


class _UnitTime(_Continuous):
    """Continuous time in [0, 1]."""

    t_min, t_max = 0.0, 1.0

    def time_features(self, t: Array) -> Array:
        return 1000 * _floating(t)[1]


@dataclass(frozen=True)
class DiscreteProcess(_Common):
    """The variance-preserving process of the paper: T noise levels, alpha^2 + sigma^2 = 1.

    t runs over 0..T-1 as float, and t = -1 is clean data (alpha 1, sigma 0). Between integers, (alpha, sigma) moves along
    the chord of the two neighbours, projected on the unit circle; outside [-1, T-1] t is clipped.

    Attributes:
      schedule: a key of `schedules.SCHEDULES`.
      start, end: the first and last beta; None or 0 is the schedule's own.
      num_steps: T.
      zero_terminal_snr: rescale so that alpha(T-1) = 0 (arXiv 2305.08891).
      betas: the schedule itself, for `schedule` 'given'.

    Raises ValueError at construction for settings that make no schedule.
    """

    schedule: str = "linear"
    start: float | None = None
    end: float | None = None
    num_steps: int = 1000
    zero_terminal_snr: bool = False
    betas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_finite(self, "the discrete process")
        schedules.make_betas(self.schedule, self.num_steps, self.start, self.end, self.betas)

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return self.num_steps - 1.0

    @property
    def t_clean(self) -> float:
        return -1.0

    @property
    def num_times(self) -> int:
        return self.num_steps

    def alpha(self, t: Array) -> Array:
        alpha, sigma, namespace = self._chord(t)
        return alpha / namespace.hypot(alpha, sigma)

    def sigma(self, t: Array) -> Array:
        alpha, sigma, namespace = self._chord(t)
        return sigma / namespace.hypot(alpha, sigma)

    def turning(self, t: Array) -> Array:
        """Over half a step to both sides, as far as there are times."""
        namespace, t = _floating(t)
        before, after = namespace.maximum(t - 0.5, self.t_clean), namespace.minimum(t + 0.5, self.t_max)
        angles = [namespace.arctan2(self.sigma(end), self.alpha(end)) for end in (before, after)]
        return 2 * self.num_steps * (angles[1] - angles[0]) / (after - before)

    def time_of_ratio(self, ratio: Array) -> Array:
        namespace, ratio = _floating(ratio)
        alpha, sigma = (namespace.asarray(table, ratio.dtype) for table in _tables(self))
        low = namespace.clip(namespace.sum(sigma < ratio[..., None] * alpha, axis=-1) - 1, 0, self.num_steps - 1)
        # On the chord between two entries: (1 - w) sigma_0 + w sigma_1 = ratio ((1 - w) alpha_0 + w alpha_1).
        excess, missing = ratio * alpha[low] - sigma[low], sigma[low + 1] - ratio * alpha[low + 1]
        return namespace.clip(self.t_clean + low + excess / (excess + missing), self.t_clean, self.t_max)

    def time_at(self, fraction: Array) -> Array:
        namespace, fraction = _floating(fraction)
        return namespace.clip(namespace.floor(fraction * self.num_steps), 0, self.num_steps - 1)

    def fraction_of(self, t: Array) -> Array:
        return (_floating(t)[1] + 0.5) / self.num_steps

    def time_features(self, t: Array) -> Array:
        return _floating(t)[1]

    def _chord(self, t: Array) -> tuple[Array, Array, ModuleType]:
        """alpha and sigma interpolated linearly between the table's entries, and the namespace of t."""
        namespace, t = _floating(t)
        position = namespace.clip(t - self.t_clean, 0, self.num_steps)
        low = namespace.clip(namespace.floor(position), 0, self.num_steps - 1).astype(np.int32)
        weight = position - low.astype(t.dtype)
        alpha, sigma = (namespace.asarray(table, t.dtype) for table in _tables(self))
        return (
            (1 - weight) * alpha[low] + weight * alpha[low + 1],
            (1 - weight) * sigma[low] + weight * sigma[low + 1],
            namespace,
        )


@functools.lru_cache(maxsize=32)
def _tables(process: DiscreteProcess) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma at t = -1..T-1, float64 [T + 1]."""
    betas = schedules.make_betas(process.schedule, process.num_steps, process.start, process.end, process.betas)
    if process.zero_terminal_snr:
        betas = schedules.rescale_zero_terminal_snr(betas)
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


@dataclass(frozen=True)
class FlowProcess(_UnitTime):
    """Rectified flow: x_t = (1 - t) x_0 + t eps, t in [0, 1] (Liu et al., arXiv 2209.03003).

    Attributes:
      shift: resolution shift s > 0 of the times that are trained and sampled, t = s u / (1 + (s - 1) u) for uniform u;
        s > 1 spends more of them near noise (Esser et al., arXiv 2403.03206, eq. 23). It does not change alpha or sigma.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "the flow process")
        if not self.shift > 0:
            raise ValueError(f"shift of the flow process must be positive, got {self.shift}")

    def alpha(self, t: Array) -> Array:
        return 1 - _floating(t)[1]

    def sigma(self, t: Array) -> Array:
        return _floating(t)[1]

    def turning(self, t: Array) -> Array:
        """2 dt/du."""
        return 2 * (self.shift - (self.shift - 1) * _floating(t)[1]) ** 2 / self.shift

    def time_of_ratio(self, ratio: Array) -> Array:
        _, ratio = _floating(ratio)
        return ratio / (1 + ratio)

    def time_at(self, fraction: Array) -> Array:
        _, fraction = _floating(fraction)
        return self.shift * fraction / (1 + (self.shift - 1) * fraction)

    def fraction_of(self, t: Array) -> Array:
        _, t = _floating(t)
        return t / (self.shift - (self.shift - 1) * t)


@dataclass(frozen=True)
class CosineProcess(_UnitTime):
    """Variance-preserving in continuous time: alpha = cos(a), sigma = sin(a), t in [0, 1], tan(a) = tan(pi t/2)/shift.

    With shift 1 it is the cosine schedule of arXiv 2102.09672 without its offset. `shift` < 1 adds 2 log(shift) to log-SNR, more noise for
    larger pictures (Hoogeboom et al., arXiv 2301.11093, section 3.1: 64/resolution).
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "the cosine process")
        if not self.shift > 0:
            raise ValueError(f"shift of the cosine process must be positive, got {self.shift}")

    def alpha(self, t: Array) -> Array:
        return self._both(t)[0]

    def sigma(self, t: Array) -> Array:
        return self._both(t)[1]

    def turning(self, t: Array) -> Array:
        """Of log-SNR 2 log(shift/tan(pi t/2)), whose fall is 2 pi/sin(pi t)."""
        namespace, t = _floating(t)
        alpha, sigma = namespace.cos(t * (np.pi / 2)), namespace.sin(t * (np.pi / 2))
        return np.pi * self.shift / ((self.shift * alpha) ** 2 + sigma**2)

    def time_of_ratio(self, ratio: Array) -> Array:
        namespace, ratio = _floating(ratio)
        return namespace.arctan(self.shift * ratio) * (2 / np.pi)

    def time_at(self, fraction: Array) -> Array:
        return _floating(fraction)[1]

    def fraction_of(self, t: Array) -> Array:
        return _floating(t)[1]

    def _both(self, t: Array) -> tuple[Array, Array]:
        namespace, t = _floating(t)
        # Exactly no signal at the noisiest time, which the cosine of a rounded pi/2 is not.
        alpha = namespace.where(t >= 1, 0.0, self.shift * namespace.cos(t * (np.pi / 2)))
        sigma = namespace.sin(t * (np.pi / 2))
        length = namespace.hypot(alpha, sigma)
        return alpha / length, sigma / length


@dataclass(frozen=True)
class SigmaProcess(_Continuous):
    """Variance-exploding: x_t = x_0 + t eps, where the time is sigma itself (Karras et al., arXiv 2206.00364).

    Attributes:
      sigma_min, sigma_max: the least and the most noise that networks are asked for.
      rho: training times and grids are uniform in sigma^(1/rho); 0 stands for log sigma, the variance-exploding SDE of arXiv 2011.13456.
      sigma_data: standard deviation of the data, for what the network is fed: 1 for scaled latents.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        check_finite(self, "the process of sigmas")
        if not 0 < self.sigma_min < self.sigma_max or self.rho < 0 or not self.sigma_data > 0:
            raise ValueError(
                f"a process of sigmas needs 0 < sigma_min < sigma_max, rho >= 0 and sigma_data > 0, got {self.sigma_min}, {self.sigma_max},"
                f" {self.rho} and {self.sigma_data}"
            )

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t: Array) -> Array:
        namespace, t = _floating(t)
        return namespace.ones_like(t)

    def sigma(self, t: Array) -> Array:
        return _floating(t)[1]

    def turning(self, t: Array) -> Array:
        """2 dt/du."""
        _, t = _floating(t)
        if self.rho == 0:
            return 2 * t * np.log(self.sigma_max / self.sigma_min)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return 2 * self.rho * (high - low) * t ** (1 - 1 / self.rho)

    def time_of_ratio(self, ratio: Array) -> Array:
        return _floating(ratio)[1]

    def time_at(self, fraction: Array) -> Array:
        namespace, fraction = _floating(fraction)
        if self.rho == 0:
            t = self.sigma_min * namespace.exp(fraction * np.log(self.sigma_max / self.sigma_min))
        else:
            low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
            t = (low + fraction * (high - low)) ** self.rho
        return namespace.clip(t, self.sigma_min, self.sigma_max)  # rounding

    def fraction_of(self, t: Array) -> Array:
        namespace, t = _floating(t)
        if self.rho == 0:
            return namespace.log(t / self.sigma_min) / np.log(self.sigma_max / self.sigma_min)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (t ** (1 / self.rho) - low) / (high - low)

    def time_features(self, t: Array) -> Array:
        """1000 times the fraction of the way in log sigma."""
        namespace, t = _floating(t)
        return 1000 * namespace.log(t / self.sigma_min) / np.log(self.sigma_max / self.sigma_min)

    def input_scale(self, t: Array) -> Array:
        namespace, t = _floating(t)
        return 1 / namespace.hypot(t, self.sigma_data * namespace.ones_like(t))


PROCESSES: dict[str, type[DiscreteProcess] | type[FlowProcess] | type[CosineProcess] | type[SigmaProcess]] = {
    "discrete": DiscreteProcess,
    "flow": FlowProcess,
    "cosine": CosineProcess,
    "sigma": SigmaProcess,
}


def make_process(kind: str, **settings: Any) -> Process:
    """The process `kind`, a key of `PROCESSES`, with its dataclass's fields as settings.

    Raises: ValueError for an unknown kind, an unknown setting or a value out of range.
    """
    process = schedules.lookup("process", PROCESSES, kind)
    known = [field.name for field in fields(process)]
    for name in settings:
        if name not in known:
            raise ValueError(f"process {kind!r} has no setting {name!r}: it has {', '.join(known)}")
    return process(**settings)
