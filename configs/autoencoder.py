"""The first stage alone.

    python -m ldm_jax.train --config configs/autoencoder.py[:PRESET] --workdir runs/autoencoder

Presets:
  shapes  (default) the small autoencoder of drawn scenes, as the other files' `shapes` have it; nothing to download, five minutes.
  NAME    a row of the paper's table 8, trained on OpenImages in random crops of 256 px of pictures of 384:
          reconstruction FID and PSNR on ImageNet's validation set, and updates, of the released weights. `*`: none were released, and
          what table 8 does not say is that of the nearest row.

    kl-f2       0.086 / 32.5  *                    vq-f2         0.16 / 30.9  *
    kl-f4       0.27  / 27.5  176,991 updates      vq-f2-n64     0.40 / 29.1  *
    kl-f8       0.90  / 24.2  246,803              vq-f4         0.58 / 27.4  533,066
    kl-f16      0.87  / 24.1  442,998              vq-f4-n256    0.47 / 26.4  *
    kl-f16-d8   2.63  / 21.9  *                    vq-f4-noattn  1.06 / 25.2  658,131
    kl-f32      2.04  / 22.3  406,763              vq-f8         1.14 / 23.1  971,043
    kl-f32-d16  7.3   / 20.4  *                    vq-f8-n256    1.49 / 22.4  1,608,649
                                                   vq-f16        5.15 / 20.8  1,101,166
                                                   vq-f32        31.8 / 17.5  *

  VQ-f4 took 29 V100 days and VQ-f8 66 (table 18). They take a folder of images, --config.data.path=DIR, and the weights of the perceptual
  loss, --config.first_stage.loss.vgg and --config.first_stage.loss.linear.
"""

from functools import partial

from ml_collections import ConfigDict

from ldm_jax import presets
from ldm_jax.config import first_stage_run


def get_config(preset: str = "shapes") -> ConfigDict:
    known = {"shapes": shapes, **{name: partial(paper, name) for name in presets.FIRST_STAGES}}
    return presets.choose(known, preset, "configs/autoencoder.py")


def shapes() -> ConfigDict:
    config = presets.shapes()
    config.data.size = 60_000
    return _alone(config)


def paper(name: str) -> ConfigDict:
    config = presets.paper(name)
    config.data.min_window = 2 / 3
    return _alone(config)


def _alone(config: ConfigDict) -> ConfigDict:
    return first_stage_run(config).unlock()
