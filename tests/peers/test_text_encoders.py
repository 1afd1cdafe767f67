"""CLIP, T5 and the paper's BERTEmbedder against transformers and diffusers: the same weights, all of them random, both ways."""

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from diffusers.pipelines.stable_diffusion.convert_from_ckpt import convert_ldm_bert_checkpoint
from safetensors.numpy import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from ldm_jax.interop import keymap
from ldm_jax.interop import text_encoders as te
from ldm_jax.model_directory import flatten, unflatten
from ldm_jax.nn.clip_text import CLIPText
from ldm_jax.nn.t5 import T5Encoder, relative_buckets
from ldm_jax.nn.text_encoder import TextTransformer

pytestmark = pytest.mark.peers

CLIP = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
CLIP |= {"max_position_embeddings": 9, "bos_token_id": 29, "eos_token_id": 30}
T5 = {"vocab_size": 31, "d_model": 24, "d_kv": 8, "num_heads": 4, "d_ff": 40, "num_layers": 3, "feed_forward_proj": "gated-gelu"}
T5 |= {"relative_attention_num_buckets": 16, "relative_attention_max_distance": 12}
BERT = {"vocab_size": 31, "d_model": 24, "encoder_ffn_dim": 96, "encoder_layers": 3, "encoder_attention_heads": 4, "head_dim": 8}
BERT |= {"max_position_embeddings": 9}
TOKENS = np.random.default_rng(0).integers(0, 31, (3, 9)).astype(np.int32)
LONG = np.random.default_rng(1).integers(0, 31, (3, 20)).astype(np.int32)
MASK = np.arange(20) < np.array([[20], [7], [1]])


def randomised(module: Any) -> Any:
    """The module with every parameter random: matrices keep the size of what they map, norm scales lie about 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            spread = value.shape[-1] ** -0.5 if value.ndim > 1 and "embed" not in name and "shared" not in name else 0.5
            value.copy_(torch.randn(value.shape) * spread + (value.ndim == 1 and "norm" in name and name.endswith("weight")))
    return module.eval()


def state_of(module: Any) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}


def abstract(network: Any) -> dict[str, Any]:
    return jax.eval_shape(network.init, jax.random.key(0), TOKENS)["params"]


def imported(network: Any, keys: keymap.KeyMap, state: dict[str, np.ndarray], ignored: Any = ()) -> dict[str, Any]:
    """Our parameters of their state dict, which must fit. What is written of them is the same again, tensor by tensor."""
    params = abstract(network)
    keymap.check(keys, params, {name: value.shape for name, value in state.items()}, "peer", ignored)
    leaves = dict(keymap.read(keys, state.__getitem__))
    for name, value in keymap.write(keys, leaves.__getitem__):
        np.testing.assert_array_equal(value, state[name])
    return unflatten(leaves)


def compare(network: Any, params: Any, peer: Any, table: Any, theirs: Callable[[], Any], tokens: np.ndarray, *mask: Any) -> None:
    """Outputs, and gradients of a random projection of them with respect to the table of tokens.

    Args:
      table: the peer's table of tokens.
      theirs: the peer's output.
    """
    weights = np.random.default_rng(2).normal(size=(*tokens.shape, network.width)).astype(np.float32)

    def peers(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        peer.to(dtype).zero_grad()
        y = theirs()
        (y * torch.from_numpy(weights)).sum().backward()
        gradient = table.weight.grad.numpy().copy()
        peer.to(torch.float32)
        return y.detach().numpy(), gradient

    def apply(p: Any) -> Any:
        y = network.apply({"params": p}, tokens, *mask)
        return (y * weights).sum(), y

    (_, found), gradients = jax.jit(jax.value_and_grad(apply, has_aux=True))(params)
    (expected, gradient), (exact, _) = peers(torch.float32), peers(torch.float64)
    tolerance = max(2e-5 * np.abs(expected).max(), 2 * np.abs(expected - exact).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(gradients["token_embedding"], gradient, rtol=0, atol=1e-4 * np.abs(gradient).max())


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("skip_last", [0, 1])
def test_clip_equals_transformers(activation: str, skip_last: int) -> None:
    peer = randomised(CLIPTextModel(CLIPTextConfig(**CLIP, hidden_act=activation)))
    settings = te.clip_from_hf(peer.config.to_dict())
    assert settings["activation"] == activation
    network = CLIPText(**settings | {"skip_last": skip_last})
    skipped = (r"encoder\.layers\.2\..*",) if skip_last else ()
    state = state_of(peer)
    params = imported(network, te.clip_map(abstract(network), names=state), state, skipped)

    def theirs() -> Any:
        out = peer(torch.from_numpy(TOKENS).long(), output_hidden_states=True)
        return peer.final_layer_norm(out.hidden_states[-2]) if skip_last else out.last_hidden_state

    compare(network, params, peer, peer.embeddings.token_embedding, theirs, TOKENS)


@pytest.mark.parametrize("masked", [False, True])
def test_t5_equals_transformers(masked: bool) -> None:
    peer = randomised(T5EncoderModel(T5Config(**T5)))
    network = T5Encoder(**te.t5_from_hf(peer.config.to_dict()))
    state = state_of(peer)
    params = imported(network, te.t5_map(abstract(network), names=state), state, te.T5_IGNORED)
    mask = torch.from_numpy(MASK.astype(np.int64)) if masked else None

    def theirs() -> Any:
        return peer(torch.from_numpy(LONG).long(), attention_mask=mask).last_hidden_state

    compare(network, params, peer, peer.shared, theirs, LONG, *([MASK] if masked else []))


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 12), (32, 512)])
def test_buckets_equal_transformers(num_buckets: int, max_distance: int) -> None:
    distances = np.arange(-2000, 2001)
    expected = T5Attention._relative_position_bucket(torch.from_numpy(distances), True, num_buckets, max_distance)
    np.testing.assert_array_equal(relative_buckets(distances, num_buckets, max_distance), expected.numpy())


def ldmbert() -> tuple[Any, TextTransformer, dict[str, Any]]:
    peer = randomised(LDMBertModel(LDMBertConfig(**BERT)))
    network = TextTransformer(**te.ldmbert_from_hf(peer.config.to_dict()))
    return peer, network, imported(network, te.ldmbert_map(abstract(network)), state_of(peer), te.LDMBERT_IGNORED)


def test_ldmbert_equals_diffusers() -> None:
    peer, network, params = ldmbert()
    compare(network, params, peer, peer.model.embed_tokens, lambda: peer(torch.from_numpy(TOKENS).long())[0], TOKENS)


def as_modules(tree: Any) -> Any:
    """Nested dicts as an object of attributes, or a list where the names are numbers; arrays as torch parameters."""
    if not isinstance(tree, dict):
        return torch.nn.Parameter(torch.from_numpy(np.array(tree)))
    parts = {name: as_modules(value) for name, value in tree.items()}
    if all(name.isdigit() for name in parts):
        return [parts.get(str(i)) for i in range(max(map(int, parts)) + 1)]
    return types.SimpleNamespace(**parts)


def test_compvis_bert_is_what_diffusers_converts_it_to() -> None:
    peer, _, params = ldmbert()
    leaves = flatten(params)
    compvis = dict(keymap.write(te.bert_map(params), leaves.__getitem__))
    compvis |= {f"transformer.to_logits.{name}": value for name, value in state_of(peer.to_logits).items()}
    tree = unflatten({name.replace(".", "/"): value for name, value in compvis.items()})
    converted = convert_ldm_bert_checkpoint(as_modules(tree), peer.config).state_dict()
    assert all(torch.equal(converted[name], value) for name, value in peer.state_dict().items())


def test_openclip_is_what_diffusers_converts_it_to() -> None:
    peer = randomised(CLIPTextModel(CLIPTextConfig(**CLIP, hidden_act="gelu")))
    network, prefix = CLIPText(**te.clip_from_hf(peer.config.to_dict())), "cond_stage_model."
    state = state_of(peer)
    params = imported(network, te.clip_map(abstract(network), names=state), state)
    checkpoint = dict(keymap.write(te.openclip_map(params, prefix), flatten(params).__getitem__))
    tensors = {name: torch.from_numpy(value.copy()) for name, value in checkpoint.items()}
    converted = convert_open_clip_checkpoint(peer, tensors, f"{prefix}model.")
    assert {name.removeprefix("text_model.") for name in converted} == peer.state_dict().keys()
    assert all(torch.equal(value, peer.state_dict()[name.removeprefix("text_model.")]) for name, value in converted.items())


class Format(NamedTuple):
    """A network in their files: a small one of theirs, our class, and what is between."""

    model: Callable[[], Any]
    ours: type
    from_hf: Callable[..., dict[str, Any]]
    to_hf: Callable[..., dict[str, Any]]
    reading: Callable[[Any, Any], keymap.KeyMap]
    writing: Callable[[Any], keymap.KeyMap]
    ignored: tuple[str, ...]


def read_clip(params: Any, names: Any) -> keymap.KeyMap:
    return te.clip_map(params, names=names)


def read_t5(params: Any, names: Any) -> keymap.KeyMap:
    return te.t5_map(params, names=names)


def read_ldmbert(params: Any, _: Any) -> keymap.KeyMap:
    return te.ldmbert_map(params)


FORMATS = {
    "clip": Format(
        lambda: CLIPTextModel(CLIPTextConfig(**CLIP)), CLIPText, te.clip_from_hf, te.clip_to_hf, read_clip, te.clip_map, te.CLIP_IGNORED
    ),
    "t5": Format(lambda: T5EncoderModel(T5Config(**T5)), T5Encoder, te.t5_from_hf, te.t5_to_hf, read_t5, te.t5_map, te.T5_IGNORED),
    "ldmbert": Format(
        lambda: LDMBertModel(LDMBertConfig(**BERT)),
        TextTransformer,
        te.ldmbert_from_hf,
        te.ldmbert_to_hf,
        read_ldmbert,
        te.ldmbert_map,
        te.LDMBERT_IGNORED,
    ),
}


def load(format_: Format, folder: Path) -> tuple[Any, dict[str, Any], dict[str, np.ndarray]]:
    """Our network and parameters of one of their folders, and what the folder holds."""
    state = load_file(folder / "model.safetensors")
    network = format_.ours(**format_.from_hf(json.loads((folder / "config.json").read_text())))
    return network, imported(network, format_.reading(abstract(network), state), state, format_.ignored), state


@pytest.mark.parametrize("kind", FORMATS)
def test_folders_pass_both_ways(kind: str, tmp_path: Path) -> None:
    """What they save we read; what we write, names and config.json, they load as the same network."""
    format_ = FORMATS[kind]
    peer = randomised(format_.model())
    peer.save_pretrained(tmp_path / "theirs")
    network, params, _ = load(format_, tmp_path / "theirs")
    leaves = flatten(params)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(format_.to_hf(network)))
    written = {name: np.ascontiguousarray(value) for name, value in keymap.write(format_.writing(params), leaves.__getitem__)}
    save_file(written, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    again = type(peer).from_pretrained(tmp_path / "ours")
    for name, value in peer.state_dict().items():
        assert name.startswith("to_logits") or torch.equal(again.state_dict()[name], value), name
    again.save_pretrained(tmp_path / "again")  # transformers 5 now keeps the longer names of CLIP
    for name, value in flatten(load(format_, tmp_path / "again")[1]).items():
        np.testing.assert_array_equal(value, leaves[name])


def test_the_text_encoders_of_whole_models_are_read(tmp_path: Path) -> None:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8, "patch_size": 8}
    clip = randomised(CLIPModel(CLIPConfig(text_config=CLIP, vision_config=vision, projection_dim=8)))
    t5 = randomised(T5ForConditionalGeneration(T5Config(**T5)))
    for kind, peer, table in (("clip", clip, clip.text_model.embeddings.token_embedding), ("t5", t5, t5.shared)):
        peer.save_pretrained(tmp_path / kind)
        _, params, state = load(FORMATS[kind], tmp_path / kind)
        assert len(state) > len(flatten(params))
        np.testing.assert_array_equal(params["token_embedding"], table.weight.detach().numpy())
