"""Latent diffusion models in JAX. `load` reads a trained model; the commands are `python -m ldm_jax.train`, `.encode` and `.sample`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm_jax.latent_diffusion import LatentDiffusion

__all__ = ["load"]


def load(path: str, step: int | None = None, ema: float | str | None = None, dtype: str = "auto") -> "LatentDiffusion":
    """Reads a model directory or a work directory.

    Args:
      step, ema: of a work directory: a checkpoint other than the finished model, the EMA of another decay.
      dtype: of the computation: auto (bfloat16 on accelerators, float32 on CPU), float32, bfloat16.

    Raises: `ldm_jax.config.UserError` where there is no complete model.
    """
    from ldm_jax.config import UserError
    from ldm_jax.latent_diffusion import load_model
    from ldm_jax.paths import resolve

    root = resolve(path)
    if (root / "model.json").exists():
        if step is not None or ema is not None:
            raise UserError(f"{path} is a model directory: it holds one set of weights; step and ema belong to a work directory")
        return load_model(root, dtype)
    if step is None and ema is None and (root / "model" / "model.json").exists():
        return load_model(root / "model", dtype)
    from ldm_jax.training.run import restore_model

    return restore_model(path, step, None if ema is None else str(ema), dtype)
