"""What a YAML file of the paper's code says, as the groups of our configuration.

The architecture that was really built is read, not the one that was meant: an attention level that the released configuration asks for and
that its network does not have is left out, and noted.
"""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from ldm_jax.config import UserError
from ldm_jax.diffusion.schedules import ENDS
from ldm_jax.interop.architecture import Architecture
from ldm_jax.interop.importing import Networks
from ldm_jax.interop.text_encoders import CLIP_L14, OPENCLIP_H14
from ldm_jax.nn.autoencoder import IdentityAutoencoder, VQAutoencoder
from ldm_jax.nn.clip_text import CLIPText
from ldm_jax.nn.text_encoder import TextTransformer
from ldm_jax.nn.unet import UNet

logger = logging.getLogger(__name__)

# What the networks here always have, of the fields that they are built from there; other fields make other networks, and are refused.
_UNET_MUST = {
    "dims": 2,
    "conv_resample": True,
    "num_classes": None,
    "adm_in_channels": None,
    "n_embed": None,
    "num_heads_upsample": -1,
    "disable_self_attentions": None,
    "disable_middle_self_attn": False,
    "num_attention_blocks": None,
}
_UNET_NUMBERS = (
    *("in_channels", "out_channels", "model_channels", "num_res_blocks"),
    *("num_heads", "num_head_channels", "transformer_depth", "context_dim"),
)
_UNSET = {"num_heads": -1, "num_head_channels": -1, "context_dim": None}  # what says the same there as to leave the field out
_UNET_LISTS = ("channel_mult", "attention_resolutions")
_UNET_SIZES = (
    *(*_UNET_NUMBERS, *_UNET_LISTS, "dropout", "use_spatial_transformer", "use_linear_in_transformer"),
    *("use_scale_shift_norm", "resblock_updown", "use_new_attention_order"),
)
# Of how it is computed: the same function, in other time, memory or precision.
_UNET_WITHOUT_EFFECT = ("image_size", "use_checkpoint", "use_fp16", "use_bf16", "legacy", "spatial_transformer_attn_type")
_DDCONFIG_MUST = {
    "in_channels": 3,
    "out_ch": 3,
    "resamp_with_conv": True,
    "give_pre_end": False,
    "tanh_out": False,
    "use_linear_attn": False,
}
_DDCONFIG_NUMBERS = ("z_channels", "resolution", "ch", "num_res_blocks")
_DDCONFIG_SIZES = (*_DDCONFIG_NUMBERS, "ch_mult", "attn_resolutions", "double_z", "attn_type", "dropout")
_ATTENTION = {"vanilla": True, "vanilla-xformers": True, "none": False}
_RESCALER_MUST = {"method": "bilinear", "multiplier": 0.5, "bias": False}
_BERT_NUMBERS = ("n_embed", "n_layer", "vocab_size", "max_seq_len")
_CLASS_FIELDS = ("n_classes", "embed_dim", "key", "ucg_rate")
_CLIP_MUST = {"version": "openai/clip-vit-large-patch14", "max_length": 77, "layer": "last", "layer_idx": None}
_OPENCLIP_MUST = {"arch": "ViT-H-14", "max_length": 77}
_MODELS = ("LatentDiffusion", "LatentInpaintDiffusion", "Layout2ImgDiffusion")
_PREDICTIONS = ("eps", "x0", "v")
_LARGEST_FILE = 2**20  # bytes; theirs have some thousand


def read_yaml(path: str | Path) -> Architecture:
    """The architecture of a file. Raises UserError where it is missing, damaged, or asks for what has no counterpart here."""
    content = _parsed(Path(path))
    try:
        return architecture(content["model"], content.get(_OURS) or {})
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path} is no model configuration of latent-diffusion: {type(error).__name__} {error}") from error


def _parsed(path: Path) -> Any:
    """The content of a YAML file. Raises UserError: a checkpoint may well stand in its place, however large."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path} is no model configuration of latent-diffusion: it has {path.stat().st_size} bytes")
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UserError(f"cannot read {path}: it is nested too deeply") from error
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: bytes that are no text, a date that is none
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error


def architecture(model: Mapping[str, Any], ours: Mapping[str, Any]) -> Architecture:
    """The `model` part of such a file, and our own part of one that we wrote.

    Raises UserError; another exception, such as KeyError for a field that must be there, where this is no such part.
    """
    params = model["params"]
    if "ddconfig" in params:
        return Architecture(first_stage=_autoencoder(model), resolution=params["ddconfig"]["resolution"])
    first_stage = _autoencoder(params["first_stage_config"])
    unet = params["unet_config"]["params"]
    for config, known in ((model, _MODELS), (params["unet_config"], ("UNetModel",))):
        if _class_name(config) not in known:
            raise UserError(f"target {config['target']} has no counterpart here: it is not one of {', '.join(known)}")
    levels = len(first_stage["channel_mult"])
    return Architecture(
        first_stage=first_stage,
        denoiser=_unet(unet),
        conditioning=_conditioning(_class_name(model), params, ours),
        diffusion=_diffusion(params),
        scale=None if params.get("scale_by_std") else 1.0 / float(params.get("scale_factor", 1.0)),
        # That of the UNet is not used there, and wrong in Stable Diffusion's files.
        resolution=_side(params.get("image_size", unet.get("image_size"))) * 2 ** (levels - 1),
        linear_projections=bool(unet.get("use_linear_in_transformer", False)),
        fused_by_head=not unet.get("use_new_attention_order", False),
    )


def _check_fields(given: Mapping[str, Any], where: str, known: Collection[str], must: Mapping[str, Any]) -> None:
    """Raises UserError for fields that are not known, or not as they must be."""
    wrong = [f"{name}={value!r}" for name, value in given.items() if name not in known and (name not in must or must[name] != value)]
    if wrong:
        raise UserError(f"{where}: {', '.join(wrong)} has no counterpart here")


def _class_name(config: Any) -> str:
    """The last part of a `target`; the double-underscored words that stand in its place are given as they are."""
    return config if isinstance(config, str) else str(config["target"]).rpartition(".")[2]


def _side(size: Any) -> int:
    """Of a square, given as one number or as two. Raises TypeError or ValueError."""
    (side,) = {*size} if isinstance(size, list) else {size}
    _check_numbers({"image_size": side}, ("image_size",))
    return side


def _check_numbers(given: Mapping[str, Any], one: Collection[str], several: Collection[str] = ()) -> None:
    """Raises TypeError for fields that are there and no whole number from 1 on, or no list of such."""
    wrong = [name for name in one if name in given and not _counts(given[name])]
    wrong += [name for name in several if name in given and not (isinstance(given[name], list) and all(map(_counts, given[name])))]
    if wrong:
        raise TypeError(f"{', '.join(f'{name}={given[name]!r}' for name in wrong)}: not whole numbers from 1 on")


def _counts(value: Any) -> bool:
    return type(value) is int and value > 0


def _autoencoder(config: Mapping[str, Any]) -> dict[str, Any]:
    name, params = _class_name(config), config.get("params", {})
    if name == "IdentityFirstStage":
        return {"kind": "identity", "channel_mult": (1,)}
    if name not in ("AutoencoderKL", "VQModel", "VQModelInterface"):
        raise UserError(f"first stage {name} has no counterpart here")
    net = params["ddconfig"]
    _check_fields(net, f"ddconfig of {name}", _DDCONFIG_SIZES, _DDCONFIG_MUST)
    _check_numbers({**params, **net}, ("embed_dim", "n_embed", *_DDCONFIG_NUMBERS), ("ch_mult", "attn_resolutions"))
    if (kind := net.get("attn_type", "vanilla")) not in _ATTENTION:
        raise UserError(f"ddconfig of {name}: attn_type={kind!r} has no counterpart here")
    attention = _ATTENTION[kind]
    mults = tuple(net["ch_mult"])
    sizes = [net["resolution"] // 2**i for i in range(len(mults))]
    _note_unmatched("attn_resolutions", net["attn_resolutions"], sizes)
    settings = {
        "kind": "kl" if name == "AutoencoderKL" else "vq",
        "channels": net["ch"],
        "channel_mult": mults,
        "num_res_blocks": net["num_res_blocks"],
        "attention_levels": tuple(2**i for i, size in enumerate(sizes) if attention and size in net["attn_resolutions"]),
        "mid_attention": attention,
        "norm_groups": 32,
        "z_channels": net["z_channels"],
        "latent_channels": params["embed_dim"],
    }
    return settings if settings["kind"] == "kl" else {**settings, "codebook_size": params["n_embed"]}


def _note_unmatched(name: str, asked: list[int], there: list[int]) -> None:
    if unmatched := sorted(set(asked) - set(there)):
        logger.warning("%s %s match no level of the network (%s): it was built without them", name, unmatched, there)


def _unet(net: Mapping[str, Any]) -> dict[str, Any]:
    _check_fields(net, "unet_config", (*_UNET_SIZES, *_UNET_WITHOUT_EFFECT), _UNET_MUST)
    net = {name: value for name, value in net.items() if name not in _UNSET or value != _UNSET[name]}
    _check_numbers(net, _UNET_NUMBERS, _UNET_LISTS)
    mults = tuple(net["channel_mult"])
    factors = [2**i for i in range(len(mults))]
    _note_unmatched("attention_resolutions", net["attention_resolutions"], factors)
    transformer, head_channels = net.get("use_spatial_transformer", False), net.get("num_head_channels", 0)
    return {
        "kind": "unet",
        "in_channels": net["in_channels"],
        "out_channels": net["out_channels"],
        "channels": net["model_channels"],
        "channel_mult": mults,
        "num_res_blocks": net["num_res_blocks"],
        "attention_levels": tuple(f for f in factors if f in net["attention_resolutions"]),
        "num_heads": 0 if head_channels else net["num_heads"],
        "head_channels": head_channels,
        "transformer_depth": net.get("transformer_depth", 1) if transformer else 0,
        "scale_shift": net.get("use_scale_shift_norm", False),
        "resblock_updown": net.get("resblock_updown", False),
        "norm_groups": 32,
        "dropout": float(net.get("dropout", 0.0)),
    }


def _diffusion(params: Mapping[str, Any]) -> dict[str, Any]:
    """The `diffusion` group; what the files call linear is linear in the square root of beta."""
    must = {"beta_schedule": "linear", "given_betas": None}
    _check_fields({name: params[name] for name in must if name in params}, "the schedule", (), must)
    _check_numbers(params, ("timesteps",))
    prediction, loss = params.get("parameterization", "eps"), params.get("loss_type", "l2")
    if prediction not in _PREDICTIONS or loss not in ("l1", "l2"):
        raise UserError(f"parameterization={prediction!r} with loss_type={loss!r} has no counterpart here")
    return {
        "process": "discrete",
        "schedule": "linear",
        "start": float(params.get("linear_start", 1e-4)),
        "end": float(params.get("linear_end", 2e-2)),
        "num_steps": params.get("timesteps", 1000),
        "prediction": prediction,
        "loss": loss,
    }


def _conditioning(target: str, params: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The conditioning groups that are enabled. Raises UserError for conditioners that have no counterpart."""
    stage = params.get("cond_stage_config", _UNCONDITIONAL)
    key = params.get("conditioning_key") or ("concat" if params.get("concat_mode", True) else "crossattn")
    name = _class_name(stage)
    given = stage.get("params") or {} if isinstance(stage, Mapping) else {}
    if name == _UNCONDITIONAL:
        return {}
    if key == "hybrid" and target == "LatentInpaintDiffusion":
        return {**_conditioning(target, {**params, "conditioning_key": "crossattn"}, ours), "mask": {"style": "sd", "shrink": "nearest"}}
    match name, key:
        case "BERTEmbedder", "crossattn":
            return _bert(given)
        case "ClassEmbedder", "crossattn":
            _check_fields(given, name, _CLASS_FIELDS, {})
            _check_numbers(given, ("n_classes", "embed_dim"))
            # The released table of 1001 rows has its last for "no class"; that of 1000 was trained without.
            rows = given.get("n_classes", 1000)
            null = bool(ours.get("null_class", rows == 1001))
            about = {"num_classes": rows - null, "null_class": null, "width": given["embed_dim"], "to": "crossattn"}
            return {"label": about if null else {**about, "drop_rate": 0.0}}
        case "SpatialRescaler", "concat":
            _check_fields(given, name, ("in_channels", "out_channels", "n_stages"), _RESCALER_MUST)
            _check_numbers(given, ("in_channels", "out_channels", "n_stages"))
            sizes = {"num_classes": given["in_channels"], "channels": given["out_channels"], "stages": given.get("n_stages", 1)}
            return {"segmentation": sizes}
        case "__is_first_stage__", "concat":
            return {"mask": {"shrink": "nearest"}}
        case "Identity", "concat":
            return {"low_res": {}}
        case "Identity", "crossattn":
            return {"neighbors": {"width": params["unet_config"]["params"]["context_dim"]}}
        case "FrozenCLIPEmbedder", "crossattn":
            _check_fields(given, name, ("freeze", "device"), _CLIP_MUST)
            return {"text": {"kind": "clip", "frozen": True, **CLIP_L14}}
        case "FrozenOpenCLIPEmbedder", "crossattn" if given.get("layer", "last") in _OPENCLIP_LAYERS:
            _check_fields(given, name, ("freeze", "device", "version", "layer"), _OPENCLIP_MUST)
            skipped = _OPENCLIP_LAYERS.index(given.get("layer", "last"))
            return {"text": {"kind": "clip", "frozen": True, **OPENCLIP_H14, "skip_last": skipped}}
    raise UserError(f"cond_stage_config {name} with conditioning_key {key!r} has no counterpart here")


def _bert(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of texts, or, without a tokenizer, of boxes: three tokens an object between a first and a last."""
    _check_fields(given, "BERTEmbedder", (*_BERT_NUMBERS, "use_tokenizer", "device", "embedding_dropout"), {})
    _check_numbers(given, _BERT_NUMBERS)
    sizes = {"width": given["n_embed"], "depth": given["n_layer"], "num_heads": 8, "head_dim": 64}
    if given.get("use_tokenizer", True):
        table = {"vocab_size": given.get("vocab_size", 30522), "max_length": given.get("max_seq_len", 77)}
        return {"text": {"kind": "transformer", **table, **sizes}}
    return {"boxes": {"vocab_size": given["vocab_size"], "max_objects": (given["max_seq_len"] - 2) // 3, **sizes}}


_UNCONDITIONAL = "__is_unconditional__"
_OPENCLIP_LAYERS = ("last", "penultimate")  # by how many are skipped
_OURS = "ldm_jax"  # beside `model`: what the paper's code does not read


def to_yaml(networks: Networks) -> str:
    """The file of a model, such that `read_yaml` gives it back. Raises UserError for a model that the paper's code cannot build."""
    first_stage = _autoencoder_config(networks)
    if networks.denoiser is None:
        return yaml.safe_dump({"model": first_stage}, sort_keys=False)
    _check_groups(networks, "denoiser")
    info, scale = networks.info, networks.first_stage.scale
    if any(networks.first_stage.shift) or len(scale) > 1:
        raise UserError("the paper's code scales latents by one number: train with first_stage.latent_scale=std or a number")
    diffusion = info["diffusion"]
    if diffusion["process"] != "discrete" or diffusion["schedule"] != "linear" or diffusion["prediction"] not in _PREDICTIONS:
        raise UserError("the paper's code knows the discrete process with its linear schedule and eps, x0 or v only")
    conditioning, ours = _conditioning_config(networks), {}
    conditioners: Any = networks.denoiser.conditioning.conditioners
    if label := next((one for one in conditioners if one.name == "label"), None):
        ours = {_OURS: {"null_class": label.null_class}}
    params = {
        "linear_start": diffusion["start"] or ENDS["linear"][0],
        "linear_end": diffusion["end"] or ENDS["linear"][1],
        "timesteps": diffusion["num_steps"],
        "parameterization": diffusion["prediction"],
        "loss_type": diffusion["loss"],
        "image_size": info["resolution"] // networks.first_stage.network.factor,
        "channels": networks.first_stage.network.latent_channels,
        "scale_factor": 1.0 / scale[0],
        "use_ema": False,  # or their code would make averages of its own, not find them in the checkpoint, and draw with them
        **conditioning,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": _unet_config(networks)},
        "first_stage_config": first_stage,
    }
    target = "LatentInpaintDiffusion" if conditioning.get("conditioning_key") == "hybrid" else "LatentDiffusion"
    return yaml.safe_dump({"model": {"target": f"ldm.models.diffusion.ddpm.{target}", "params": params}, **ours}, sort_keys=False)


def _check_groups(networks: Networks, part: str) -> None:
    """Raises UserError where a norm of a network has other than 32 groups: there it always has."""
    if wrong := [f"{groups} of {width} channels" for width, groups in networks.groups_of_norms(part).items() if groups != 32]:
        has = ", ".join(wrong)
        raise UserError(f"the paper's code has 32 groups in every norm, the {part} here {has}: train with {part}.norm_groups=32")


def _autoencoder_config(networks: Networks) -> dict[str, Any]:
    net: Any = networks.first_stage.network
    if isinstance(net, IdentityAutoencoder):
        return {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {}}
    if net.patch_size != 1:
        raise UserError(f"the paper's code has no autoencoder of patches: train with first_stage.patch_size=1, not {net.patch_size}")
    if not net.quant_conv:
        raise UserError("the paper's code has no autoencoder without quant_conv: train with first_stage.quant_conv=True")
    if net.attention_levels and not net.mid_attention:
        raise UserError("the paper's code has no autoencoder with attention at its levels and none in the middle")
    _check_groups(networks, "first_stage")
    vq, resolution = isinstance(net, VQAutoencoder), networks.info["resolution"]
    ddconfig = {
        "double_z": not vq,
        "z_channels": net.z_channels,
        "resolution": resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": net.channels,
        "ch_mult": list(net.channel_mult),
        "num_res_blocks": net.num_res_blocks,
        "attn_resolutions": [resolution // factor for factor in net.attention_levels],
        "attn_type": "vanilla" if net.mid_attention else "none",
        "dropout": 0.0,
    }
    loss = {"lossconfig": {"target": "torch.nn.Identity"}}
    if vq:
        name = "VQModel" if networks.denoiser is None else "VQModelInterface"
        sizes = {"embed_dim": net.latent_channels, "n_embed": net.codebook_size}
        return {"target": f"ldm.models.autoencoder.{name}", "params": {**sizes, "ddconfig": ddconfig, **loss}}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": net.latent_channels, "ddconfig": ddconfig, **loss}}


def _unet_config(networks: Networks) -> dict[str, Any]:
    assert networks.denoiser is not None
    net: Any = networks.denoiser.network
    if not isinstance(net, UNet):
        raise UserError("the paper's code has no denoiser but the UNet")
    if net.places:
        raise UserError("the paper's UNet has no features of places (denoiser.places)")
    leaves = networks.leaves
    context = next((shape.shape[0] for leaf, shape in leaves.items() if leaf.endswith("attn2/k/kernel")), None)
    heads = {"num_heads": net.num_heads} if net.num_heads else {"num_head_channels": net.head_channels}
    transformer = {"use_spatial_transformer": True, "transformer_depth": net.transformer_depth, "context_dim": context, "legacy": False}
    origin = networks.info.get("origin", {})
    return {
        "image_size": networks.info["resolution"] // networks.first_stage.network.factor,
        "in_channels": leaves["denoiser/input_0_conv/kernel"].shape[2],
        "out_channels": net.out_channels,
        "model_channels": net.channels,
        "attention_resolutions": list(net.attention_levels),
        "num_res_blocks": net.num_res_blocks,
        "channel_mult": list(net.channel_mult),
        "use_scale_shift_norm": net.scale_shift,
        "resblock_updown": net.resblock_updown,
        "dropout": net.dropout,
        **heads,
        **(transformer if net.transformer_depth else {}),
        **({"use_linear_in_transformer": True} if origin.get("linear_projections") else {}),
        **({} if origin.get("fused_by_head", True) else {"use_new_attention_order": True}),
    }


def _conditioning_config(networks: Networks) -> dict[str, Any]:
    """`cond_stage_config` and `conditioning_key`."""
    assert networks.denoiser is not None
    conditioners: Any = networks.denoiser.conditioning.conditioners
    if not conditioners:
        return {"cond_stage_config": _UNCONDITIONAL}
    if [one.name for one in conditioners] == ["text", "mask"]:
        return {**_condition_config(conditioners[0]), "conditioning_key": "hybrid"}
    if len(conditioners) > 1:
        raise UserError("the paper's code has one condition a model, or text and mask")
    return _condition_config(conditioners[0])


def _condition_config(one: Any) -> dict[str, Any]:
    where = "ldm.modules.encoders.modules."
    match one.name:
        case "mask":
            if one.shrink != "nearest":
                raise UserError(f"the paper's code takes a mask at one pixel for each latent (mask.shrink=nearest), not {one.shrink}")
            return {"cond_stage_config": "__is_first_stage__", "conditioning_key": "concat"}
        case "low_res":
            return {"cond_stage_config": {"target": "torch.nn.Identity"}, "conditioning_key": "concat"}
        case "neighbors":
            return {"cond_stage_config": {"target": "torch.nn.Identity"}, "conditioning_key": "crossattn"}
        case "segmentation":
            params = {"in_channels": one.num_classes, "out_channels": one.network.channels, "n_stages": one.network.stages}
            return {"cond_stage_config": {"target": f"{where}SpatialRescaler", "params": params}, "conditioning_key": "concat"}
        case "label" if one.to == "crossattn":
            params = {"n_classes": one.network.rows, "embed_dim": one.network.width}
            return {"cond_stage_config": {"target": f"{where}ClassEmbedder", "params": params}, "conditioning_key": "crossattn"}
        case "text" if isinstance(one.network, CLIPText):
            return {"cond_stage_config": _clip_config(one.network, where), "conditioning_key": "crossattn"}
        case "text" | "boxes" if isinstance(one.network, TextTransformer):
            net = one.network
            if (net.num_heads, net.head_dim) != (8, 64):
                raise UserError(f"the paper's BERTEmbedder has 8 heads of 64 channels, not {net.num_heads} of {net.head_dim}")
            params = {"n_embed": net.width, "n_layer": net.depth, "vocab_size": net.vocab_size, "max_seq_len": net.max_length}
            params |= {"use_tokenizer": False} if one.name == "boxes" else {}
            return {"cond_stage_config": {"target": f"{where}BERTEmbedder", "params": params}, "conditioning_key": "crossattn"}
    raise UserError(f"the paper's code has no counterpart of the condition {one.name}")


def _clip_config(network: CLIPText, where: str) -> dict[str, Any]:
    """Of OpenCLIP's 24 layers what counts is how many are read: diffusers' folders of Stable Diffusion 2 have 23 and skip none."""
    sizes = {name: getattr(network, name) for name in CLIP_L14}
    if sizes == CLIP_L14:
        return {"target": f"{where}FrozenCLIPEmbedder"}
    skipped = OPENCLIP_H14["depth"] - (network.depth - network.skip_last)
    if sizes | {name: OPENCLIP_H14[name] for name in ("depth", "skip_last")} == OPENCLIP_H14 and skipped in range(len(_OPENCLIP_LAYERS)):
        return {"target": f"{where}FrozenOpenCLIPEmbedder", "params": {"freeze": True, "layer": _OPENCLIP_LAYERS[skipped]}}
    raise UserError("stable-diffusion's files know CLIP's text encoders of ViT-L/14 and ViT-H/14 only")
