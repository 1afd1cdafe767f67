"""Images from the embeddings of their neighbours (Blattmann et al. 2022).

    python -m ldm_jax.train --config configs/retrieval.py[:PRESET] --workdir runs/retrieval

Presets:
  shapes         (default) drawn scenes of 64 px from the mean colours of 8 x 8 parts of their 4 nearest; a few minutes.
  smoke          the same, every stage in a minute: a check and not a model.
  openimages768  the released model of 768 px (1.34 billion parameters) on KL-f16 latents, given up to 20 embeddings of CLIP ViT-L/14. Its
                 rate is the released file's; batch, updates and scores are not published.

The released model's preset takes a folder of images by --config.data.path=DIR, and embeddings of them, in the order of their names, by
--config.conditioning.neighbors.queries=FILE.npy; a database of others to find neighbours in by conditioning.neighbors.database.
"""

from ml_collections import ConfigDict

from ldm_jax import presets


def get_config(preset: str = "shapes") -> ConfigDict:
    return presets.choose({"shapes": shapes, "openimages768": openimages768}, preset, "configs/retrieval.py")


def shapes() -> ConfigDict:
    config = presets.shapes()
    config.train.steps = 3_200
    config.denoiser.places = True
    config.conditioning.neighbors.update(enabled=True, count=4, width=192)
    return config


def openimages768() -> ConfigDict:
    config = presets.paper("kl-f16", start=0.0015, end=0.015)
    config.data.resolution = 768
    config.first_stage.latent_scale = "0.22765929"
    config.denoiser.update(channels=448, channel_mult=(1, 2, 3, 4), attention_levels=(1, 2, 4), num_heads=0, head_channels=32)
    config.denoiser.update(transformer_depth=1)
    config.train.remat = "blocks"
    config.conditioning.neighbors.update(enabled=True, count=20, width=768)
    config.optimizer.update(learning_rate=1e-4)
    config.train.update(steps=1_000_000, batch_size=64)
    config.sample.update(steps=100, guidance=5.0)
    return config
