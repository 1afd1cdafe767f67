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
from ldm_jax.diffusion.samplers import SamplerSettings, image_keys, sample, sampling_grid
from ldm_jax.nn.tiling import Tiling

_SAMPLER = {"sampler": "kind", "steps": "steps", "eta": "eta", "spacing": "spacing", "strength": "strength"}
_SAMPLER |= {name: name for name in ("churn", "churn_interval", "churn_noise", "threshold", "threshold_max", "threshold_quantile")}
_GUIDANCE = {f"guidance_{name}": name for name in ("kind", "interval", "rescale", "parallel", "radius", "momentum")}


@dataclass(frozen=True)
class Tiles:
    """Overlapping windows that a large picture is worked on in, so that memory is bounded by the window.

    Attributes:
      tiling: of the latents.
      passes: of an autoencoder, how often the statistics of its norms are measured over the whole picture before it is made: 0 leaves each
        window its own, 1 keeps colour and contrast, more come nearer to what the whole would be.
    """

    tiling: Tiling
    passes: int = 1


def make_tiles(pixels: int | None, factor: int, multiple: int = 1, passes: int = 1) -> Tiles | None:
    """Windows of so many pixels, a quarter of them shared with the next; None for none. Raises UserError."""
    if pixels is None:
        return None
    if pixels < 2 * factor * multiple or pixels % (factor * multiple):
        raise UserError(f"a tile of {pixels} pixels must be a multiple of {factor * multiple}, and at least {2 * factor * multiple}")
    if passes < 0:
        raise UserError(f"tile_passes must be 0 or more, not {passes}")
    cells = pixels // factor
    return Tiles(Tiling(cells, max(cells // 4, 1)), passes)


@dataclass(frozen=True)
class Sampling:
    """How images are drawn; hashable, so it can be a static argument.

    Attributes:
      record_every: after how many steps states are kept; 0 keeps none.
      tiles: windows that the denoiser sees of a picture larger than those it was trained on (Rombach et al. 2022, section 4.3.2).
      decode_tiles: windows that are decoded.
    """

    sampler: SamplerSettings
    guidance: Guidance
    record_every: int = 0
    tiles: Tiles | None = None
    decode_tiles: Tiles | None = None


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
    if "eta" in given and merged.get("sampler", "ddim") != "ddim":
        raise UserError(f"sample: sampler {merged['sampler']!r} has no eta: use 'ddim'")
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
    if asked.tile_passes is not None and asked.tile is None and asked.decode_tile is None:
        raise UserError("tile_passes is of tile or decode_tile: give the pixels of one")
    for name in ("num", "batch_size"):
        if (value := getattr(asked, name)) is not None and value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if asked.seed is not None and not 0 <= asked.seed < 2**32:
        raise UserError(f"seed must lie in [0, 2**32), not {asked.seed}")
    if asked.init_images is None and (asked.strength is not None or asked.holes is not None):
        raise UserError("strength and holes are of init_images: give the pictures to start from, or to keep outside the holes")
    if asked.init_images is not None and asked.strength is None and asked.holes is None:
        raise UserError("init_images are started from with strength, the share of the steps that are run, or kept outside of holes")
    if asked.holes is not None and (np.all(asked.holes) or not np.any(asked.holes)):
        raise UserError("holes are everywhere, or nowhere: part of the picture is to stay, and part to be painted anew")
    if asked.weak is not None and (asked.negative is not None or asked.guidance_kind == "cfg++"):
        raise UserError("with a weak model, guidance moves away from it: neither a negative prompt nor cfg++ has a meaning")


def picture_size(asked: Sequence[int] | None, pictures: Mapping[str, tuple[int, int]], multiple: int, default: int) -> tuple[int, int]:
    """(height, width) of what is drawn, in pixels: as asked for, or as the inputs that are pictures have it, else the training's.

    Args:
      pictures: the size that each such input asks for.
      multiple: what height and width must be divisible by.

    Raises UserError where they differ, or do not fit the model.
    """
    if asked is not None and len(asked) != 2:
        raise UserError(f"size is a height and a width, not {asked}")
    sizes = {**({} if asked is None else {"size": (int(asked[0]), int(asked[1]))}), **pictures}
    if len(set(sizes.values())) > 1:
        raise UserError("inputs of different sizes: " + ", ".join(f"{name} is for {h}x{w}" for name, (h, w) in sizes.items()))
    height, width = next(iter(sizes.values()), (default, default))
    if height < 1 or width < 1 or height % multiple or width % multiple:
        near = [max(round(side / multiple), 1) * multiple for side in (height, width)]
        raise UserError(f"this model draws pictures whose sides are multiples of {multiple}: {near[0]}x{near[1]}, not {height}x{width}")
    return height, width


def per_image_scale(guidance: float | Sequence[float], total: int) -> float | np.ndarray:
    """One scale of guidance, or one for each of `total` images, float32 [total]. Raises UserError."""
    if not np.all(np.isfinite(guidance)):
        raise UserError(f"guidance must be a number, not {guidance}")
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
      asked: what the user set of guidance, None where not.
      guides: whether there is anything to move away from.
    """
    set_by_user = [name for name, value in asked.items() if value is not None and name != "guidance"]
    if not guides and asked.get("guidance") is not None and np.any(np.asarray(scale) != 1):
        set_by_user.append("guidance")
    if set_by_user and (is_plain(sampling, scale) or not guides):
        why = "a scale of 1" if guides else "a model whose training dropped no condition"
        raise UserError(f"{', '.join(set_by_user)} has no effect with {why}")
    guidance = sampling.guidance
    if guidance.kind == "apg" and (guidance.parallel, guidance.radius, guidance.momentum) == (1.0, 0.0, 0.0):
        raise UserError("guidance 'apg' is 'cfg' without guidance_parallel below 1, a guidance_radius or a guidance_momentum")
    if guidance.kind == "cfg++":
        if sampling.sampler.threshold != "none":
            raise UserError("guidance 'cfg++' renoises with what the model said without a condition: it goes with no threshold")
        if sampling.sampler.kind not in ("ddim", "euler"):
            raise UserError(f"guidance 'cfg++' is a way of renoising in sampler 'ddim', not in {sampling.sampler.kind!r}")
        if not np.all((np.asarray(scale) >= 0) & (np.asarray(scale) <= 1)):
            raise UserError(f"guidance 'cfg++' takes a scale from 0 to 1, not {scale}")


def check_levels(sampling: Sampling, process: Process) -> None:
    """Raises UserError where an interval of guidance or the states that are kept meet no step of the sampler."""
    settings, (low, high) = sampling.sampler, sampling.guidance.interval
    if sampling.record_every > settings.steps:
        raise UserError(f"states are kept after every {sampling.record_every} steps, of which there are {settings.steps}")
    if sampling.guidance.everywhere:
        return
    try:
        ratio = sampling_grid(process, settings).ratio[:-1]
    except ValueError as error:
        raise UserError(f"sample: {error}") from error
    if not np.any((ratio > low) & (ratio <= high)):
        raise UserError(
            f"guidance_interval {low:g} to {high:g} holds no level of sigma/alpha at which a step begins: they go from {ratio.min():g} to"
            f" {ratio.max():g}"
        )


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
