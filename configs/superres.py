"""A small picture to one of several times its size.

    python -m ldm_jax.train --config configs/superres.py[:PRESET] --workdir runs/superres

Presets:
  shapes    (default) drawn scenes of 64 px from pictures of 8 px; nothing to download, a few minutes.
  smoke     the same, every stage in a minute: a check and not a model.
  imagenet  LDM-4, 4 times the size: FID 2.8 on validation pictures (4.8 against training ones), IS 166.3, PSNR 24.4, SSIM .69 by 100 steps;
            860,000 updates of 64 images on one A100 (tables 5, 11, 15). Its configuration was not released. Table 15 counts 169M, as
            many as the released network of `bsr` (113.6M) and its first stage (55.3M) have together: this is that network, by inference.
  bsr       LDM-BSR (114M), trained on degraded pictures of OpenImages (section D.6.1). Its released configuration asks for attention at 16
            and 8, and has no level of 16: it was trained with attention at 8 and in the middle block. Updates are as in `imagenet`.

The small pictures are made of the large ones by conditioning.low_res.degradation: bicubic, or the chains of blur, noise, resampling and
JPEG of BSRGAN. The paper's presets take a folder of images by --config.data.path=DIR, and a trained first stage by
--config.first_stage.path.
"""

from ml_collections import ConfigDict

from ldm_jax import presets


def get_config(preset: str = "shapes") -> ConfigDict:
    return presets.choose({"shapes": shapes, "imagenet": times_four, "bsr": bsr}, preset, "configs/superres.py")


def shapes() -> ConfigDict:
    config = presets.shapes()
    config.conditioning.low_res.update(enabled=True)
    config.denoiser.transformer_depth = 0
    config.sample.guidance = 1.0
    return config


def times_four() -> ConfigDict:
    config = presets.paper("vq-f4", end=0.0155)
    config.denoiser.update(channels=160, channel_mult=(1, 2, 2, 4), attention_levels=(8,), head_channels=32, transformer_depth=0)
    config.conditioning.low_res.update(enabled=True)
    config.data.update(min_window=0.5, cache=False)
    config.optimizer.update(learning_rate=6.4e-5)
    config.train.update(steps=860_000, batch_size=64)
    config.sample.update(steps=100)
    return config


def bsr() -> ConfigDict:
    config = times_four()
    config.conditioning.low_res.degradation = "bsr_light"
    return config
