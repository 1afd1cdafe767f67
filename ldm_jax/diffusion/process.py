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

    def time_features(self, t: Array) -> Array:
        """What the network's sinusoidal embedding is fed: about 0..1000 whatever the process."""


def expand(coefficient: Array, x: jax.Array) -> jax.Array:
    """A coefficient that is a scalar or one per example [B], shaped to broadcast over x [B, ...]."""
    coefficient = jnp.asarray(coefficient)
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim)) if coefficient.ndim else coefficient


def _floating(t: Array) -> tuple[ModuleType, Array]:
    """The namespace (numpy or jax.numpy) that t belongs to, and t as floating point of at least 32 bits."""
    if isinstance(t, jax.Array):
        return jnp, t.astype(jnp.promote_types(t.dtype, jnp.float32))
    return np, np.asarray(t, np.float64)


def _log_snr(process: Process, t: Array) -> Array:
    namespace, t = _floating(t)
    with np.errstate(divide="ignore"):
        return 2 * (namespace.log(process.alpha(t)) - namespace.log(process.sigma(t)))


@dataclass(frozen=True)
class DiscreteProcess:
    """The variance-preserving process of the paper: T noise levels, alpha^2 + sigma^2 = 1.

    t runs over 0..T-1 as float, and t = -1 is clean data (alpha 1, sigma 0). Between integers, (alpha, sigma) moves along
    the chord of the two neighbours, projected on the unit circle; outside [-1, T-1] t is clipped.

    Attributes:
      schedule: a key of `schedules.SCHEDULES`.
      start, end: the first and last beta; None is the schedule's default.
      num_steps: T.
      zero_terminal_snr: rescale so that alpha(T-1) = 0 (arXiv 2305.08891).

    Raises ValueError at construction for settings that make no schedule.
    """

    schedule: str = "linear"
    start: float | None = None
    end: float | None = None
    num_steps: int = 1000
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        schedules.make_betas(self.schedule, self.num_steps, self.start, self.end)

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

    def log_snr(self, t: Array) -> Array:
        return _log_snr(self, t)

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
    betas = schedules.make_betas(process.schedule, process.num_steps, process.start, process.end)
    if process.zero_terminal_snr:
        betas = schedules.rescale_zero_terminal_snr(betas)
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - betas)])
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


@dataclass(frozen=True)
class FlowProcess:
    """Rectified flow: x_t = (1 - t) x_0 + t eps, t in [0, 1] (Liu et al., arXiv 2209.03003).

    Attributes:
      shift: resolution shift s > 0 of the times that are trained and sampled, t = s u / (1 + (s - 1) u) for uniform u;
        s > 1 spends more of them near noise (Esser et al., arXiv 2403.03206, eq. 23). It does not change alpha or sigma.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift of the flow process must be positive, got {self.shift}")

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def t_clean(self) -> float:
        return 0.0

    @property
    def num_times(self) -> None:
        return None

    def alpha(self, t: Array) -> Array:
        return 1 - _floating(t)[1]

    def sigma(self, t: Array) -> Array:
        return _floating(t)[1]

    def log_snr(self, t: Array) -> Array:
        return _log_snr(self, t)

    def time_at(self, fraction: Array) -> Array:
        _, fraction = _floating(fraction)
        return self.shift * fraction / (1 + (self.shift - 1) * fraction)

    def fraction_of(self, t: Array) -> Array:
        _, t = _floating(t)
        return t / (self.shift - (self.shift - 1) * t)

    def time_features(self, t: Array) -> Array:
        return 1000 * _floating(t)[1]


PROCESSES: dict[str, type[DiscreteProcess] | type[FlowProcess]] = {"discrete": DiscreteProcess, "flow": FlowProcess}


def make_process(kind: str, **settings: Any) -> Process:
    """The process `kind` ('discrete' or 'flow') with its dataclass's fields as settings.

    Raises: ValueError for an unknown kind, an unknown setting or a value out of range.
    """
    process = schedules.lookup("process", PROCESSES, kind)
    known = [field.name for field in fields(process)]
    for name in settings:
        if name not in known:
            raise ValueError(f"process {kind!r} has no setting {name!r}: it has {', '.join(known)}")
    return process(**settings)
