"""diffusers' scheduler_config.json and our `diffusion` and `sample` groups, both ways."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax.config import UserError
from ldm_jax.diffusion.schedules import make_betas

_SCHEDULES = {"scaled_linear": "linear", "linear": "linear_beta", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_REFUSED = ("trained_betas", "thresholding", "use_dynamic_shifting", "invert_sigmas")
_LEGACY = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}  # what 'legacy_ldm' is there
_KEPT = ("steps_offset", "set_alpha_to_one")


class Scheduler(NamedTuple):
    """What a scheduler_config.json says.

    Attributes:
      diffusion: the group.
      sample: fields of the group.
      kept: habits of its sampler that ours does not have, for whoever writes the model back.
      notes: for the user.
    """

    diffusion: dict[str, Any]
    sample: dict[str, Any]
    kept: dict[str, Any]
    notes: list[str]


def from_scheduler(config: Mapping[str, Any]) -> Scheduler:
    """Raises UserError for a process that has no counterpart here."""
    flow = "FlowMatch" in str(config.get("_class_name"))
    schedule, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    wrong = [] if flow or schedule in _SCHEDULES else [f"beta_schedule={schedule!r}"]
    wrong += [] if flow or prediction in _PREDICTIONS else [f"prediction_type={prediction!r}"]
    wrong += [f"{name}={config[name]!r}" for name in _REFUSED if config.get(name)]
    if wrong:
        raise UserError(f"the scheduler's {', '.join(wrong)} has no counterpart here")
    if flow:
        diffusion = {"process": "flow", "shift": float(config.get("shift", 1.0)), "prediction": "flow"}
        return Scheduler(diffusion, {"sampler": "euler", "spacing": "trailing"}, {}, [])
    ends = (None, None) if schedule == "squaredcos_cap_v2" else (config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
    diffusion = {
        "process": "discrete",
        "schedule": _SCHEDULES[schedule],
        "start": ends[0],
        "end": ends[1],
        "num_steps": int(config.get("num_train_timesteps", 1000)),
        "prediction": _PREDICTIONS[prediction],
        "zero_terminal_snr": bool(config.get("rescale_betas_zero_snr", False)),
    }
    legacy = all(config.get(name, "leading" if name == "timestep_spacing" else None) == value for name, value in _LEGACY.items())
    sample = {"sampler": "ddim", "spacing": "legacy_ldm" if legacy else config.get("timestep_spacing", "leading")}
    clips = ["the scheduler clips what it predicts of the latents (clip_sample), no sampler here does"] if config.get("clip_sample") else []
    return Scheduler(diffusion, sample, {name: config[name] for name in _KEPT if name in config}, clips)


def to_scheduler(diffusion: Mapping[str, Any], sample: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json of a DDIMScheduler that draws as our "ddim" does, but for what is `kept` from where the model came from.

    With "trailing" the two agree for numbers of steps that divide the number of times: there each step spans the same whole number of
    times, whatever is visited next. Raises UserError for what that class cannot draw.
    """
    schedules = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if diffusion["process"] != "discrete":
        raise UserError(
            f"diffusers' pipelines of latent diffusion sample no {diffusion['process']} process: train with diffusion.process=discrete"
        )
    if diffusion["schedule"] not in schedules or diffusion["prediction"] not in predictions:
        raise UserError(f"diffusers has no schedule {diffusion['schedule']!r} with prediction {diffusion['prediction']!r}")
    if sample["spacing"] == "linspace":
        raise UserError("diffusers' DDIMScheduler steps past the times that sample.spacing=linspace visits: take trailing or leading")
    if sample["spacing"] in ("karras", "exponential"):
        raise UserError(f"diffusers' DDIMScheduler has no spacing {sample['spacing']!r}: take trailing, leading or legacy_ldm")
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": schedules[diffusion["schedule"]],
        **_ends(diffusion),
        "num_train_timesteps": diffusion["num_steps"],
        "prediction_type": predictions[diffusion["prediction"]],
        "timestep_spacing": sample["spacing"],
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "rescale_betas_zero_snr": diffusion.get("zero_terminal_snr", False),
        **(_LEGACY if sample["spacing"] == "legacy_ldm" else {}),
        **{name: kept[name] for name in _KEPT if name in kept},
    }


def _ends(diffusion: Mapping[str, Any]) -> dict[str, float]:
    """`beta_start` and `beta_end`, of schedules that have them; where a group says None, the schedule's own."""
    if diffusion["schedule"] == "cosine":
        return {}
    given = {"beta_start": diffusion["start"], "beta_end": diffusion["end"]}
    betas = make_betas(diffusion["schedule"], diffusion["num_steps"], *given.values())
    own = {"beta_start": float(betas[0]), "beta_end": float(betas[-1])}
    return {name: own[name] if value is None else value for name, value in given.items()}
