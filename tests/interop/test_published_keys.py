"""Every published list of names and shapes, against the maps of the presets whose networks they are of. Nothing has weights here.

The lists of text encoders and of DiT are in their own tests.
"""

import ast
import gzip
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from ldm_jax.conditioning.build import Model, build_conditioning
from ldm_jax.config import UserError, load_file
from ldm_jax.interop import compvis, diffusers
from ldm_jax.interop.keymap import KeyMap, flatten, their_shapes
from ldm_jax.stages import FirstStage, abstract_params, build_autoencoder, build_denoiser

CONFIGS = Path(__file__).parents[2] / "configs"
KEYS = Path(__file__).parent / "keys"
Shapes = dict[str, tuple[int, ...]]

AUTOENCODERS = ("kl-f4", "kl-f8", "kl-f16", "kl-f32", "vq-f4", "vq-f4-noattn", "vq-f8", "vq-f8-n256", "vq-f16")
UNETS = {
    "unet_768x768": "retrieval:openimages768",
    "unet_bsr_sr": "superres:bsr",
    "unet_celeba256": "unconditional:celeba256",
    "unet_cin256": "class_cond:imagenet-f8",
    "unet_cin256-v2": "class_cond:imagenet-f4",
    "unet_ffhq256": "unconditional:ffhq256",
    "unet_inpainting_big": "inpaint:places-big",
    "unet_layout2img-openimages256": "layout2img:openimages",
    "unet_lsun_beds256": "unconditional:bedrooms256",
    "unet_lsun_churches256": "unconditional:churches256",
    "unet_semantic_synthesis256": "semantic:landscapes256",
    "unet_semantic_synthesis512": "semantic:landscapes512",
    "unet_text2img256": "txt2img:cc-f4",
    "unet_txt2img-1p4B-eval": "txt2img:laion-1p4b",
}
DIFFUSERS_AUTOENCODERS = {"diffusers_autoencoderkl_f8": "kl-f8", "diffusers_vqmodel_f4": "vq-f4"}
SD3 = "diffusers_vae_ema_sd3"
DIFFUSERS_UNETS = {
    "diffusers_unet2d_ldm_celebahq256": "unconditional:celeba256",
    "diffusers_unet2dcond_ldm_text2im_large256": "txt2img:laion-1p4b",
    "diffusers_unet2dcond_sd15": "txt2img:sd1",
}
ELSEWHERE = {"diffusers_clip_text_l14", "diffusers_ldmbert", "diffusers_dit_xl2"}


def lines(name: str) -> list[str]:
    (file,) = KEYS.glob(f"{name}.t*.gz")
    return gzip.decompress(file.read_bytes()).decode().splitlines()


def published(name: str) -> Shapes:
    """A list of the paper's tensors: name, tab, sizes with an "x" between."""
    rows = [line.split("\t") for line in lines(name)]
    return {tensor: tuple(map(int, shape.split("x"))) for tensor, shape in rows}


def published_by_diffusers(name: str) -> tuple[dict[str, Any], Shapes]:
    """A network's config.json and its tensors: name, shape, type."""
    _, config, *rows = lines(name)
    return json.loads(config), {tensor: ast.literal_eval(shape) for tensor, shape, _ in (row.split("\t") for row in rows)}


def preset(name: str) -> ConfigDict:
    file, _, row = name.partition(":")
    return load_file(f"{CONFIGS}/{file}.py:{row}")


@cache
def autoencoder(name: str) -> tuple[Any, Any]:
    """The autoencoder of a preset, and its parameters' shapes."""
    network = build_autoencoder(preset(f"autoencoder:{name}").first_stage.to_dict(), jnp.float32)
    return network, abstract_params(FirstStage(network), None, 32)["first_stage"]


@cache
def unet(name: str) -> tuple[Any, Any]:
    """The UNet of a preset, and its parameters' shapes."""
    config = preset(name)
    first = build_autoencoder(config.first_stage.to_dict(), jnp.float32)
    about = Model(config.data.resolution, first.factor, first.latent_channels, jnp.float32)
    conditioning = build_conditioning(config.conditioning.to_dict(), about)
    denoiser = build_denoiser(config.denoiser.to_dict(), config.diffusion, conditioning, first.latent_channels, jnp.float32)
    return denoiser.network, abstract_params(FirstStage(first), denoiser, config.data.resolution)["denoiser"]


def covers(keys: KeyMap, params: Any, theirs: Shapes) -> None:
    """The map has exactly these tensors, and each of our parameters once."""
    ours = their_shapes(keys, params)
    assert ours.keys() - theirs.keys() == set() and theirs.keys() - ours.keys() == set()
    assert {name: (ours[name], shape) for name, shape in theirs.items() if ours[name] != shape} == {}
    assert len(keys) == len(theirs)
    assert sorted(leaf for t in keys for leaf in t.leaves) == sorted(flatten(params))


def test_every_list_is_of_a_network_that_is_tested() -> None:
    tested = {*UNETS, *DIFFUSERS_AUTOENCODERS, *DIFFUSERS_UNETS, SD3, *(f"ae_{name}" for name in AUTOENCODERS)}
    assert {file.name.split(".")[0] for file in KEYS.iterdir()} == tested | ELSEWHERE


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_the_papers_autoencoders(name: str) -> None:
    _, params = autoencoder(name)
    covers(compvis.autoencoder_map(params), params, published(f"ae_{name}"))
    # In the checkpoint of a latent diffusion model they are the same, under a name.
    inside = {f"first_stage_model.{tensor}": shape for tensor, shape in published(f"ae_{name}").items()}
    covers(compvis.autoencoder_map(params, "first_stage_model."), params, inside)


@pytest.mark.parametrize("name", UNETS)
def test_the_papers_unets(name: str) -> None:
    network, params = unet(UNETS[name])
    theirs = published(name)
    covers(compvis.unet_map(network, params), params, theirs)
    averages = {compvis.ema_name(tensor) for tensor in theirs}
    assert len(averages) == len(theirs)  # without their dots the names are still different ones
    assert all(tensor.startswith("model_ema.diffusion_model") and "." not in tensor[10:] for tensor in averages)


@pytest.mark.parametrize("name", DIFFUSERS_AUTOENCODERS)
def test_diffusers_autoencoders(name: str) -> None:
    config, theirs = published_by_diffusers(name)
    network, params = autoencoder(DIFFUSERS_AUTOENCODERS[name])
    config["_class_name"] = "VQModel" if "vq" in name else "AutoencoderKL"
    built = build_autoencoder(diffusers.autoencoder_settings(config), jnp.float32)
    assert built.clone(norm_groups=0) == network
    covers(diffusers.autoencoder_map(len(network.channel_mult), params), params, theirs)


def test_an_autoencoder_of_2024() -> None:
    """Stable Diffusion 3's: sixteen channels, no quant_conv; no preset has it, its configuration does."""
    config, theirs = published_by_diffusers(SD3)
    network = build_autoencoder(diffusers.autoencoder_settings(config | {"_class_name": "AutoencoderKL"}), jnp.float32)
    params = abstract_params(FirstStage(network), None, 32)["first_stage"]
    covers(diffusers.autoencoder_map(len(network.channel_mult), params), params, theirs)
    with pytest.raises(UserError, match="one of quant_conv and post_quant_conv"):
        diffusers.autoencoder_settings(config | {"_class_name": "AutoencoderKL", "use_quant_conv": True})


@pytest.mark.parametrize("name", DIFFUSERS_UNETS)
def test_diffusers_unets(name: str) -> None:
    config, theirs = published_by_diffusers(name)
    network, params = unet(DIFFUSERS_UNETS[name])
    config["_class_name"] = "UNet2DModel" if "unet2d_" in name else "UNet2DConditionModel"
    settings = {k: v for k, v in diffusers.unet_settings(config).items() if k not in ("kind", "norm_groups", "dropout")}
    assert {field: getattr(network, field) for field in settings} == settings
    covers(diffusers.unet_map(network, params), params, theirs)


SPOILED: dict[str, Callable[[Shapes], Any]] = {
    "missing": lambda theirs: theirs.popitem(),
    "mis-shaped": lambda theirs: theirs.update({"out.2.bias": (5,)}),
    "unexpected": lambda theirs: theirs.update(extra=(1,)),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_list_that_differs_by_one_tensor_is_not_covered(how: str) -> None:
    network, params = unet("superres:bsr")
    theirs = {tensor.removeprefix("model.diffusion_model."): shape for tensor, shape in published("unet_bsr_sr").items()}
    keys = compvis.unet_map(network, params, prefix="")
    covers(keys, params, theirs)
    SPOILED[how](theirs)
    with pytest.raises(AssertionError):
        covers(keys, params, theirs)
