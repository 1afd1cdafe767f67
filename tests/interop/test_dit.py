"""Key maps of DiT: every published name and shape, what a tensor means, exact round trips, and what is refused."""

import ast
import gzip
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.interop import keymap
from ldm_jax.interop.dit import diffusers_map, dit_config, dit_settings
from ldm_jax.model_directory import flatten, unflatten
from ldm_jax.nn.dit import SIZES, DiT

KEYS = Path(__file__).parent / "keys" / "diffusers_dit_xl2.txt.gz"
SMALL = DiT(3, width=8, depth=2, num_heads=2, learn_sigma=True, legacy_frequencies=True)


@cache
def published() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config.json of diffusers' DiT-XL/2 and the shape of each tensor."""
    _, config, *lines = gzip.decompress(KEYS.read_bytes()).decode().splitlines()
    return json.loads(config), {name: ast.literal_eval(shape) for name, shape, _ in (line.split("\t") for line in lines)}


def abstract(network: DiT, channels: int, classes: int) -> dict[str, Any]:
    """Shapes of the parameters that a map is of."""
    x, vector = np.zeros((1, 8, 8, channels), np.float32), np.zeros((1, network.width), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, np.zeros(1, np.float32), vector=vector)["params"]
    return {"denoiser": shapes, "label": {"embedding": jax.ShapeDtypeStruct((classes + 1, network.width), np.float32)}}


@cache
def random_leaves() -> Mapping[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in flatten(abstract(SMALL, 3, 5)).items()}


def written() -> dict[str, np.ndarray]:
    leaves = random_leaves()
    return dict(keymap.write(diffusers_map(SMALL, unflatten(leaves)), leaves.__getitem__))


def fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "kind"}


def test_every_published_tensor_of_diffusers_dit_xl2_has_its_name_and_shape() -> None:
    config, theirs = published()
    settings = dit_settings(config)
    assert settings["kind"] == "dit"
    network = DiT(**fields(settings))
    network.check()
    assert {name: getattr(network, name) for name in SIZES["XL"]} == SIZES["XL"]
    params = abstract(network, config["in_channels"], config["num_embeds_ada_norm"])
    keys = diffusers_map(network, params)
    assert keymap.their_shapes(keys, flatten(params)) == theirs
    assert {leaf for t in keys for leaf in t.leaves} == set(flatten(params))
    said = dit_config(network, 4, 1000, 32)
    assert said.pop("_class_name") == "DiTTransformer2DModel"
    assert said.items() <= config.items()


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_what_is_written_is_read_again_exactly(prefix: str) -> None:
    leaves = random_leaves()
    keys = diffusers_map(SMALL, unflatten(leaves), prefix)
    theirs = dict(keymap.write(keys, leaves.__getitem__))
    assert all(name.startswith(prefix) for name in theirs)
    again = list(keymap.read(keys, theirs.__getitem__))
    assert sorted(name for name, _ in again) == sorted(leaves)
    for name, value in again:
        np.testing.assert_array_equal(value, leaves[name])


def test_a_patch_embedding_is_the_strided_convolution_that_is_written() -> None:
    params, x = unflatten(random_leaves())["denoiser"], np.random.default_rng(1).normal(size=(2, 4, 6, 3)).astype(np.float32)
    kwargs = {"capture_intermediates": lambda module, _: module.name == "x_embed", "mutable": ["intermediates"]}
    _, state = SMALL.apply({"params": params}, x, np.zeros(2, np.float32), **kwargs)
    theirs = written()
    kernel, bias = theirs["pos_embed.proj.weight"], theirs["pos_embed.proj.bias"]
    expected = jax.lax.conv_general_dilated(x.transpose(0, 3, 1, 2), kernel, (2, 2), "VALID") + bias[:, None, None]
    (found,) = state["intermediates"]["x_embed"]["__call__"]
    np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize("part", ["timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight"])
def test_blocks_with_embedders_of_their_own_are_refused(part: str) -> None:
    theirs = written()
    name = f"transformer_blocks.1.norm1.emb.{part}"
    theirs[name] = theirs[name] + 1
    keys = diffusers_map(SMALL, unflatten(random_leaves()))
    with pytest.raises(UserError, match=rf"{name} differs from transformer_blocks.0.norm1.emb.{part}"):
        dict(keymap.read(keys, theirs.__getitem__))


def test_parameters_that_a_format_has_no_name_for_are_errors() -> None:
    network = DiT(3, width=8, depth=1, num_heads=2, qk_norm=True)
    with pytest.raises(ValueError, match="denoiser/block_0/attn/k_norm/scale has no counterpart there"):
        diffusers_map(network, abstract(network, 3, 5))


def test_configurations_come_back() -> None:
    config = dit_config(SMALL, 3, 5, 16)
    assert DiT(**fields(dit_settings(config))) == SMALL.clone(mlp_epsilon=config["norm_eps"])
    assert dit_settings(config | {"out_channels": None})["learn_sigma"] is False
    older = {name: value for name, value in config.items() if name != "norm_eps"}
    assert dit_settings(older)["mlp_epsilon"] == 1e-5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"norm_type": "layer_norm", "attention_bias": False}, "attention_bias=False, norm_type='layer_norm' has no counterpart here"),
        ({"out_channels": 7}, "out_channels=7 for in_channels=3 has no counterpart here"),
        ({"cross_attention_dim": 64}, "cross_attention_dim=64 has no counterpart here"),
    ],
)
def test_configurations_of_other_networks_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dit_settings(dit_config(SMALL, 3, 5, 16) | changed)


def test_a_configuration_that_says_too_little_is_refused() -> None:
    config = dit_config(SMALL, 3, 5, 16)
    with pytest.raises(UserError, match="does not say num_layers, patch_size"):
        dit_settings({name: value for name, value in config.items() if name not in ("num_layers", "patch_size")})


def test_networks_that_diffusers_cannot_express_are_refused_with_all_reasons() -> None:
    network = DiT(4, cross_attention=True, qk_norm=True, mlp_ratio=2.0)
    with pytest.raises(UserError) as raised:
        dit_config(network, 7, 1000, 32)
    for reason in ("legacy_frequencies is off", "cross-attention", "queries and keys", "mlp_ratio is 2.0", "concatenated"):
        assert reason in str(raised.value)
