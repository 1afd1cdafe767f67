"""From images to latents: the statistics of the latent space, and the latent cache."""

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from ldm_jax.config import WorkDir
from ldm_jax.data.latents import CacheWriter, LatentCache, begin, cache_fingerprint, is_complete, weights_fingerprint
from ldm_jax.data.pipeline import Batches, read_ahead, stack
from ldm_jax.data.reliable import shared
from ldm_jax.data.sources import Source
from ldm_jax.data.transforms import mirror
from ldm_jax.model_directory import Params
from ldm_jax.paths import resolve
from ldm_jax.sharding.mesh import batch_sharding, filled, make_mesh, replicated, split_host_arrays
from ldm_jax.sharding.processes import exchange, from_first
from ldm_jax.stages import FirstStage, compute_dtype, to_float

_SHARD = 4096  # examples, whatever the batch and the devices that encode them: those may change before the cache is complete
Make = Callable[[range, int], Generator[dict[str, Any], None, None]]
MEASURED = ("std", "channel")  # kinds of scale that are of the statistics of the latents, and no number


def encode_jit(stage: FirstStage, mesh: Mesh) -> Any:
    """`f(params, images uint8 [B,H,W,3])` to raw moments, the batch split over a mesh."""
    split = batch_sharding(mesh)
    return jax.jit(lambda p, x: stage.moments(p, to_float(x)), in_shardings=(replicated(mesh), split), out_shardings=split)


class Encoder:
    """Images to raw moments on this process's own devices, in batches of one size so that one program serves all."""

    def __init__(self, stage: FirstStage, params: Params, batch_size: int) -> None:
        self.network = stage.network
        self.mesh: Mesh = make_mesh(devices=jax.local_devices())
        self.batch_size = filled(batch_size, self.mesh)
        self.fingerprint = weights_fingerprint(params)
        self.params = jax.device_put(params, replicated(self.mesh))
        self._run = encode_jit(stage, self.mesh)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [batch_size,H,W,3] to moments, float32 [batch_size,h,w,2c] or, where they are the latents, [batch_size,h,w,c]."""
        return np.asarray(self._run(self.params, split_host_arrays(images, self.mesh)), np.float32)


def latent_statistics(encoder: Encoder, source: Source, limit: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float64 [c] each, of sampled latents over `limit` examples (0: all) of the shuffled training set.

    Exact over what is sampled: E[z] = E[mean], Var[z] = E[mean^2 + var] - E[z]^2.
    """
    total = min(limit or len(source), len(source))
    first, second, count = np.zeros(()), np.zeros(()), 0
    batches = Batches(source, encoder.batch_size, seed=0, workers=workers)
    with closing(batches.iterate(0)) as data:
        for start in tqdm(range(0, total, encoder.batch_size), desc="latent statistics", unit="batch", mininterval=5):
            images = next(data)["image"]
            moments = jnp.asarray(encoder(images)[: total - start])
            mean, variance = (np.asarray(m, np.float64) for m in encoder.network.mean_and_variance(moments))
            first = first + mean.sum((0, 1, 2))
            second = second + (mean**2 + variance).sum((0, 1, 2))
            count += mean[..., 0].size
    center = np.asarray(first / count)
    return center, np.sqrt(np.asarray(second / count) - center**2)


def latent_scale(kind: str, mean: np.ndarray, std: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(shift, scale) of `first_stage.latent_scale`: "std" is one number over all channels (section 4.3.2), "channel" both per channel,
    a number n such as 0.18215 is the factor of released models, a scale of 1 / n."""
    if kind == "channel":
        return tuple(mean.tolist()), tuple(std.tolist())
    if kind == "std":
        overall = np.sqrt(np.mean(std**2 + mean**2) - np.mean(mean) ** 2)
        return (0.0,), (float(overall),)
    return (0.0,), (1.0 / float(kind),)


def fingerprint(config: ConfigDict, weights: str, source: Source) -> str:
    """What a cache of the latents of a first stage, by the fingerprint of its weights, is known by."""
    dtype = np.dtype(compute_dtype(config.train.dtype)).name
    look = {"resolution": config.data.resolution, "flips": config.data.flip, "dtype": dtype}
    return cache_fingerprint(weights=weights, source=source.fingerprint(), **look)


def ensure_cache(config: ConfigDict, workdir: WorkDir, encoder: Encoder, source: Source) -> LatentCache:
    """The latent cache of a run, encoded now where it is missing or unfinished. Raises UserError."""
    mark = fingerprint(config, encoder.fingerprint, source)
    meta = {"flips": config.data.flip, "buckets": [list(bucket) for bucket in getattr(source, "buckets", ())]}
    with shared(source, jax.process_count()):
        return ensure_written(
            cache_directory(config, workdir, mark),
            {"fingerprint": mark, **meta},
            len(source),
            _SHARD,
            lambda examples, views: encoded(encoder, source, examples, views, config.data.workers),
            config.data.copies,
        )


def cache_directory(config: ConfigDict, workdir: WorkDir, mark: str) -> Any:
    """Where the cache of a run that is known by its fingerprint lies."""
    return (resolve(config.data.latents) if config.data.latents else workdir.latents) / mark


def ensure_written(directory: Any, meta: dict[str, Any], number: int, shard_size: int, make: Make, copies: str = "") -> LatentCache:
    """The cache in a directory with that `meta`; where it is missing or unfinished, every process makes its share of it now.

    `make(examples, views)` gives the examples of a range of indices in order, with `views` views of each; `copies` as of `LatentCache`.
    Raises UserError.
    """
    mark = meta["fingerprint"]
    if not from_first(lambda: is_complete(directory, mark)):
        writer = CacheWriter(directory, from_first(lambda: begin(directory, meta, number, shard_size)))
        missing = writer.missing_shards(jax.process_index(), jax.process_count())
        total = sum(len(writer.examples(shard)) for shard in missing)
        with tqdm(total=total, desc="encode", unit="example", mininterval=5, disable=jax.process_index() > 0) as bar:
            for shard in missing:
                with closing(make(writer.examples(shard), writer.views)) as made, writer.shard(shard) as add:
                    for count, example in enumerate(made, 1):
                        add(example)
                        bar.update(count % writer.views == 0)
        own = exchange(writer.missing_shards(jax.process_index(), jax.process_count()))
        left = [shard for shards in own for shard in shards]
        from_first(lambda: writer.finish(left))
    return LatentCache(directory, mark, copies)


def encoded(encoder: Encoder, source: Any, examples: range, views: int, workers: int) -> Generator[dict[str, Any], None, None]:
    """Those examples of a source with their moments, each followed by its mirrored view where there are two."""
    pieces = (piece for part in of_one_size(source, examples) for piece in split(part, encoder.batch_size))
    with closing(read_ahead(lambda piece: stack([source[i] for i in piece]), pieces, max(workers, 1), max(workers, 2))) as batches:
        for batch in batches:
            yield from _with_moments(encoder, batch, views)


def of_one_size(source: Any, examples: range) -> list[range]:
    """A range of examples in parts whose pictures have one size."""
    buckets = getattr(source, "buckets", None) or [range(len(source))]
    parts = (range(max(examples.start, bucket.start), min(examples.stop, bucket.stop)) for bucket in buckets)
    return [part for part in parts if part]


def split(indices: range, size: int) -> Iterator[range]:
    """A range in parts of `size`, the last as long as what is left."""
    return (indices[start : start + size] for start in range(0, len(indices), size))


def _with_moments(encoder: Encoder, batch: dict[str, Any], views: int) -> Iterator[dict[str, Any]]:
    count = len(batch["image"])
    images = np.pad(batch["image"], ((0, encoder.batch_size - count), (0, 0), (0, 0), (0, 0)), mode="edge")
    moments = [encoder(images), *([encoder(images[:, :, ::-1])] if views == 2 else [])]
    for i in range(count):
        example = {key: values[i] for key, values in batch.items()}
        yield {**example, "moments": moments[0][i]}
        if views == 2:
            yield {**mirror(example), "moments": moments[1][i]}
