"""`python -m ldm_jax.compile --config FILE[:PRESET] --topology v5e:16x16 [--sweep mesh] [--json FILE] [--config.group.field=value ...]`.

Will it fit, and how fast could it be? Compiles the programs of a run, the very ones that training, sampling and encoding run, for a TPU
slice that need not be here (on any machine: pip install 'jax[tpu]'), or for the devices that are (gpu, cpu). Prints for each chip: memory
by what it holds, operations, collectives, roofs. Where the update does not fit, it looks for the smallest change that does. Exit code 1
says that something does not fit. Nothing is run, no data and no weights are read (but those of first_stage.path). See docs/scale.md.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_jax import cli
from ldm_jax.config import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from ldm_jax.sharding.chips import Chip
    from ldm_jax.training.plan import Plan

PROGRAMS = ("step", "sampler", "encoder")
_GIB = 2**30


def parser() -> cli.Parser:
    flags = cli.Parser(
        description="Compiles the programs of a run for a TPU slice or for this machine's devices: does it fit, and how fast could it be?",
        epilog="Any field of the configuration is set by --config.group.field=value.",
    )
    flags.add_argument("--config", required=True, metavar="FILE[:PRESET]", help="a file under configs/, with a preset of it")
    flags.add_argument(
        "--topology", required=True, help="v5e:16x16, v5p:4x4x4, v6e:8x8, two slices as v5e:16x16*2; gpu or cpu: what is here"
    )
    flags.add_argument("--programs", default=",".join(PROGRAMS), help="which of %(default)s")
    flags.add_argument("--sweep", choices=("mesh",), help="compiles the update for each sensible mesh.fsdp, and ranks them")
    flags.add_argument("--effort", choices=("quick", "full"), default="quick", help="of XLA: a minute a program, or up to an hour (quick)")
    flags.add_argument("--advise", type=int, default=4, metavar="N", help="changes that are tried where the update does not fit (4)")
    flags.add_argument("--json", metavar="FILE", help="where the numbers go besides")
    return flags


def main() -> int:
    args, overrides = parser().parse_known_args()
    chosen = args.programs.split(",")
    if unknown := sorted(set(chosen) - set(PROGRAMS)):
        raise UserError(f"--programs {unknown[0]!r} is not one of {', '.join(PROGRAMS)}")
    from ldm_jax import config as configs
    from ldm_jax.paths import make_directory, write_json
    from ldm_jax.sharding.topology import LOCAL, open_topology

    config = configs.from_command(args.config, overrides, weights=False)
    if args.topology not in LOCAL or args.topology == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    if args.topology not in LOCAL and config.train.dtype == "auto":
        with config.unlocked():
            config.train.dtype = "bfloat16"
    cli.start(config.train.dtype)
    devices, chip = open_topology(args.topology)
    from ldm_jax.training.plan import set_effort

    set_effort(args.effort == "quick")
    name = f"{args.config} on {args.topology}"
    found = swept(config, devices, chip, name) if args.sweep else planned(config, devices, chip, name, chosen, args.advise)
    if args.json:
        make_directory(Path(args.json).absolute().parent)
        write_json(args.json, {"config": args.config, "overrides": overrides, "topology": args.topology, **found})
    return cli.OK if found["fits"] else cli.FAILED


def planned(
    config: "ConfigDict", devices: Sequence[Any], chip: "Chip | None", name: str, chosen: Sequence[str], tries: int
) -> dict[str, Any]:
    """Compiles and prints the programs of a run one after another; what was found, for JSON."""
    from ldm_jax.training import programs
    from ldm_jax.training.plan import compile_plan

    config, mesh, notes = fitted(config, devices)
    print(headline(config, mesh, chip, name), *notes, sep="\n", flush=True)
    stage = programs.plan_stage(config)
    there: dict[str, Any] = {"step": programs.train_step}
    if config.task == "diffusion":
        there["sampler"] = programs.sampler
    if config.first_stage.kind != "identity":
        there["encoder"] = programs.encoder
    plans: list[Plan] = []
    advice = None
    for program in [name for name in there if name in chosen]:
        plan = compile_plan(there[program](stage, mesh), chip)
        print(described(plan), flush=True)
        if program == "step" and plan.fits is False:
            advice = advised(config, mesh, chip, plan, tries)
        plans.append(plan)
    fits = all(plan.fits is not False for plan in plans)
    shape = {axis: int(size) for axis, size in mesh.shape.items()}
    return {"fits": fits, "mesh": shape, "notes": notes, "programs": [plan.to_json() for plan in plans], "advice": advice}


def fitted(config: "ConfigDict", devices: Sequence[Any], **changes: Any) -> tuple["ConfigDict", "Mesh", list[str]]:
    """A configuration with fields changed, its mesh, and what had to be changed besides: a batch that does not split over the devices."""
    from ml_collections import ConfigDict

    from ldm_jax.sharding.mesh import fitting_batches, make_mesh

    config = ConfigDict(config.to_dict())
    for field, value in changes.items():
        group, name = field.split(".")
        config[group][name] = value
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices, config.mesh.slices)
    asked, unit = config.train.batch_size, mesh.size * config.train.accumulation
    config.train.batch_size = fitting_batches(asked, unit)[-1]
    if config.train.batch_size == asked:
        return config, mesh, []
    works = " or ".join(str(n) for n in fitting_batches(asked, unit))
    return (
        config,
        mesh,
        [
            f"  batch size {asked} does not split over {mesh.size} chips x {config.train.accumulation}: training will refuse it, and take"
            f" {works}; below it is {config.train.batch_size}"
        ],
    )


def advised(config: "ConfigDict", mesh: "Mesh", chip: "Chip | None", plan: "Plan", tries: int) -> dict[str, Any] | None:
    """The first of the smallest changes with which the update fits. Those that cannot, by their parameters alone, are not compiled."""
    from ldm_jax.training import programs
    from ldm_jax.training.plan import compile_plan, smallest_changes

    train, devices = config.train, list(mesh.devices.flat)
    changes = smallest_changes(
        mesh.shape["fsdp"], train.remat, train.accumulation, train.batch_size, mesh.size, mesh.size // mesh.shape["slices"]
    )
    for words, change in changes:
        if tries < 1:
            break
        changed, other, _ = fitted(config, devices, **change)
        program = programs.train_step(programs.plan_stage(changed), other)
        least = program.given_bytes + least_temporaries(plan, change, train)
        if plan.capacity is not None and least > plan.capacity:
            continue
        tries -= 1
        print(f"  with {words} ...", end=" ", flush=True)
        tried = compile_plan(program, chip)
        if tried.fits:
            print(f"fits:\n{described(tried)}", flush=True)
            return {"change": change, "program": tried.to_json()}
        print(f"{gib(tried.exceeded)} GiB too much", flush=True)
    print("  no change was found that fits; --advise N tries more", flush=True)
    return None


def least_temporaries(plan: "Plan", change: dict[str, Any], train: "ConfigDict") -> float:
    """What a change leaves of the temporaries at the very least: what is kept may shrink to a tenth, the micro-batch in proportion, and
    gradients, as large as the parameters, to nothing."""
    share = 0.1 if "train.remat" in change else 1.0
    share *= train.accumulation / change.get("train.accumulation", train.accumulation)
    share *= change.get("train.batch_size", train.batch_size) / train.batch_size
    return max(share * (plan.memory.get("temporaries", 0) - plan.memory["parameters"]), 0.0)


def swept(config: "ConfigDict", devices: Sequence[Any], chip: "Chip | None", name: str) -> dict[str, Any]:
    """Compiles the update for each sensible size of the fsdp axis, and ranks them by their roofs."""
    from ldm_jax.training import programs
    from ldm_jax.training.plan import compile_plan

    plain, mesh, notes = fitted(config, devices)
    print(headline(plain, mesh, chip, name), *notes, sep="\n", flush=True)
    found: list[tuple[int, Plan]] = []
    slice_size = mesh.size // mesh.shape["slices"]
    sizes = [2**i for i in range(slice_size.bit_length()) if slice_size % 2**i == 0]
    for fsdp in sizes:
        changed, other, _ = fitted(config, devices, **{"mesh.data": -1, "mesh.fsdp": fsdp})
        program = programs.train_step(programs.plan_stage(changed), other)
        plan = compile_plan(program, chip)
        found.append((fsdp, plan))
        print("  " + ", ".join(filter(None, (f"fsdp={fsdp}: {gib(plan.total)} GiB", verdict(plan), times(plan)))), flush=True)
        if chip and fsdp > 1 and program.given_bytes < 0.02 * chip.hbm_bytes:
            break  # to split what is small already only adds to what is gathered
    ranked = sorted(
        (each for each in found if each[1].fits is not False), key=lambda each: (each[1].roofs.step if each[1].roofs else 0, each[0])
    )
    print("best first: " + (", ".join(f"fsdp={fsdp}" for fsdp, _ in ranked) or "none fits"), flush=True)
    return {"fits": bool(ranked), "notes": notes, "sweep": [{"fsdp": fsdp, **plan.to_json()} for fsdp, plan in found]}


def headline(config: "ConfigDict", mesh: "Mesh", chip: "Chip | None", name: str) -> str:
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    kind = chip.name if chip else mesh.devices.flat[0].device_kind
    train = config.train
    return f"{name}: {mesh.size} x {kind}, mesh {axes}; batch {train.batch_size}, accumulation {train.accumulation}, remat {train.remat}"


def described(plan: "Plan") -> str:
    """A plan as lines of text."""
    lines = [f"{plan.name}: {plan.images} images on {plan.chips} chip{'s' if plan.chips > 1 else ''}, {verdict(plan)}"]
    lines.append("  memory, GiB   " + "  ".join(f"{name} {gib(size)}" for name, size in plan.memory.items()) + f"  = {gib(plan.total)}")
    anew = f", {plan.computed / 1e12:.2f} with what is computed anew" if plan.computed != plan.flops else ""
    lines.append(f"  operations    {plan.flops / 1e12:.2f} TFLOP a chip{anew}")
    for kind, traffic in plan.traffic.items():
        far = f", {traffic.dcn_bytes / 1e9:.3f} GB by the data-centre network" if traffic.dcn_bytes else ""
        lines.append(f"  {kind:<20s}{traffic.count:5d}   {traffic.ici_bytes / 1e9:.3f} GB leave a chip{far}")
    if plan.largest:
        lines.append("  largest       " + "; ".join(plan.largest))
    if plan.roofs is not None:
        roofs = plan.roofs
        lines.append(
            f"  roofs, ms     compute {1e3 * roofs.compute:.1f}  memory {1e3 * roofs.memory:.1f}  ICI {1e3 * roofs.ici:.1f}"
            f"  DCN {1e3 * roofs.dcn:.1f}"
        )
        lines.append(f"  at least      {times(plan)}")
    if plan.compiler_seconds:
        lines.append(f"  XLA's guess   {1e3 * plan.compiler_seconds:.1f} ms")
    lines.append(f"  compiled in   {plan.compile_seconds:.0f} s")
    return "\n".join(lines)


def verdict(plan: "Plan") -> str:
    if plan.fits is None:
        return "memory of the chip not known"
    assert plan.capacity is not None
    if not plan.fits:
        return f"DOES NOT FIT: {gib(plan.exceeded)} GiB more than the {gib(plan.capacity)} of a chip"
    return f"fits: {100 * plan.total / plan.capacity:.0f} % of {gib(plan.capacity)} GiB"


def times(plan: "Plan") -> str:
    if plan.roofs is None or plan.mfu_bound is None:
        return ""
    step = plan.roofs.step
    return f"{1e3 * step:.1f} ms by {plan.roofs.bound}: {plan.images / step:.0f} images/s, MFU at most {100 * plan.mfu_bound:.0f} %"


def gib(size: float | None) -> str:
    return "?" if size is None else f"{size / _GIB:.2f}"


if __name__ == "__main__":
    cli.guarded(main)
