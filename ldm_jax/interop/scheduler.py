"""diffusers' scheduler_config.json and our `diffusion` and `sample` groups, both ways."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax.config import UserError
from ldm_jax.diffusion.schedules import GIVEN, make_betas
from ldm_jax.interop import fields

_SCHEDULES = {"scaled_linear": "linear", "linear": "linear_beta", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_SPACINGS = ("leading", "trailing", "linspace")
# The schedulers whose process is the discrete one, and what each takes where its file is silent. A field that is not here it does not read,
# whatever stands in the file.
_BETAS: dict[str, Any] = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
_BETAS |= {"trained_betas": None, "prediction_type": "epsilon", "timestep_spacing": "linspace", "steps_offset": 0}
_PIXELS = {"timestep_spacing": "leading", "clip_sample": True, "thresholding": False, "rescale_betas_zero_snr": False}
_SOLVER = {"thresholding": False, "use_flow_sigmas": False, "use_dynamic_shifting": False}
_DISCRETE: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _BETAS | _PIXELS | {"set_alpha_to_one": True},
    "DDIMParallelScheduler": _BETAS | _PIXELS | {"set_alpha_to_one": True},
    "DDPMScheduler": _BETAS | _PIXELS,
    "DDPMParallelScheduler": _BETAS | _PIXELS,
    "PNDMScheduler": _BETAS | {"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
    "LMSDiscreteScheduler": _BETAS,
    "EulerDiscreteScheduler": _BETAS | {"rescale_betas_zero_snr": False},
    "EulerAncestralDiscreteScheduler": _BETAS | {"rescale_betas_zero_snr": False},
    "HeunDiscreteScheduler": _BETAS | {"clip_sample": False},
    "KDPM2DiscreteScheduler": _BETAS,
    "KDPM2AncestralDiscreteScheduler": _BETAS,
    "DEISMultistepScheduler": _BETAS | _SOLVER,
    "DPMSolverMultistepScheduler": _BETAS | _SOLVER | {"rescale_betas_zero_snr": False},
    "DPMSolverSinglestepScheduler": _BETAS | _SOLVER,
    "UniPCMultistepScheduler": _BETAS | _SOLVER | {"rescale_betas_zero_snr": False},
}
_FLOW = {"shift": 1.0, "use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None}
_CLASSES = _DISCRETE | {"FlowMatchEulerDiscreteScheduler": _FLOW, "FlowMatchHeunDiscreteScheduler": {"shift": 1.0}}
_KNOWN: dict[str, fields.Check] = {
    "num_train_timesteps": fields.count,
    "beta_start": fields.positive,
    "beta_end": fields.positive,
    "beta_schedule": fields.word,
    "trained_betas": fields.maybe(fields.numbers),
    "prediction_type": fields.word,
    "timestep_spacing": fields.word,
    "steps_offset": lambda value: value == 0 or fields.count(value),
    "set_alpha_to_one": fields.flag,
    "skip_prk_steps": fields.flag,
    "clip_sample": fields.flag,
    "rescale_betas_zero_snr": fields.flag,
    "shift": fields.positive,
}
_MUST = {"thresholding": False, "use_flow_sigmas": False, "use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None}
# What a pipeline puts there, whatever its scheduler's file says.
_FORCED: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionImg2ImgPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}
_OURS = {"steps_offset": 0, "set_alpha_to_one": True}  # what our spacings are there, and
_LEGACY = {"steps_offset": 1, "set_alpha_to_one": False}  # what 'legacy_ldm' is, with "leading"


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


def from_scheduler(config: Mapping[str, Any], pipeline: str | None = None) -> Scheduler:
    """What a file says, and what the pipeline of that class does to it. Raises UserError for a process that has no counterpart here."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in _CLASSES:
        raise UserError(f"the scheduler {str(name)[:80]!r} has no counterpart here: it is not one of {', '.join(_CLASSES)}")
    defaults = _CLASSES[name]
    said = defaults | {field: value for field, value in config.items() if field in defaults}
    said |= {field: value for field, value in _FORCED.get(str(pipeline), {}).items() if field in defaults}
    fields.account(said, name, _MUST, _KNOWN)
    if name not in _DISCRETE:
        note = f"{name} does not spread its times as any spacing here does: the model is set to sampler 'euler', 'trailing'"
        diffusion = {"process": "flow", "shift": float(said["shift"]), "prediction": "flow"}
        return Scheduler(diffusion, {"sampler": "euler", "spacing": "trailing"}, {}, [note])
    return Scheduler(_diffusion(said), *_sampling(name, said))


def _diffusion(said: Mapping[str, Any]) -> dict[str, Any]:
    for field, known in (("beta_schedule", _SCHEDULES), ("prediction_type", _PREDICTIONS), ("timestep_spacing", _SPACINGS)):
        if said[field] not in known:
            raise UserError(f"the scheduler's {field}={said[field]!r} has no counterpart here: it is not one of {', '.join(known)}")
    betas, schedule = said["trained_betas"], _SCHEDULES[said["beta_schedule"]]
    without_ends = betas is not None or schedule == "cosine"
    group = {
        "process": "discrete",
        "schedule": schedule if betas is None else GIVEN,
        "start": None if without_ends else float(said["beta_start"]),
        "end": None if without_ends else float(said["beta_end"]),
        "num_steps": said["num_train_timesteps"],
        "prediction": _PREDICTIONS[said["prediction_type"]],
        "zero_terminal_snr": said.get("rescale_betas_zero_snr", False),
        **({} if betas is None else {"betas": [float(beta) for beta in betas]}),
    }
    try:
        make_betas(group["schedule"], group["num_steps"], group["start"], group["end"], group.get("betas", ()))
    except ValueError as error:
        raise UserError(f"the scheduler's betas make no schedule: {error}") from error
    return group


def _sampling(name: str, said: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Fields of the `sample` group, what is kept, and notes: on everything in which ours then draws otherwise."""
    spacing = said["timestep_spacing"]
    if spacing == "leading" and said["steps_offset"]:
        spacing = "legacy_ldm"
    canonical = _LEGACY if spacing == "legacy_ldm" else _OURS
    habits = {field: said.get(field, canonical[field]) for field in canonical}
    kept = {field: value for field, value in habits.items() if value != canonical[field]}
    plms = name == "PNDMScheduler" and said["skip_prk_steps"]
    sampler = "plms" if plms else "ddim"
    notes = []
    if not name.startswith("DDIM") and not plms:
        notes.append(f"the scheduler is a {name}; the model is set to sampler 'ddim', spacing {spacing!r}, which draws otherwise")
    elif spacing == "linspace":
        notes.append(f"{name} steps past the times that 'linspace' visits, and the sampler here steps to them")
    elif matter := {field: value for field, value in kept.items() if field != "steps_offset" or spacing == "legacy_ldm"}:
        notes.append(f"the scheduler's {_said(matter)} beside {spacing!r} has no counterpart here: {_said(canonical)} is drawn")
    if said.get("clip_sample"):
        notes.append("the scheduler clips what it predicts of the latents (clip_sample), no sampler here does")
    return {"sampler": sampler, "spacing": spacing}, kept, notes


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{field}={value}" for field, value in values.items())


def to_scheduler(diffusion: Mapping[str, Any], sample: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json of a DDIMScheduler that draws as our "ddim" does, but for what is `kept` from where the model came from.

    A schedule that has no name there is written as its betas. With "trailing" the two agree for numbers of steps that divide the number of
    times: there each step spans the same whole number of times, whatever is visited next. Raises UserError for what that class cannot draw.
    """
    predictions = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if diffusion["process"] != "discrete":
        raise UserError(
            f"diffusers' pipelines of latent diffusion sample no {diffusion['process']} process: train with diffusion.process=discrete"
        )
    if diffusion["prediction"] not in predictions:
        raise UserError(f"diffusers has no prediction {diffusion['prediction']!r}")
    if sample["spacing"] == "linspace":
        raise UserError("diffusers' DDIMScheduler steps past the times that sample.spacing=linspace visits: take trailing or leading")
    if sample["spacing"] in ("karras", "exponential"):
        raise UserError(f"diffusers' DDIMScheduler has no spacing {sample['spacing']!r}: take trailing, leading or legacy_ldm")
    legacy = sample["spacing"] == "legacy_ldm"
    return {
        "_class_name": "DDIMScheduler",
        **_betas(diffusion),
        "num_train_timesteps": diffusion["num_steps"],
        "prediction_type": predictions[diffusion["prediction"]],
        "timestep_spacing": "leading" if legacy else sample["spacing"],
        "clip_sample": False,
        "rescale_betas_zero_snr": diffusion.get("zero_terminal_snr", False),
        **(_LEGACY if legacy else _OURS),
        **{field: kept[field] for field in _OURS if field in kept},
    }


def _betas(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule, by name where it has one; where a group says None of its ends, the schedule's own."""
    schedules = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    given = {"beta_start": diffusion["start"], "beta_end": diffusion["end"]}
    betas = make_betas(diffusion["schedule"], diffusion["num_steps"], diffusion["start"], diffusion["end"], diffusion.get("betas", ()))
    if diffusion["schedule"] not in schedules:
        return {"trained_betas": [float(beta) for beta in betas]}
    if diffusion["schedule"] == "cosine":
        return {"beta_schedule": schedules["cosine"]}
    own = {"beta_start": float(betas[0]), "beta_end": float(betas[-1])}
    ends = {name: value or own[name] for name, value in given.items()}
    return {"beta_schedule": schedules[diffusion["schedule"]], **ends}
