"""Guidance: one prediction out of two, the wanted condition's and another that it is moved away from.

The two are those of a condition and of none, in one doubled batch (classifier-free guidance, Ho & Salimans, arXiv 2207.12598), or those
of a good and a weak model (autoguidance, Karras et al., arXiv 2406.02507). Every prediction is affine in x_0 at fixed x_t with the same
coefficients for both, so guiding eps, x0, v or flow is the same thing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion.checks import check_finite
from ldm_jax.diffusion.grid import Grid
from ldm_jax.diffusion.prediction import coefficients, solve
from ldm_jax.diffusion.process import Process, expand
from ldm_jax.diffusion.samplers import Denoise, Remembering, SamplerSettings, sampling_grid, table_of
from ldm_jax.diffusion.schedules import lookup
from ldm_jax.diffusion.solvers import ancestral_noise

Conditioning = Any  # a pytree of arrays [B, ...], usually a dict
ConditionalDenoise = Callable[[jax.Array, jax.Array, Conditioning], jax.Array]
Scale = float | int | jax.Array
Pair = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]  # (x_t, t) -> (wanted, other)


@dataclass(frozen=True)
class Guidance:
    """How two predictions become one.

    Attributes:
      kind: 'cfg', other + scale (wanted - other); 'cfg++' (Chung et al., arXiv 2406.08070), which renoises with the other's eps, for
        'ddim' and scales in [0, 1]; 'apg' (Sadat et al., arXiv 2410.02416, algorithm 1), 'cfg' in x_0 without the part of the
        difference that only raises saturation.
      interval: levels of sigma/alpha, above the first and up to the second, at which there is guidance at all; elsewhere the wanted
        prediction is taken alone and costs half (Kynkäänniemi et al., arXiv 2404.07724).
      rescale: 0 to 1, how far the result is brought back to the standard deviation of the wanted one (arXiv 2305.08891, eq. 15 and 16).
      parallel: of 'apg', the share (its eta) of the difference along the wanted x_0 that is kept.
      radius: of 'apg', the largest norm of the difference; 0 is no bound.
      momentum: of 'apg', the factor of the differences before, between -1 and 1, usually negative.

    Raises ValueError at construction for settings that make no sense or have no effect.
    """

    kind: str = "cfg"
    interval: tuple[float, float] = (0.0, math.inf)
    rescale: float = 0.0
    parallel: float = 1.0
    radius: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        lookup("guidance", {kind: kind for kind in ("cfg", "cfg++", "apg")}, self.kind)
        check_finite(self, "the guidance")
        if not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(f"the guidance interval must be 0 <= low < high in units of sigma/alpha, got {self.interval}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale must be in [0, 1], got {self.rescale}")
        if self.kind != "apg" and (self.parallel, self.radius, self.momentum) != (1.0, 0.0, 0.0):
            raise ValueError(f"parallel, radius and momentum are of guidance 'apg', not of {self.kind!r}")
        if self.kind == "cfg++" and self.rescale:
            raise ValueError("guidance 'cfg++' has no rescale, which would change the noise that it leaves unguided: take 'cfg' or 'apg'")
        if self.radius < 0 or not -1 < self.momentum < 1:
            raise ValueError(f"radius of 'apg' must be 0 or more, and momentum between -1 and 1, got {self.radius} and {self.momentum}")

    @property
    def everywhere(self) -> bool:
        return self.interval == (0.0, math.inf)


def guided(
    denoise: ConditionalDenoise,
    cond: Conditioning,
    null: Conditioning,
    scale: Scale,
    settings: Guidance = Guidance(),
    process: Process | None = None,
    prediction: str = "eps",
    grid: Grid | None = None,
    eta: float = 0.0,
) -> Denoise | Remembering:
    """Classifier-free guidance of a network, both halves in one doubled batch.

    Args:
      denoise: (x_t [B, ...], t [B], cond) -> prediction [B, ...].
      cond: the conditioning, arrays [B, ...].
      null: the unconditional or the negative prompt's conditioning, of the same structure and shapes.
      scale: 1 is the conditional model, 0 the unconditional one, more is stronger guidance. A Python number, a scalar
        or one per image [B]. The Python numbers 1 and 0 run a batch that is not doubled.
      settings, process, prediction: static; the process is needed for an interval and for 'apg'.
      grid, eta: of the sampler, for 'cfg++'.

    Returns: (x_t [B, ...], t [B] or scalar) -> [B, ...] in promote_types(prediction dtype, float32), or one that remembers.
    Raises: ValueError where cond and null differ in structure or shapes, scale is neither a scalar nor [B], or the settings need more.
    """
    _check_alike(cond, null)
    if isinstance(scale, float | int) and scale in (0, 1) and settings.kind != "cfg++":
        only = cond if scale == 1 else null
        return lambda x, t: _at_least_float32(denoise(x, t, only))
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)

    def pair(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        conditional, unconditional = jnp.split(denoise(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both), 2)
        return conditional, unconditional

    return _combined(pair, lambda x, t: denoise(x, t, cond), scale, settings, process, prediction, grid, eta)


def autoguided(
    denoise: Denoise,
    weak: Denoise,
    scale: Scale,
    settings: Guidance = Guidance(),
    process: Process | None = None,
    prediction: str = "eps",
) -> Denoise | Remembering:
    """Guidance of a model by a weaker one under the same condition (arXiv 2406.02507, eq. 1): weak + scale (good - weak)."""
    return _combined(lambda x, t: (denoise(x, t), weak(x, t)), denoise, scale, settings, process, prediction, None, 0.0)


def classifier_guided(
    denoise: Denoise, log_prob: Callable[[jax.Array, jax.Array], jax.Array], scale: Scale, process: Process, prediction: str = "eps"
) -> Denoise:
    """A prediction moved by a classifier's score (Dhariwal & Nichol, arXiv 2105.05233, eq. 14): eps - scale sigma grad log p(y | x_t).

    Args:
      log_prob: (x_t [B, ...], t [B]) -> log p(y | x_t) [B] of the wanted classes; differentiated with respect to x_t.

    Without signal (alpha = 0) x_t says nothing of the class, and the prediction stays as it is.
    """

    def denoise_guided(x: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.broadcast_to(t, x.shape[:1])
        score = jax.grad(lambda x: log_prob(x, t).sum())(x)
        alpha, sigma = process.alpha(t), process.sigma(t)
        c, d = coefficients(prediction, alpha, sigma, process.sigma_data)
        # At fixed x_t a change of eps by e is one of x_0 by -sigma e/alpha, so of the prediction by (d - c sigma/alpha) e.
        gain = jnp.where(alpha == 0, 0.0, -sigma * (d - c * sigma / jnp.where(alpha == 0, 1.0, alpha)))
        pred = _at_least_float32(denoise(x, t))
        return pred + (expand(jnp.asarray(scale), x) * expand(gain, x) * score).astype(pred.dtype)

    return denoise_guided


def plus_plus_scale(grid: Grid, scale: Scale, eta: float = 0.0) -> Callable[[jax.Array], jax.Array]:
    """CFG++ as classifier-free guidance whose scale depends on time.

    x' = alpha' x_0(scale) + d eps(0) + s z, with the guided x_0 and the unguided eps, is DDIM's step with eps at the scale
    scale alpha' sigma/(alpha' sigma - alpha d), because x_t ties x_0 to eps. Between the times of the grid it is interpolated.
    """
    d = np.sqrt(np.maximum(grid.sigma[1:] ** 2 - ancestral_noise(grid, eta) ** 2, 0))
    reach = grid.alpha[1:] * grid.sigma[:-1]
    factor = reach / (reach - grid.alpha[:-1] * d)
    return lambda t: scale * jnp.interp(t, grid.t[:-1][::-1], factor[::-1])


def _combined(
    pair: Pair,
    alone: Denoise,
    scale: Scale,
    settings: Guidance,
    process: Process | None,
    prediction: str,
    grid: Grid | None,
    eta: float,
) -> Denoise | Remembering:
    if process is None and (settings.kind == "apg" or not settings.everywhere):
        raise ValueError(f"guidance {settings.kind!r} with interval {settings.interval} needs the process")
    if settings.kind == "cfg++" and grid is None:
        raise ValueError("guidance 'cfg++' needs the grid of the sampler")
    scale_at = plus_plus_scale(grid, scale, eta) if settings.kind == "cfg++" and grid is not None else lambda t: jnp.asarray(scale)

    def guide(x: jax.Array, t: jax.Array, memory: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        wanted, other = (_at_least_float32(pred) for pred in pair(x, t))
        weight = scale_at(t)
        if weight.shape not in ((), x.shape[:1]):
            raise ValueError(f"guidance scale has shape {weight.shape}: give a scalar or one per image [{x.shape[0]}]")
        weight = expand(weight, x).astype(wanted.dtype)
        if settings.kind == "apg" and process is not None:
            result, memory = _projected(settings, process, prediction, x, t, wanted, other, weight, memory)
        else:
            result = other + weight * (wanted - other)
        return _rescaled(result, wanted, settings.rescale), memory

    def within(x: jax.Array, t: jax.Array, memory: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        t = jnp.broadcast_to(t, x.shape[:1])
        if settings.everywhere or process is None:
            return guide(x, t, memory)
        inside = _inside(process, t[0], settings.interval)
        return jax.lax.cond(inside, guide, lambda x, t, memory: (_at_least_float32(alone(x, t)), memory), x, t, memory)

    if settings.momentum:
        return Remembering(within, jnp.zeros_like)
    return lambda x, t: within(x, t, None)[0]


def _projected(
    settings: Guidance,
    process: Process,
    prediction: str,
    x: jax.Array,
    t: jax.Array,
    wanted: jax.Array,
    other: jax.Array,
    weight: jax.Array,
    memory: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Adaptive projected guidance: (prediction, running sum of differences)."""
    alpha, sigma, data = process.alpha(t), process.sigma(t), process.sigma_data
    x0, other_x0 = (solve(prediction, alpha, sigma, pred, x, data)[0] for pred in (wanted, other))
    change = x0 - other_x0
    if memory is not None:
        change = memory = change + settings.momentum * memory
    if settings.radius:
        change = change * jnp.minimum(1.0, settings.radius / jnp.maximum(_norm(change), 1e-12))
    along = x0 / jnp.maximum(_norm(x0), 1e-12)
    parallel = (change * along).sum(axis=tuple(range(1, x.ndim)), keepdims=True) * along
    x0 = x0 + (weight - 1) * (change - parallel + settings.parallel * parallel)
    c, d = coefficients(prediction, alpha, sigma, data)
    return expand(c, x) * x0 + expand(d, x) * (x - expand(alpha, x) * x0) / expand(sigma, x), memory


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt((x**2).sum(axis=tuple(range(1, x.ndim)), keepdims=True))


def _rescaled(result: jax.Array, wanted: jax.Array, share: float) -> jax.Array:
    if not share:
        return result
    axes = tuple(range(1, result.ndim))
    factor = wanted.std(axis=axes, keepdims=True) / jnp.maximum(result.std(axis=axes, keepdims=True), 1e-12)
    return result * (share * factor + 1 - share)


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _inside(process: Process, t: jax.Array, interval: tuple[float, float]) -> jax.Array:
    """Whether sigma/alpha at times t lies above the interval's first number and up to the second, shaped as t."""
    low, high = interval
    alpha, sigma = process.alpha(t), process.sigma(t)
    return (sigma > low * alpha) & ((sigma <= high * alpha) | (high == math.inf))


def evaluations(process: Process, settings: SamplerSettings, interval: tuple[float, float] | None = None) -> int:
    """How often the network is evaluated for one sample from noise: twice at levels within an interval of guidance; None is no guidance."""
    t = table_of(process, sampling_grid(process, settings), settings).level.t
    # In the precision of the loop, in which a level may fall on either side of an end of the interval.
    return len(t) + (0 if interval is None else int(_inside(process, jnp.asarray(t, jnp.float32), interval).sum()))


def _check_alike(cond: Conditioning, null: Conditioning) -> None:
    structures: tuple[Any, Any] = jax.tree.structure(cond), jax.tree.structure(null)
    if structures[0] != structures[1]:
        raise ValueError(f"guidance needs cond and null of one structure, got {structures[0]} and {structures[1]}")
    for (path, a), b in zip(jax.tree.leaves_with_path(cond), jax.tree.leaves(null), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(f"guidance: cond{jax.tree_util.keystr(path)} has shape {jnp.shape(a)}, null {jnp.shape(b)}")
