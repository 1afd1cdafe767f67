"""A picture with a hole to the whole one.

    python -m ldm_jax.train --config configs/inpainting.py[:PRESET] --workdir runs/inpainting

Presets:
  places-big  the released model (387M): FID 9.39 and LPIPS .246 where 40 to 50 % are missing, 1.50 and .137 over all, fine-tuned at 512 px
              (table 7).
  places      table 15's (215M): 360,000 updates of 128 images.

Both sample, and take released weights; training them needs masks, which are not here yet.
"""

from ml_collections import ConfigDict

from ldm_jax import presets


def get_config(preset: str = "places-big") -> ConfigDict:
    return presets.choose({"places-big": places_big, "places": places}, preset, "configs/inpainting.py")


def places_big() -> ConfigDict:
    config = presets.paper("vq-f4-noattn", end=0.0205, loss="l1")
    config.denoiser.update(channels=256, channel_mult=(1, 2, 3, 4), attention_levels=(2, 4, 8), num_heads=8, head_channels=0)
    config.denoiser.update(transformer_depth=0, resblock_updown=True)
    return _masked(config)


def places() -> ConfigDict:
    config = presets.paper("vq-f4", end=0.0205, loss="l1")
    config.denoiser.update(channels=128, channel_mult=(1, 4, 8), attention_levels=(), num_heads=8, head_channels=0, transformer_depth=0)
    return _masked(config)


def _masked(config: ConfigDict) -> ConfigDict:
    config.conditioning.mask.update(enabled=True)
    config.optimizer.update(learning_rate=1e-6)
    config.train.update(steps=360_000, batch_size=128)
    config.sample.update(steps=50)
    return config
