"""Class to image.

    python -m ldm_jax.train --config configs/class_cond.py[:PRESET] --workdir runs/class_cond

Presets:
  shapes       (default) drawn scenes of one object, 64 px, by its colour and shape (40 classes, of which 3, 7, 11, 15 and 39 are never
               drawn); nothing to download, a few minutes.
  smoke        the same, every stage in a minute: a check and not a model.
  imagenet-f4  LDM-4 (401M; 400M in table 10): FID 10.56, IS 103.49 by 250 DDIM steps; with guidance 1.5, FID 3.60, IS 247.67. 178,000
               updates of 1,200 images, 271 V100 days (tables 10, 15 and 18).
  imagenet-f8  LDM-8 (395M): FID 15.51, IS 79.03 by 200 DDIM steps; 4.8 million updates of 64 images, 79 V100 days (tables 10, 13 and 18).
               Trained without a null class, as it was: its guidance came from a classifier.
  imagenet-f1, -f2, -f16, -f32   the other factors of table 13 (396M, 391M, 395M, 395M), 2 million updates of 7, 9, 112 and 112 images, each
               on one A100; figure 6 compares them. The latents of f32, 8x8x32, are not a row of table 8: its first stage is vq-f32, wider.
  dit-s, dit-b, dit-l, dit-xl    DiT/2 (Peebles & Xie 2023; 33M, 130M, 458M, 675M) on KL-f8 latents: XL reaches FID 9.62 after 7 million
               updates of 256 images, and 2.27 with guidance 1.5. With the time embedding's frequencies of diffusers' class, so
               that diffusers' DiTPipeline can open what is trained.

The ImageNet presets take a folder with a sub-folder for each class: --config.data.path=DIR. A trained first stage is given by
--config.first_stage.path.
"""

from functools import partial

from ml_collections import ConfigDict

from ldm_jax import presets
from ldm_jax.nn.dit import SIZES


def get_config(preset: str = "shapes") -> ConfigDict:
    known = {"shapes": shapes}
    known |= {f"imagenet-f{factor}": partial(imagenet, factor) for factor in _IMAGENET}
    known |= {f"dit-{size}": partial(dit, size) for size in ("s", "b", "l", "xl")}
    return presets.choose(known, preset, "configs/class_cond.py")


def shapes() -> ConfigDict:
    config = presets.shapes()
    config.data.counts = (1,)
    config.conditioning.label.update(enabled=True, num_classes=40, width=128)
    return config


# first stage, channels, channel_mult, attention_levels, batch size, learning rate, updates (table 13; f4 and f8 as in tables 10 and 15)
_IMAGENET = {
    1: ("", 192, (1, 1, 2, 2, 4, 4), (8, 16, 32), 7, 4.9e-5, 2_000_000),
    2: ("vq-f2", 192, (1, 2, 2, 4, 4), (4, 8, 16), 9, 6.3e-5, 2_000_000),
    4: ("vq-f4", 192, (1, 2, 3, 5), (2, 4, 8), 1200, 1e-4, 178_000),
    8: ("vq-f8", 256, (1, 2, 4), (1, 2, 4), 64, 6.4e-5, 4_800_000),
    16: ("vq-f16", 256, (1, 2, 4), (1, 2, 4), 112, 4.5e-5, 2_000_000),
    32: ("vq-f32", 256, (1, 2, 4), (1, 2, 4), 112, 4.5e-5, 2_000_000),
}


def imagenet(factor: int) -> ConfigDict:
    first, channels, mult, attention, batch, rate, steps = _IMAGENET[factor]
    config = presets.paper(first or "kl-f8")
    if not first:
        config.first_stage.update(kind="identity", latent_channels=3)
    if factor == 32:
        config.first_stage.update(z_channels=32, latent_channels=32)
    heads = {"num_heads": 0, "head_channels": 32} if factor == 8 else {"num_heads": 1, "head_channels": 0}
    config.denoiser.update(channels=channels, channel_mult=mult, attention_levels=attention, transformer_depth=1, **heads)
    guided = factor == 4
    config.conditioning.label.update(enabled=True, num_classes=1000, null_class=guided, width=512, drop_rate=0.1 if guided else 0.0)
    config.optimizer.update(learning_rate=rate)
    config.train.update(steps=steps, batch_size=batch)
    config.sample.update(steps=250 if guided else 200, guidance=1.5 if guided else 1.0)
    return config


def dit(size: str) -> ConfigDict:
    config = presets.paper("kl-f8", start=1e-4, end=2e-2)
    config.first_stage.latent_scale = "0.18215"
    config.denoiser.update(kind="dit", patch_size=2, learn_sigma=False, legacy_frequencies=True, **SIZES[size.upper()])
    config.diffusion.schedule = "linear_beta"
    config.conditioning.label.update(
        enabled=True, num_classes=1000, null_class=True, width=SIZES[size.upper()]["width"], to="vector", drop_rate=0.1
    )
    config.optimizer.update(learning_rate=1e-4, weight_decay=0.0, warmup=0)
    config.train.update(steps=7_000_000, batch_size=256)
    config.sample.update(steps=250, guidance=1.5)
    return config
