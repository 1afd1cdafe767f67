"""Folders of diffusers: whole pipelines read and written, and autoencoders alone."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError
from ldm_jax.interop import diffusers, dit, fields, text_encoders
from ldm_jax.interop.architecture import Architecture
from ldm_jax.interop.fields import read_json, understood
from ldm_jax.interop.importing import Networks, Part, build_networks, write_model
from ldm_jax.interop.keymap import KeyMap, under
from ldm_jax.interop.safetensors_file import Weights, open_weights
from ldm_jax.interop.scheduler import from_scheduler
from ldm_jax.nn.dit import DiT
from ldm_jax.nn.unet import UNet

_LARGEST_SIDE = 2**14  # of latents
_AUTOENCODERS = ("AutoencoderKL", "VQModel")
_UNETS = ("UNet2DConditionModel", "UNet2DModel")
_DITS = ("DiTTransformer2DModel", "Transformer2DModel")  # the second in pipelines of before the first


class _Text(NamedTuple):
    """A class of text encoders there: our kind, its settings from config.json, its map, and names that are not read."""

    kind: str
    settings: Callable[[Mapping[str, Any]], dict[str, Any]]
    key_map: Callable[[Mapping[str, Any], Collection[str]], KeyMap]
    ignored: Sequence[str]


_CLIP = _Text("clip", text_encoders.clip_from_hf, lambda p, names: text_encoders.clip_map(p, names=names), text_encoders.CLIP_IGNORED)
_TEXT = {
    "LDMBertModel": _Text(
        "transformer", text_encoders.ldmbert_from_hf, lambda p, names: text_encoders.ldmbert_map(p), text_encoders.LDMBERT_IGNORED
    ),
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    "T5EncoderModel": _Text(
        "t5", text_encoders.t5_from_hf, lambda p, names: text_encoders.t5_map(p, names=names), text_encoders.T5_IGNORED
    ),
}


class _Folder:
    """A pipeline's folder: which component is which class, their configurations and weights (those of a variant, such as fp16)."""

    def __init__(self, path: Path, variant: str = "") -> None:
        self.path = path
        self.variant = variant
        index = read_json(path / "model_index.json")
        self.pipeline = index.get("_class_name")
        named = {name: value[1] for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1]}
        if wrong := [name for name, made in named.items() if not isinstance(made, str) or Path(name).name != name]:
            raise UserError(f"{path} / model_index.json: {wrong} are no components")
        self.classes: dict[str, str] = named

    def find(self, classes: Collection[str]) -> str | None:
        """The name of the component that is of one of these classes."""
        return next((name for name, made in self.classes.items() if made in classes), None)

    def config(self, name: str, file: str = "config.json") -> dict[str, Any]:
        return {"_class_name": self.classes[name], **read_json(self.path / name / file)}

    def weights(self, name: str) -> Weights:
        return _open(self.path / name, self.variant)


def _open(path: Path, variant: str) -> Weights:
    try:
        return open_weights(path, variant=variant)
    except ValueError as error:
        raise UserError(str(error)) from error


def import_folder(path: str | Path, output: str | Path, tokenizer: str = "", dtype: Any = np.float32, variant: str = "") -> list[str]:
    """Writes a model directory of a pipeline's folder, or of an autoencoder's. Returns notes for the user. Raises UserError.

    `variant` is a word in the names of the weight files to read, such as "fp16".
    """
    root = Path(path)
    if (root / "model_index.json").exists():
        with understood(root):
            found = _read_pipeline(_Folder(root, variant), tokenizer)
        write_model(found.networks, found.parts, found.tokens, output, dtype)
        return found.notes
    with understood(root):
        networks, parts = _read_autoencoder(root, variant)
    write_model(networks, parts, None, output, dtype)
    return []


def _read_autoencoder(root: Path, variant: str) -> tuple[Networks, list[Part]]:
    config = read_json(root / "config.json")
    if config.get("_class_name") not in _AUTOENCODERS:
        raise UserError(f"{root} is a {config.get('_class_name')} alone: give the folder of its whole pipeline, or that of an autoencoder")
    first_stage = diffusers.autoencoder_settings(config)
    architecture = Architecture(first_stage, resolution=_side(config))
    networks = build_networks(architecture, *_latent_scale(config), None, {"format": "diffusers"})
    return networks, [_autoencoder_part(networks, root, _open(root, variant))]


def _side(config: Mapping[str, Any]) -> int:
    """`sample_size`, which may be one number or two that agree."""
    size = config.get("sample_size")
    side: Any = size[0] if isinstance(size, list) and len({*size}) == 1 else size
    if not fields.count(side) or side > _LARGEST_SIDE:
        raise UserError(f"{config.get('_class_name')}: sample_size {size} is not the side of a square")
    return side


def _latent_scale(config: Mapping[str, Any], pipeline: str | None = None) -> tuple[float, float]:
    """(shift, scale) of an autoencoder's latents: there scaled = (raw - shift_factor) * scaling_factor.

    Files of a VQModel without the factor are of latents that were never scaled, although diffusers' default would scale them; and
    LDMSuperResolutionPipeline scales nothing, whatever they say.
    """
    if pipeline == "LDMSuperResolutionPipeline":
        return 0.0, 1.0
    if config.get("latents_mean") or config.get("latents_std"):
        raise UserError("latents_mean and latents_std of an autoencoder have no counterpart here yet")
    default, scale = 1.0 if config.get("_class_name") == "VQModel" else 0.18215, config.get("scaling_factor")
    return float(config.get("shift_factor") or 0.0), 1.0 / float(default if scale is None else scale)


def _autoencoder_part(networks: Networks, path: Path, weights: Weights) -> Part:
    levels = len(networks.first_stage.network.channel_mult)
    keys = under("first_stage", diffusers.autoencoder_map(levels, networks.params["first_stage"]))
    return Part(str(path), diffusers.as_saved(keys, weights.shapes()), weights)


def _denoiser_part(networks: Networks, path: Path, weights: Weights, linear: bool) -> Part:
    assert networks.denoiser is not None
    keys = denoiser_map(networks, linear)
    plain = isinstance(networks.denoiser.network, UNet) and not networks.denoiser.network.transformer_depth
    return Part(str(path), diffusers.as_saved(keys, weights.shapes()) if plain else keys, weights)


class _Pipeline(NamedTuple):
    networks: Networks
    parts: list[Part]
    tokens: Tokenizer | None
    notes: list[str]


def _read_pipeline(folder: _Folder, tokenizer: str) -> _Pipeline:
    first, denoiser = folder.find(_AUTOENCODERS), folder.find((*_UNETS, *_DITS))
    text = folder.find(_TEXT)
    if first is None or denoiser is None or "scheduler" not in folder.classes:
        raise UserError(f"{folder.path} is no pipeline of latent diffusion that is known here: it has {folder.classes}")
    scheduler = from_scheduler(folder.config("scheduler", "scheduler_config.json"), folder.pipeline)
    autoencoder, config = folder.config(first), folder.config(denoiser)
    first_stage = diffusers.autoencoder_settings(autoencoder)
    settings, conditioning = _denoiser_groups(config, first_stage["latent_channels"])
    if bool(text) != (config["_class_name"] == "UNet2DConditionModel"):
        raise UserError(f"{folder.path}: a {config['_class_name']} beside {folder.classes} has no counterpart here")
    if text:
        about = _TEXT[folder.classes[text]]
        conditioning["text"] = {"kind": about.kind, "frozen": about.kind != "transformer", **_text_settings(about, folder.config(text))}
        if "tokenizer" in folder.classes and not tokenizer:
            tokenizer = str(folder.path / "tokenizer")
    tokens = Tokenizer.pretrained(tokenizer, conditioning["text"].get("max_length", 77)) if text and tokenizer else None
    linear = bool(config.get("use_linear_projection", False))
    origin = {"format": "diffusers", "linear_projections": linear, "scheduler": scheduler.kept}
    size = _side(config) * 2 ** (len(first_stage["channel_mult"]) - 1)
    architecture = Architecture(first_stage, settings, conditioning, scheduler.diffusion, sample=scheduler.sample, resolution=size)
    networks = build_networks(architecture, *_latent_scale(autoencoder, folder.pipeline), tokens, origin)
    parts = [
        _autoencoder_part(networks, folder.path / first, folder.weights(first)),
        _denoiser_part(networks, folder.path / denoiser, folder.weights(denoiser), linear),
    ]
    if text:
        weights = folder.weights(text)
        keys = about.key_map(networks.params["conditioner"]["text"], tuple(weights))
        parts.append(Part(str(folder.path / text), under("conditioner/text", keys), weights, about.ignored))
    missing = ["no tokenizer: give one with --tokenizer, or the model cannot read prompts"] if text and not tokens else []
    return _Pipeline(networks, parts, tokens, missing + scheduler.notes)


def _text_settings(about: _Text, config: Mapping[str, Any]) -> dict[str, Any]:
    """Raises UserError."""
    settings = about.settings(config)
    checks = {"activation": fields.word, "skip_last": fields.free, "depth": fields.layers}
    fields.account(
        settings, f"the config.json of a {about.kind} text encoder", {}, {name: checks.get(name, fields.count) for name in settings}
    )
    return settings


def _denoiser_groups(config: Mapping[str, Any], latent_channels: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The `denoiser` group, and what but texts the network is conditioned on. Raises UserError."""
    if config["_class_name"] in _DITS:
        settings = dit.dit_settings(config)
        classes = config["num_embeds_ada_norm"]
        return settings, {"label": {"num_classes": classes, "null_class": True, "width": settings["width"], "to": "vector"}}
    settings = diffusers.unet_settings(config)
    extra = config["in_channels"] - config["out_channels"]
    kinds: dict[tuple[str, int], dict[str, dict[str, Any]]] = {
        ("UNet2DModel", 3): {"low_res": {}},
        ("UNet2DConditionModel", latent_channels + 1): {"mask": {"style": "sd", "shrink": "nearest"}},
    }
    if extra and (config["_class_name"], extra) not in kinds:
        raise UserError(f"{config['_class_name']}: {extra} channels of input beside the latents have no counterpart here")
    return settings, kinds[config["_class_name"], extra] if extra else {}


def denoiser_map(networks: Networks, linear: bool) -> KeyMap:
    """The map of the second stage's network; with a DiT comes its table of classes, which is the conditioner's here."""
    assert networks.denoiser is not None
    network, params = networks.denoiser.network, networks.params
    if isinstance(network, DiT):
        keys = dit.diffusers_map(network, {"denoiser": params["denoiser"], "label": params["conditioner"]["label"]})
        moved = [tuple(leaf if leaf.startswith("denoiser/") else f"conditioner/{leaf}" for leaf in t.leaves) for t in keys]
        return [t._replace(leaves=leaves) for t, leaves in zip(keys, moved, strict=True)]
    return under("denoiser", diffusers.unet_map(network, params["denoiser"], linear))
