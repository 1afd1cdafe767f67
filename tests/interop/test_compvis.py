"""Checkpoints of the paper's code: names and shapes, which tensors are read, and exact ways there and back."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError
from ldm_jax.interop import compvis
from ldm_jax.interop.compvis_yaml import read_yaml
from ldm_jax.interop.exporting import export_checkpoint
from ldm_jax.interop.torch_file import load_state_dict
from tests.interop import compvis_files as files
from tests.interop.compvis_files import changed

UNET, FIRST_STAGE, CONDITIONER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


@pytest.fixture(autouse=True)
def small_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    files.trace_once(monkeypatch)
    files.tiny_clip(monkeypatch)


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
    again = load_state_dict(tmp_path / "theirs" / "model.ckpt", "state_dict")
    assert again.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
    # and the YAML file that was written builds the same model again
    compvis.import_checkpoint(tmp_path / "theirs" / "model.ckpt", tmp_path / "theirs" / "config.yaml", tmp_path / "again")
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


def tokenizer_file(path: Path) -> Path:
    """A bare tokenizer.json, which says nothing of padding; like CLIP's, its first token is "!" and its last the end mark."""
    vocabulary = {"!": 0, "a": 1, "b": 2, "<|endoftext|>": 3}
    path.write_text(tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="!")).to_str())
    return path


@pytest.mark.parametrize(("kind", "filling"), [("clip", 3), ("openclip", 0), ("text and mask", 3)])
def test_texts_are_padded_as_the_encoders_class_pads_them(kind: str, filling: int, tmp_path: Path) -> None:
    tokens = tokenizer_file(tmp_path / "tokenizer.json")
    tensors = files.random_tensors(files.write_yaml(tmp_path, files.TINY[kind]))
    imported(tmp_path / "x", kind, tensors, tokenizer=str(tokens))
    made = Tokenizer.load(tmp_path / "x" / "model" / "conditioner" / "tokenizer.json", 8)
    assert made(["b"]).tolist() == [[2] + 7 * [filling]] and made.pad_id == filling
    folder = tmp_path / "folder"  # says otherwise of another class
    folder.mkdir()
    tokenizer_file(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "a"}))
    imported(tmp_path / "y", kind, tensors, tokenizer=str(folder))
    assert Tokenizer.load(tmp_path / "y" / "model" / "conditioner" / "tokenizer.json", 8).pad_id == filling


@pytest.mark.parametrize(("kind", "factor"), [("text", 2), ("unconditional", 2), ("label", 1), ("codebook", 2)])
def test_another_resolution_than_the_file_says(kind: str, factor: int, tmp_path: Path) -> None:
    tensors = files.random_tensors(files.write_yaml(tmp_path, files.TINY[kind]))
    plain, _ = imported(tmp_path / "plain", kind, tensors) if kind != "codebook" else ({}, [])
    path = files.write_yaml(tmp_path, files.TINY[kind])
    weights = files.write_checkpoint(tmp_path / "model.safetensors", tensors)
    compvis.import_checkpoint(weights, path, tmp_path / "model", resolution=24)
    assert json.loads((tmp_path / "model" / "model.json").read_text())["resolution"] == 24
    for name, array in plain.items():
        part, _, rest = name.partition("/")
        np.testing.assert_array_equal(load_file(tmp_path / "model" / part / "weights.safetensors")[rest], array)
    export_checkpoint(tmp_path / "model", tmp_path / "back")
    assert read_yaml(tmp_path / "back" / "config.yaml").resolution == 24
    for wrong in (0, -8, *([25] if factor > 1 else [])):
        with pytest.raises(UserError, match=f"a resolution of {wrong} is no multiple of {factor}"):
            compvis.import_checkpoint(weights, path, tmp_path / "wrong", resolution=wrong)


def test_openclip_of_a_folder_that_lacks_the_last_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers' Stable Diffusion 2 has the layers that are read, and skips none; theirs has one more, and skips it."""
    path = files.write_yaml(tmp_path, files.TINY["openclip"])
    tensors = files.random_tensors(path)
    weights = files.write_checkpoint(tmp_path / "model.safetensors", tensors)
    compvis.import_checkpoint(weights, path, tmp_path / "skips")
    shorter = files.TINY_OPENCLIP | {"depth": files.TINY_OPENCLIP["depth"] - 1, "skip_last": 0}
    with monkeypatch.context() as patched:
        patched.setattr("ldm_jax.interop.compvis_yaml.OPENCLIP_H14", shorter)
        patched.setattr("ldm_jax.interop.compvis_yaml._OPENCLIP_LAYERS", ("penultimate",))
        compvis.import_checkpoint(weights, path, tmp_path / "short")
    settings = json.loads((tmp_path / "short" / "model.json").read_text())["conditioning"]["text"]
    assert (settings["depth"], settings["skip_last"]) == (1, 0)
    for name in ("skips", "short"):
        export_checkpoint(tmp_path / name, tmp_path / f"{name} there")
    for file in ("model.ckpt", "config.yaml"):
        assert (tmp_path / "skips there" / file).read_bytes() == (tmp_path / "short there" / file).read_bytes()
    assert "layer: penultimate" in (tmp_path / "short there" / "config.yaml").read_text()


@pytest.mark.parametrize("kind", files.TINY)
def test_only_what_was_trained_to_do_without_its_condition_is_guided(kind: str, tmp_path: Path) -> None:
    info = files.networks(files.write_yaml(tmp_path, files.TINY[kind])).info
    guided = kind in ("label", "text", "clip", "openclip", "text and mask", "neighbors")
    assert info.get("sample", {}).get("guidance", 1.0) == (5.0 if guided else 1.0)


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
    with pytest.raises(UserError, match=r"\(1 tensors\): .*label_emb\.weight is not expected"):
        imported(tmp_path / "odd", "label", both | {f"{UNET}label_emb.weight": np.ones((2, 2), np.float32)})
    lost = "model_ema.diffusion_modelout2bias"
    with pytest.raises(UserError, match=f"{lost} is missing"):
        imported(tmp_path / "lost", "label", {k: v for k, v in both.items() if k != lost})


def test_moving_averages_of_an_autoencoder_alone(tmp_path: Path) -> None:
    path = files.write_yaml(tmp_path, files.TINY["codebook"])
    tensors = files.random_tensors(path)
    averages = {compvis.ema_name(name): array + 1 for name, array in tensors.items()}
    assert "model_ema.encoderconv_inweight" in averages
    extra = ("model_ema.decay", "model_ema.num_updates", "model_ema.lossdiscriminatormain0weight", "loss.discriminator.main.0.weight")
    weights = files.write_checkpoint(tmp_path / "x.safetensors", tensors | averages | dict.fromkeys(extra, np.ones(1, np.float32)))
    for name, ema, added in (("averaged", True, 1), ("plain", False, 0)):
        assert compvis.import_checkpoint(weights, path, tmp_path / name, ema) == []
        ours = load_file(tmp_path / name / "first_stage" / "weights.safetensors")
        np.testing.assert_array_equal(ours["quantize.embedding"], tensors["quantize.embedding.weight"] + np.float32(added))


@pytest.mark.parametrize("kind", ["text", "label", "low_res", "clip"])
def test_the_first_stage_stands_for_the_conditioner_of_masks_only(kind: str, tmp_path: Path) -> None:
    tensors = files.random_tensors(files.write_yaml(tmp_path, files.TINY[kind]))
    with pytest.raises(UserError, match=r"\(1 tensors\): .*cond_stage_model\.encoder\.conv_in\.weight is not expected"):
        imported(tmp_path / "odd", kind, tensors | {"cond_stage_model.encoder.conv_in.weight": np.ones(1, np.float32)})


def test_a_scale_that_the_checkpoint_holds(tmp_path: Path) -> None:
    path = files.write_yaml(tmp_path, changed("unconditional", "model", scale_by_std=True, scale_factor=0.5))
    tensors = files.random_tensors(path)
    with pytest.raises(UserError, match=r"has no scale_factor, which .* says it must hold"):
        compvis.import_checkpoint(files.write_checkpoint(tmp_path / "model.safetensors", tensors), path, tmp_path / "model")
    for wrong in (np.zeros(()), np.full(1, np.nan), np.full(2, 0.25), np.full((), -0.25)):
        odd = files.write_checkpoint(tmp_path / "odd.safetensors", tensors | {"scale_factor": wrong})
        with pytest.raises(UserError, match="has no scale_factor"):
            compvis.import_checkpoint(odd, path, tmp_path / "model")
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
