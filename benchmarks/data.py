"""Reads the same pictures through each reader, at random places with threads, beside reading the raw bytes of their files.

    python -m benchmarks.data --num 1000 --side 256 --workers 2

prints, for each reader, images a second: as they are stored, decoded, and as training has them (cropped to a resolution), each with its
share of what can be had at best: the bytes of the files, their decoding from memory, and that with cropping. The last line reads parquet
without keeping row groups, as it is with data much larger than memory.
"""

import argparse
import io
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax import defaults
from ldm_jax.data.array_record import write_records
from ldm_jax.data.decode import decode_image
from ldm_jax.data.folder import FolderSource
from ldm_jax.data.sources import make_source, open_data
from ldm_jax.data.table_files import row_groups
from ldm_jax.data.transforms import center_crop

_ROWS = 100  # of a parquet row group, as Hugging Face writes pictures

_MAKE_TFDS = """
import sys
from pathlib import Path
import tensorflow_datasets as tfds

class BenchmarkPictures(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "text": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for path in sorted(Path(sys.argv[1]).glob("*.jpg")):
            yield path.name, {"image": str(path), "text": path.with_suffix(".txt").read_text()}

BenchmarkPictures(data_dir=sys.argv[2], file_format="array_record").download_and_prepare()
"""


def draw(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG of about as many bytes a pixel as a photograph: noise of all scales."""
    layers = [
        Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC) for n in (4, 16, 64)
    ]
    file = io.BytesIO()
    Image.fromarray(np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_folder(root: Path, num: int, side: int) -> None:
    rng = np.random.default_rng(0)
    root.mkdir()
    for i in range(num):
        (root / f"{i:06d}.jpg").write_bytes(draw(rng, side))
        (root / f"{i:06d}.txt").write_text(f"picture number {i}")


def write_all(root: Path, num: int, side: int) -> dict[str, dict[str, str]]:
    """The same pictures in every form; {name of the reader: fields of its `data` group}."""
    import pyarrow as pa
    from pyarrow import parquet

    write_folder(root / "folder", num, side)
    folder = FolderSource(root / "folder", ("text",))
    stored = [folder.read(i, ("image", "text")) for i in range(num)]
    write_records(root / "array_record", stored)
    for kind in ("tar", "parquet", "arrow"):
        (root / kind).mkdir()
    with tarfile.open(root / "tar" / "0.tar", "w") as tar:
        for path in sorted((root / "folder").iterdir()):
            tar.add(path, path.name)
    columns = {"image": [{"bytes": example["image"], "path": None} for example in stored], "text": [example["text"] for example in stored]}
    table = pa.table(columns)
    parquet.write_table(table, root / "parquet" / "0.parquet", row_group_size=_ROWS)
    with pa.OSFile(str(root / "arrow" / "0.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=_ROWS)
    subprocess.run([sys.executable, "-c", _MAKE_TFDS, str(root / "folder"), str(root / "tfds")], check=True, capture_output=True)
    groups = {kind: {"source": kind, "path": str(root / kind)} for kind in ("folder", "tar", "array_record", "tfds")}
    groups["tfds"]["name"] = "benchmark_pictures"
    return groups | {kind: {"source": "table", "path": str(root / kind)} for kind in ("arrow", "parquet")}


def rate(read: Callable[[int], Any], order: list[int], pool: ThreadPoolExecutor) -> float:
    """Calls a second of `read` at these places."""
    start = time.perf_counter()
    for _ in pool.map(read, order, chunksize=1):
        pass
    return len(order) / (time.perf_counter() - start)


def readings(groups: dict[str, dict[str, str]], root: Path, num: int, resolution: int) -> dict[str, list[Callable[[int], Any]]]:
    """{reader: [stored, decoded, as in training]}, "raw" first."""
    files = [root / "folder" / f"{i:06d}.jpg" for i in range(num)]
    kept = [file.read_bytes() for file in files]
    found: dict[str, list[Callable[[int], Any]]] = {
        "raw bytes": [
            lambda i: files[i].read_bytes(),
            lambda i: decode_image(io.BytesIO(kept[i])),
            lambda i: center_crop(decode_image(io.BytesIO(kept[i])), resolution),
        ]
    }
    for name, fields in groups.items():
        data = defaults.base().data
        data.update({**fields, "resolution": resolution})
        reader: Any = open_data(data, ("text",))
        stored = lambda i, reader=reader: reader.read(i, ("image", "text"))  # noqa: E731
        found[name] = [stored, reader.__getitem__, make_source(data, ("text",)).__getitem__]
    return found | {"parquet, unkept": [_unkept(read) for read in found["parquet"]]}


def _unkept(read: Callable[[int], Any]) -> Callable[[int], Any]:
    def call(index: int) -> Any:
        row_groups.forget()
        return read(index)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=1000, help="pictures")
    parser.add_argument("--side", type=int, default=256, help="of a picture, pixels")
    parser.add_argument("--resolution", type=int, default=128, help="that they are cropped and resized to")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is printed, the readers taking turns")
    parser.add_argument("--directory", help="where the data are written, default a temporary directory")
    parser.add_argument("--json", help="file that also gets the rates")
    args = parser.parse_args()

    root = Path(tempfile.mkdtemp(dir=args.directory))
    try:
        reads = readings(write_all(root, args.num, args.side), root, args.num, args.resolution)
        order = np.random.default_rng(1).permutation(args.num).tolist()
        rates: dict[str, list[list[float]]] = {name: [[] for _ in columns] for name, columns in reads.items()}
        with ThreadPoolExecutor(args.workers) as pool:
            for _ in range(args.rounds):
                for name, columns in reads.items():
                    for column, read in enumerate(columns):
                        rates[name][column].append(rate(read, order, pool))
    finally:
        shutil.rmtree(root)
    table = {name: [statistics.median(values) for values in columns] for name, columns in rates.items()}
    best = table["raw bytes"]
    print(f"{args.num} JPEGs of {args.side} px, random order, {args.workers} threads; images/s, and their share of the first line")
    print(f"{'':16s}{'stored':>10s}{'':8s}{'decoded':>10s}{'':8s}{f'at {args.resolution} px':>10s}")
    for name, values in table.items():
        print(f"{name:16s}" + "".join(f"{value:10.0f} ({value / top:4.2f}) " for value, top in zip(values, best, strict=True)))
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
