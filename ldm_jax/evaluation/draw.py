"""Samples of a model for its evaluation, drawn in parts that a killed job does not draw again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ldm_jax.config import UserError
from ldm_jax.data.latents import weights_fingerprint
from ldm_jax.diffusion.guidance import evaluations
from ldm_jax.evaluation import parts
from ldm_jax.evaluation.told import Told
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.sampling import is_plain, make_sampling
from ldm_jax.sharding.processes import wait_for_all

_OF_APG = ("parallel", "radius", "momentum")
_OF_SOME = ("churn", "threshold")  # settings of some models


def draw(model: LatentDiffusion, examples: Told, number: int, options: Mapping[str, Any], directory: Path, about: Any) -> None:
    """Samples 0 to `number` - 1 of a model as .npz files in ADM's form, in a directory that holds nothing else.

    Sample i is a function of the seed, i and what it is told. Of several processes each draws its share.

    Args:
      examples: what sample i is told: the fields of `model.inputs`.
      options: of `LatentDiffusion.sample`.
      about: says what the examples are, so that a directory of others is refused.

    Raises UserError.
    """
    size = options.get("batch_size") or model.info["sample"]["batch_size"]
    weights = weights_fingerprint(model.params)
    assert model.denoiser is not None
    how = {"defaults": model.info["sample"], "options": dict(options), "dtype": np.dtype(model.denoiser.network.dtype).name}
    parts.claim(directory, {"model": weights, "number": number, "told": about, "part": size, **how})
    todo = parts.missing(directory, number, size)
    with tqdm(total=sum(stop - start for start, stop in todo), desc="draw", unit="image", mininterval=2, disable=not todo) as bar:
        for start, stop in todo:
            told = [examples(i) for i in range(start, stop)]
            inputs = {name: [example[name] for example in told] for name in model.inputs}
            given: Any = {**options, **inputs}
            images = model.sample(num=stop - start, first=start, **given)
            labels = {"arr_1": np.asarray(inputs["label"], np.int64)} if "label" in inputs else {}
            parts.save(parts.part_file(directory, (start, stop)), {"arr_0": images, **labels})
            bar.update(stop - start)
    wait_for_all()


def settings(model: LatentDiffusion, options: Mapping[str, Any]) -> dict[str, Any]:
    """How samples are drawn with these options, in full: with the model's own defaults, and the evaluations of the network a sample."""
    stored = model.info["sample"]
    of_guidance = tuple(f"guidance_{name}" for name in ("kind", "interval", "rescale", *_OF_APG))
    names = ("steps", "sampler", "eta", "spacing", *of_guidance)
    sampling = make_sampling(stored, **{name: options.get(name) for name in names})
    guidance = float(stored["guidance"] if options.get("guidance") is None else options["guidance"])
    assert model.denoiser is not None
    guides = model.denoiser.conditioning.guides or any(options.get(name) is not None for name in ("negative", "weak"))
    guided = guides and not is_plain(sampling, guidance)
    sampler = sampling.sampler
    return {
        "sampler": sampler.kind,
        "steps": sampler.steps,
        "network evaluations a sample": evaluations(model.denoiser.process, sampler, sampling.guidance.interval if guided else None),
        "eta": sampler.eta,
        "spacing": sampler.spacing,
        "guidance": guidance if guided else 1.0,
        "guidance kind": sampling.guidance.kind if guided else "none",
        "guidance interval": None if sampling.guidance.everywhere or not guided else list(sampling.guidance.interval),
        "guidance rescale": sampling.guidance.rescale if guided else 0.0,
        **{f"guidance {name}": getattr(sampling.guidance, name) for name in _OF_APG if guided and sampling.guidance.kind == "apg"},
        "seed": stored["seed"] if options.get("seed") is None else options["seed"],
        **{name: stored[name] for name in _OF_SOME if stored.get(name) not in (None, "none", 0, 0.0)},
        "prediction": model.denoiser.prediction,
        **described(model),
    }


def described(model: LatentDiffusion) -> dict[str, Any]:
    """Which weights these are, and what they compute in."""
    network = model.first_stage.network if model.denoiser is None else model.denoiser.network
    return {
        "dtype": np.dtype(network.dtype).name,
        "updates of training": model.info.get("step"),
        "weights of the model": weights_fingerprint(model.params),
    }


def classes_of(model: LatentDiffusion) -> int:
    """Classes that a model may be told. Raises UserError for a model of none."""
    label = model.info["conditioning"].get("label", {})
    if not label.get("enabled"):
        raise UserError("this model is told no classes")
    return int(label["num_classes"])
