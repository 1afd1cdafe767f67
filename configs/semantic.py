"""Semantic maps to image.

    python -m ldm_jax.train --config configs/semantic.py[:PRESET] --workdir runs/semantic

Presets:
  shapes         (default) drawn scenes of 64 px and the class of each pixel; nothing to download, a few minutes.
  smoke          the same, every stage in a minute: a check and not a model.
  landscapes256  LDM-4 (215M) on crops of 256 px: 360,000 updates of 48 images on one A100 (table 15), and
  landscapes512  on crops of 512 px of pictures of 768, in batches of 8 (the released file; section 4.3.2). No scores are published.

The released configurations ask for attention at 32, 16 and 8, which no level of theirs has: it was trained with attention in the middle
block only, and so it is here. They take a folder of images with segmentation/ by --config.data.path=DIR (docs/data.md), and a trained
first stage by --config.first_stage.path.
"""

from functools import partial

from ml_collections import ConfigDict

from ldm_jax import presets


def get_config(preset: str = "shapes") -> ConfigDict:
    crops = {"landscapes256": partial(landscapes, 256), "landscapes512": partial(landscapes, 512)}
    return presets.choose({"shapes": shapes} | crops, preset, "configs/semantic.py")


def shapes() -> ConfigDict:
    config = presets.shapes()
    config.conditioning.segmentation.update(enabled=True, num_classes=41, stages=3, channels=8)
    config.denoiser.transformer_depth = 0
    config.sample.guidance = 1.0
    return config


def landscapes(resolution: int) -> ConfigDict:
    config = presets.paper("vq-f4", end=0.0205, loss="l1")
    config.data.resolution = resolution
    config.denoiser.update(channels=128, channel_mult=(1, 4, 8), attention_levels=(), num_heads=8, head_channels=0, transformer_depth=0)
    config.conditioning.segmentation.update(enabled=True, num_classes=182, stages=2, channels=3)
    if resolution == 512:
        config.data.update(min_window=2 / 3, cache=False)
    batch = 48 if resolution == 256 else 8
    config.optimizer.update(learning_rate=1e-6 * batch)
    config.train.update(steps=360_000, batch_size=batch)
    return config
