"""Readers of DINOv2 and CLIP: names and shapes, exact round trips through files, positions, ends of texts, and what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from ldm_jax.config import UserError
from ldm_jax.interop import keymap, vision
from ldm_jax.interop.safetensors_file import Spec, Weights, _Tensor
from ldm_jax.interop.text_encoders import clip_map
from ldm_jax.interop.vision import Clip, image_embeddings, interpolate_positions, load_clip, load_dino, text_embeddings
from ldm_jax.model_directory import flatten
from ldm_jax.nn.clip_text import CLIPText
from ldm_jax.nn.vision_transformer import VisionTransformer
from tests.interop import torch_files

SIZES: dict[str, Any] = {"image_size": 70, "patch_size": 14, "width": 128, "depth": 2, "num_heads": 2}
DINO = VisionTransformer(**SIZES, hidden=512, layer_scale=True)
GIANT = VisionTransformer(**SIZES, hidden=344, layer_scale=True, activation="swiglu")
IMAGE = VisionTransformer(12, 4, 6, 2, 3, 10, "quick_gelu", pre_norm=True, patch_bias=False, projection=5, epsilon=1e-5)
TEXT = CLIPText(vocab_size=16, max_length=6, width=8, depth=2, num_heads=2)
WORDS = ["red", "blue", "circle"]
END = 15
RULES = {"hub": vision._hub_rules, "folder": vision._dino_rules}


def random_like(shapes: Any) -> dict[str, np.ndarray]:
    """Leaves by their path."""
    rng = np.random.default_rng(0)
    return {leaf: rng.normal(size=shape.shape).astype(np.float32) for leaf, shape in flatten(shapes).items()}


def dino_state(network: VisionTransformer, form: str, leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    keys = keymap.key_map(vision._shapes(network), RULES[form](network))
    mask = {"hub": "mask_token", "folder": "embeddings.mask_token"}[form]
    return dict(keymap.write(keys, leaves.__getitem__)) | {mask: np.ones((1, network.width), np.float32)}


def dino_config(network: VisionTransformer, **changes: Any) -> dict[str, Any]:
    config = {"model_type": "dinov2", "hidden_size": network.width, "num_hidden_layers": network.depth, "mlp_ratio": 4, "torch_dtype": "x"}
    config |= {"num_attention_heads": network.num_heads, "image_size": network.image_size, "drop_path_rate": 0.0}
    return config | {"use_swiglu_ffn": network.activation == "swiglu"} | changes


def write_folder(folder: Path, config: dict[str, Any], state: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, folder / "model.safetensors")
    return folder


def write_dino(root: Path, form: str, network: VisionTransformer, leaves: dict[str, np.ndarray], **changes: Any) -> Path:
    state = dino_state(network, form, leaves)
    if form == "folder":
        return write_folder(root / "dino", dino_config(network, **changes), state)
    return torch_files.write(root / "dinov2_vitl14_pretrain.pth", state)


@pytest.mark.parametrize("form", RULES)
@pytest.mark.parametrize("network", [DINO, GIANT], ids=["mlp", "swiglu"])
def test_dino_comes_back_from_a_file(form: str, network: VisionTransformer, tmp_path: Path) -> None:
    leaves = random_like(vision._shapes(network))
    path = write_dino(tmp_path, form, network, leaves)
    found, params, digest = load_dino(path, size=70)
    assert found == network
    assert flatten(params).keys() == leaves.keys()
    for leaf, value in flatten(params).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, leaves[leaf])
    file = path / "model.safetensors" if form == "folder" else path
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("form", RULES)
def test_dino_for_smaller_images_differs_in_its_positions_only(form: str, tmp_path: Path) -> None:
    leaves = random_like(vision._shapes(DINO))
    network, params, _ = load_dino(write_dino(tmp_path, form, DINO, leaves), size=42)
    assert network == DINO.clone(image_size=42)
    table = params["position_embedding"]
    np.testing.assert_array_equal(table, interpolate_positions(leaves["position_embedding"], 3))
    for leaf, value in flatten(params).items():
        assert leaf == "position_embedding" or np.array_equal(value, leaves[leaf])
    assert network.apply({"params": params}, jnp.zeros((1, 42, 42, 3))).shape == (1, 128)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    leaves = random_like(vision._shapes(DINO))
    state = {name: value.astype(np.float16) for name, value in dino_state(DINO, "folder", leaves).items()}
    _, params, _ = load_dino(write_folder(tmp_path, dino_config(DINO), state), size=70)
    for leaf, value in flatten(params).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, leaves[leaf].astype(np.float16))


def names_and_shapes(form: str, network: VisionTransformer) -> dict[str, tuple[int, ...]]:
    shapes = vision._shapes(network)
    return keymap.their_shapes(keymap.key_map(shapes, RULES[form](network)), shapes)


def pairs(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def test_names_of_every_format() -> None:
    network = DINO.clone(depth=1)
    tables = {"cls_token": (1, 1, 128), "pos_embed": (1, 26, 128), "patch_embed.proj.weight": (128, 3, 14, 14)}
    norms = {f"blocks.0.norm{n}.{leaf}": (128,) for n in (1, 2) for leaf in ("weight", "bias")}
    assert names_and_shapes("hub", network) == {
        **tables,
        "patch_embed.proj.bias": (128,),
        **norms,
        **pairs("blocks.0.attn.qkv", 384, 128),
        **pairs("blocks.0.attn.proj", 128, 128),
        **pairs("blocks.0.mlp.fc1", 512, 128),
        **pairs("blocks.0.mlp.fc2", 128, 512),
        "blocks.0.ls1.gamma": (128,),
        "blocks.0.ls2.gamma": (128,),
        "norm.weight": (128,),
        "norm.bias": (128,),
    }
    layer = "encoder.layer.0"
    heads = [f"{layer}.attention.attention.{part}" for part in ("query", "key", "value")]
    assert names_and_shapes("folder", network) == {
        "embeddings.cls_token": (1, 1, 128),
        "embeddings.position_embeddings": (1, 26, 128),
        "embeddings.patch_embeddings.projection.weight": (128, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": (128,),
        **{name.replace("blocks.0", layer): shape for name, shape in norms.items()},
        **{name: shape for part in heads for name, shape in pairs(part, 128, 128).items()},
        **pairs(f"{layer}.attention.output.dense", 128, 128),
        **pairs(f"{layer}.mlp.fc1", 512, 128),
        **pairs(f"{layer}.mlp.fc2", 128, 512),
        f"{layer}.layer_scale1.lambda1": (128,),
        f"{layer}.layer_scale2.lambda1": (128,),
        "layernorm.weight": (128,),
        "layernorm.bias": (128,),
    }
    gated = GIANT.clone(depth=1)
    assert names_and_shapes("hub", gated).items() >= (pairs("blocks.0.mlp.w12", 688, 128) | pairs("blocks.0.mlp.w3", 128, 344)).items()
    theirs = pairs(f"{layer}.mlp.weights_in", 688, 128) | pairs(f"{layer}.mlp.weights_out", 128, 344)
    assert names_and_shapes("folder", gated).items() >= theirs.items()


def test_facebooks_queries_keys_and_values_follow_one_another() -> None:
    leaves = random_like(vision._shapes(DINO))
    state = dino_state(DINO, "hub", leaves)
    joined = np.concatenate([leaves[f"layer_1_attn/{part}/kernel"].T for part in "qkv"])
    np.testing.assert_array_equal(state["blocks.1.attn.qkv.weight"], joined)
    biases = np.concatenate([leaves[f"layer_1_attn/{part}/bias"] for part in "qkv"])
    np.testing.assert_array_equal(state["blocks.1.attn.qkv.bias"], biases)


def test_a_convolution_over_patches_is_the_matrix_read_from_it() -> None:
    shapes = vision._shapes(DINO)
    leaves = random_like(shapes)
    kernel = dino_state(DINO, "hub", leaves)["patch_embed.proj.weight"]
    image = np.random.default_rng(3).normal(size=(14, 14, 3))
    np.testing.assert_allclose(np.einsum("ocpq,pqc->o", kernel, image), image.reshape(-1) @ leaves["patches/kernel"], rtol=1e-9)


@pytest.mark.parametrize(("width", "depth", "heads", "hidden"), [(384, 12, 6, 1536), (768, 12, 12, 3072), (1024, 24, 16, 4096)])
def test_published_sizes_follow_from_the_tensors(width: int, depth: int, heads: int, hidden: int) -> None:
    network = VisionTransformer(518, 14, width, depth, heads, hidden, layer_scale=True)
    weights = Weights({name: _Tensor(Spec(shape, np.dtype(np.float32)), bytes) for name, shape in names_and_shapes("hub", network).items()})
    assert VisionTransformer(**vision._hub_settings(Path("file"), weights)) == network


def test_the_largest_has_gates_of_4096() -> None:
    assert vision._swiglu_hidden(4 * 1536) == 4096
    config = dino_config(VisionTransformer(518, 14, 1536, 40, 24, 4096, "swiglu", layer_scale=True))
    assert vision._dino_settings(config)["hidden"] == 4096


@pytest.mark.parametrize("form", RULES)
def test_all_tensors_that_do_not_fit_are_listed_at_once(form: str, tmp_path: Path) -> None:
    path = write_dino(tmp_path, form, DINO, random_like(vision._shapes(DINO)))
    state = dino_state(DINO, form, random_like(vision._shapes(DINO)))
    norm, bias = {"hub": ("norm.weight", "blocks.1.norm2.bias"), "folder": ("layernorm.weight", "encoder.layer.1.norm2.bias")}[form]
    del state[norm]
    state |= {bias: np.zeros(7, np.float32), "head.weight": np.zeros((2, 2), np.float32)}
    if form == "hub":
        torch_files.write(path, state)
    else:
        write_folder(path, dino_config(DINO), state)
    with pytest.raises(UserError) as error:
        load_dino(path, size=42)
    text = str(error.value)
    assert f"(3 tensors): {norm} is missing; {bias} is [7], not [128]; head.weight is not expected" in text
    assert "\n" not in text


def test_other_files_are_no_dino(tmp_path: Path) -> None:
    state = dino_state(DINO, "hub", random_like(vision._shapes(DINO)))
    registers = torch_files.write(tmp_path / "reg4.pth", state | {"register_tokens": np.zeros((1, 4, 128), np.float32)})
    with pytest.raises(UserError, match="is a DINOv2 with registers"):
        load_dino(registers)
    other = torch_files.write(tmp_path / "other.pth", {"conv.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(UserError, match=r"no pos_embed, patch_embed.proj.weight, blocks.0.norm1.weight; of transformers give the folder"):
        load_dino(other)
    with pytest.raises(UserError, match="no weight file at"):
        load_dino(tmp_path / "nothing.pth")
    whole = torch_files.write(tmp_path / "whole.pth", state)
    for size in (50, 0, -14):
        with pytest.raises(UserError, match=r"not divisible into patches of 14|to be positive"):
            load_dino(whole, size=size)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"it needs one of model.safetensors, pytorch_model.bin"):
        load_dino(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "dinov2_with_registers"}, "model_type='dinov2_with_registers' has no counterpart here"),
        ({"qkv_bias": False}, "qkv_bias=False has no counterpart here"),
        ({"hidden_act": "relu"}, "hidden_act='relu' makes no sense"),
        ({"image_size": [70, 42]}, r"image_size=\[70, 42\] makes no sense"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 makes no sense"),
        ({"num_attention_heads": 3}, "width 128 is not divisible into 3 heads"),
        ({"hidden_size": None}, "hidden_size=None makes no sense"),
    ],
)
def test_configurations_without_a_counterpart_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_dino(tmp_path, "folder", DINO, random_like(vision._shapes(DINO)), **change)
    with pytest.raises(UserError, match=message) as error:
        load_dino(path)
    assert "\n" not in str(error.value)


def test_sizes_in_pairs_are_read(tmp_path: Path) -> None:
    path = write_dino(tmp_path, "folder", DINO, random_like(vision._shapes(DINO)), image_size=[70, 70], patch_size=[14, 14])
    assert load_dino(path, size=70)[0] == DINO


def naive(table: np.ndarray, before: int, after: int, offset: float) -> np.ndarray:
    """Cubic convolution with a = -3/4 of the four nearest in each direction, one place after the other."""

    def kernel(x: float) -> float:
        x = abs(x)
        return 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    square, found = table[1:].reshape(before, before, -1).astype(float), np.zeros((after, after, table.shape[1]))
    for i in range(after):
        for j in range(after):
            y, x = ((k + 0.5) * before / (after + offset) - 0.5 for k in (i, j))
            for m in range(int(np.floor(y)) - 1, int(np.floor(y)) + 3):
                for n in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                    found[i, j] += kernel(y - m) * kernel(x - n) * square[min(max(m, 0), before - 1), min(max(n, 0), before - 1)]
    return np.concatenate([table[:1], found.reshape(after**2, -1)])


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize(("before", "after"), [(5, 3), (3, 5), (37, 16), (1, 2)])
def test_positions_are_interpolated_by_definition(before: int, after: int, offset: float) -> None:
    table = np.random.default_rng(0).normal(size=(1 + before**2, 3)).astype(np.float32)
    found = interpolate_positions(table, after, offset)
    assert (found.dtype, found.shape) == (np.float32, (1 + after**2, 3))
    np.testing.assert_allclose(found, naive(table, before, after, offset), atol=1e-6)
    np.testing.assert_allclose(interpolate_positions(np.full_like(table, 3), after, offset), 3, atol=1e-6)


def test_mirrored_positions_stay_mirrored_without_an_offset() -> None:
    table = np.random.default_rng(0).normal(size=(26, 3)).astype(np.float32)
    mirrored = np.concatenate([table[:1], table[1:][::-1]])
    for offset, symmetric in ((0.0, True), (0.1, False)):
        found, other = interpolate_positions(table, 3, offset), interpolate_positions(mirrored, 3, offset)
        assert np.allclose(found[1:], other[1:][::-1], atol=1e-6) == symmetric


def word_tokenizer(end: str = "<end>", end_id: int = END) -> tokenizers.Tokenizer:
    vocabulary = {"[UNK]": 2, "<begin>": 14, end: end_id} | {word: i + 3 for i, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ends = [("<begin>", 14), (end, end_id)]
    inner.post_processor = tokenizers.processors.TemplateProcessing(single=f"<begin> $A {end}", special_tokens=ends)
    inner.enable_padding(pad_id=end_id, pad_token=end)
    return inner


def clip_shapes() -> dict[str, Any]:
    text = jax.eval_shape(TEXT.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    return {"image": vision._shapes(IMAGE), "text": text, "text_projection": jax.ShapeDtypeStruct((8, 5), np.float32)}


def clip_state(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    shapes = clip_shapes()
    keys = keymap.under("image", vision._clip_image_map(IMAGE, shapes["image"])) + keymap.under("text", clip_map(shapes["text"]))
    others = {"text_projection.weight": leaves["text_projection"].T, "logit_scale": np.ones((), np.float32)}
    return dict(keymap.write(keys, leaves.__getitem__)) | others


def clip_config(text: dict[str, Any] | None = None, image: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    about_text = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16}
    about_text |= {"max_position_embeddings": 6, "eos_token_id": END}
    about_image = {"hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 12}
    about_image |= {"patch_size": 4}
    whole = {"model_type": "clip", "projection_dim": 5, "logit_scale_init_value": 2.6592}
    return whole | {"text_config": about_text | (text or {}), "vision_config": about_image | (image or {})} | changes


def write_clip(folder: Path, tokenizer: tokenizers.Tokenizer | None = None, **config: Any) -> Path:
    write_folder(folder, clip_config(**config), clip_state(random_like(clip_shapes())))
    (folder / "tokenizer.json").write_text((tokenizer or word_tokenizer()).to_str())
    return folder


def test_clip_comes_back_from_a_folder(tmp_path: Path) -> None:
    clip, leaves = load_clip(write_clip(tmp_path)), random_like(clip_shapes())
    assert (clip.image_network, clip.text_network, clip.end_token) == (IMAGE, TEXT, END)
    read = {"image": clip.image_params, "text": clip.text_params, "text_projection": clip.text_projection}
    assert flatten(read).keys() == leaves.keys()
    for leaf, value in flatten(read).items():
        np.testing.assert_array_equal(value, leaves[leaf])
    assert clip.sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert len(jax.tree.leaves(clip)) == len(leaves)


def test_names_of_the_image_tower() -> None:
    network = IMAGE.clone(depth=1)
    shapes = vision._shapes(network)
    tower, layer = "vision_model", "vision_model.encoder.layers.0"
    heads = [f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    norms = [f"{tower}.pre_layrnorm", f"{tower}.post_layernorm", f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
    assert keymap.their_shapes(vision._clip_image_map(network, shapes), shapes) == {
        f"{tower}.embeddings.class_embedding": (6,),
        f"{tower}.embeddings.position_embedding.weight": (10, 6),
        f"{tower}.embeddings.patch_embedding.weight": (6, 3, 4, 4),
        **{name: shape for part in heads for name, shape in pairs(part, 6, 6).items()},
        **pairs(f"{layer}.mlp.fc1", 10, 6),
        **pairs(f"{layer}.mlp.fc2", 6, 10),
        **{f"{norm}.{leaf}": (6,) for norm in norms for leaf in ("weight", "bias")},
        "visual_projection.weight": (5, 6),
    }


def test_fields_that_are_left_out_have_the_values_of_vit_b32() -> None:
    settings = vision._clip_image_settings({"model_type": "clip"})
    expected = VisionTransformer(224, 32, 768, 12, 12, 3072, "quick_gelu", pre_norm=True, patch_bias=False, projection=512, epsilon=1e-5)
    assert VisionTransformer(**settings) == expected


def embedded(clip: Clip, tokens: Any) -> np.ndarray:
    return np.asarray(jax.jit(text_embeddings)(clip, np.asarray(tokens, np.int32)))


def test_embeddings_have_length_one_and_need_no_constants(tmp_path: Path) -> None:
    clip = load_clip(write_clip(tmp_path))
    images = np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype(np.float32)
    tokens = clip.tokenizer(["red circle", "", "blue blue blue blue blue blue blue blue"])
    assert tokens.tolist() == [[14, 3, 5, 15, 15, 15], [14, 15, 15, 15, 15, 15], [14, 4, 4, 4, 4, 15]]
    for found in (np.asarray(jax.jit(image_embeddings)(clip, images)), embedded(clip, tokens)):
        assert (found.shape, found.dtype) == ((3, 5), np.float32)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.abs(np.diff(embedded(clip, tokens), axis=0)).max(1).min() > 1e-3


def test_a_text_is_read_at_its_first_end(tmp_path: Path) -> None:
    clip = load_clip(write_clip(tmp_path, text={"eos_token_id": 13}, tokenizer=word_tokenizer(end_id=13)))
    first = embedded(clip, [[14, 3, 13, 13, 13, 13]])
    np.testing.assert_allclose(embedded(clip, [[14, 3, 13, 5, 15, 13]]), first, atol=1e-6)  # nothing behind it matters
    assert np.abs(embedded(clip, [[14, 3, 5, 13, 13, 13]]) - first).max() > 1e-3
    states: Any = TEXT.apply({"params": clip.text_params}, np.array([[14, 3, 13, 13, 13, 13]]))
    projected = np.asarray(states[0, 2]) @ clip.text_projection
    np.testing.assert_allclose(first[0], projected / np.linalg.norm(projected), atol=1e-6)


def test_an_old_configuration_means_the_largest_token(tmp_path: Path) -> None:
    old, new = (load_clip(write_clip(tmp_path / str(end), text={"eos_token_id": end})) for end in (2, END))
    tokens = [[14, 2, 5, 15, 15, 15]]  # token 2 is a word here
    np.testing.assert_array_equal(embedded(old, tokens), embedded(new, tokens))


def test_tokenizers_of_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its tokenizer ends texts without token 13"):
        load_clip(write_clip(tmp_path, text={"eos_token_id": 13}))
    large = word_tokenizer()
    large.add_tokens([f"word{i}" for i in range(11)])
    with pytest.raises(UserError, match="its tokenizer has 17 tokens, its table 16"):
        load_clip(write_clip(tmp_path, large))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer: it needs tokenizer.json, or vocab.json"):
        load_clip(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "siglip"}, "model_type='siglip' has no counterpart here"),
        ({"image": {"hidden_act": "relu"}}, "hidden_act='relu' makes no sense"),
        ({"image": {"num_channels": 1}}, "num_channels=1 has no counterpart here"),
        ({"image": {"image_size": 13}}, "13 px are not divisible into patches of 4"),
        ({"text": {"intermediate_size": 31}}, "intermediate_size=31"),
        ({"text": {"eos_token_id": [15]}}, r"eos_token_id=\[15\] makes no sense"),
        ({"vision_config": 3}, "does not say what it should"),
    ],
)
def test_other_clips_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_clip(write_clip(tmp_path, **config))
    assert "\n" not in str(error.value)


def test_all_tensors_of_clip_that_do_not_fit_are_listed_at_once(tmp_path: Path) -> None:
    write_clip(tmp_path)
    state = clip_state(random_like(clip_shapes()))
    for name in ("text_projection.weight", "vision_model.pre_layrnorm.bias"):
        del state[name]
    state |= {"text_model.final_layer_norm.bias": np.zeros(9, np.float32), "audio_projection.weight": np.zeros(3, np.float32)}
    write_folder(tmp_path, clip_config(), state)
    with pytest.raises(UserError) as error:
        load_clip(tmp_path)
    text = str(error.value)
    assert "(4 tensors)" in text
    missing = ("text_projection.weight is missing", "vision_model.pre_layrnorm.bias is missing")
    for part in (*missing, "text_model.final_layer_norm.bias is [9], not [8]", "audio_projection.weight is not expected"):
        assert part in text


def test_folders_without_a_configuration_are_refused(tmp_path: Path) -> None:
    for read in (load_clip, load_dino):
        write_clip(tmp_path)
        (tmp_path / "config.json").unlink()
        with pytest.raises(UserError, match=r"cannot read .*config.json"):
            read(tmp_path)
