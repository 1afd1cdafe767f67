"""A picture of a quarter of the size to the whole one.

    python -m ldm_jax.train --config configs/superres.py[:PRESET] --workdir runs/superres

Presets:
  imagenet  LDM-4 (169M): FID 2.8 on validation pictures, PSNR 24.4, SSIM .69 by 100 steps; 860,000 updates of 64 images (tables 5, 11, 15).
  bsr       LDM-BSR (114M), trained on degraded pictures of OpenImages (section D.6.1). Its released configuration asks for attention at 16
            and 8, and has no level of 16: it was trained with attention at 8 and in the middle block.

Both sample, and take released weights; training them needs the degradations of pictures, which are not here yet.
"""

from functools import partial

from ml_collections import ConfigDict

from ldm_jax import presets


def get_config(preset: str = "imagenet") -> ConfigDict:
    known = {"imagenet": partial(times_four, (4, 8)), "bsr": partial(times_four, (8,))}
    return presets.choose(known, preset, "configs/superres.py")


def times_four(attention: tuple[int, ...]) -> ConfigDict:
    config = presets.paper("vq-f4", end=0.0155)
    config.denoiser.update(channels=160, channel_mult=(1, 2, 2, 4), attention_levels=attention, head_channels=32, transformer_depth=0)
    config.conditioning.low_res.update(enabled=True)
    config.optimizer.update(learning_rate=6.4e-5)
    config.train.update(steps=860_000, batch_size=64)
    config.sample.update(steps=100)
    return config
