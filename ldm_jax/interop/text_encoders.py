"""Key maps and settings of pretrained text encoders, both ways: CLIP and T5 as transformers keeps them, OpenCLIP as it lies in Stable
Diffusion 2's checkpoints, and the paper's BERTEmbedder as CompVis and as diffusers (LDMBertModel) keep it.

A map's `params` are the network's parameters or their shapes; `prefix` stands before every name of theirs. `*_IGNORED` are patterns of
whole names, without prefix, of tensors that such files may hold and no network here reads.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from ldm_jax.config import UserError
from ldm_jax.interop.keymap import LINEAR, KeyMap, Rule, fused, key_map
from ldm_jax.nn.clip_text import ACTIVATIONS, CLIPText
from ldm_jax.nn.t5 import T5Encoder
from ldm_jax.nn.text_encoder import TextTransformer

_LAYER = r"layer_(?P<i>\d+)_"
_QKV = "attn/(?P<part>[qkv])"

# The text encoders of Stable Diffusion 1 (CLIP ViT-L/14) and 2 (OpenCLIP ViT-H/14), as settings of `CLIPText`.
_TABLES = {"vocab_size": 49408, "max_length": 77}
CLIP_L14: dict[str, Any] = _TABLES | {"width": 768, "depth": 12, "num_heads": 12, "activation": "quick_gelu", "skip_last": 0}
OPENCLIP_H14: dict[str, Any] = _TABLES | {"width": 1024, "depth": 24, "num_heads": 16, "activation": "gelu", "skip_last": 1}

_CLIP = (
    Rule("(?P<table>token|position)_embedding", r"embeddings.\g<table>_embedding.weight"),
    Rule(rf"{_LAYER}norm(?P<n>[12])", r"encoder.layers.\g<i>.layer_norm\g<n>"),
    Rule(_LAYER + _QKV, r"encoder.layers.\g<i>.self_attn.\g<part>_proj", LINEAR),
    Rule(rf"{_LAYER}attn/out", r"encoder.layers.\g<i>.self_attn.out_proj", LINEAR),
    Rule(rf"{_LAYER}ff_in", r"encoder.layers.\g<i>.mlp.fc1", LINEAR),
    Rule(rf"{_LAYER}ff_out", r"encoder.layers.\g<i>.mlp.fc2", LINEAR),
    Rule("final_norm", "final_layer_norm"),
)
# After the first: what files of a whole CLIP hold besides.
CLIP_IGNORED = (
    r"(text_model\.)?embeddings\.position_ids",
    r"vision_model\..*",
    r"(visual|text)_projection\.weight",
    r"logit_scale",
)

_RESBLOCK = r"model.transformer.resblocks.\g<i>."
_OPENCLIP = (
    Rule("token_embedding", "model.token_embedding.weight"),
    Rule("position_embedding", "model.positional_embedding"),
    Rule(rf"{_LAYER}norm(?P<n>[12])", rf"{_RESBLOCK}ln_\g<n>"),
    Rule(_LAYER + _QKV, rf"{_RESBLOCK}attn.in_proj", fused(1), ("q", "k", "v")),
    Rule(rf"{_LAYER}attn/out", rf"{_RESBLOCK}attn.out_proj", LINEAR),
    Rule(rf"{_LAYER}ff_in", rf"{_RESBLOCK}mlp.c_fc", LINEAR),
    Rule(rf"{_LAYER}ff_out", rf"{_RESBLOCK}mlp.c_proj", LINEAR),
    Rule("final_norm", "model.ln_final"),
)

_T5 = (
    Rule("position_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    Rule(rf"{_LAYER}norm1", r"encoder.block.\g<i>.layer.0.layer_norm"),
    Rule(_LAYER + _QKV, r"encoder.block.\g<i>.layer.0.SelfAttention.\g<part>", LINEAR),
    Rule(rf"{_LAYER}attn/out", r"encoder.block.\g<i>.layer.0.SelfAttention.o", LINEAR),
    Rule(rf"{_LAYER}norm2", r"encoder.block.\g<i>.layer.1.layer_norm"),
    Rule(rf"{_LAYER}ff_gate", r"encoder.block.\g<i>.layer.1.DenseReluDense.wi_0", LINEAR),
    Rule(rf"{_LAYER}ff_in", r"encoder.block.\g<i>.layer.1.DenseReluDense.wi_1", LINEAR),
    Rule(rf"{_LAYER}ff_out", r"encoder.block.\g<i>.layer.1.DenseReluDense.wo", LINEAR),
    Rule("final_norm", "encoder.final_layer_norm"),
)
_T5_TABLES = ("shared.weight", "encoder.embed_tokens.weight")  # two names of one tensor, of which a file has either or both
T5_IGNORED = (r"decoder\..*", r"lm_head\.weight")  # what files of a whole T5 hold besides

_BERT = (
    Rule("token_embedding", "transformer.token_emb.weight"),
    Rule("position_embedding", "transformer.pos_emb.emb.weight"),
    Rule(rf"{_LAYER}norm1", lambda m: f"{_compvis_layer(m, 0)}.0"),
    Rule(_LAYER + _QKV, lambda m: f"{_compvis_layer(m, 0)}.1.to_{m['part']}", LINEAR),
    Rule(rf"{_LAYER}attn/out", lambda m: f"{_compvis_layer(m, 0)}.1.to_out", LINEAR),
    Rule(rf"{_LAYER}norm2", lambda m: f"{_compvis_layer(m, 1)}.0"),
    Rule(rf"{_LAYER}ff_in", lambda m: f"{_compvis_layer(m, 1)}.1.net.0.0", LINEAR),
    Rule(rf"{_LAYER}ff_out", lambda m: f"{_compvis_layer(m, 1)}.1.net.2", LINEAR),
    Rule("final_norm", "transformer.norm"),
)
BERT_IGNORED = (r"transformer\.to_logits\.(weight|bias)",)

_LDMBERT = (
    Rule("(?P<table>token|position)_embedding", r"model.embed_\g<table>s.weight"),
    Rule(rf"{_LAYER}norm1", r"model.layers.\g<i>.self_attn_layer_norm"),
    Rule(_LAYER + _QKV, r"model.layers.\g<i>.self_attn.\g<part>_proj", LINEAR),
    Rule(rf"{_LAYER}attn/out", r"model.layers.\g<i>.self_attn.out_proj", LINEAR),
    Rule(rf"{_LAYER}norm2", r"model.layers.\g<i>.final_layer_norm"),
    Rule(rf"{_LAYER}ff_in", r"model.layers.\g<i>.fc1", LINEAR),
    Rule(rf"{_LAYER}ff_out", r"model.layers.\g<i>.fc2", LINEAR),
    Rule("final_norm", "model.layer_norm"),
)
LDMBERT_IGNORED = (r"to_logits\.(weight|bias)",)


def _compvis_layer(match: re.Match[str], half: int) -> str:
    """Attention and feed-forward are layers of their own there."""
    return f"transformer.attn_layers.layers.{2 * int(match['i']) + half}"


def clip_map(params: Mapping[str, Any], prefix: str = "", names: Collection[str] = ()) -> KeyMap:
    """The map of transformers' CLIPTextModel.

    `names` are those of the file to be read: with `text_model.` between `prefix` and the rest, or without, as transformers 5 saves a model
    that it did not load. Where there are none, the map is that of a file to be written, in the form that all releases read.
    """
    inner = f"{prefix}text_model."
    marked = not names or any(name.startswith(inner) for name in names)
    return key_map(params, _CLIP, inner if marked else prefix)


def openclip_map(params: Mapping[str, Any], prefix: str = "") -> KeyMap:
    """The map of OpenCLIP's text tower under Stable Diffusion 2's FrozenOpenCLIPEmbedder."""
    keys = key_map(params, _OPENCLIP, prefix)
    # These two are parameters of the attention itself and not of a layer in it.
    return [t._replace(name=t.name.replace("attn.in_proj.", "attn.in_proj_")) for t in keys]


def openclip_ignored(network: CLIPText) -> tuple[str, ...]:
    """Patterns of what this network does not read: the layers that it skips, and what makes one vector of the text."""
    skipped = "|".join(str(network.depth - 1 - i) for i in range(network.skip_last))
    layers = (rf"model\.transformer\.resblocks\.({skipped})\..*",) if skipped else ()
    return (*layers, r"model\.(text_projection|logit_scale|attn_mask)")


def t5_map(params: Mapping[str, Any], prefix: str = "", names: Collection[str] = ()) -> KeyMap:
    """The map of transformers' T5EncoderModel. `names` are those of the file to be read: they say how it calls the table of tokens."""
    first, *others = [name for name in _T5_TABLES if prefix + name in names] or _T5_TABLES[:1]
    keys = key_map(params, (Rule("token_embedding", first), *_T5), prefix)
    return keys + [t._replace(name=prefix + name) for t in keys if t.name == prefix + first for name in others]


def bert_map(params: Mapping[str, Any], prefix: str = "") -> KeyMap:
    """The map of CompVis' BERTEmbedder."""
    return key_map(params, _BERT, prefix)


def ldmbert_map(params: Mapping[str, Any], prefix: str = "") -> KeyMap:
    """The map of diffusers' LDMBertModel."""
    return key_map(params, _LDMBERT, prefix)


# Settings here and the fields of a config.json that say the same.
_CLIP_FIELDS = {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "activation": "hidden_act",
}
_T5_FIELDS = {
    "vocab_size": "vocab_size",
    "width": "d_model",
    "depth": "num_layers",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "ff_width": "d_ff",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
}
_LDMBERT_FIELDS = {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "width": "d_model",
    "depth": "encoder_layers",
    "num_heads": "encoder_attention_heads",
    "head_dim": "head_dim",
}


def clip_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `CLIPText` from the config.json of a CLIPTextModel, or of a whole CLIPModel.

    Raises UserError for fields that are missing and for what has no counterpart here.
    """
    config = config.get("text_config") or config
    settings = _settings(config, _CLIP_FIELDS, "CLIPTextModel")
    _demand(config, {"layer_norm_eps": 1e-5, "intermediate_size": 4 * settings["width"]}, "CLIPTextModel")
    if settings["activation"] not in ACTIVATIONS:
        raise UserError(f"CLIPTextModel: hidden_act {settings['activation']!r} is not one of {', '.join(ACTIVATIONS)}")
    if settings["width"] % settings["num_heads"]:
        raise UserError(f"CLIPTextModel: hidden_size {settings['width']} is no multiple of {settings['num_heads']} heads")
    return settings | {"skip_last": 0}


def clip_to_hf(network: CLIPText) -> dict[str, Any]:
    """The config.json of a CLIPTextModel. It has only the layers that are read, whose last state is the encoder's output."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        **_fields(network, _CLIP_FIELDS),
        "num_hidden_layers": network.depth - network.skip_last,
        "intermediate_size": 4 * network.width,
        "projection_dim": network.width,
        "layer_norm_eps": 1e-5,
        "bos_token_id": network.vocab_size - 2,  # where CLIP's byte pair encoding keeps its two marks
        "eos_token_id": network.vocab_size - 1,
    }


def t5_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `T5Encoder` from the config.json of a T5EncoderModel, or of a whole T5, of version 1.1.

    Raises UserError for fields that are missing and for what has no counterpart here.
    """
    config = {"relative_attention_max_distance": 128} | dict(config)  # files older than the field mean this
    settings = _settings(config, _T5_FIELDS, "T5EncoderModel")
    if config.get("feed_forward_proj") != "gated-gelu":
        raise UserError(f"T5EncoderModel: feed_forward_proj {config.get('feed_forward_proj')!r} is not 'gated-gelu', that of version 1.1")
    _demand(config, {"layer_norm_epsilon": 1e-6, "model_type": "t5", "dense_act_fn": "gelu_new"}, "T5EncoderModel")
    return settings


def t5_to_hf(network: T5Encoder) -> dict[str, Any]:
    """The config.json of a T5EncoderModel."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **_fields(network, _T5_FIELDS),
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def ldmbert_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `TextTransformer` from the config.json of diffusers' LDMBertModel.

    Raises UserError for fields that are missing and for what has no counterpart here.
    """
    settings = _settings(config, _LDMBERT_FIELDS, "LDMBertModel")
    _demand(config, {"encoder_ffn_dim": 4 * settings["width"], "activation_function": "gelu"}, "LDMBertModel")
    return settings


def ldmbert_to_hf(network: TextTransformer) -> dict[str, Any]:
    """The config.json of diffusers' LDMBertModel."""
    return {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        **_fields(network, _LDMBERT_FIELDS),
        "encoder_ffn_dim": 4 * network.width,
        "activation_function": "gelu",
        "dropout": 0.0,
    }


def _settings(config: Mapping[str, Any], fields: Mapping[str, str], what: str) -> dict[str, Any]:
    if missing := [theirs for theirs in fields.values() if theirs not in config]:
        raise UserError(f"{what}: its config.json lacks {', '.join(missing)}")
    return {ours: config[theirs] for ours, theirs in fields.items()}


def _fields(network: Any, fields: Mapping[str, str]) -> dict[str, Any]:
    return {theirs: getattr(network, ours) for ours, theirs in fields.items()}


def _demand(config: Mapping[str, Any], must: Mapping[str, Any], what: str) -> None:
    wrong = [f"{name}={config[name]!r}" for name, value in must.items() if config.get(name, value) != value]
    if wrong:
        raise UserError(f"{what}: {', '.join(wrong)} has no counterpart here; it would be {must}")
