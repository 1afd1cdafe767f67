"""Images from a trained model, as PNG files and one grid.

python -m ldm_jax.sample --model DIR --output DIR [what the model is told: --prompt, --class, --boxes, --image, ...] [--num N]
"""

import json
from collections.abc import Collection, Sequence
from typing import Any

from ldm_jax import cli
from ldm_jax.config import UserError
from ldm_jax.paths import make_directory, resolve, write_bytes

# Of `LatentDiffusion.sample`, as the flags of the same names.
_OPTIONS: tuple[str, ...] = ("num", "steps", "sampler", "seed", "negative", "eta", "spacing", "batch_size", "strength")
_OPTIONS += ("size", "tile", "decode_tile", "tile_passes")
_OPTIONS += ("guidance_kind", "guidance_interval", "guidance_rescale", "guidance_parallel", "guidance_radius", "guidance_momentum")


def parser() -> cli.Parser:
    p = cli.Parser(description="Draws images from a trained model. What is not given is the model's own default.")
    p.add_argument("--model", required=True, help="a work directory or a model directory")
    p.add_argument("--output", required=True, help="directory for the images")
    told = p.add_argument_group("what the model is told, one for all images or one for each")
    told.add_argument("--prompt", help="a text, for every image")
    told.add_argument("--prompts-file", help="a text file with a prompt a line, one image each")
    told.add_argument("--negative", help="a text to move away from")
    told.add_argument("--label", "--class", type=int, nargs="+", metavar="CLASS", help="classes, from 0")
    told.add_argument("--boxes", nargs="+", metavar="FILE", help='JSON: [{"class": 8, "box": [x0, y0, x1, y1]}, ...], in shares')
    told.add_argument("--crop", nargs=4, type=float, metavar=("X0", "Y0", "X1", "Y1"), help="the part of the whole that --boxes are in")
    told.add_argument("--segmentation", nargs="+", metavar="PICTURE", help="maps of classes: palette or gray values are their numbers")
    told.add_argument("--image", nargs="+", metavar="PICTURE", help="pictures to enlarge, or whose holes (--mask) are filled")
    told.add_argument("--mask", nargs="+", metavar="PICTURE", help="white where --image is painted anew, black where it stays")
    told.add_argument("--neighbors", metavar="FILE", help=".npy of embeddings, [n,D], or [N,n,D] for N images; see ldm_jax.neighbors")
    p.add_argument("--num", type=int, help="images (default: one for each input)")
    p.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="in pixels (default: as in training)")
    p.add_argument("--tile", type=int, metavar="PIXELS", help="draw and decode large pictures in overlapping windows, blended")
    p.add_argument("--decode-tile", type=int, metavar="PIXELS", help="encode and decode them so, but draw them as one")
    p.add_argument(
        "--tile-passes",
        type=int,
        help="0: the autoencoder's windows are independent; 1 (default) or more: statistics of the whole picture",
    )
    p.add_argument("--weak", help="a work or model directory: a weaker model to move away from (autoguidance)")
    p.add_argument("--init-image", help="a picture to start from (--strength), or to keep outside a hole (--hole), by any model")
    p.add_argument("--strength", type=float, help="in (0, 1]: the share of the steps that are run from --init-image")
    p.add_argument("--hole", help="a picture, white where --init-image is painted anew and black where it stays")
    p.add_argument("--states", type=int, metavar="K", help="also write states.png: a row for each image, its states after every K steps")
    p.add_argument("--npz", action="store_true", help="also write samples.npz, as ADM's evaluation takes it")
    add_drawing(p)
    return p


def add_drawing(p: cli.Parser) -> None:
    """The flags of how samples are drawn, and by which weights of a run."""
    p.add_argument("--steps", type=int, help="of the sampler")
    p.add_argument("--guidance", type=float, nargs="+", help="scale, 1 is none; one number, or one for each image")
    p.add_argument("--guidance-kind", choices=("cfg", "cfg++", "apg"))
    p.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="levels of sigma/alpha that are guided")
    p.add_argument("--guidance-rescale", type=float, help="0 to 1: how far the result's deviation is brought back")
    p.add_argument("--guidance-parallel", type=float, help="apg: share of the difference along the picture that is kept")
    p.add_argument("--guidance-radius", type=float, help="apg: largest norm of the difference, 0 for none")
    p.add_argument("--guidance-momentum", type=float, help="apg: factor of the differences before, usually negative")
    p.add_argument("--sampler", help="docs/samplers.md compares them")
    p.add_argument("--spacing", help="of the levels that the sampler visits")
    p.add_argument("--eta", type=float, help="ddim: share of the ancestral noise, 0 to 1")
    p.add_argument("--seed", type=int, help="image i is a function of it, i and what it is told")
    p.add_argument("--batch-size", type=int, help="images that are drawn at once")
    p.add_argument("--step", type=int, help="of a work directory: the checkpoint to use in place of the finished model")
    p.add_argument("--ema", help="of a work directory: the decay of the average to use")
    p.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))


def read_prompts(prompt: str | None, file: str | None) -> list[str] | None:
    """The prompts of the flags. Raises UserError."""
    if file is None:
        return None if prompt is None else [prompt]
    if prompt is not None:
        raise UserError("give --prompt or --prompts-file, not both")
    try:
        with open(file, encoding="utf-8") as lines:
            prompts = [line.strip() for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    if not prompts:
        raise UserError(f"{file} holds no prompt")
    return prompts


def flag(name: str) -> str:
    """The flag that gives an input of a model."""
    return {"text": "--prompt", "low_res": "--image", "label": "--class"}.get(name, f"--{name}")


def check_inputs(takes: Sequence[str], given: Collection[str]) -> None:
    """Raises UserError where a model that takes these inputs is given flags for others, or lacks one; a text may be left out."""
    known = [flag(name) for name in takes]
    besides = {"--negative": "--prompt", "--crop": "--boxes"}
    if unknown := [name for name in given if besides.get(name, name) not in known]:
        raise UserError(f"this model takes no {', '.join(unknown)}: it takes {', '.join(known) or '--num alone'}")
    if missing := [name for name in known if name not in (*given, "--prompt")]:
        raise UserError(f"this model needs {', '.join(missing)}: one for every image, or one for each")


def read_inputs(args: Any, prompts: list[str] | None, takes: Sequence[str], size: tuple[int, int]) -> dict[str, list[Any]]:
    """The inputs of a model by the flags and the prompts that they gave; pictures are cropped to `size` (H, W), but for those to enlarge.

    Raises UserError.
    """
    from ldm_jax.data.given import fitted, read_boxes, read_neighbors, read_picture

    names = ("negative", "label", "boxes", "crop", "segmentation", "image", "mask", "neighbors")
    given = [flag(name) for name in names if getattr(args, name) is not None]
    check_inputs(takes, [*(["--prompt"] if prompts else []), *given])
    inputs: dict[str, list[Any]] = {} if prompts is None else {"text": prompts}
    if args.label is not None:
        inputs["label"] = args.label
    if args.boxes:
        inputs["boxes"] = [read_boxes(file) for file in args.boxes]
    if args.crop:
        inputs["crop"] = [args.crop]
    if args.neighbors:
        inputs["neighbors"] = read_neighbors(args.neighbors)
    if "low_res" in takes and args.image:
        inputs["low_res"] = [read_picture(file) for file in args.image]
    if args.segmentation:
        maps = [{"segmentation": read_picture(file, "segmentation")} for file in args.segmentation]
        inputs["segmentation"] = [fitted(one, size)["segmentation"] for one in maps]
    if "mask" in takes:
        inputs |= _with_holes(args.image, args.mask, size)
    return inputs


def _with_holes(images: Sequence[str], masks: Sequence[str], size: tuple[int, int]) -> dict[str, list[Any]]:
    """Pictures with their masks, or one of either for all of the other."""
    from ldm_jax.data.given import fitted, read_picture

    total = max(len(images), len(masks))
    if {len(images), len(masks)} - {1, total}:
        raise UserError(f"{len(images)} pictures by --image and {len(masks)} by --mask: give as many, or one")
    pairs = [(images[i % len(images)], masks[i % len(masks)]) for i in range(total)]
    made = [fitted({"image": read_picture(image), "mask": read_picture(mask, "mask")}, size) for image, mask in pairs]
    return {name: [pair[name] for pair in made] for name in ("image", "mask")}


def captions_of(inputs: dict[str, list[Any]], num: int) -> list[str] | None:
    """What is written under each of `num` images."""
    lines = [inputs.get("text", []), [f"class {i}" for i in inputs.get("label", [])]]
    return [", ".join(line) for line in zip(*(text if len(text) > 1 else text * num for text in lines if text), strict=True)] or None


def main() -> int:
    args = parser().parse_args()
    prompts = read_prompts(args.prompt, args.prompts_file)  # before anything slow
    cli.start()
    import numpy as np

    import ldm_jax
    from ldm_jax.data.given import fitted, read_picture

    output = resolve(args.output)
    model = ldm_jax.load(args.model, args.step, args.ema, args.dtype)
    size = tuple(args.size or (model.info["resolution"],) * 2)
    inputs = read_inputs(args, prompts, model.inputs, size) if model.denoiser is not None else {}
    start: dict[str, Any] = {"image": read_picture(args.init_image)} if args.init_image else {}
    start |= {"mask": read_picture(args.hole, "mask")} if args.hole else {}
    start = {name: made[None] for name, made in fitted(start, size).items()} if start else {}
    options = {name: value for name in _OPTIONS if (value := getattr(args, name, None)) is not None}
    if args.guidance:
        options["guidance"] = args.guidance[0] if len(args.guidance) == 1 else args.guidance
    weak = ldm_jax.load(args.weak, dtype=args.dtype) if args.weak else None
    drawing: Any = {**inputs, **options, "weak": weak, "init_images": start.get("image"), "holes": start.get("mask")}
    states = None
    if args.states is None:
        images = model.sample(**drawing)
    else:
        images, states = model.sample_states(args.states, **drawing)
    make_directory(output)
    given = {name: value for name, value in vars(args).items() if value is not None and name not in ("output", "npz", "states")}
    write(output, images, states, captions_of(inputs, len(images)), given)
    if args.npz:
        labels = {"arr_1": np.resize(np.asarray(args.label, np.int64), len(images))} if args.label else {}
        write_npz(output / "samples.npz", {"arr_0": images, **labels})
    print(f"{len(images)} images: {output}")
    return cli.OK


def write(output: Any, images: Any, states: Any, captions: list[str] | None, given: dict[str, Any]) -> None:
    """Images uint8 [N,H,W,3], each with its number and what was asked for as `parameters`, a grid of all, and one of states."""
    from PIL import Image

    from ldm_jax.training.preview import png_bytes, save_grid

    for i, image in enumerate(images):
        parameters = {**given, "index": i, **({"caption": captions[i]} if captions else {})}
        write_bytes(output / f"{i:05d}.png", png_bytes(Image.fromarray(image), {"parameters": json.dumps(parameters, ensure_ascii=False)}))
    save_grid(output / "grid.png", images, min(8, len(images)), captions)
    if states is not None and len(states):
        rows = states.swapaxes(0, 1)
        save_grid(output / "states.png", rows.reshape(-1, *rows.shape[2:]), len(states), None)


def write_npz(path: Any, arrays: dict[str, Any]) -> None:
    """Arrays in the form of ADM's evaluation: `arr_0` uint8 [N,H,W,3] and, of classes, `arr_1` int64 [N]."""
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


if __name__ == "__main__":
    cli.keep_freed_memory()
    cli.guarded(main)
