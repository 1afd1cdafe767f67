"""What YAML files of the paper's code say, in our terms; what has no counterpart on either side is refused."""

import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import yaml
from ml_collections import ConfigDict

from ldm_jax.conditioning.build import Model, build_conditioning
from ldm_jax.config import UserError
from ldm_jax.config import load_file as load_config
from ldm_jax.interop.architecture import Architecture
from ldm_jax.interop.compvis_yaml import read_yaml, to_yaml
from ldm_jax.interop.importing import build_networks
from ldm_jax.interop.text_encoders import OPENCLIP_H14
from ldm_jax.stages import build_autoencoder, build_denoiser
from tests.interop import compvis_files as files
from tests.interop.compvis_files import changed

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(autouse=True)
def small_clip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP's encoders are small, but for the released files."""
    files.trace_once(monkeypatch)
    if "released" not in request.node.name:
        files.tiny_clip(monkeypatch)


def preset(name: str) -> ConfigDict:
    file, _, row = name.partition(":")
    return load_config(f"{CONFIGS}/{file}.py:{row}")


def differences(group: dict[str, Any], ours: ConfigDict) -> dict[str, Any]:
    """Fields that both have and that differ. A norm has 32 groups at the released widths, whether that is said (32) or follows (0)."""
    return {k: (v, ours[k]) for k, v in group.items() if k in ours and ours[k] != v and (k, v, ours[k]) != ("norm_groups", 32, 0)}


@pytest.mark.parametrize("name", files.RELEASED)
def test_a_released_file_says_what_the_preset_of_its_name_has(name: str, tmp_path: Path) -> None:
    found, config = read_yaml(files.write_yaml(tmp_path, files.RELEASED[name])), preset(name)
    assert found.denoiser is not None
    first = found.first_stage.copy()
    assert first.pop("codebook_size", config.first_stage.codebook.size) == config.first_stage.codebook.size
    assert differences(first, config.first_stage) == {}
    assert differences(found.denoiser, config.denoiser) == {}
    assert differences(found.diffusion, config.diffusion) == {}
    enabled = {condition: group for condition, group in config.conditioning.items() if group.enabled}
    assert found.conditioning.keys() == enabled.keys()
    assert {condition: differences(group, enabled[condition]) for condition, group in found.conditioning.items() if group} == {
        condition: {} for condition, group in found.conditioning.items() if group
    }
    # The file of 768 px has the size of the one of 512.
    assert found.resolution == (512 if name == "txt2img:sd2-v" else config.data.resolution)
    scale = config.first_stage.latent_scale
    assert found.scale == (None if scale == "std" else 1.0 / float(scale))
    assert found.linear_projections == name.startswith("txt2img:sd2")
    assert found.fused_by_head


@pytest.mark.parametrize("name", files.RELEASED)
def test_a_released_file_builds_the_networks_of_its_preset(name: str, tmp_path: Path) -> None:
    found, config = read_yaml(files.write_yaml(tmp_path, files.RELEASED[name])), preset(name)
    theirs = build_networks(found, 0.0, found.scale or 1.0, None, {})
    autoencoder = build_autoencoder(config.first_stage.to_dict(), jnp.float32)
    about = Model(found.resolution, autoencoder.factor, autoencoder.latent_channels, jnp.float32)
    conditioning = build_conditioning(config.conditioning.to_dict(), about)
    ours = build_denoiser(config.denoiser.to_dict(), config.diffusion, conditioning, autoencoder.latent_channels, jnp.float32)
    assert theirs.denoiser is not None
    alike = {"norm_groups": 32, "remat": "none", "dropout": 0.0}
    assert theirs.denoiser.network.clone(**alike) == ours.network.clone(**alike)
    assert theirs.first_stage.network.clone(norm_groups=32) == autoencoder.clone(norm_groups=32)
    assert theirs.denoiser.conditioning == conditioning
    assert (theirs.denoiser.process, theirs.denoiser.prediction) == (ours.process, ours.prediction)


@pytest.mark.parametrize("name", files.RELEASED_AUTOENCODERS)
def test_a_released_autoencoders_file_says_what_its_preset_has(name: str, tmp_path: Path) -> None:
    content = {"model": {"base_learning_rate": 4.5e-6, **files.RELEASED_AUTOENCODERS[name]}, "data": {"target": "main.Data"}}
    found, config = read_yaml(files.write_yaml(tmp_path, content)), preset(f"autoencoder:{name}")
    assert (found.denoiser, found.conditioning, found.resolution, found.scale) == (None, {}, 256, 1.0)
    assert differences(found.first_stage, config.first_stage) == {}
    ours = build_autoencoder(config.first_stage.to_dict(), jnp.float32)
    assert build_autoencoder(found.first_stage, jnp.float32).clone(norm_groups=0) == ours


@pytest.mark.parametrize(
    ("name", "noted"),
    [
        ("semantic:landscapes256", "attention_resolutions [8, 16, 32] match no level of the network ([1, 2, 4])"),
        ("superres:bsr", "attention_resolutions [16] match no level of the network ([1, 2, 4, 8])"),
        ("class_cond:imagenet-f4", ""),
    ],
)
def test_attention_that_no_level_of_a_released_file_has_is_noted(
    name: str, noted: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read_yaml(files.write_yaml(tmp_path, files.RELEASED[name]))
    assert [noted in message for message in caplog.messages] == [True] * bool(noted)


def test_pictures_have_the_size_that_sampling_takes(tmp_path: Path) -> None:
    """`image_size` of the model is that of its latents; that of the UNet, which nothing reads, stands in where there is no other."""
    content = deepcopy(files.TINY["text"])
    params = content["model"]["params"]
    params["unet_config"]["params"]["image_size"] = 99
    assert read_yaml(files.write_yaml(tmp_path, content)).resolution == 16
    del params["image_size"]
    params["unet_config"]["params"]["image_size"] = [4, 4]
    assert read_yaml(files.write_yaml(tmp_path, content)).resolution == 8


def without(content: dict[str, Any], field: str) -> dict[str, Any]:
    """A file whose UNet lacks a field."""
    content = deepcopy(content)
    del content["model"]["params"]["unet_config"]["params"][field]
    return content


def retargeted(name: str, part: str = "") -> dict[str, Any]:
    """A file of another class of model, or of a part of it."""
    content = deepcopy(files.TINY["label"])
    (content["model"]["params"][part] if part else content["model"])["target"] = f"ldm.{name}"
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed("label", "unet", num_classes=10), "unet_config: num_classes=10 has no counterpart"),
        (changed("label", "unet", n_embed=8, dims=3), "unet_config: dims=3, n_embed=8 has no counterpart"),
        (changed("label", "unet", num_heads_upsample=4), "num_heads_upsample=4"),
        (changed("label", "unet", some_new_option=True), "some_new_option=True"),
        (changed("codebook", "ddconfig", attn_type="linear"), "attn_type='linear'"),
        (changed("codebook", "ddconfig", in_channels=1, out_ch=1), "in_channels=1, out_ch=1"),
        (changed("text", "ddconfig", tanh_out=True), "ddconfig of AutoencoderKL: tanh_out=True"),
        (changed("label", "model", beta_schedule="cosine"), "beta_schedule='cosine'"),
        (changed("label", "model", given_betas=[0.1]), "given_betas=[0.1]"),
        (changed("label", "model", conditioning_key="hybrid"), "ClassEmbedder with conditioning_key 'hybrid'"),
        (changed("text and mask", "model", conditioning_key="concat"), "FrozenCLIPEmbedder with conditioning_key 'concat'"),
        (changed("label", "model", cond_stage_config={"target": "ldm.modules.Depth"}), "cond_stage_config Depth"),
        (changed("label", "model", first_stage_config={"target": "ldm.Wavelets"}), "first stage Wavelets"),
        (changed("clip", "condition", version="openai/clip-vit-base-patch32"), "version='openai/clip-vit-base-patch32'"),
        (changed("clip", "condition", layer="hidden", layer_idx=11), "layer='hidden', layer_idx=11"),
        (changed("openclip", "condition", arch="ViT-bigG-14"), "arch='ViT-bigG-14'"),
        (changed("openclip", "condition", layer="first"), "FrozenOpenCLIPEmbedder with conditioning_key 'crossattn'"),
        (changed("segmentation", "condition", multiplier=0.25), "multiplier=0.25"),
        ({}, "KeyError 'model'"),
        ([], "is no model configuration"),
        ("text", "is no model configuration"),
        ({"model": "text"}, "is no model configuration"),
        ({"model": {"params": {}}}, "KeyError 'first_stage_config'"),
        ({"model": {"params": {**files.TINY["label"]["model"]["params"], "unet_config": "text"}}}, "is no model configuration"),
        (changed("label", "model", image_size=[]), "is no model configuration"),
        (changed("label", "model", linear_end="high"), "is no model configuration"),
        (changed("label", "model", scale_factor=0), "is no model configuration"),
        (changed("label", "model", image_size=[8, 16]), "is no model configuration"),
        (changed("label", "model", timesteps=99.5), "timesteps=99.5: not whole numbers from 1 on"),
        (changed("label", "model", parameterization="score"), "parameterization='score'"),
        (changed("label", "model", loss_type="huber"), "loss_type='huber'"),
        (changed("label", "unet", model_channels="wide", num_res_blocks=[1, 2]), "model_channels='wide', num_res_blocks=[1, 2]: not whole"),
        (changed("label", "unet", channel_mult=[1, 1.5]), "channel_mult=[1, 1.5]: not whole numbers from 1 on"),
        (changed("label", "unet", attention_resolutions="all"), "attention_resolutions='all': not whole numbers from 1 on"),
        (changed("codebook", "ddconfig", ch=True), "ch=True: not whole numbers from 1 on"),
        (changed("text", "condition", n_layer="two"), "n_layer='two': not whole numbers from 1 on"),
        (changed("text", "condition", attn_dim=3), "BERTEmbedder: attn_dim=3 has no counterpart"),
        (changed("label", "condition", embed_dim=None), "embed_dim=None: not whole numbers from 1 on"),
        (changed("label", "condition", normalize=True), "ClassEmbedder: normalize=True has no counterpart"),
        (without(files.TINY["label"], "num_heads"), "KeyError 'num_heads'"),
        (retargeted("LatentUpscaleDiffusion"), "target ldm.LatentUpscaleDiffusion has no counterpart"),
        (retargeted("EncoderUNetModel", "unet_config"), "target ldm.EncoderUNetModel has no counterpart"),
    ],
)
def test_a_file_of_what_has_no_counterpart_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_yaml(files.write_yaml(tmp_path, content))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(UserError, match=r"cannot read .*config\.yaml: .*No such file"):
        read_yaml(path)
    for content in (
        b"PK\x03\x04\xff\xfe",
        b"a: [1,",
        b"a:\n\t- b: {",
        b"a: 2001-13-45",
        b"[" * 100_000,
        b"!!python/object/apply:os.system [x]",
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*config\.yaml: ") as error:
            read_yaml(path)
        assert "\n" not in str(error.value)
    with path.open("wb") as file:
        file.truncate(2**33)  # a checkpoint is not read to its end
    with pytest.raises(UserError, match=r"config\.yaml is no model configuration of latent-diffusion: it has 8589934592 bytes"):
        read_yaml(path)


def test_sizes_that_make_no_network_together(tmp_path: Path) -> None:
    for content in (changed("label", "unet", model_channels=48), changed("label", "unet", use_spatial_transformer=False)):
        with pytest.raises(UserError, match="no network can be built of these sizes: ") as error:
            files.networks(files.write_yaml(tmp_path, content))
        assert "\n" not in str(error.value)


def test_what_is_not_set_may_be_said(tmp_path: Path) -> None:
    plain, said = changed("low_res", "unet"), changed("low_res", "unet", num_heads=-1, context_dim=None, transformer_depth=1)
    assert read_yaml(files.write_yaml(tmp_path, said)) == read_yaml(files.write_yaml(tmp_path, plain))


def test_what_a_file_leaves_out_is_as_there(tmp_path: Path) -> None:
    """Their defaults: the condition joins the latents, a table has 1000 classes, OpenCLIP's last layer is read."""
    content = deepcopy(files.TINY["low_res"])
    assert "concat_mode" not in content["model"]["params"]
    assert read_yaml(files.write_yaml(tmp_path, content)).conditioning == {"low_res": {}}
    content["model"]["params"]["unet_config"]["params"] |= {"context_dim": 64}
    content["model"]["params"]["concat_mode"] = False
    assert read_yaml(files.write_yaml(tmp_path, content)).conditioning == {"neighbors": {"width": 64}}
    content = deepcopy(files.TINY["label"])
    del content["model"]["params"]["cond_stage_config"]["params"]["n_classes"]
    assert read_yaml(files.write_yaml(tmp_path, content)).conditioning["label"]["num_classes"] == 1000
    content = deepcopy(files.TINY["openclip"])
    del content["model"]["params"]["cond_stage_config"]["params"]["layer"]
    assert read_yaml(files.write_yaml(tmp_path, content)).conditioning["text"]["skip_last"] == 0
    content["model"]["params"] |= {"timesteps": 500, "parameterization": "x0", "loss_type": "l1"}
    for name in ("linear_start", "linear_end"):
        del content["model"]["params"][name]
    assert read_yaml(files.write_yaml(tmp_path, content)).diffusion == {
        "process": "discrete",
        "schedule": "linear",
        "start": 1e-4,
        "end": 2e-2,
        "num_steps": 500,
        "prediction": "x0",
        "loss": "l1",
    }


def test_a_table_of_classes_keeps_its_null_row(tmp_path: Path) -> None:
    """A YAML file of theirs does not say whether the last row is of no class; ours does."""
    arch = read_yaml(files.write_yaml(tmp_path, files.TINY["label"]))
    for classes, null in ((7, True), (1000, False), (1001, False), (1000, True)):
        group = {"num_classes": classes, "null_class": null, "width": 64, "to": "crossattn", "drop_rate": 0.1 * null}
        built = build_networks(replace(arch, conditioning={"label": group}), 0.0, 1.0, None, {})
        (tmp_path / "config.yaml").write_text(to_yaml(built))
        found = read_yaml(tmp_path / "config.yaml").conditioning["label"]
        assert (found["num_classes"], found["null_class"]) == (classes, null)


# --- models that cannot go there ---


def groups(**changes: Any) -> Architecture:
    """A model of ours that their code can build, but for the changes to its groups."""
    shared = {"channels": 32, "channel_mult": (1,), "num_res_blocks": 1, "norm_groups": 32}
    first = {"kind": "kl", **shared, "z_channels": 3, "latent_channels": 3}
    denoiser = {"kind": "unet", **shared, "attention_levels": (1,), "num_heads": 2, "head_channels": 0, "transformer_depth": 0}
    conditioning = changes.get("conditioning", {})
    return Architecture(
        first | changes.get("first_stage", {}),
        denoiser | changes.get("denoiser", {}),
        conditioning,
        changes.get("diffusion", {}),
        resolution=8,
    )


def converted(architecture: Architecture, shift: float = 0.0) -> str:
    return to_yaml(build_networks(architecture, shift, 1.0, None, {}))


def test_a_model_of_ours_that_their_code_can_build() -> None:
    content = yaml.safe_load(converted(groups()))
    assert content["model"]["params"]["cond_stage_config"] == "__is_unconditional__"
    assert content["model"]["params"]["use_ema"] is False  # its default is True: averages that no checkpoint of ours holds


@pytest.mark.parametrize(("depth", "skip_last", "layer"), [(24, 1, "penultimate"), (23, 0, "penultimate"), (24, 0, "last"), (22, 0, "")])
def test_the_layers_of_the_released_openclip_that_are_read(depth: int, skip_last: int, layer: str) -> None:
    """Of 24; diffusers' folders of Stable Diffusion 2 have no more of them than are read."""
    text = {"kind": "clip", **OPENCLIP_H14, "depth": depth, "skip_last": skip_last}
    ours = groups(denoiser=_CONTEXT, conditioning={"text": text})
    if layer:
        condition = yaml.safe_load(converted(ours))["model"]["params"]["cond_stage_config"]
        assert condition["target"].endswith(".FrozenOpenCLIPEmbedder") and condition["params"]["layer"] == layer
    else:
        with pytest.raises(UserError, match="ViT-H/14 only"):
            converted(ours)


_TEXT = {"kind": "transformer", "width": 64, "depth": 1, "vocab_size": 9, "max_length": 4}
_CONTEXT = {"transformer_depth": 1}


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (groups(diffusion={"process": "flow", "prediction": "flow"}), "the discrete process with its linear schedule"),
        (groups(diffusion={"schedule": "linear_beta"}), "the discrete process with its linear schedule"),
        (groups(first_stage={"patch_size": 2}), "no autoencoder of patches"),
        (groups(first_stage={"mid_attention": False, "attention_levels": (1,)}), "attention at its levels and none in the middle"),
        (groups(first_stage={"norm_groups": 0}), "32 groups in every norm, the first_stage here 8 of 32 channels"),
        (groups(denoiser={"norm_groups": 0}), "32 groups in every norm, the denoiser here 8 of 32 channels"),
        (groups(denoiser={"kind": "dit", "width": 32, "depth": 1, "num_heads": 2}), "no denoiser but the UNet"),
        (groups(conditioning={"label": {"width": 64, "to": "vector"}}), "no counterpart of the condition label"),
        (groups(denoiser=_CONTEXT, conditioning={"text": _TEXT, "label": {"width": 64}}), "one condition a model"),
        (
            groups(denoiser=_CONTEXT, conditioning={"text": {**_TEXT, "num_heads": 4}}),
            "8 heads of 64 channels, not 4 of 64",
        ),
        (
            groups(denoiser=_CONTEXT, conditioning={"text": {**_TEXT, "kind": "clip"}}),
            "text encoders of ViT-L/14 and ViT-H/14 only",
        ),
        (groups(denoiser=_CONTEXT, conditioning={"text": {**_TEXT, "kind": "t5"}}), "no counterpart of the condition text"),
    ],
)
def test_a_model_that_their_code_cannot_build_is_refused(architecture: Architecture, message: str) -> None:
    with pytest.raises(UserError) as error:
        converted(architecture)
    assert message in str(error.value)


def test_latents_that_are_shifted_are_refused() -> None:
    with pytest.raises(UserError, match="scales latents by one number"):
        converted(groups(), shift=0.5)
