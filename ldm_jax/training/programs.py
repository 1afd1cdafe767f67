"""The programs of a run, from its configuration alone: no data, no weights, no device that they would run on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax.conditioning.conditioner import Conditioning
from ldm_jax.conditioning.conditioners import TextConditioner
from ldm_jax.config import bucket_sizes
from ldm_jax.diffusion.samplers import image_keys
from ldm_jax.latent_diffusion import load_first_stage
from ldm_jax.model_directory import find_model
from ldm_jax.nn import lpips
from ldm_jax.sharding.mesh import batch_sharding, filled, make_mesh, replicated
from ldm_jax.stages import FirstStage, GenerateInputs, build_autoencoder, compute_dtype, generate_jit, init_autoencoder, to_float
from ldm_jax.training import loop
from ldm_jax.training.autoencoder import AutoencoderStage
from ldm_jax.training.diffusion import MAX_PROMPTS, PREVIEWS, DiffusionStage, conditioning_for
from ldm_jax.training.encode import encode_jit
from ldm_jax.training.flops import count_flops

Abstract = Any  # a tree of jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Planned:
    """A program and what it is given.

    Attributes:
      name: "denoiser step", "preview", "sampler", "encoder".
      lower: traces and lowers it for its devices.
      given: what lies on the devices while it runs, its arguments and else, by what it is ("parameters", "optimiser", ...), abstract, with
        its placement.
      images: that one execution handles, on all its devices together.
      count: traces it to count the operations of one execution on all devices: without what is computed anew, and with it.
    """

    name: str
    lower: Callable[[], Any]
    given: dict[str, Abstract]
    mesh: Mesh
    images: int
    count: Callable[[], tuple[int, int]]

    @property
    def given_bytes(self) -> int:
        """Bytes of `given` on one device."""
        return bytes_of(self.given)


def bytes_of(tree: Abstract) -> int:
    """Bytes of an abstract tree on one device."""
    leaves = (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding"))
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def plan_stage(config: ConfigDict) -> AutoencoderStage | DiffusionStage:
    """The stage that a configuration trains, without data. Raises UserError.

    Its first stage is that of `first_stage.path`, or an untrained one; the perceptual loss has weights of the right shapes if it counts.
    """
    if config.task == "autoencoder":
        counts = config.first_stage.loss.perceptual_weight > 0
        nothing: Any = ()
        return AutoencoderStage(config, nothing, jax.eval_shape(lpips.random_params, _key()) if counts else None)
    dtype = compute_dtype(config.train.dtype)
    if config.first_stage.path:
        first, params = load_first_stage(find_model(config.first_stage.path), dtype)
        shapes = jax.eval_shape(lambda: params)
    else:
        first = FirstStage(build_autoencoder(config.first_stage.to_dict(), dtype))
        shapes = jax.eval_shape(partial(init_autoencoder, first.network, resolution=config.data.resolution), _key())
    return DiffusionStage(config, first, shapes, _source(config, conditioning_for(config, first.network, None)), None)


def train_step(stage: AutoencoderStage | DiffusionStage, mesh: Mesh) -> Planned:
    """The update of a stage on its global batch, the dearest of its phases."""
    state, whole = loop.abstract_state(stage, mesh), replicated(mesh)
    batch = _placed(_batch(stage), batch_sharding(mesh))
    frozen = _placed(stage.frozen, whole)
    phase = stage.phase(stage.config.train.steps)
    root = _placed(_key(), whole)

    def lower() -> Any:
        with jax.set_mesh(mesh):
            return loop.jit_update(stage, mesh, state).lower(state, batch, frozen, root, phase)

    def count() -> tuple[int, int]:
        flops = loop.update_flops(stage.without_remat(), state, batch, phase)
        return flops, flops if stage.config.train.remat == "none" else loop.update_flops(stage, state, batch, phase)

    given = {"parameters": state.params, "optimiser": state.opt, "EMA": state.ema, "frozen": frozen, "batch": batch}
    return Planned(f"{stage.name} step", lower, given, mesh, stage.config.train.batch_size, count)


def preview(stage: DiffusionStage, mesh: Mesh) -> Planned:
    """The samples that training shows, of the averaged weights as they lie on its devices, beside all that an update is given."""
    texts = stage.denoiser.conditioning.fields == ("text",)
    number = filled(min(max(PREVIEWS, len(stage.config.sample.prompts)), MAX_PROMPTS) if texts else PREVIEWS, mesh)
    beside = train_step(stage, mesh).given
    averaged, first = beside["EMA"][str(stage.config.ema.decays[0])], _placed(stage.first_stage_params, replicated(mesh))
    inputs = _placed(_drawing(stage, number)[1], batch_sharding(mesh))
    given = {**beside, "first stage": first, "pictures": inputs}

    def lower() -> Any:
        with jax.set_mesh(mesh):
            return stage.draw.lower(averaged, first, inputs)

    return Planned("preview", lower, given, mesh, number, partial(_counted, stage.draw, averaged, first, inputs))


def sampler(stage: DiffusionStage, mesh: Mesh) -> Planned:
    """From noise to images as `sample` draws them: on one device, its share of `sample.batch_size` on a host."""
    alone, number = _one_device(mesh, stage.config.sample.batch_size)
    params = {**stage.abstract_params, "first_stage": stage.first_stage_params}
    static, inputs = _drawing(stage, number)
    params, inputs = _placed(params, replicated(alone)), _placed(inputs, batch_sharding(alone))
    count = partial(_counted, partial(generate_jit, *static), params, inputs)
    lower = partial(generate_jit.lower, *static, params, inputs)
    return Planned("sampler", lower, {"parameters": params, "batch": inputs}, alone, number, count)


def _drawing(stage: DiffusionStage, number: int) -> tuple[tuple[Any, ...], Abstract]:
    """What `generate` is given besides parameters to draw a number of images: what is static, and the inputs."""
    arrays = _rows(_arrays(stage.denoiser.conditioning), number)
    noise = jax.ShapeDtypeStruct((number, *stage.preview_shape), jnp.float32)
    keys = jax.eval_shape(lambda: image_keys(0, np.arange(number)))
    inputs = GenerateInputs(noise, keys, arrays, arrays if stage.guided else None, float(stage.config.sample.guidance))
    return (stage.first_stage, stage.denoiser, stage.sampling, None), inputs


def encoder(stage: AutoencoderStage | DiffusionStage, mesh: Mesh) -> Planned:
    """Images to the moments that are cached: on one device, its share of a host's batch."""
    alone, number = _one_device(mesh, stage.config.data.encode_batch)
    if isinstance(stage, DiffusionStage):
        first, params = stage.first_stage, stage.first_stage_params
    else:
        first, params = FirstStage(stage.network), jax.eval_shape(stage.autoencoder, stage.abstract_params)
    side = stage.config.data.resolution
    images = jax.ShapeDtypeStruct((number, side, side, 3), jnp.uint8)
    program = encode_jit(first, alone)
    params, images = _placed(params, replicated(alone)), _placed(images, batch_sharding(alone))
    count = partial(_counted, program, params, images)
    return Planned("encoder", partial(program.lower, params, images), {"parameters": params, "batch": images}, alone, number, count)


def _one_device(mesh: Mesh, host_batch: int) -> tuple[Mesh, int]:
    """A mesh of the first device, and how many of a host's batch fall to each of its devices."""
    devices = list(mesh.devices.flat)
    first = devices[0].process_index
    beside = sum(device.process_index == first for device in devices)
    return make_mesh(devices=devices[:1], slices=1), -(-host_batch // beside)


def _key() -> Abstract:
    return jax.eval_shape(lambda: jax.random.key(0))


def _placed(tree: Any, placement: Any) -> Abstract:
    """Abstract arrays with a placement; numbers stay."""
    return jax.tree.map(lambda a: a if isinstance(a, float) else jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placement), tree)


def _counted(program: Callable[..., Any], *given: Abstract) -> tuple[int, int]:
    """Operations of a program that computes nothing anew, twice."""
    plain = jax.tree.map(lambda a: a if isinstance(a, float) else jax.ShapeDtypeStruct(a.shape, a.dtype), given)
    flops = count_flops(program, *plain)
    return flops, flops


def _rows(tree: Any, number: int) -> Abstract:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((number, *a.shape[1:]), a.dtype), tree)


def _arrays(conditioning: Conditioning) -> Abstract:
    """What the conditioners take of one example."""
    return {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in conditioning.null(1).items()}


def _source(config: ConfigDict, conditioning: Conditioning) -> Any:
    """What a stage asks of its source before there are data: the empty caption's embedding where captions come as embeddings."""
    text = next((c for c in conditioning.conditioners if isinstance(c, TextConditioner)), None)
    if text is None or not (text.frozen and config.data.cache):
        return ()
    made = jax.eval_shape(lambda key: text.apply(text.init(key), text.null(1))["crossattn"], _key())
    return SimpleNamespace(empty=np.zeros(made.shape, text.network.dtype))


def _batch(stage: AutoencoderStage | DiffusionStage) -> Abstract:
    """The global batch of a stage, without placement."""
    number, side = stage.config.train.batch_size, stage.config.data.resolution
    if isinstance(stage, AutoencoderStage):
        return {"image": jax.ShapeDtypeStruct((number, side, side, 3), jnp.uint8)}
    height, width = max(bucket_sizes(stage.config.data), key=math.prod, default=(side, side))
    image = jax.ShapeDtypeStruct((number, height, width, 3), jnp.uint8)
    arrays, first = _arrays(stage.trained.conditioning), stage.first_stage
    if not stage.config.data.cache:
        latents = {"image": image}
    else:
        moments = jax.eval_shape(lambda p, x: first.moments(p, to_float(x)), stage.first_stage_params, image)
        latents = {"moments": jax.ShapeDtypeStruct(moments.shape, jnp.float32)}
    if "mask" in stage.trained.conditioning.names:
        del arrays["mask"]
        latents["hole"] = jax.ShapeDtypeStruct((number, height, width), jnp.bool_)
    return {**latents, **_rows(arrays, number)}
