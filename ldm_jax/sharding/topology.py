"""Accelerators that are not here: TPU slices as devices that programs are compiled for, and never run on."""

import importlib.util
import os
import re
from typing import Any

import jax

from ldm_jax.errors import UserError, first_line
from ldm_jax.sharding.chips import CHIPS, Chip, find_chip

LOCAL = ("cpu", "gpu", "tpu")
_TOPOLOGY = re.compile(r"(v\d+\w*):([1-9]\d*(?:x[1-9]\d*){0,2})(?:\*([1-9]\d*))?")


def open_topology(name: str) -> tuple[list[Any], Chip | None]:
    """The devices of a topology, and the row of `CHIPS` that they are of, None where there is none.

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
        return devices, find_chip(devices[0].device_kind)
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
    return devices, next((chip for chip in CHIPS if chip.name == match[1]), find_chip(devices[0].device_kind))
