"""Key maps of diffusers' networks and their config.json, both ways: UNet2DConditionModel, UNet2DModel, AutoencoderKL and VQModel."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ldm_jax.config import UserError
from ldm_jax.interop import fields
from ldm_jax.interop.compvis import transformer_rules
from ldm_jax.interop.keymap import CONV, LINEAR, POINTWISE, KeyMap, Rule, Tensor, key_map, nest
from ldm_jax.nn.autoencoder import KLAutoencoder, VQAutoencoder
from ldm_jax.nn.unet import UNet

_RES = (
    Rule("(?P<name>norm[12])", r"\g<name>"),
    Rule("(?P<name>conv[12])", r"\g<name>", CONV),
    Rule("emb", "time_emb_proj", LINEAR),
    Rule("skip", "conv_shortcut", CONV),
)
_ATTENTION = (
    Rule("norm", "group_norm"),
    Rule("(?P<which>[qkv])", r"to_\g<which>", LINEAR),
    Rule("out", "to_out.0", LINEAR),
)
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def unet_map(network: UNet, params: Mapping[str, Any], linear_projections: bool = False, prefix: str = "") -> KeyMap:
    """The map of a UNet; `params` are its parameters or their shapes."""
    per_level = network.num_res_blocks + 1

    def place(match: re.Match[str]) -> str:
        kind, i = match["kind"], int(match["i"])
        if match["side"] == "input":
            level, i = divmod(i - 1, per_level)
            parts = {"res": f"resnets.{i}", "attn": f"attentions.{i}", "down": "downsamplers.0"}
            return f"down_blocks.{level}.{parts[kind]}"
        level, i = divmod(i, per_level)
        parts = {"res": f"resnets.{i}", "attn": f"attentions.{i}", "up": "upsamplers.0"}
        return f"up_blocks.{level}.{parts[kind]}"

    block = r"(?P<side>input|output)_(?P<i>\d+)_(?P<kind>res|attn|down|up)"
    attention = transformer_rules(linear_projections) if network.transformer_depth else _ATTENTION
    rules = [
        Rule("time_embed_0", "time_embedding.linear_1", LINEAR),
        Rule("time_embed_2", "time_embedding.linear_2", LINEAR),
        Rule("vector_embed_0", "add_embedding.linear_1", LINEAR),
        Rule("vector_embed_2", "add_embedding.linear_2", LINEAR),
        Rule("input_0_conv", "conv_in", CONV),
        Rule("out_norm", "conv_norm_out"),
        Rule("out_conv", "conv_out", CONV),
        Rule(block, lambda match: f"{place(match)}.conv", CONV),
        *nest(block, place, (*_RES, *attention)),
        *nest("middle_0_res", "mid_block.resnets.0", _RES),
        *nest("middle_1_attn", "mid_block.attentions.0", attention),
        *nest("middle_2_res", "mid_block.resnets.1", _RES),
    ]
    return key_map(params, rules, prefix)


def autoencoder_map(levels: int, params: Mapping[str, Any], prefix: str = "") -> KeyMap:
    """The map of a KL or VQ autoencoder of so many levels; `params` are its parameters or their shapes."""

    def place(match: re.Match[str]) -> str:
        level = int(match["level"])
        side = f"down_blocks.{level}" if match["way"] == "down" else f"up_blocks.{levels - 1 - level}"
        kind = {"res": "resnets", "attn": "attentions"}.get(match["kind"], f"{match['way']}samplers")
        return f"{match['coder']}.{side}.{kind}.{match['i'] or 0}"

    coder = r"(?P<coder>encoder|decoder)/"
    block = rf"{coder}(?P<way>down|up)_(?P<level>\d+)_(?:(?P<i>\d+)_)?(?P<kind>res|attn|downsample|upsample)"
    rules = [
        Rule("conv_out", "decoder.conv_out", CONV),
        Rule("((?:post_)?quant_conv)", r"\1", CONV),
        Rule("quantize", "quantize.embedding"),
        Rule(rf"{coder}(?P<name>conv_in|conv_out)", r"\g<coder>.\g<name>", CONV),
        Rule(rf"{coder}norm_out", r"\g<coder>.conv_norm_out"),
        Rule(block, lambda match: f"{place(match)}.conv", CONV),
        *nest(block, place, (*_RES, *_ATTENTION)),
        *nest(rf"{coder}mid_block_1", r"\g<coder>.mid_block.resnets.0", _RES),
        *nest(rf"{coder}mid_block_2", r"\g<coder>.mid_block.resnets.1", _RES),
        *nest(rf"{coder}mid_attn_1", r"\g<coder>.mid_block.attentions.0", _ATTENTION),
    ]
    return key_map(params, rules, prefix)


def as_saved(keys: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> KeyMap:
    """The map of an autoencoder or a UNet2DModel for a file with tensors of these shapes, whichever diffusers saved it: the projections of
    its attention had other names once, and are 1x1 convolutions in files converted from the paper's."""

    def one(tensor: Tensor) -> Tensor:
        if ".attentions." not in tensor.name or ".group_norm." in tensor.name:
            return tensor
        block, module, leaf = re.fullmatch(r"(.*\.attentions\.\d+)\.(.*)\.(\w+)", tensor.name).groups()  # type: ignore[union-attr]
        old = f"{block}.{_OLD_ATTENTION[module]}.{leaf}"
        name = old if tensor.name not in shapes and old in shapes else tensor.name
        convolution = leaf == "weight" and len(shapes.get(name, ())) == 4
        return tensor._replace(name=name, layout=POINTWISE if convolution else tensor.layout)

    return [one(tensor) for tensor in keys]


# What a config.json must say, where it says anything, for the network to be one of ours: anything else is refused rather than guessed.
_UNET_MUST = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "projection_class_embeddings_input_dim": None,
    "add_attention": True,
}
_AUTOENCODER_MUST = {"act_fn": "silu", "norm_type": "group", "in_channels": 3, "out_channels": 3, "lookup_from_codebook": False}
# What is read, and what changes nothing: precision, and what belongs to features that are off.
_KNOWN: dict[str, fields.Check] = {
    "block_out_channels": fields.counts,
    "down_block_types": fields.words,
    "up_block_types": fields.words,
    "norm_num_groups": fields.count,
    "sample_size": fields.free,  # read with the pipeline
}
_UNET_KNOWN = _KNOWN | {
    "in_channels": fields.count,
    "out_channels": fields.count,
    "layers_per_block": fields.layers,
    "mid_block_type": fields.word,
    "transformer_layers_per_block": fields.layers,
    "attention_head_dim": fields.maybe(fields.counts),
    "num_attention_heads": fields.maybe(fields.counts),
    "cross_attention_dim": fields.maybe(fields.counts),  # the weights say it too
    "use_linear_projection": fields.flag,
    "time_embedding_dim": fields.maybe(fields.count),
    "resnet_time_scale_shift": fields.word,
    "downsample_type": fields.word,
    "upsample_type": fields.word,
    "attn_norm_num_groups": fields.maybe(fields.count),
    "dropout": fields.number,
    "upcast_attention": fields.free,
    "addition_embed_type_num_heads": fields.free,
    "num_train_timesteps": fields.free,
}
_AUTOENCODER_KNOWN = _KNOWN | {
    "layers_per_block": fields.layers,
    "latent_channels": fields.count,
    "vq_embed_dim": fields.maybe(fields.count),
    "num_vq_embeddings": fields.count,
    "mid_block_add_attention": fields.flag,
    "use_quant_conv": fields.flag,
    "use_post_quant_conv": fields.flag,
    "scaling_factor": fields.maybe(fields.positive),
    "shift_factor": fields.maybe(fields.number),
    "latents_mean": fields.free,  # refused with the pipeline
    "latents_std": fields.free,
    "force_upcast": fields.free,
}
_NEEDED = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "out_channels")
_SCALE_SHIFT = {"default": False, "scale_shift": True}


def _demand(config: Mapping[str, Any], must: Mapping[str, Any], known: Mapping[str, fields.Check], needed: Sequence[str]) -> None:
    what = str(config.get("_class_name", "config.json"))
    if missing := [name for name in needed if config.get(name) is None]:
        raise UserError(f"{what} does not say {', '.join(missing)}")
    fields.account(config, what, must, known)
    levels = {name: len(config[name]) for name in ("block_out_channels", "down_block_types", "up_block_types")}
    if len({*levels.values()}) > 1:
        raise UserError(f"{what}: {', '.join(levels)} are of {', '.join(map(str, levels.values()))} levels")


def _common(values: Any, what: str) -> Any:
    """The one value of a list whose elements must agree, or of a scalar."""
    values = list(values) if isinstance(values, list | tuple) else [values]
    if any(value != values[0] for value in values):
        raise UserError(f"{what} {values} differs between levels, which has no counterpart here")
    return values[0]


def _multiples(widths: list[int]) -> dict[str, Any]:
    """`channels` and `channel_mult` of the widths of levels."""
    if any(width % widths[0] for width in widths):
        raise UserError(f"block_out_channels {widths} are no multiples of the first")
    return {"channels": widths[0], "channel_mult": tuple(width // widths[0] for width in widths)}


def unet_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `denoiser` group, from the config.json of a UNet2DConditionModel or a UNet2DModel. Raises UserError."""
    with fields.understood("the config.json of a UNet"):
        return _unet_settings(config)


def _unet_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    _demand(config, _UNET_MUST, _UNET_KNOWN, (*_NEEDED, "in_channels"))
    conditional = config.get("_class_name") != "UNet2DModel"
    widths = list(config["block_out_channels"])
    with_attention = [i for i, kind in enumerate(config["down_block_types"]) if kind in ("CrossAttnDownBlock2D", "AttnDownBlock2D")]
    depth = _common(config.get("transformer_layers_per_block") or 1, "transformer_layers_per_block") if conditional else 0
    resample = {config.get("downsample_type", "conv"), config.get("upsample_type", "conv")}
    if len(resample) > 1:
        raise UserError("downsample_type and upsample_type differ, which has no counterpart here")
    _check_blocks(config, with_attention, conditional, resample == {"resnet"})
    if (time_width := config.get("time_embedding_dim") or 4 * widths[0]) != 4 * widths[0]:
        raise UserError(f"time_embedding_dim={time_width} has no counterpart here; it would be {4 * widths[0]}")
    if (norm := config.get("resnet_time_scale_shift", "default")) not in _SCALE_SHIFT:
        raise UserError(f"resnet_time_scale_shift={norm!r} has no counterpart here; it would be one of {', '.join(_SCALE_SHIFT)}")
    groups, scale_shift = config.get("norm_num_groups", 32), _SCALE_SHIFT[norm]
    # Of the middle's attention: with scale_shift it has no norm there unless this says so.
    if not conditional and (config.get("attn_norm_num_groups") or (None if scale_shift else groups)) != groups:
        raise UserError(f"attn_norm_num_groups={config.get('attn_norm_num_groups')} has no counterpart here; it would be {groups}")
    return {
        "kind": "unet",
        "out_channels": config["out_channels"],
        **_multiples(widths),
        "num_res_blocks": _common(config["layers_per_block"], "layers_per_block"),
        "attention_levels": tuple(2**i for i in with_attention),
        **_heads(config, widths, with_attention, conditional),
        "transformer_depth": depth,
        "scale_shift": scale_shift,
        "resblock_updown": resample == {"resnet"},
        "norm_groups": groups,
        "dropout": config.get("dropout", 0.0),
    }


def _check_blocks(config: Mapping[str, Any], with_attention: list[int], conditional: bool, resnets: bool) -> None:
    """Raises UserError for other kinds of blocks than ours, or an up side that is not the mirror of the down side."""
    middle = "UNetMidBlock2DCrossAttn" if conditional else "UNetMidBlock2D"
    down, up = _block_types([i in with_attention for i in range(len(config["block_out_channels"]))], conditional, resnets)
    found = (list(config["down_block_types"]), list(config["up_block_types"]), config.get("mid_block_type", middle))
    if found != (down, up, middle):
        raise UserError(f"blocks {found} have no counterpart here; they would be {(down, up, middle)}")


def _block_types(attends: Sequence[bool], conditional: bool, resnets: bool) -> tuple[list[str], list[str]]:
    """The classes of down and up blocks, `attends` being by level from the top; `resnets`: residual blocks resample."""
    attention = f"{'Cross' if conditional else ''}Attn{{}}Block2D"
    plain = "Resnet{}sampleBlock2D" if resnets else "{}Block2D"
    kinds = [attention if has else plain for has in attends]
    return [kind.format("Down") for kind in kinds], [kind.format("Up") for kind in reversed(kinds)]


def _heads(config: Mapping[str, Any], widths: list[int], with_attention: list[int], conditional: bool) -> dict[str, Any]:
    """`num_heads` and `head_channels`. In a UNet2DConditionModel `attention_head_dim` is the *number* of heads, by level or for all; in a
    UNet2DModel it is what it says."""
    given = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    if not conditional:
        return {"num_heads": 0, "head_channels": given} if given else {"num_heads": 1, "head_channels": 0}
    heads: list[Any] = list(given) if isinstance(given, list | tuple) else [given] * len(widths)
    used = sorted({*with_attention, len(widths) - 1})
    if len({heads[i] for i in used}) == 1:
        return {"num_heads": heads[used[0]], "head_channels": 0}
    return {"num_heads": 0, "head_channels": _common([widths[i] // heads[i] for i in used], "channels a head")}


def unet_config(
    network: UNet, in_channels: int, context_dim: int | None, sample_size: int, groups: int, linear_projections: bool = False
) -> dict[str, Any]:
    """The config.json of a UNet. Raises UserError for a network that diffusers has no class for."""
    if network.places:
        raise UserError("diffusers' UNets have no features of places (denoiser.places)")
    if network.transformer_depth and network.resblock_updown:
        raise UserError("diffusers' UNet2DConditionModel has no residual blocks that resample between its cross-attention blocks")
    if network.transformer_depth and context_dim is None:
        raise UserError("diffusers' UNet2DConditionModel needs a context to attend to")
    levels = range(len(network.channel_mult))
    widths = [network.channels * mult for mult in network.channel_mult]
    attends = [2**i in network.attention_levels for i in levels]
    down, up = _block_types(attends, bool(network.transformer_depth), network.resblock_updown)
    shared = {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "out_channels": network.out_channels,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": widths,
        "layers_per_block": network.num_res_blocks,
        "dropout": network.dropout,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "norm_num_groups": groups,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if network.scale_shift else "default",
    }
    heads = [network.num_heads or max(1, width // network.head_channels) for width in widths]
    if network.transformer_depth:
        return {
            "_class_name": "UNet2DConditionModel",
            **shared,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "cross_attention_dim": context_dim,
            "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
            "transformer_layers_per_block": network.transformer_depth,
            "use_linear_projection": linear_projections,
        }
    sizes = {width // n for width, n, has in zip(widths, heads, attends, strict=True) if has} | {widths[-1] // heads[-1]}
    if len(sizes) > 1 and network.num_heads != 1:
        raise UserError("diffusers' UNet2DModel has one number of channels a head, not one number of heads, at all levels")
    resample = "resnet" if network.resblock_updown else "conv"
    return {
        "_class_name": "UNet2DModel",
        **shared,
        "mid_block_type": "UNetMidBlock2D",
        "attention_head_dim": None if network.num_heads == 1 else sizes.pop(),  # None: as many as the level has
        "attn_norm_num_groups": groups,
        "downsample_type": resample,
        "upsample_type": resample,
    }


def autoencoder_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `first_stage` group, from the config.json of an AutoencoderKL or a VQModel. Raises UserError."""
    with fields.understood("the config.json of an autoencoder"):
        return _autoencoder_settings(config)


def _autoencoder_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    _demand(config, _AUTOENCODER_MUST, _AUTOENCODER_KNOWN, (*_NEEDED, "latent_channels"))
    vq = config.get("_class_name") == "VQModel"
    must = [f"{kind}Block2D" for kind in ("DownEncoder", "UpDecoder", "AttnDownEncoder", "AttnUpDecoder")]
    types = [*config["down_block_types"], *config["up_block_types"]]
    if others := sorted(set(types) - set(must)):
        raise UserError(f"blocks {', '.join(others)} have no counterpart here")
    attends = [kind.startswith("Attn") for kind in config["down_block_types"]]
    if [kind.startswith("Attn") for kind in reversed(config["up_block_types"])] != attends:
        raise UserError("attention at other levels in the decoder than in the encoder has no counterpart here")
    quant_conv = config.get("use_quant_conv", True)
    if quant_conv != config.get("use_post_quant_conv", True):
        raise UserError("an autoencoder with one of quant_conv and post_quant_conv has no counterpart here")
    settings = {
        "kind": "vq" if vq else "kl",
        **_multiples(list(config["block_out_channels"])),
        "num_res_blocks": _common(config["layers_per_block"], "layers_per_block"),
        "attention_levels": tuple(2**i for i, has in enumerate(attends) if has),
        "mid_attention": config.get("mid_block_add_attention", True),
        "norm_groups": config.get("norm_num_groups", 32),
        "quant_conv": quant_conv,
        "z_channels": config["latent_channels"],
        "latent_channels": (config.get("vq_embed_dim") if vq else None) or config["latent_channels"],
    }
    return settings | ({"codebook_size": config.get("num_vq_embeddings", 256)} if vq else {})


def autoencoder_config(network: KLAutoencoder | VQAutoencoder, sample_size: int, groups: int) -> dict[str, Any]:
    """The config.json of an autoencoder, but for the scale of its latents. Raises UserError for what diffusers has no class for."""
    attends = [2**i in network.attention_levels for i in range(len(network.channel_mult))]
    shared = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": [f"{'Attn' if has else ''}DownEncoderBlock2D" for has in attends],
        "up_block_types": [f"{'Attn' if has else ''}UpDecoderBlock2D" for has in reversed(attends)],
        "block_out_channels": [network.channels * mult for mult in network.channel_mult],
        "layers_per_block": network.num_res_blocks,
        "act_fn": "silu",
        "norm_num_groups": groups,
        "sample_size": sample_size,
        "mid_block_add_attention": network.mid_attention,
        "latent_channels": network.z_channels,
    }
    if isinstance(network, VQAutoencoder):
        if not network.quant_conv:
            raise UserError("diffusers' VQModel always has its quant_conv: train with first_stage.quant_conv=True")
        sizes = {"num_vq_embeddings": network.codebook_size, "vq_embed_dim": network.latent_channels}
        return {"_class_name": "VQModel", **shared, **sizes}
    if network.z_channels != network.latent_channels:
        raise UserError("diffusers' AutoencoderKL has as many channels inside as in its latents")
    return {"_class_name": "AutoencoderKL", **shared, "use_quant_conv": network.quant_conv, "use_post_quant_conv": network.quant_conv}
