"""The UNet against diffusers' UNet2DConditionModel and UNet2DModel: the same random weights, both ways, outputs and gradients."""

import gc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from ldm_jax.config import UserError
from ldm_jax.interop.diffusers import as_saved, unet_config, unet_map, unet_settings
from ldm_jax.model_directory import flatten, unflatten
from ldm_jax.nn.unet import UNet
from tests.peers.models import (
    assert_gradient,
    assert_near,
    assert_same_network,
    compare,
    config_of,
    exported,
    imported,
    projection,
    randomised,
    state_of,
    to_numpy,
    to_torch,
)

pytestmark = pytest.mark.peers

Settings = dict[str, Any]


def blocks(attends: tuple[bool, ...], name: str, plain: str = "{}Block2D") -> Settings:
    """The classes of the blocks, `attends` being by level."""
    kinds = [f"{name}{{}}Block2D" if has else plain for has in attends]
    return {
        "down_block_types": tuple(kind.format("Down") for kind in kinds),
        "up_block_types": tuple(kind.format("Up") for kind in reversed(kinds)),
    }


SIZES: Settings = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 8}
CROSS = SIZES | {"block_out_channels": (32, 64), "cross_attention_dim": 24} | blocks((True, False), "CrossAttn")
PLAIN = SIZES | {"block_out_channels": (32, 64), "attention_head_dim": 16, "attn_norm_num_groups": 8} | blocks((False, True), "Attn")
CONDITIONAL: dict[str, Settings] = {
    "Stable Diffusion 1: heads are fixed": CROSS
    | {"block_out_channels": (32, 64, 64), "layers_per_block": 2, "norm_num_groups": 32, "attention_head_dim": 8}
    | blocks((True, True, False), "CrossAttn"),
    "the paper's text model: attention down to the middle": CROSS
    | {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": 4, "norm_num_groups": 32}
    | blocks((True, True, True, False), "CrossAttn"),
    "Stable Diffusion 2: heads by level, projections are matrices": CROSS
    | {"block_out_channels": (32, 64, 96), "attention_head_dim": (2, 4, 6), "use_linear_projection": True}
    | blocks((True, True, False), "CrossAttn"),
    "the paper's class model: one token, no attention at the top": CROSS
    | {"in_channels": 3, "out_channels": 3, "cross_attention_dim": 16}
    | {"block_out_channels": (32, 64, 96), "attention_head_dim": (1, 2, 3)}
    | blocks((False, True, True), "CrossAttn"),
    "several layers a transformer": CROSS | {"attention_head_dim": 4, "transformer_layers_per_block": 3},
    "inpainting: more channels in than out": CROSS | {"in_channels": 9, "attention_head_dim": 8},
    "scale and shift": CROSS | {"attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift"},
}
UNCONDITIONAL: dict[str, Settings] = {
    "the paper's faces: heads of one size": PLAIN
    | {"block_out_channels": (32, 64, 96), "layers_per_block": 2}
    | blocks((False, True, True), "Attn"),
    "super-resolution": PLAIN | {"in_channels": 6, "out_channels": 3},
    "one head": PLAIN | {"attention_head_dim": None} | blocks((True, True), "Attn"),
    "ADM: scale and shift": PLAIN | {"resnet_time_scale_shift": "scale_shift"},
    "ADM: residual blocks resample": PLAIN
    | {"downsample_type": "resnet", "upsample_type": "resnet", "block_out_channels": (32, 64, 64)}
    | {"resnet_time_scale_shift": "scale_shift"}
    | blocks((False, True, True), "Attn", "Resnet{}sampleBlock2D"),
}
CONFIGS = CONDITIONAL | UNCONDITIONAL
TIMES = np.array([0, 417])


def make(name: str) -> Any:
    return randomised((UNet2DConditionModel if name in CONDITIONAL else UNet2DModel)(**CONFIGS[name]))


def ours(config: Settings, **more: Any) -> tuple[UNet, Any]:
    """Our network of a config.json, and the shapes of its parameters."""
    network = UNet(**{name: value for name, value in (unet_settings(config) | more).items() if name != "kind"})
    network.check()
    x = jnp.zeros((1, 16, 16, config["in_channels"]))
    width = config.get("cross_attention_dim")
    context = jnp.zeros((1, 3, width)) if width else None
    vector = None if network.vector_layers else jnp.zeros((1, 4 * network.channels))
    return network, jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1), context, vector=vector)["params"]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_gradients_and_files_equal_diffusers(name: str, tmp_path: Path) -> None:
    peer = make(name)
    peer.save_pretrained(tmp_path / "theirs")
    config = config_of(tmp_path / "theirs")
    linear = config.get("use_linear_projection", False)
    network, shapes = ours(config)
    keys = unet_map(network, shapes, linear)
    params = imported(keys, shapes, state_of(peer))

    context_dim = config.get("cross_attention_dim")
    written = unet_config(network, config["in_channels"], context_dim, config["sample_size"], config["norm_num_groups"], linear)
    assert_same_network(type(peer).from_pretrained(exported(tmp_path / "ours", written, keys, params)), peer)

    x = normal(2, 16, 8, config["in_channels"])  # no square
    context = [normal(2, 1 if "one token" in name else 5, context_dim)] if context_dim else []

    def theirs(x: Any) -> Any:
        return peer(x, torch.from_numpy(TIMES), *(torch.from_numpy(c).to(x.dtype) for c in context)).sample

    compare(lambda p, x: network.apply({"params": p}, x, jnp.asarray(TIMES, jnp.float32), *context), params, peer, theirs, x)


def test_a_table_of_classes_joins_the_time() -> None:
    peer = randomised(UNet2DConditionModel(**CROSS, attention_head_dim=4, num_class_embeds=7))
    config = dict(peer.config)
    with pytest.raises(UserError, match="num_class_embeds=7"):
        unet_settings(config)
    network, shapes = ours(config | {"num_class_embeds": None}, vector_layers=0)
    params = imported(unet_map(network, shapes), shapes, state_of(peer), (r"class_embedding\.weight",))
    table, labels = state_of(peer)["class_embedding.weight"].copy(), np.array([6, 2])
    x, context = normal(2, 16, 8, 4), normal(2, 3, 24)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return network.apply({"params": params}, x, jnp.asarray(TIMES, jnp.float32), context, vector=jnp.asarray(table[labels]))

    def theirs(x: Any) -> Any:
        return peer(x, torch.from_numpy(TIMES), torch.from_numpy(context).to(x.dtype), torch.from_numpy(labels)).sample

    compare(apply, params, peer, theirs, x)


def test_old_names_of_attention_are_read() -> None:
    """As in the files of CompVis/ldm-celebahq-256, which are of 2022."""
    peer = make("super-resolution")
    network, shapes = ours({**peer.config, "_class_name": "UNet2DModel"})
    state = state_of(peer)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in state.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = value
    assert renamed.keys() != state.keys()
    keys = unet_map(network, shapes)
    again = imported(as_saved(keys, {name: value.shape for name, value in renamed.items()}), shapes, renamed)
    expected = flatten(imported(keys, shapes, state))
    for leaf, value in flatten(again).items():
        np.testing.assert_array_equal(value, expected[leaf])


def test_the_papers_text_model_at_its_size() -> None:
    """872 million parameters. Their network goes as ours comes: both together would take twice the memory."""
    widths = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 1280, "attention_head_dim": 8}
    sizes = SIZES | widths | {"sample_size": 32, "layers_per_block": 2, "norm_num_groups": 32}
    peer = randomised(UNet2DConditionModel(**sizes | blocks((True, True, True, False), "CrossAttn")))
    assert sum(value.numel() for value in peer.parameters()) == 872_300_484
    x, context = normal(1, 16, 16, 4), normal(1, 77, 1280)
    t = np.array([417])
    inputs = to_torch(x).requires_grad_()
    y = peer.requires_grad_(False)(inputs, torch.from_numpy(t), torch.from_numpy(context)).sample
    (y * to_torch(projection((1, 16, 16, 4)))).sum().backward()
    expected, expected_gradient = to_numpy(y), to_numpy(inputs.grad)

    network, shapes = ours(dict(peer.config))
    state = dict(peer.state_dict())
    del peer, y, inputs
    leaves = {}
    keys = unet_map(network, shapes)
    assert {t.name for t in keys} == state.keys()
    for tensor in keys:
        value = state.pop(tensor.name).numpy()
        leaves |= {leaf: jnp.array(part) for leaf, part in zip(tensor.leaves, tensor.layout.read(value), strict=True)}
    del value
    gc.collect()

    def projected(x: jax.Array, params: Any) -> tuple[jax.Array, jax.Array]:
        y = network.apply({"params": params}, x, jnp.asarray(t, jnp.float32), context)
        return (y * projection(y.shape)).sum(), y

    (_, found), gradient = jax.jit(jax.value_and_grad(projected, has_aux=True))(x, unflatten(leaves))
    assert_near(found, expected, expected)
    assert_gradient(gradient, expected_gradient)
