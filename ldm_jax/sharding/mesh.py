"""The device mesh, and the way of host batches onto it.

Three axes, outermost first: `slices` (of accelerators with a fast network of their own, joined by the data-centre network), `data`
(copies of the parameters) and `fsdp` (parameters split, gathered where they are used). A batch is split over all three; parameters only
over `fsdp`, so that what crosses the slow network is a sum of gradients.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ldm_jax.config import UserError

AXES = ("slices", "data", "fsdp")
BATCH = PartitionSpec(AXES)


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None, slices: int = -1) -> Mesh:
    """A mesh with the axes of `AXES` over all `devices` (default: all there are).

    Args:
        data, fsdp: sizes; -1 takes what the other leaves.
        slices: how many there are; -1 asks the devices, which are of one slice where they do not say.

    The axis types are Auto: under Explicit ones Flax's convolutions do not trace.

    Raises:
        UserError: the sizes do not multiply to the number of devices, or the devices are of another number of slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    known = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == -1:
        slices = known
    if known > 1 and slices != known:
        raise UserError(f"mesh.slices={slices}, but the devices are of {known} slices: give {known}, or -1 to ask them")
    total, sizes = len(devices) // max(slices, 1), [data, fsdp]
    if sizes.count(-1) == 1:
        rest = sizes[1 - sizes.index(-1)]
        if rest > 0:
            sizes[sizes.index(-1)] = total // rest
    if min(*sizes, slices) < 1 or slices * sizes[0] * sizes[1] != len(devices):
        of = f" in {slices} slices" if slices != 1 else ""
        raise UserError(
            f"mesh data={data}, fsdp={fsdp} does not fit {len(devices)} devices{of}: the product must be {total} (one of the two may be -1)"
        )
    shape = (sizes[0], sizes[1])
    if known > 1:
        placed = mesh_utils.create_hybrid_device_mesh((1, *shape), (slices, 1, 1), devices, allow_split_physical_axes=True)
    elif slices > 1:
        placed = np.asarray(devices).reshape(slices, *shape)
    else:
        return jax.make_mesh((1, *shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over all devices, the other axes whole."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def fitting_batches(batch_size: int, unit: int) -> tuple[int, ...]:
    """The nearest multiples of `unit` to a batch size, from below and above; itself where it is one."""
    below = batch_size // unit * unit
    if below == batch_size and below > 0:
        return (below,)
    return (below, below + unit) if below > 0 else (unit,)


def check_batch(batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Checks that the global `batch_size` splits evenly over devices and over `accumulation` microbatches.

    Raises:
        UserError: it does not; the message names the nearest sizes that do.
    """
    unit = mesh.size * accumulation
    if accumulation < 1:
        raise UserError(f"gradient accumulation is {accumulation}, but must be at least 1")
    if batch_size < 1 or batch_size % unit:
        works = " or ".join(map(str, fitting_batches(batch_size, unit)))
        raise UserError(
            f"batch size {batch_size} is not divisible by {mesh.size} devices x {accumulation} accumulation steps = {unit}; use {works}"
        )


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Rows of a global batch that lie on this process's devices, in order, int64.

    A mesh orders devices by the network between them, so that a process's rows need not follow each other.
    """
    rows = np.arange(batch_size)
    shares = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([rows[index] for index in shares.values() if index is not None]))


def to_global(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays, split along axis 0, from this process's rows of the batch; what no device can hold (lists of text) is dropped."""
    sharding = batch_sharding(mesh)
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray) and v.dtype.kind not in "OSU"}
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in arrays.items()}


def split_host_arrays(tree: Any, mesh: Mesh) -> Any:
    """Global arrays, split along axis 0, from numpy arrays that every process holds whole."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index]), tree)
