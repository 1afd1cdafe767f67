"""Model directories into what other programs open: pipelines of diffusers, and checkpoints of the paper's code with their YAML."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.conditioners import TextConditioner
from ldm_jax.config import UserError
from ldm_jax.interop import compvis, diffusers, dit, text_encoders
from ldm_jax.interop.compvis_yaml import to_yaml
from ldm_jax.interop.importing import Networks
from ldm_jax.interop.keymap import KeyMap, their_shapes, under, write
from ldm_jax.interop.pipelines import denoiser_map
from ldm_jax.interop.safetensors_file import Spec, open_weights, write_safetensors
from ldm_jax.interop.scheduler import to_scheduler
from ldm_jax.interop.torch_writer import write_checkpoint
from ldm_jax.latent_diffusion import read_networks
from ldm_jax.model_directory import WEIGHTS, flatten, stored_name
from ldm_jax.nn.autoencoder import KLAutoencoder, VQAutoencoder
from ldm_jax.nn.clip_text import CLIPText
from ldm_jax.nn.dit import DiT
from ldm_jax.nn.text_encoder import TextTransformer
from ldm_jax.paths import fetched, replacing, resolve, write_json

logger = logging.getLogger(__name__)

_PT = {"format": "pt"}  # what torch's programs want to read in a safetensors file
_SHARD = 5 * 2**30  # bytes


@dataclass(frozen=True)
class Model:
    """A model directory, its weights still on disk."""

    networks: Networks
    leaf: Callable[[str], np.ndarray]
    shapes: dict[str, Any]

    @property
    def conditioners(self) -> dict[str, Any]:
        denoiser = self.networks.denoiser
        return {c.name: c for c in denoiser.conditioning.conditioners} if denoiser else {}


def open_model(path: str | Path) -> Model:
    """Raises UserError for what is no complete model directory."""
    networks = Networks(*read_networks(path, jnp.float32))
    files: dict[str, Mapping[str, np.ndarray]] = {}

    def leaf(name: str) -> np.ndarray:
        part, _, inner = name.partition("/")
        if part not in files:
            files[part] = open_weights(fetched(resolve(path) / part / WEIGHTS))
        return np.asarray(files[part][stored_name(inner)], np.float32)

    return Model(networks, leaf, flatten(networks.params))


def _save(path: Path, model: Model, keys: KeyMap) -> None:
    """The tensors of a map as one safetensors file, or several where they are large. Raises UserError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, _tensors(keys, model), _specs(keys, model), metadata=_PT, max_shard_bytes=_SHARD)


def _specs(keys: KeyMap, model: Model) -> dict[str, Spec]:
    return {name: Spec(shape, np.dtype(np.float32)) for name, shape in their_shapes(keys, model.shapes).items()}


def _tensors(keys: KeyMap, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in write(keys, model.leaf):
        yield name, np.ascontiguousarray(array)


@contextmanager
def _complete(output: str | Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `output` once all of it is there."""
    final = Path(output)
    if (final / "model.json").exists() or ((final / "config.json").exists() and (final / "checkpoints").exists()):
        raise UserError(f"{final} is a model or work directory of ldm_jax: choose another --output")
    with replacing(final) as root:
        yield root


def export_checkpoint(path: str | Path, output: str | Path) -> str:
    """Writes `model.ckpt`, which `torch.load` opens and whose "state_dict" has the names of the paper's checkpoints, and `config.yaml`.

    There is no second set of averaged weights, as the YAML file says: the weights are those that the model draws with. What no network here
    reads is not there either, should the model have come from such a checkpoint: OpenCLIP's layers after the one that is read,
    `text_projection` and `logit_scale`, BERTEmbedder's `to_logits`, the schedule's tables and the losses. The paper's code loads with
    `strict=False` and draws without them.

    Returns what it is. Raises UserError.
    """
    model = open_model(path)
    text, keys = to_yaml(model.networks), compvis.model_map(model.networks)
    with _complete(output) as root:
        write_checkpoint(root / "model.ckpt", _tensors(keys, model), _specs(keys, model))
        (root / "config.yaml").write_text(text)
    return "a checkpoint of latent-diffusion"


def export_folder(path: str | Path, output: str | Path) -> str:
    """Writes the folder of a pipeline, or of an autoencoder alone, and returns the class that opens it. Raises UserError."""
    model = open_model(path)
    if model.networks.denoiser is None:
        with _complete(output) as root:
            return _write_autoencoder(root, model)
    name, components = _plan(model)
    with _complete(output) as root:
        index: dict[str, Any] = {"_class_name": name, "_diffusers_version": _WRITTEN_FOR}
        for component in components:
            index[component.name] = [component.library, component.class_name]
            component.write(root / component.name)
        write_json(root / "model_index.json", index | _EXTRA.get(name, {}))
    return name


class _Component(NamedTuple):
    name: str
    library: str
    class_name: str
    write: Callable[[Path], Any]


def _plan(model: Model) -> tuple[str, list[_Component]]:
    """The pipeline that expresses a model, and its components. Raises UserError where none does."""
    networks, kinds = model.networks, tuple(model.conditioners)
    assert networks.denoiser is not None
    kept = networks.info.get("origin", {}).get("scheduler", {})
    scheduler = to_scheduler(networks.info["diffusion"], networks.info["sample"], kept)
    first = partial(
        _Component,
        library="diffusers",
        class_name=_class_of(networks.first_stage.network),
        write=partial(_write_autoencoder, model=model),
    )
    if isinstance(networks.denoiser.network, DiT):
        name, components = "DiTPipeline", [_dit(model), first("vae")]
    elif kinds in (("text",), ("text", "mask")):
        name, components = _plan_text(model, first)
    elif kinds == ("low_res",):
        name, components = "LDMSuperResolutionPipeline", [_super_resolution(model), first("vqvae")]
    elif kinds == ():
        name, components = "LDMPipeline", [_unet(model, None), first("vqvae")]
    else:
        raise UserError(f"diffusers has no pipeline of latent diffusion whose UNet takes {' and '.join(kinds)}")
    if name in _EXTRA:
        if networks.info["sample"]["spacing"] == "leading":
            logger.warning("diffusers' %s visits times one later than sample.spacing=leading does; legacy_ldm is drawn exactly", name)
        scheduler["steps_offset"] = 1  # which it would put there itself
    last = _Component("scheduler", "diffusers", "DDIMScheduler", lambda folder: _write_config(folder, scheduler, "scheduler_config.json"))
    return name, [*components, last]


def _plan_text(model: Model, first: Callable[[str], _Component]) -> tuple[str, list[_Component]]:
    text, first_stage = model.conditioners["text"], model.networks.first_stage.network
    if type(text.network) not in _TEXTS:
        raise UserError("diffusers has no pipeline of latent diffusion with T5 alone")
    library, made = _TEXTS[type(text.network)]
    paper = isinstance(text.network, TextTransformer) or isinstance(first_stage, VQAutoencoder)
    if "mask" in model.conditioners:
        name = _inpainting(model)
    # Which takes latents of an eighth of the picture and texts of 77 tokens for granted.
    elif paper and first_stage.factor == 8 and text.max_length == 77:
        name = "LDMTextToImagePipeline"
    else:
        name = "StableDiffusionPipeline"
    if name in _EXTRA and not isinstance(first_stage, KLAutoencoder):
        raise UserError(
            f"diffusers' {name} decodes with a KL autoencoder only; LDMTextToImagePipeline takes others, but of factor 8 and with texts of"
            f" 77 tokens, not {first_stage.factor} and {text.max_length}"
        )
    encoder, autoencoder = ("text_encoder", "vae") if name in _EXTRA else ("bert", "vqvae")
    return name, [
        _Component(encoder, library, made, partial(_write_text, model=model, text=text)),
        _Component("tokenizer", "transformers", "PreTrainedTokenizerFast", partial(_write_tokenizer, text=text)),
        _unet(model, text.network.width),
        first(autoencoder),
    ]


def _inpainting(model: Model) -> str:
    mask, channels = model.conditioners["mask"], model.networks.first_stage.network.latent_channels
    if (mask.style, mask.shrink, channels) != ("sd", "nearest", 4):
        raise UserError(
            "diffusers' StableDiffusionInpaintPipeline takes mask.style=sd, mask.shrink=nearest and latents of 4 channels, not"
            f" {mask.style}, {mask.shrink} and {channels}"
        )
    return "StableDiffusionInpaintPipeline"


def _super_resolution(model: Model) -> _Component:
    first_stage = model.networks.first_stage
    if first_stage.scale != (1.0,):
        raise UserError("diffusers' LDMSuperResolutionPipeline has no scale of latents: train with first_stage.latent_scale=1.0")
    if first_stage.network.latent_channels != 3:
        channels = first_stage.network.latent_channels
        raise UserError(f"diffusers' LDMSuperResolutionPipeline has as many channels of latents as of colours, 3 and not {channels}")
    return _unet(model, None)


def _write_config(folder: Path, config: Mapping[str, Any], file: str = "config.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / file, {"_diffusers_version": _WRITTEN_FOR, **config})


def _groups(model: Model, part: str) -> int:
    """The number of groups of every norm of a network. Raises UserError where it differs: there one number is for all."""
    found = {*model.networks.groups_of_norms(part).values()}
    if len(found) != 1:
        raise UserError(f"the norms of the {part} have {sorted(found)} groups; diffusers wants one number: train with {part}.norm_groups")
    return found.pop()


def _unet(model: Model, context_dim: int | None) -> _Component:
    assert model.networks.denoiser is not None
    network: Any = model.networks.denoiser.network
    linear = bool(model.networks.info.get("origin", {}).get("linear_projections", False))
    in_channels = model.shapes["denoiser/input_0_conv/kernel"].shape[2]
    size = model.networks.info["resolution"] // model.networks.first_stage.network.factor
    config = diffusers.unet_config(network, in_channels, context_dim, size, _groups(model, "denoiser"), linear)
    return _network("unet", model, config, denoiser_map(model.networks, linear))


def _dit(model: Model) -> _Component:
    networks, label = model.networks, model.conditioners.get("label")
    assert networks.denoiser is not None
    network: Any = networks.denoiser.network
    if label is None or len(model.conditioners) > 1 or label.to != "vector" or not isinstance(networks.first_stage.network, KLAutoencoder):
        raise UserError("diffusers' DiTPipeline takes a class as vector and a KL autoencoder, and nothing else")
    if not label.null_class or label.num_classes != _DIT_CLASSES:
        raise UserError(
            f"diffusers' DiTPipeline takes class {_DIT_CLASSES} for no class: it needs conditioning.label.num_classes={_DIT_CLASSES} and"
            f" null_class, not {label.num_classes} and {label.null_class}"
        )
    size = networks.info["resolution"] // networks.first_stage.network.factor
    config = dit.dit_config(network, networks.first_stage.network.latent_channels, label.num_classes, size)
    return _network("transformer", model, config, denoiser_map(networks, False))


def _network(name: str, model: Model, config: Mapping[str, Any], keys: KeyMap) -> _Component:
    def write_network(folder: Path) -> None:
        _write_config(folder, config)
        _save(folder / _DIFFUSERS_WEIGHTS, model, keys)

    return _Component(name, "diffusers", config["_class_name"], write_network)


def _class_of(network: Any) -> str:
    if type(network) not in _CLASSES:
        raise UserError("diffusers has no class for pixels as latents")
    return _CLASSES[type(network)]


def _write_autoencoder(folder: Path, model: Model) -> str:
    first_stage, name = model.networks.first_stage, _class_of(model.networks.first_stage.network)
    network: Any = first_stage.network
    shifts = name == "AutoencoderKL" and model.networks.denoiser is None  # its class knows a shift, but none of these pipelines does
    if len({*first_stage.scale}) > 1 or len({*first_stage.shift}) > 1 or (any(first_stage.shift) and not shifts):
        raise UserError("diffusers' pipelines scale latents by one number: train with first_stage.latent_scale=std or a number")
    if network.patch_size != 1:
        raise UserError(f"diffusers has no autoencoder of patches: train with first_stage.patch_size=1, not {network.patch_size}")
    config = diffusers.autoencoder_config(network, model.networks.info["resolution"], _groups(model, "first_stage"))
    affine = {"scaling_factor": 1.0 / first_stage.scale[0]} | ({"shift_factor": first_stage.shift[0]} if any(first_stage.shift) else {})
    _write_config(folder, {**config, **affine})
    keys = diffusers.autoencoder_map(len(network.channel_mult), model.networks.params["first_stage"])
    _save(folder / _DIFFUSERS_WEIGHTS, model, under("first_stage", keys))
    return name


def _write_text(folder: Path, model: Model, text: TextConditioner) -> None:
    params = model.networks.params["conditioner"]["text"]
    if isinstance(text.network, TextTransformer):
        config, keys = text_encoders.ldmbert_to_hf(text.network), text_encoders.ldmbert_map(params)
    else:
        config, keys = text_encoders.clip_to_hf(text.network), text_encoders.clip_map(params)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    _save(folder / "model.safetensors", model, under("conditioner/text", keys))


def _write_tokenizer(folder: Path, text: TextConditioner) -> None:
    if text.tokenizer is None:
        raise UserError("the model has no tokenizer: convert it again with --tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    text.tokenizer.save_pretrained(folder)


_CLASSES: dict[type, str] = {KLAutoencoder: "AutoencoderKL", VQAutoencoder: "VQModel"}
_TEXTS: dict[type, tuple[str, str]] = {  # library and class
    TextTransformer: ("latent_diffusion", "LDMBertModel"),
    CLIPText: ("transformers", "CLIPTextModel"),
}
_DIT_CLASSES = 1000
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
_WRITTEN_FOR = "0.35.0"  # the oldest version whose classes are known to read these files
# Of the index of Stable Diffusion's pipelines.
_NO_MORE = {
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}
_EXTRA: dict[str, dict[str, Any]] = {"StableDiffusionPipeline": _NO_MORE, "StableDiffusionInpaintPipeline": _NO_MORE}
