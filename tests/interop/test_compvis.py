"""Models of the paper's code: what its files say, names and shapes of its checkpoints, and exact ways there and back."""

import json
import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from ldm_jax.conditioning.build import Model, build_conditioning
from ldm_jax.config import UserError
from ldm_jax.config import load_file as load_config
from ldm_jax.interop import compvis
from ldm_jax.interop.architecture import Architecture
from ldm_jax.interop.compvis_yaml import read_yaml, to_yaml
from ldm_jax.interop.exporting import export_checkpoint
from ldm_jax.interop.importing import build_networks
from ldm_jax.latent_diffusion import build_autoencoder, build_denoiser
from tests.interop import compvis_files as files

CONFIGS = Path(__file__).parents[2] / "configs"
UNET, FIRST_STAGE, CONDITIONER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


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


# --- YAML files ---


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


def changed(kind: str, where: str, **fields: Any) -> dict[str, Any]:
    """A tiny model's file with other fields of `model`, the `unet`, the `ddconfig` or the `condition`."""
    content = deepcopy(files.TINY[kind])
    params = content["model"]["params"]
    group = {
        "model": lambda: params,
        "unet": lambda: params["unet_config"]["params"],
        "ddconfig": lambda: params.get("first_stage_config", content["model"])["params"]["ddconfig"],
        "condition": lambda: params["cond_stage_config"].setdefault("params", {}),
    }[where]()
    group.update(fields)
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
    for content in (b"PK\x03\x04\xff\xfe", b"a: [1,", b"a:\n\t- b: {"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*config\.yaml: ") as error:
            read_yaml(path)
        assert "\n" not in str(error.value)


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


# --- checkpoints ---


def test_names_of_conditioners_are_the_published_ones(tmp_path: Path) -> None:
    def names(kind: str) -> dict[str, tuple[int, ...]]:
        tensors = files.random_tensors(files.write_yaml(tmp_path / kind, files.TINY[kind]))
        return {name: array.shape for name, array in tensors.items() if name.startswith(CONDITIONER)}

    assert names("label") == {"cond_stage_model.embedding.weight": (1001, 64)}
    assert names("label without null") == {"cond_stage_model.embedding.weight": (7, 64)}
    assert names("segmentation") == {"cond_stage_model.channel_mapper.weight": (3, 5, 1, 1)}
    assert names("low_res") == names("mask") == names("neighbors") == names("unconditional") == {}
    layers = "cond_stage_model.transformer.attn_layers.layers"
    assert (
        names("text").items()
        >= {
            "cond_stage_model.transformer.token_emb.weight": (300, 64),
            "cond_stage_model.transformer.pos_emb.emb.weight": (8, 64),
            f"{layers}.0.1.to_q.weight": (512, 64),
            f"{layers}.1.1.net.0.0.weight": (256, 64),
            "cond_stage_model.transformer.norm.bias": (64,),
        }.items()
    )
    assert names("boxes").keys() == names("text").keys()
    assert "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.bias" in names("clip")
    assert names("openclip")["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"] == (192, 64)


@pytest.mark.parametrize(("kind", "heads"), [("unconditional", 4), ("updown", 1)])
def test_the_order_of_queries_keys_and_values(kind: str, heads: int, tmp_path: Path) -> None:
    """By head first, unless the file says `use_new_attention_order`: then all queries, all keys, all values."""
    path = files.write_yaml(tmp_path, files.TINY[kind])
    tensors = files.random_tensors(path)
    weights = files.write_checkpoint(tmp_path / "model.safetensors", tensors)
    compvis.import_checkpoint(weights, path, tmp_path / "model")
    ours = load_file(tmp_path / "model" / "denoiser" / "weights.safetensors")
    fused = tensors[f"{UNET}middle_block.1.qkv.weight"][..., 0]
    assert fused.shape == (192, 64)
    rows = fused.reshape(heads, 3, 64 // heads, 64)
    for i, part in enumerate("qkv"):
        np.testing.assert_array_equal(ours[f"middle_1_attn.{part}.kernel"], rows[:, i].reshape(64, 64).T)


@pytest.mark.parametrize("kind", files.TINY)
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    path = files.write_yaml(tmp_path, files.TINY[kind])
    tensors = files.random_tensors(path)
    weights = files.write_checkpoint(tmp_path / "model.safetensors", tensors)
    compvis.import_checkpoint(weights, path, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "theirs")
    again = load_file(tmp_path / "theirs" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    # and the YAML file that was written builds the same model again
    compvis.import_checkpoint(tmp_path / "theirs" / "model.safetensors", tmp_path / "theirs" / "config.yaml", tmp_path / "again")
    written = {file.relative_to(tmp_path / "ours"): file for file in (tmp_path / "ours").rglob("*") if file.is_file()}
    assert {file.relative_to(tmp_path / "again") for file in (tmp_path / "again").rglob("*") if file.is_file()} == set(written)
    for name, file in written.items():
        other = tmp_path / "again" / name
        if name.name == "model.json":
            before, after = json.loads(file.read_text()), json.loads(other.read_text())
            np.testing.assert_allclose(before.pop("scale"), after.pop("scale"), rtol=1e-15)
            assert before == after
        else:
            assert file.read_bytes() == other.read_bytes(), name


def test_a_table_of_classes_keeps_its_null_row(tmp_path: Path) -> None:
    """A YAML file of theirs does not say whether the last row is of no class; ours does."""
    arch = read_yaml(files.write_yaml(tmp_path, files.TINY["label"]))
    for classes, null in ((7, True), (1000, False), (1001, False), (1000, True)):
        group = {"num_classes": classes, "null_class": null, "width": 64, "to": "crossattn", "drop_rate": 0.1 * null}
        built = build_networks(replace(arch, conditioning={"label": group}), 0.0, 1.0, None, {})
        (tmp_path / "config.yaml").write_text(to_yaml(built))
        found = read_yaml(tmp_path / "config.yaml").conditioning["label"]
        assert (found["num_classes"], found["null_class"]) == (classes, null)


SCHEDULE = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar"),
)
INPAINTING = ("ddim_sigmas", "ddim_alphas", "ddim_alphas_prev", "ddim_sqrt_one_minus_alphas")


def imported(folder: Path, kind: str, tensors: dict[str, np.ndarray], **options: Any) -> tuple[dict[str, np.ndarray], list[str]]:
    """Our weights of a checkpoint with these tensors, by their path, and the notes."""
    path = files.write_yaml(folder, files.TINY[kind])
    weights = files.write_checkpoint(folder / "model.safetensors", tensors)
    notes = compvis.import_checkpoint(weights, path, folder / "model", **options)
    parts = {part: load_file(folder / "model" / part / "weights.safetensors") for part in ("first_stage", "denoiser", "conditioner")}
    return {f"{part}/{name}": array for part, arrays in parts.items() for name, array in arrays.items()}, notes


@pytest.mark.parametrize("kind", ["unconditional", "text", "clip", "mask"])
def test_what_whole_checkpoints_hold_besides_is_not_read(kind: str, tmp_path: Path) -> None:
    tensors = files.random_tensors(files.write_yaml(tmp_path, files.TINY[kind]))
    extra = dict.fromkeys((*SCHEDULE, "scale_factor", "model_ema.decay", "model_ema.num_updates", "first_stage_model.loss.logvar"), (1,))
    if kind == "mask":
        extra |= dict.fromkeys(INPAINTING, (50,))
        aliased = {name: array.shape for name, array in tensors.items() if name.startswith(FIRST_STAGE)}
        extra |= {name.replace(FIRST_STAGE, CONDITIONER): shape for name, shape in aliased.items()}
        extra |= {"cond_stage_model.loss.discriminator.main.0.weight": (4, 4)}
    if kind == "text":
        extra |= {"cond_stage_model.transformer.to_logits.weight": (300, 64), "cond_stage_model.transformer.to_logits.bias": (300,)}
    if kind == "clip":
        extra |= {"cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77)}
    plain, _ = imported(tmp_path / "plain", kind, tensors)
    padded, _ = imported(tmp_path / "padded", kind, tensors | {name: np.full(shape, 9.0, np.float32) for name, shape in extra.items()})
    assert padded.keys() == plain.keys()
    for name, array in plain.items():
        np.testing.assert_array_equal(padded[name], array)


def test_an_autoencoders_loss_is_not_read(tmp_path: Path) -> None:
    path = files.write_yaml(tmp_path, files.TINY["codebook"])
    tensors = files.random_tensors(path)
    extra = ("loss.perceptual_loss.lin0.model.1.weight", "loss.discriminator.main.0.weight", "loss.logvar")
    weights = files.write_checkpoint(tmp_path / "model.safetensors", tensors | dict.fromkeys(extra, np.ones((2, 3), np.float32)))
    assert compvis.import_checkpoint(weights, path, tmp_path / "model") == []
    ours = load_file(tmp_path / "model" / "first_stage" / "weights.safetensors")
    np.testing.assert_array_equal(ours["quantize.embedding"], tensors["quantize.embedding.weight"])
    assert sum(array.size for array in ours.values()) == sum(array.size for array in tensors.values())
    assert not (tmp_path / "model" / "denoiser").exists()


def test_moving_averages_are_taken_unless_they_are_not_wanted(tmp_path: Path) -> None:
    tensors = files.random_tensors(files.write_yaml(tmp_path, files.TINY["label"]))
    averages = {
        "model_ema.diffusion_model" + name.removeprefix(UNET).replace(".", ""): array + 1
        for name, array in tensors.items()
        if name.startswith(UNET)
    }
    assert "model_ema.diffusion_modelinput_blocks10in_layers0weight" in averages
    both = tensors | averages | {"model_ema.decay": np.float32([0.9999]), "model_ema.num_updates": np.float32([3])}
    plain, notes = imported(tmp_path / "plain", "label", tensors)
    assert notes == ["the checkpoint has no moving averages: its plain weights are taken"]
    unwanted, notes = imported(tmp_path / "unwanted", "label", both, ema=False)
    assert notes == []
    averaged, notes = imported(tmp_path / "averaged", "label", both)
    assert notes == []
    for name, array in plain.items():
        np.testing.assert_array_equal(unwanted[name], array)
        np.testing.assert_array_equal(averaged[name], array + np.float32(name.startswith("denoiser/")))
    without_plain, _ = imported(tmp_path / "only", "label", {k: v for k, v in both.items() if not k.startswith(UNET)})
    np.testing.assert_array_equal(without_plain["denoiser/out_conv.kernel"], averaged["denoiser/out_conv.kernel"])
    lost = "model_ema.diffusion_modelout2bias"
    with pytest.raises(UserError, match=f"{lost} is missing"):
        imported(tmp_path / "lost", "label", {k: v for k, v in both.items() if k != lost})


def test_a_scale_that_the_checkpoint_holds(tmp_path: Path) -> None:
    path = files.write_yaml(tmp_path, changed("unconditional", "model", scale_by_std=True, scale_factor=0.5))
    tensors = files.random_tensors(path)
    with pytest.raises(UserError, match=r"has no scale_factor, which .* says it must hold"):
        compvis.import_checkpoint(files.write_checkpoint(tmp_path / "model.safetensors", tensors), path, tmp_path / "model")
    for shape in ((), (1,)):
        weights = files.write_checkpoint(tmp_path / "model.safetensors", tensors | {"scale_factor": np.full(shape, 0.25, np.float32)})
        compvis.import_checkpoint(weights, path, tmp_path / "model")
        assert json.loads((tmp_path / "model" / "model.json").read_text())["scale"] == [4.0]


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_weights_of_other_types_are_read_and_written(dtype: Any, tmp_path: Path) -> None:
    tensors = files.random_tensors(files.write_yaml(tmp_path, files.TINY["low_res"]))
    narrow = {name: array.astype(dtype) for name, array in tensors.items()}
    wide, _ = imported(tmp_path / "wide", "low_res", narrow)
    same, _ = imported(tmp_path / "same", "low_res", {name: array.astype(np.float32) for name, array in narrow.items()})
    half, _ = imported(tmp_path / "half", "low_res", tensors, dtype=np.dtype(ml_dtypes.bfloat16))
    for name, array in wide.items():
        assert array.dtype == np.float32 and half[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, same[name])
        np.testing.assert_allclose(half[name].astype(np.float32), array, rtol=2**-7, atol=1e-3)


def test_every_tensor_that_does_not_fit_is_in_one_list(tmp_path: Path) -> None:
    tensors = files.random_tensors(files.write_yaml(tmp_path, files.TINY["text"]))
    del tensors[f"{UNET}out.0.weight"], tensors["first_stage_model.decoder.conv_out.bias"]
    tensors["cond_stage_model.transformer.norm.weight"] = np.zeros((3, 3), np.float32)
    tensors[f"{UNET}label_emb.0.0.weight"] = np.zeros((2, 2), np.float32)
    tensors["cond_stage_model.somethingelse"] = np.zeros(1, np.float32)
    with pytest.raises(UserError) as error:
        imported(tmp_path / "a", "text", tensors)
    message = str(error.value)
    assert "(5 tensors)" in message and "\n" not in message
    for line in (
        f"{UNET}out.0.weight is missing",
        "first_stage_model.decoder.conv_out.bias is missing",
        "cond_stage_model.transformer.norm.weight is [3, 3], not [64]",
        f"{UNET}label_emb.0.0.weight is not expected",
        "cond_stage_model.somethingelse is not expected",
    ):
        assert line in message
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["config.yaml", "model.safetensors"]


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
