"""The two stages: what they compute, as pure functions of their parameters, and how a configuration's groups build them.

`FirstStage` and `Denoiser` are static descriptions; `generate` is the whole way from noise to images in one jitted program.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.conditioner import Arrays, Conditioning
from ldm_jax.conditioning.conditioners import MaskConditioner, array_of
from ldm_jax.config import UserError
from ldm_jax.diffusion.guidance import autoguided, guided
from ldm_jax.diffusion.process import PROCESSES, DiscreteProcess, Process, expand, make_process
from ldm_jax.diffusion.samplers import Known, SamplerSettings, invert, sampling_grid, trajectory
from ldm_jax.diffusion.schedules import ENDS
from ldm_jax.model_directory import Params
from ldm_jax.nn import tiled_autoencoder
from ldm_jax.nn.autoencoder import Autoencoder, IdentityAutoencoder, KLAutoencoder, VQAutoencoder
from ldm_jax.nn.dit import DiT
from ldm_jax.nn.tiling import tiled_denoise
from ldm_jax.nn.unet import UNet
from ldm_jax.sampling import Sampling, Tiles

AUTOENCODERS: dict[str, type[Autoencoder]] = {"kl": KLAutoencoder, "vq": VQAutoencoder, "identity": IdentityAutoencoder}
DENOISERS: dict[str, type[UNet] | type[DiT]] = {"unet": UNet, "dit": DiT}


def apply(network: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """A network as a function of its parameters and inputs."""
    return network.apply({"params": params}, *args, **kwargs)


def any_hole(holes: Any, factor: int) -> Any:
    """Holes of pictures, bool [N,H,W], at the size of latents [N,h,w]: wherever a latent sees any of one."""
    n, height, width = holes.shape
    return holes.reshape(n, height // factor, factor, width // factor, factor).any(axis=(2, 4))


def pasted(drawn: np.ndarray, images: np.ndarray, holes: np.ndarray) -> np.ndarray:
    """Images uint8 [N,H,W,3] as drawn inside of holes [N or 1,H,W] (not 0), and as given outside."""
    return np.where(holes[..., None] != 0, drawn, images)


@dataclass(frozen=True)
class FirstStage:
    """The autoencoder with the affine map between raw and scaled latents: scaled = (raw - shift) / scale, per channel or one for all."""

    network: Autoencoder
    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)

    def moments(self, params: Params, images: jax.Array, tiles: Tiles | None = None) -> jax.Array:
        """Float images [B,H,W,3] in [-1, 1] to raw moments: [B,h,w,2c] (mean, log-variance), or the raw latents where they are certain."""
        if tiles is not None:
            return tiled_autoencoder.moments(self.network, params, images, tiles.tiling, tiles.passes)
        return apply(self.network, params, images, method="moments")

    def scaled(self, raw: jax.Array) -> jax.Array:
        return (raw - jnp.asarray(self.shift, raw.dtype)) / jnp.asarray(self.scale, raw.dtype)

    def latents(self, moments: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Scaled latents [B,h,w,c] of raw moments: the mode, or a sample where a key is given."""
        return self.scaled(self.network.sample(moments, key))

    def masked(
        self, params: Params, images: jax.Array, holes: jax.Array, conditioner: MaskConditioner, tiles: Tiles | None = None
    ) -> jax.Array:
        """What the denoiser is told of pictures with holes; what was in a hole is not looked at (section 4.5).

        Args:
          images: float [B,H,W,3] in [-1, 1].
          holes: bool [B,H,W], True in the hole.

        Returns [B,h,w,c+1]: the scaled latents of the pictures with empty holes, and the holes at their size, 1 and -1.
        """
        factor, empty = self.network.factor, 0.0 if conditioner.style == "sd" else -1.0
        latents = self.latents(self.moments(params, jnp.where(holes[..., None], jnp.asarray(empty, images.dtype), images), tiles))
        small = any_hole(holes, factor) if conditioner.shrink == "any" else holes[:, ::factor, ::factor]
        return jnp.concatenate([latents, jnp.where(small[..., None], 1.0, -1.0).astype(latents.dtype)], axis=-1)

    def decode(self, params: Params, latents: jax.Array, tiles: Tiles | None = None) -> jax.Array:
        """Scaled latents [B,h,w,c] to float images [B,H,W,3], not clipped."""
        raw = latents * jnp.asarray(self.scale, latents.dtype) + jnp.asarray(self.shift, latents.dtype)
        if tiles is not None:
            return tiled_autoencoder.decode(self.network, params, raw, tiles.tiling, tiles.passes)
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

    def denoise(self, params: Params, x_t: jax.Array, t: jax.Array, condition: Arrays, dropout_keys: jax.Array | None = None) -> jax.Array:
        """The raw prediction [B,h,w,c] for x_t at t [B] in the process's units; dropout acts where keys [B] are given."""
        features = self.process.time_features(t)
        x_t = x_t * expand(self.process.input_scale(t), x_t).astype(x_t.dtype)
        return apply(self.network, params["denoiser"], x_t, features, **condition, dropout_keys=dropout_keys)


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
    evaluate = _windowed(partial(denoiser.denoise, params), sampling.tiles)
    denoise: Any = partial(evaluate, condition=condition)
    if weak is not None:
        theirs = _windowed(partial(weak.denoise, params["weak"]), sampling.tiles)
        other = partial(theirs, condition=weak.condition(params["weak"], inputs.arrays))
        denoise = autoguided(denoise, other, inputs.scale, sampling.guidance, process, prediction)
    elif inputs.null is not None:
        grid = sampling_grid(process, settings, inputs.init is not None)
        null = denoiser.condition(params, inputs.null)
        denoise = guided(evaluate, condition, null, inputs.scale, sampling.guidance, process, prediction, grid, settings.eta)
    every = sampling.record_every
    drawn = trajectory(denoise, process, prediction, settings, inputs.noise, inputs.keys, inputs.init, inputs.known, every)

    def decoded(latents: jax.Array) -> jax.Array:
        return to_uint8(first_stage.decode(params["first_stage"], latents, sampling.decode_tiles))

    return decoded(drawn.x0), jax.lax.map(decoded, drawn.states)


def _windowed(denoise: Any, tiles: Tiles | None) -> Any:
    return denoise if tiles is None else tiled_denoise(denoise, tiles.tiling)


generate_jit = jax.jit(generate, static_argnums=(0, 1, 2, 3))


def masked(
    first_stage: FirstStage, conditioner: MaskConditioner, tiles: Tiles | None, params: Params, images: jax.Array, holes: jax.Array
) -> jax.Array:
    """`FirstStage.masked` of uint8 images. Pure; the first three arguments are static."""
    return first_stage.masked(params["first_stage"], to_float(images), holes, conditioner, tiles)


masked_jit = jax.jit(masked, static_argnums=(0, 1, 2))


def prepare(
    first_stage: FirstStage, conditioning: Conditioning, params: Params, batch: Mapping[str, Any], tiles: Tiles | None = None
) -> Arrays:
    """A batch's raw fields (`text`: list of str, ...) as the conditioners' arrays; an `image` uint8 [B,H,W,3] with a hole, `mask` [B,H,W]
    of 1 in the hole and 0 outside, is encoded, in windows where there are some. Raises UserError."""
    fields = dict(batch)
    for c in conditioning.conditioners:
        if isinstance(c, MaskConditioner):
            images = array_of("image", fields["image"], ("H", "W", 3), np.uint8)
            holes = array_of("mask", fields["mask"], ("H", "W"), np.float32)
            fields["mask"] = masked_jit(first_stage, c, tiles, params, images, holes > 0)
    return conditioning.prepare(fields)


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
    """The process of a `diffusion` group, the ends of its schedule written out, so that equal processes compare equal. Raises UserError."""
    known = {field.name for field in fields(PROCESSES.get(group["process"], DiscreteProcess))}
    settings = {name: tuple(group[name]) if name == "betas" else group[name] for name in known if name in group}
    if "schedule" in settings:
        own = ENDS.get(group["schedule"])  # None: those that earlier versions stored nevertheless are dropped
        settings |= {name: own and (settings.get(name) or own[i]) for i, name in enumerate(("start", "end"))}
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
