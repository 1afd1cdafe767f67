"""Images without a condition.

    python -m ldm_jax.train --config configs/unconditional.py[:PRESET] --workdir runs/unconditional

Presets:
  shapes         (default) drawn scenes of 64 px; nothing to download, a few minutes.
  smoke          the same, every stage in a minute: a check and not a model.
  celeba256      LDM-4 (274M): FID 5.11, 410,000 updates of 48 images, 14.4 V100 days; 500 DDIM steps.
  ffhq256        LDM-4 (274M): FID 4.98, 635,000 updates of 42 images, 26 V100 days; 200 steps, eta 1.
  bedrooms256    LDM-4 (274M): FID 2.95, 1.9 million updates of 48 images, 60 V100 days; 200 steps, eta 1.
  churches256    LDM-8 (295M), l1 loss: FID 4.02, 500,000 updates of 96 images, 18 V100 days; 200 steps.

Numbers are those of tables 1, 12 and 18. The paper's presets take a folder of images by --config.data.path=DIR, and a trained first stage
by --config.first_stage.path.
"""

from functools import partial

from ml_collections import ConfigDict

from ldm_jax import presets


def get_config(preset: str = "shapes") -> ConfigDict:
    faces = {
        "celeba256": partial(vq_f4, 48, 9.6e-5, 410_000, 500, 0.0),
        "ffhq256": partial(vq_f4, 42, 8.4e-5, 635_000, 200, 1.0),
        "bedrooms256": partial(vq_f4, 48, 9.6e-5, 1_900_000, 200, 1.0),
    }
    return presets.choose({"shapes": shapes, **faces, "churches256": churches}, preset, "configs/unconditional.py")


def shapes() -> ConfigDict:
    config = presets.shapes()
    config.denoiser.transformer_depth = 0
    config.sample.guidance = 1.0
    return config


def vq_f4(batch: int, rate: float, updates: int, steps: int, eta: float) -> ConfigDict:
    config = presets.paper("vq-f4")
    config.denoiser.update(channels=224, channel_mult=(1, 2, 3, 4), attention_levels=(2, 4, 8), head_channels=32, transformer_depth=0)
    config.optimizer.update(learning_rate=rate)
    config.train.update(steps=updates, batch_size=batch)
    config.sample.update(steps=steps, eta=eta)
    return config


def churches() -> ConfigDict:
    config = presets.paper("kl-f8", end=0.0155, loss="l1")
    config.first_stage.latent_scale = "std"
    config.denoiser.update(channels=192, channel_mult=(1, 2, 2, 4, 4), attention_levels=(1, 2, 4, 8), num_heads=8, head_channels=0)
    config.denoiser.update(transformer_depth=0, scale_shift=True, resblock_updown=True)
    config.optimizer.update(learning_rate=5e-5, warmup=10_000)
    config.train.update(steps=500_000, batch_size=96)
    return config
