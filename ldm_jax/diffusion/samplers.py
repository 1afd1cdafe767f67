"""Samplers: noise to x_0 down a grid of noise levels, one `lax.scan` that works inside `jax.jit`.

What a solver does is a table of numbers (`solvers`), which levels it visits is a grid (`grid`); this is the loop over both.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from ldm_jax.diffusion.checks import check_finite
from ldm_jax.diffusion.grid import SPACINGS, Grid, Level, make_grid
from ldm_jax.diffusion.prediction import determinant, solve
from ldm_jax.diffusion.process import Process, expand
from ldm_jax.diffusion.schedules import lookup
from ldm_jax.diffusion.solvers import SOLVERS, Options, Row, Table, compiled

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


class Remembering(NamedTuple):
    """A denoiser that remembers: (x_t, t, memory) -> (prediction, memory), first with `initial(x_t)`."""

    denoise: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
    initial: Callable[[jax.Array], Any]


@dataclass(frozen=True)
class SamplerSettings:
    """How to sample.

    Attributes:
      kind: a key of `solvers.SOLVERS`: 'ddim', 'ddpm', 'euler', 'euler_ancestral', 'heun', 'flow_heun', 'plms', 'lms', 'dpmpp_2m',
        'dpmpp_2m_sde', 'dpmpp_3m', 'unipc'.
      steps: number of steps, at least 1, honoured exactly.
      eta: for 'ddim', 0 (deterministic) to 1 (ancestral).
      spacing: a key of `grid.SPACINGS`: 'leading', 'trailing', 'linspace', 'karras', 'exponential', 'legacy_ldm'.
      strength: where sampling starts from data, the share of the steps that are run, in (0, 1], rounded up to whole steps.
      churn, churn_interval, churn_noise: for 'heun', see `solvers.Options`.
      threshold: 'none'; 'static', x_0 is clipped to +-`threshold_max`; 'dynamic' (arXiv 2205.11487, section 2.3), x_0 is clipped to its
        own `threshold_quantile` where that is larger than `threshold_max`, and scaled back to it. For pixels; latents have no bounds.

    Raises ValueError at construction for unknown names and combinations that make no sense.
    """

    kind: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    spacing: str = "trailing"
    strength: float = 1.0
    churn: float = 0.0
    churn_interval: tuple[float, float] = (0.0, math.inf)
    churn_noise: float = 1.0
    threshold: str = "none"
    threshold_max: float = 1.0
    threshold_quantile: float = 0.995

    def __post_init__(self) -> None:
        solver = lookup("sampler", SOLVERS, self.kind)
        lookup("spacing", SPACINGS, self.spacing)
        lookup("threshold", THRESHOLDS, self.threshold)
        check_finite(self, "the sampler")
        if self.steps < 1:
            raise ValueError(f"a sampler needs at least 1 step, got steps={self.steps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}: above 1 there is more noise than the next time holds")
        if self.eta and solver.eta is not None:
            raise ValueError(f"sampler {self.kind!r} has no eta (its noise is fixed at eta={solver.eta:g}): use 'ddim'")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {self.strength}")
        if self.churn < 0 or self.churn_noise < 0 or not 0 <= self.churn_interval[0] < self.churn_interval[1]:
            raise ValueError("churn and its noise must not be negative, and the churn interval 0 <= low < high in units of sigma/alpha")
        if self.churn and not solver.churns:
            raise ValueError(f"sampler {self.kind!r} has no churn: use 'heun'")
        if not self.churn and (self.churn_interval, self.churn_noise) != ((0.0, math.inf), 1.0):
            raise ValueError("churn_interval and churn_noise have no effect with a churn of 0")
        if not self.threshold_max > 0 or not 0 < self.threshold_quantile <= 1:
            raise ValueError("threshold_max must be positive and threshold_quantile in (0, 1]")
        if self.threshold_quantile != 0.995 and self.threshold != "dynamic":
            raise ValueError("threshold_quantile is of threshold 'dynamic' and has no effect with another")
        if self.threshold_max != 1 and self.threshold == "none":
            raise ValueError("threshold_max has no effect without a threshold: 'static' or 'dynamic'")


def _static(x0: jax.Array, settings: SamplerSettings) -> jax.Array:
    return jnp.clip(x0, -settings.threshold_max, settings.threshold_max)


def _dynamic(x0: jax.Array, settings: SamplerSettings) -> jax.Array:
    size = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), settings.threshold_quantile, axis=1)
    size = expand(jnp.maximum(size, settings.threshold_max), x0)
    return jnp.clip(x0, -size, size) * (settings.threshold_max / size)


THRESHOLDS: dict[str, Callable[[jax.Array, SamplerSettings], jax.Array] | None] = {"none": None, "static": _static, "dynamic": _dynamic}


class Known(NamedTuple):
    """What a sample must agree with outside a hole: data x_0 [B, ...] and the hole, 1 or 0, broadcastable to it."""

    x0: jax.Array
    hole: jax.Array


class Trajectory(NamedTuple):
    """A sample [B, ...] and the states on the way to it, [recorded, B, ...]."""

    x0: jax.Array
    states: jax.Array


def sampling_grid(process: Process, settings: SamplerSettings, from_data: bool = False) -> Grid:
    """The grid that is sampled on: from data, the last steps of it, `settings.strength` of all and at least one. Raises as `make_grid`."""
    grid = make_grid(process, settings.spacing, settings.steps)
    run = math.ceil(settings.strength * settings.steps - 1e-9)  # 0.1 of 30 is 3, though not in floating point
    return grid.after(settings.steps - run) if from_data else grid


def table_of(process: Process, grid: Grid, settings: SamplerSettings) -> Table:
    """What `trajectory` goes through on a grid."""
    options = Options(SOLVERS[settings.kind].eta or settings.eta, settings.churn, settings.churn_interval, settings.churn_noise)
    with np.errstate(divide="ignore", invalid="ignore"):  # what is not finite is found later
        return SOLVERS[settings.kind].table(process, grid, options)


def start_scale(process: Process, level: Level) -> float:
    """The standard deviation of x_t at the first level, for data of the process's own."""
    return float(np.hypot(level.alpha * process.sigma_data, level.sigma))


def sample(
    denoise: Denoise | Remembering,
    process: Process,
    prediction: str,
    settings: SamplerSettings,
    noise: jax.Array,
    keys: jax.Array | None = None,
    init: jax.Array | None = None,
    known: Known | None = None,
) -> jax.Array:
    """x_0 from noise, as `trajectory`."""
    return trajectory(denoise, process, prediction, settings, noise, keys, init, known).x0


def trajectory(
    denoise: Denoise | Remembering,
    process: Process,
    prediction: str,
    settings: SamplerSettings,
    noise: jax.Array,
    keys: jax.Array | None = None,
    init: jax.Array | None = None,
    known: Known | None = None,
    record_every: int = 0,
) -> Trajectory:
    """x_0 from noise, with the states after every `record_every` steps.

    Args:
      denoise: (x_t [B, ...], t float [B] in the process's units) -> prediction [B, ...]; traced once.
      process, settings, record_every: static.
      prediction: what denoise returns, a key of `PREDICTIONS`.
      noise: [B, ...], standard normal.
      keys: typed PRNG keys [B], one per image, needed where noise is added on the way; row k of image i's table adds
        normal(fold_in(keys[i], k)), so an image does not depend on the batch it is drawn in.
      init: data x_0 [B, ...] to start from, noised to the level at which `settings.strength` of the steps are left (arXiv 2108.01073).
      known: data to keep outside a hole: before each evaluation the state there is replaced by the data at that level (arXiv 2201.09865,
        eq. 8), at the end by the data.

    Returns x_0 [B, ...] and states [steps run // record_every, B, ...], in promote_types(noise.dtype, float32).
    Raises: ValueError for settings that do not go with the process or prediction, or keys that are missing.
    """
    if init is None and settings.strength != 1:
        raise ValueError(f"strength={settings.strength:g} without data to start from: give the data, or leave strength at 1")
    table = table_of(process, sampling_grid(process, settings, init is not None), settings)
    _check_determined(process, prediction, settings, table)
    dtype = jnp.promote_types(noise.dtype, jnp.float32)
    if not np.any(table.noise > 0) and known is None:
        keys = None
    elif keys is None or keys.shape != noise.shape[:1]:
        raise ValueError(f"sampler {settings.kind!r} adds noise: give keys, one per image [{noise.shape[0]}]")
    first = Level(*(values[0] for values in table.level))
    scale = float(first.sigma) if init is not None else start_scale(process, first)
    x = scale * noise.astype(dtype) + (0.0 if init is None else float(first.alpha) * init.astype(dtype))
    answer = _answers(denoise, process, prediction, settings, table.basis)
    return integrate(answer, table, x, keys, known, record_every)


def _check_determined(process: Process, prediction: str, settings: SamplerSettings, table: Table) -> None:
    level = table.level
    with np.errstate(divide="ignore", invalid="ignore"):
        singular = level.t[determinant(prediction, level.alpha, level.sigma, process.sigma_data) == 0]
    if singular.size:
        raise ValueError(
            f"prediction {prediction!r} does not determine x_0 at t={singular[0]:g}, which spacing {settings.spacing!r} visits:"
            " train with 'v', 'x0' or 'flow', or choose a spacing that starts later"
        )
    if not all(np.all(np.isfinite(values)) for values in (table.x, table.noise)):
        raise ValueError(f"sampler {settings.kind!r} needs some signal at the first time: use 'ddim', 'flow_heun', 'dpmpp_2m' or 'unipc'")


Answer = Callable[[jax.Array, Level, Any], tuple[jax.Array, Any]]  # (x_t, level, memory) -> (x_0 or eps, memory)


def _answers(
    denoise: Denoise | Remembering, process: Process, prediction: str, settings: SamplerSettings, basis: str
) -> tuple[Answer, Callable[[jax.Array], Any]]:
    """The network's answers in a table's basis, and its first memory."""
    remembering = denoise if isinstance(denoise, Remembering) else Remembering(lambda x, t, memory: (denoise(x, t), memory), lambda x: ())
    threshold = THRESHOLDS[settings.threshold]

    def answer(x: jax.Array, level: Level, memory: Any) -> tuple[jax.Array, Any]:
        pred, memory = remembering.denoise(x, jnp.broadcast_to(level.t, x.shape[:1]), memory)
        x0, eps = solve(prediction, level.alpha, level.sigma, pred, x, process.sigma_data)
        if threshold is not None:
            x0 = threshold(x0, settings)
            eps = (x - level.alpha * x0) / level.sigma
        return (x0 if basis == "x0" else eps), memory

    return answer, remembering.initial


class _Carry(NamedTuple):
    """What the loop hands on: the state, a solver's base, its older answers, the guidance's memory and the recorded states."""

    x: jax.Array
    base: jax.Array | None
    older: tuple[jax.Array, ...]
    memory: Any
    states: jax.Array


def integrate(
    answers: tuple[Answer, Callable[[jax.Array], Any]],
    table: Table,
    x: jax.Array,
    keys: jax.Array | None,
    known: Known | None,
    record_every: int,
) -> Trajectory:
    """The loop over a table's rows, from the state x [B, ...] at its first level."""
    answer, initial = answers
    dtype = x.dtype
    slots = _slots(table, record_every)
    recorded = int(slots.max(initial=-1)) + 1
    slots = np.where(slots < 0, recorded, slots)  # beyond the end: dropped

    def body(carry: _Carry, row: Any) -> tuple[_Carry, None]:
        level, x_weights, base_weights, noise, number, slot = row
        x = carry.x
        if known is not None:
            fresh = _normal(jax.vmap(lambda key: jax.random.fold_in(key, _OF_KNOWN))(keys), number, x.shape[1:], dtype)
            x = jnp.where(known.hole > 0, x, (level.alpha * known.x0 + level.sigma * fresh).astype(dtype))
        m, memory = answer(x, level, carry.memory)
        answered = (m.astype(dtype), *carry.older)
        seen = (x, carry.base, *answered)
        following = _combined(x_weights, seen)
        if keys is not None and table.noise.any():
            following += noise * _normal(keys, number, x.shape[1:], dtype)
        base = None if carry.base is None else _combined(base_weights, seen)
        states = carry.states.at[slot].set(following, mode="drop") if recorded else carry.states
        return _Carry(following, base, answered[: table.history - 1], memory, states), None

    older = tuple(jnp.zeros_like(x) for _ in range(table.history - 1))
    start = _Carry(x, None if table.base is None else x, older, initial(x), jnp.zeros((recorded, *x.shape), dtype))
    rows = (table.level, table.x, table.x if table.base is None else table.base, table.noise, np.arange(len(slots), dtype=np.uint32), slots)
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype) if leaf.dtype == np.float64 else jnp.asarray(leaf), rows)
    end = jax.lax.scan(body, start, rows)[0]
    x0 = end.x if known is None else jnp.where(known.hole > 0, end.x, known.x0.astype(dtype))
    return Trajectory(x0, end.states)


def _slots(table: Table, record_every: int) -> np.ndarray:
    """Where the state after each row is kept, -1 for nowhere."""
    done = np.cumsum(table.done)
    keep = table.done & (record_every > 0) & (done % max(record_every, 1) == 0)
    return np.where(keep, done // max(record_every, 1) - 1, -1)


def _combined(weights: jax.Array, seen: tuple[jax.Array | None, ...]) -> jax.Array:
    return sum((weights[i] * value for i, value in enumerate(seen) if value is not None), start=jnp.zeros((), weights.dtype))


def invert(denoise: Denoise, process: Process, prediction: str, settings: SamplerSettings, x0: jax.Array) -> jax.Array:
    """The noise [B, ...] from which deterministic DDIM gives the data x0 [B, ...] (arXiv 2010.02502, section 4.3).

    Steps go the other way, each with the network's answer at the noisier end, since there is none for clean data; the error of coming
    back falls with the steps. Raises ValueError for another sampler than 'ddim' or 'euler' with eta 0, and where `prediction` does not
    determine the noise of clean data.
    """
    if settings.kind not in ("ddim", "euler") or settings.eta:
        raise ValueError("only sampler 'ddim' with eta 0 is inverted")
    grid = sampling_grid(process, settings)
    table = _inverse_table(grid)
    _check_determined(process, prediction, settings, table)
    dtype = jnp.promote_types(x0.dtype, jnp.float32)
    answers = _answers(denoise, process, prediction, settings, "eps")
    first = Level(grid.t[0], grid.alpha[0], grid.sigma[0])
    return integrate(answers, table, x0.astype(dtype), None, None, 0).x0 / start_scale(process, first)


def _inverse_table(grid: Grid) -> Table:
    rows: list[Row] = []
    for i in range(grid.steps, 0, -1):
        keep = grid.alpha[i - 1] / grid.alpha[i]
        level = Level(grid.t[i - 1], grid.alpha[i], grid.sigma[i])
        rows.append(Row(level, {"x": keep, len(rows): grid.sigma[i - 1] - keep * grid.sigma[i]}))
    return compiled("eps", rows)


def _normal(keys: jax.Array | None, number: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Standard normal [B, *shape] from fold_in(keys[i], number)."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape, dtype))(keys)


_INITIAL, _ON_THE_WAY = 0, 1
_OF_KNOWN = 2**31


def initial_noise(seed: int, image_indices: ArrayLike, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Standard normal [B, *shape]: row i is a function of (seed, image_indices[i]) only, whatever the batch and sampler."""
    root = jax.random.fold_in(jax.random.key(seed), _INITIAL)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(root, i), shape, dtype))(jnp.asarray(image_indices))


def image_keys(seed: int, image_indices: ArrayLike) -> jax.Array:
    """Typed PRNG keys [B] for the noise that `sample` adds on the way, independent of `initial_noise`."""
    root = jax.random.fold_in(jax.random.key(seed), _ON_THE_WAY)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.asarray(image_indices))
