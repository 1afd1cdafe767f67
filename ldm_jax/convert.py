"""Models of other programs to model directories, and back.

python -m ldm_jax.convert --from compvis --checkpoint model.ckpt --yaml config.yaml --output models/ldm
python -m ldm_jax.convert --from diffusers --checkpoint FOLDER --output models/ldm
python -m ldm_jax.convert --to diffusers --model models/ldm --output FOLDER
"""

from pathlib import Path

from ldm_jax import cli
from ldm_jax.config import UserError

FORMATS = ("compvis", "diffusers")


def main() -> int:
    parser = cli.Parser(description="Converts models of other programs to model directories, and back.")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", choices=FORMATS, help="what --checkpoint is")
    way.add_argument("--to", dest="target", choices=FORMATS, help="what --output shall be")
    parser.add_argument("--checkpoint", help="compvis: a .ckpt, .pt or .safetensors file; diffusers: a folder")
    parser.add_argument("--yaml", help="compvis: the configuration that the checkpoint was trained with")
    parser.add_argument("--no-ema", action="store_true", help="compvis: the plain weights, not their moving averages")
    parser.add_argument(
        "--tokenizer", default="", help="a tokenizer.json, or a folder or name of Hugging Face, where the model brings none"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights in a model directory")
    parser.add_argument("--model", help="with --to: a model or work directory")
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    needed = {"--model": args.model} if args.target else {"--checkpoint": args.checkpoint}
    if args.source == "compvis":
        needed["--yaml"] = args.yaml
    if missing := [name for name, value in needed.items() if not value]:
        raise UserError(f"{', '.join(missing)} is needed; see --help")
    _check_output(Path(args.output))
    cli.start()
    if args.target:
        from ldm_jax.interop.exporting import export_checkpoint, export_folder
        from ldm_jax.training.run import find_model

        model = find_model(args.model)
        what = export_folder(model, args.output) if args.target == "diffusers" else export_checkpoint(model, args.output)
        print(f"{args.output}: {what}")
        return cli.OK
    import numpy as np

    dtype = np.dtype(args.dtype) if args.dtype == "float32" else _bfloat16()
    if args.source == "compvis":
        from ldm_jax.interop.compvis import import_checkpoint

        notes = import_checkpoint(args.checkpoint, args.yaml, args.output, not args.no_ema, args.tokenizer, dtype)
    else:
        from ldm_jax.interop.pipelines import import_folder

        notes = import_folder(args.checkpoint, args.output, args.tokenizer, dtype)
    for note in notes:
        print(f"note: {note}")
    print(f"model: {args.output}")
    return cli.OK


def _check_output(output: Path) -> None:
    """Raises UserError where something is there: what is written takes the place of all of it."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is there already: choose another --output, or remove it")


def _bfloat16():  # type: ignore[no-untyped-def]
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16)


if __name__ == "__main__":
    cli.guarded(main)
