"""diffusers' scheduler_config.json and our `diffusion` and `sample` groups, both ways."""

from collections.abc import Mapping
from typing import Any

from ldm_jax.config import UserError

_SCHEDULES = {"scaled_linear": "linear", "linear": "linear_beta"}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def from_scheduler(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `diffusion` group, and fields of the `sample` group. Raises UserError for a process that has no counterpart here."""
    if "FlowMatch" in str(config.get("_class_name")):
        return {"process": "flow", "shift": float(config.get("shift", 1.0)), "prediction": "flow"}, {
            "sampler": "euler",
            "spacing": "trailing",
        }
    schedule, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    wrong = [] if schedule in _SCHEDULES else [f"beta_schedule={schedule!r}"]
    wrong += [] if prediction in _PREDICTIONS else [f"prediction_type={prediction!r}"]
    wrong += [f"{name}={config[name]!r}" for name in ("trained_betas", "rescale_betas_zero_snr", "thresholding") if config.get(name)]
    if wrong:
        raise UserError(f"the scheduler's {', '.join(wrong)} has no counterpart here")
    diffusion = {
        "process": "discrete",
        "schedule": _SCHEDULES[schedule],
        "start": float(config.get("beta_start", 1e-4)),
        "end": float(config.get("beta_end", 0.02)),
        "num_steps": int(config.get("num_train_timesteps", 1000)),
        "prediction": _PREDICTIONS[prediction],
    }
    return diffusion, {"sampler": "ddim", "spacing": config.get("timestep_spacing", "leading")}


def to_scheduler(diffusion: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json of a DDIMScheduler that draws as our "ddim" does. Raises UserError for a continuous process."""
    schedules = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if diffusion["process"] != "discrete":
        raise UserError(
            f"diffusers' pipelines of latent diffusion sample no {diffusion['process']} process: train with diffusion.process=discrete"
        )
    if diffusion["schedule"] not in schedules or diffusion["prediction"] not in predictions:
        raise UserError(f"diffusers has no schedule {diffusion['schedule']!r} with prediction {diffusion['prediction']!r}")
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": schedules[diffusion["schedule"]],
        "beta_start": diffusion["start"],
        "beta_end": diffusion["end"],
        "num_train_timesteps": diffusion["num_steps"],
        "prediction_type": predictions[diffusion["prediction"]],
        "timestep_spacing": sample["spacing"],
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
