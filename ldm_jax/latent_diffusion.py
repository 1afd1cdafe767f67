"""A latent diffusion model as one object: networks built from a configuration, a model directory read and written, and sampling.

`FirstStage` and `Denoiser` are static descriptions whose methods are pure functions of their parameters; `LatentDiffusion` holds both with
their parameters and is what `ldm_jax.load` returns.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from ldm_jax.conditioning.conditioner import Arrays, Conditioner, Conditioning, TextConditioner
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError, replace_directory, write_bytes, write_json
from ldm_jax.diffusion.guidance import guided
from ldm_jax.diffusion.process import Process, make_process
from ldm_jax.diffusion.samplers import SamplerSettings, image_keys, initial_noise, sample
from ldm_jax.nn.autoencoder import KLAutoencoder, sample_moments
from ldm_jax.nn.text_encoder import TextTransformer
from ldm_jax.nn.unet import UNet
from ldm_jax.sharding.mesh import make_mesh, replicated, split_host_arrays

FORMAT = 1
AUTOENCODERS: dict[str, type[KLAutoencoder]] = {"kl": KLAutoencoder}
DENOISERS: dict[str, type[UNet]] = {"unet": UNet}
Params = dict[str, Any]


def apply(network: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """A network as a function of its parameters and inputs."""
    return network.apply({"params": params}, *args, **kwargs)


@dataclass(frozen=True)
class FirstStage:
    """The autoencoder with the affine map between raw and scaled latents: scaled = (raw - shift) / scale, per channel or one for all."""

    network: KLAutoencoder
    shift: tuple[float, ...] = (0.0,)
    scale: tuple[float, ...] = (1.0,)

    def moments(self, params: Params, images: jax.Array) -> jax.Array:
        """Float images [B,H,W,3] in [-1, 1] to raw moments [B,h,w,2c] (mean, log-variance)."""
        return apply(self.network, params, images, method="moments")

    def scaled(self, raw: jax.Array) -> jax.Array:
        return (raw - jnp.asarray(self.shift, raw.dtype)) / jnp.asarray(self.scale, raw.dtype)

    def latents(self, moments: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Scaled latents [B,h,w,c] of raw moments: the mode, or a sample where a key is given."""
        return self.scaled(jnp.split(moments, 2, axis=-1)[0] if key is None else sample_moments(moments, key))

    def decode(self, params: Params, latents: jax.Array) -> jax.Array:
        """Scaled latents [B,h,w,c] to float images [B,H,W,3], not clipped."""
        raw = latents * jnp.asarray(self.scale, latents.dtype) + jnp.asarray(self.shift, latents.dtype)
        return apply(self.network, params, raw, method="decode")


@dataclass(frozen=True)
class Denoiser:
    """The network of the second stage with the process it inverts and what it is conditioned on.

    Parameters are {"denoiser": ..., "conditioner": ...}.
    """

    network: UNet
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
        return apply(self.network, params["denoiser"], x_t, features, **condition, deterministic=dropout_key is None, rngs=rngs)


def generate(
    first_stage: FirstStage,
    denoiser: Denoiser,
    settings: SamplerSettings,
    params: Params,
    noise: jax.Array,
    arrays: Arrays,
    null: Arrays,
    guidance: float | jax.Array,
    keys: jax.Array | None = None,
) -> jax.Array:
    """Noise [B,h,w,c] to images uint8 [B,H,W,3]: conditions once, the sampler's loop, the decoder.

    Pure; the first three arguments are static.
    """
    condition, unconditional = denoiser.condition(params, arrays), denoiser.condition(params, null)
    denoise = guided(partial(denoiser.denoise, params), condition, unconditional, guidance)
    latents = sample(denoise, denoiser.process, denoiser.prediction, settings, noise, keys)
    return to_uint8(first_stage.decode(params["first_stage"], latents))


generate_jit = jax.jit(generate, static_argnums=(0, 1, 2))


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
    known = {f.name for f in fields(table[kind])} - {"parent", "name", "dtype"}
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in group.items() if k in known}
    module = table[kind](**settings, **more)
    try:
        module.check()
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return module


def build_autoencoder(group: Mapping[str, Any], dtype: Any) -> KLAutoencoder:
    """The network of a `first_stage` group. Raises UserError."""
    return _build(AUTOENCODERS, group, "first_stage", dtype=dtype)


def build_conditioning(group: Mapping[str, Any], tokenizer: Tokenizer | None, dtype: Any) -> Conditioning:
    """The conditioners of a `conditioning` group; the tokenizer is needed where text is enabled."""
    conditioners: list[Conditioner] = []
    text = group["text"]
    if text["enabled"]:
        assert tokenizer is not None
        network = TextTransformer(
            tokenizer.vocab_size, text["max_length"], text["width"], text["depth"], text["num_heads"], text["head_dim"], dtype
        )
        conditioners.append(TextConditioner(tokenizer, network, text["drop_rate"]))
    return Conditioning(tuple(conditioners))


def build_process(group: Mapping[str, Any]) -> Process:
    """The process of a `diffusion` group. Raises UserError."""
    names = {"discrete": ("schedule", "start", "end", "num_steps"), "flow": ("shift",)}.get(group["process"], ())
    try:
        return make_process(group["process"], **{name: group[name] for name in names})
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
        guidance: float | None = None,
        sampler: str | None = None,
        seed: int | None = None,
        negative: str | None = None,
        prompts: Sequence[str] | None = None,
        eta: float | None = None,
        spacing: str | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Draws images, uint8 [N,H,W,3]. What is not given is the model's own default (`info["sample"]`).

        Args:
          num: images; by default one for each prompt. One prompt is repeated `num` times.
          guidance: scale of classifier-free guidance, 1 is none.
          negative: a prompt to move away from, in place of the empty one.
          prompts: one text an image.

        Image i depends on (seed, i, its prompt) alone, not on the batch it is drawn in.

        Raises: UserError for inputs that do not go together.
        """
        denoiser = self._needs_denoiser()
        for name, value in (("num", num), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        defaults = self.info["sample"]
        settings = _sampler_settings(defaults, steps, sampler, eta, spacing)
        prompts = self._prompts(prompts, num, negative)
        total = len(prompts) if prompts is not None else num or 1
        guidance = float(defaults["guidance"] if guidance is None else guidance)
        seed = defaults["seed"] if seed is None else seed
        size = min(batch_size or defaults["batch_size"], total)
        size = -(-size // self.mesh.size) * self.mesh.size  # every device has as many
        images = []
        for start in range(0, total, size):
            index = np.minimum(np.arange(start, start + size), total - 1)  # the last batch is filled up, so that one program serves all
            batch = {} if prompts is None else {"text": [prompts[i] for i in index]}
            arrays = denoiser.conditioning.prepare(batch)
            null = denoiser.conditioning.null(size) if negative is None else denoiser.conditioning.prepare({"text": [negative] * size})
            images.append(self._draw(denoiser, settings, seed, index, arrays, null, guidance)[: total - start])
        return np.concatenate(images)

    def _draw(
        self, denoiser: Denoiser, settings: SamplerSettings, seed: int, index: np.ndarray, arrays: Arrays, null: Arrays, guidance: float
    ) -> np.ndarray:
        noise = initial_noise(seed, index, self.latent_shape)
        split = split_host_arrays({"arrays": arrays, "null": null, "noise": np.asarray(noise)}, self.mesh)
        try:
            keys = image_keys(seed, index)
            images = generate_jit(
                self.first_stage, denoiser, settings, self.params, split["noise"], split["arrays"], split["null"], guidance, keys
            )
        except ValueError as error:
            raise UserError(f"cannot sample: {error}") from error
        return np.asarray(jax.device_get(images))

    def _prompts(self, prompts: Sequence[str] | None, num: int | None, negative: str | None) -> list[str] | None:
        """One prompt an image, or None for a model without text."""
        takes_text = any(c.name == "text" for c in self._needs_denoiser().conditioning.conditioners)
        if not takes_text:
            if prompts is not None or negative is not None:
                raise UserError("this model takes no text: leave prompts and negative prompts out")
            return None
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list of texts, not the text {prompts!r}")
        if not prompts:
            return [""] * (num or 1)
        if len(prompts) == 1:
            return list(prompts) * (num or 1)
        if num not in (None, len(prompts)):
            raise UserError(f"{len(prompts)} prompts for {num} images: give one prompt, or one for each image")
        return list(prompts)

    def _needs_denoiser(self) -> Denoiser:
        if self.denoiser is None:
            raise UserError("this is an autoencoder alone: it encodes and decodes, and has no denoiser to sample with")
        return self.denoiser

    def save(self, path: str | Path) -> None:
        """Writes a model directory; `model.json`, written last, makes it complete. A model that is there stays until then."""
        final = epath.Path(path)
        # Object storage has no rename: there the old model ends here.
        in_place = "://" in str(final)
        root = final if in_place else final.parent / f".{final.name}.new"
        if in_place:
            (root / "model.json").unlink(missing_ok=True)
        elif root.exists():
            root.rmtree()
        info = dict(self.info, format=FORMAT, shift=list(self.first_stage.shift), scale=list(self.first_stage.scale))
        _save_part(root / "first_stage", _settings(self.first_stage.network, "kl"), self.params["first_stage"])
        if self.denoiser is not None:
            _save_part(root / "denoiser", _settings(self.denoiser.network, "unet"), self.params["denoiser"])
            _save_part(root / "conditioner", info["conditioning"], self.params["conditioner"])
            for c in self.denoiser.conditioning.conditioners:
                if isinstance(c, TextConditioner):
                    write_bytes(root / "conditioner" / "tokenizer.json", c.tokenizer.to_json().encode())
        write_json(root / "model.json", info)
        if not in_place:
            replace_directory(Path(root), Path(final))


def _sampler_settings(
    defaults: Mapping[str, Any], steps: int | None, kind: str | None, eta: float | None, spacing: str | None
) -> SamplerSettings:
    if eta is None:
        eta = defaults["eta"] if kind is None else 0.0  # the stored eta belongs to the stored sampler
    steps = defaults["steps"] if steps is None else steps
    try:
        return SamplerSettings(kind or defaults["sampler"], steps, eta, spacing or defaults["spacing"])
    except ValueError as error:
        raise UserError(f"cannot sample: {error}") from error


def _settings(module: nn.Module, kind: str) -> dict[str, Any]:
    values = {f.name: getattr(module, f.name) for f in fields(module) if f.name not in ("parent", "name", "dtype")}
    return {"kind": kind, **values}


def _save_part(path: Path, settings: Mapping[str, Any], params: Params) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror or error}") from error
    flat = {".".join(k): np.asarray(jax.device_get(v)) for k, v in _flatten(params)}
    write_bytes(path / "weights.safetensors", save_safetensors(flat))
    write_json(path / "config.json", settings)


def _flatten(tree: Any, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, Mapping):
        return [(prefix, tree)]
    return [leaf for name in sorted(tree) for leaf in _flatten(tree[name], (*prefix, name))]


def _load_part(path: Path) -> tuple[dict[str, Any], Params]:
    try:
        settings = json.loads((path / "config.json").read_text())
        flat = load_safetensors((path / "weights.safetensors").read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is not a complete part of a model: {error}") from error
    params: Params = {}
    for name, value in flat.items():
        *groups, leaf = name.split(".")
        node = params
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value.astype(np.float32)
    return settings, params


def read_info(path: str | Path) -> dict[str, Any]:
    """What `model.json` of a model directory says. Raises UserError where it is missing, damaged or of another format."""
    file = epath.Path(path) / "model.json"
    if not file.exists():
        raise UserError(f"{path} is not a complete model directory: it has no model.json")
    try:
        info = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    found = info.get("format") if isinstance(info, dict) else None
    if found != FORMAT:
        raise UserError(f"{file} has format {found}; this version reads format {FORMAT}")
    return info


def load_first_stage(path: str | Path, dtype: Any) -> tuple[FirstStage, Params]:
    """The first stage of a model directory. Raises UserError."""
    root = epath.Path(path)
    info = read_info(root)
    settings, params = _load_part(root / "first_stage")
    stage = FirstStage(build_autoencoder(settings, dtype), tuple(info["shift"]), tuple(info["scale"]))
    expected = jax.eval_shape(partial(init_autoencoder, stage.network, resolution=info["resolution"]), jax.random.key(0))
    check_shapes(params, expected, str(root))
    return stage, params


def init_autoencoder(network: KLAutoencoder, key: jax.Array, resolution: int) -> Params:
    """Fresh parameters of an autoencoder."""
    return network.init(key, jnp.zeros((1, resolution, resolution, 3)))["params"]


def check_shapes(params: Params, expected: Params, where: str) -> None:
    """Raises UserError with one list of every missing, unexpected or mis-shaped tensor."""
    there = {".".join(k): v.shape for k, v in _flatten(params)}
    wanted = {".".join(k): v.shape for k, v in _flatten(expected)}
    wrong = [
        f"{name}: {there.get(name, 'missing')} there, {wanted.get(name, 'not expected')} wanted"
        for name in sorted({*there, *wanted})
        if there.get(name) != wanted.get(name)
    ]
    if wrong:
        raise UserError(f"{where} does not fit its configuration: {'; '.join(wrong)}")


def load_model(path: str | Path, dtype: str = "auto") -> LatentDiffusion:
    """Reads a model directory. Raises UserError where it is missing, incomplete or does not fit itself."""
    root = epath.Path(path)
    compute = compute_dtype(dtype)
    first_stage, first_params = load_first_stage(root, compute)
    info = read_info(root)
    params: Params = {"first_stage": first_params}
    if not (root / "denoiser").exists():
        return LatentDiffusion(first_stage, None, params, info)
    settings, params["denoiser"] = _load_part(root / "denoiser")
    conditioning_group, params["conditioner"] = _load_part(root / "conditioner")
    text = conditioning_group["text"]
    tokenizer = Tokenizer.load(root / "conditioner" / "tokenizer.json", text["max_length"]) if text["enabled"] else None
    conditioning = build_conditioning(conditioning_group, tokenizer, compute)
    settings.pop("out_channels")
    denoiser = build_denoiser(settings, info["diffusion"], conditioning, first_stage.network.latent_channels, compute)
    model = LatentDiffusion(first_stage, denoiser, params, info)
    expected = jax.eval_shape(partial(denoiser.init, latent_shape=model.latent_shape), jax.random.key(0))
    check_shapes({k: params[k] for k in expected}, expected, str(root))
    return model
