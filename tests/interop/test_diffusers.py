"""What a folder of diffusers says in JSON: the scheduler both ways, every field accounted for, and damage that is one error."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ldm_jax
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError
from ldm_jax.diffusion.grid import make_grid
from ldm_jax.diffusion.process import make_process
from ldm_jax.interop import fields
from ldm_jax.interop.architecture import Architecture
from ldm_jax.interop.diffusers import autoencoder_settings, unet_settings
from ldm_jax.interop.dit import dit_settings
from ldm_jax.interop.exporting import export_folder
from ldm_jax.interop.importing import build_networks
from ldm_jax.interop.pipelines import import_folder
from ldm_jax.interop.safetensors_file import open_weights
from ldm_jax.interop.scheduler import from_scheduler, to_scheduler
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.model_directory import unflatten
from tests import tiny
from tests.interop.test_published_keys import published_by_diffusers

Settings = dict[str, Any]
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDIM: Settings = {"_class_name": "DDIMScheduler", **SCALED, "clip_sample": False}
PNDM: Settings = {"_class_name": "PNDMScheduler", **SCALED, "skip_prk_steps": True}
EULER: Settings = {"_class_name": "EulerDiscreteScheduler", **SCALED}
SD15 = PNDM | {"_diffusers_version": "0.6.0", "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1}
SD15 |= {"trained_betas": None, "clip_sample": False}  # as it was released, a field of another class included

# What a file says, in which pipeline, and what it is here: sampler, spacing, and what is kept.
SPACINGS: dict[str, tuple[Settings, str, tuple[str, str, Settings]]] = {
    "DDIM, silent": (DDIM, "LDMPipeline", ("ddim", "leading", {})),
    "DDIM, as the paper's code": (DDIM | {"steps_offset": 1, "set_alpha_to_one": False}, "LDMPipeline", ("ddim", "legacy_ldm", {})),
    "DDIM in Stable Diffusion": (DDIM | {"set_alpha_to_one": False}, "StableDiffusionPipeline", ("ddim", "legacy_ldm", {})),
    "DDIM, trailing": (DDIM | {"timestep_spacing": "trailing"}, "LDMPipeline", ("ddim", "trailing", {})),
    "PNDM, silent on its end": (PNDM | {"steps_offset": 1}, "LDMPipeline", ("plms", "legacy_ldm", {})),
    "Stable Diffusion 1.5": (SD15, "StableDiffusionPipeline", ("plms", "legacy_ldm", {})),
}
NOTED: dict[str, tuple[Settings, str, Settings]] = {
    "DDIM that ends clean": (DDIM | {"steps_offset": 1}, "set_alpha_to_one=True beside 'legacy_ldm'", {"set_alpha_to_one": True}),
    "DDIM that ends early": (DDIM | {"set_alpha_to_one": False}, "set_alpha_to_one=False beside 'leading'", {"set_alpha_to_one": False}),
    "PNDM, silent": (PNDM, "set_alpha_to_one=False beside 'leading'", {"set_alpha_to_one": False}),
    "DDIM, late": (DDIM | {"steps_offset": 2, "set_alpha_to_one": False}, "steps_offset=2", {"steps_offset": 2}),
    "DDIM, linspace": (DDIM | {"timestep_spacing": "linspace"}, "steps past the times", {}),
    "DDIM, silent on clipping": ({"_class_name": "DDIMScheduler"}, "clip_sample", {}),
    "PNDM with Runge-Kutta": (PNDM | {"skip_prk_steps": False, "steps_offset": 1}, "is a PNDMScheduler", {}),
    "Euler": (EULER, "EulerDiscreteScheduler.*spacing 'linspace'", {}),
    "a flow": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "does not spread its times", {}),
}


@pytest.mark.parametrize("name", SPACINGS)
def test_schedulers_that_have_a_counterpart(name: str) -> None:
    config, pipeline, expected = SPACINGS[name]
    found = from_scheduler(config, pipeline)
    assert (found.sample["sampler"], found.sample["spacing"], found.kept) == expected
    assert found.notes == []


@pytest.mark.parametrize("name", NOTED)
def test_what_ours_draws_otherwise_is_told_and_kept(name: str) -> None:
    config, note, kept = NOTED[name]
    found = from_scheduler(config)
    (told,) = found.notes
    assert re.search(note, told)
    assert found.kept == kept
    if found.diffusion["process"] == "discrete" and found.sample["spacing"] != "linspace":
        again = to_scheduler(found.diffusion, found.sample, found.kept)
        assert {field: again[field] for field in kept} == kept


def test_fields_that_a_class_does_not_read_say_nothing() -> None:
    assert from_scheduler(EULER | {"clip_sample": True, "set_alpha_to_one": False, "thresholding": True}) == from_scheduler(EULER)
    assert not from_scheduler(SD15 | {"rescale_betas_zero_snr": True}).diffusion["zero_terminal_snr"]


def test_the_times_of_the_papers_code() -> None:
    found = from_scheduler(SD15, "StableDiffusionPipeline")
    grid = make_grid(make_process("discrete", schedule="linear", start=0.00085, end=0.012), found.sample["spacing"], 5)
    np.testing.assert_array_equal(grid.t, [801, 601, 401, 201, 1, 0])


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_schedules_pass_both_ways(own: bool, rescaled: bool) -> None:
    betas = [0.001 * 1.1**i for i in range(30)]
    said = {"trained_betas": betas, "num_train_timesteps": 30} if own else SCALED
    config = {"_class_name": "DDIMScheduler", "clip_sample": False, **said, "rescale_betas_zero_snr": rescaled}
    found = from_scheduler(config | {"prediction_type": "v_prediction"})
    again = to_scheduler(found.diffusion, found.sample, found.kept)
    assert {field: again[field] for field in config} == config
    settings = {field: value for field, value in found.diffusion.items() if field not in ("process", "prediction")}
    process = make_process("discrete", **settings | {"betas": tuple(settings.get("betas", ()))})
    roots = np.sqrt(np.cumprod(1 - (np.array(betas) if own else np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)))
    if rescaled:  # arXiv 2305.08891, algorithm 1
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    np.testing.assert_allclose(process.alpha(np.arange(process.num_steps)), roots, atol=1e-12)


def test_a_schedule_without_a_name_there_is_written_as_its_betas() -> None:
    group = {"process": "discrete", "schedule": "sqrt", "start": None, "end": None, "num_steps": 20, "prediction": "eps"}
    written = to_scheduler(group, {"spacing": "trailing"}, {})
    read = from_scheduler(written).diffusion
    np.testing.assert_array_equal(read["betas"], written["trained_betas"])
    assert read["schedule"] == "given"


REFUSED: dict[str, tuple[Settings, str]] = {
    "an EDM": ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "'EDMEulerScheduler' has no counterpart"),
    "a distilled model's": (DDIM | {"_class_name": "LCMScheduler"}, "'LCMScheduler' has no counterpart"),
    "no class": ({"beta_start": 0.1}, "'None' has no counterpart"),
    "a class that is none": ({"_class_name": ["DDIMScheduler"]}, "has no counterpart"),
    "an unknown spacing": (DDIM | {"timestep_spacing": "quadratic"}, "timestep_spacing='quadratic'"),
    "an unknown schedule": (DDIM | {"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
    "an unknown prediction": (DDIM | {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
    "thresholds": (DDIM | {"thresholding": True}, "thresholding=True"),
    "a flow in disguise": (SCALED | {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas=True"),
    "betas out of range": (DDIM | {"trained_betas": [2.0] * 1000}, "make no schedule"),
    "betas of another number": (DDIM | {"trained_betas": [0.1]}, "1 betas for"),
    "ends that are swapped": (DDIM | {"beta_start": 0.9}, "make no schedule"),
    "a number that is a word": (DDIM | {"num_train_timesteps": "1000"}, "num_train_timesteps='1000' makes no sense"),
    "no times": (DDIM | {"num_train_timesteps": 0}, "num_train_timesteps=0 makes no sense"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_schedulers_are_refused(name: str) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(UserError, match=reason):
        from_scheduler(config)


def of_class(name: str, made: str) -> Settings:
    return published_by_diffusers(name)[0] | {"_class_name": made}


NETWORKS: dict[str, tuple[Any, Settings]] = {
    "UNet2DConditionModel": (unet_settings, of_class("diffusers_unet2dcond_sd15", "UNet2DConditionModel")),
    "UNet2DModel": (unet_settings, of_class("diffusers_unet2d_ldm_celebahq256", "UNet2DModel")),
    "AutoencoderKL": (autoencoder_settings, of_class("diffusers_autoencoderkl_f8", "AutoencoderKL")),
    "VQModel": (autoencoder_settings, of_class("diffusers_vqmodel_f4", "VQModel")),
    "DiTTransformer2DModel": (dit_settings, of_class("diffusers_dit_xl2", "DiTTransformer2DModel")),
}
# Stable Diffusion 2.1 and its inpainting model; files of old, that leave most out; DiT before its class had a name of its own.
SD21 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True, "upcast_attention": True}
SD21 |= {"only_cross_attention": [False] * 4, "sample_size": 96, "_name_or_path": "x", "_commit_hash": None}
OLD = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "out_channels", "in_channels", "norm_eps")
OLD_DIT = {"cross_attention_dim": None, "num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False}
OLD_DIT |= {"_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "attention_type": "default", "caption_channels": None}


def test_configurations_that_were_released_are_read() -> None:
    unet, autoencoder, dit = (NETWORKS[name][1] for name in ("UNet2DConditionModel", "AutoencoderKL", "DiTTransformer2DModel"))
    assert unet_settings(unet | SD21)["head_channels"] == 64
    assert unet_settings(unet | {"in_channels": 9})["out_channels"] == 4
    old = {name: unet[name] for name in OLD} | {"attention_head_dim": 8, "_class_name": "UNet2DConditionModel"}
    assert unet_settings(old) == unet_settings(unet)
    assert autoencoder_settings({name: autoencoder[name] for name in (*OLD[:-1], "latent_channels")}) == autoencoder_settings(autoencoder)
    assert dit_settings(dit | OLD_DIT) == dit_settings(dit)


CHANGED: dict[str, tuple[str, Settings, str]] = {
    "another norm": ("UNet2DModel", {"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift='ada_group' has no counterpart"),
    "depths of its own on the way up": (
        "UNet2DConditionModel",
        {"reverse_transformer_layers_per_block": [1, 1, 1, 2]},
        "reverse_transformer_layers_per_block",
    ),
    "a projected context": ("UNet2DConditionModel", {"encoder_hid_dim": 64}, "encoder_hid_dim=64 has no counterpart"),
    "a width of the time of its own": ("UNet2DModel", {"time_embedding_dim": 64}, "time_embedding_dim=64 .* would be 896"),
    "attention to the context alone": ("UNet2DConditionModel", {"only_cross_attention": [True, False]}, "only_cross_attention"),
    "codes instead of latents": ("VQModel", {"lookup_from_codebook": True}, "lookup_from_codebook=True"),
    "a spatial norm": ("VQModel", {"norm_type": "spatial"}, "norm_type='spatial'"),
    "stretched positions": ("DiTTransformer2DModel", {"interpolation_scale": 2}, "interpolation_scale=2"),
    "levels that are too few": ("AutoencoderKL", {"block_out_channels": [128, 256]}, "are of 2, 4, 4 levels"),
    "no norm": ("UNet2DConditionModel", {"norm_num_groups": None}, "norm_num_groups=None makes no sense"),
    **{f"{name}, a field of tomorrow": (name, {"new\nfield": 1}, "new field=1 has no counterpart here") for name in NETWORKS},
}


@pytest.mark.parametrize("name", CHANGED)
def test_nothing_is_guessed(name: str) -> None:
    made, changed, reason = CHANGED[name]
    read, config = NETWORKS[made]
    with pytest.raises(UserError, match=reason) as error:
        read(config | changed)
    assert "\n" not in str(error.value)
    assert read(config | {"new": None}) == read(config)


STRANGE: list[Any] = [None, True, 0, -1, 1, 3.5, 10**30, float("nan"), float("inf"), "x", "", [], [0], [[]], ["x", 1], {}, {"a": []}]


@pytest.mark.parametrize("name", NETWORKS)
def test_strange_values_are_read_or_refused(name: str) -> None:
    read, config = NETWORKS[name]
    refused = 0
    for field in config:
        for value in STRANGE:
            try:
                read(config | {field: value})
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 5 * len(config)


def test_strange_values_of_schedulers_are_read_or_refused() -> None:
    refused = 0
    for field in ("trained_betas", "set_alpha_to_one", "thresholding", "num_train_timesteps", "steps_offset", *DDIM):
        for value in STRANGE:
            try:
                from_scheduler(DDIM | {field: value})
            except UserError:
                refused += 1
    assert refused > 60


KL: Settings = {"kind": "kl", "channels": 8, "channel_mult": (1, 2, 2), "num_res_blocks": 1, "attention_levels": (), "norm_groups": 4}
KL |= {"z_channels": 4, "latent_channels": 4}
UNET: Settings = {"kind": "unet", "channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_levels": (1, 2)}
UNET |= {"num_heads": 2, "head_channels": 0, "transformer_depth": 1, "norm_groups": 8}
CLIP: Settings = {"kind": "clip", "vocab_size": 300, "max_length": 12, "width": 16, "depth": 2, "num_heads": 2, "activation": "gelu"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline, written here."""
    root = tmp_path_factory.mktemp("pipeline")
    what = Architecture(KL, UNET, {"text": CLIP}, {}, sample={"spacing": "legacy_ldm"}, resolution=32)
    networks = build_networks(what, 0.0, 0.7, Tokenizer.train(tiny.CAPTIONS, 280, 12), {})
    leaves = {name: np.full(value.shape, 0.1, np.float32) for name, value in networks.leaves.items()}
    LatentDiffusion(networks.first_stage, networks.denoiser, {"conditioner": {}} | unflatten(leaves), networks.info).save(root / "model")
    assert export_folder(root / "model", root / "folder") == "StableDiffusionPipeline"
    return root / "folder"


def test_a_pipeline_is_read_again(written: Path, tmp_path: Path) -> None:
    assert import_folder(written, tmp_path / "model") == []
    assert ldm_jax.load(tmp_path / "model").info["sample"]["spacing"] == "legacy_ldm"


DEEP = "[" * 100_000
TEXTS = {"nothing": b"", "no JSON": b"{", "no object": b"[]", "no text": b"\xff\xfe{", "depth": DEEP.encode(), "size": b"{}" + b" " * 2**21}
FILES = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
FILES += ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json")


def refused(folder: Path, output: Path) -> str:
    with pytest.raises(UserError) as error:
        import_folder(folder, output)
    assert "\n" not in str(error.value)
    assert not output.exists()
    return str(error.value)


@pytest.mark.parametrize("file", FILES)
def test_files_that_are_no_json_are_one_error(file: str, written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "folder"))
    for content in TEXTS.values():
        (folder / file).write_bytes(content)
        if content != TEXTS["size"] or "tokenizer" not in file:
            refused(folder, tmp_path / "model")


DAMAGED: dict[str, tuple[str, Settings, str]] = {
    "components that are lists": ("model_index.json", {"unet": ["diffusers", ["x"]]}, "are no components"),
    "components elsewhere": ("model_index.json", {"../unet": ["diffusers", "UNet2DConditionModel"]}, "are no components"),
    "a pipeline that is a list": ("model_index.json", {"_class_name": [1], "vae": [None, None]}, "no pipeline of latent diffusion"),
    "no width": ("unet/config.json", {"block_out_channels": []}, "makes no sense|levels"),
    "no heads": ("unet/config.json", {"attention_head_dim": 0}, "attention_head_dim=0"),
    "a million layers": ("unet/config.json", {"layers_per_block": 10**6}, "layers_per_block=1000000"),
    "a size that is a list of lists": ("unet/config.json", {"sample_size": [[8], [8]]}, "does not say"),
    "no size": ("unet/config.json", {"sample_size": 0}, "sample_size 0"),
    "no scale": ("vae/config.json", {"scaling_factor": 0}, "scaling_factor=0"),
    "an endless scale": ("vae/config.json", {"scaling_factor": float("inf")}, "scaling_factor=inf"),
    "text of no width": ("text_encoder/config.json", {"hidden_size": 0, "intermediate_size": 0}, "does not say|makes no sense"),
    "text of a width that is a word": ("text_encoder/config.json", {"hidden_size": "x"}, "."),
    "text of no layers": ("text_encoder/config.json", {"num_hidden_layers": -2}, "depth=-2"),
    "text within a list": ("text_encoder/config.json", {"text_config": [1]}, "lacks vocab_size"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_folders_are_one_error(name: str, written: Path, tmp_path: Path) -> None:
    file, changed, reason = DAMAGED[name]
    folder = Path(shutil.copytree(written, tmp_path / "folder"))
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changed))
    assert re.search(reason, refused(folder, tmp_path / "model"))


def test_an_index_of_weights_that_is_none_is_one_error(tmp_path: Path) -> None:
    for content in (DEEP, "[]", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": 1, "b": "c"}}'):
        (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(content)
        with pytest.raises(UserError, match="is no index of weight files"):
            open_weights(tmp_path)


PADDING: dict[str, dict[str, Settings]] = {
    "as saved": {},
    "another in the configuration": {"tokenizer_config.json": {"pad_token": "[EOS]"}},
    "another in the old list": {"special_tokens_map.json": {"pad_token": "[EOS]"}},
    "two others": {"tokenizer_config.json": {"pad_token": "[EOS]"}, "special_tokens_map.json": {"pad_token": "[BOS]"}},
    "on the left": {"tokenizer_config.json": {"padding_side": "left"}},
}


@pytest.mark.parametrize("name", PADDING)
def test_padding_is_what_transformers_pads_with(name: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    Tokenizer.train(tiny.CAPTIONS, 280, 12).save_pretrained(tmp_path)
    for file, said in PADDING[name].items():
        before = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
        (tmp_path / file).write_text(json.dumps(before | said))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = ["", "a red circle", "a blue square " * 9]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=12).input_ids
    found = Tokenizer.pretrained(str(tmp_path), 12)
    np.testing.assert_array_equal(found(texts), expected)
    assert found.pad_id == theirs.pad_token_id


def test_a_file_is_understood_or_named() -> None:
    for error in (KeyError("a\nb"), ZeroDivisionError(), RecursionError(), TypeError("x" * 10_000)):
        with pytest.raises(UserError, match=r"^file does not say what it should: ") as raised, fields.understood("file"):
            raise error
        assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"^as it was$"), fields.understood("file"):
        raise UserError("as it was")
