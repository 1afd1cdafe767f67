"""A latent diffusion model as one object: a model directory read and written, and sampling.

`LatentDiffusion` holds the two stages (`stages.py`) with their parameters and is what `ldm_jax.load` returns.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.build import Model, build_conditioning
from ldm_jax.conditioning.conditioner import Arrays
from ldm_jax.conditioning.conditioners import TextConditioner
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError
from ldm_jax.diffusion.samplers import Known, SamplerSettings, image_keys, initial_noise
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
from ldm_jax.paths import resolve, write_bytes
from ldm_jax.sampling import (
    Sampling,
    Tiles,
    check_guidance,
    check_levels,
    check_request,
    is_plain,
    make_sampling,
    make_tiles,
    per_image_scale,
    picture_size,
)
from ldm_jax.sharding.mesh import filled, make_mesh, replicated, split_host_arrays
from ldm_jax.stages import (
    AUTOENCODERS,
    DENOISERS,
    Denoiser,
    FirstStage,
    GenerateInputs,
    abstract_params,
    any_hole,
    build_autoencoder,
    build_denoiser,
    compute_dtype,
    generate_jit,
    inverted_jit,
    pasted,
    prepare,
    to_float,
)


class LatentDiffusion:
    """A trained model: `sample`, `encode`, `decode`, `denoise`, `condition`. Without a denoiser it is an autoencoder alone.

    Attributes:
      info: what `model.json` holds: resolution, latent statistics, diffusion settings, sampling defaults.
      params: {"first_stage": ..., "denoiser": ..., "conditioner": ...}, float32.
    """

    def __init__(self, first_stage: FirstStage, denoiser: Denoiser | None, params: Params, info: dict[str, Any]) -> None:
        self.first_stage, self.denoiser, self.info = first_stage, denoiser, info
        self.mesh = make_mesh(devices=jax.local_devices())  # of several processes each has a model of its own
        self.params = jax.device_put(params, replicated(self.mesh))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what `sample` takes, one for each image."""
        return self.denoiser.conditioning.fields if self.denoiser else ()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) at the training resolution."""
        return self._latent_shape((self.info["resolution"],) * 2)

    def _latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        network = self.first_stage.network
        return size[0] // network.factor, size[1] // network.factor, network.latent_channels

    def encode(self, images: np.ndarray, key: jax.Array | None = None, tile: int | None = None, tile_passes: int = 1) -> np.ndarray:
        """Images [N,H,W,3], uint8 or float in [-1, 1], to scaled latents float32 [N,h,w,c]: the mode, or a sample where a key is given.

        Args:
          tile: pixels of a window, for images one at a time whose activations are too large for memory; see `sampling.Tiles`.

        Raises ValueError for a size that the autoencoder's factor does not divide.
        """
        factor = self.first_stage.network.factor
        if images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(f"images of {images.shape[1]}x{images.shape[2]} are not divisible by the autoencoder's factor {factor}")
        floats = to_float(jnp.asarray(images)) if images.dtype == np.uint8 else jnp.asarray(images)
        tiles = make_tiles(tile, factor, passes=tile_passes)
        moments = _one_by_one(partial(self._moments, self.params["first_stage"], tiles=tiles), floats, tiles)
        return np.asarray(self._latents(moments, key))

    @cached_property
    def _moments(self) -> Any:
        return jax.jit(self.first_stage.moments, static_argnames="tiles")

    @cached_property
    def _latents(self) -> Any:
        return jax.jit(self.first_stage.latents)

    def decode(self, latents: np.ndarray, tile: int | None = None, tile_passes: int = 1) -> np.ndarray:
        """Scaled latents [N,h,w,c] to float32 images [N,H,W,3], not clipped; in windows of `tile` pixels, as `encode`."""
        tiles = make_tiles(tile, self.first_stage.network.factor, passes=tile_passes)
        decode = partial(self._decode, self.params["first_stage"], tiles=tiles)
        return np.asarray(_one_by_one(decode, jnp.asarray(latents), tiles))

    @cached_property
    def _decode(self) -> Any:
        return jax.jit(self.first_stage.decode, static_argnames="tiles")

    def prepare(self, batch: Mapping[str, Any], tiles: Tiles | None = None) -> Arrays:
        """A batch's raw fields as the conditioners' arrays; see `stages.prepare`."""
        return prepare(self.first_stage, self._needs_denoiser().conditioning, self.params, batch, tiles)

    def condition(self, batch: Mapping[str, Any]) -> Arrays:
        """A batch's raw fields to the denoiser's conditioning."""
        return self._needs_denoiser().condition(self.params, self.prepare(batch))

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
        guidance_parallel: float | None = None,
        guidance_radius: float | None = None,
        guidance_momentum: float | None = None,
        init_images: np.ndarray | None = None,
        strength: float | None = None,
        holes: np.ndarray | None = None,
        noise: np.ndarray | None = None,
        weak: "LatentDiffusion | None" = None,
        size: Sequence[int] | None = None,
        tile: int | None = None,
        decode_tile: int | None = None,
        tile_passes: int | None = None,
        first: int | None = None,
        **inputs: Sequence[Any],
    ) -> np.ndarray:
        """Draws images, uint8 [N,H,W,3]. What is not given is the model's own default (`info["sample"]`).

        Args:
          num: images; by default one for each input. One input is repeated `num` times.
          guidance: scale of guidance, 1 is none; a number, or one for each image.
          negative: a prompt to move away from, in place of the empty one.
          prompts: one text an image.
          guidance_kind, guidance_interval, ...: see `diffusion.guidance.Guidance`.
          init_images: uint8 [N or 1,H,W,3] to start from, with `strength`; with `holes` to keep outside them.
          strength: in (0, 1], the share of the steps that are run from `init_images`.
          holes: [N or 1,H,W], 1 where `init_images` are painted anew and 0 where they stay to the bit, by any model (arXiv 2201.09865).
          noise: float32 [N,h,w,c] in place of the seed's, as `invert` gives it.
          weak: a weaker model of the same latents and conditions, which guidance moves away from instead (autoguidance).
          size: (H, W) of the images, by default that of the inputs that are pictures, or the training resolution; larger ones are drawn
            as one (convolutional sampling, section 4.3.2), or
          tile: in overlapping windows of so many pixels, blended at every step, and encoded and decoded in windows too;
          decode_tile: in windows of so many pixels when they are encoded and decoded alone;
          tile_passes: see `sampling.Tiles`, 1 by default.
          first: the number of the first image, 0 by default: images 0 to 99 are the same drawn at once, or 0 to 49 and then 50 to 99.
          **inputs: what the model's conditioners take, by their names, one an image: `label`, `boxes`, `segmentation`, `low_res`,
            `neighbors`; `boxes` may come with `crop`, x0, y0, x1, y1 of the part of the whole that is drawn; an inpainting model
            takes `image` and `mask`, and what is outside of the hole comes back as it was.

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
          images: uint8 [N,H,W,3].
          **inputs: as for `sample`, what each image is told to show.

        Raises: UserError.
        """
        denoiser, defaults = self._needs_denoiser(), self.info["sample"]
        if steps is not None and steps < 1:
            raise UserError(f"steps must be at least 1, not {steps}")
        given, total = self._inputs(inputs, len(images), None)
        size = self._size(None, images, given)
        arrays = self.prepare(given)
        settings = SamplerSettings("ddim", steps or defaults["steps"], spacing=defaults["spacing"])

        try:
            return np.asarray(inverted_jit(denoiser, settings, self.params, self._init_latents(images, total, size), arrays))
        except ValueError as error:
            raise UserError(f"cannot invert: {error}") from error

    def _sample(self, every: int, asked: SimpleNamespace, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Images and states of `sample`'s options."""
        denoiser, defaults = self._needs_denoiser(), self.info["sample"]
        check_request(asked)
        guiding = {name: value for name, value in vars(asked).items() if name.startswith("guidance_")}
        own = {name: getattr(asked, name) for name in ("steps", "sampler", "eta", "spacing", "strength")}
        sampling = replace(make_sampling(defaults, **own, **guiding), record_every=every)
        sampling = self._with_tiles(sampling, asked)
        prompts = {} if asked.prompts is None else {"text": asked.prompts}
        given, total = self._inputs({**inputs, **prompts}, asked.num, asked.negative)
        scale = per_image_scale(defaults["guidance"] if asked.guidance is None else asked.guidance, total)
        guides = asked.weak is not None or denoiser.conditioning.guides or asked.negative is not None
        more = {"guidance": asked.guidance, "negative": asked.negative, "weak": asked.weak}
        check_guidance(sampling, scale, guiding | more, guides)
        check_levels(sampling, denoiser.process)
        request = self._fixed(asked, total, self._size(asked.size, asked.init_images, given))
        size = filled(min(asked.batch_size or defaults["batch_size"], total), self.mesh)
        drawn = []
        for start in range(0, total, size):
            index = np.minimum(np.arange(start, start + size), total - 1)  # the last batch is filled up, so that one program serves all
            arrays = self.prepare({name: [values[i] for i in index] for name, values in given.items()}, sampling.decode_tiles)
            null = None
            if asked.weak is None and guides and not is_plain(sampling, scale):
                null = denoiser.conditioning.unconditional(arrays)
                if asked.negative is not None:
                    null |= denoiser.conditioning.prepare({"text": [asked.negative] * size}, ("text",))
            scales = scale if isinstance(scale, float) else scale[index]
            batch = self._draw(sampling, request(index)._replace(arrays=arrays, null=null, scale=scales), asked.weak)
            drawn.append((batch[0][: total - start], batch[1][:, : total - start]))
        images, states = zip(*drawn, strict=True)
        return _pasted(np.concatenate(images), asked, given), np.concatenate(states, axis=1)

    def _size(self, asked: Sequence[int] | None, init_images: np.ndarray | None, given: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
        """(H, W) of the images that are drawn. Raises UserError."""
        factor, network = self.first_stage.network.factor, self._needs_denoiser().network
        pictures = {name: np.shape(given[name][0])[:2] for name in ("segmentation", "image", "mask") if name in given}
        if init_images is not None:
            pictures["init_images"] = np.shape(init_images)[1:3]
        if "low_res" in given:
            height, width = np.shape(given["low_res"][0])[:2]
            pictures["low_res"] = (height * factor, width * factor)
        return picture_size(asked, pictures, factor * network.multiple, self.info["resolution"])

    def _with_tiles(self, sampling: Sampling, asked: SimpleNamespace) -> Sampling:
        network = self._needs_denoiser().network
        factor, multiple = self.first_stage.network.factor, network.multiple
        if asked.tile is not None and ("boxes" in self.inputs or getattr(network, "places", False)):
            raise UserError(
                "tile: this model is told places in the whole picture, which a window of it is not; decode_tile has no such limit"
            )
        passes = 1 if asked.tile_passes is None else asked.tile_passes
        decode = make_tiles(asked.decode_tile or asked.tile, factor, passes=passes)
        return replace(sampling, tiles=make_tiles(asked.tile, factor, multiple), decode_tiles=decode)

    def _fixed(self, asked: SimpleNamespace, total: int, size: tuple[int, int]) -> Callable[[np.ndarray], GenerateInputs]:
        """What is given for each of `total` images of a size in pixels, but for conditions: a function of their indices."""
        shape = self._latent_shape(size)
        seed = self.info["sample"]["seed"] if asked.seed is None else asked.seed
        tiles = {"tile": asked.decode_tile or asked.tile, "tile_passes": 1 if asked.tile_passes is None else asked.tile_passes}
        pictures = None if asked.init_images is None else self._init_latents(asked.init_images, total, size, **tiles)
        holes = None if asked.holes is None else self._holes(asked.holes, total, size)
        if asked.noise is not None and asked.noise.shape != (total, *shape):
            raise UserError(f"noise must be {[total, *shape]}, not {list(asked.noise.shape)}")

        def of(index: np.ndarray) -> GenerateInputs:
            numbers = index + (asked.first or 0)
            noise = np.asarray(initial_noise(seed, numbers, shape)) if asked.noise is None else asked.noise[index]
            init = None if pictures is None or asked.strength is None else pictures[index]
            known = None if holes is None or pictures is None else Known(pictures[index], holes[index])
            return GenerateInputs(noise, image_keys(seed, numbers), {}, init=init, known=known)

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
        names = [list(d.conditioning.names) for d in (ours, theirs)]
        if self.latent_shape != model.latent_shape or names[0] != names[1]:
            raise UserError(
                f"the weak model has latents {self.latent_shape} and conditions {names[0]}, this one {model.latent_shape} and {names[1]}"
            )
        if (ours.process, ours.prediction) != (theirs.process, theirs.prediction):
            raise UserError("the weak model has another diffusion process or prediction than this one")
        return ours

    def _init_latents(self, images: np.ndarray, total: int, size: tuple[int, int], **tiles: Any) -> np.ndarray:
        """Scaled latents [total,h,w,c] of pictures to start from; `tiles` are as for `encode`."""
        if images.ndim != 4 or images.shape[1:] != (*size, 3) or len(images) not in (1, total) or images.dtype != np.uint8:
            raise UserError(f"init_images must be uint8 [1 or {total},{size[0]},{size[1]},3], not {images.dtype} {list(images.shape)}")
        latents = self.encode(images, **tiles)
        return latents if len(latents) == total else np.repeat(latents, total, axis=0)

    def _holes(self, holes: np.ndarray, total: int, size: tuple[int, int]) -> np.ndarray:
        """Holes of pictures [N,H,W] at the size of latents, float32 [total,h,w,1]: 1 wherever a latent sees any of one."""
        if holes.shape not in ((1, *size), (total, *size)):
            raise UserError(f"holes must be [1 or {total},{size[0]},{size[1]}], not {list(holes.shape)}")
        small = any_hole(holes > 0, self.first_stage.network.factor)
        return np.broadcast_to(small[..., None], (total, *small.shape[1:], 1)).astype(np.float32)

    def _inputs(self, inputs: dict[str, Any], num: int | None, negative: str | None) -> tuple[dict[str, Sequence[Any]], int]:
        """What each conditioner is given, one for each image, and the number of images."""
        wanted = list(self.inputs)
        unknown = sorted({*inputs, *(["text"] if negative is not None else [])} - {*wanted, *self._needs_denoiser().conditioning.optional})
        if unknown:
            raise UserError(f"this model takes no {', '.join(unknown)}" + (f": it is given {', '.join(wanted)}" if wanted else ""))
        if isinstance(inputs.get("text"), str):
            raise UserError(f"prompts must be a list of texts, not the text {inputs['text']!r}")
        if "text" in wanted and not inputs.get("text"):
            inputs = {**inputs, "text": [""]}
        if missing := [name for name in wanted if name not in inputs]:
            raise UserError(f"this model needs {', '.join(f'{name}=[...]' for name in missing)}, one for each image")
        if single := [name for name, values in inputs.items() if not hasattr(values, "__len__")]:
            raise UserError(f"{single[0]} must be a list, one for each image, not {inputs[single[0]]!r}")
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


def _one_by_one(function: Callable[..., jax.Array], arrays: jax.Array, tiles: Tiles | None) -> jax.Array:
    """A function of arrays [N,...], called for one at a time where they are worked on in tiles, to bound the memory."""
    return function(arrays) if tiles is None else jnp.concatenate([function(arrays[i : i + 1]) for i in range(len(arrays))])


def _pasted(drawn: np.ndarray, asked: SimpleNamespace, given: Mapping[str, Any]) -> np.ndarray:
    """Images uint8 [N,H,W,3] with what is outside of their holes as it was given."""
    for images, holes in ((asked.init_images, asked.holes), (given.get("image"), given.get("mask"))):
        if images is not None and holes is not None:
            drawn = pasted(drawn, np.stack(images), np.stack(holes))
    return drawn


def read_networks(path: str | Path, dtype: Any) -> tuple[FirstStage, Denoiser | None, dict[str, Any]]:
    """What a model directory holds, but for its weights: (first stage, denoiser, what `model.json` says). Raises UserError."""
    root = resolve(path)
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
    root = resolve(path)
    info = read_info(root)
    stage = FirstStage(build_autoencoder(load_settings(root / "first_stage"), dtype), tuple(info["shift"]), tuple(info["scale"]))
    params = load_params(root / "first_stage")
    check_shapes(params, abstract_params(stage, None, info["resolution"])["first_stage"], str(root))
    return stage, params


def load_model(path: str | Path, dtype: str = "auto") -> LatentDiffusion:
    """Reads a model directory. Raises UserError where it is missing, incomplete or does not fit itself."""
    first_stage, denoiser, info = read_networks(path, compute_dtype(dtype))
    parts = PARTS if denoiser else PARTS[:1]
    params = {part: load_params(resolve(path) / part) for part in parts}
    check_shapes(params, abstract_params(first_stage, denoiser, info["resolution"]), str(path))
    return LatentDiffusion(first_stage, denoiser, params, info)
