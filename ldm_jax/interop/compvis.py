"""Key maps of the paper's own code (CompVis latent-diffusion and stable-diffusion) and what its YAML files say.

A checkpoint's tensors are named after the module tree there: `model.diffusion_model.*` is the UNet, `first_stage_model.*` the autoencoder,
`cond_stage_model.*` the conditioner. Files of an autoencoder alone have no prefix.

Of a checkpoint is kept what the networks here read. Not kept, and so not there again in one that is written of it, are the last layer,
`text_projection` and `logit_scale` of Stable Diffusion 2's OpenCLIP, `to_logits` of BERTEmbedder, whichever of the plain and the averaged
weights was not taken, and what belongs to training: optimizer, losses, tables of the schedule.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError
from ldm_jax.interop import text_encoders
from ldm_jax.interop.architecture import Architecture
from ldm_jax.interop.compvis_yaml import read_yaml
from ldm_jax.interop.importing import Networks, Part, build_networks, write_model
from ldm_jax.interop.keymap import CONV, LINEAR, POINTWISE, POINTWISE_1D, SAME, KeyMap, Rule, fused, key_map, nest, under
from ldm_jax.interop.safetensors_file import Weights, open_weights
from ldm_jax.nn.clip_text import CLIPText
from ldm_jax.nn.unet import UNet

_RES = (
    Rule("norm1", "in_layers.0"),
    Rule("conv1", "in_layers.2", CONV),
    Rule("emb", "emb_layers.1", LINEAR),
    Rule("norm2", "out_layers.0"),
    Rule("conv2", "out_layers.3", CONV),
    Rule("skip", "skip_connection", CONV),
)
_AE_RES = tuple(Rule(name, name, CONV if "conv" in name else SAME) for name in ("norm1", "conv1", "norm2", "conv2"))
_AE_RES = (*_AE_RES, Rule("skip", "nin_shortcut", CONV))
_AE_ATTENTION = (Rule("norm", "norm"), Rule("(?P<which>[qkv])", r"\g<which>", POINTWISE), Rule("out", "proj_out", POINTWISE))


def transformer_rules(linear: bool) -> tuple[Rule, ...]:
    """A SpatialTransformer, whose names are the same here and in diffusers; `linear`: its projections are matrices there."""
    block = r"block_(?P<block>\d+)/"
    there = r"transformer_blocks.\g<block>."
    return (
        Rule("norm", "norm"),
        Rule("proj_(?P<way>in|out)", r"proj_\g<way>", LINEAR if linear else POINTWISE),
        Rule(rf"{block}(?P<norm>norm\d)", rf"{there}\g<norm>"),
        Rule(rf"{block}(?P<attn>attn\d)/(?P<which>[qkv])", rf"{there}\g<attn>.to_\g<which>", LINEAR),
        Rule(rf"{block}(?P<attn>attn\d)/out", rf"{there}\g<attn>.to_out.0", LINEAR),
        Rule(rf"{block}ff/proj", rf"{there}ff.net.0.proj", LINEAR),
        Rule(rf"{block}ff/out", rf"{there}ff.net.2", LINEAR),
    )


def unet_map(
    network: UNet,
    params: Mapping[str, Any],
    linear_projections: bool = False,
    prefix: str = "model.diffusion_model.",
    fused_by_head: bool = True,
) -> KeyMap:
    """The map of a UNet; `params` are its parameters or their shapes, the flags as in `Architecture`."""
    up = {i: 2 if f"output_{i}_attn" in params else 1 for i in range(len(network.channel_mult) * (network.num_res_blocks + 1))}

    def place(match: re.Match[str]) -> str:
        side, i, kind = match["side"], match["i"], match["kind"]
        inner = {"res": 0, "down": 0, "attn": 1}.get(kind)
        return f"{side}_blocks.{i}.{up[int(i)] if inner is None else inner}"

    rules = [
        Rule("time_embed_([02])", r"time_embed.\1", LINEAR),
        Rule("input_0_conv", "input_blocks.0.0", CONV),
        Rule("out_norm", "out.0"),
        Rule("out_conv", "out.2", CONV),
        Rule("vector_embed_([02])", r"label_emb.0.\1", LINEAR),
        Rule(r"input_(\d+)_down", r"input_blocks.\1.0.op", CONV),
        Rule(r"output_(\d+)_up", lambda m: f"output_blocks.{m[1]}.{up[int(m[1])]}.conv", CONV),
        *nest(r"middle_(?P<m>[02])_res", r"middle_block.\g<m>", _RES),
        *nest(r"(?P<side>input|output)_(?P<i>\d+)_(?P<kind>res|down|up)", place, _RES),
    ]
    for name, block in params.items():
        if name.endswith("_attn"):
            where = "middle_block.1" if name.startswith("middle") else f"{name.split('_')[0]}_blocks.{name.split('_')[1]}.1"
            rules += nest(name, where, _attention(network, block, fused_by_head) if "q" in block else transformer_rules(linear_projections))
    return key_map(params, rules, prefix)


def _attention(network: UNet, block: Mapping[str, Any], fused_by_head: bool) -> tuple[Rule, ...]:
    width = block["q"]["kernel"].shape[-1]
    heads = (network.num_heads or width // network.head_channels) if fused_by_head else 1
    together = Rule("(?P<part>[qkv])", "qkv", fused(heads, POINTWISE_1D), ("q", "k", "v"))
    return (Rule("norm", "norm"), together, Rule("out", "proj_out", POINTWISE_1D))


def autoencoder_map(params: Mapping[str, Any], prefix: str = "") -> KeyMap:
    """The map of a KL or VQ autoencoder; `params` are its parameters or their shapes."""
    coder, level = r"(?P<coder>encoder|decoder)/", r"(?P<way>down|up)_(?P<level>\d+)"
    rules = [
        Rule("conv_out", "decoder.conv_out", CONV),
        Rule("((?:post_)?quant_conv)", r"\1", CONV),
        Rule("quantize", "quantize.embedding"),
        Rule(rf"{coder}(?P<name>conv_in|conv_out|norm_out)", r"\g<coder>.\g<name>", CONV),
        Rule(rf"{coder}{level}_(?P<sample>downsample|upsample)", r"\g<coder>.\g<way>.\g<level>.\g<sample>.conv", CONV),
        *nest(rf"{coder}{level}_(?P<i>\d+)_res", r"\g<coder>.\g<way>.\g<level>.block.\g<i>", _AE_RES),
        *nest(rf"{coder}{level}_(?P<i>\d+)_attn", r"\g<coder>.\g<way>.\g<level>.attn.\g<i>", _AE_ATTENTION),
        *nest(rf"{coder}mid_(?P<block>block_\d)", r"\g<coder>.mid.\g<block>", _AE_RES),
        *nest(rf"{coder}mid_attn_1", r"\g<coder>.mid.attn_1", _AE_ATTENTION),
    ]
    return key_map(params, rules, prefix)


def ema_name(name: str) -> str:
    """Where the EMA of the tensor `model.*` of a checkpoint is kept: its name without the dots, under `model_ema.`."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


_UNET, _FIRST_STAGE, _CONDITIONER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
# Of whole checkpoints: schedules and losses, which are made anew here.
_IGNORED = (
    r"betas|alphas_cumprod(_prev)?|(sqrt_(one_minus_)?|log_one_minus_|sqrt_recipm?1?_|sqrt_recip_)alphas_cumprod",
    r"posterior_(variance|log_variance_clipped|mean_coef[12])|ddim_(sigmas|alphas|alphas_prev|sqrt_one_minus_alphas)",
    r"logvar|scale_factor|lvlb_weights|model_ema\.(decay|num_updates|loss\w*)",
    r"(first_stage_model\.)?loss\..*",
)
_FIRST_STAGE_AGAIN = r"(encoder|decoder|quantize|quant_conv|post_quant_conv|loss)\b.*"  # in the conditioner's place, for masks


def import_checkpoint(
    checkpoint: str | Path,
    yaml: str | Path,
    output: str | Path,
    ema: bool = True,
    tokenizer: str = "",
    dtype: Any = np.float32,
    key: str | None = None,
    resolution: int | None = None,
) -> list[str]:
    """Writes a model directory of a checkpoint and the YAML file of its architecture.

    Args:
      ema: take the moving averages of the UNet, or of an autoencoder alone, where the checkpoint has them.
      tokenizer: a file or name for `Tokenizer.pretrained`; checkpoints have none.
      dtype: of the weights written, float32 or bfloat16.
      key: which dict of a torch file holds the weights, where it has several (see `load_state_dict`).
      resolution: of the pictures, in pixels, where it is not the one that the YAML file says.

    Returns notes for the user. Raises UserError.
    """
    architecture, notes = _resized(read_yaml(yaml), resolution), []
    weights = open_weights(checkpoint, key=key)
    scale = architecture.scale
    if scale is None:
        scale = 1.0 / _scale_factor(weights, f"{checkpoint} has no scale_factor, which {yaml} (scale_by_std) says it must hold")
    text = architecture.conditioning.get("text")
    tokens = Tokenizer.pretrained(tokenizer, text["max_length"]).padded_with(_padding(text)) if tokenizer and text else None
    if text and not tokens:
        notes.append("no tokenizer: give one with --tokenizer, or the model cannot read prompts")
    origin = {
        "format": "compvis",
        "linear_projections": architecture.linear_projections,
        "fused_by_head": architecture.fused_by_head,
    }
    networks = build_networks(architecture, 0.0, scale, tokens, origin)
    keys, others = model_map(networks, tuple(weights)), r"model_ema\..*"
    averages = {t.name: ema_name(t.name) for t in keys if t.name.startswith(_UNET) or networks.denoiser is None}
    if ema and any(name in weights for name in averages.values()):
        keys, others = [t._replace(name=averages.get(t.name, t.name)) for t in keys], "|".join(map(re.escape, averages))
    elif ema and networks.denoiser:
        notes.append("the checkpoint has no moving averages: its plain weights are taken")
    ignored = (*_IGNORED, *_conditioner_ignored(networks), others)
    write_model(networks, [Part(str(checkpoint), keys, weights, ignored)], tokens, output, dtype)
    return notes


def _resized(architecture: Architecture, resolution: int | None) -> Architecture:
    """The same for pictures of another size; None leaves it. Raises UserError."""
    if resolution is None:
        return architecture
    factor = 2 ** (len(architecture.first_stage["channel_mult"]) - 1)
    if resolution < 1 or resolution % factor:
        raise UserError(f"a resolution of {resolution} is no multiple of {factor}, by which the autoencoder makes pictures smaller")
    return replace(architecture, resolution=resolution)


def _padding(text: Mapping[str, Any]) -> str | int | None:
    """What texts are filled up with there, which a bare tokenizer.json does not say: the end mark in FrozenCLIPEmbedder, zeros in
    FrozenOpenCLIPEmbedder."""
    if text["kind"] != "clip":
        return None
    return 0 if text["activation"] == "gelu" else "<|endoftext|>"


def _scale_factor(weights: Weights, otherwise: str) -> float:
    """The number that a checkpoint multiplies latents by. Raises UserError."""
    value = weights["scale_factor"] if weights.shapes().get("scale_factor") in ((), (1,)) else np.zeros(())
    if not 0 < value.item() < np.inf:
        raise UserError(otherwise)
    return value.item()


def model_map(networks: Networks, names: tuple[str, ...] = ()) -> KeyMap:
    """The map of a whole checkpoint; an autoencoder's alone has no prefix. `names` are the tensors of the file, where one is read."""
    params = networks.params
    if networks.denoiser is None:
        return under("first_stage", autoencoder_map(params["first_stage"]))
    network = networks.denoiser.network
    if not isinstance(network, UNet):
        raise UserError("the paper's code has no denoiser but the UNet")
    origin = networks.info.get("origin", {})
    linear, by_head = bool(origin.get("linear_projections", False)), bool(origin.get("fused_by_head", True))
    keys = under("denoiser", unet_map(network, params["denoiser"], linear, _UNET, by_head))
    keys += under("first_stage", autoencoder_map(params["first_stage"], _FIRST_STAGE))
    for conditioner in networks.denoiser.conditioning.conditioners:
        part = params["conditioner"].get(conditioner.name, {})
        keys += under(f"conditioner/{conditioner.name}", _conditioner_map(conditioner, part, names) if part else [])
    return keys


def _conditioner_map(conditioner: Any, params: Mapping[str, Any], names: tuple[str, ...]) -> KeyMap:
    match conditioner.name:
        case "label":
            return key_map(params, [Rule("embedding", f"{_CONDITIONER}embedding.weight")])
        case "segmentation":
            return key_map(params, [Rule("channel_mapper", f"{_CONDITIONER}channel_mapper", POINTWISE)])
        case "text" if isinstance(conditioner.network, CLIPText):
            if conditioner.network.activation == "gelu":
                return text_encoders.openclip_map(params, _CONDITIONER)
            return text_encoders.clip_map(params, f"{_CONDITIONER}transformer.", names)
    return text_encoders.bert_map(params, _CONDITIONER)


def _conditioner_ignored(networks: Networks) -> list[str]:
    """Patterns of what lies among the conditioner's tensors and nobody reads."""
    conditioners: Any = networks.denoiser.conditioning.conditioners if networks.denoiser else ()
    patterns: list[str] = []
    for one in conditioners:
        if one.name == "mask" and len(conditioners) == 1:
            patterns.append(_FIRST_STAGE_AGAIN)
        elif one.name == "text" and isinstance(one.network, CLIPText):
            patterns += (rf"transformer\.({pattern})" for pattern in text_encoders.CLIP_IGNORED)
            patterns += text_encoders.openclip_ignored(one.network)
        elif one.name in ("text", "boxes"):
            patterns += text_encoders.BERT_IGNORED
    return [rf"{re.escape(_CONDITIONER)}({pattern})" for pattern in patterns]
