"""Learning-rate schedules and optimisers. Learning rates are absolute: never scaled by batch size or devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ldm_jax.config import UserError

Schedule = Callable[[Any], jax.Array]
SCHEDULES = ("constant", "cosine", "linear", "inverse_sqrt")
OPTIMIZERS = ("adamw", "adam")


def make_schedule(
    kind: str, peak: float, warmup: int = 0, steps: int | None = None, final: float = 0.0, decay_start: float = 0.0
) -> Schedule:
    """A function from the count n of updates already made to the learning rate of the next one.

    Warm-up, for n < warmup: peak (n + 1) / warmup. After it, with p = (n - s) / (steps - s) clipped to [0, 1] and s the later
    of `warmup` and `decay_start * steps`:

    * constant: peak;
    * linear: peak + (final - peak) p;
    * cosine: final + (peak - final) (1 + cos(pi p)) / 2;
    * inverse_sqrt: max(final, peak sqrt(w / max(n + 1, w))) with w = max(warmup, 1).

    Args:
        kind: one of `SCHEDULES`.
        peak: the highest learning rate.
        warmup: updates of linear warm-up.
        steps: updates of the whole run; needed by linear and cosine.
        final: the learning rate at the end (constant: not used).
        decay_start: linear and cosine: the fraction of `steps` before the decay starts, in [0, 1).

    Raises:
        UserError: an unknown kind, or numbers that make no schedule.
    """
    if kind not in SCHEDULES:
        raise UserError(f"unknown learning-rate schedule '{kind}'; there are {', '.join(SCHEDULES)}")
    if peak < 0 or warmup < 0 or final < 0 or not 0 <= decay_start < 1:
        raise UserError(
            f"schedule with peak={peak}, warmup={warmup}, final={final}, decay_start={decay_start}: "
            "none may be negative, and decay_start must be below 1"
        )
    decays = kind in ("linear", "cosine")
    if decays and (steps is None or steps <= warmup):
        raise UserError(f"a {kind} schedule needs more steps than warm-up; steps={steps}, warmup={warmup}")
    start = max(float(warmup), decay_start * steps) if steps is not None else float(warmup)

    def schedule(count: Any) -> jax.Array:
        n = jnp.asarray(count, float)
        ramp = jnp.minimum(1.0, (n + 1) / max(warmup, 1))
        if kind == "inverse_sqrt":
            w = max(warmup, 1)
            after = jnp.maximum(final, peak * jnp.sqrt(w / jnp.maximum(n + 1, w)))
        elif decays and steps is not None:
            p = jnp.clip((n - start) / (steps - start), 0.0, 1.0)
            shape = 1 - p if kind == "linear" else (1 + jnp.cos(jnp.pi * p)) / 2
            after = final + (peak - final) * shape
        else:
            after = jnp.full_like(n, peak)
        return jnp.where(n < warmup, peak * ramp, after)

    return schedule


def decay_mask(params: Any) -> Any:
    """A tree of bool like `params`: True for what weight decay acts on, that is not biases, norm scales and 1-D leaves."""

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim > 1 and name not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    kind: str,
    schedule: Schedule | float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Clipping by the global norm (0: none), Adam (Kingma and Ba, arXiv 1412.6980), decoupled weight decay for "adamw"
    (Loshchilov and Hutter, arXiv 1711.05101: multiplied by the learning rate, on the leaves of `decay_mask`), the schedule.

    Raises:
        UserError: an unknown kind, a negative number, or a weight decay that "adam" would not use.
    """
    if kind not in OPTIMIZERS:
        raise UserError(f"unknown optimiser '{kind}'; there are {', '.join(OPTIMIZERS)}")
    if kind == "adam" and weight_decay:
        raise UserError(f"weight_decay={weight_decay} has no effect on 'adam'; use 'adamw', or weight_decay=0")
    if min(weight_decay, clip_norm) < 0:
        raise UserError(f"weight_decay={weight_decay} and clip_norm={clip_norm} must not be negative")
    parts = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    parts.append(optax.scale_by_adam(b1, b2, eps))
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, decay_mask))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def sparing(transformation: optax.GradientTransformation, group: str, names: set[str]) -> optax.GradientTransformation:
    """The same, but for `params[group][name]` of these names, which stay as they are and have no moments."""
    if not names:
        return transformation

    def labels(params: Any) -> Any:
        return {part: {n: n in names for n in tree} if part == group else False for part, tree in params.items()}

    return optax.multi_transform({False: transformation, True: optax.set_to_zero()}, labels)


def from_config(group: Any, steps: int) -> optax.GradientTransformation:
    """The transformation of an `optimizer` group for a run of `steps` updates; `final` there is a fraction of the peak."""
    schedule = schedule_from_config(group, steps)
    return make_optimizer(group.kind, schedule, group.b1, group.b2, group.eps, group.weight_decay, group.clip_norm)


def schedule_from_config(group: Any, steps: int) -> Schedule:
    peak = group.learning_rate
    return make_schedule(group.schedule, peak, group.warmup, steps, group.final * peak, group.decay_start)
