"""Text to image.

    python -m ldm_jax.train --config configs/txt2img.py[:PRESET] --workdir runs/txt2img

Presets:
  shapes      (default) captioned scenes of one to three shapes, 64 px, drawn on the fly; nothing to download. See the README for time and
              numbers on two CPU cores.
  smoke       every stage in under two minutes on two CPU cores: a check that all works, not a model.
  gpu         the same scenes at 256 px, for one large GPU.
  laion-1p4b  the paper's text model (872M and 582M of text) on KL-f8: FID 23.31, IS 20.03 on COCO by 250 DDIM steps; with guidance 1.5, FID
              12.63, IS 30.29. 390,000 updates of 680 images (tables 2 and 15).
  cc-f4       the released text model of Conceptual Captions (404M and 186M of text) on VQ-f4: FID 16.79, IS 13.89 by 100 DDIM steps. Batch
              and rate are the released file's, the number of updates is not published.
  sd1         Stable Diffusion 1.x (860M, and CLIP ViT-L/14 as it is): updates of 2,048 images, 237,000 at 256 px and 194,000 at 512 px for
              v1-1, to which v1-2 adds 515,000 and v1-4 another 225,000; 150,000 A100 hours.
  sd2, sd2-v  Stable Diffusion 2.x (866M, OpenCLIP ViT-H/14), 512 px by eps or 768 px by v; its training is set as that of sd1.
  sd1-inpainting  Stable Diffusion's inpainting model: sd1 that is given a picture with a hole besides, drawn anew at every step.

Below `gpu` they take captioned images, --config.data.path=DIR; a trained first stage is given by --config.first_stage.path. Those of Stable
Diffusion start from converted weights, --config.train.init_from=DIR.
"""

from ml_collections import ConfigDict

from ldm_jax import presets
from ldm_jax.interop.text_encoders import CLIP_L14, OPENCLIP_H14

PROMPTS = (
    "a red circle on a gray background",
    "a blue triangle on a pink background",
    "a green ring on a cyan background",
    "a yellow cross on a gray background",
    "a white square on a pink background",
    "an orange circle left of a purple square on a cyan background",
    "a red ring above a black cross on a gray background",
    "a green square right of a white triangle on a pink background",
    "a blue circle below a yellow ring on a gray background",
    "a black triangle left of a red square on a cyan background",
    "a red circle, a blue square and a green ring on a cyan background",
    "an orange cross, a white circle and a black triangle on a pink background",
)


def get_config(preset: str = "shapes") -> ConfigDict:
    known = {"shapes": shapes, "gpu": gpu, "laion-1p4b": laion_1p4b, "cc-f4": cc_f4, "sd1": sd1, "sd2": sd2, "sd2-v": sd2_v}
    known |= {"sd1-inpainting": sd1_inpainting}
    return presets.choose(known, preset, "configs/txt2img.py")


def shapes() -> ConfigDict:
    config = presets.shapes()
    config.data.size = 60_000
    config.train.steps = 8_000
    config.conditioning.text.update(enabled=True, vocab_size=512, max_length=24, width=128, depth=2, num_heads=4, head_dim=32)
    config.sample.prompts = PROMPTS
    config.evaluate.prompts = 500
    return config


def gpu() -> ConfigDict:
    config = shapes()
    config.data.update(resolution=256, size=200_000, workers=12)
    first = config.first_stage
    first.update(channels=64, channel_mult=(1, 2, 2), num_res_blocks=2, patch_size=2, z_channels=4, latent_channels=4)
    first.loss.update(disc_start=3_000)
    first.discriminator.update(features=64, num_layers=3)
    first.train.update(steps=4_000, batch_size=64)
    first.optimizer.update(learning_rate=5e-4, b1=0.5, b2=0.9)
    config.denoiser.update(channels=192, channel_mult=(1, 2, 4), num_res_blocks=2, attention_levels=(2, 4), head_channels=64)
    config.conditioning.text.update(width=512, depth=4, num_heads=8, head_dim=64)
    config.optimizer.update(learning_rate=3e-4, warmup=1_000)
    config.ema.decays = (0.9995, 0.999)
    config.train.update(steps=40_000, batch_size=256, log_every=100)
    config.sample.update(every=5_000, steps=50, batch_size=250)
    config.checkpoint.update(every=2_000)
    return config


def laion_1p4b() -> ConfigDict:
    config = presets.paper("kl-f8", start=0.00085, end=0.012)
    config.first_stage.update(latent_scale="0.18215")
    config.denoiser.update(channels=320, channel_mult=(1, 2, 4, 4), attention_levels=(1, 2, 4), num_heads=8, head_channels=0)
    bert(config, width=1280)
    config.optimizer.update(learning_rate=1e-4, warmup=10_000)
    config.train.update(steps=390_000, batch_size=680)
    config.sample.update(steps=250, guidance=1.5)
    return config


def bert(config: ConfigDict, width: int) -> None:
    """The paper's text encoder: 32 layers, trained with the denoiser (table 17)."""
    text = {
        "kind": "transformer",
        "tokenizer": "bert-base-uncased",
        "vocab_size": 30_522,
        "max_length": 77,
        "width": width,
        "depth": 32,
        "num_heads": 8,
        "head_dim": 64,
    }
    config.conditioning.text.update(enabled=True, drop_rate=0.1, **text)


def cc_f4() -> ConfigDict:
    config = presets.paper("vq-f4")
    config.denoiser.update(channels=192, channel_mult=(1, 2, 3, 5), attention_levels=(2, 4, 8), num_heads=0, head_channels=32)
    bert(config, width=640)
    config.optimizer.update(learning_rate=5.6e-5)
    config.train.update(steps=500_000, batch_size=28)
    config.sample.update(steps=100, guidance=5.0)
    return config


def sd1() -> ConfigDict:
    config = laion_1p4b()
    config.data.resolution = 512
    config.conditioning.text.update(kind="clip", frozen=True, tokenizer="openai/clip-vit-large-patch14", **CLIP_L14)
    config.train.update(steps=600_000, batch_size=2048, accumulation=2)
    config.sample.update(steps=50, guidance=7.5)
    return config


def sd1_inpainting() -> ConfigDict:
    config = sd1()
    config.conditioning.mask.update(enabled=True, style="sd", shrink="nearest", holes="wide")
    config.data.cache = False
    return config


def sd2() -> ConfigDict:
    config = sd1()
    config.denoiser.update(num_heads=0, head_channels=64)
    config.conditioning.text.update(tokenizer="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", **OPENCLIP_H14)
    return config


def sd2_v() -> ConfigDict:
    config = sd2()
    config.data.resolution = 768
    config.diffusion.prediction = "v"
    return config
