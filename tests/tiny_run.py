"""A whole run that takes seconds, as a configuration file for the commands."""

from ml_collections import ConfigDict

from tests import tiny


def get_config(preset: str = "") -> ConfigDict:
    """Drawn scenes of 16 px, 20 updates a stage at learning rates of 2e-4; the preset is the dtype, float32 by default."""
    config = tiny.config()
    config.conditioning.text.enabled = True
    for train in (config.train, config.first_stage.train):
        train.update(steps=20, dtype=preset or "float32")
    config.checkpoint.update(every=8)
    config.evaluate.update(prompts=8, guidance_prompts=4, guidance=(1.0, 3.0), held_out=4, examples=8, samples=8, every=20)
    return config
