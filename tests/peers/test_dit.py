"""DiT against diffusers' DiTTransformer2DModel: the same weights, all of them random, give the same outputs and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel

from ldm_jax.interop import keymap
from ldm_jax.interop.dit import diffusers_map, dit_config, dit_settings
from ldm_jax.model_directory import flatten, unflatten
from ldm_jax.nn.dit import DiT

pytestmark = pytest.mark.peers

CLASSES = 7
CONFIGS: dict[str, dict[str, Any]] = {
    "as released": {},
    "patches of 1, no variance, another epsilon": {"patch_size": 1, "sample_size": 6, "out_channels": None, "norm_eps": 1e-3},
    "patches of 4": {"patch_size": 4, "sample_size": 16, "num_layers": 1},
}
BASE = {"num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8}


@pytest.fixture(params=CONFIGS, scope="module")
def peer(request: pytest.FixtureRequest) -> Any:
    """Diffusers' network with random parameters; its blocks' embedders equal each other, as in released weights."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(**BASE | {"num_embeds_ada_norm": CLASSES} | CONFIGS[request.param]).eval()
    with torch.no_grad():
        for value in network.parameters():
            value.copy_(torch.randn(value.shape) * (0.3 if value.ndim < 2 else value[0].numel() ** -0.5))
        for block in network.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    return network


def ours(peer: Any) -> tuple[DiT, keymap.KeyMap, dict[str, np.ndarray]]:
    """Our network of its config.json, the map, and its leaves."""
    config = dict(peer.config)
    network = DiT(**{name: value for name, value in dit_settings(config).items() if name != "kind"})
    network.check()
    x, vector = jnp.zeros((1, *(config["sample_size"],) * 2, config["in_channels"])), jnp.zeros((1, network.width))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1), vector=vector)["params"]
    table = jax.ShapeDtypeStruct((CLASSES + 1, network.width), np.float32)
    params = {"denoiser": shapes, "label": {"embedding": table}}
    state = {name: value.numpy() for name, value in peer.state_dict().items()}
    keys = diffusers_map(network, params)
    keymap.check(keys, flatten(params), {name: value.shape for name, value in state.items()}, "diffusers")
    return network, keys, dict(keymap.read(keys, state.__getitem__))


def test_outputs_and_gradients_equal_diffusers(peer: Any) -> None:
    network, _, leaves = ours(peer)
    # All channels of theirs, the variance's too.
    network = network.clone(learn_sigma=False, out_channels=peer.out_channels)
    params = unflatten(leaves)
    size, rng = peer.config.sample_size, np.random.default_rng(1)
    x = rng.normal(size=(4, size, size, 4)).astype(np.float32)
    weights = rng.normal(size=(4, size, size, peer.out_channels)).astype(np.float32)
    t, label = np.array([0, 3, 412, 999]), np.array([0, 3, CLASSES - 1, CLASSES])  # the last row is "no class"

    def theirs(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        inputs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(dtype).requires_grad_()
        y = peer.to(dtype)(inputs, torch.from_numpy(t), torch.from_numpy(label)).sample.permute(0, 2, 3, 1)
        (y * torch.from_numpy(weights)).sum().backward()
        peer.to(torch.float32)
        return y.detach().numpy(), inputs.grad.permute(0, 2, 3, 1).numpy()

    def apply(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = network.apply({"params": params["denoiser"]}, x, jnp.asarray(t, jnp.float32), vector=params["label"]["embedding"][label])
        return jnp.sum(y * weights), y

    (_, found), gradient = jax.jit(jax.value_and_grad(apply, has_aux=True))(x)
    (expected, expected_gradient), (exact, _) = theirs(torch.float32), theirs(torch.float64)
    tolerance = max(2e-5 * np.abs(expected).max(), 2 * np.abs(expected - exact).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-4 * np.abs(expected_gradient).max())


def test_diffusers_weights_and_configuration_come_back_exactly(peer: Any) -> None:
    network, keys, leaves = ours(peer)
    written = dict(keymap.write(keys, leaves.__getitem__))
    again = DiTTransformer2DModel.from_config(dit_config(network, 4, CLASSES, peer.config.sample_size))
    again.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in written.items()})
    for name, value in peer.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    used = [name for name in again.config if not name.startswith("_") and name != "out_channels"]
    assert {name: again.config[name] for name in used} == {name: peer.config[name] for name in used}
    assert again.out_channels == peer.out_channels
