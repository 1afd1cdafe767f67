"""The key map of DiT (Peebles & Xie 2023) in diffusers' DiTTransformer2DModel, and its config.json.

There the table of classes is part of the network, here it is the conditioner's. The map is of both: its `params` are
{"denoiser": the network's, "label": {"embedding": [classes + 1, width]}}, the last row being "no class".
"""

from collections.abc import Mapping
from typing import Any

from ldm_jax.config import UserError
from ldm_jax.interop import fields
from ldm_jax.interop.keymap import LINEAR, KeyMap, Layout, Rule, key_map, nest
from ldm_jax.nn.dit import DiT

_NORM_EPSILON = 1e-5  # diffusers' default, where a config.json is older than the field
_EMBEDDERS = "transformer_blocks.{}.norm1.emb."
_NEEDED = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "patch_size", "num_embeds_ada_norm")
# What a config.json must say, where it says anything, for the network to be ours.
_MUST = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "cross_attention_dim": None,
    "only_cross_attention": False,
    "double_self_attention": False,
    "num_vector_embeds": None,
    "caption_channels": None,
    "attention_type": "default",
    "use_additional_conditions": None,
    "interpolation_scale": None,
}
_KNOWN: dict[str, fields.Check] = {
    "num_attention_heads": fields.count,
    "attention_head_dim": fields.count,
    "in_channels": fields.count,
    "out_channels": fields.maybe(fields.count),
    "num_layers": fields.layers,
    "patch_size": fields.count,
    "num_embeds_ada_norm": fields.count,
    "norm_eps": fields.positive,
    "dropout": fields.number,
    "sample_size": fields.count,
    # Of other kinds of layers, and of precision.
    "norm_num_groups": fields.free,
    "use_linear_projection": fields.free,
    "upcast_attention": fields.free,
}


def patches(size: int) -> Layout:
    """[O,C,p,q], a convolution whose stride is its size; a matrix of [p,q,C] rows here."""
    return Layout(
        lambda a: (a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),),
        lambda a: a.reshape(size, size, -1, a.shape[-1]).transpose(3, 2, 0, 1),
    )


def diffusers_map(network: DiT, params: Mapping[str, Any], prefix: str = "") -> KeyMap:
    """The map of diffusers' class; `params` (arrays or shapes) as above. Raises ValueError for what it has no name for.

    There each block has a time embedding and a table of classes of its own, all the same in what was ever released. Our one of each
    is written to every block, and `keymap.read` compares them.
    """
    embedders = _EMBEDDERS.format(0)
    block = (
        Rule("attn/(?P<which>[qkv])", r"attn1.to_\g<which>", LINEAR),
        Rule("attn/out", "attn1.to_out.0", LINEAR),
        Rule("mlp_in", "ff.net.0.proj", LINEAR),
        Rule("mlp_out", "ff.net.2", LINEAR),
        Rule("modulation", "norm1.linear", LINEAR),
    )
    rules = [
        Rule("denoiser/x_embed", "pos_embed.proj", patches(network.patch_size)),
        Rule("denoiser/time_embed_0", f"{embedders}timestep_embedder.linear_1", LINEAR),
        Rule("denoiser/time_embed_2", f"{embedders}timestep_embedder.linear_2", LINEAR),
        Rule("label", f"{embedders}class_embedder.embedding_table"),
        *nest(r"denoiser/block_(?P<i>\d+)", r"transformer_blocks.\g<i>", block),
        Rule("denoiser/final_modulation", "proj_out_1", LINEAR),
        Rule("denoiser/out", "proj_out_2", LINEAR),
    ]
    keys = key_map(params, rules, prefix)
    copies = [(t, range(network.depth if embedders in t.name else 1)) for t in keys]
    return [t._replace(name=t.name.replace(embedders, _EMBEDDERS.format(i))) for t, blocks in copies for i in blocks]


def dit_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `denoiser` group, from the config.json of a DiTTransformer2DModel. Raises UserError.

    The table of classes has `num_embeds_ada_norm` + 1 rows.
    """
    what = str(config.get("_class_name", "config.json"))
    if missing := [name for name in _NEEDED if config.get(name) is None]:
        raise UserError(f"the config.json of a DiT does not say {', '.join(missing)}")
    fields.account(config, what, _MUST, _KNOWN)
    channels = config["in_channels"]
    total = config.get("out_channels") or channels
    if total not in (channels, 2 * channels):
        raise UserError(f"{what}: out_channels={total} for in_channels={channels} has no counterpart here")
    return {
        "kind": "dit",
        "out_channels": channels,
        "width": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": config["num_attention_heads"],
        "patch_size": config["patch_size"],
        "mlp_ratio": 4.0,
        "learn_sigma": total == 2 * channels,
        "legacy_frequencies": True,
        "mlp_epsilon": config.get("norm_eps", _NORM_EPSILON),
        "dropout": config.get("dropout", 0.0),
    }


def dit_config(network: DiT, in_channels: int, num_classes: int, sample_size: int) -> dict[str, Any]:
    """The config.json of a DiTTransformer2DModel. Raises UserError for a network that it cannot express, with all reasons.

    Args:
      in_channels: of the network's input, concatenated ones included.
      num_classes: without the row for "no class".
      sample_size: latent pixels on a side of the training images; there other sizes stretch the positions.
    """
    reasons = {
        "legacy_frequencies is off, and its class has no other frequencies": not network.legacy_frequencies,
        "it has cross-attention": network.cross_attention,
        "it normalises queries and keys": network.qk_norm,
        f"mlp_ratio is {network.mlp_ratio}, not 4": network.mlp_ratio != 4,
        "it has concatenated channels": in_channels != network.out_channels,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise UserError(f"diffusers' DiTTransformer2DModel cannot express this DiT: {'; '.join(found)}")
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": network.num_heads,
        "attention_head_dim": network.width // network.num_heads,
        "in_channels": in_channels,
        "out_channels": network.out_channels * (2 if network.learn_sigma else 1),
        "num_layers": network.depth,
        "dropout": network.dropout,
        "attention_bias": True,
        "sample_size": sample_size,
        "patch_size": network.patch_size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": num_classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": network.mlp_epsilon,
    }
