"""Whether a program fits on a chip, and how fast it could be: measured on what XLA compiles, held against the chip's roofs."""

import re
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax.sharding.chips import Chip
from ldm_jax.sharding.hlo import Program
from ldm_jax.training.programs import Planned, bytes_of

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Traffic:
    """All collectives of a kind in one execution: how many, and bytes that leave a chip, by ICI or by the data-centre network."""

    count: int
    ici_bytes: float
    dcn_bytes: float


@dataclass(frozen=True)
class Roofs:
    """Seconds that one execution takes at least if a roof were all that bounds it, each at the vendor's peak."""

    compute: float
    memory: float
    ici: float
    dcn: float

    @property
    def step(self) -> float:
        """The highest roof: everything overlaps with everything."""
        return max(self.compute, self.memory, self.ici, self.dcn)

    @property
    def bound(self) -> str:
        """Which roof that is."""
        return max(asdict(self), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Plan:
    """What is known of a program before it runs. Bytes and operations are of one chip and one execution.

    Attributes:
      fits: None where the chip's memory is not known.
      memory: bytes by what they hold; `total` of all, as XLA lays them out; `exceeded` is by how much that is too much.
      flops: of the mathematics; `computed`, with what is computed anew.
      compiler_seconds: XLA's own estimate, which counts loops once; None where it makes none.
    """

    name: str
    chips: int
    images: int
    fits: bool | None
    memory: dict[str, int]
    total: int
    capacity: int | None
    exceeded: int
    flops: float
    computed: float
    compile_seconds: float
    traffic: dict[str, Traffic] = field(default_factory=dict)
    largest: list[str] = field(default_factory=list)
    memory_traffic: float = 0.0
    roofs: Roofs | None = None
    compiler_seconds: float | None = None

    @property
    def mfu_bound(self) -> float | None:
        """The share of the chip's peak that the mathematics can get at most, by the highest roof."""
        return None if self.roofs is None else self.roofs.compute * self.flops / self.computed / self.roofs.step

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = asdict(self)
        if self.roofs is not None:
            found["roofs"] |= {"step": self.roofs.step, "bound": self.roofs.bound}
            found["mfu_bound"] = self.mfu_bound
            found["images_per_second"] = self.images / self.roofs.step
        return found


def set_effort(quick: bool) -> None:
    """XLA:TPU optimises for an hour, or, quickly, for a minute: the same collectives, a few percent more memory, a slower program."""
    for name in ("jax_exec_time_optimization_effort", "jax_memory_fitting_effort"):
        if hasattr(jax.config, name):
            jax.config.update(name, -1.0 if quick else 0.0)


def compile_plan(program: Planned, chip: Chip | None, capacity: int | None) -> Plan:
    """Compiles a program and measures it; one that is too large for a chip, of which it may take `capacity` bytes, is not an error."""
    chips = program.mesh.size
    flops, computed = (operations / chips for operations in program.count())
    memory = {name: size for name, tree in program.given.items() if (size := bytes_of(tree))}
    given = program.given_bytes

    def plan(total: int, there: int | None, fits: bool | None, seconds: float, **measured: Any) -> Plan:
        return Plan(
            name=program.name,
            chips=chips,
            images=program.images,
            fits=fits,
            memory=memory,
            total=total,
            capacity=there,
            exceeded=max(total - there, 0) if there else 0,
            flops=flops,
            computed=computed,
            compile_seconds=seconds,
            **measured,
        )

    if capacity and given > capacity:  # no need to compile it
        return plan(given, capacity, False, 0.0)
    lowered, start = program.lower(), time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        exhausted = _exhausted(str(error), given)
        if exhausted is None:
            raise
        memory["temporaries"] = max(exhausted[0] - given, 0)
        return plan(*exhausted, False, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    stats = compiled.memory_analysis()
    memory["padding"] = max(stats.argument_size_in_bytes - given, 0)
    memory["temporaries"] = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory["program"] = stats.generated_code_size_in_bytes
    total = sum(memory.values())
    text = Program(compiled.as_text())
    traffic, largest = _traffic(text, program.mesh)
    moved = float(text.memory_bytes())
    roofs = None
    if chip:
        ici, dcn = (sum(getattr(each, f"{name}_bytes") for each in traffic.values()) for name in ("ici", "dcn"))
        roofs = Roofs(computed / chip.peak_bf16, moved / chip.hbm_bandwidth, ici / chip.ici_bandwidth, dcn / chip.dcn_bandwidth)
    estimate = (compiled.cost_analysis() or {}).get("optimal_seconds")
    return plan(
        total,
        capacity,
        None if capacity is None else total <= capacity,
        seconds,
        traffic=traffic,
        largest=largest,
        memory_traffic=moved,
        roofs=roofs,
        compiler_seconds=float(estimate) if estimate and estimate > 0 else None,
    )


def _traffic(text: Program, mesh: Mesh) -> tuple[dict[str, Traffic], list[str]]:
    """Collectives by kind, and the shapes of the three that move most."""
    found = text.collectives()
    slice_size = mesh.size // mesh.shape["slices"]
    by_kind: dict[str, Traffic] = {}
    for one in found:
        before = by_kind.get(one.kind, Traffic(0, 0.0, 0.0))
        far = one.crosses(slice_size)
        ici, dcn = (0.0, one.traffic) if far else (one.traffic, 0.0)
        by_kind[one.kind] = Traffic(before.count + one.times, before.ici_bytes + ici, before.dcn_bytes + dcn)
    most = sorted(found, key=lambda one: -one.traffic)[:3]
    return dict(sorted(by_kind.items())), [f"{one.kind} {one.shape[:60]} x {one.times}" for one in most]


def _exhausted(message: str, given: int) -> tuple[int, int] | None:
    """Bytes that a program with arguments of `given` bytes would use, and that there are, from XLA's words; None where it says else."""
    number = r"([\d.]+)([KMGT]?)"
    if match := re.search(rf"Used {number} of {number} hbm", message):
        more = 0
    elif match := re.search(rf"temporaries \({number}\) exceeds available HBM \({number}\)", message):
        more = given
    else:
        return None
    return int(float(match[1]) * _UNITS[match[2]]) + more, int(float(match[3]) * _UNITS[match[4]])


def smallest_changes(fsdp: int, remat: str, accumulation: int, batch: int, chips: int, slice_size: int) -> list[dict[str, Any]]:
    """Fields that may be changed to need less memory, what costs least first: the mesh, what is kept, the micro-batch, the batch."""
    meshes: list[dict[str, Any]] = [{"mesh.data": -1, "mesh.fsdp": n * fsdp} for n in (2, 4, 8, 16, 32) if slice_size % (n * fsdp) == 0]
    levels = ("conv+dense+attention", "blocks", "full")
    remats: list[dict[str, Any]] = [{"train.remat": level} for level in levels[levels.index(remat) + 1 if remat in levels else 0 :]]
    unit = chips * accumulation
    each = batch // unit  # examples that a chip has at a time
    parts = [{"train.accumulation": n * accumulation} for n in range(2, each + 1) if each % n == 0]
    fewer = [{"train.batch_size": n * unit} for n in sorted({3 * each // 4, each // 2, each // 4, 1} - {0, each}, reverse=True)]
    together = [mesh | {"train.remat": "blocks"} | part for mesh in meshes[-1:] for part in ({}, *parts)] if remat != "full" else []
    return [*meshes, *remats, *parts, *together, *fewer]


def least_temporaries(plan: Plan, before: ConfigDict, after: ConfigDict) -> float:
    """What another `train` group leaves of a plan's temporaries at the very least: what is kept may shrink to a tenth where less is kept,
    what belongs to the examples in proportion to the micro-batch, and gradients, as large as the parameters, to nothing."""
    share = 1.0 if after.remat == before.remat else 0.1
    share *= (after.batch_size / after.accumulation) / (before.batch_size / before.accumulation)
    return max(share * (plan.memory.get("temporaries", 0) - plan.memory["parameters"]), 0.0)
