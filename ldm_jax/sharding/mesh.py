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
    return Mesh(_placed(devices, slices, known, sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def _placed(devices: Sequence[jax.Device], slices: int, known: int, sizes: Sequence[int]) -> np.ndarray:
    """Devices in the shape of the mesh, neighbours on an axis near each other in the network. An axis of the mesh may be half of one of the
    torus, which `jax.make_mesh` allows on v5e alone."""
    shape = (1, *sizes)
    if known == 1 and slices > 1:
        return np.asarray(devices).reshape(slices, *sizes)
    if known > 1:
        return mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


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


def filled(number: int, mesh: Mesh) -> int:
    """The smallest batch of at least `number` examples that the devices divide."""
    return fitting_batches(number, mesh.size)[-1]


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


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that lie on this process's devices, ascending: all that it has to read. They need not be neighbours, as a
    mesh follows the links between devices."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[index] for index in held if index is not None]))


def to_global(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays, split along axis 0, from this process's `local_rows` of the batch; what no device can hold (text) is dropped."""
    sharding = batch_sharding(mesh)

    def whole(array: np.ndarray) -> jax.Array:
        shape = (len(array) * mesh.size // mesh.local_mesh.size, *array.shape[1:])
        rows = local_rows(shape[0], mesh)
        held = sharding.addressable_devices_indices_map(shape)
        starts = [np.searchsorted(rows, index[0].indices(shape[0])[0]) for index in held.values() if index is not None]
        each = shape[0] // mesh.size
        parts = jax.device_put([array[start : start + each] for start in starts], list(held))
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return {k: whole(v) for k, v in batch.items() if isinstance(v, np.ndarray) and v.dtype.kind not in "OSU"}


_AT_ONCE = 2**28  # bytes that `on_host` puts on each device


def on_host(tree: Any) -> Any:
    """The arrays of a tree whole, as numpy arrays in every process; a few at a time, as a device need not have room for all of them."""
    leaves, structure = jax.tree.flatten(tree)
    apart = [
        i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    ]
    total, groups = 0, dict[int, list[int]]()
    for i in apart:
        groups.setdefault(total // _AT_ONCE, []).append(i)
        total += leaves[i].nbytes
    for group in groups.values():
        whole = replicated(leaves[group[0]].sharding.mesh)
        for i, array in zip(group, jax.jit(lambda arrays: arrays, out_shardings=whole)([leaves[i] for i in group]), strict=True):
            leaves[i] = np.asarray(array)
    return jax.tree.unflatten(structure, map(np.asarray, leaves))


def split_host_arrays(tree: Any, mesh: Mesh) -> Any:
    """Global arrays, split along axis 0, from numpy arrays that every process holds whole."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index]), tree)
