"""Images from a trained model, as PNG files and one grid.

python -m ldm_jax.sample --model DIR --output DIR [--prompt TEXT] [--label CLASS ...] [--num N]
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ldm_jax import cli
from ldm_jax.config import UserError, write_bytes


def parser() -> cli.Parser:
    p = cli.Parser(description="Draws images from a trained model. What is not given is the model's own default.")
    p.add_argument("--model", required=True, help="a work directory or a model directory")
    p.add_argument("--output", required=True, help="directory for the images")
    p.add_argument("--prompt", help="a text, for every image")
    p.add_argument("--prompts-file", help="a text file with a prompt a line, one image each")
    p.add_argument("--negative", help="a text to move away from")
    p.add_argument("--label", "--class", type=int, nargs="+", metavar="CLASS", help="a class for all images, or one for each, from 0")
    p.add_argument("--num", type=int, help="images (default: one for each prompt or class)")
    p.add_argument("--steps", type=int)
    p.add_argument("--guidance", type=float, nargs="+", help="scale, 1 is none; one number, or one for each image")
    p.add_argument("--guidance-kind", choices=("cfg", "cfg++", "apg"))
    p.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="levels of sigma/alpha that are guided")
    p.add_argument("--guidance-rescale", type=float, help="0 to 1: how far the result's deviation is brought back")
    p.add_argument("--weak", help="a work or model directory: a weaker model to move away from (autoguidance)")
    p.add_argument("--init-image", help="a picture to start from (--strength), or to keep outside a hole (--hole)")
    p.add_argument("--strength", type=float, help="in (0, 1]: the share of the steps that are run from --init-image")
    p.add_argument("--hole", help="a picture, white where --init-image is painted anew and black where it stays")
    p.add_argument("--states", type=int, metavar="K", help="also write states.png: a row for each image, its states after every K steps")
    p.add_argument("--sampler")
    p.add_argument("--spacing")
    p.add_argument("--eta", type=float)
    p.add_argument("--seed", type=int)
    p.add_argument("--batch-size", type=int)
    p.add_argument("--step", type=int, help="of a work directory: the checkpoint to use in place of the finished model")
    p.add_argument("--ema", help="of a work directory: the decay of the average to use")
    p.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    return p


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


_FLAGS = {"text": "--prompt", "label": "--label"}


def check_inputs(takes: Collection[str], given: Collection[str]) -> None:
    """Raises UserError where a model that takes these inputs is given others, or lacks one; a text may be left out."""
    flags = ", ".join(_FLAGS.get(name, name) for name in takes) or "--num alone"
    if unknown := [_FLAGS[name] for name in given if name not in takes]:
        raise UserError(f"this model takes no {', '.join(unknown)}: it takes {flags}")
    if missing := [name for name in takes if name not in (*given, "text")]:
        beyond = [name for name in missing if name not in _FLAGS]
        how = f"give it in Python: ldm_jax.load(...).sample({beyond[0]}=[...])" if beyond else "one for every image, or one for each"
        raise UserError(f"this model needs {', '.join(_FLAGS.get(name, name) for name in missing)}: {how}")


def captions_of(prompts: list[str] | None, labels: list[int] | None, num: int) -> list[str] | None:
    """What is written under each of `num` images."""
    lines = [text if len(text) > 1 else text * num for text in (prompts, [f"class {i}" for i in labels or []]) if text]
    return [", ".join(line) for line in zip(*lines, strict=True)] or None


def read_image(file: str, side: int) -> Any:
    """A picture, cropped to a square and resized to that side: uint8 [side,side,3]. Raises UserError."""
    from ldm_jax.data.sources import BROKEN, decode_image
    from ldm_jax.data.transforms import center_crop

    try:
        return center_crop(decode_image(Path(file)), side)
    except BROKEN as error:
        raise UserError(f"cannot read the picture {file}: {error}") from error


def main() -> int:
    args = parser().parse_args()
    prompts = read_prompts(args.prompt, args.prompts_file)
    inputs: dict[str, Any] = {name: value for name, value in (("text", prompts), ("label", args.label)) if value is not None}
    cli.start()
    from etils import epath
    from PIL import Image

    import ldm_jax
    from ldm_jax.training.preview import png_bytes, save_grid

    model = ldm_jax.load(args.model, args.step, args.ema, args.dtype)
    names = ["num", "steps", "sampler", "seed", "negative", "eta", "spacing", "batch_size", "strength"]
    names += ["guidance_kind", "guidance_interval", "guidance_rescale"]
    guidance = args.guidance[0] if args.guidance and len(args.guidance) == 1 else args.guidance
    weak = ldm_jax.load(args.weak, dtype=args.dtype) if args.weak else None
    init = read_image(args.init_image, model.info["resolution"])[None] if args.init_image else None
    if model.denoiser is not None:
        check_inputs(
            [c.name for c in model.denoiser.conditioning.conditioners],
            inputs | ({"text": args.negative} if args.negative is not None else {}),
        )
    hole = read_image(args.hole, model.info["resolution"])[None, ..., 0] > 127 if args.hole else None
    options = {name: getattr(args, name) for name in names}
    options |= {"guidance": guidance, "weak": weak, "init_images": init, "holes": hole}
    states = None
    if args.states is None:
        images = model.sample(**inputs, **options)
    else:
        images, states = model.sample_states(args.states, **inputs, **options)
    output = epath.Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {output}: {error.strerror or error}") from error
    for i, image in enumerate(images):
        write_bytes(output / f"{i:05d}.png", png_bytes(Image.fromarray(image)))
    save_grid(output / "grid.png", images, min(8, len(images)), captions_of(prompts, args.label, len(images)))
    if states is not None and len(states):
        rows = states.swapaxes(0, 1)
        save_grid(output / "states.png", rows.reshape(-1, *rows.shape[2:]), len(states), None)
    print(f"{len(images)} images: {output}")
    return cli.OK


if __name__ == "__main__":
    cli.keep_freed_memory()
    cli.guarded(main)
