"""From images to latents: the statistics of the latent space, and the latent cache."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from ldm_jax.config import WorkDir
from ldm_jax.data.latents import CacheWriter, LatentCache, cache_fingerprint, is_complete, weights_fingerprint
from ldm_jax.data.pipeline import Batches
from ldm_jax.data.sources import Source
from ldm_jax.data.transforms import mirror
from ldm_jax.model_directory import Params
from ldm_jax.sharding.mesh import batch_sharding, make_mesh, replicated, split_host_arrays
from ldm_jax.stages import FirstStage, to_float

_SHARD = 4096  # examples
MEASURED = ("std", "channel")  # kinds of scale that are of the statistics of the latents, and no number


class Encoder:
    """Images to raw moments on this process's own devices, in batches of one size so that one program serves all."""

    def __init__(self, stage: FirstStage, params: Params, batch_size: int) -> None:
        self.network = stage.network
        self.mesh: Mesh = make_mesh(devices=jax.local_devices())
        self.batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
        self.fingerprint = weights_fingerprint(params)
        self.params = jax.device_put(params, replicated(self.mesh))
        split = batch_sharding(self.mesh)
        self._run = jax.jit(lambda p, x: stage.moments(p, to_float(x)), in_shardings=(replicated(self.mesh), split), out_shardings=split)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 [batch_size,H,W,3] to moments, float32 [batch_size,h,w,2c] or, where they are the latents, [batch_size,h,w,c]."""
        return np.asarray(self._run(self.params, split_host_arrays(images, self.mesh)), np.float32)


def latent_statistics(encoder: Encoder, source: Source, limit: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float64 [c] each, of sampled latents over `limit` examples (0: all) of the shuffled training set.

    Exact over what is sampled: E[z] = E[mean], Var[z] = E[mean^2 + var] - E[z]^2.
    """
    total = min(limit or len(source), len(source))
    first, second, count = 0.0, 0.0, 0
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
    return cache_fingerprint(weights=weights, source=source.fingerprint(), resolution=config.data.resolution, flips=config.data.flip)


def ensure_cache(config: ConfigDict, workdir: WorkDir, encoder: Encoder, source: Source) -> LatentCache:
    """The latent cache of a run, encoded now where it is missing or unfinished. Raises UserError."""
    mark = fingerprint(config, encoder.fingerprint, source)
    directory = (epath.Path(config.data.latents) if config.data.latents else workdir.latents) / mark
    if not is_complete(directory, mark):
        size = max(_SHARD // encoder.batch_size, 1) * encoder.batch_size
        writer = CacheWriter(directory, {"fingerprint": mark, "flips": config.data.flip}, len(source), size)
        _write_shards(writer, encoder, source, config.data.workers)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("latent cache")
        if jax.process_index() == 0:
            writer.finish()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("latent cache complete")
    return LatentCache(directory, mark)


def _write_shards(writer: CacheWriter, encoder: Encoder, source: Source, workers: int) -> None:
    """Encodes what this process has to write, with a progress bar."""
    batches = Batches(source, encoder.batch_size, seed=0, shuffle=False, workers=workers)
    missing = writer.missing_shards(jax.process_index(), jax.process_count())
    total = sum(len(writer.examples(shard)) for shard in missing)
    with tqdm(total=total, desc="encode", unit="image", mininterval=5, disable=jax.process_index() > 0) as bar:
        for shard in missing:
            span = writer.examples(shard)
            with closing(batches.iterate(span.start // encoder.batch_size)) as data, writer.shard(shard) as add:
                for start in range(span.start, span.stop, encoder.batch_size):
                    count = min(encoder.batch_size, span.stop - start)
                    for example in _encoded(encoder, next(data), count, writer.views):
                        add(example)
                    bar.update(count)


def _encoded(encoder: Encoder, batch: dict[str, Any], count: int, views: int) -> Iterator[dict[str, Any]]:
    """The first `count` examples of a batch with their moments, each followed by its mirrored view where there are two."""
    moments = [encoder(batch["image"])]
    if views == 2:
        moments.append(encoder(batch["image"][:, :, ::-1]))
    for i in range(count):
        example = {key: values[i] for key, values in batch.items()}
        yield {**example, "moments": moments[0][i]}
        if views == 2:
            yield {**mirror(example), "moments": moments[1][i]}
