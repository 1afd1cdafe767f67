"""Reads random latents from a cache as training does: random order, stacked batches, read ahead by threads.

    python -m benchmarks.latents --workers 2

prints latents a second and MB/s, beside reading the same records as raw bytes in one thread.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from ldm_jax.data.latents import CacheWriter, LatentCache, begin
from ldm_jax.data.pipeline import Batches


def write_cache(directory: Path, num: int, shard_size: int, shape: tuple[int, int, int], dtype: str) -> LatentCache:
    """A cache of random moments [h, w, 2c] with captions and labels."""
    writer = CacheWriter(directory, begin(directory, {"fingerprint": "benchmark"}, num, shard_size))
    rng = np.random.default_rng(0)
    for shard in writer.missing_shards():
        with writer.shard(shard) as add:
            for index in writer.examples(shard):
                moments = rng.standard_normal(shape, np.float32).astype(dtype)
                add({"moments": moments, "text": f"the caption of picture {index}", "label": index % 10})
    writer.finish()
    return LatentCache(directory, "benchmark")


def raw_rate(directory: Path, num: int, record_bytes: int) -> float:
    """Records a second of plain reads at random places of the shards' bytes, each into new memory."""
    files = [path.open("rb", buffering=0) for path in sorted(directory.glob("*.array_record"))]
    ends = [path.stat().st_size - record_bytes for path in sorted(directory.glob("*.array_record"))]
    rng = np.random.default_rng(1)
    start = time.perf_counter()
    for which, where in zip(rng.integers(len(files), size=num).tolist(), rng.random(num).tolist(), strict=True):
        files[which].seek(int(where * ends[which]))
        files[which].read(record_bytes)
    seconds = time.perf_counter() - start
    for file in files:
        file.close()
    return num / seconds


def pipeline_rate(cache: LatentCache, batch_size: int, workers: int, num: int) -> float:
    """Latents a second out of `Batches`."""
    batches = Batches(cache, batch_size, seed=0, workers=workers, prefetch=2 * workers).iterate()
    for _ in range(4):
        next(batches)
    steps = max(num // batch_size, 1)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    seconds = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]  # a generator
    return steps * batch_size / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=20_000, help="examples in the cache")
    parser.add_argument("--read", type=int, default=100_000, help="examples read")
    parser.add_argument("--shape", type=int, nargs=3, default=(32, 32, 8), help="height, width and 2 x channels")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--shard-size", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--directory", help="where the cache is written, default a temporary directory")
    args = parser.parse_args()

    record_bytes = int(np.prod(args.shape)) * np.dtype(args.dtype).itemsize
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        cache = write_cache(Path(directory), args.num, args.shard_size, tuple(args.shape), args.dtype)
        raw = raw_rate(Path(directory), args.read, record_bytes)
        rate = pipeline_rate(cache, args.batch_size, args.workers, args.read)
    for name, value in (("raw bytes", raw), ("pipeline", rate)):
        print(f"{name:10s} {value:9.0f} latents/s {value * record_bytes / 1e6:8.0f} MB/s")


if __name__ == "__main__":
    main()
