"""Accelerators that are not here: TPU slices as devices that programs are compiled for, and never run on."""

import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax

from ldm_jax.errors import UserError, first_line
from ldm_jax.sharding.chips import CHIPS, Chip, find_chip

LOCAL = ("cpu", "gpu", "tpu")
_TOPOLOGY = re.compile(r"(v\d+\w*):([1-9]\d*(?:x[1-9]\d*){0,2})(?:\*([1-9]\d*))?")


class Topology(NamedTuple):
    """`chip` is the row of `CHIPS` that the devices are of, `memory` the bytes of one that programs may take: None where not known."""

    devices: list[Any]
    chip: Chip | None
    memory: int | None


def open_topology(name: str) -> Topology:
    """The devices of a topology.

    Args:
      name: a TPU slice, "v5e:16x16" or "v5p:4x4x4", of `v4`, `v5e`, `v5p`, `v6e`; several, joined by the data-centre network, as
        "v5e:16x16*2"; or "cpu", "gpu", "tpu": the devices of this machine.

    Raises:
      UserError: no such topology, no such devices here, or no libtpu, which knows how to compile for slices.
    """
    if name in LOCAL:
        try:
            devices = jax.devices(name)
        except RuntimeError as error:
            raise UserError(f"--topology {name}: {first_line(error)}") from error
        return Topology(devices, find_chip(devices[0].device_kind), (devices[0].memory_stats() or {}).get("bytes_limit"))
    match = _TOPOLOGY.fullmatch(name)
    if not match:
        raise UserError(f"--topology {name!r} is none of {', '.join(LOCAL)}, nor a TPU slice such as v5e:16x16, v5p:4x4x4 or v5e:16x16*2")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs takes libtpu, on whatever machine: pip install 'jax[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no TPU machine is asked what it is
    from jax.experimental import topologies

    slices = int(match[3] or 1)
    try:
        described = topologies.get_topology_desc(f"{match[1]}:{match[2]}", platform="tpu", num_slices=slices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--topology {name}: {first_line(error)}") from error
    devices = list(described.devices)
    chip = next((chip for chip in CHIPS if chip.name == match[1]), find_chip(devices[0].device_kind))
    return Topology(devices, chip, chip.hbm_bytes if chip else None)
