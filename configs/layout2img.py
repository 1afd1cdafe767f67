"""Boxes to image.

    python -m ldm_jax.train --config configs/layout2img.py[:PRESET] --workdir runs/layout2img

Presets:
  shapes      (default) drawn scenes of 64 px and the boxes of their objects; nothing to download, a few minutes.
  smoke       the same, every stage in a minute: a check and not a model.
  openimages  LDM-4 (246M and 59M of text; 306M in table 15): FID 32.02 at 256 px (table 9); 4.4 million updates of 24 images on one A100
              (table 15). A sentence of 92 tokens, 16 layers.
  coco        LDM-8: FID 42.06; 170,000 updates of 48 images on one A100. Its configuration was not released; as table 15 describes it, with
              attention at every level, it has 312M and 59M of text, where the table counts 345M.

The paper's presets take a folder of images with boxes.json by --config.data.path=DIR (docs/data.md), and a trained first stage by
--config.first_stage.path.
"""

from ml_collections import ConfigDict

from ldm_jax import presets


def get_config(preset: str = "shapes") -> ConfigDict:
    return presets.choose({"shapes": shapes, "openimages": openimages, "coco": coco}, preset, "configs/layout2img.py")


def shapes() -> ConfigDict:
    config = presets.shapes()
    config.train.steps = 3_200
    config.denoiser.places = True
    config.conditioning.boxes.update(enabled=True, kind="objects", max_objects=3, vocab_size=1024, width=128)
    return config


def openimages() -> ConfigDict:
    config = presets.paper("vq-f4", end=0.0205, loss="l1")
    config.denoiser.update(channels=128, channel_mult=(1, 2, 3, 4), attention_levels=(2, 4, 8), head_channels=32, transformer_depth=3)
    config.conditioning.boxes.update(enabled=True, max_objects=30, vocab_size=8192, width=512, depth=16, num_heads=8, head_dim=64)
    config.optimizer.update(learning_rate=4.8e-5)
    config.train.update(steps=4_400_000, batch_size=24)
    return config


def coco() -> ConfigDict:
    config = presets.paper("vq-f8", end=0.0205, loss="l1")
    config.denoiser.update(
        channels=192, channel_mult=(1, 2, 4), attention_levels=(1, 2, 4), head_channels=32, transformer_depth=2, dropout=0.1
    )
    config.conditioning.boxes.update(enabled=True, max_objects=30, vocab_size=8192, width=512, depth=16, num_heads=8, head_dim=64)
    config.optimizer.update(learning_rate=4.8e-5)
    config.train.update(steps=170_000, batch_size=48)
    return config
