"""Whether a program fits on a chip, and how fast it could be: measured on what XLA compiles, held against the chip's roofs."""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

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


def compile_plan(program: Planned, chip: Chip | None) -> Plan:
    """Compiles a program and measures it; one that is too large for its chip's memory is not an error."""
    chips = program.mesh.size
    flops, computed = (operations / chips for operations in program.count())
    memory = {name: size for name, tree in program.given.items() if (size := bytes_of(tree))}
    given = program.given_bytes

    def plan(total: int, capacity: int | None, fits: bool | None, seconds: float, **measured: Any) -> Plan:
        return Plan(
            name=program.name,
            chips=chips,
            images=program.images,
            fits=fits,
            memory=memory,
            total=total,
            capacity=capacity,
            exceeded=max(total - capacity, 0) if capacity else 0,
            flops=flops,
            computed=computed,
            compile_seconds=seconds,
            **measured,
        )

    if chip and given > chip.hbm_bytes:  # no need to compile it
        return plan(given, chip.hbm_bytes, False, 0.0)
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
    total, capacity = sum(memory.values()), chip.hbm_bytes if chip else None
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


def smallest_changes(
    fsdp: int, remat: str, accumulation: int, batch: int, chips: int, slice_size: int
) -> Sequence[tuple[str, dict[str, Any]]]:
    """What may be changed to need less memory, in words and as fields, what costs least first: the mesh, what is kept, the micro-batch,
    the batch."""
    splits = [n for n in (2 * fsdp, 4 * fsdp, 8 * fsdp, 16 * fsdp, 32 * fsdp) if slice_size % n == 0]
    found: list[dict[str, Any]] = [{"mesh.fsdp": n} for n in splits]
    levels = ("conv+dense+attention", "blocks", "full")
    found += [{"train.remat": r} for r in levels[levels.index(remat) + 1 if remat in levels else 0 :]]
    parts = [n * accumulation for n in (2, 4, 8, 16) if batch % (n * accumulation * chips) == 0]
    found += [{"train.accumulation": n} for n in parts]
    if splits:
        found += [{"mesh.fsdp": splits[-1], "train.remat": "blocks"}]
        found += [{"mesh.fsdp": splits[-1], "train.remat": "blocks", "train.accumulation": n} for n in parts]
    found += [{"train.batch_size": batch // n} for n in (2, 4, 8, 16) if batch % (n * accumulation * chips) == 0]
    return [(" and ".join(f"{name}={value}" for name, value in each.items()), each) for each in found]
