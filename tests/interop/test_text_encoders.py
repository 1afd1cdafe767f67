"""Key maps of text encoders: every published name and shape, names of other files, exact round trips, settings both ways."""

import ast
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.interop import keymap
from ldm_jax.interop import text_encoders as te
from ldm_jax.model_directory import flatten
from ldm_jax.nn.clip_text import CLIPText
from ldm_jax.nn.t5 import T5Encoder
from ldm_jax.nn.text_encoder import TextTransformer

KEYS = Path(__file__).parent / "keys"
CLIP = CLIPText(vocab_size=11, max_length=7, width=8, depth=3, num_heads=2)
T5 = T5Encoder(vocab_size=11, width=10, depth=2, num_heads=3, head_dim=4, ff_width=14)
BERT = TextTransformer(vocab_size=11, max_length=7, width=8, depth=2, num_heads=3, head_dim=4)
MAPS: dict[str, tuple[Any, Callable[..., keymap.KeyMap]]] = {
    "clip": (CLIP, te.clip_map),
    "openclip": (CLIP, te.openclip_map),
    "t5": (T5, te.t5_map),
    "bert": (BERT, te.bert_map),
    "ldmbert": (BERT, te.ldmbert_map),
}


def abstract(network: Any) -> dict[str, Any]:
    return jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 3), np.int32))["params"]


def published(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config.json of a network of diffusers or transformers, and the shape of each of its tensors."""
    _, config, *lines = gzip.decompress((KEYS / f"{name}.txt.gz").read_bytes()).decode().splitlines()
    return json.loads(config), {tensor: ast.literal_eval(shape) for tensor, shape, _ in (line.split("\t") for line in lines)}


def shapes(kind: str, network: Any = None) -> dict[str, tuple[int, ...]]:
    small, map_of = MAPS[kind]
    params = abstract(network or small)
    return keymap.their_shapes(map_of(params), params)


def unread(theirs: dict[str, Any], ignored: tuple[str, ...]) -> set[str]:
    return {name for name in theirs if any(re.fullmatch(pattern, name) for pattern in ignored)}


def test_every_published_tensor_of_clip_l14_has_its_name_and_shape() -> None:
    config, theirs = published("diffusers_clip_text_l14")
    settings = te.clip_from_hf(config)
    assert settings == te.CLIP_L14
    params = abstract(CLIPText(**settings))
    assert keymap.their_shapes(te.clip_map(params, names=theirs), params) == theirs
    marked = {f"cond_stage_model.transformer.text_model.{name}": shape for name, shape in theirs.items()}
    keys = te.clip_map(params, "cond_stage_model.transformer.", marked)
    assert keymap.their_shapes(keys, params) == marked
    assert [t.name for t in te.clip_map(params)] == [t.name.removeprefix("cond_stage_model.transformer.") for t in keys]


def test_every_published_tensor_of_ldmbert_has_its_name_and_shape() -> None:
    config, theirs = published("diffusers_ldmbert")
    settings = te.ldmbert_from_hf(config)
    assert settings == {"vocab_size": 30522, "max_length": 77, "width": 1280, "depth": 32, "num_heads": 8, "head_dim": 64}
    logits = unread(theirs, te.LDMBERT_IGNORED)
    assert logits == {"to_logits.weight", "to_logits.bias"}
    assert shapes("ldmbert", TextTransformer(**settings)) == {name: shape for name, shape in theirs.items() if name not in logits}


def test_names_of_the_other_formats() -> None:
    heads, width = 12, 8
    assert shapes("bert", BERT.clone(depth=1)) == {
        "transformer.token_emb.weight": (11, width),
        "transformer.pos_emb.emb.weight": (7, width),
        **{f"transformer.attn_layers.layers.{i}.0.{leaf}": (width,) for i in (0, 1) for leaf in ("weight", "bias")},
        **{f"transformer.attn_layers.layers.0.1.to_{part}.weight": (heads, width) for part in "qkv"},
        "transformer.attn_layers.layers.0.1.to_out.weight": (width, heads),
        "transformer.attn_layers.layers.0.1.to_out.bias": (width,),
        "transformer.attn_layers.layers.1.1.net.0.0.weight": (4 * width, width),
        "transformer.attn_layers.layers.1.1.net.0.0.bias": (4 * width,),
        "transformer.attn_layers.layers.1.1.net.2.weight": (width, 4 * width),
        "transformer.attn_layers.layers.1.1.net.2.bias": (width,),
        "transformer.norm.weight": (width,),
        "transformer.norm.bias": (width,),
    }
    block = "model.transformer.resblocks.0"
    assert shapes("openclip", CLIP.clone(depth=2, skip_last=1)) == {
        "model.token_embedding.weight": (11, width),
        "model.positional_embedding": (7, width),
        f"{block}.attn.in_proj_weight": (3 * width, width),
        f"{block}.attn.in_proj_bias": (3 * width,),
        f"{block}.attn.out_proj.weight": (width, width),
        f"{block}.attn.out_proj.bias": (width,),
        **{f"{block}.ln_{n}.{leaf}": (width,) for n in (1, 2) for leaf in ("weight", "bias")},
        f"{block}.mlp.c_fc.weight": (4 * width, width),
        f"{block}.mlp.c_fc.bias": (4 * width,),
        f"{block}.mlp.c_proj.weight": (width, 4 * width),
        f"{block}.mlp.c_proj.bias": (width,),
        "model.ln_final.weight": (width,),
        "model.ln_final.bias": (width,),
    }
    layers = "encoder.block.0.layer"
    assert shapes("t5", T5.clone(depth=1)) == {
        "shared.weight": (11, 10),
        f"{layers}.0.SelfAttention.relative_attention_bias.weight": (32, 3),
        **{f"{layers}.0.SelfAttention.{part}.weight": (12, 10) for part in "qkv"},
        f"{layers}.0.SelfAttention.o.weight": (10, 12),
        f"{layers}.0.layer_norm.weight": (10,),
        f"{layers}.1.DenseReluDense.wi_0.weight": (14, 10),
        f"{layers}.1.DenseReluDense.wi_1.weight": (14, 10),
        f"{layers}.1.DenseReluDense.wo.weight": (10, 14),
        f"{layers}.1.layer_norm.weight": (10,),
        "encoder.final_layer_norm.weight": (10,),
    }


@pytest.mark.parametrize("kind", MAPS)
def test_a_file_read_and_written_again_is_the_same(kind: str) -> None:
    network, map_of = MAPS[kind]
    params, rng = abstract(network), np.random.default_rng(0)
    keys = map_of(params)
    theirs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes(kind).items()}
    ours = dict(keymap.read(keys, theirs.__getitem__))
    assert {name: leaf.shape for name, leaf in ours.items()} == {name: leaf.shape for name, leaf in flatten(params).items()}
    again = dict(keymap.write(keys, ours.__getitem__))
    assert again.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(again[name], value)


def test_openclip_has_queries_keys_and_values_one_after_the_other() -> None:
    params = abstract(CLIP)
    leaves = {name: np.zeros(leaf.shape, np.float32) for name, leaf in flatten(params).items()}
    for n, part in enumerate("qkv"):
        leaves[f"layer_1_attn/{part}/kernel"] = np.arange(64.0).reshape(8, 8) + 100 * n
        leaves[f"layer_1_attn/{part}/bias"] = np.arange(8.0) + 10 * n
    written = dict(keymap.write(te.openclip_map(params), leaves.__getitem__))
    fused = written["model.transformer.resblocks.1.attn.in_proj_weight"]
    np.testing.assert_array_equal(fused, np.concatenate([np.arange(64.0).reshape(8, 8).T + 100 * n for n in range(3)]))
    biases = written["model.transformer.resblocks.1.attn.in_proj_bias"]
    np.testing.assert_array_equal(biases, np.concatenate([np.arange(8.0) + 10 * n for n in range(3)]))


@pytest.mark.parametrize("present", [{"shared.weight"}, {"encoder.embed_tokens.weight"}, set(te._T5_TABLES)])
def test_t5_takes_its_table_by_either_name(present: set[str]) -> None:
    params = abstract(T5)
    theirs = {name: shape for name, shape in shapes("t5").items() if name not in te._T5_TABLES} | dict.fromkeys(present, (11, 10))
    theirs |= {"decoder.block.0.layer.0.layer_norm.weight": (10,), "lm_head.weight": (11, 10)}
    keys = te.t5_map(params, names=theirs)
    keymap.check(keys, params, theirs, "t5", te.T5_IGNORED)
    assert {t.name for t in keys} - theirs.keys() == set()
    with pytest.raises(UserError, match=r"\(1 tensors\): shared.weight is missing"):
        missing = {name: shape for name, shape in theirs.items() if name not in present}
        keymap.check(te.t5_map(params, names=missing), params, missing, "t5", te.T5_IGNORED)


def test_t5_with_two_tables_that_differ_is_refused() -> None:
    params = abstract(T5)
    theirs = {name: np.zeros(shape, np.float32) for name, shape in (shapes("t5") | {"encoder.embed_tokens.weight": (11, 10)}).items()}
    keys = te.t5_map(params, names=theirs)
    assert set(dict(keymap.read(keys, theirs.__getitem__))) == flatten(params).keys()
    theirs["encoder.embed_tokens.weight"] += 1
    with pytest.raises(UserError, match=r"encoder\.embed_tokens\.weight differs from shared\.weight"):
        list(keymap.read(keys, theirs.__getitem__))


def test_what_whole_models_hold_besides_is_ignored_and_nothing_else() -> None:
    ours = abstract(CLIP)
    others = ["text_model.embeddings.position_ids", "vision_model.embeddings.class_embedding", "text_projection.weight", "logit_scale"]
    theirs = shapes("clip") | dict.fromkeys(others, (1,))
    keymap.check(te.clip_map(ours, names=theirs), ours, theirs, "clip", te.CLIP_IGNORED)
    with pytest.raises(UserError, match=r"text_model\.encoder\.layers\.3\.layer_norm1\.weight is not expected"):
        theirs |= {"text_model.encoder.layers.3.layer_norm1.weight": (8,)}
        keymap.check(te.clip_map(ours, names=theirs), ours, theirs, "clip", te.CLIP_IGNORED)


def test_openclip_ignores_the_layers_that_are_skipped() -> None:
    whole = shapes("openclip") | {"model.text_projection": (8, 8), "model.logit_scale": (), "model.attn_mask": (7, 7)}
    for skip_last in range(3):
        network = CLIP.clone(skip_last=skip_last)
        params = abstract(network)
        keymap.check(te.openclip_map(params), params, whole, "openclip", te.openclip_ignored(network))
    with pytest.raises(UserError, match=r"resblocks\.2\.ln_1\.weight is not expected"):
        keymap.check(te.openclip_map(params), params, whole, "openclip", te.openclip_ignored(CLIP.clone(skip_last=0)))


def fields(network: Any) -> dict[str, Any]:
    return {name: getattr(network, name) for name in network.__dataclass_fields__ if name not in ("dtype", "parent", "name", "remat")}


def test_settings_come_back_from_what_is_exported() -> None:
    assert te.clip_from_hf(te.clip_to_hf(CLIP)) == fields(CLIP)
    assert te.t5_from_hf(te.t5_to_hf(T5)) == fields(T5)
    assert te.ldmbert_from_hf(te.ldmbert_to_hf(BERT)) == fields(BERT)
    # A file without the skipped layers is of a network that skips none.
    skipping = te.clip_from_hf(te.clip_to_hf(CLIPText(**te.OPENCLIP_H14)))
    assert skipping == te.OPENCLIP_H14 | {"depth": 23, "skip_last": 0}


@pytest.mark.parametrize("name", ["diffusers_clip_text_l14", "diffusers_ldmbert"])
def test_exported_fields_are_those_that_are_published(name: str) -> None:
    config, _ = published(name)
    clip = "clip" in name
    exported = (
        te.clip_to_hf(CLIPText(**te.clip_from_hf(config))) if clip else te.ldmbert_to_hf(TextTransformer(**te.ldmbert_from_hf(config)))
    )
    free = {"architectures"} if clip else {"architectures", "dropout"}  # dropout is of their training
    assert {field: config[field] for field in exported if field not in free} == {f: v for f, v in exported.items() if f not in free}


def test_the_text_part_of_a_whole_clip_is_enough() -> None:
    config = te.clip_to_hf(CLIP)
    assert te.clip_from_hf({"model_type": "clip", "vision_config": {}, "text_config": config}) == te.clip_from_hf(config)


def test_an_old_t5_has_the_distance_that_was_fixed_then() -> None:
    config = te.t5_to_hf(T5)
    del config["relative_attention_max_distance"]
    assert te.t5_from_hf(config)["max_distance"] == 128


@pytest.mark.parametrize(
    ("read", "exported", "change", "message"),
    [
        (te.clip_from_hf, te.clip_to_hf(CLIP), {"hidden_act": "silu"}, "hidden_act 'silu' is not one of quick_gelu, gelu"),
        (te.clip_from_hf, te.clip_to_hf(CLIP), {"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06"),
        (te.clip_from_hf, te.clip_to_hf(CLIP), {"intermediate_size": 24}, "intermediate_size=24"),
        (te.clip_from_hf, te.clip_to_hf(CLIP), {"num_attention_heads": 3}, "8 is no multiple of 3 heads"),
        (te.t5_from_hf, te.t5_to_hf(T5), {"feed_forward_proj": "relu"}, "feed_forward_proj 'relu' is not 'gated-gelu'"),
        (te.t5_from_hf, te.t5_to_hf(T5), {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05"),
        (te.t5_from_hf, te.t5_to_hf(T5), {"model_type": "umt5"}, "model_type='umt5'"),
        (te.ldmbert_from_hf, te.ldmbert_to_hf(BERT), {"encoder_ffn_dim": 8}, "encoder_ffn_dim=8"),
        (te.ldmbert_from_hf, te.ldmbert_to_hf(BERT), {"activation_function": "relu"}, "activation_function='relu'"),
    ],
)
def test_what_has_no_counterpart_is_refused(read: Callable, exported: dict, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read(exported | change)


@pytest.mark.parametrize(
    ("read", "lacking"),
    [
        (te.clip_from_hf, "vocab_size, max_position_embeddings, hidden_size, num_hidden_layers, num_attention_heads, hidden_act"),
        (te.t5_from_hf, "vocab_size, d_model, num_layers, num_heads, d_kv, d_ff, relative_attention_num_buckets"),
        (te.ldmbert_from_hf, "vocab_size, max_position_embeddings, d_model, encoder_layers, encoder_attention_heads, head_dim"),
    ],
)
def test_missing_fields_are_named(read: Callable, lacking: str) -> None:
    with pytest.raises(UserError, match=f"its config.json lacks {lacking}"):
        read({})
