"""What a run carries from step to step, and how one update changes it."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from ldm_jax.training import ema

Tree = Any
Metrics = dict[str, jax.Array]


@struct.dataclass
class State:
    """Everything a checkpoint holds. Trees are dicts by network name; nothing random is stored.

    Attributes:
      step: int32, updates made (skipped ones included).
      skipped: int32, updates skipped so far because the loss or a gradient was not finite; `skipped_in_a_row`: the last ones.
      params: the networks' parameters; ema: for each decay, averages of those that are sampled from; opt: optimiser states.
    """

    step: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    params: dict[str, Tree]
    ema: dict[str, Tree]
    opt: dict[str, Tree]


def key_for(root: jax.Array, name: str, step: jax.Array | int) -> jax.Array:
    """The key of one use of randomness at one step: fold_in(fold_in(root, name), step)."""
    return jax.random.fold_in(jax.random.fold_in(root, zlib.crc32(name.encode())), step)


def cast(params: Tree, dtype: Any) -> Tree:
    """Parameters in float32, or in float64 where that is the compute type."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(dtype, jnp.float32)), params)


def create(
    params: dict[str, Tree],
    optimizers: dict[str, optax.GradientTransformation],
    averaged: tuple[str, ...],
    decays: tuple[float, ...],
) -> State:
    """A fresh state. `optimizers` maps an optimiser's name to its transformation of `params[name]`, or of all of them under "all"."""
    counters = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "skipped_in_a_row")}
    opt = {name: tx.init(params if name == "all" else params[name]) for name, tx in optimizers.items()}
    return State(params=params, ema=ema.init({name: params[name] for name in averaged}, decays), opt=opt, **counters)


def with_params(state: State, params: dict[str, Tree]) -> State:
    """The state of an untrained model with these networks' parameters (host arrays) in place of its own, and of their averages."""

    def placed(new: Tree, old: Tree) -> Tree:
        return jax.tree.map(lambda n, o: jax.device_put(np.asarray(n, o.dtype), o.sharding), new, old)

    fresh = {name: placed(tree, state.params[name]) for name, tree in params.items()}
    averages = {
        decay: trees | {name: placed(params[name], trees[name]) for name in trees if name in params} for decay, trees in state.ema.items()
    }
    return replace(state, params=state.params | fresh, ema=averages)


def apply_updates(
    state: State,
    grads: dict[str, Tree],
    loss: jax.Array,
    optimizers: dict[str, optax.GradientTransformation],
    decays: tuple[float, ...],
    max_nan: int,
) -> tuple[State, Metrics]:
    """One update of every network that `grads` names, or none at all where the loss or a gradient is not finite (the step still counts).

    After `max_nan` skipped in a row none is made any more: the loop, which looks one update late, finds the state as it was before them.
    """
    norm = optax.tree.norm(grads)
    fine = jnp.isfinite(loss) & jnp.isfinite(norm) & (state.skipped_in_a_row < max_nan)
    params, opt = dict(state.params), dict(state.opt)
    for name, tx in optimizers.items():
        part = grads if name == "all" else grads[name]
        updates, opt[name] = tx.update(part, state.opt[name], state.params if name == "all" else state.params[name])
        if name == "all":
            params = optax.apply_updates(state.params, updates)
        else:
            params[name] = optax.apply_updates(state.params[name], updates)
    step = state.step + 1
    averaged = {name: params[name] for name in next(iter(state.ema.values()))}
    moved = replace(state, params=params, opt=opt, ema=ema.update(state.ema, averaged, step, decays))
    kept = jax.tree.map(lambda new, old: jnp.where(fine, new, old), moved, state)
    bad = (~fine).astype(jnp.int32)
    state = replace(kept, step=step, skipped=state.skipped + bad, skipped_in_a_row=(state.skipped_in_a_row + 1) * bad)
    metrics = {"gradient_norm": norm, "skipped": state.skipped, "skipped_in_a_row": state.skipped_in_a_row}
    return state, metrics


def before_skipped(state: State) -> State:
    """The state before the updates that were skipped in a row: they have moved nothing but the counters."""
    row = state.skipped_in_a_row
    return replace(state, step=state.step - row, skipped=state.skipped - row, skipped_in_a_row=row - row)


def accumulate(fn: Callable[[Tree], Tree], batch: Tree, parts: int) -> Tree:
    """The mean of `fn` over `parts` micro-batches of equal size, by a scan.

    Every leaf of `batch` has the leading dimension of the global batch. Micro-batches take every `parts`-th example: cutting a sharded axis
    that way needs no communication.
    """
    if parts == 1:
        return fn(batch)
    micro = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(total: Tree, part: Tree) -> tuple[Tree, None]:
        return jax.tree.map(lambda a, b: a + b / parts, total, fn(part)), None

    shapes = jax.eval_shape(fn, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, micro)[0]
