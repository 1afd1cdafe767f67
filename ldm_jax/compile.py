"""`python -m ldm_jax.compile --config FILE[:PRESET] --topology v5e:16x16 [--sweep mesh] [--json FILE] [--config.group.field=value ...]`.

Will it fit, and how fast could it be? Compiles the programs of a run, the very ones that training, sampling and encoding run, for a TPU
slice that need not be here (on any machine: pip install 'jax[tpu]'), or for the devices that are (gpu, cpu). Prints for each chip: memory
by what it holds, operations, collectives, roofs. Where the update does not fit, it looks for the smallest change that does. Exit code 1
says that something does not fit. Nothing is run, no data and no weights are read (but those of first_stage.path). See docs/scale.md.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_jax import cli
from ldm_jax.config import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from ldm_jax.sharding.topology import Topology
    from ldm_jax.training.plan import Plan

PROGRAMS = ("first_stage", "step", "preview", "sampler", "encoder")
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
    flags.add_argument("--programs", metavar="NAME,...", help=f"which of {', '.join(PROGRAMS)} (all that the run has)")
    flags.add_argument("--sweep", choices=("mesh",), help="compiles the update for each sensible mesh.fsdp, and ranks them")
    flags.add_argument(
        "--effort", choices=("quick", "full"), default="quick", help="of XLA for a slice: a minute a program, or up to an hour (quick)"
    )
    flags.add_argument("--advise", type=int, default=4, metavar="N", help="changes that are tried where the update does not fit (4)")
    flags.add_argument("--json", metavar="FILE", help="where the numbers go besides")
    return flags


def main() -> int:
    args, overrides = parser().parse_known_args()
    chosen = args.programs.split(",") if args.programs else PROGRAMS
    if unknown := sorted(set(chosen) - set(PROGRAMS)):
        raise UserError(f"--programs {unknown[0]!r} is not one of {', '.join(PROGRAMS)}")
    if args.programs and args.sweep:
        raise UserError("--sweep compiles the update alone: --programs has no effect")
    from ldm_jax import config as configs
    from ldm_jax.paths import write_json
    from ldm_jax.sharding.topology import LOCAL, open_topology

    config = configs.from_command(args.config, overrides, weights=False)
    if args.json:
        check_writable(Path(args.json))
    cli.start(config.train.dtype, join=False)
    import jax

    from ldm_jax.training.plan import set_effort

    name, here = f"{args.config} on {args.topology}", args.topology in LOCAL
    if not here or args.topology == "cpu":
        jax.config.update("jax_platforms", "cpu")  # no accelerator of this machine is touched, nor its kernels chosen
    if not here:
        set_effort(args.effort == "quick")
        name += f" (effort {args.effort})"
        if config.train.dtype == "auto":
            with config.unlocked():
                config.train.dtype = "bfloat16"
    on = open_topology(args.topology)
    found = swept(config, on, name) if args.sweep else planned(config, on, name, chosen, args.advise)
    if args.json:
        write_json(args.json, {"config": args.config, "overrides": overrides, "topology": args.topology, **found})
    return cli.FAILED if found["fits"] is False else cli.OK


def check_writable(path: Path) -> None:
    """Raises UserError where the numbers cannot go there, before minutes of compiling. Leaves no file that was not there."""
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        path.open("a").close()
        if new:
            path.unlink()
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror}") from error


def planned(config: "ConfigDict", on: "Topology", name: str, chosen: Sequence[str], tries: int) -> dict[str, Any]:
    """Compiles and prints the programs of a run one after another; what was found, for JSON. `fits` is None where memory is not known."""
    from ldm_jax.training import programs
    from ldm_jax.training.plan import compile_plan

    plans: list[Plan] = []
    notes: list[str] = []
    advice: dict[str, Any] = {}
    for title, stage, run, makers in parts_of(config):
        making = {program: make for program, make in makers.items() if program in chosen}
        if not making:
            continue
        run, mesh, said = fitted(run, on.devices, stage)
        notes += said
        print(headline(run, mesh, on, f"{name}{title}"), *said, sep="\n", flush=True)
        built = programs.plan_stage(run)
        for program, make in making.items():
            plan = compile_plan(make(built, mesh), on.chip, on.memory)
            print(described(plan), flush=True)
            if make is programs.train_step and plan.fits is False:
                advice[program] = advised(run, mesh, on, plan, tries, stage)
            plans.append(plan)
    if not plans:
        raise UserError(f"--programs {','.join(chosen)}: this run has none of them")
    known = [plan.fits for plan in plans]
    fits = None if None in known and False not in known else all(known)
    shape = {axis: int(size) for axis, size in mesh.shape.items()}
    return {"fits": fits, "mesh": shape, "notes": notes, "programs": [plan.to_json() for plan in plans], "advice": advice}


def parts_of(config: "ConfigDict") -> list[tuple[str, str, "ConfigDict", dict[str, Any]]]:
    """The stages that a run trains, in their order: words for it, where its `train` group lies, its configuration, and what makes its
    programs, by their names."""
    from ldm_jax import config as configs
    from ldm_jax.training import programs

    makers: dict[str, Any] = {"step": programs.train_step}
    if config.task == "diffusion":
        makers |= {"preview": programs.preview, "sampler": programs.sampler}
    if config.first_stage.kind != "identity":
        makers["encoder"] = programs.encoder
    own = ("", "", config, makers)
    if config.task == "autoencoder" or config.first_stage.path or config.first_stage.kind == "identity":
        return [own]
    return [(", its first stage", "first_stage.", configs.first_stage_run(config), {"first_stage": programs.train_step}), own]


def fitted(config: "ConfigDict", devices: Sequence[Any], stage: str = "", **changes: Any) -> tuple["ConfigDict", "Mesh", list[str]]:
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
    said = (
        f"  {stage}train.batch_size={asked} does not split over {mesh.size} chips x {config.train.accumulation}: training will refuse it,"
        f" and take {works}; below it is {config.train.batch_size}"
    )
    return config, mesh, [said]


def advised(config: "ConfigDict", mesh: "Mesh", on: "Topology", plan: "Plan", tries: int, stage: str) -> dict[str, Any] | None:
    """The first of the smallest changes with which the update fits. Those that cannot, by what is known already, are not compiled."""
    from ldm_jax.training import programs
    from ldm_jax.training.plan import compile_plan, least_temporaries, smallest_changes

    assert plan.capacity is not None
    train, slice_size = config.train, mesh.size // mesh.shape["slices"]
    failed = [(train, plan)]
    for change in smallest_changes(mesh.shape["fsdp"], train.remat, train.accumulation, train.batch_size, mesh.size, slice_size):
        named = {f"{stage}{name}" if name.startswith("train") else name: value for name, value in change.items()}
        words = " and ".join(f"{name}={value}" for name, value in named.items() if name != "mesh.data" or config.mesh.data != -1)
        changed, other, _ = fitted(config, on.devices, **change)
        program = programs.train_step(programs.plan_stage(changed), other)
        least = program.given_bytes + max(least_temporaries(known, before, changed.train) for before, known in failed)
        if least > plan.capacity:
            print(f"  with {words}: {gib(least)} GiB at least", flush=True)
            continue
        if len(failed) > tries:
            print(f"  not tried: {words} and what costs more; --advise N tries N changes", flush=True)
            return None
        print(f"  with {words} ...", end=" ", flush=True)
        tried = compile_plan(program, on.chip, on.memory)
        if tried.fits:
            print(f"fits:\n{described(tried)}", flush=True)
            return {"change": named, "program": tried.to_json()}
        print(f"{gib(tried.exceeded)} GiB too much", flush=True)
        failed.append((changed.train, tried))
    print("  no change was found that fits", flush=True)
    return None


def swept(config: "ConfigDict", on: "Topology", name: str) -> dict[str, Any]:
    """Compiles the update for each sensible size of the fsdp axis, and ranks them by their roofs."""
    from ldm_jax.training import programs
    from ldm_jax.training.plan import compile_plan

    plain, mesh, notes = fitted(config, on.devices)
    print(headline(plain, mesh, on, name), *notes, sep="\n", flush=True)
    found: list[tuple[int, Plan]] = []
    slice_size = mesh.size // mesh.shape["slices"]
    sizes = [2**i for i in range(slice_size.bit_length()) if slice_size % 2**i == 0]
    for fsdp in sizes:
        changed, other, _ = fitted(config, on.devices, **{"mesh.data": -1, "mesh.fsdp": fsdp})
        program = programs.train_step(programs.plan_stage(changed), other)
        plan = compile_plan(program, on.chip, on.memory)
        found.append((fsdp, plan))
        print("  " + ", ".join(filter(None, (f"fsdp={fsdp}: {gib(plan.total)} GiB", verdict(plan), times(plan)))), flush=True)
        if on.memory and fsdp > 1 and program.given_bytes < 0.02 * on.memory:
            break  # to split what is small already only adds to what is gathered
    fitting = [each for each in found if each[1].fits is not False]
    ranked = sorted(fitting, key=lambda each: (each[1].roofs.step, each[0])) if on.chip else []  # type: ignore[union-attr]
    said = "best first: " + ", ".join(f"fsdp={fsdp}" for fsdp, _ in ranked) if ranked else "not ranked: roofs of this chip are not known"
    print(said if fitting else "none fits", flush=True)
    return {"fits": bool(fitting), "notes": notes, "sweep": [{"fsdp": fsdp, **plan.to_json()} for fsdp, plan in found]}


def headline(config: "ConfigDict", mesh: "Mesh", on: "Topology", name: str) -> str:
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    kind = on.chip.name if on.chip else mesh.devices.flat[0].device_kind
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
