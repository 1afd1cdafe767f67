"""The static settings of drawing samples, made of a `sample` group and what overrides it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.diffusion.guidance import Guidance
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers import SamplerSettings, image_keys, sample

_SAMPLER = {"sampler": "kind", "steps": "steps", "eta": "eta", "spacing": "spacing", "strength": "strength"}
_SAMPLER |= {name: name for name in ("churn", "churn_interval", "churn_noise", "threshold", "threshold_max", "threshold_quantile")}
_GUIDANCE = {f"guidance_{name}": name for name in ("kind", "interval", "rescale", "parallel", "radius", "momentum")}


@dataclass(frozen=True)
class Sampling:
    """A sampler, how it is guided, and after how many steps states are kept (0: none are); hashable, so it can be a static argument."""

    sampler: SamplerSettings
    guidance: Guidance
    record_every: int = 0


def make_sampling(group: Mapping[str, Any], **overrides: Any) -> Sampling:
    """Settings of a `sample` group (or of a `model.json`'s, which may be older and lack fields), where an override is not None.

    An eta, a churn or a kind of guidance that is stored belongs to the sampler and the guidance that are stored, not to another that is
    asked for. Raises UserError for values that make no sense.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    stored = dict(group)
    if "sampler" in given and given["sampler"] != stored.get("sampler"):
        stored = {name: value for name, value in stored.items() if name != "eta" and not name.startswith("churn")}
    if "guidance_kind" in given and given["guidance_kind"] != stored.get("guidance_kind"):
        of_apg = ("guidance_parallel", "guidance_radius", "guidance_momentum")
        stored = {name: value for name, value in stored.items() if name not in of_apg}
    merged = stored | given
    try:
        merged |= {name: _interval(name, merged.get(name, ())) for name in ("churn_interval", "guidance_interval")}
        sampler = SamplerSettings(**{field: merged[name] for name, field in _SAMPLER.items() if name in merged})
        chosen = {field: merged[name] for name, field in _GUIDANCE.items() if name in merged}
        return Sampling(sampler, Guidance(**chosen))
    except ValueError as error:
        raise UserError(f"sample: {error}") from error


def _interval(name: str, values: Any) -> tuple[float, float]:
    """Two numbers, the second perhaps missing; none of them is everywhere."""
    if len(values) > 2:
        raise ValueError(f"{name} takes two levels of sigma/alpha, not {len(values)}")
    low, high = [*map(float, values), *(0.0, math.inf)[len(values) :]]
    return low, high


def check_request(asked: Any) -> None:
    """Raises UserError for options of `LatentDiffusion.sample` that do not go together."""
    for name in ("num", "batch_size"):
        if (value := getattr(asked, name)) is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if asked.init_images is None and (asked.strength is not None or asked.holes is not None):
        raise UserError("strength and holes are of init_images: give the pictures to start from, or to keep outside the holes")
    if asked.init_images is not None and asked.strength is None and asked.holes is None:
        raise UserError("init_images are started from with strength, the share of the steps that are run, or kept outside of holes")
    if asked.weak is not None and (asked.negative is not None or asked.guidance_kind == "cfg++"):
        raise UserError("with a weak model, guidance moves away from it: neither a negative prompt nor cfg++ has a meaning")


def per_image_scale(guidance: float | Sequence[float], total: int) -> float | np.ndarray:
    """One scale of guidance, or one for each of `total` images, float32 [total]. Raises UserError."""
    if isinstance(guidance, float | int):
        return float(guidance)
    if len(guidance) != total:
        raise UserError(f"{len(guidance)} guidance scales for {total} images: give one, or one for each image")
    return np.asarray(guidance, np.float32)


def is_plain(sampling: Sampling, scale: float | np.ndarray) -> bool:
    """Whether the conditional prediction is all that counts, so that nothing need be doubled."""
    return isinstance(scale, float) and scale == 1 and sampling.guidance.kind != "cfg++"


def check_guidance(sampling: Sampling, scale: float | np.ndarray, asked: Mapping[str, Any], guides: bool) -> None:
    """Raises UserError for a guidance that has no effect or no meaning.

    Args:
      scale: a number, or one for each image.
      asked: what the user set of `guidance_*`, None where not.
      guides: whether there is anything to move away from.
    """
    set_by_user = [name for name, value in asked.items() if value is not None]
    if set_by_user and (is_plain(sampling, scale) or not guides):
        why = "a scale of 1" if guides else "a model without conditions"
        raise UserError(f"{', '.join(set_by_user)} has no effect with {why}")
    if sampling.guidance.kind == "cfg++":
        if sampling.sampler.kind not in ("ddim", "euler"):
            raise UserError(f"guidance 'cfg++' is a way of renoising in sampler 'ddim', not in {sampling.sampler.kind!r}")
        if not np.all((np.asarray(scale) >= 0) & (np.asarray(scale) <= 1)):
            raise UserError(f"guidance 'cfg++' takes a scale from 0 to 1, not {scale}")


def check_sampler(settings: SamplerSettings, process: Process, prediction: str) -> None:
    """Raises UserError where a sampler does not go with process and prediction; nothing is computed."""
    state = jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32)
    init = None if settings.strength == 1 else state
    try:
        jax.eval_shape(
            lambda x, x0: sample(lambda x_t, t: x_t, process, prediction, settings, x, image_keys(0, jnp.arange(1)), x0), state, init
        )
    except ValueError as error:
        raise UserError(f"sample: {error}") from error
