"""DINOv2 and CLIP against transformers, and the resizing before them against torch: the same weights, all of them random."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.numpy import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model, PreTrainedTokenizerFast

from ldm_jax.interop.vision import Clip, image_embeddings, interpolate_positions, load_clip, load_dino, text_embeddings
from ldm_jax.nn.vision_transformer import CLIP_MEAN, CLIP_STD, preprocess

pytestmark = pytest.mark.peers

# Heads of 64 channels, as facebook's files mean them, and positions of a larger grid than that of the images.
DINO: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
TEXT: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"max_position_embeddings": 9, "bos_token_id": 30}
VISION: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
VISION |= {"image_size": 28, "patch_size": 7}
WORDS = ["red", "blue", "circle", "square", "a", "on"]
CAPTIONS = ["a red circle", "blue", "", "a blue square on a red square on a red circle on a blue one"]


def randomised(module: Any) -> Any:
    """The module with every parameter random: matrices keep the size of what they map, scales lie about 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.ndim:  # not the logits' scale
                matrix = value.ndim > 1 and "embeddings." not in name
                spread = value[0].numel() ** -0.5 if matrix or "patch_embedding" in name else 0.5
                scale = "lambda" in name or ("norm" in name and name.endswith("weight"))
                value.copy_(torch.randn(value.shape) * spread + scale)
    return module.eval()


def images(size: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(3, size, size, 3)).astype(np.float32)


def to_torch(array: np.ndarray) -> Any:
    return torch.from_numpy(array.transpose(0, 3, 1, 2).copy())


def features(network: Any, params: Any, pictures: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, x: network.apply({"params": p}, x))(params, pictures))


def assert_close(found: Any, expected: Any) -> None:
    """To 1e-5 of the size of what is expected."""
    assert np.linalg.norm(np.asarray(found) - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [42, 70, 98])
def test_dino_equals_transformers(gated: bool, size: int, tmp_path: Path) -> None:
    peer = randomised(Dinov2Model(Dinov2Config(**DINO, use_swiglu_ffn=gated)))
    peer.save_pretrained(tmp_path)
    network, params, digest = load_dino(tmp_path, size=size, offset=0)
    assert (network.image_size, network.grid, network.layer_scale) == (size, size // 14, True)
    assert digest == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    expected = peer(to_torch(images(size))).last_hidden_state[:, 0].detach().numpy()
    assert_close(features(network, params, images(size)), expected)


def hub_names(state: dict[str, np.ndarray]) -> dict[str, Any]:
    """What transformers saves, as facebook's code has it."""
    names = {"attention.output.dense": "attn.proj", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma"}
    names |= {"encoder.layer.": "blocks.", "patch_embeddings.projection": "patch_embed.proj", "position_embeddings": "pos_embed"}
    names |= {"embeddings.": "", "layernorm": "norm", "weights_in": "w12", "weights_out": "w3", "attention.attention": "attn"}
    renamed = {}
    for name, value in state.items():
        for theirs, hubs in names.items():
            name = name.replace(theirs, hubs)
        renamed[name] = torch.from_numpy(value)
    for query in [name for name in renamed if ".query." in name]:
        parts = [renamed.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        renamed[query.replace("query", "qkv")] = torch.cat(parts)
    return renamed


@pytest.mark.parametrize("gated", [False, True])
def test_dino_of_torch_hub_is_the_same(gated: bool, tmp_path: Path) -> None:
    peer = randomised(Dinov2Model(Dinov2Config(**DINO, use_swiglu_ffn=gated)))
    peer.save_pretrained(tmp_path)
    file = tmp_path / "dinov2_vitl14_pretrain.pth"
    torch.save(hub_names(load_file(tmp_path / "model.safetensors")), file)
    network, params, digest = load_dino(file, size=42, offset=0)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    same, others, _ = load_dino(tmp_path, size=42, offset=0)
    assert network == same
    jax.tree.map(np.testing.assert_array_equal, params, others)
    expected = peer(to_torch(images(42))).last_hidden_state[:, 0].detach().numpy()
    assert_close(features(network, params, images(42)), expected)


@pytest.mark.parametrize(("before", "after"), [(37, 16), (5, 3), (5, 9), (4, 4)])
@pytest.mark.parametrize("offset", [0.1, 0.0])
def test_positions_are_interpolated_as_by_torch(before: int, after: int, offset: float) -> None:
    """With facebook's offset a factor is given, in `transformers` the size."""
    table = np.random.default_rng(0).normal(size=(1 + before**2, 6)).astype(np.float32)
    if before == after:
        np.testing.assert_array_equal(interpolate_positions(table, after, offset), table)
        return
    how: dict[str, Any] = {"scale_factor": ((after + offset) / before,) * 2} if offset else {"size": (after, after)}
    square = torch.from_numpy(table[1:].reshape(1, before, before, 6).transpose(0, 3, 1, 2).copy())
    moved = torch.nn.functional.interpolate(square, mode="bicubic", **how)[0].numpy().transpose(1, 2, 0)
    assert moved.shape == (after, after, 6)
    expected = np.concatenate([table[:1], moved.reshape(-1, 6)])
    found = interpolate_positions(table, after, offset)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)


def word_tokenizer(end: int) -> PreTrainedTokenizerFast:
    """Words as tokens, begin 30, `end`, and the end as padding, as CLIP has it."""
    vocabulary = {word: i + 3 for i, word in enumerate(WORDS)} | {"[UNK]": 2, "<begin>": 30, "<end>": end}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 30), ("<end>", end)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<end>", eos_token="<end>", bos_token="<begin>", unk_token="[UNK]")


def clip_folder(folder: Path, activation: str, end: int, named: int) -> tuple[Any, Any, Clip]:
    """transformers' network and tokenizer, whose end is `end` and `named` in the configuration, and what we read of their files."""
    text, vision = TEXT | {"hidden_act": activation, "eos_token_id": named}, VISION | {"hidden_act": activation}
    peer = randomised(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)))
    peer.save_pretrained(folder)
    fast = word_tokenizer(end)
    fast.save_pretrained(folder)
    return peer, fast, load_clip(folder)


@pytest.mark.parametrize(
    ("activation", "end", "named"),
    [("quick_gelu", 31, 31), ("gelu", 1, 1), ("quick_gelu", 31, 2)],
    ids=["quick", "end-not-largest", "old-configuration"],
)
def test_clip_equals_transformers(activation: str, end: int, named: int, tmp_path: Path) -> None:
    peer, fast, clip = clip_folder(tmp_path, activation, end, named)
    theirs = fast(CAPTIONS, padding="max_length", truncation=True, max_length=9, return_tensors="pt")["input_ids"]
    tokens = clip.tokenizer(CAPTIONS)
    np.testing.assert_array_equal(tokens, theirs.numpy())
    pictures = images(28)
    with torch.no_grad():
        out = peer(input_ids=theirs, pixel_values=to_torch(pictures))
        cosines = (out.logits_per_image / peer.logit_scale.exp()).numpy()
    image, text = jax.jit(image_embeddings)(clip, pictures), jax.jit(text_embeddings)(clip, tokens)
    assert_close(image, out.image_embeds.numpy())
    assert_close(text, out.text_embeds.numpy())
    assert_close(100 * np.maximum(np.asarray(image) @ np.asarray(text).T, 0), 100 * np.maximum(cosines, 0))
    assert clip.sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


def test_clip_in_a_torch_file_is_the_same(tmp_path: Path) -> None:
    peer, _, clip = clip_folder(tmp_path, "gelu", 31, 31)
    (tmp_path / "model.safetensors").unlink()
    ids = {f"{tower}_model.embeddings.position_ids": torch.arange(9)[None] for tower in ("text", "vision")}  # old files hold these
    torch.save(peer.state_dict() | ids, tmp_path / "pytorch_model.bin")
    again = load_clip(tmp_path)
    assert again.sha256 != clip.sha256
    for ours, same in zip(jax.tree.leaves(clip), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(ours, same)


@pytest.mark.parametrize("shape", [(64, 48), (100, 40), (17, 33), (28, 28), (500, 375)])
def test_images_are_resized_as_by_torch(shape: tuple[int, int]) -> None:
    """torch's antialiased bicubic interpolation in float64, and the centre as transformers cuts it out."""
    pictures = np.random.default_rng(0).integers(0, 256, (2, *shape, 3)).astype(np.uint8)
    height, width = (28 * side // min(shape) for side in shape)
    x = torch.nn.functional.interpolate(to_torch(pictures).double(), size=(height, width), mode="bicubic", antialias=True)
    top, left = (height - 28) // 2, (width - 28) // 2
    x = x[:, :, top : top + 28, left : left + 28].numpy().transpose(0, 2, 3, 1).clip(0, 255)
    found = np.asarray(jax.jit(preprocess, static_argnums=(1, 2, 3))(pictures, 28, CLIP_MEAN, CLIP_STD))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (x / 255 - CLIP_MEAN) / CLIP_STD, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(64, 48), (33, 51)])
def test_preprocessing_is_transformers_up_to_its_rounding(shape: tuple[int, int]) -> None:
    """Theirs rounds to whole grey levels after each axis, and cuts off there: more than a level only where pictures touch the limits."""
    pictures = np.random.default_rng(0).integers(64, 192, (2, *shape, 3)).astype(np.uint8)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = processor(list(pictures), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    levels = (np.asarray(preprocess(pictures, 28, CLIP_MEAN, CLIP_STD)) - expected) * CLIP_STD * 255
    assert np.abs(levels).max() < 1.3
    assert np.abs(levels.mean()) < 0.05
