"""Whole pipelines against diffusers: what is written runs there and draws what ours draws, and what they save passes both ways."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import ldm_jax
from ldm_jax import latent_diffusion, stages
from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError
from ldm_jax.diffusion.samplers import initial_noise
from ldm_jax.interop.architecture import Architecture
from ldm_jax.interop.exporting import export_folder
from ldm_jax.interop.importing import build_networks
from ldm_jax.interop.pipelines import import_folder
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.model_directory import unflatten
from tests import tiny
from tests.peers.models import assert_same_network, randomised, to_numpy, to_torch

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("quick_compilation")]

Settings = dict[str, Any]
SEED, STEPS, GUIDANCE = 3, 5, 3.0
PROMPTS = ["a red circle", "a green ring, " * 40]


KL: Settings = {"kind": "kl", "channels": 8, "channel_mult": (1, 2, 2), "num_res_blocks": 1, "attention_levels": (), "norm_groups": 4}
KL |= {"z_channels": 4, "latent_channels": 4}
DEEP = {"channel_mult": (1, 1, 2, 2)}  # by 8
VQ = KL | {"kind": "vq", "z_channels": 3, "latent_channels": 3, "codebook_size": 16}
PLAIN: Settings = {"kind": "unet", "channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_levels": (2,)}
PLAIN |= {"num_heads": 0, "head_channels": 8, "transformer_depth": 0, "norm_groups": 8}
CROSS = PLAIN | {"attention_levels": (1, 2), "num_heads": 2, "head_channels": 0, "transformer_depth": 1}
DIT: Settings = {"kind": "dit", "width": 24, "depth": 2, "num_heads": 3, "patch_size": 2, "learn_sigma": True, "legacy_frequencies": True}
LABEL = {"num_classes": 1000, "null_class": True, "width": 24, "to": "vector"}
BERT: Settings = {"kind": "transformer", "max_length": 77, "width": 16, "depth": 2, "num_heads": 2, "head_dim": 8}
CLIP: Settings = {"kind": "clip", "vocab_size": 300, "max_length": 12, "width": 16, "depth": 2, "num_heads": 2, "activation": "gelu"}


def architecture(
    first_stage: Settings, denoiser: Settings, diffusion: Settings | None = None, spacing: str = "trailing", **conditioning: Settings
) -> Architecture:
    return Architecture(first_stage, denoiser, conditioning, diffusion or {}, sample={"spacing": spacing}, resolution=32)


def random_leaf(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """As `models.randomised`; pictures are small enough to lie within the range, and the encoder's variance is next to nothing."""
    values = rng.normal(size=shape)
    if "embedding" not in name:
        values *= 0.3 if len(shape) < 2 else np.prod(shape[:-1]) ** -0.5
    if name == "first_stage/quant_conv/bias" and shape[0] == 8:
        values[4:] -= 30
    values = values * (0.3 if name.startswith("first_stage/conv_out") else 1) + name.endswith("/scale")
    return values.astype(np.float32)


def save(path: Path, what: Architecture, scale: float = 0.7) -> Path:
    """A model directory, every tensor random."""
    text = what.conditioning.get("text")
    tokens = Tokenizer.train(tiny.CAPTIONS, 280, text.get("max_length", 77)) if text else None
    networks = build_networks(what, 0.0, scale, tokens, {})
    rng = np.random.default_rng(0)
    leaves = {name: random_leaf(name, value.shape, rng) for name, value in networks.leaves.items()}
    LatentDiffusion(networks.first_stage, networks.denoiser, {"conditioner": {}} | unflatten(leaves), networks.info).save(path)
    return path


@pytest.fixture
def floats(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Samples are what the decoder gives, and are not rounded."""
    monkeypatch.setattr(stages, "to_uint8", lambda images: images)
    monkeypatch.setattr(latent_diffusion, "generate_jit", jax.jit(lambda *a: stages.generate(*a), static_argnums=(0, 1, 2, 3)))
    return monkeypatch


def opened(folder: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(path: Path, what: Architecture, name: str, scale: float = 0.7) -> tuple[LatentDiffusion, Any]:
    """A model, and what was written of it as the pipeline of that name."""
    save(path / "model", what, scale)
    assert export_folder(path / "model", path / "folder") == name
    pipe = opened(path / "folder")
    assert type(pipe).__name__ == name
    return ldm_jax.load(path / "model"), pipe


def assert_same_pictures(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Ours from the decoder, theirs in [0, 1]: equal, and pictures that say something."""
    ours = ours / 2 + 0.5
    assert ours.shape == theirs.shape
    assert ours.std() > 0.05
    assert np.abs(ours[0] - ours[1]).max() > 0.05
    assert np.mean((ours < 0) | (ours > 1)) < 0.1
    np.testing.assert_allclose(np.clip(ours, 0, 1), theirs, rtol=0, atol=2e-4)  # of a level of 1/255, a twentieth


V = {"prediction": "v", "start": None, "end": None}
COSINE = {"schedule": "cosine", "start": None, "end": None, "prediction": "x0"}
TEXT_MODELS: dict[str, tuple[str, Architecture]] = {
    "the paper's": ("LDMTextToImagePipeline", architecture(KL | DEEP, CROSS, text=BERT)),
    "the paper's, its times from 0": ("LDMTextToImagePipeline", architecture(KL | DEEP, CROSS, spacing="leading", text=BERT)),
    "VQ and CLIP": ("LDMTextToImagePipeline", architecture(VQ | DEEP, CROSS, text=CLIP | {"max_length": 77})),
    "Stable Diffusion 1": ("StableDiffusionPipeline", architecture(KL, CROSS, text=CLIP)),
    "Stable Diffusion 2": ("StableDiffusionPipeline", architecture(KL, CROSS, V, text=CLIP | {"skip_last": 1})),
    "the paper's, by 4, cosine schedule": ("StableDiffusionPipeline", architecture(KL, CROSS, COSINE, text=BERT | {"max_length": 9})),
}


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_text_pipelines_draw_what_ours_draw(name: str, tmp_path: Path, floats: Any) -> None:
    made, what = TEXT_MODELS[name]
    model, pipe = both(tmp_path, what, made)
    latents = to_torch(np.asarray(initial_noise(SEED, np.arange(2), model.latent_shape)))
    theirs = pipe(PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=latents, output_type="np").images
    ours = model.sample(prompts=PROMPTS, steps=STEPS, guidance=GUIDANCE, seed=SEED)
    assert_same_pictures(ours, theirs)
    assert np.abs(ours - model.sample(prompts=["", ""], steps=STEPS, guidance=GUIDANCE, seed=SEED)).max() > 0.02  # texts matter


def torchs_noise(model: LatentDiffusion, patch: pytest.MonkeyPatch) -> Any:
    """Ours starts from what this generator gives theirs."""
    height, width, channels = model.latent_shape
    noise = torch.randn((2, channels, height, width), generator=torch.Generator().manual_seed(SEED))
    patch.setattr(latent_diffusion, "initial_noise", lambda seed, index, shape: jnp.asarray(to_numpy(noise))[index])
    return torch.Generator().manual_seed(SEED)


PICTURES = np.random.default_rng(4).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
OTHER_MODELS: dict[str, tuple[Architecture, float, Settings, Settings]] = {
    "LDMPipeline": (architecture(VQ, PLAIN), 0.7, {"num": 2}, {"batch_size": 2}),
    "LDMSuperResolutionPipeline": (
        architecture(VQ, PLAIN, low_res={}),
        1.0,
        {"low_res": PICTURES[:, :8, :8]},
        {"image": to_torch(PICTURES[:, :8, :8] / np.float32(127.5) - 1)},
    ),
    "DiTPipeline": (
        architecture(KL, DIT, {"schedule": "linear_beta", "start": 1e-4, "end": 0.02}, label=LABEL),
        0.7,
        {"label": [3, 999], "guidance": GUIDANCE},
        {"class_labels": [3, 999], "guidance_scale": GUIDANCE},
    ),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_pipelines_draw_what_ours_draw(name: str, tmp_path: Path, floats: Any) -> None:
    what, scale, inputs, theirs = OTHER_MODELS[name]
    model, pipe = both(tmp_path, what, name, scale)
    images = pipe(num_inference_steps=STEPS, generator=torchs_noise(model, floats), output_type="np", **theirs).images
    assert_same_pictures(model.sample(steps=STEPS, seed=SEED, **inputs), images)


def test_inpainting_draws_what_ours_draws_and_passes_both_ways(tmp_path: Path, floats: Any) -> None:
    what = architecture(KL, CROSS, text=CLIP, mask={"style": "sd", "shrink": "nearest"})
    model, pipe = both(tmp_path, what, "StableDiffusionInpaintPipeline")
    masks = np.zeros((2, 32, 32), np.float32)
    masks[0, 8:24, 4:20] = masks[1, :, 16:] = 1
    latents = to_torch(np.asarray(initial_noise(SEED, np.arange(2), model.latent_shape)))
    given = {"image": to_torch(PICTURES / np.float32(255)), "mask_image": torch.from_numpy(masks)[:, None]}
    theirs = pipe(PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=latents, output_type="np", **given).images
    settings: Settings = {"prompts": PROMPTS, "steps": STEPS, "guidance": GUIDANCE, "seed": SEED}
    ours = model.sample(image=PICTURES, mask=masks, **settings)
    np.testing.assert_array_equal(ours[masks == 0], PICTURES[masks == 0])  # theirs are what was decoded there
    shown = masks[..., None] > 0
    assert_same_pictures(np.where(shown, ours, 0), np.where(shown, theirs, 0.5))
    other = model.sample(image=255 - PICTURES, mask=masks, **settings)
    assert np.abs(ours - other)[np.broadcast_to(shown, ours.shape)].max() > 0.02
    assert_passes_both_ways(pipe, tmp_path / "again")


def clip_tokenizer() -> Any:
    """As Stable Diffusion's, of single bytes and one word; it pads with the mark of the end."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[("r", "e"), ("re", "d</w>")], model_max_length=77)


def bert_tokenizer() -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "red", "##d", "circle", "ring", "u", "##n", "##i"]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=77)


def scheduler(kind: Any = diffusers.DDIMScheduler, **settings: Any) -> Any:
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **settings)


AE: Settings = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
AE |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
UNET: Settings = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
CROSS_UNET = UNET | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
CROSS_UNET |= {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "attention_head_dim": 4}
PLAIN_UNET = UNET | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
PLAIN_UNET |= {"attention_head_dim": 8, "out_channels": 3}
NO_CLIP = {"clip_sample": False}


def ldm_text() -> Any:
    tokens = bert_tokenizer()
    heads = {"encoder_attention_heads": 2, "head_dim": 8}
    sizes = {"vocab_size": len(tokens), "d_model": 16, "encoder_ffn_dim": 64, "encoder_layers": 2} | heads
    eight = {"block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return diffusers.LDMTextToImagePipeline(
        vqvae=randomised(diffusers.AutoencoderKL(**AE | eight)),
        bert=randomised(LDMBertModel(LDMBertConfig(**sizes))),
        tokenizer=tokens,
        unet=randomised(diffusers.UNet2DConditionModel(**CROSS_UNET)),
        scheduler=scheduler(**NO_CLIP, steps_offset=1, set_alpha_to_one=False),
    )


def stable_diffusion() -> Any:
    tokens = clip_tokenizer()
    sizes = {"vocab_size": len(tokens), "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return diffusers.StableDiffusionPipeline(
        vae=randomised(diffusers.AutoencoderKL(**AE, scaling_factor=0.3)),
        text_encoder=randomised(CLIPTextModel(CLIPTextConfig(**sizes))),
        tokenizer=tokens,
        unet=randomised(diffusers.UNet2DConditionModel(**CROSS_UNET, use_linear_projection=True)),
        scheduler=scheduler(diffusers.PNDMScheduler, prediction_type="v_prediction", skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def vq() -> Any:
    return randomised(diffusers.VQModel(**AE | {"latent_channels": 3, "vq_embed_dim": 3, "num_vq_embeddings": 16}, scaling_factor=1.0))


def unet(in_channels: int) -> Any:
    return randomised(diffusers.UNet2DModel(**PLAIN_UNET, in_channels=in_channels))


def own_betas(**more: Any) -> Any:
    betas = list(np.linspace(0.01, 0.3, 40) ** 1.5)
    how: Settings = {"num_train_timesteps": 40, "timestep_spacing": "trailing", "prediction_type": "v_prediction", **NO_CLIP}
    return diffusers.DDIMScheduler(trained_betas=betas, **how, **more)


def dit() -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8}
    network = randomised(diffusers.DiTTransformer2DModel(**sizes))
    for block in network.transformer_blocks[1:]:  # as in all that was released
        block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    return diffusers.DiTPipeline(network, randomised(diffusers.AutoencoderKL(**AE)), diffusers.DDIMScheduler(**NO_CLIP))


PIPELINES: dict[str, Any] = {
    "LDMTextToImage": ldm_text,
    "StableDiffusion": stable_diffusion,
    "LDM": lambda: diffusers.LDMPipeline(vq(), unet(3), scheduler(timestep_spacing="trailing", **NO_CLIP)),
    "LDMSuperResolution": lambda: diffusers.LDMSuperResolutionPipeline(vq(), unet(6), scheduler(prediction_type="sample", **NO_CLIP)),
    "LDM, betas of its own": lambda: diffusers.LDMPipeline(vq(), unet(3), own_betas(rescale_betas_zero_snr=False)),
    "LDM, no signal at the end": lambda: diffusers.LDMPipeline(vq(), unet(3), own_betas(rescale_betas_zero_snr=True)),
    "DiT": dit,
}
MEANING = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing")
MEANING += ("steps_offset", "set_alpha_to_one", "trained_betas", "rescale_betas_zero_snr")
TEXTS = ["", "red", "a red circle", "ring of a red circle " * 40, "ünï 漢字 🙂", "RED  ring\n!"]


def read(pipe: Any) -> Any:
    """The tokens of texts, as pipelines take them."""
    length = pipe.tokenizer.model_max_length
    return pipe.tokenizer(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


def assert_passes_both_ways(pipe: Any, path: Path, **how: Any) -> None:
    """Their folder, our model directory, and their folder again: the same networks, process and tokens."""
    pipe.save_pretrained(path / "theirs", **how)
    import_folder(path / "theirs", path / "model")
    assert export_folder(path / "model", path / "ours") == type(pipe).__name__
    again = opened(path / "ours")
    assert again.components.keys() == pipe.components.keys()
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and hasattr(part, "save_config"):
            # Of an autoencoder the size is that of the pipeline's pictures; of attention, no number of groups means that of the rest.
            assert_same_network(getattr(again, name), part, but=("sample_size",) if "vae" in name else ("attn_norm_num_groups",))
        elif isinstance(part, torch.nn.Module):
            state = getattr(again, name).state_dict()
            assert all(torch.equal(state[key], value) for key, value in part.state_dict().items() if "to_logits" not in key)
    configs = [{name: found.scheduler.config.get(name, False) for name in MEANING} for found in (again, pipe)]
    assert configs[0] == configs[1]
    process = ldm_jax.load(path / "model").denoiser.process
    np.testing.assert_allclose(process.alpha(np.arange(process.num_steps)) ** 2, pipe.scheduler.alphas_cumprod, rtol=2e-5, atol=1e-9)
    if hasattr(pipe, "tokenizer"):
        assert again.tokenizer.model_max_length == pipe.tokenizer.model_max_length
        assert torch.equal(read(again), read(pipe))
        states = [(getattr(p, "bert", None) or p.text_encoder)(read(pipe))[0] for p in (again, pipe)]
        assert torch.equal(*states)


@pytest.mark.parametrize("name", PIPELINES)
def test_their_pipelines_pass_both_ways(name: str, tmp_path: Path) -> None:
    how = {"max_shard_size": "20KB"} if name == "StableDiffusion" else {}
    assert_passes_both_ways(PIPELINES[name](), tmp_path, **how)


SCHEDULERS: dict[str, Any] = {
    "StableDiffusion": lambda: scheduler(**NO_CLIP, steps_offset=1, set_alpha_to_one=False),
    "StableDiffusion, what it forces": lambda: scheduler(set_alpha_to_one=False),
    "StableDiffusion, PNDM": lambda: scheduler(diffusers.PNDMScheduler, skip_prk_steps=True, steps_offset=1),
    "LDMTextToImage": lambda: scheduler(**NO_CLIP, steps_offset=1, set_alpha_to_one=False),
    "LDMTextToImage, times from 0": lambda: scheduler(**NO_CLIP),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_imported_pipelines_draw_what_theirs_draw(name: str, tmp_path: Path, floats: Any) -> None:
    pipe = PIPELINES[name.partition(",")[0]]()
    pipe.register_modules(scheduler=SCHEDULERS[name]())
    autoencoder = pipe.vae if hasattr(pipe, "vae") else pipe.vqvae
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight.mul_(0.3)
        autoencoder.decoder.conv_out.bias.mul_(0.3)
    pipe.save_pretrained(tmp_path / "theirs")
    assert import_folder(tmp_path / "theirs", tmp_path / "model") == []
    model, pipe = ldm_jax.load(tmp_path / "model"), opened(tmp_path / "theirs")
    latents = to_torch(np.asarray(initial_noise(SEED, np.arange(2), model.latent_shape)))
    height, width = (side * autoencoder_factor(model) for side in model.latent_shape[:2])
    for steps in (5, 20):
        how: Settings = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "latents": latents, "height": height, "width": width}
        theirs = pipe(PROMPTS, output_type="np", **how).images
        assert_same_pictures(model.sample(prompts=PROMPTS, steps=steps, guidance=GUIDANCE, seed=SEED), theirs)


def autoencoder_factor(model: LatentDiffusion) -> int:
    return model.first_stage.network.factor


def test_a_pipeline_that_moves_the_times_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path / "model", architecture(KL, CROSS, spacing="leading", text=CLIP))
    export_folder(tmp_path / "model", tmp_path / "folder")
    assert "one later" in caplog.text


@pytest.mark.parametrize("make", [lambda: diffusers.AutoencoderKL(**AE, scaling_factor=0.3, shift_factor=0.2), vq], ids=["KL", "VQ"])
def test_autoencoders_alone_pass_both_ways(make: Any, tmp_path: Path) -> None:
    network = randomised(make())
    network.save_pretrained(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "model")
    assert export_folder(tmp_path / "model", tmp_path / "ours") == type(network).__name__
    assert_same_network(type(network).from_pretrained(tmp_path / "ours"), network)


def test_files_of_older_tokenizers_are_read(tmp_path: Path) -> None:
    """Words and merges, from before `tokenizer.json`."""
    for name, files in (("StableDiffusion", ("vocab.json", "merges.txt")), ("LDMTextToImage", ("vocab.txt",))):
        pipe = PIPELINES[name]()
        pipe.save_pretrained(tmp_path / name)
        folder = tmp_path / name / "tokenizer"
        words = sorted(vocabulary := pipe.tokenizer.get_vocab(), key=vocabulary.__getitem__)
        texts = {"vocab.json": json.dumps(vocabulary), "merges.txt": "#version: 0.2\nr e\nre d</w>\n", "vocab.txt": "\n".join(words)}
        (folder / "tokenizer.json").unlink()
        for file in files:
            (folder / file).write_text(texts[file])
        assert import_folder(tmp_path / name, tmp_path / "model") == []
        (text,) = ldm_jax.load(tmp_path / "model").denoiser.conditioning.conditioners
        np.testing.assert_array_equal(text.tokenizer(TEXTS), read(pipe))


PADDING: dict[str, dict[str, Any]] = {
    "as saved": {},
    "another in the configuration": {"tokenizer_config.json": {"pad_token": "!"}},
    "another in the old list": {"special_tokens_map.json": {"pad_token": "!"}},
    "two others": {"tokenizer_config.json": {"pad_token": "re"}, "special_tokens_map.json": {"pad_token": "!"}},
    "on the left": {"tokenizer_config.json": {"padding_side": "left", "truncation_side": "left"}},
    "as an object": {"tokenizer_config.json": {"pad_token": {"content": "!", "__type": "AddedToken", "special": True}}},
}


@pytest.mark.parametrize("name", PADDING)
def test_padding_is_what_transformers_pads_with(name: str, tmp_path: Path) -> None:
    clip_tokenizer().save_pretrained(tmp_path)
    inner = json.loads((tmp_path / "tokenizer.json").read_text())
    inner["padding"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(inner))
    for file, said in PADDING[name].items():
        before = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
        (tmp_path / file).write_text(json.dumps(before | said))
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    expected = theirs(TEXTS, padding="max_length", truncation=True, max_length=77).input_ids
    found = Tokenizer.pretrained(str(tmp_path), 77)
    np.testing.assert_array_equal(found(TEXTS), expected)
    assert found.pad_id == theirs.pad_token_id
    (tmp_path / "ours.json").write_text(found.to_json())
    np.testing.assert_array_equal(Tokenizer.load(tmp_path / "ours.json", 77)(TEXTS), expected)


REFUSED: dict[str, tuple[Architecture, str]] = {
    "classes as context": (architecture(KL, CROSS, label=LABEL | {"width": 16, "to": "crossattn"}), "whose UNet takes label"),
    "T5": (architecture(KL, CROSS, text={"kind": "t5", "vocab_size": 300, "width": 16, "depth": 1, "num_heads": 2}), "T5 alone"),
    "VQ with texts, by 4": (architecture(VQ, CROSS, text=BERT), "KL autoencoder only.* not 4 and 77"),
    "the paper's masks": (architecture(KL, CROSS, text=CLIP, mask={"style": "ldm"}), "mask.style=sd, .* not ldm"),
    "masks of any pixel": (architecture(KL, CROSS, text=CLIP, mask={"style": "sd", "shrink": "any"}), "not sd, any"),
    "a flow": (architecture(KL, CROSS, {"process": "flow", "prediction": "flow"}, text=CLIP), "no flow process"),
    "times that their steps miss": (architecture(KL, CROSS, spacing="linspace", text=CLIP), "linspace"),
    "few classes": (architecture(KL, DIT, label=LABEL | {"num_classes": 10}), "num_classes=1000"),
    "super-resolution that scales": (architecture(VQ, PLAIN, low_res={}), "no scale of latents"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_they_cannot_express_is_refused(name: str, tmp_path: Path) -> None:
    what, reason = REFUSED[name]
    save(tmp_path / "model", what)
    with pytest.raises(UserError, match=reason):
        export_folder(tmp_path / "model", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    stable_diffusion().save_pretrained(folder, max_shard_size="20KB")
    return folder


def without(pattern: str) -> Any:
    return lambda folder: [shutil.rmtree(path) if path.is_dir() else path.unlink() for path in folder.glob(pattern)]


def cut(folder: Path) -> None:
    file = next((folder / "unet").glob("*-00002-*"))
    file.write_bytes(file.read_bytes()[:-100])


def saying(file: str, **fields: Any) -> Any:
    return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))


DAMAGES: dict[str, tuple[Any, str]] = {
    "a shard is missing": (without("unet/*-00002-*"), "lacks 1 of .*00002"),
    "a file is cut": (cut, "00002.* no complete safetensors file"),
    "a component is missing": (without("vae"), "vae"),
    "channels of unknown meaning": (saying("unet/config.json", in_channels=8), "4 channels of input beside the latents"),
    "an unknown text encoder": (saying("model_index.json", text_encoder=["transformers", "BloomModel"]), "BloomModel"),
    "betas that are too few": (saying("scheduler/scheduler_config.json", trained_betas=[0.1]), "1 betas for .* 1000 steps"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_one_error(name: str, shards: Path, tmp_path: Path) -> None:
    damage, reason = DAMAGES[name]
    folder = Path(shutil.copytree(shards, tmp_path / "folder"))
    damage(folder)
    with pytest.raises(UserError, match=reason) as error:
        import_folder(folder, tmp_path / "model")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


def test_what_their_sampler_does_besides_is_told(shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "folder"))
    saying("scheduler/scheduler_config.json", set_alpha_to_one=True)(folder)
    (note,) = import_folder(folder, tmp_path / "model")
    assert "set_alpha_to_one=True beside 'legacy_ldm'" in note
