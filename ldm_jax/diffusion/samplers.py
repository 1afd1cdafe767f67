"""Samplers: noise to x_0 by `steps` steps down a grid of times, one `lax.scan` that works inside `jax.jit`.

In the coordinates y = x/(alpha + sigma), u = sigma/(alpha + sigma), every process is the straight path
y = (1 - u) x_0 + u eps, and its probability-flow ODE is dy/du = eps - x_0 (with the network's x_0 and eps), finite at both ends.
One Euler step of it is x' = alpha' x_0 + sigma' eps, which is DDIM with eta = 0; on rectified flow, where alpha + sigma = 1,
it is the plain Euler step in t.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ldm_jax.diffusion.prediction import determinant, solve
from ldm_jax.diffusion.process import Array, Process
from ldm_jax.diffusion.schedules import lookup

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
Model = Callable[[jax.Array, "Level"], tuple[jax.Array, jax.Array]]  # (x_t, level) -> (x_0, eps)


@dataclass(frozen=True)
class SamplerSettings:
    """How to sample.

    Attributes:
      kind: 'ddim' (Song et al., arXiv 2010.02502); 'ddpm', ancestral sampling with the posterior's variance (arXiv 2006.11239,
        eq. 7; equal to 'ddim' with eta 1); 'euler' (equal to 'ddim' with eta 0); 'heun', second order, two network
        evaluations a step except for the last (arXiv 2206.00364, algorithm 1, in the coordinates of this module).
      steps: number of steps, at least 1, honoured exactly.
      eta: for 'ddim', 0 (deterministic) to 1 (ancestral).
      spacing: which times are visited (arXiv 2305.08891, table 2). 'leading' 0, T/n, 2T/n, ..., of discrete processes only;
        'trailing' ends at the noisiest time, best for few steps; 'linspace' visits both ends of a discrete process.
        On a continuous process 'trailing' and 'linspace' are both the uniform grid of fractions 1, 1 - 1/n, ..., 0.

    Raises ValueError at construction for unknown names and combinations that make no sense.
    """

    kind: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    spacing: str = "trailing"

    def __post_init__(self) -> None:
        sampler = lookup("sampler", SAMPLERS, self.kind)
        lookup("spacing", SPACINGS, self.spacing)
        if self.steps < 1:
            raise ValueError(f"a sampler needs at least 1 step, got steps={self.steps}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}: above 1 there is more noise than the next time holds")
        if self.eta and sampler.eta is not None:
            raise ValueError(f"sampler {self.kind!r} has no eta (its noise is fixed at eta={sampler.eta:g}): use 'ddim'")


def _leading(process: Process, steps: int) -> np.ndarray:
    if process.num_times is None:
        raise ValueError("spacing 'leading' never visits pure noise on a continuous process: use 'trailing'")
    return np.arange(steps)[::-1] * (process.num_times // steps)


def _trailing(process: Process, steps: int) -> np.ndarray:
    remaining = np.arange(steps, 0, -1)
    if process.num_times is None:
        return process.time_at(remaining / steps)
    return np.round(remaining * process.num_times / steps) - 1


def _linspace(process: Process, steps: int) -> np.ndarray:
    if process.num_times is None:
        return _trailing(process, steps)
    return np.round(np.linspace(process.t_max, process.t_min, steps))


SPACINGS: dict[str, Callable[[Process, int], np.ndarray]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
}


def timesteps(process: Process, settings: SamplerSettings) -> np.ndarray:
    """The grid of times, float64 [steps + 1] on the host, strictly descending; the last is `process.t_clean`.

    Raises: ValueError where the process has fewer times than steps, or does not go with the spacing.
    """
    if process.num_times is not None and settings.steps > process.num_times:
        raise ValueError(f"{settings.steps} sampling steps, but the process has only {process.num_times} times")
    return np.append(SPACINGS[settings.spacing](process, settings.steps).astype(np.float64), process.t_clean)


class Level(NamedTuple):
    """One time of the grid and the process there."""

    t: Array
    alpha: Array
    sigma: Array


class Step(NamedTuple):
    """One step of the grid, scalars; `noise_std` is what a stochastic sampler adds at the end of it."""

    number: Array
    now: Level
    next: Level
    noise_std: Array


def _steps(process: Process, settings: SamplerSettings) -> Step:
    """All steps stacked, float64 on the host, because 1 - alpha^2/alpha'^2 cancels in float32.

    The noise of DDIM (arXiv 2010.02502, eq. 16) for any process: eta sigma' sigma_step/sigma, where
    sigma_step^2 = sigma^2 - (alpha/alpha')^2 sigma'^2 is the variance of q(x | x').
    """
    times = timesteps(process, settings)
    alpha, sigma = process.alpha(times), process.sigma(times)
    now, following = (Level(times[part], alpha[part], sigma[part]) for part in (slice(None, -1), slice(1, None)))
    variance = now.sigma**2 - (now.alpha / following.alpha * following.sigma) ** 2
    fixed = SAMPLERS[settings.kind].eta
    eta = settings.eta if fixed is None else fixed
    noise_std = eta * following.sigma * np.sqrt(np.maximum(variance, 0)) / now.sigma
    return Step(np.arange(settings.steps, dtype=np.uint32), now, following, noise_std)


def _ddim(model: Model, x: jax.Array, step: Step, noise: jax.Array | None) -> jax.Array:
    """arXiv 2010.02502, eq. 12: the predicted x_0, the direction back to x', and fresh noise."""
    x0, eps = model(x, step.now)
    if noise is None:
        return step.next.alpha * x0 + step.next.sigma * eps
    direction = jnp.sqrt(jnp.maximum(step.next.sigma**2 - step.noise_std**2, 0))
    return step.next.alpha * x0 + direction * eps + step.noise_std * noise


def _heun(model: Model, x: jax.Array, step: Step, noise: jax.Array | None) -> jax.Array:
    """The trapezoidal rule in (y, u); the step to clean data, where no network is defined, stays an Euler step."""
    x0, eps = model(x, step.now)
    euler = step.next.alpha * x0 + step.next.sigma * eps
    scale = step.next.alpha + step.next.sigma
    span = step.next.sigma / scale - step.now.sigma / (step.now.alpha + step.now.sigma)

    def corrected() -> jax.Array:
        next_x0, next_eps = model(euler, step.next)
        return euler + 0.5 * scale * span * ((next_eps - next_x0) - (eps - x0))

    return jax.lax.cond(step.next.sigma == 0, lambda: euler, corrected)


class Sampler(NamedTuple):
    """`update(model, x, step, noise) -> x'`; `eta` is the sampler's own, None where it is the user's choice."""

    update: Callable[[Model, jax.Array, Step, jax.Array | None], jax.Array]
    eta: float | None


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(_ddim, None),
    "ddpm": Sampler(_ddim, 1.0),
    "euler": Sampler(_ddim, 0.0),
    "heun": Sampler(_heun, 0.0),
}


def sample(
    denoise: Denoise,
    process: Process,
    prediction: str,
    settings: SamplerSettings,
    noise: jax.Array,
    keys: jax.Array | None = None,
) -> jax.Array:
    """x_0 from noise.

    Args:
      denoise: (x_t [B, ...], t float [B] in the process's units) -> prediction [B, ...]; traced once a scan, twice for 'heun'.
      process, settings: static.
      prediction: what denoise returns, a key of `PREDICTIONS`.
      noise: [B, ...], standard normal.
      keys: typed PRNG keys [B], one per image, needed where noise is added on the way; step k of image i adds
        normal(fold_in(keys[i], k)), so an image does not depend on the batch it is drawn in.

    Returns: [B, ...] in promote_types(noise.dtype, float32).
    Raises: ValueError for settings that do not go with the process or prediction, or keys that are missing.
    """
    steps = _steps(process, settings)
    singular = steps.now.t[determinant(prediction, steps.now.alpha, steps.now.sigma) == 0]
    if singular.size:
        raise ValueError(
            f"prediction {prediction!r} does not determine x_0 at t={singular[0]:g}, which spacing {settings.spacing!r} visits:"
            " train with 'v', 'x0' or 'flow', or choose a spacing that starts later"
        )
    if not np.any(steps.noise_std > 0):
        keys = None
    elif keys is None or keys.shape != noise.shape[:1]:
        raise ValueError(f"sampler {settings.kind!r} adds noise: give keys, one per image [{noise.shape[0]}]")
    dtype = jnp.promote_types(noise.dtype, jnp.float32)

    def model(x: jax.Array, level: Level) -> tuple[jax.Array, jax.Array]:
        return solve(prediction, level.alpha, level.sigma, denoise(x, jnp.broadcast_to(level.t, x.shape[:1])), x)

    def body(x: jax.Array, step: Step) -> tuple[jax.Array, None]:
        fresh = None if keys is None else _normal(keys, step.number, x.shape[1:], dtype)
        return SAMPLERS[settings.kind].update(model, x, step, fresh).astype(dtype), None

    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype) if leaf.dtype == np.float64 else jnp.asarray(leaf), steps)
    return jax.lax.scan(body, noise.astype(dtype), cast)[0]


def _normal(keys: jax.Array, number: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Standard normal [B, *shape] from fold_in(keys[i], number)."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape, dtype))(keys)


_INITIAL, _ON_THE_WAY = 0, 1


def initial_noise(seed: int, image_indices: ArrayLike, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Standard normal [B, *shape]: row i is a function of (seed, image_indices[i]) only, whatever the batch and sampler."""
    root = jax.random.fold_in(jax.random.key(seed), _INITIAL)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(root, i), shape, dtype))(jnp.asarray(image_indices))


def image_keys(seed: int, image_indices: ArrayLike) -> jax.Array:
    """Typed PRNG keys [B] for the noise that `sample` adds on the way, independent of `initial_noise`."""
    root = jax.random.fold_in(jax.random.key(seed), _ON_THE_WAY)
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.asarray(image_indices))
