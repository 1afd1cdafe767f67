"""A latent diffusion model as one object: networks built from a configuration, a model directory read and written, and sampling.

`FirstStage` and `Denoiser` are static descriptions whose methods are pure functions of their parameters; `LatentDiffusion` holds both with
their parameters and is what `ldm_jax.load` returns.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ldm_jax.conditioning.build import Model, build_conditioning
from ldm_jax.conditioning.conditioner import Arrays, Conditioning
from ldm_jax.conditioning.conditioners import TextConditioner
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError, write_bytes
from ldm_jax.diffusion.guidance import autoguided, guided
from ldm_jax.diffusion.process import PROCESSES, DiscreteProcess, Process, expand, make_process
from ldm_jax.diffusion.samplers import Known, SamplerSettings, image_keys, initial_noise, invert, sampling_grid, trajectory
from ldm_jax.diffusion.schedules import WITHOUT_ENDS
from ldm_jax.model_directory import (
    PARTS,
    TOKENIZER,
    Params,
    check_shapes,
    load_params,
    load_settings,
    module_settings,
    read_info,
    save_part,
    writing,
)
from ldm_jax.nn.autoencoder import Autoencoder, IdentityAutoencoder, KLAutoencoder, VQAutoencoder
from ldm_jax.nn.dit import DiT
from ldm_jax.nn.unet import UNet
from ldm_jax.sampling import Sampling, check_guidance, check_request, is_plain, make_sampling, per_image_scale
from ldm_jax.sharding.mesh import make_mesh, replicated, split_host_arrays

AUTOENCODERS: dict[str, type[Autoencoder]] = {"kl": KLAutoencoder, "vq": VQAutoencoder, "identity": IdentityAutoencoder}
DENOISERS: dict[str, type[UNet] | type[DiT]] = {"unet": UNet, "dit": DiT}


def apply(network: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """A network as a function of its parameters and inputs."""
    return network.apply({"params": params}, *args, **kwargs)


@dataclass(frozen=True)
class FirstStage:
    """The autoencoder with the affine map between raw and scaled latents: scaled = (raw - shift) / scale, per channel or one for all."""

    network: Autoencoder
    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)

    def moments(self, params: Params, images: jax.Array) -> jax.Array:
        """Float images [B,H,W,3] in [-1, 1] to raw moments: [B,h,w,2c] (mean, log-variance), or the raw latents where they are certain."""
        return apply(self.network, params, images, method="moments")

    def scaled(self, raw: jax.Array) -> jax.Array:
        return (raw - jnp.asarray(self.shift, raw.dtype)) / jnp.asarray(self.scale, raw.dtype)

    def latents(self, moments: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Scaled latents [B,h,w,c] of raw moments: the mode, or a sample where a key is given."""
        return self.scaled(self.network.sample(moments, key))

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Scaled latents [B,h,w,c] to float images [B,H,W,3], not clipped."""
        raw = latents * jnp.asarray(self.scale, latents.dtype) + jnp.asarray(self.shift, latents.dtype)
        return apply(self.network, params, raw, method="decode")


@dataclass(frozen=True)
class Denoiser:
    """The network of the second stage with the process it inverts and what it is conditioned on.

    Parameters are {"denoiser": ..., "conditioner": ...}.
    """

    network: UNet | DiT
    conditioning: Conditioning
    process: Process
    prediction: str

    def init(self, key: jax.Array, latent_shape: Sequence[int]) -> Params:
        """Parameters for latents [h, w, c]."""
        keys = jax.random.split(key)
        conditioner = self.conditioning.init(keys[0])
        condition = self.conditioning.apply(conditioner, self.conditioning.null(1))
        x = jnp.zeros((1, *latent_shape))
        return {"denoiser": self.network.init(keys[1], x, jnp.zeros((1,)), **condition)["params"], "conditioner": conditioner}

    def condition(self, params: Params, arrays: Arrays) -> Arrays:
        return self.conditioning.apply(params["conditioner"], arrays)

    def denoise(self, params: Params, x_t: jax.Array, t: jax.Array, condition: Arrays, dropout_key: jax.Array | None = None) -> jax.Array:
        """The raw prediction [B,h,w,c] for x_t at t [B] in the process's units; dropout acts where a key is given."""
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        features = self.process.time_features(t)
        x_t = x_t * expand(self.process.input_scale(t), x_t).astype(x_t.dtype)
        return apply(self.network, params["denoiser"], x_t, features, **condition, deterministic=dropout_key is None, rngs=rngs)


class GenerateInputs(NamedTuple):
    """What `generate` draws images of.

    Attributes:
      noise: [B,h,w,c], standard normal.
      keys: typed PRNG keys [B], for noise on the way.
      arrays: what the conditioners take.
      null: what guidance moves away from, None for none.
      scale: of guidance, a scalar or [B].
      init: scaled latents [B,h,w,c] to start from, None for pure noise.
      known: scaled latents to keep outside a hole, None for none.
    """

    noise: Any
    keys: jax.Array
    arrays: Arrays
    null: Arrays | None = None
    scale: Any = 1.0
    init: Any = None
    known: Known | None = None


def generate(
    first_stage: FirstStage,
    denoiser: Denoiser,
    sampling: Sampling,
    weak: Denoiser | None,
    params: Params,
    inputs: GenerateInputs,
) -> tuple[jax.Array, jax.Array]:
    """Noise [B,h,w,c] to images uint8 [B,H,W,3] and states on the way, decoded, [recorded,B,H,W,3].

    Conditions are computed once; then come the sampler's loop and the decoder.

    Pure; the first four arguments are static. `params` has the parameters of `weak`, which guides where it is given, under "weak".
    """
    process, prediction, settings = denoiser.process, denoiser.prediction, sampling.sampler
    condition = denoiser.condition(params, inputs.arrays)
    denoise: Any = partial(denoiser.denoise, params, condition=condition)
    if weak is not None:
        other = partial(weak.denoise, params["weak"], condition=weak.condition(params["weak"], inputs.arrays))
        denoise = autoguided(denoise, other, inputs.scale, sampling.guidance, process, prediction)
    elif inputs.null is not None:
        grid = sampling_grid(process, settings, inputs.init is not None)
        null = denoiser.condition(params, inputs.null)
        denoise = partial(denoiser.denoise, params)
        denoise = guided(denoise, condition, null, inputs.scale, sampling.guidance, process, prediction, grid, settings.eta)
    every = sampling.record_every
    drawn = trajectory(denoise, process, prediction, settings, inputs.noise, inputs.keys, inputs.init, inputs.known, every)

    def decoded(latents: jax.Array) -> jax.Array:
        return to_uint8(first_stage.decode(params["first_stage"], latents))

    return decoded(drawn.x0), jax.lax.map(decoded, drawn.states)


generate_jit = jax.jit(generate, static_argnums=(0, 1, 2, 3))


def inverted(denoiser: Denoiser, settings: SamplerSettings, params: Params, latents: jax.Array, arrays: Arrays) -> jax.Array:
    """Scaled latents [B,h,w,c] to the noise that they are drawn from. Pure; the first two arguments are static."""
    denoise = partial(denoiser.denoise, params, condition=denoiser.condition(params, arrays))
    return invert(denoise, denoiser.process, denoiser.prediction, settings, latents)


inverted_jit = jax.jit(inverted, static_argnums=(0, 1))


def to_float(images: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """uint8 images to floats in [-1, 1]."""
    return images.astype(dtype) / 127.5 - 1.0


def to_uint8(images: jax.Array) -> jax.Array:
    """Float images in [-1, 1] to uint8, rounded and clipped."""
    return jnp.clip(jnp.round((images.astype(jnp.float32) + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def compute_dtype(name: str) -> Any:
    """The dtype of a `train.dtype` field; "auto" is bfloat16 on accelerators and float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name).type


def _build(table: Mapping[str, type], group: Mapping[str, Any], where: str, **more: Any) -> Any:
    """The module of `group["kind"]` with the fields that the group has. Raises UserError."""
    kind = group["kind"]
    if kind not in table:
        raise UserError(f"{where}.kind {kind!r} is not one of {', '.join(table)}")
    known = {f.name for f in fields(table[kind])} - {"parent", "name", "dtype", *more}
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in group.items() if k in known}
    module = table[kind](**settings, **more)
    try:
        module.check()
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return module


def build_autoencoder(group: Mapping[str, Any], dtype: Any) -> Autoencoder:
    """The network of a `first_stage` group. Raises UserError."""
    if "codebook" in group:
        group = {**group, "codebook_size": group["codebook"]["size"]}
    return _build(AUTOENCODERS, group, "first_stage", dtype=dtype)


def build_process(group: Mapping[str, Any]) -> Process:
    """The process of a `diffusion` group. Raises UserError."""
    known = {field.name for field in fields(PROCESSES.get(group["process"], DiscreteProcess))}
    settings = {name: tuple(group[name]) if name == "betas" else group[name] for name in known if name in group}
    if settings.get("schedule") in WITHOUT_ENDS:
        settings |= {"start": None, "end": None}  # whatever the defaults are
    try:
        return make_process(group["process"], **settings)
    except ValueError as error:
        raise UserError(f"diffusion.process: {error}") from error


def build_denoiser(
    denoiser: Mapping[str, Any], diffusion: Mapping[str, Any], conditioning: Conditioning, latent_channels: int, dtype: Any
) -> Denoiser:
    """The second stage of a configuration's groups. Raises UserError."""
    network = _build(DENOISERS, denoiser, "denoiser", out_channels=latent_channels, dtype=dtype)
    return Denoiser(network, conditioning, build_process(diffusion), diffusion["prediction"])


class LatentDiffusion:
    """A trained model: `sample`, `encode`, `decode`, `denoise`, `condition`. Without a denoiser it is an autoencoder alone.

    Attributes:
      info: what `model.json` holds: resolution, latent statistics, diffusion settings, sampling defaults.
      params: {"first_stage": ..., "denoiser": ..., "conditioner": ...}, float32.
    """

    def __init__(self, first_stage: FirstStage, denoiser: Denoiser | None, params: Params, info: dict[str, Any]) -> None:
        self.first_stage, self.denoiser, self.info = first_stage, denoiser, info
        self.mesh = make_mesh()
        self.params = jax.device_put(params, replicated(self.mesh))

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) at the training resolution."""
        size = self.info["resolution"] // self.first_stage.network.factor
        return size, size, self.first_stage.network.latent_channels

    def encode(self, images: np.ndarray, key: jax.Array | None = None) -> np.ndarray:
        """Images [N,H,W,3], uint8 or float in [-1, 1], to scaled latents float32 [N,h,w,c]: the mode, or a sample where a key is given.

        Raises ValueError for a size that the autoencoder's factor does not divide.
        """
        factor = self.first_stage.network.factor
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(f"images of {images.shape[1]}x{images.shape[2]} are not divisible by the autoencoder's factor {factor}")
        floats = to_float(jnp.asarray(images)) if images.dtype == np.uint8 else jnp.asarray(images)
        return np.asarray(self._encode(self.params["first_stage"], floats, key))

    @cached_property
    def _encode(self) -> Any:
        stage = self.first_stage
        return jax.jit(lambda params, images, key: stage.latents(stage.moments(params, images), key))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Scaled latents [N,h,w,c] to float32 images [N,H,W,3], not clipped."""
        return np.asarray(self._decode(self.params["first_stage"], jnp.asarray(latents)))

    @cached_property
    def _decode(self) -> Any:
        return jax.jit(self.first_stage.decode)

    def masked(self, images: np.ndarray, masks: np.ndarray) -> np.ndarray:
        """What the input `mask` of `sample` is, from pictures with holes (section 4.5); what was in a hole is not looked at.

        Args:
          images: uint8 [N,H,W,3].
          masks: [N,H,W], 1 in the hole and 0 outside.

        Returns float32 [N,h,w,c+1]: the scaled latents of the pictures with empty holes, and the masks at their size, 1 and -1.
        """
        factor = self.first_stage.network.factor
        gray = any(getattr(c, "style", "") == "sd" for c in self._needs_denoiser().conditioning.conditioners)
        hole = masks[..., None].astype(np.float32)
        latents = self.encode(np.asarray(to_float(jnp.asarray(images))) * (1 - hole) + (0.0 if gray else -1.0) * hole)
        small = masks[:, ::factor, ::factor, None].astype(np.float32) * 2 - 1
        return np.concatenate([latents, small], axis=-1)

    def condition(self, batch: Mapping[str, Any]) -> Arrays:
        """A batch's raw fields (`text`: list of str, ...) to the denoiser's conditioning."""
        denoiser = self._needs_denoiser()
        return denoiser.condition(self.params, denoiser.conditioning.prepare(batch))

    def denoise(self, x_t: jax.Array, t: jax.Array, condition: Arrays) -> jax.Array:
        """The network's raw prediction for scaled latents x_t [N,h,w,c] at t [N] in the process's units."""
        return self._needs_denoiser().denoise(self.params, jnp.asarray(x_t), jnp.asarray(t), condition)

    def sample(
        self,
        num: int | None = None,
        steps: int | None = None,
        guidance: float | Sequence[float] | None = None,
        sampler: str | None = None,
        seed: int | None = None,
        negative: str | None = None,
        prompts: Sequence[str] | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        batch_size: int | None = None,
        guidance_kind: str | None = None,
        guidance_interval: Sequence[float] | None = None,
        guidance_rescale: float | None = None,
        init_images: np.ndarray | None = None,
        strength: float | None = None,
        holes: np.ndarray | None = None,
        noise: np.ndarray | None = None,
        weak: "LatentDiffusion | None" = None,
        **inputs: Sequence[Any],
    ) -> np.ndarray:
        """Draws images, uint8 [N,H,W,3]. What is not given is the model's own default (`info["sample"]`).

        Args:
          num: images; by default one for each input. One input is repeated `num` times.
          guidance: scale of guidance, 1 is none; a number, or one for each image.
          negative: a prompt to move away from, in place of the empty one.
          prompts: one text an image.
          guidance_kind, guidance_interval, guidance_rescale: see `diffusion.guidance.Guidance`.
          init_images: uint8 [N or 1,H,W,3] of the training resolution, to start from, with `strength`; with `holes` to keep outside them.
          strength: in (0, 1], the share of the steps that are run from `init_images`.
          holes: [N or 1,H,W], 1 where `init_images` are painted anew and 0 where they stay, by any model (arXiv 2201.09865).
          noise: float32 [N,h,w,c] in place of the seed's, as `invert` gives it.
          weak: a weaker model of the same latents and conditions, which guidance moves away from instead (autoguidance).
          **inputs: what the model's conditioners take, by their names, one an image: `label`, `boxes`, `segmentation`, ...

        Image i depends on (seed, i, its inputs) alone, not on the batch it is drawn in.

        Raises: UserError for inputs that do not go together.
        """
        options = {name: value for name, value in locals().items() if name not in ("self", "inputs")}
        return self._sample(0, SimpleNamespace(**options), inputs)[0]

    def sample_states(self, every: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """As `sample` with the same options; images uint8 [N,H,W,3] and the states after every `every` steps, decoded, [S,N,H,W,3]."""
        if every < 1:
            raise UserError(f"states are kept after every 1 step or more, not {every}")
        known = [name for name in inspect.signature(self.sample).parameters if name != "inputs"]
        return self._sample(every, SimpleNamespace(**{name: options.pop(name, None) for name in known}), options)

    def invert(self, images: np.ndarray, steps: int | None = None, **inputs: Sequence[Any]) -> np.ndarray:
        """The noise float32 [N,h,w,c] from which `sample(noise=..., sampler="ddim", guidance=1, steps=...)` draws these images again,
        nearly: the more steps, the nearer (arXiv 2010.02502, section 4.3).

        Args:
          images: uint8 [N,H,W,3] of the training resolution.
          **inputs: as for `sample`, what each image is told to show.

        Raises: UserError.
        """
        denoiser, defaults = self._needs_denoiser(), self.info["sample"]
        given, total = self._inputs(inputs, len(images), None)
        arrays = denoiser.conditioning.prepare({name: list(values) for name, values in given.items()})
        settings = SamplerSettings("ddim", steps or defaults["steps"], spacing=defaults["spacing"])

        try:
            return np.asarray(inverted_jit(denoiser, settings, self.params, self._init_latents(images, total), arrays))
        except ValueError as error:
            raise UserError(f"cannot invert: {error}") from error

    def _sample(self, every: int, asked: SimpleNamespace, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Images and states of `sample`'s options."""
        denoiser, defaults = self._needs_denoiser(), self.info["sample"]
        check_request(asked)
        guiding = {name: getattr(asked, name) for name in ("guidance_kind", "guidance_interval", "guidance_rescale")}
        own = {name: getattr(asked, name) for name in ("steps", "sampler", "eta", "spacing", "strength")}
        sampling = replace(make_sampling(defaults, **own, **guiding), record_every=every)
        prompts = {} if asked.prompts is None else {"text": asked.prompts}
        given, total = self._inputs({**inputs, **prompts}, asked.num, asked.negative)
        scale = per_image_scale(defaults["guidance"] if asked.guidance is None else asked.guidance, total)
        check_guidance(sampling, scale, guiding, asked.weak is not None or bool(denoiser.conditioning.conditioners))
        request = self._fixed(asked, total)
        size = min(asked.batch_size or defaults["batch_size"], total)
        size = -(-size // self.mesh.size) * self.mesh.size  # every device has as many
        drawn = []
        for start in range(0, total, size):
            index = np.minimum(np.arange(start, start + size), total - 1)  # the last batch is filled up, so that one program serves all
            arrays = denoiser.conditioning.prepare({name: [values[i] for i in index] for name, values in given.items()})
            null = None
            if asked.weak is None and not is_plain(sampling, scale):
                null = denoiser.conditioning.unconditional(arrays)
                if asked.negative is not None:
                    null |= denoiser.conditioning.prepare({"text": [asked.negative] * size}, only="text")
            scales = scale if isinstance(scale, float) else scale[index]
            batch = self._draw(sampling, request(index)._replace(arrays=arrays, null=null, scale=scales), asked.weak)
            drawn.append((batch[0][: total - start], batch[1][:, : total - start]))
        images, states = zip(*drawn, strict=True)
        return np.concatenate(images), np.concatenate(states, axis=1)

    def _fixed(self, asked: SimpleNamespace, total: int) -> Callable[[np.ndarray], GenerateInputs]:
        """What is given for each of `total` images, but for conditions: a function of their indices."""
        seed = self.info["sample"]["seed"] if asked.seed is None else asked.seed
        pictures = None if asked.init_images is None else self._init_latents(asked.init_images, total)
        holes = None if asked.holes is None else self._holes(asked.holes, total)
        if asked.noise is not None and asked.noise.shape != (total, *self.latent_shape):
            raise UserError(f"noise must be {[total, *self.latent_shape]}, not {list(asked.noise.shape)}")

        def of(index: np.ndarray) -> GenerateInputs:
            noise = np.asarray(initial_noise(seed, index, self.latent_shape)) if asked.noise is None else asked.noise[index]
            init = None if pictures is None or asked.strength is None else pictures[index]
            known = None if holes is None or pictures is None else Known(pictures[index], holes[index])
            return GenerateInputs(noise, image_keys(seed, index), {}, init=init, known=known)

        return of

    def _draw(self, sampling: Sampling, inputs: GenerateInputs, weak: "LatentDiffusion | None") -> tuple[np.ndarray, np.ndarray]:
        per_image = {name: value for name, value in inputs._asdict().items() if name != "keys" and not isinstance(value, float | None)}
        inputs = inputs._replace(**split_host_arrays(per_image, self.mesh))
        denoiser, other, params = self._needs_denoiser(), None, self.params
        if weak is not None:
            other, params = weak.weak_for(self), {**self.params, "weak": weak.params}
        try:
            images, states = jax.device_get(generate_jit(self.first_stage, denoiser, sampling, other, params, inputs))
        except ValueError as error:
            raise UserError(f"cannot sample: {error}") from error
        return np.asarray(images), np.asarray(states)

    def weak_for(self, model: "LatentDiffusion") -> Denoiser:
        """This model's denoiser, to guide another of the same latents. Raises UserError where it is not of them."""
        ours, theirs = self._needs_denoiser(), model._needs_denoiser()
        names = [[c.name for c in d.conditioning.conditioners] for d in (ours, theirs)]
        if self.latent_shape != model.latent_shape or names[0] != names[1]:
            raise UserError(
                f"the weak model has latents {self.latent_shape} and conditions {names[0]}, this one {model.latent_shape} and {names[1]}"
            )
        if (ours.process, ours.prediction) != (theirs.process, theirs.prediction):
            raise UserError("the weak model has another diffusion process or prediction than this one")
        return ours

    def _init_latents(self, images: np.ndarray, total: int) -> np.ndarray:
        """Scaled latents [total,h,w,c] of pictures to start from."""
        side = self.info["resolution"]
        if images.ndim != 4 or images.shape[1:] != (side, side, 3) or len(images) not in (1, total):
            raise UserError(f"init_images must be [1 or {total},{side},{side},3], not {list(images.shape)}")
        latents = self.encode(images)
        return latents if len(latents) == total else np.repeat(latents, total, axis=0)

    def _holes(self, holes: np.ndarray, total: int) -> np.ndarray:
        """Holes of pictures [N,H,W] at the size of latents, float32 [total,h,w,1]: 1 wherever a latent sees any of one."""
        side, factor = self.info["resolution"], self.first_stage.network.factor
        if holes.shape not in ((1, side, side), (total, side, side)):
            raise UserError(f"holes must be [1 or {total},{side},{side}], not {list(holes.shape)}")
        blocks = (holes > 0).reshape(len(holes), side // factor, factor, side // factor, factor)
        small = np.asarray(blocks.any(axis=(2, 4)))
        return np.broadcast_to(small[..., None], (total, *small.shape[1:], 1)).astype(np.float32)

    def _inputs(self, inputs: dict[str, Any], num: int | None, negative: str | None) -> tuple[dict[str, Sequence[Any]], int]:
        """What each conditioner is given, one for each image, and the number of images."""
        wanted = [c.name for c in self._needs_denoiser().conditioning.conditioners]
        unknown = sorted({*inputs, *(["text"] if negative is not None else [])} - set(wanted))
        if unknown:
            raise UserError(f"this model takes no {', '.join(unknown)}" + (f": it is given {', '.join(wanted)}" if wanted else ""))
        if isinstance(inputs.get("text"), str):
            raise UserError(f"prompts must be a list of texts, not the text {inputs['text']!r}")
        if "text" in wanted and not inputs.get("text"):
            inputs = {**inputs, "text": [""]}
        if missing := [name for name in wanted if name not in inputs]:
            raise UserError(f"this model needs {', '.join(f'{name}=[...]' for name in missing)}, one for each image")
        total = num or max((len(values) for values in inputs.values()), default=1)
        for name, values in inputs.items():
            if len(values) not in (1, total):
                what = "prompts" if name == "text" else name
                raise UserError(f"{len(values)} {what} for {total} images: give one, or one for each image")
        return {name: list(values) * (total if len(values) == 1 else 1) for name, values in inputs.items()}, total

    def _needs_denoiser(self) -> Denoiser:
        if self.denoiser is None:
            raise UserError("this is an autoencoder alone: it encodes and decodes, and has no denoiser to sample with")
        return self.denoiser

    def save(self, path: str | Path) -> None:
        """Writes a model directory; one that is there stays until this one is complete."""
        autoencoder = self.first_stage.network
        info = {**self.info, "shift": list(self.first_stage.shift), "scale": list(self.first_stage.scale)}
        with writing(path, info) as root:
            save_part(root / "first_stage", module_settings(autoencoder, AUTOENCODERS), self.params["first_stage"])
            if self.denoiser is None:
                return
            save_part(root / "denoiser", module_settings(self.denoiser.network, DENOISERS), self.params["denoiser"])
            save_part(root / "conditioner", info["conditioning"], self.params["conditioner"])
            for c in self.denoiser.conditioning.conditioners:
                if isinstance(c, TextConditioner) and c.tokenizer is not None:
                    write_bytes(root / "conditioner" / TOKENIZER, c.tokenizer.to_json().encode())


def init_autoencoder(network: Autoencoder, key: jax.Array, resolution: int) -> Params:
    """Fresh parameters of an autoencoder."""
    return network.init(key, jnp.zeros((1, resolution, resolution, 3))).get("params", {})


def abstract_params(first_stage: FirstStage, denoiser: Denoiser | None, resolution: int) -> Params:
    """Shapes and types of a model's parameters: {"first_stage": ..., "denoiser": ..., "conditioner": ...}."""
    network, key = first_stage.network, jax.random.key(0)
    params = {"first_stage": jax.eval_shape(partial(init_autoencoder, network, resolution=resolution), key)}
    if denoiser is not None:
        size = resolution // network.factor
        params |= jax.eval_shape(partial(denoiser.init, latent_shape=(size, size, network.latent_channels)), key)
    return params


def read_networks(path: str | Path, dtype: Any) -> tuple[FirstStage, Denoiser | None, dict[str, Any]]:
    """What a model directory holds, but for its weights: (first stage, denoiser, what `model.json` says). Raises UserError."""
    root = epath.Path(path)
    info = read_info(root)
    first_stage = FirstStage(build_autoencoder(load_settings(root / "first_stage"), dtype), tuple(info["shift"]), tuple(info["scale"]))
    if not (root / "denoiser").exists():
        return first_stage, None, info
    settings, group = load_settings(root / "denoiser"), load_settings(root / "conditioner")
    tokenizer = None
    if (root / "conditioner" / TOKENIZER).exists():
        tokenizer = Tokenizer.load(root / "conditioner" / TOKENIZER, group["text"]["max_length"])
    network = first_stage.network
    about = Model(info["resolution"], network.factor, network.latent_channels, dtype, tokenizer)
    denoiser = build_denoiser(settings, info["diffusion"], build_conditioning(group, about), network.latent_channels, dtype)
    return first_stage, denoiser, info


def load_first_stage(path: str | Path, dtype: Any) -> tuple[FirstStage, Params]:
    """The first stage of a model directory. Raises UserError."""
    root = epath.Path(path)
    info = read_info(root)
    stage = FirstStage(build_autoencoder(load_settings(root / "first_stage"), dtype), tuple(info["shift"]), tuple(info["scale"]))
    params = load_params(root / "first_stage")
    check_shapes(params, abstract_params(stage, None, info["resolution"])["first_stage"], str(root))
    return stage, params


def load_model(path: str | Path, dtype: str = "auto") -> LatentDiffusion:
    """Reads a model directory. Raises UserError where it is missing, incomplete or does not fit itself."""
    first_stage, denoiser, info = read_networks(path, compute_dtype(dtype))
    parts = PARTS if denoiser else PARTS[:1]
    params = {part: load_params(epath.Path(path) / part) for part in parts}
    check_shapes(params, abstract_params(first_stage, denoiser, info["resolution"]), str(path))
    return LatentDiffusion(first_stage, denoiser, params, info)
