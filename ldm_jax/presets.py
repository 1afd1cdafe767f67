"""What files under `configs/` share: the first stages of the paper's table 8, its denoisers' common ground, and a small model of scenes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ldm_jax.config import UserError
from ldm_jax.defaults import base


class FirstStage(NamedTuple):
    """A row: the latent is of `channels` channels, `codebook` is its size (0: KL), `steps` are the updates of the released weights, and the
    rest is as in the released training files."""

    channel_mult: tuple[int, ...]
    channels: int
    attention: tuple[int, ...] = ()
    codebook: int = 0
    mid_attention: bool = True
    disc_start: int = 50_001
    disc_weight: float = 0.5
    disc_layers: int = 3
    batch_size: int = 12
    steps: int = 500_000


_F2, _F4, _KL_F8, _VQ_F8, _F16, _F32 = (1, 2), (1, 2, 4), (1, 2, 4, 4), (1, 2, 2, 4), (1, 1, 2, 2, 4), (1, 1, 2, 2, 4, 4)

FIRST_STAGES = {
    "kl-f2": FirstStage(_F2, 2),
    "kl-f4": FirstStage(_F4, 3, batch_size=10, steps=176_991),
    "kl-f8": FirstStage(_KL_F8, 4, batch_size=4, steps=246_803),
    "kl-f16": FirstStage(_F16, 16, (16,), batch_size=6, steps=442_998),
    "kl-f16-d8": FirstStage(_F16, 8, (16,), batch_size=6),
    "kl-f32": FirstStage(_F32, 64, (16, 32), batch_size=6, steps=406_763),
    "kl-f32-d16": FirstStage(_F32, 16, (16, 32), batch_size=6),
    "vq-f2": FirstStage(_F2, 2, codebook=2048, disc_start=0, disc_weight=0.75, batch_size=8),
    "vq-f2-n64": FirstStage(_F2, 2, codebook=64, disc_start=0, disc_weight=0.75, batch_size=8),
    "vq-f4": FirstStage(_F4, 3, codebook=8192, disc_start=0, disc_weight=0.75, batch_size=8, steps=533_066),
    "vq-f4-n256": FirstStage(_F4, 3, codebook=256, disc_start=0, disc_weight=0.75, batch_size=8),
    "vq-f4-noattn": FirstStage(_F4, 3, codebook=8192, mid_attention=False, disc_start=11, disc_weight=0.75, batch_size=8, steps=658_131),
    "vq-f8": FirstStage(_VQ_F8, 4, (8,), 16_384, disc_start=1, disc_weight=0.6, disc_layers=2, batch_size=10, steps=971_043),
    "vq-f8-n256": FirstStage(_VQ_F8, 4, (8,), 256, disc_start=250_001, disc_weight=0.75, batch_size=10, steps=1_608_649),
    "vq-f16": FirstStage(_F16, 8, (16,), 16_384, disc_start=250_001, disc_weight=0.75, disc_layers=2, batch_size=14, steps=1_101_166),
    "vq-f32": FirstStage(_F32, 16, (16, 32), 16_384, disc_start=250_001, disc_weight=0.75, disc_layers=2, batch_size=14),
}
"""Released: kl-f4, kl-f8, kl-f16, kl-f32, vq-f4, vq-f4-noattn, vq-f8, vq-f8-n256, vq-f16. Of the others the paper gives factor, codebook
and channels only; the rest follows their nearest neighbours."""


def set_first_stage(group: ConfigDict, name: str) -> None:
    """Makes a `first_stage` group that row of `FIRST_STAGES`, with the released training: Adam, no decay, learning rate by its formula.

    But for one thing: a codebook's beta weighs what it is meant to (`legacy_beta`).
    """
    row: Any = FIRST_STAGES[name]
    group.update(kind="vq" if row.codebook else "kl", channels=128, channel_mult=row.channel_mult, num_res_blocks=2)
    group.update(attention_levels=row.attention, mid_attention=row.mid_attention, z_channels=row.channels, latent_channels=row.channels)
    group.loss.update(disc_start=row.disc_start, disc_weight=row.disc_weight)
    group.discriminator.update(features=64, num_layers=row.disc_layers, norm="batch")
    if row.codebook:
        group.codebook.update(size=row.codebook, beta=0.25, legacy_beta=False)
        group.loss.update(reduction="mean", codebook_weight=1.0)
        group.latent_scale = "1.0"
    group.train.update(steps=row.steps, batch_size=row.batch_size)
    # 4.5e-6 for each image of the batch, as the released files have it.
    group.optimizer.update(kind="adam", learning_rate=4.5e-6 * row.batch_size, b1=0.5, b2=0.9, weight_decay=0.0, clip_norm=0.0, warmup=0)


def choose(known: Mapping[str, Any], preset: str, file: str) -> ConfigDict:
    """The preset of that name of a configuration file, by the function that makes it; "smoke" is made of "shapes". Raises UserError."""
    if "shapes" in known:
        known = {"shapes": known["shapes"], "smoke": lambda: smoke(known["shapes"]()), **known}
    if preset not in known:
        raise UserError(f"{file} has no preset {preset!r}; it has {', '.join(known)}")
    return known[preset]()


def paper(first_stage: str, start: float = 0.0015, end: float = 0.0195, loss: str = "l2") -> ConfigDict:
    """What all models of the paper have in common: eps-prediction on 1000 steps, AdamW without warm-up and clipping, EMA of 0.9999.

    Of a condition there is none yet; the first stage is that row of `FIRST_STAGES`.
    """
    config = base()
    set_first_stage(config.first_stage, first_stage)
    config.data.update(source="folder", resolution=256)
    config.conditioning.text.enabled = False
    config.diffusion.update(process="discrete", schedule="linear", start=start, end=end, prediction="eps", loss=loss)
    config.optimizer.update(warmup=0, clip_norm=0.0)
    config.ema.decays = (0.9999,)
    config.sample.update(sampler="ddim", steps=200, guidance=1.0, eta=0.0, spacing="leading")
    return config


def shapes() -> ConfigDict:
    """A small model of drawn scenes of 64 px, trained in minutes on two CPU cores, its first stage in five; without conditions yet."""
    config = base()
    config.conditioning.text.enabled = False
    config.data.update(source="shapes", resolution=64, size=20_000, counts=(1, 2, 3))

    first = config.first_stage
    first.update(channels=128, channel_mult=(1,), num_res_blocks=1, mid_attention=False, z_channels=8, latent_channels=8, patch_size=8)
    first.init_log_var = -6.0
    first.loss.update(pixel="l1_l2", disc_start=2_400, disc_weight=0.1)
    first.discriminator.update(features=32, num_layers=2, norm="group")
    first.train.update(steps=3_200, batch_size=16)
    first.optimizer.update(kind="adam", learning_rate=2e-3, schedule="cosine", warmup=100, b1=0.9, b2=0.99, weight_decay=0.0, clip_norm=0.0)
    first.ema.decays = (0.99,)

    config.denoiser.update(channels=128, channel_mult=(1,), num_res_blocks=1, attention_levels=(1,), head_channels=32, scale_shift=True)
    config.diffusion.update(process="flow", shift=2.0, prediction="flow", time_sampling="stratified")
    config.optimizer.update(learning_rate=1e-3, schedule="linear", warmup=150, decay_start=0.6)
    config.ema.decays = (0.999, 0.99)
    config.train.update(steps=3_500, batch_size=16, log_every=50)
    config.sample.update(every=2_000, sampler="euler", steps=25, guidance=3.0, spacing="trailing", batch_size=50)
    config.evaluate.update(prompts=256, held_out=200, guidance=(2.0, 3.0, 4.0), guidance_prompts=32)
    config.checkpoint.update(every=500, keep=2)
    return config


def smoke(config: ConfigDict) -> ConfigDict:
    """A `shapes` preset of any task, so small that every stage runs in minutes: a check that it works, and not a model."""
    config.data.update(size=512, resolution=32)
    config.first_stage.update(channels=16, channel_mult=(1, 2), patch_size=2)
    config.first_stage.loss.disc_start = 24
    config.first_stage.discriminator.features = 8
    config.first_stage.train.update(steps=32, batch_size=8, log_every=8)
    config.first_stage.optimizer.warmup = 4
    config.first_stage.statistics_examples = 256
    config.denoiser.update(channels=32, channel_mult=(1, 2), attention_levels=(1, 2))
    config.conditioning.text.update(width=32, depth=1, num_heads=2, head_dim=16)
    config.conditioning.boxes.update(width=32, depth=1, num_heads=2, head_dim=16)
    config.conditioning.label.width = 32
    config.conditioning.segmentation.stages = 2
    config.optimizer.warmup = 4
    config.train.update(steps=32, batch_size=8, log_every=8)
    config.sample.update(every=16, prompts=config.sample.prompts[:2], steps=4, batch_size=16)
    config.evaluate.update(prompts=8, held_out=8, guidance=(2.0,), guidance_prompts=8)
    config.checkpoint.update(every=8)
    return config
