"""Models of other programs to model directories, and back.

python -m ldm_jax.convert --from compvis --checkpoint model.ckpt --yaml config.yaml --output models/ldm
python -m ldm_jax.convert --from diffusers --checkpoint FOLDER --output models/ldm
python -m ldm_jax.convert --to diffusers --model models/ldm --output FOLDER
python -m ldm_jax.convert --to compvis --model models/ldm --output FOLDER
"""

import argparse
import os
from pathlib import Path

from ldm_jax import cli
from ldm_jax.config import UserError
from ldm_jax.paths import local

FORMATS = ("compvis", "diffusers")
# What each way needs, and what else it takes.
_IMPORT = ("tokenizer", "dtype")
_FLAGS: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("from", "compvis"): (("checkpoint", "yaml"), ("no_ema", "key", "resolution", *_IMPORT)),
    ("from", "diffusers"): (("checkpoint",), ("variant", *_IMPORT)),
    ("to", "compvis"): (("model",), ()),
    ("to", "diffusers"): (("model",), ()),
}


def parser() -> cli.Parser:
    p = cli.Parser(description="Converts models of other programs to model directories, and back.")
    way = p.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", choices=FORMATS, help="what --checkpoint is")
    way.add_argument("--to", dest="target", choices=FORMATS, help="what --output shall be")
    p.add_argument("--checkpoint", help="compvis: a .ckpt, .pt or .safetensors file; diffusers: a folder")
    p.add_argument("--yaml", help="compvis: the configuration that the checkpoint was trained with")
    p.add_argument("--no-ema", action="store_true", help="compvis: the plain weights, not their moving averages")
    p.add_argument("--key", help="compvis: which dict of a .ckpt holds the weights, where it has several")
    p.add_argument("--resolution", type=int, help="compvis: of the pictures in pixels (default: what the configuration says)")
    p.add_argument("--variant", help="diffusers: of the weight files, such as fp16 (default: those without any in their names)")
    p.add_argument("--tokenizer", help="a tokenizer.json, or a folder or name of Hugging Face, where the model brings none")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights in a model directory (default: float32)")
    p.add_argument("--model", help="with --to: a model or work directory")
    p.add_argument("--output", required=True, help="the folder to write; there must be nothing there yet")
    return p


def main() -> int:
    args = parser().parse_args()
    way, kind = ("to", args.target) if args.target else ("from", args.source)
    _check_flags(args, way, kind)
    _check_output(args.output)
    for flag in ("checkpoint", "yaml"):
        local(getattr(args, flag) or "", f"--{flag}")
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is computed: an accelerator would only be reserved
    cli.start()
    print("\n".join(_export(args) if args.target else _import(args)))
    return cli.OK


def _check_flags(args: argparse.Namespace, way: str, kind: str) -> None:
    needed, taken = _FLAGS[way, kind]
    given = {name for flags in _FLAGS.values() for names in flags for name in names if getattr(args, name)}
    for names, what in ((set(needed) - given, "needs"), (given - {*needed, *taken}, "takes no")):
        if names:
            raise UserError(f"--{way} {kind} {what} {', '.join('--' + name.replace('_', '-') for name in sorted(names))}; see --help")


def _check_output(output: str) -> None:
    """Raises UserError where something is there: what is written takes the place of all of it."""
    if "://" in output:
        raise UserError(f"{output} is no folder of a local disk: convert to one, then copy it")
    folder = Path(output)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise UserError(f"{output} is there already: choose another --output, or remove it")


def _import(args: argparse.Namespace) -> list[str]:
    """Writes a model directory, and returns what to tell the user."""
    import ml_dtypes
    import numpy as np

    dtype = np.dtype(ml_dtypes.bfloat16 if args.dtype == "bfloat16" else np.float32)
    tokenizer = args.tokenizer or ""
    if args.source == "compvis":
        from ldm_jax.interop.compvis import import_checkpoint

        ema = not args.no_ema
        notes = import_checkpoint(args.checkpoint, args.yaml, args.output, ema, tokenizer, dtype, args.key, args.resolution)
    else:
        from ldm_jax.interop.pipelines import import_folder

        notes = import_folder(args.checkpoint, args.output, tokenizer, dtype, args.variant or "")
    return [*(f"note: {note}" for note in notes), f"model: {args.output}"]


def _export(args: argparse.Namespace) -> list[str]:
    from ldm_jax.interop.exporting import export_checkpoint, export_folder
    from ldm_jax.model_directory import find_finished

    export = export_checkpoint if args.target == "compvis" else export_folder
    return [f"{args.output}: {export(find_finished(args.model), args.output)}"]


if __name__ == "__main__":
    cli.guarded(main)
