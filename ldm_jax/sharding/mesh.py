"""The device mesh, and the way of host batches onto it.

Two axes: `data` (copies of the parameters) and `fsdp` (parameters split, gathered where they are used). A batch is split over both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ldm_jax.config import UserError

AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with axes ('data', 'fsdp') over all `devices` (default: all there are); a size of -1 takes what the other leaves.

    The axis types are Auto: under Explicit ones Flax's convolutions do not trace.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    total, sizes = len(devices), [data, fsdp]
    if sizes.count(-1) == 1:
        rest = sizes[1 - sizes.index(-1)]
        if rest > 0:
            sizes[sizes.index(-1)] = total // rest
    if min(sizes) < 1 or sizes[0] * sizes[1] != total:
        raise UserError(
            f"mesh data={data}, fsdp={fsdp} does not fit {total} devices: the product must be {total} (one of the two may be -1)"
        )
    return jax.make_mesh((sizes[0], sizes[1]), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over all devices, the other axes whole."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Checks that the global `batch_size` splits evenly over devices and over `accumulation` microbatches.

    Raises:
        UserError: it does not; the message names the nearest sizes that do.
    """
    unit = mesh.size * accumulation
    if accumulation < 1:
        raise UserError(f"gradient accumulation is {accumulation}, but must be at least 1")
    if batch_size < 1 or batch_size % unit:
        below = batch_size // unit * unit
        works = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        raise UserError(
            f"batch size {batch_size} is not divisible by {mesh.size} devices x {accumulation} accumulation steps = {unit}; use {works}"
        )


def to_global(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays, split along axis 0, from this process's share of the batch; what no device can hold (lists of text) is dropped."""
    sharding = batch_sharding(mesh)
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray) and v.dtype.kind not in "OSU"}
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in arrays.items()}


def split_host_arrays(tree: Any, mesh: Mesh) -> Any:
    """Global arrays, split along axis 0, from numpy arrays that every process holds whole."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index]), tree)
