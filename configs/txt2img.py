"""Text to image.

    python -m ldm_jax.train --config configs/txt2img.py[:PRESET] --workdir runs/txt2img

Presets:
  shapes      (default) captioned scenes of one to three shapes, 64 px, drawn on the fly; nothing to download. See the README for time and
              numbers on two CPU cores.
  smoke       every stage in under two minutes on two CPU cores: a check that all works, not a model.
  gpu         the same scenes at 256 px, for one large GPU.
  laion-1p4b  the paper's 1.45-billion-parameter text model (tables 2 and 15: FID 12.63 on COCO with guidance 1.5), for captioned images of
              your own: --config.data.source=folder --config.data.path=DIR. Its first stage is KL-f8; give a trained one with
              --config.first_stage.path.
"""

from ml_collections import ConfigDict

from ldm_jax.config import UserError, base

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
    presets = {"shapes": shapes, "smoke": smoke, "gpu": gpu, "laion-1p4b": laion_1p4b}
    if preset not in presets:
        raise UserError(f"configs/txt2img.py has no preset {preset!r}; it has {', '.join(presets)}")
    return presets[preset]()


def shapes() -> ConfigDict:
    config = base()
    config.data.update(source="shapes", resolution=64, size=60_000, counts=(1, 2, 3))

    first = config.first_stage
    first.update(channels=128, channel_mult=(1,), num_res_blocks=1, mid_attention=False, z_channels=8, latent_channels=8, patch_size=8)
    first.init_log_var = -6.0
    first.loss.update(pixel="l1_l2", disc_start=2_400, disc_weight=0.1)
    first.discriminator.update(features=32, num_layers=2, norm="group")
    first.train.update(steps=3_200, batch_size=16)
    first.optimizer.update(kind="adam", learning_rate=2e-3, schedule="cosine", warmup=100, b1=0.9, b2=0.99, weight_decay=0.0, clip_norm=0.0)
    first.ema.decays = (0.99,)

    config.denoiser.update(channels=128, channel_mult=(1,), num_res_blocks=1, attention_levels=(1,), head_channels=32, scale_shift=True)
    config.conditioning.text.update(vocab_size=512, max_length=24, width=128, depth=2, num_heads=4, head_dim=32)
    config.diffusion.update(process="flow", shift=2.0, prediction="flow", time_sampling="stratified")
    config.optimizer.update(learning_rate=1e-3, schedule="linear", warmup=150, decay_start=0.6)
    config.ema.decays = (0.999, 0.99)
    config.train.update(steps=8_000, batch_size=16, log_every=50)
    config.sample.update(every=2_000, prompts=PROMPTS, sampler="euler", steps=25, guidance=3.0, spacing="trailing", batch_size=50)
    config.evaluate.update(prompts=500, held_out=200, guidance=(2.0, 3.0, 4.0), guidance_prompts=32)
    config.checkpoint.update(every=500, keep=2)
    return config


def smoke() -> ConfigDict:
    config = shapes()
    config.data.update(size=512, resolution=32)
    config.first_stage.update(channels=16, channel_mult=(1, 2), patch_size=2)
    config.first_stage.loss.disc_start = 24
    config.first_stage.discriminator.features = 8
    config.first_stage.train.update(steps=32, batch_size=8, log_every=8)
    config.first_stage.optimizer.warmup = 4
    config.first_stage.statistics_examples = 256
    config.denoiser.update(channels=32, channel_mult=(1, 2), attention_levels=(1, 2))
    config.conditioning.text.update(width=32, depth=1, num_heads=2, head_dim=16)
    config.optimizer.warmup = 4
    config.train.update(steps=32, batch_size=8, log_every=8)
    config.sample.update(every=16, prompts=PROMPTS[:2], steps=4, batch_size=16)
    config.evaluate.update(prompts=8, held_out=8, guidance=(2.0,), guidance_prompts=8)
    config.checkpoint.update(every=8)
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
    config = base()
    config.data.update(source="folder", resolution=256)
    config.first_stage.update(latent_scale="0.18215")
    config.first_stage.loss.update(disc_start=50_001)
    config.first_stage.train.update(steps=250_000, batch_size=96)
    config.first_stage.optimizer.update(kind="adam", learning_rate=4.5e-5, b1=0.5, b2=0.9, weight_decay=0.0, clip_norm=0.0, warmup=0)
    config.denoiser.update(channels=320, channel_mult=(1, 2, 4, 4), attention_levels=(1, 2, 4), num_heads=8, head_channels=0)
    config.conditioning.text.update(tokenizer="bert-base-uncased", width=1280, depth=32, num_heads=8, head_dim=64)
    config.diffusion.update(process="discrete", schedule="linear", start=0.00085, end=0.012, prediction="eps")
    config.optimizer.update(learning_rate=1e-4, warmup=10_000)
    config.train.update(steps=390_000, batch_size=680)
    config.sample.update(sampler="ddim", steps=250, guidance=1.5, spacing="leading")
    return config
