"""The examples of a run: its data, and what is made of them for its conditions."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.conditioning.conditioner import Conditioning
from ldm_jax.config import UserError, WorkDir, bucket_sizes, latent_factor
from ldm_jax.data.buckets import Bucketed
from ldm_jax.data.derive import Derive, Derived, Example, derived
from ldm_jax.data.shapes import Pairs, ShapesSource
from ldm_jax.data.sources import Source, make_source, needed_fields
from ldm_jax.evaluation.obedience import SEED
from ldm_jax.model_directory import find_model, load_settings
from ldm_jax.stages import build_autoencoder
from ldm_jax.training.neighbors import Neighbored


def open_source(config: ConfigDict, workdir: WorkDir) -> Source:
    """The images of a run, with what its conditioners read. Raises UserError."""
    data, group = config.data, config.conditioning
    source = make_source(data, needed_fields(config), log_path=workdir.path / "broken_images.txt")
    if config.task == "autoencoder":
        return derived(source, data)
    if group.mask.enabled and data.cache:
        raise UserError("conditioning.mask: a picture is encoded with another hole at every step: set data.cache=False")
    if data.buckets:
        source = Bucketed(source, bucket_sizes(data), config.train.batch_size, workdir.path / "buckets", data.workers)
    if group.neighbors.enabled:
        source = Neighbored(source, group.neighbors, workdir, data.workers)
    return derived(source, data, group, first_stage_factor(config) if group.low_res.enabled else 1)


def open_pictures_alone(config: ConfigDict, workdir: WorkDir) -> Source:
    """The pictures of a run's data as its training sees them, squares without any condition. Raises UserError."""
    plain = ConfigDict(config.to_dict())
    plain.data.buckets = ()
    for group in plain.conditioning.values():
        group.enabled = False
    return open_source(plain, workdir)


def first_stage_factor(config: ConfigDict) -> int:
    """Pixels that a position of the latents stands for, by the run's own first stage or the one that it takes. Raises UserError."""
    if not config.first_stage.path:
        return latent_factor(config.first_stage)
    return build_autoencoder(load_settings(find_model(config.first_stage.path) / "first_stage"), "float32").factor


def layers(source: Any) -> tuple[Any, Derive | None, Neighbored | None]:
    """What lies under a run's source: stored pictures as they are trained on, what is drawn for them, and their neighbours."""
    below, derive = (source.below, source.derive) if isinstance(source, Derived) else (source, None)
    return (below.below, derive, below) if isinstance(below, Neighbored) else (below, derive, None)


def scenes(config: ConfigDict, source: Any, number: int, pairs: Pairs = "seen") -> Callable[[int], Example]:
    """Examples of drawn scenes that training has not seen, by their number, with what the training's `source` makes of its own."""
    data = config.data
    drawn = ShapesSource(number, SEED, data.resolution, (1,) if pairs == "held_out" else tuple(data.counts), pairs)
    _, derive, neighbored = layers(source)

    def example(index: int) -> Example:
        made = drawn[index]
        if neighbored:
            made = {**made, "neighbors": neighbored.find(made["image"][None])[0], "query": made["image"]}
        return derive(made, config.seed, index) if derive else made

    return example


def check_examples(source: Any, conditioning: Conditioning) -> None:
    """Raises UserError where an example lacks what a conditioner reads, or has it of another size than its picture.

    Of what takes long to make, captions' tokens and neighbours, nothing is asked.
    """
    names = set(conditioning.names) - {"text", "neighbors"}
    if not names:
        return
    below, derive, _ = layers(source)
    example = derive(below[0], 0, 0) if derive else below[0]
    conditioning.prepare({name: [value] for name, value in example.items()}, names - {"mask"})
    for name in {"segmentation", "mask"} & names:
        if name not in example:
            raise UserError(f"the data gives no {name}, which conditioning.{name} needs")
        if example[name].shape != (size := example["image"].shape[:2]):
            raise UserError(f"data: {name} is {list(example[name].shape)}, its picture {list(size)}")
