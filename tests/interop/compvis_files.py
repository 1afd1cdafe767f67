"""YAML files of the paper's code: the released configurations, as published, and tiny models of every kind with random checkpoints."""

from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ldm_jax.interop import compvis
from ldm_jax.interop.compvis_yaml import read_yaml
from ldm_jax.interop.importing import Networks, build_networks
from ldm_jax.interop.keymap import their_shapes
from ldm_jax.interop.safetensors_file import Spec, write_safetensors
from ldm_jax.stages import abstract_params

MODULES = "ldm.modules.encoders.modules."


def autoencoder(z: int, mult: list[int], attention: Sequence[int] = (), codebook: int = 0, **more: Any) -> dict[str, Any]:
    """The configuration of a first stage, KL or, with a codebook, VQ; `more` are other fields of its ddconfig."""
    ddconfig = {
        "double_z": not codebook,
        "z_channels": z,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 128,
        "ch_mult": mult,
        "num_res_blocks": 2,
        "attn_resolutions": list(attention),
        "dropout": 0.0,
        **more,
    }
    shared = {"embed_dim": z, "monitor": "val/rec_loss", "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}
    if codebook:
        return {"target": "ldm.models.autoencoder.VQModelInterface", "params": {"n_embed": codebook, **shared}}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": shared}


def latent_diffusion(first_stage: Any, unet: dict[str, Any], condition: Any, image_size: int, **params: Any) -> dict[str, Any]:
    """A whole file; `params` are those of the model, with `target` its class."""
    target = params.pop("target", "LatentDiffusion")
    given = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "log_every_t": 100,
        "timesteps": 1000,
        "image_size": image_size,
        "channels": unet["out_channels"],
        **params,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {"image_size": image_size, "num_res_blocks": 2, **unet},
        },
        "first_stage_config": first_stage,
        "cond_stage_config": condition,
    }
    return {"model": {"base_learning_rate": 1e-6, "target": f"ldm.models.diffusion.ddpm.{target}", "params": given}}


def unet(channels: int, latent: int, model_channels: int, mult: list[int], attention: list[int], **more: Any) -> dict[str, Any]:
    return {
        "in_channels": channels,
        "out_channels": latent,
        "model_channels": model_channels,
        "attention_resolutions": attention,
        "channel_mult": mult,
        **more,
    }


def encoder(name: str, **params: Any) -> dict[str, Any]:
    return {"target": MODULES + name, **({"params": params} if params else {})}


def transformer(context: int, depth: int = 1) -> dict[str, Any]:
    return {"use_spatial_transformer": True, "transformer_depth": depth, "context_dim": context}


_VQ_F4 = autoencoder(3, [1, 2, 4], codebook=8192)
_KL_F8 = autoencoder(4, [1, 2, 4, 4])
_IDENTITY = {"target": "torch.nn.Identity"}
_UNCONDITIONAL = "__is_unconditional__"
_FACES = latent_diffusion(_VQ_F4, unet(3, 3, 224, [1, 2, 3, 4], [8, 4, 2], num_head_channels=32), _UNCONDITIONAL, 64, concat_mode=False)
_SD = {"linear_start": 0.00085, "linear_end": 0.012, "conditioning_key": "crossattn", "scale_factor": 0.18215}
_SD1 = {"num_heads": 8, **transformer(768), "use_checkpoint": True, "legacy": False}
_SD2 = {
    "use_checkpoint": True,
    "use_fp16": True,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    **transformer(1024),
    "legacy": False,
}
_OPENCLIP = encoder("FrozenOpenCLIPEmbedder", freeze=True, layer="penultimate")


def _semantic(size: int) -> dict[str, Any]:
    net = unet(6, 3, 128, [1, 4, 8], [32, 16, 8], num_heads=8)
    rescaler = encoder("SpatialRescaler", n_stages=2, in_channels=182, out_channels=3)
    return latent_diffusion(_VQ_F4, net, rescaler, size, linear_end=0.0205, loss_type="l1", concat_mode=True)


def _sd(first_stage: Any, net: dict[str, Any], condition: Any, **params: Any) -> dict[str, Any]:
    """Stable Diffusion's files, whose UNet has a size that is not used."""
    return latent_diffusion(first_stage, {**net, "image_size": 32}, condition, 64, **(_SD | params))


# By the preset that has the same numbers.
RELEASED: dict[str, dict[str, Any]] = {
    "class_cond:imagenet-f4": latent_diffusion(
        _VQ_F4,
        unet(3, 3, 192, [1, 2, 3, 5], [8, 4, 2], num_heads=1, **transformer(512)),
        encoder("ClassEmbedder", n_classes=1001, embed_dim=512, key="class_label"),
        64,
        conditioning_key="crossattn",
    ),
    "class_cond:imagenet-f8": latent_diffusion(
        autoencoder(4, [1, 2, 2, 4], [32], codebook=16384),
        unet(4, 4, 256, [1, 2, 4], [4, 2, 1], num_head_channels=32, **transformer(512)),
        encoder("ClassEmbedder", embed_dim=512, key="class_label"),
        32,
        conditioning_key="crossattn",
    ),
    "unconditional:celeba256": _FACES,
    "unconditional:ffhq256": _FACES,
    "unconditional:bedrooms256": _FACES,
    "unconditional:churches256": latent_diffusion(
        _KL_F8,
        unet(4, 4, 192, [1, 2, 2, 4, 4], [1, 2, 4, 8], num_heads=8, use_scale_shift_norm=True, resblock_updown=True),
        _UNCONDITIONAL,
        32,
        linear_end=0.0155,
        loss_type="l1",
        concat_mode=False,
        scale_by_std=True,
    ),
    "txt2img:laion-1p4b": latent_diffusion(
        _KL_F8,
        unet(4, 4, 320, [1, 2, 4, 4], [4, 2, 1], num_heads=8, **transformer(1280), use_checkpoint=True, legacy=False),
        encoder("BERTEmbedder", n_embed=1280, n_layer=32),
        32,
        **_SD,
        use_ema=False,
    ),
    "txt2img:cc-f4": latent_diffusion(
        _VQ_F4,
        unet(3, 3, 192, [1, 2, 3, 5], [8, 4, 2], num_head_channels=32, **transformer(640)),
        encoder("BERTEmbedder", n_embed=640, n_layer=32),
        64,
        conditioning_key="crossattn",
    ),
    "txt2img:sd1": _sd(
        autoencoder(4, [1, 2, 4, 4], resolution=512), unet(4, 4, 320, [1, 2, 4, 4], [4, 2, 1], **_SD1), encoder("FrozenCLIPEmbedder")
    ),
    "txt2img:sd1-inpainting": _sd(
        _KL_F8,
        unet(9, 4, 320, [1, 2, 4, 4], [4, 2, 1], **_SD1),
        encoder("FrozenCLIPEmbedder"),
        target="LatentInpaintDiffusion",
        conditioning_key="hybrid",
    ),
    "txt2img:sd2": _sd(_KL_F8, unet(4, 4, 320, [1, 2, 4, 4], [4, 2, 1], **_SD2), _OPENCLIP),
    "txt2img:sd2-v": _sd(_KL_F8, unet(4, 4, 320, [1, 2, 4, 4], [4, 2, 1], **_SD2), _OPENCLIP, parameterization="v"),
    "layout2img:openimages": latent_diffusion(
        _VQ_F4,
        unet(3, 3, 128, [1, 2, 3, 4], [8, 4, 2], num_head_channels=32, **transformer(512, depth=3)),
        encoder("BERTEmbedder", n_embed=512, n_layer=16, vocab_size=8192, max_seq_len=92, use_tokenizer=False),
        64,
        linear_end=0.0205,
        loss_type="l1",
        conditioning_key="crossattn",
    ),
    "semantic:landscapes256": _semantic(64),
    "semantic:landscapes512": _semantic(128),
    "superres:bsr": latent_diffusion(
        _VQ_F4, unet(6, 3, 160, [1, 2, 2, 4], [16, 8], num_head_channels=32), _IDENTITY, 64, linear_end=0.0155, concat_mode=True
    ),
    "inpaint:places-big": latent_diffusion(
        autoencoder(3, [1, 2, 4], codebook=8192, attn_type="none"),
        unet(7, 3, 256, [1, 2, 3, 4], [8, 4, 2], num_heads=8, resblock_updown=True),
        "__is_first_stage__",
        64,
        linear_end=0.0205,
        loss_type="l1",
        concat_mode=True,
    ),
    "retrieval:openimages768": latent_diffusion(
        autoencoder(16, [1, 1, 2, 2, 4], [16]),
        unet(16, 16, 448, [1, 2, 3, 4], [4, 2, 1], num_head_channels=32, **transformer(768), use_checkpoint=True, resblock_updown=False),
        _IDENTITY,
        48,
        linear_end=0.015,
        conditioning_key="crossattn",
        scale_by_std=False,
        scale_factor=0.22765929,
    ),
}

RELEASED_AUTOENCODERS: dict[str, dict[str, Any]] = {
    "kl-f4": autoencoder(3, [1, 2, 4]),
    "kl-f8": _KL_F8,
    "kl-f16": autoencoder(16, [1, 1, 2, 2, 4], [16]),
    "kl-f32": autoencoder(64, [1, 1, 2, 2, 4, 4], [16, 8]),
    "vq-f4": _VQ_F4,
    "vq-f4-noattn": autoencoder(3, [1, 2, 4], codebook=8192, attn_type="none"),
    "vq-f8": autoencoder(4, [1, 2, 2, 4], [32], codebook=16384),
    "vq-f8-n256": autoencoder(4, [1, 2, 2, 4], [32], codebook=256),
    "vq-f16": autoencoder(8, [1, 1, 2, 2, 4], [16], codebook=16384),
}


_SMALL = {"ch": 32, "num_res_blocks": 1, "resolution": 16}
_SMALL_KL = autoencoder(3, [1, 1], [8], **_SMALL)
_SMALL_VQ = autoencoder(3, [1, 1], codebook=16, **_SMALL)
_PIXELS: dict[str, Any] = {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {}}
_PLAIN: dict[str, Any] = {"num_head_channels": 16}
_CROSS: dict[str, Any] = {"num_heads": 2, **transformer(64)}
_RESAMPLING = {"channel_mult": [1, 2], "use_scale_shift_norm": True, "resblock_updown": True}
_TO_CONTEXT = {"conditioning_key": "crossattn"}


def _tiny(condition: Any, channels: int = 3, first_stage: Any = _PIXELS, net: dict[str, Any] = _CROSS, **params: Any) -> dict[str, Any]:
    """Latents of 8x8x3, one level of 32 channels unless `net` has more."""
    small = {**unet(channels, 3, 32, [1], [1]), "num_res_blocks": 1, **net}
    return latent_diffusion(first_stage, small, condition, 8, **params)


def _bert(vocab_size: int, **params: Any) -> dict[str, Any]:
    return encoder("BERTEmbedder", n_embed=64, n_layer=1, vocab_size=vocab_size, max_seq_len=8, **params)


# Every kind of model there is; CLIP's encoders are those that `tiny_clip` puts in the place of the published ones.
TINY: dict[str, dict[str, Any]] = {
    "autoencoder": {"model": _SMALL_KL},
    "codebook": {"model": _SMALL_VQ},
    "unconditional": _tiny(
        _UNCONDITIONAL, first_stage=_SMALL_VQ, net={**_PLAIN, "channel_mult": [1, 2], "attention_resolutions": [2]}, concat_mode=False
    ),
    "updown": _tiny(_UNCONDITIONAL, net={"num_heads": 2, "use_new_attention_order": True, **_RESAMPLING}),
    "label": _tiny(encoder("ClassEmbedder", n_classes=1001, embed_dim=64), **_TO_CONTEXT),
    "label without null": _tiny(encoder("ClassEmbedder", n_classes=7, embed_dim=64), **_TO_CONTEXT),
    "text": _tiny(_bert(300), first_stage=_SMALL_KL, **_TO_CONTEXT, scale_factor=0.7),
    "boxes": _tiny(_bert(100, use_tokenizer=False), **_TO_CONTEXT),
    "clip": _tiny(encoder("FrozenCLIPEmbedder"), **_TO_CONTEXT),
    "openclip": _tiny(_OPENCLIP, net={**_CROSS, "use_linear_in_transformer": True}, **_TO_CONTEXT, parameterization="v"),
    "text and mask": _tiny(encoder("FrozenCLIPEmbedder"), 7, target="LatentInpaintDiffusion", conditioning_key="hybrid"),
    "segmentation": _tiny(encoder("SpatialRescaler", n_stages=1, in_channels=5, out_channels=3), 6, _SMALL_VQ, _PLAIN),
    "low_res": _tiny(_IDENTITY, 6, net=_PLAIN),
    "mask": _tiny("__is_first_stage__", 7, _SMALL_VQ, _PLAIN),
    "neighbors": _tiny(_IDENTITY, **_TO_CONTEXT),
}
TINY_CLIP = {"vocab_size": 300, "max_length": 8, "width": 64, "depth": 2, "num_heads": 2, "activation": "quick_gelu", "skip_last": 0}
TINY_OPENCLIP = {**TINY_CLIP, "activation": "gelu", "skip_last": 1}


def tiny_clip(monkeypatch: Any) -> None:
    monkeypatch.setattr("ldm_jax.interop.compvis_yaml.CLIP_L14", TINY_CLIP)
    monkeypatch.setattr("ldm_jax.interop.compvis_yaml.OPENCLIP_H14", TINY_OPENCLIP)


def changed(kind: str, where: str, **fields: Any) -> dict[str, Any]:
    """A tiny model's file with other fields of `model`, the `unet`, the `ddconfig` or the `condition`."""
    content = deepcopy(TINY[kind])
    params = content["model"]["params"]
    group = {
        "model": lambda: params,
        "unet": lambda: params["unet_config"]["params"],
        "ddconfig": lambda: params.get("first_stage_config", content["model"])["params"]["ddconfig"],
        "condition": lambda: params["cond_stage_config"].setdefault("params", {}),
    }[where]()
    group.update(fields)
    return content


_traced = lru_cache(abstract_params)


def trace_once(monkeypatch: Any) -> None:
    """Networks that were traced for their shapes are not traced again."""
    monkeypatch.setattr("ldm_jax.interop.importing.abstract_params", _traced)


def write_yaml(folder: Path, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def networks(path: Path) -> Networks:
    """What a file's model is built of here, without weights."""
    architecture = read_yaml(path)
    flags = {"linear_projections": architecture.linear_projections, "fused_by_head": architecture.fused_by_head}
    return build_networks(architecture, 0.0, architecture.scale or 1.0, None, flags)


def random_tensors(path: Path, seed: int = 0) -> dict[str, np.ndarray]:
    """A checkpoint's tensors of a file's model, every one random."""
    built, rng = networks(path), np.random.default_rng(seed)
    shapes = their_shapes(compvis.model_map(built), built.params)
    return {name: (0.1 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def write_checkpoint(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    write_safetensors(path, tensors.items(), {name: Spec(array.shape, array.dtype) for name, array in tensors.items()})
    return path
