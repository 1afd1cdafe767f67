"""Readers of the networks that evaluation measures images with: DINOv2 as facebook and as transformers keep it, and transformers' CLIP."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError
from ldm_jax.interop import fields, keymap, text_encoders
from ldm_jax.interop.dit import patches
from ldm_jax.interop.fields import read_json, understood
from ldm_jax.interop.keymap import LINEAR, KeyMap, Layout, Rule, fused, key_map, under
from ldm_jax.interop.safetensors_file import Weights, open_weights
from ldm_jax.model_directory import Params, unflatten
from ldm_jax.nn.clip_text import ACTIVATIONS, CLIPText
from ldm_jax.nn.layers import Array
from ldm_jax.nn.vision_transformer import SWIGLU, VisionTransformer, cubic

# DINOv2's positions were learnt at 518 px, 37 x 37 patches, and are interpolated for smaller images. The code that torch.hub loads asks
# for a tenth of a patch more than there are, which moves every place a little; transformers does not. What was published as FD-DINOv2
# (Stein et al. 2023, arXiv 2306.04675; Karras et al. 2024, arXiv 2312.02696) was measured through torch.hub, which is followed here.
HUB_OFFSET = 0.1
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there
_TOKENIZERS = ("tokenizer.json", "vocab.json")
_OLD_END = 2  # what old configurations of CLIP say, whatever the tokenizer's end is

_LAYER = r"layer_(?P<i>\d+)_"
_QKV = "attn/(?P<part>[qkv])"
_ROW = Layout(lambda a: (a[0, 0],), lambda a: a[None, None])  # [1,1,C]
_TABLE = Layout(lambda a: (a[0],), lambda a: a[None])  # [1,N,C]
_PARTS = {"q": "query", "k": "key", "v": "value"}
# Tensors of DINOv2 that no feature depends on: what masked patches are replaced by in training.
_DINO_IGNORED = (r"(embeddings\.)?mask_token",)
_CLIP_IGNORED = (r"(text|vision)_model\.embeddings\.position_ids", "logit_scale")


def _hub_rules(network: VisionTransformer) -> tuple[Rule, ...]:
    """Facebook's names."""
    block, gated = r"blocks.\g<i>", network.activation == SWIGLU
    return (
        Rule("class_embedding", "cls_token", _ROW),
        Rule("position_embedding", "pos_embed", _TABLE),
        Rule("patches", "patch_embed.proj", patches(network.patch_size)),
        Rule(rf"{_LAYER}norm(?P<n>[12])", rf"{block}.norm\g<n>"),
        Rule(_LAYER + _QKV, f"{block}.attn.qkv", fused(1), ("q", "k", "v")),
        Rule(rf"{_LAYER}attn/out", f"{block}.attn.proj", LINEAR),
        Rule(rf"{_LAYER}scale(?P<n>[12])", rf"{block}.ls\g<n>.gamma"),
        Rule(rf"{_LAYER}ff_in", f"{block}.mlp.{'w12' if gated else 'fc1'}", LINEAR),
        Rule(rf"{_LAYER}ff_out", f"{block}.mlp.{'w3' if gated else 'fc2'}", LINEAR),
        Rule("final_norm", "norm"),
    )


def _dino_rules(network: VisionTransformer) -> tuple[Rule, ...]:
    """Names of transformers' Dinov2Model."""
    block, gated = r"encoder.layer.\g<i>", network.activation == SWIGLU
    return (
        Rule("class_embedding", "embeddings.cls_token", _ROW),
        Rule("position_embedding", "embeddings.position_embeddings", _TABLE),
        Rule("patches", "embeddings.patch_embeddings.projection", patches(network.patch_size)),
        Rule(rf"{_LAYER}norm(?P<n>[12])", rf"{block}.norm\g<n>"),
        Rule(_LAYER + _QKV, lambda m: f"encoder.layer.{m['i']}.attention.attention.{_PARTS[m['part']]}", LINEAR),
        Rule(rf"{_LAYER}attn/out", f"{block}.attention.output.dense", LINEAR),
        Rule(rf"{_LAYER}scale(?P<n>[12])", rf"{block}.layer_scale\g<n>.lambda1"),
        Rule(rf"{_LAYER}ff_in", f"{block}.mlp.{'weights_in' if gated else 'fc1'}", LINEAR),
        Rule(rf"{_LAYER}ff_out", f"{block}.mlp.{'weights_out' if gated else 'fc2'}", LINEAR),
        Rule("final_norm", "layernorm"),
    )


def _clip_image_map(network: VisionTransformer, params: Mapping[str, Any]) -> KeyMap:
    """Names of the image tower in transformers' CLIPModel, whose layers are called as those of the text tower."""
    rules = (
        Rule("class_embedding", "vision_model.embeddings.class_embedding"),
        Rule("position_embedding", "vision_model.embeddings.position_embedding.weight"),
        Rule("patches", "vision_model.embeddings.patch_embedding", patches(network.patch_size)),
        Rule("pre_norm", "vision_model.pre_layrnorm"),  # as it is spelled there
        Rule("final_norm", "vision_model.post_layernorm"),
        Rule("projection", "visual_projection", LINEAR),
    )
    layers = {name: value for name, value in params.items() if name.startswith("layer_")}
    rest = {name: value for name, value in params.items() if name not in layers}
    return key_map(rest, rules) + text_encoders.clip_map(layers, "vision_model.", names=["vision_model."])


def load_dino(path: str | Path, size: int = 224, offset: float = HUB_OFFSET) -> tuple[VisionTransformer, Params, str]:
    """DINOv2 without registers: the network for images of `size` px, its parameters (float32, numpy) and the weight file's SHA-256 in hex.

    Args:
      path: a file of facebook's, such as `dinov2_vitl14_pretrain.pth`, or a folder of transformers (config.json with model.safetensors or
        pytorch_model.bin).
      size: pixels, a multiple of the patches' 14.
      offset: see `interpolate_positions`; 0 gives the features of transformers, the default those of torch.hub.

    Raises UserError: for what is missing or damaged, for other networks, and with one list of all tensors that do not fit.
    """
    file = _weight_file(Path(path))
    weights = open_weights(file)
    with understood(path):
        hub = not Path(path).is_dir()
        network = VisionTransformer(**(_hub_settings(file, weights) if hub else _dino_settings(read_json(Path(path) / "config.json"))))
        network.check()
        network.clone(image_size=size).check()
        shapes = _shapes(network)
    keys = key_map(shapes, (_hub_rules if hub else _dino_rules)(network))
    params = _read(keys, shapes, weights, file, _DINO_IGNORED)
    network = network.clone(image_size=size)
    params["position_embedding"] = interpolate_positions(params["position_embedding"], network.grid, offset)
    return network, params, sha256(file)


def interpolate_positions(table: np.ndarray, grid: int, offset: float = HUB_OFFSET) -> np.ndarray:
    """A table of positions [1+n*n,C], the class token's first, for `grid` places on a side instead of n: float32 [1+grid*grid,C].

    As torch's bicubic interpolation: a = -3/4, no antialiasing, and beyond the edge the values at the edge. Place i is at
    (i + 1/2) n / (grid + offset) - 1/2. Where the sizes are the same nothing is computed.
    """
    before = math.isqrt(len(table) - 1)
    if grid == before:
        return table
    centres = (np.arange(grid) + 0.5) * (before / (grid + offset)) - 0.5
    weights = np.zeros((grid, before))
    for tap in range(-1, 3):
        place = np.floor(centres).astype(int) + tap
        np.add.at(weights, (np.arange(grid), place.clip(0, before - 1)), cubic(centres - place, -0.75))
    places = table[1:].reshape(before, before, -1)
    moved = np.einsum("ai,bj,ijc->abc", weights, weights, places.astype(np.float64), optimize=True)
    return np.concatenate([table[:1], moved.reshape(grid * grid, -1)]).astype(np.float32)


@flax.struct.dataclass
class Clip:
    """CLIP's two towers: a tree of its parameters (float32), so that it can be an argument of compiled functions.

    Attributes:
      image_network, text_network: of `image_params` and `text_params`; the image tower with its projection.
      text_projection: [text width, projection].
      end_token: where a text's vector is read: at the first such token, or at the largest one where this is 2.
      tokenizer: texts to ids int32 [N, text_network.max_length].
      sha256: of the weight file, hex.
    """

    image_params: Params
    text_params: Params
    text_projection: Array
    image_network: VisionTransformer = flax.struct.field(pytree_node=False)
    text_network: CLIPText = flax.struct.field(pytree_node=False)
    end_token: int = flax.struct.field(pytree_node=False)
    tokenizer: Tokenizer = flax.struct.field(pytree_node=False)
    sha256: str = flax.struct.field(pytree_node=False)


def load_clip(path: str | Path) -> Clip:
    """A folder of transformers' CLIPModel: config.json, model.safetensors or pytorch_model.bin, and the tokenizer's files.

    Raises UserError: for what is missing or damaged, for other networks, and with one list of all tensors that do not fit.
    """
    folder = Path(path)
    config = read_json(folder / "config.json")
    file = _weight_file(folder)
    weights = open_weights(file)
    with understood(folder):
        image = VisionTransformer(**_clip_image_settings(config))
        image.check()
        about = _pick(config.get("text_config") or {}, "CLIPModel / text_config", {}, _CLIP_TEXT)
        text = CLIPText(**text_encoders.clip_from_hf(about))
        shapes: dict[str, Any] = {
            "image": _shapes(image),
            "text": jax.eval_shape(text.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"],
            "text_projection": jax.ShapeDtypeStruct((text.width, image.projection), jnp.float32),
        }
    keys = under("image", _clip_image_map(image, shapes["image"])) + under("text", text_encoders.clip_map(shapes["text"]))
    keys += key_map({"text_projection": shapes["text_projection"]}, [Rule("text_projection", "text_projection.weight", LINEAR)])
    params = _read(keys, shapes, weights, file, _CLIP_IGNORED)
    tokenizer = _tokenizer(folder, text, about["eos_token_id"])
    return Clip(params["image"], params["text"], params["text_projection"], image, text, about["eos_token_id"], tokenizer, sha256(file))


def image_embeddings(clip: Clip, images: Array) -> Array:
    """Unit vectors [N,projection] of normalised images [N,S,S,3] (`preprocess` with CLIP's constants)."""
    features: Any = clip.image_network.apply({"params": clip.image_params}, images)
    return _unit(features)


def text_embeddings(clip: Clip, tokens: Array) -> Array:
    """Unit vectors [N,projection] of token ids int32 [N,L] as `clip.tokenizer` gives them: the states at their ends, projected.

    The CLIP score (Hessel et al. 2021, equation 1, without its 2.5) is 100 max(0, cosine) of a text's vector and an image's.
    """
    states: Any = clip.text_network.apply({"params": clip.text_params}, tokens)
    ends = jnp.argmax(tokens if clip.end_token == _OLD_END else tokens == clip.end_token, axis=1)
    return _unit(states[jnp.arange(len(tokens)), ends] @ jnp.asarray(clip.text_projection, states.dtype))


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _weight_file(path: Path) -> Path:
    """The file itself, or that in a folder of transformers. Raises UserError."""
    if not path.is_dir():
        return path
    if found := [path / name for name in _WEIGHTS if (path / name).is_file()]:
        return found[0]
    raise UserError(f"{path} holds no weights: it needs one of {', '.join(_WEIGHTS)}")


def sha256(path: Path) -> str:
    """Of a file, hex. Raises UserError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the weights {path}: {error.strerror or error}") from error


def _shapes(network: VisionTransformer) -> Params:
    side = network.image_size
    return jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]


def _read(keys: KeyMap, shapes: Params, weights: Weights, file: Path, ignored: Sequence[str]) -> Params:
    """The parameters of a file, float32. Raises UserError with one list of all tensors that do not fit."""
    keymap.check(keys, shapes, weights.shapes(), str(file), ignored)
    return unflatten({leaf: np.ascontiguousarray(array, np.float32) for leaf, array in keymap.read(keys, weights.__getitem__)})


def _tokenizer(folder: Path, network: CLIPText, end: int) -> Tokenizer:
    """Raises UserError, also for ids that the network has no row for and texts without the end at which their vector is read."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):  # transformers would make an empty one
        raise UserError(f"{folder} holds no tokenizer: it needs {', or '.join(_TOKENIZERS)} with merges.txt")
    tokenizer = Tokenizer.pretrained(str(folder), network.max_length)
    if tokenizer.vocab_size > network.vocab_size:
        raise UserError(f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, its table {network.vocab_size}")
    if end != _OLD_END and not (tokenizer(["", "a " * network.max_length]) == end).any(axis=1).all():
        raise UserError(f"{folder}: its tokenizer ends texts without token {end}, which its config.json names as eos_token_id")
    return tokenizer


def _hub_settings(file: Path, weights: Weights) -> dict[str, Any]:
    """Settings of `VisionTransformer` from the shapes of facebook's tensors; its heads have 64 channels at every size. Raises UserError."""
    shapes = weights.shapes()
    wanted = {"pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.norm1.weight": 1}
    if missing := [name for name, rank in wanted.items() if len(shapes.get(name, ())) != rank]:
        raise UserError(f"{file} is no DINOv2 under facebook's names, for it has no {', '.join(missing)}; of transformers give the folder")
    if "register_tokens" in shapes:
        raise UserError(f"{file} is a DINOv2 with registers: features are measured with the one without")
    _, positions, width = shapes["pos_embed"]
    patch = shapes["patch_embed.proj.weight"][-1]
    gated = "blocks.0.mlp.w3.weight" in shapes
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return _DINO_FIELDS | {
        "image_size": math.isqrt(positions - 1) * patch,
        "patch_size": patch,
        "width": width,
        "depth": len(blocks),
        "num_heads": width // 64,
        "hidden": _swiglu_hidden(4 * width) if gated else 4 * width,
        "activation": SWIGLU if gated else "gelu",
    }


def _swiglu_hidden(hidden: int) -> int:
    """Two thirds, in eights: with a gate, this many have about as many parameters (Shazeer 2020, section 2)."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


_DINO_FIELDS: dict[str, Any] = {"layer_scale": True, "epsilon": 1e-6}
_CLIP_FIELDS: dict[str, Any] = {"pre_norm": True, "patch_bias": False}


def _square(value: Any) -> bool:
    """One count, or two that agree."""
    return fields.count(value) or (fields.counts(value) and len({*value}) == 1)


def _side(value: Any) -> int:
    return value if isinstance(value, int) else value[0]


def _one_of(*words: str) -> fields.Check:
    return lambda value: value in words


# Fields of config.json that settings follow from: what they may be, and what transformers takes them for where they are left out.
_About = Mapping[str, tuple[Callable[[Any], bool], Any]]
_SIZES: _About = {"num_hidden_layers": (fields.layers, 12), "num_attention_heads": (fields.count, 12)}
_DINO: _About = {
    **_SIZES,
    "hidden_size": (fields.count, 768),
    "mlp_ratio": (fields.positive, 4),
    "image_size": (_square, 224),
    "patch_size": (_square, 14),
    "hidden_act": (_one_of("gelu"), "gelu"),
    "layer_norm_eps": (fields.positive, 1e-6),
    "use_swiglu_ffn": (fields.flag, False),
}
_CLIP_IMAGE: _About = {
    **_SIZES,
    "hidden_size": (fields.count, 768),
    "intermediate_size": (fields.count, 3072),
    "image_size": (_square, 224),
    "patch_size": (_square, 32),
    "hidden_act": (_one_of(*ACTIVATIONS), "quick_gelu"),
    "layer_norm_eps": (fields.positive, 1e-5),
}
_CLIP_TEXT: _About = {
    "num_hidden_layers": (fields.layers, 12),
    "num_attention_heads": (fields.count, 8),
    "hidden_size": (fields.count, 512),
    "intermediate_size": (fields.count, 2048),
    "vocab_size": (fields.count, 49408),
    "max_position_embeddings": (fields.count, 77),
    "hidden_act": (_one_of(*ACTIVATIONS), "quick_gelu"),
    "layer_norm_eps": (fields.positive, 1e-5),
    "eos_token_id": (fields.count, 49407),
}


def _pick(config: Mapping[str, Any], what: str, must: Mapping[str, Any], about: _About) -> dict[str, Any]:
    """The fields that are known, or what stands for them. Raises UserError; what else there is is of training or of other classes."""
    found = {name: config[name] for name in (*must, *about) if name in config}
    fields.account(found, what, must, {name: check for name, (check, _) in about.items()})
    return {name: default for name, (_, default) in about.items()} | found


def _dino_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    found = _pick(config, "Dinov2Model", {"model_type": "dinov2", "qkv_bias": True, "num_channels": 3}, _DINO)
    hidden, gated = int(found["hidden_size"] * found["mlp_ratio"]), found["use_swiglu_ffn"]
    return _DINO_FIELDS | {
        **_common(found),
        "hidden": _swiglu_hidden(hidden) if gated else hidden,
        "activation": SWIGLU if gated else "gelu",
    }


def _clip_image_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    whole = _pick(config, "CLIPModel", {"model_type": "clip"}, {"projection_dim": (fields.count, 512)})
    found = _pick(config.get("vision_config") or {}, "CLIPModel / vision_config", {"num_channels": 3}, _CLIP_IMAGE)
    return _CLIP_FIELDS | {
        **_common(found),
        "hidden": found["intermediate_size"],
        "activation": found["hidden_act"],
        "projection": whole["projection_dim"],
    }


def _common(found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image_size": _side(found["image_size"]),
        "patch_size": _side(found["patch_size"]),
        "width": found["hidden_size"],
        "depth": found["num_hidden_layers"],
        "num_heads": found["num_attention_heads"],
        "epsilon": found["layer_norm_eps"],
    }
