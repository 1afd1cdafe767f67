"""Evaluation while a stage trains (`evaluate.every`): by the averaged weights, on pictures that it is not trained on.

Nothing here touches the state, the order of the data or the random numbers of training, so the weights of a run are the same with it.

An evaluation calls `between` before each batch, which raises where the run is to stop. The batches are the same in all processes, so that
all leave at the same one.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.config import WorkDir
from ldm_jax.data.derive import one_caption
from ldm_jax.data.sources import Source
from ldm_jax.diffusion.losses import DiffusionLoss, noised, per_example
from ldm_jax.diffusion.samplers import initial_noise
from ldm_jax.evaluation import metrics
from ldm_jax.evaluation.data_pictures import DataPictures
from ldm_jax.evaluation.extractors import Extractor, colors, load_inception, weight_path
from ldm_jax.evaluation.features import measure, on_mesh
from ldm_jax.evaluation.obedience import scores
from ldm_jax.evaluation.pairs import pair_extractor
from ldm_jax.evaluation.statistics import gaussian_of
from ldm_jax.evaluation.told import FromData
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.sharding.mesh import filled, make_mesh
from ldm_jax.stages import Denoiser
from ldm_jax.training.inputs import open_pictures_alone, open_source, scenes

BUCKETS = 10  # of time
_REFERENCE = 2000  # training pictures that samples are held against
_BATCH = 64
_SEED = 0  # of the noise of held-out examples

Example = dict[str, Any]
Scores = dict[str, float]
Between = Callable[[], None]


def held_out_examples(config: ConfigDict, workdir: WorkDir, source: Source) -> list[Example]:
    """`evaluate.examples` examples that training has not seen: drawn scenes of another seed, or the data of `evaluate.path` and
    `evaluate.split`; none where there are no such data. Raises UserError."""
    group, number = config.evaluate, config.evaluate.examples
    if config.data.source == "shapes":
        return [*map(scenes(config, source, number), range(number))]
    if not (group.path or group.split):
        return []
    others = ConfigDict(config.to_dict())
    others.data.path, others.data.split = group.path or config.data.path, group.split or config.data.split
    others.data.buckets = ()
    found = open_source(others, WorkDir(workdir.path / "evaluations"))
    chosen = np.linspace(0, len(found) - 1, min(number, len(found))).astype(int)
    return [one_caption(found[int(i)], 0, int(i)) for i in chosen]


@partial(jax.jit, static_argnums=(0, 1))
def _losses(denoiser: Denoiser, loss: DiffusionLoss, params: Any, x0: jax.Array, noise: jax.Array, t: jax.Array, arrays: Any) -> jax.Array:
    """Of each example [B], with all that training adds to them; no condition is dropped."""
    prediction = denoiser.denoise(params, noised(denoiser.process, x0, noise, t), t, denoiser.condition(params, arrays))
    plain, bound = per_example(denoiser.process, loss, prediction, x0, noise, t)
    return plain + bound


def losses_by_time(
    model: LatentDiffusion,
    loss: DiffusionLoss,
    latents: np.ndarray,
    examples: Sequence[Example],
    buckets: int = BUCKETS,
    between: Between = lambda: None,
) -> np.ndarray:
    """The mean loss of examples in each of equal parts of the way to noise, least noisy first, float64 [buckets].

    Each example is noised once in each part, at places that go evenly through the part from one example to the next, and with the same
    noise whenever this is called, so that two sets of weights are compared on the same task.

    Args:
      latents: scaled, float32 [N,h,w,c].
      examples: N of them, with what the model is told.
    """
    denoiser, number = model.denoiser, len(examples)
    assert denoiser is not None
    sums = np.zeros(buckets)
    for start in range(0, number, _BATCH):
        index = np.minimum(np.arange(start, start + _BATCH), number - 1)  # the last batch is filled up, so that one program serves all
        given = {name: [examples[i][name] for i in index] for name in model.inputs}
        x0, noise, arrays = latents[index], initial_noise(_SEED, index, latents.shape[1:]), model.prepare(given)
        for bucket in range(buckets):
            between()
            t = denoiser.process.time_at(jnp.asarray((bucket + (index + 0.5) / number) / buckets, jnp.float32))
            values = np.asarray(_losses(denoiser, loss, model.params, x0, noise, t, arrays), np.float64)
            sums[bucket] += values[: number - start].sum()
    return sums / number


class DenoiserEvaluation:
    """Of stage 2: held-out loss by time, samples against training pictures, and on drawn scenes whether conditions are obeyed.

    The training pictures are measured here, before training begins: a stop in between loses nothing.

    Raises UserError where held-out data or weights cannot be read.
    """

    def __init__(self, config: ConfigDict, workdir: WorkDir, source: Source, loss: DiffusionLoss) -> None:
        self.config, self.workdir, self.source, self.loss = config, workdir, source, loss
        path = weight_path("inception", config.evaluate.inception or None)
        self.extractors = [colors(), *([load_inception(path)] if path else [])]
        self.examples = held_out_examples(config, workdir, source)
        self._latents: np.ndarray | None = None
        self._measure = _measuring(self.extractors)
        self._reference = self._measured_training()

    def __call__(self, model: LatentDiffusion, between: Between = lambda: None) -> Scores:
        found: Scores = {}
        with jax.transfer_guard("allow"), jax.set_mesh(model.mesh):
            if self.examples:
                if self._latents is None:
                    self._latents = _encoded(model, self.examples, between)
                losses = losses_by_time(model, self.loss, self._latents, self.examples, between=between)
                found |= {"held_out/loss": float(losses.mean()), **{f"held_out/loss/t{i}": float(v) for i, v in enumerate(losses)}}
            told = self._told(model)
            images = _drawn(model, told, between)
            found |= self._against_training(images)
            if self.config.data.source == "shapes":
                found |= _obedience(model, images, told)
        return found

    def _told(self, model: LatentDiffusion) -> list[Example]:
        """What the samples are told: held-out examples, or where there are none those of training, again and again."""
        number = self.config.evaluate.samples
        if not model.inputs:
            return [{}] * number
        known: Any = self.examples or FromData(self._plain)
        return [known[i % len(known)] for i in range(number)]

    @cached_property
    def _plain(self) -> Any:
        """The training's examples, each of the training's resolution."""
        if not self.config.data.buckets:
            return self.source
        squares = ConfigDict(self.config.to_dict())
        squares.data.buckets = ()
        return open_source(squares, self.workdir)

    def _measured_training(self) -> Any:
        pictures = DataPictures(open_pictures_alone(self.config, self.workdir), {}, _REFERENCE, self.config.data.workers)
        # By what it is of: weights may be given when a run goes on, that were not there before.
        weights = "-".join(extractor.weights[:8] for extractor in self.extractors if extractor.weights)
        name = f"reference-{pictures.fingerprint()}-{weights or 'colors'}"
        return measure(pictures, self.extractors, self.workdir.path / "evaluations" / name, _BATCH, "reference")

    def _against_training(self, images: np.ndarray) -> Scores:
        measured = self._measure(images)
        found: Scores = {}
        for name in [extractor.name for extractor in self.extractors]:
            found[f"samples/MIND/{name}"] = metrics.monge_distance(measured[name], self._reference.rows(name))
        if "inception" in measured:
            ours, theirs = gaussian_of([measured["inception"]]), gaussian_of(self._reference.blocks("inception"))
            found[f"samples/FID@{len(images)}"] = metrics.frechet_distance(ours.mean, ours.cov, theirs.mean, theirs.cov)
        return found


def _drawn(model: LatentDiffusion, told: Sequence[Example], between: Between) -> np.ndarray:
    """A sample of each, uint8 [N,H,W,3], in batches of the model's own size."""
    size, drawn = min(model.info["sample"]["batch_size"], len(told)), []
    for start in range(0, len(told), size):
        between()
        part = [told[min(i, len(told) - 1)] for i in range(start, start + size)]  # the last batch is filled up
        inputs: Any = {name: [example[name] for example in part] for name in model.inputs}
        drawn.append(model.sample(num=size, seed=_SEED, first=start, **inputs))
    return np.concatenate(drawn)[: len(told)]


def _encoded(model: LatentDiffusion, examples: Sequence[Example], between: Between) -> np.ndarray:
    """The modes of the examples' latents, float32 [N,h,w,c]."""
    images = np.stack([example["image"] for example in examples])
    return np.concatenate([model.encode(batch) for batch in _batches(images, between)])[: len(images)]


def _batches(images: np.ndarray, between: Between) -> Iterator[np.ndarray]:
    """Batches of one size, the last one filled up."""
    for start in range(0, len(images), _BATCH):
        between()
        yield images[np.minimum(np.arange(start, start + _BATCH), len(images) - 1)]


def _measuring(extractors: Sequence[Extractor]) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Pictures uint8 [N,H,W,C] to their features, in batches of one size, so that the program is compiled once."""
    function = on_mesh(extractors, mesh := make_mesh(devices=jax.local_devices()))
    size = filled(_BATCH, mesh)

    def measured(images: np.ndarray) -> dict[str, np.ndarray]:
        batches = [function(images[start : start + size], size) for start in range(0, len(images), size)]
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    return measured


def _obedience(model: LatentDiffusion, images: np.ndarray, examples: Sequence[Example]) -> Scores:
    """Means of the oracle's scores of each condition."""
    found: Scores = {}
    for name in [name for name in model.inputs if name != "image"] or [""]:
        for title, values in scores(name, images, examples).items():
            if not np.isnan(values).all():
                found[f"samples/{name or 'scene'}/{title.replace(' ', '_')}"] = float(np.nanmean(values))
    return found


class AutoencoderEvaluation:
    """Of stage 1: PSNR, SSIM and, where the loss has its weights, LPIPS of reconstructions of held-out pictures."""

    def __init__(self, config: ConfigDict, workdir: WorkDir, source: Source, perceptual: Any) -> None:
        examples = held_out_examples(config, workdir, source)
        self.images = np.stack([example["image"] for example in examples]) if examples else None
        self._measure = _measuring([pair_extractor(perceptual or None, "")])

    def __call__(self, reconstruct: Any, between: Between = lambda: None) -> Scores:
        """`reconstruct`: uint8 [N,H,W,3] to what the autoencoder makes of them."""
        if self.images is None:
            return {}
        made = np.concatenate([reconstruct(batch) for batch in _batches(self.images, between)])[: len(self.images)]
        found = self._measure(np.concatenate([self.images, made], axis=-1))
        return {f"held_out/{name}": float(values.mean()) for name, values in found.items()}
