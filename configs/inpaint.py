"""A picture with a hole to the whole one.

    python -m ldm_jax.train --config configs/inpaint.py[:PRESET] --workdir runs/inpainting

Presets:
  shapes      (default) drawn scenes of 64 px with holes; nothing to download, a few minutes.
  smoke       the same, every stage in a minute: a check and not a model.
  places-big  the released model (387M): FID 9.39 and LPIPS .246 where 40 to 50 % are missing, 1.50 and .137 over all, fine-tuned at 512 px
              (table 7). Its rate is the released file's, without the schedule of factors there; batch and updates are those of
              `places`, its own are not published.
  places      table 15's (215M): FID 11.87 and LPIPS .257, 2.15 and .144 (table 7, with attention in the first stage); 360,000 updates of
              128 images on eight V100.

Holes are drawn anew at every step (conditioning.mask.holes), or taken from the data's masks where that is empty. The paper's presets take
a folder of images by --config.data.path=DIR, and a trained first stage by --config.first_stage.path.
"""

from ml_collections import ConfigDict

from ldm_jax import presets


def get_config(preset: str = "shapes") -> ConfigDict:
    return presets.choose({"shapes": shapes, "places-big": places_big, "places": places}, preset, "configs/inpaint.py")


def shapes() -> ConfigDict:
    config = presets.shapes()
    config.train.steps = 3_900
    config.conditioning.mask.update(enabled=True)
    config.data.cache = False
    config.evaluate.prompts = 1_200  # a third of them has no object that is hidden in part
    config.denoiser.transformer_depth = 0
    config.sample.guidance = 1.0
    return config


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
    config.conditioning.mask.update(enabled=True, holes="wide", shrink="nearest")
    config.data.cache = False
    config.optimizer.update(learning_rate=1e-6)
    config.train.update(steps=360_000, batch_size=128)
    config.sample.update(steps=50)
    return config
