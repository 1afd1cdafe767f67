"""What the denoiser is told: conditioners turn a batch's fields into arrays (host), and those into network inputs (device).

The arrays of a batch have a *null* value, which replaces each example's own at the conditioner's drop rate in training, so that the
denoiser also learns the unconditional score (Ho & Salimans 2022).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.config import UserError

Arrays = dict[str, Any]
Params = dict[str, Any]


class Conditioner(Protocol):
    """One kind of condition."""

    @property
    def name(self) -> str:
        """Of the condition, of its parameters, and of the batch's field that it reads."""
        ...

    @property
    def drop_rate(self) -> float: ...
    def prepare(self, batch: Mapping[str, Any]) -> Arrays:
        """Host: the batch's fields to numpy arrays with leading dimension B."""
        ...

    def null(self, n: int) -> Arrays:
        """The same arrays for n examples without condition."""
        ...

    def init(self, key: jax.Array) -> Params: ...
    def apply(self, params: Params, arrays: Arrays) -> Arrays:
        """Device: arrays to {"crossattn": [B,L,D]}, {"concat": [B,h,w,C]} or {"vector": [B,D]}."""
        ...


@dataclass(frozen=True)
class Conditioning:
    """All conditioners of a model. `params` is a dict by conditioner name."""

    conditioners: Sequence[Conditioner]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.conditioners)

    @property
    def guides(self) -> bool:
        """Whether training dropped a condition, so that there is a model without it to move away from."""
        return any(c.drop_rate for c in self.conditioners)

    @property
    def fields(self) -> tuple[str, ...]:
        """What a user gives for each image: a field for each conditioner, and the picture that a mask is of."""
        return (*self.names, *(["image"] if "mask" in self.names else []))

    def prepare(self, batch: Mapping[str, Any], names: Collection[str] | None = None) -> Arrays:
        """The arrays of all conditioners, or of those named. Raises UserError where the batch has no field for one of them."""
        chosen = [c for c in self.conditioners if names is None or c.name in names]
        if missing := [c.name for c in chosen if c.name not in batch]:
            raise UserError(f"the data gives no {', '.join(missing)}, which conditioning.{missing[0]} needs")
        return {k: v for c in chosen for k, v in c.prepare(batch).items()}

    @property
    def optional(self) -> tuple[str, ...]:
        """What may be given besides: which part of the picture that boxes are shares of is to be drawn."""
        return ("crop",) if "boxes" in self.names else ()

    def replaced(self, conditioner: Conditioner) -> "Conditioning":
        """The same with another conditioner in the place of the one of its name."""
        return Conditioning(tuple(conditioner if c.name == conditioner.name else c for c in self.conditioners))

    def null(self, n: int) -> Arrays:
        return {k: v for c in self.conditioners for k, v in c.null(n).items()}

    def unconditional(self, arrays: Arrays) -> Arrays:
        """What guidance moves away from: the null arrays of conditions that training dropped, an example's own of those it never did."""
        n = len(next(iter(arrays.values()), ()))
        return arrays | {k: _fitting(v, arrays[k]) for c in self.conditioners if c.drop_rate for k, v in c.null(n).items()}

    def init(self, key: jax.Array) -> Params:
        return {c.name: c.init(jax.random.fold_in(key, i)) for i, c in enumerate(self.conditioners)}

    def apply(self, params: Params, arrays: Arrays) -> Arrays:
        """Several of a kind are joined: context along its length, maps along channels, vectors along features."""
        parts: dict[str, list[Any]] = {}
        for c in self.conditioners:
            for kind, value in c.apply(params.get(c.name, {}), arrays).items():
                parts.setdefault(kind, []).append(value)
        axes = {"crossattn": 1, "concat": -1, "vector": -1}
        return {kind: jnp.concatenate(values, axes[kind]) if len(values) > 1 else values[0] for kind, values in parts.items()}

    def drop(self, arrays: Arrays, key: jax.Array) -> Arrays:
        """Replaces each example's arrays by the null ones, independently for each conditioner at its rate."""
        out = dict(arrays)
        for i, c in enumerate(self.conditioners):
            null = c.null(1)
            n = arrays[next(iter(null))].shape[0]
            dropped = jax.random.bernoulli(jax.random.fold_in(key, i), c.drop_rate, (n,))
            for name, value in null.items():
                mask = dropped.reshape(n, *(1,) * (value.ndim - 1))
                out[name] = jnp.where(mask, jnp.asarray(_fitting(value, arrays[name]), arrays[name].dtype), arrays[name])
        return out


def _fitting(null: Any, array: Any) -> Any:
    """A null array at the sizes of what it stands for; where those may vary, a number of neighbours or a picture's, it is a constant."""
    if null.shape[1:] == array.shape[1:]:
        return null
    return np.broadcast_to(null[(slice(None), *(slice(1),) * (null.ndim - 1))], (len(null), *array.shape[1:]))
