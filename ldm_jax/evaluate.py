"""How good a model is, or a set of samples: FID and its like, in `report.json` and `report.html`.

python -m ldm_jax.evaluate --output DIR --model DIR [--num N]                    samples of a model against its own data
python -m ldm_jax.evaluate --output DIR --samples PATH --reference PATH          samples that are there
python -m ldm_jax.evaluate --output DIR --model DIR --reconstructions            its first stage
python -m ldm_jax.evaluate --config FILE --write-reference FILE.npz              statistics of a configuration's data

A stopped or killed job goes on where it was when the same command is run again.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_jax import cli
from ldm_jax.config import UserError
from ldm_jax.paths import remove_tree, resolve
from ldm_jax.sample import add_drawing, read_prompts

if TYPE_CHECKING:
    from ldm_jax.evaluation.job import Tools

_WEIGHTS = ("inception", "dino", "clip", "vgg", "lpips")


def parser() -> cli.Parser:
    p = cli.Parser(description=__doc__.split("\n")[0], epilog="Fields of the configuration are set by --config.group.field=value.")
    p.add_argument("--output", metavar="DIR", help="where the report goes, and what the job makes on its way")
    what = p.add_argument_group("what is evaluated")
    what.add_argument("--samples", metavar="PATH", help="a folder or .zip of pictures, or an .npz in ADM's form")
    what.add_argument("--model", metavar="DIR", help="a work directory or a model directory, which is sampled")
    what.add_argument("--num", type=int, help="samples, or pictures that are reconstructed (50000, or as many as there are)")
    what.add_argument("--reconstructions", action="store_true", help="evaluate the first stage of --model, on the reference's pictures")
    what.add_argument("--paired", action="store_true", help="picture i of --samples is a reconstruction of picture i of the reference")
    against = p.add_argument_group("what it is held against")
    against.add_argument(
        "--reference", metavar="PATH", help="pictures, or stored statistics (ADM, pytorch-fid, clean-fid, EDM2, or our own)"
    )
    against.add_argument(
        "--config", metavar="FILE[:PRESET]", help="a configuration whose data are the reference (default: that of --model)"
    )
    against.add_argument("--crop", type=int, metavar="PIXELS", help="crop and resize the reference's pictures, as ADM does")
    against.add_argument("--write-reference", metavar="FILE.npz", help="measure the reference, write its statistics, and be done")
    against.add_argument("--reference-num", type=int, metavar="N", help="of the data only N pictures, drawn at random and always the same")
    told = p.add_argument_group("what a model is told; by default what its own data say")
    told.add_argument("--prompts-file", metavar="FILE", help="a prompt a line: those of the model, or of --samples in their order")
    told.add_argument(
        "--labels", choices=("balanced", "random", "data"), help="classes: as many of each (default), drawn by chance, or those of the data"
    )
    p.add_argument("--sweep", metavar="NAME=A,B,...", help="samples for each value of an option, such as guidance=1,1.5,2,3")
    weights = p.add_argument_group("weights of the networks that measure; or in the environment, as LDM_INCEPTION and so on")
    for name in _WEIGHTS:
        weights.add_argument(f"--{name}", metavar="PATH")
    weights.add_argument("--any-weights", action="store_true", help="take an --inception that is not the FID's")
    p.add_argument("--measure-batch", type=int, default=64, metavar="N", help="pictures that are measured at once (64)")
    p.add_argument("--allow-small", action="store_true", help="give Fréchet distances of fewer samples than features")
    p.add_argument("--keep-features", action="store_true", help="leave the features in DIR/features")
    add_drawing(p)
    p.add_argument("--coordinator", help="address of process 0, for several processes that no cluster environment describes")
    p.add_argument("--num-processes", type=int)
    p.add_argument("--process-id", type=int)
    return p


def check(args: Any, overrides: list[str]) -> None:
    """Raises UserError for flags that do not go together."""
    if args.write_reference:
        if not args.write_reference.endswith(".npz"):
            raise UserError(f"--write-reference writes an .npz, not {args.write_reference}")
        if args.samples or args.model or not (args.config or args.reference):
            raise UserError("--write-reference measures a reference alone: give --config or --reference, without --samples and --model")
        if args.allow_small or args.keep_features or args.output:
            raise UserError("--write-reference leaves statistics alone: --output, --allow-small and --keep-features have no effect")
    elif (args.samples is None) == (args.model is None):
        raise UserError("give --samples (pictures that are there) or --model (pictures are drawn)")
    elif not args.output:
        raise UserError("give --output, a directory for the report")
    if overrides and not (args.config or args.model):
        raise UserError(f"unknown argument {overrides[0]!r}")
    if args.crop and not args.reference:
        raise UserError("--crop is of the pictures of --reference; those of a configuration have data.resolution")
    if args.paired and args.prompts_file:
        raise UserError("--prompts-file is of samples, and not of reconstructions")
    for name in ("num", "reference_num", "measure_batch", "crop"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if args.guidance and len(args.guidance) > 1:
        raise UserError("one --guidance; several are compared by --sweep guidance=1,2,...")
    if (args.vgg is None) != (args.lpips is None):
        raise UserError("LPIPS needs both --vgg and --lpips")


def check_effects(args: Any) -> None:
    """Raises UserError for flags that have no effect on what is evaluated. (Of a model without a denoiser it is known once it is read.)"""
    from ldm_jax.training import evaluation_job as kinds

    if args.write_reference:
        kinds.check_effect(args, kinds.WRITTEN, "--write-reference measures the reference")
    elif args.samples:
        kinds.check_effect(args, kinds.SAMPLES, "--samples are measured as they are")
    elif args.reconstructions:
        kinds.check_effect(args, kinds.FIRST_STAGE, "a first stage reconstructs pictures")
    else:
        kinds.check_effect(args, kinds.DRAWN, "pictures are drawn from the --model")


def sweep_of(text: str | None) -> tuple[str, list[float]]:
    """The option and the values of a sweep, ("", []) for none. Raises UserError."""
    if text is None:
        return "", []
    name, _, values = text.partition("=")
    name, known = name.replace("-", "_"), {"guidance": float, "guidance_rescale": float, "steps": int, "eta": float}
    if name not in known:
        raise UserError(f"--sweep goes over {', '.join(known)}, not over {name!r}")
    try:
        numbers: list[float] = [known[name](value) for value in values.split(",")]
    except ValueError as error:
        raise UserError(f"--sweep {text}: {error}; write {name}=A,B,...") from error
    if len(set(numbers)) != len(numbers) or len(numbers) < 2:
        raise UserError(f"--sweep {text}: give two values or more, each once")
    return name, numbers


def main() -> int:
    args, overrides = parser().parse_known_args()
    check(args, overrides)
    swept = sweep_of(args.sweep)
    prompts = read_prompts(None, args.prompts_file)
    cli.start("auto", args.coordinator, args.num_processes, args.process_id)
    from ldm_jax.training.signals import stopping_at_once

    with stopping_at_once():
        evaluate(args, overrides, prompts, swept)
    return cli.OK


def evaluate(args: Any, overrides: list[str], prompts: list[str] | None, swept: tuple[str, list[float]]) -> None:
    """What the flags ask for, once the process is set up. Raises UserError."""
    from ldm_jax.evaluation.job import open_tools

    check_effects(args)
    tools = open_tools({name: getattr(args, name) for name in _WEIGHTS}, args.measure_batch, args.allow_small, args.any_weights)
    if args.write_reference:
        write_reference(args, overrides, tools)
        return
    import ldm_jax
    from ldm_jax.training.evaluation_job import Evaluation

    output, command = resolve(args.output), ["python", "-m", "ldm_jax.evaluate", *sys.argv[1:]]
    lines = Evaluation(args, overrides, tools, prompts, swept, command, ldm_jax.load).run(output)
    remove(output / "features", args.keep_features)
    print("\n".join(lines))
    print(f"report: {output / 'report.html'}")


def remove(features: Path, keep: bool) -> None:
    """Removes what was measured once no process reads it any more, unless it is to be kept."""
    import jax

    from ldm_jax.sharding.processes import wait_for_all

    wait_for_all()
    if not keep and jax.process_index() == 0:
        remove_tree(features)


def write_reference(args: Any, overrides: list[str], tools: "Tools") -> None:
    """Measures the reference and leaves its statistics in a file. Raises UserError."""
    from ldm_jax.evaluation import job
    from ldm_jax.training.evaluation_job import reference_of

    path = resolve(args.write_reference)
    directory = path.with_name(f".{path.name}.features")  # a killed job goes on here
    reference = reference_of(args, overrides, path.parent)
    if reference is None or reference.pictures is None:
        raise UserError("--write-reference needs pictures, and the reference is of statistics alone")
    found = job.write_reference(tools, reference.pictures, directory, path)
    remove(directory, False)
    print(f"{path}: {len(reference.pictures)} pictures, {', '.join(found)}")


if __name__ == "__main__":
    cli.keep_freed_memory()
    cli.guarded(main)
