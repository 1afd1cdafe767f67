"""Training that begins with the weights of another model (`train.init_from`): do they mean here what they meant there?

Names and shapes say that weights fit a network, and little of what it does with them: heads, groups of norms and activations do not show
in them, nor what was predicted, and of what noise.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.conditioning.tokenizer import Tokenizer
from ldm_jax.config import UserError, WorkDir
from ldm_jax.diffusion.process import DiscreteProcess
from ldm_jax.diffusion.schedules import make_betas
from ldm_jax.latent_diffusion import load_first_stage, read_networks
from ldm_jax.model_directory import TOKENIZER, Params, check_shapes, find_finished, find_model, load_params
from ldm_jax.nn.autoencoder import Autoencoder
from ldm_jax.nn.layers import norm_groups
from ldm_jax.nn.unet import UNet
from ldm_jax.sharding.processes import from_first
from ldm_jax.stages import Denoiser, abstract_params
from ldm_jax.training.autoencoder import AutoencoderStage
from ldm_jax.training.checkpoints import Checkpoints
from ldm_jax.training.diffusion import DiffusionStage

# Fields that the names and shapes of parameters show.
_SHOWN = {"channels", "channel_mult", "num_res_blocks", "attention_levels", "mid_attention", "transformer_depth", "vector_layers"}
_SHOWN |= {"out_channels", "z_channels", "latent_channels", "codebook_size", "quant_conv", "width", "depth", "skip_last", "patch_size"}
_SHOWN |= {"mlp_ratio", "learn_sigma", "cross_attention", "qk_norm", "vocab_size", "max_length", "ff_width", "num_buckets", "rows"}
# Those that say how a network is trained or computed, and of what size pictures are; and those that `_resolved` has in another form.
_FREE = {"dropout", "remat", "dtype", "init_log_var", "stddev", "drop_rate", "frozen", "tokenizer", "size", "resolution", "count"}
_FREE |= {"parent", "name", "head_channels"}
_SCHEDULE = {"schedule", "start", "end", "num_steps", "betas"}


class Differences(NamedTuple):
    """Between a model and a run that shall begin with its weights, "NAME: VALUE there, VALUE here" each.

    Attributes:
      wrong: what makes the weights another function than they were.
      noted: what fine-tuning changes on purpose.
    """

    wrong: list[str]
    noted: list[str]


def denoiser_differences(there: Denoiser, here: Denoiser) -> Differences:
    """Of two denoisers whose parameters have the same names and shapes."""
    ours, theirs = (dict(_denoiser_settings(denoiser)) for denoiser in (here, there))
    wrong, noted = _compare(theirs, ours), _compare({"prediction": there.prediction}, {"prediction": here.prediction}, "diffusion.")
    one, other = there.process, here.process
    if type(one) is not type(other):
        return Differences(wrong, [*noted, f"diffusion.process: {type(one).__name__} there, {type(other).__name__} here"])
    discrete = isinstance(one, DiscreteProcess) and isinstance(other, DiscreteProcess)
    for field in fields(one):  # type: ignore[arg-type]
        found = _compare({field.name: getattr(one, field.name)}, {field.name: getattr(other, field.name)}, "diffusion.")
        if discrete and field.name in _SCHEDULE:
            wrong += [] if _same_betas(one, other) else found  # type: ignore[arg-type]
        elif field.name == "sigma_data":
            wrong += found
        else:
            noted += found
    return Differences(wrong, noted)


def autoencoder_differences(there: Autoencoder, here: Autoencoder) -> list[str]:
    """Of two autoencoders whose parameters have the same names and shapes, what makes the weights another function than they were."""
    return _compare(dict(_resolved(there)), dict(_resolved(here)), "first_stage.")


def _compare(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = [name for name in ours if name in theirs and theirs[name] != ours[name]]
    return [f"{prefix}{name}: {theirs[name]} there, {ours[name]} here" for name in names]


def _denoiser_settings(denoiser: Denoiser) -> Iterator[tuple[str, Any]]:
    for name, value in _resolved(denoiser.network):
        yield f"denoiser.{name}", value
    for conditioner in denoiser.conditioning.conditioners:
        for name, value in _resolved(conditioner):
            yield f"conditioning.{conditioner.name}.{name}", value


def _resolved(thing: Any) -> Iterator[tuple[str, Any]]:
    """Settings by name that shapes do not show: of a network or, with those of its network, of a conditioner.

    Heads and groups are those of each level, which several settings may ask for.
    """
    widths = [thing.channels * mult for mult in thing.channel_mult] if hasattr(thing, "channel_mult") else []
    for field in fields(thing):
        value = getattr(thing, field.name)
        if field.name in _SHOWN | _FREE:
            continue
        if is_dataclass(value):
            yield f"{field.name}.kind", type(value).__name__
            yield from _resolved(value)
        elif field.name == "norm_groups":
            yield field.name, [norm_groups(width, value) for width in widths]
        elif field.name == "num_heads" and isinstance(thing, UNet):
            attending = [w for i, w in enumerate(widths) if 2**i in thing.attention_levels or i == len(widths) - 1]
            yield field.name, [value or width // thing.head_channels for width in attending]
        else:
            yield field.name, value


def _same_betas(one: DiscreteProcess, other: DiscreteProcess) -> bool:
    a, b = (make_betas(p.schedule, p.num_steps, p.start, p.end, p.betas) for p in (one, other))
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=0)


def starts(config: ConfigDict, workdir: WorkDir) -> bool:
    """Whether the run begins with other weights: where it has a checkpoint to go on from, `train.init_from` is not read again."""
    if not config.train.init_from:
        return False
    if not from_first(workdir.checkpoints.exists):
        return True
    with Checkpoints(workdir.checkpoints, 1, read_only=True) as checkpoints:
        return checkpoints.latest() is None


def initial_tokenizer(config: ConfigDict) -> Tokenizer:
    """The tokenizer of the model that the training starts from. Raises UserError where it has none."""
    path = find_finished(config.train.init_from) / "conditioner" / TOKENIZER
    if not path.exists():
        raise UserError(f"train.init_from: {config.train.init_from} has no tokenizer; convert it again with --tokenizer")
    return Tokenizer.load(path, config.conditioning.text.max_length)


def check_denoiser(init_from: str, denoiser: Denoiser, params: Params) -> list[str]:
    """What fine-tuning changes on purpose (`Differences.noted`); `params` are the denoiser's, abstract.

    Raises UserError with one list of all that makes a model's weights no beginning for this denoiser.
    """
    first_stage, there, info = read_networks(find_finished(init_from), jnp.float32)
    given = abstract_params(first_stage, there, info["resolution"])
    wanted = {part: params[part] for part in ("denoiser", "conditioner")}
    check_shapes({part: tree for part, tree in given.items() if part in wanted}, wanted, f"train.init_from: {init_from}")
    assert there is not None  # which has parameters
    found = denoiser_differences(there, denoiser)
    _refuse(init_from, found.wrong)
    return found.noted


def check_autoencoder(init_from: str, network: Autoencoder) -> None:
    """Raises UserError where a model's first stage has settings that shapes do not show, and others than `network`."""
    _refuse(init_from, autoencoder_differences(read_networks(find_model(init_from), jnp.float32)[0].network, network))


def _refuse(init_from: str, wrong: list[str]) -> None:
    if wrong:
        raise UserError(f"train.init_from: the weights in {init_from} were trained with other settings ({'; '.join(wrong)})")


def start_denoiser(stage: DiffusionStage, init_from: str) -> None:
    """Gives stage 2 its first weights. Raises UserError."""
    noted = check_denoiser(init_from, stage.denoiser, stage.abstract_params)
    model = find_finished(init_from)
    weights = {part: load_params(model / part) for part in ("denoiser", "conditioner")}
    stage.start_from(weights, [f"train.init_from: the weights were trained otherwise: {difference}" for difference in noted])


def start_autoencoder(stage: AutoencoderStage, init_from: str) -> None:
    """Gives stage 1 its first weights. Raises UserError."""
    check_autoencoder(init_from, stage.network)
    stage.start_from(load_first_stage(find_model(init_from), np.float32)[1])
