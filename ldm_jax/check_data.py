"""`python -m ldm_jax.check_data --config FILE[:PRESET] [--output DIR] [--config.group.field=value ...]`: is the data fit to be trained on?

Reads what the training of that configuration would read, every picture once, and prints what is there: numbers, classes, sizes, captions,
broken files by name. DIR gets `sample.png`, pictures as the training sees them, and `broken_images.txt`. Trains nothing.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_jax import cli
from ldm_jax.config import UserError
from ldm_jax.paths import resolve

if TYPE_CHECKING:
    import numpy as np
    from ml_collections import ConfigDict

    from ldm_jax.data.survey import Survey

_PAGE, _COLUMNS = 32, 8
_TILE = 128  # pixels that small pictures are enlarged to, at most
_NAMED = 10  # broken files that are named on the screen


def parser() -> cli.Parser:
    flags = cli.Parser(
        description="Looks at the data that a configuration would train on.",
        epilog="Any field of the configuration is set by --config.group.field=value.",
    )
    flags.add_argument("--config", required=True, metavar="FILE[:PRESET]", help="a file under configs/, with a preset of it")
    flags.add_argument("--output", default="data_check", metavar="DIR", help="where sample.png and broken_images.txt go (data_check)")
    flags.add_argument("--examples", type=int, default=0, metavar="N", help="look at N of the examples, drawn at random (all)")
    return flags


def main() -> int:
    args, overrides = parser().parse_known_args()
    from ldm_jax import config as configs

    config = configs.from_command(args.config, overrides)
    from ldm_jax.data.sources import needed_fields, open_data

    output, needs = _made(resolve(args.output)), needed_fields(config)
    source: Any = open_data(config.data, needs)
    asked = f"with {', '.join(needs)}" if needs else "of which the pictures alone are read"
    print(f"examples: {len(source):,} {asked} ({source.fingerprint()})", flush=True)
    found = look(source, args.examples, config)
    lines = _describe(found, source, config) + _tokens(found, config) + _broken(found, source, output)
    _print(lines, sys.stdout)
    if found.good:
        _write_page(source, found, config, output / "sample.png")
        print(f"sample: {output / 'sample.png'}")
    wrong = problems(found, source, config)
    _print([f"error: {problem}" for problem in wrong], sys.stderr)
    return cli.BAD_INPUT if wrong else cli.OK


def look(source: Any, examples: int, config: "ConfigDict") -> "Survey":
    """The survey of so many examples, drawn by `config.seed`, or of all (0), with a progress bar."""
    import numpy as np
    from tqdm import tqdm

    from ldm_jax.data.survey import survey

    indices: Sequence[int] = range(len(source))
    if 0 < examples < len(source):
        indices = np.sort(np.random.default_rng(config.seed).choice(len(source), examples, replace=False)).tolist()
    return survey(source, tqdm(indices, desc="check", unit="image", mininterval=2), config.data.workers)


def problems(found: "Survey", source: Any, config: "ConfigDict") -> list[str]:
    """Why the data cannot be trained on; empty where they can."""
    from ldm_jax.data.reliable import broken_message

    looked, group = len(found.good) + len(found.broken), config.conditioning
    wrong = []
    if len(found.broken) > config.data.max_broken * looked or not found.good:
        first = source.name(found.broken[0][0])
        wrong.append(broken_message(len(found.broken), looked, config.data.max_broken, first))
    for field, counts, limit, setting in (
        ("classes", found.labels, group.label.num_classes, "conditioning.label.num_classes"),
        ("classes of boxes", found.box_classes, group.boxes.vocab_size - 1, "conditioning.boxes.vocab_size (one more than the classes)"),
        ("classes of the segmentation", found.map_classes, group.segmentation.num_classes, "conditioning.segmentation.num_classes"),
    ):
        if counts and not 0 <= min(counts) <= max(counts) < limit:
            wrong.append(f"{field} lie in [{min(counts)}, {max(counts)}], but must in [0, {limit}): set {setting}")
    return wrong


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {directory}: {error.strerror or error}; choose another --output") from error
    return directory


def _print(lines: Sequence[str], stream: Any) -> None:
    """Prints lines, escaping what the terminal's encoding has no characters for (file names may be any bytes)."""
    for line in lines:
        encoding = stream.encoding or "utf-8"
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def _describe(found: "Survey", source: Any, config: "ConfigDict") -> list[str]:
    from ldm_jax.data.survey import describe

    lines = describe(found, config.data.resolution, getattr(source, "classes", ()), getattr(source, "box_classes", ()))
    lines += _buckets(found, len(source), config)
    crowded = sum(number > config.conditioning.boxes.max_objects for number in found.boxes)
    if crowded:
        lines.append(f"boxes: {crowded:,} pictures have more than conditioning.boxes.max_objects, of which the largest are kept")
    return lines


def _buckets(found: "Survey", total: int, config: "ConfigDict") -> list[str]:
    """How many pictures go to each of `data.buckets`, and which of these would have too few, judged by those that were looked at."""
    import numpy as np

    from ldm_jax.config import bucket_sizes
    from ldm_jax.data.buckets import arrange

    if not config.data.buckets or not found.sizes:
        return []
    _, buckets = arrange(
        np.array(found.sizes)[:, ::-1], bucket_sizes(config.data), math.ceil(config.train.batch_size * len(found.sizes) / total)
    )
    counts = ", ".join(f"{bucket.height}x{bucket.width} {bucket.number:,}" for bucket in buckets)
    left_out = len(config.data.buckets) - len(buckets)
    return [f"buckets (height x width): {counts}" + (f"; {left_out} with fewer than train.batch_size are left out" if left_out else "")]


def _tokens(found: "Survey", config: "ConfigDict") -> list[str]:
    """How many captions are longer than the text encoder reads, by a tokenizer that is trained on them as the run trains its own."""
    text = config.conditioning.text
    if not found.captions or text.tokenizer != "train" or config.train.init_from:
        return []
    from ldm_jax.conditioning.tokenizer import Tokenizer

    texts = [caption for several in found.captions for caption in several]
    tokenizer = Tokenizer.train(texts[:50_000], text.vocab_size, text.max_length + 1)
    chunks = (texts[start : start + 4096] for start in range(0, len(texts), 4096))
    long = sum(int((tokenizer(chunk)[:, -1] != tokenizer.pad_id).sum()) for chunk in chunks)
    return [f"tokens: {long:,} of {len(texts):,} captions are longer than conditioning.text.max_length={text.max_length}, and are cut"]


def _broken(found: "Survey", source: Any, output: Path) -> list[str]:
    """Lines about the broken files, and the file that names all of them."""
    from ldm_jax.data.reliable import broken_line
    from ldm_jax.paths import write_bytes

    lines = [f"damaged shard: {shard}: {damage}" for shard, damage in getattr(source, "damaged", {}).items()]
    rows = [broken_line(index, source.name(index), error) for index, error in found.broken]
    if rows:
        write_bytes(output / "broken_images.txt", "".join(rows).encode("utf-8", "backslashreplace"))
        lines += ["broken: " + row.split("\t", 1)[1].replace("\t", ": ").rstrip() for row in rows[:_NAMED]]
    looked = len(found.good) + len(found.broken)
    return [*lines, f"broken: {len(rows):,} of {looked:,}" + (f", all named in {output / 'broken_images.txt'}" if rows else "")]


def _write_page(source: Any, found: "Survey", config: "ConfigDict", path: Path) -> None:
    import numpy as np

    from ldm_jax.training.preview import save_grid

    number = min(_PAGE, len(found.good))
    chosen = np.random.default_rng(config.seed).choice(found.good, number, replace=False).tolist()
    examples = [_as_trained(source[index], config) for index in chosen]
    captions = [_caption(example, getattr(source, "classes", ())) for example in examples]
    save_grid(path, _of_one_size([shown(example) for example in examples]), _COLUMNS, captions if any(captions) else None)


def _as_trained(example: dict[str, Any], config: "ConfigDict") -> dict[str, Any]:
    """The example cropped to the square, or to its bucket."""
    import numpy as np

    from ldm_jax.config import bucket_sizes
    from ldm_jax.data.buckets import arrange
    from ldm_jax.data.transforms import fit

    size = (config.data.resolution,) * 2
    if config.data.buckets:
        size = arrange(np.array([example["image"].shape[:2]]), bucket_sizes(config.data), 1)[1][0][:2]
    return fit(example, *size)


def _of_one_size(pictures: Sequence["np.ndarray"]) -> "np.ndarray":
    """Pictures uint8 [H,W,3] as [N,H,W,3], the smaller ones with white below and to the right."""
    import numpy as np

    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    padding = [((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)) for picture in pictures]
    return np.stack([np.pad(picture, pad, constant_values=255) for picture, pad in zip(pictures, padding, strict=True)])


def _caption(example: dict[str, Any], classes: Sequence[str]) -> str:
    text, label = example.get("text", ""), example.get("label")
    name = "" if label is None else f"[{classes[label] if 0 <= label < len(classes) else label}] "
    return name + (" / ".join(text) if isinstance(text, list) else text)


def shown(example: dict[str, Any]) -> "np.ndarray":
    """An example as one picture, uint8 [f H, n f W, 3]: the image with its boxes, its map in colours, the image without its hole."""
    import numpy as np
    from PIL import Image, ImageDraw

    from ldm_jax.training.preview import class_colors

    picture = Image.fromarray(example["image"])
    factor = max(1, _TILE // picture.width)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    draw, side = ImageDraw.Draw(picture), np.array(picture.size)
    corner, opposite = np.asarray(example["crop"], np.float64).reshape(2, 2)  # of what is shown, in shares of the whole picture
    for label, *places in np.asarray(example.get("boxes", ()), np.float64).reshape(-1, 5):
        at = (np.reshape(places, (2, 2)) - corner) / (opposite - corner) * side
        draw.rectangle(at.round().ravel().tolist(), outline=tuple(class_colors(np.array(int(label))).tolist()))
    tiles = [np.asarray(picture)]
    if "segmentation" in example:
        tiles.append(class_colors(example["segmentation"]).repeat(factor, 0).repeat(factor, 1))
    if "mask" in example:
        tiles.append(np.where(example["mask"][..., None], np.uint8(255), example["image"]).repeat(factor, 0).repeat(factor, 1))
    return np.concatenate(tiles, axis=1)


if __name__ == "__main__":
    cli.guarded(main)
