"""The autoencoders against diffusers' AutoencoderKL and VQModel: the same random weights, both ways, outputs and gradients."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.numpy import load_file, save_file

from ldm_jax.interop.diffusers import autoencoder_config, autoencoder_map, autoencoder_settings
from ldm_jax.interop.exporting import export_folder
from ldm_jax.interop.pipelines import import_folder
from ldm_jax.nn.autoencoder import VQAutoencoder
from ldm_jax.stages import build_autoencoder, init_autoencoder
from tests.peers.models import assert_same_network, compare, config_of, exported, imported, randomised, state_of

pytestmark = pytest.mark.peers

Settings = dict[str, Any]


def blocks(*attends: bool) -> Settings:
    """The classes of the blocks, by level."""
    kinds = ["Attn" if has else "" for has in attends]
    return {
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)),
    }


BASE: Settings = {"block_out_channels": (16, 32), "norm_num_groups": 8, "sample_size": 32, **blocks(False, False)}
CODES: Settings = {"latent_channels": 3, "num_vq_embeddings": 16, "scaling_factor": 1.0}
KL: dict[str, Settings] = {
    "f8 with four channels": {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 32}
    | {"latent_channels": 4, **blocks(False, False, False, False)},
    "attention at two levels": BASE | {"latent_channels": 5, "block_out_channels": (16, 32, 32), **blocks(False, True, True)},
    "no attention": BASE | {"latent_channels": 4, "mid_block_add_attention": False},
    "of 2024: no quant_conv": BASE | {"latent_channels": 4, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06},
    "shifted": BASE | {"latent_channels": 4, "shift_factor": 0.25, "scaling_factor": 0.5, "layers_per_block": 2},
}
VQ: dict[str, Settings] = {
    "f4": BASE | CODES | {"block_out_channels": (16, 32, 64), "layers_per_block": 2, **blocks(False, False, False)},
    "entries of another width, attention": BASE | CODES | {"latent_channels": 6, "vq_embed_dim": 4, **blocks(False, True)},
    "no attention in the middle": BASE | CODES | {"mid_block_add_attention": False},
}
CONFIGS = {f"KL {name}": settings for name, settings in KL.items()} | {f"VQ {name}": settings for name, settings in VQ.items()}


def make(name: str) -> Any:
    return randomised((AutoencoderKL if name.startswith("KL") else VQModel)(**CONFIGS[name]))


def encode(peer: Any, x: Any) -> Any:
    """Moments, or the latents before they are quantised."""
    if isinstance(peer, VQModel):
        return peer.encode(x).latents
    posterior = peer.encode(x).latent_dist
    return torch.cat([posterior.mean, posterior.logvar], dim=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_gradients_and_files_equal_diffusers(name: str, tmp_path: Path) -> None:
    peer = make(name)
    peer.save_pretrained(tmp_path / "theirs")
    config = config_of(tmp_path / "theirs")
    network = build_autoencoder(autoencoder_settings(config), jnp.float32)
    levels = len(config["block_out_channels"])
    shapes = jax.eval_shape(lambda key: init_autoencoder(network, key, 32), jax.random.key(0))
    keys = autoencoder_map(levels, shapes)
    params = imported(keys, shapes, state_of(peer))

    written = autoencoder_config(network, config["sample_size"], config["norm_num_groups"])
    written |= {name: config[name] for name in ("scaling_factor", "shift_factor") if name in config}
    same = exported(tmp_path / "ours", written, keys, params)
    assert_same_network(type(peer).from_pretrained(same), peer, ("vq_embed_dim",) if isinstance(network, VQAutoencoder) else ())

    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (2, 32, 16, 3)).astype(np.float32)
    compare(lambda p, x: network.apply({"params": p}, x, method="moments"), params, peer, lambda x: encode(peer, x), images)
    latents = rng.normal(size=(2, 4, 2, network.latent_channels)).astype(np.float32)
    compare(lambda p, z: network.apply({"params": p}, z, method="decode"), params, peer, lambda z: peer.decode(z).sample, latents)


def test_variance_is_clamped_as_in_diffusers() -> None:
    peer = make("KL no attention")
    with torch.no_grad():
        peer.quant_conv.bias[4:].copy_(torch.tensor([-80.0, -30.0, 20.0, 80.0]))
    network = build_autoencoder(autoencoder_settings(dict(peer.config)), jnp.float32)
    shapes = jax.eval_shape(lambda key: init_autoencoder(network, key, 32), jax.random.key(0))
    params = imported(autoencoder_map(2, shapes), shapes, state_of(peer))
    images = np.random.default_rng(1).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    compare(lambda p, x: network.apply({"params": p}, x, method="moments"), params, peer, lambda x: encode(peer, x), images)


def folder_of(name: str, path: Path) -> Path:
    make(name).save_pretrained(path)
    return path


def weights(model: Path) -> dict[str, np.ndarray]:
    return load_file(model / "first_stage" / "weights.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    theirs = folder_of(name, tmp_path / "theirs")
    import_folder(theirs, tmp_path / "model")
    kind = type(make(name))
    assert export_folder(tmp_path / "model", tmp_path / "again") == kind.__name__
    but = ("vq_embed_dim",) if kind is VQModel else ()  # which may be left out where it is `latent_channels`
    assert_same_network(kind.from_pretrained(tmp_path / "again"), kind.from_pretrained(theirs), but)


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_names_of_attention_are_read(convolutions: bool, tmp_path: Path) -> None:
    """As files of 2022 have them; those converted from the paper's have 1x1 convolutions there too."""
    theirs = folder_of("KL attention at two levels", tmp_path / "theirs")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in load_file(theirs / "diffusion_pytorch_model.safetensors").items():
        module, _, leaf = name.rpartition(".")
        renamed = next((f"{module.removesuffix(new)}{before}.{leaf}" for new, before in old.items() if module.endswith(f".{new}")), name)
        tensors[renamed] = value[..., None, None] if convolutions and renamed != name and leaf == "weight" else value
    assert sum(".query." in name for name in tensors) == 2 * (2 + 4 + 2)  # weights and biases of encoder, decoder and both middles
    shutil.copytree(theirs, tmp_path / "old")
    save_file(tensors, tmp_path / "old" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    for name in ("theirs", "old"):
        import_folder(tmp_path / name, tmp_path / f"{name}_model")
    expected, found = weights(tmp_path / "theirs_model"), weights(tmp_path / "old_model")
    assert found.keys() == expected.keys()
    for leaf, value in expected.items():
        np.testing.assert_array_equal(found[leaf], value)


@pytest.mark.parametrize(("name", "scale"), [("KL f8 with four channels", 1 / 0.18215), ("VQ f4", 1.0)])
def test_a_file_without_the_scale_of_latents(name: str, scale: float, tmp_path: Path) -> None:
    """Such files are of Stable Diffusion's first days, and of VQ models whose latents were never scaled."""
    theirs = folder_of(name, tmp_path / "theirs")
    config = config_of(theirs)
    config.pop("scaling_factor")
    (theirs / "config.json").write_text(json.dumps(config))
    import_folder(theirs, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model.json").read_text())["scale"] == [scale]
