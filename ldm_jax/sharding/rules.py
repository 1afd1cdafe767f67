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
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ldm_jax.config import UserError

Rule = tuple[str, str | PartitionSpec]
DEFAULT: tuple[Rule, ...] = ((r".*", "fsdp"),)
STRATEGIES = ("replicate", "fsdp")
MIN_SPLIT_ELEMENTS = 2**14


def from_config(texts: Sequence[str]) -> tuple[Rule, ...]:
    """The rules of `mesh.rules`, each "REGEX=STRATEGY", before those of `DEFAULT`. Raises UserError."""
    rules: list[Rule] = []
    for text in texts:
        pattern, _, strategy = text.rpartition("=")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"mesh.rules: {pattern!r} is no regular expression: {error}") from error
        if not pattern or strategy not in STRATEGIES:
            raise UserError(f"mesh.rules are PATTERN=STRATEGY, with one of {', '.join(STRATEGIES)}, not {text!r}")
        rules.append((pattern, strategy))
    return (*rules, *DEFAULT)


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


def spec_of(name: str, shape: tuple[int, ...], fsdp: int, rules: Sequence[Rule] = DEFAULT) -> PartitionSpec:
    """Where the leaf of that path and shape lies, on a mesh with `fsdp` devices along that axis.

    Raises:
        ValueError: the leaf matches no rule, or a strategy is unknown.
    """
    placement = next((p for pattern, p in rules if re.fullmatch(pattern, name)), None)
    if placement is None:
        raise ValueError(f"no partition rule matches '{name}'; add one, for instance ('.*', 'replicate') as the last")
    if isinstance(placement, PartitionSpec):
        return placement
    if placement not in STRATEGIES:
        raise ValueError(f"unknown placement '{placement}' for '{name}'; there are 'replicate', 'fsdp' and PartitionSpecs")
    return fsdp_spec(shape, fsdp) if placement == "fsdp" else PartitionSpec()


def shardings(shapes: Any, mesh: Mesh, rules: Sequence[Rule] = DEFAULT) -> Any:
    """A tree of `NamedSharding` like `shapes`, a tree whose leaves have `.shape` (from `jax.eval_shape`).

    Raises:
        ValueError: as `spec_of`, and where a given spec does not fit the shape of its leaf.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_string(path)
        spec = spec_of(name, tuple(leaf.shape), mesh.shape["fsdp"], rules)
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(tuple(leaf.shape))
        except ValueError as error:
            raise ValueError(f"{spec} does not fit '{name}' of shape {tuple(leaf.shape)}: {error}") from error
        return sharding

    return jax.tree_util.tree_map_with_path(place, shapes)


def gathered(params: Any, dtype: Any, rules: Sequence[Rule] = DEFAULT, prefix: str = "params") -> Any:
    """Parameters whole on every device, for use in a traced loss; their gradients come back split, summed by a reduce-scatter.

    Left to itself, the partitioner may rather move activations to the parameters. Kernels cross the network in the compute type `dtype`,
    to which their layers cast them anyway. `params` are the leaves below `prefix` in the state. Without a mesh (`jax.set_mesh`), or
    with one whose fsdp axis is of one device, the parameters come back as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return params

    def gather(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = path_string(path)
        spec = spec_of(f"{prefix}/{name}", leaf.shape, mesh.shape["fsdp"], rules)
        if spec == PartitionSpec():
            return leaf
        kernel = name.endswith("kernel")
        return _whole(leaf.astype(dtype) if kernel else leaf, spec, not kernel)

    return jax.tree_util.tree_map_with_path(gather, params)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole(leaf: jax.Array, spec: PartitionSpec, table: bool) -> jax.Array:
    leaf = jax.lax.with_sharding_constraint(leaf, spec)  # cast before it crosses the network
    return jax.lax.with_sharding_constraint(leaf, PartitionSpec())


def _whole_forward(leaf: jax.Array, spec: PartitionSpec, table: bool) -> tuple[jax.Array, None]:
    return _whole(leaf, spec, table), None


def _whole_backward(spec: PartitionSpec, table: bool, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    if table:
        # Of a table of embeddings: where its gradient is asked for in parts, all of the batch's embeddings are gathered to make them.
        gradient = jax.lax.with_sharding_constraint(gradient, PartitionSpec())
    return (jax.lax.with_sharding_constraint(gradient, spec),)


_whole.defvjp(_whole_forward, _whole_backward)
