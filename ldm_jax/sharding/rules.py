"""Partition rules: where each leaf of the training state lies, chosen by its path, with networks that know nothing of it.

A rule is (regex, placement), as in big_vision: the first regex that matches the whole path ("params/unet/conv_in/kernel") decides.
A placement is a `PartitionSpec`, or the name of a strategy:

* "replicate": whole on every device;
* "fsdp": the largest dimension that the fsdp axis divides is split over it, the last of equal ones. Leaves of fewer than 2**14 elements
  stay whole, since gathering them would cost more than they take.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Rule = tuple[str, str | PartitionSpec]
DEFAULT: tuple[Rule, ...] = ((r".*", "fsdp"),)
MIN_SPLIT_ELEMENTS = 2**14


def path_string(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as "params/unet/conv_in/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def fsdp_spec(shape: tuple[int, ...], axis_size: int) -> PartitionSpec:
    """The "fsdp" strategy for one leaf."""
    dims = [i for i, n in enumerate(shape) if n and n % axis_size == 0]
    if axis_size == 1 or not dims or math.prod(shape) < MIN_SPLIT_ELEMENTS:
        return PartitionSpec()
    chosen = max(dims, key=lambda i: (shape[i], i))
    return PartitionSpec(*[None] * chosen, "fsdp")


def shardings(shapes: Any, mesh: Mesh, rules: Sequence[Rule] = DEFAULT) -> Any:
    """A tree of `NamedSharding` like `shapes`, a tree whose leaves have `.shape` (from `jax.eval_shape`).

    Raises:
        ValueError: a leaf matches no rule, a strategy is unknown, or a given spec does not fit the shape of its leaf.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_string(path)
        placement = next((p for pattern, p in rules if re.fullmatch(pattern, name)), None)
        if placement is None:
            raise ValueError(f"no partition rule matches '{name}'; add one, for instance ('.*', 'replicate') as the last")
        if placement == "replicate":
            return NamedSharding(mesh, PartitionSpec())
        if placement == "fsdp":
            return NamedSharding(mesh, fsdp_spec(leaf.shape, mesh.shape["fsdp"]))
        if isinstance(placement, str):
            raise ValueError(f"unknown placement '{placement}' for '{name}'; there are 'replicate', 'fsdp' and PartitionSpecs")
        sharding = NamedSharding(mesh, placement)
        try:
            sharding.shard_shape(tuple(leaf.shape))
        except ValueError as error:
            raise ValueError(f"{placement} does not fit '{name}' of shape {tuple(leaf.shape)}: {error}") from error
        return sharding

    return jax.tree_util.tree_map_with_path(place, shapes)
