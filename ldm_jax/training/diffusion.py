"""Stage 2: the denoiser in latent space, with its conditioners (Rombach et al. 2022, sections 3.2 and 3.3, equations 2 and 3)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax.conditioning.build import Model, build_conditioning
from ldm_jax.conditioning.conditioner import Conditioning
from ldm_jax.conditioning.conditioners import EmbeddedTextConditioner, MaskConditioner
from ldm_jax.config import UserError
from ldm_jax.data.derive import one_caption
from ldm_jax.data.latents import LatentCache
from ldm_jax.data.order import Bucket
from ldm_jax.data.pipeline import Batches
from ldm_jax.data.sources import Source
from ldm_jax.defaults import base
from ldm_jax.diffusion.checks import check_acting
from ldm_jax.diffusion.losses import DiffusionLoss, bound_weight, bucketed, noised, per_example, training_noise
from ldm_jax.diffusion.process import Process
from ldm_jax.diffusion.samplers import image_keys, initial_noise
from ldm_jax.diffusion.times import TimeSampling, sample_times
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.model_directory import Params, check_shapes
from ldm_jax.nn.autoencoder import Autoencoder
from ldm_jax.sampling import Sampling, check_guidance, check_sampler, is_plain, make_sampling
from ldm_jax.sharding.mesh import filled, on_host, split_host_arrays
from ldm_jax.sharding.rules import from_config, gathered
from ldm_jax.stages import Denoiser, FirstStage, GenerateInputs, build_denoiser, compute_dtype, generate, prepare, to_float
from ldm_jax.training import optimizer
from ldm_jax.training import state as states
from ldm_jax.training.preview import alternating, shown
from ldm_jax.training.state import Metrics, State, key_for
from ldm_jax.training.text_cache import Embedded

TIME_BUCKETS = 4
PREVIEWS, MAX_PROMPTS = 16, 32  # samples of a preview; as many as there are `sample.prompts`, up to the second
LOG_VARIANCES = 1000  # numbers that `diffusion.learn_log_variance` learns where time is continuous


def build_loss(group: ConfigDict, process: Process) -> DiffusionLoss:
    """The loss of a `diffusion` group. Raises UserError, also for a weight that the process has not and for fields without effect."""
    try:
        check_acting(group, base().diffusion)
        times = TimeSampling(group.time_sampling, group.time_mean, group.time_std, group.mode_scale)
        names = ("prediction", "loss", "weighting", "gamma", "weight_offset", "vlb_weight", "huber_delta")
        loss = DiffusionLoss(times=times, **{name: group[name] for name in names})
        bound_weight(process, loss, jnp.zeros(1))
        for name in ("offset_noise", "input_perturbation"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{name} is a standard deviation, a finite number from 0 up, not {group[name]}")
    except ValueError as error:
        raise UserError(f"diffusion: {error}") from error
    return loss


class DiffusionStage:
    """Stage 2 as the loop takes it: `init`, `update`, `preview`.

    A batch holds the conditioners' arrays (of a text its embeddings where the source is `Embedded`) and raw `moments` ([B,h,w,2c], or
    [B,h,w,c] where they are the latents), or `image` uint8 [B,H,W,3] where nothing is cached, with `hole` bool [B,H,W] for a model that
    fills holes; latents are sampled from the moments anew at every step.
    """

    name = "denoiser"
    initial: Params | None = None
    remarks: tuple[str, ...] = ()
    evaluation: Callable[[LatentDiffusion, Callable[[], None]], dict[str, float]] | None = None

    def __init__(
        self,
        config: ConfigDict,
        first_stage: FirstStage,
        first_stage_params: Params,
        source: Source | LatentCache | Embedded,
        tokenizer: Any,
    ) -> None:
        self.config, self.source, self.tokenizer = config, source, tokenizer
        self.first_stage, self.first_stage_params = first_stage, first_stage_params
        self.frozen = {} if config.data.cache else first_stage_params
        self.dtype = compute_dtype(config.train.dtype)
        conditioning = conditioning_for(config, first_stage.network, tokenizer)
        channels = first_stage.network.latent_channels
        self.denoiser: Denoiser = build_denoiser(denoiser_group(config), config.diffusion, conditioning, channels, self.dtype)
        self.trained = self.denoiser
        if hasattr(source, "empty"):
            text = EmbeddedTextConditioner(source.empty, config.conditioning.text.drop_rate)
            self.trained = replace(self.denoiser, conditioning=conditioning.replaced(text))
        self.loss = build_loss(config.diffusion, self.denoiser.process)
        self.sampling = build_sampling(config.sample, self.denoiser)
        self.rules = from_config(config.mesh.rules)
        size = config.data.resolution // first_stage.network.factor
        self.latent_shape = (size, size, channels)
        frozen = {c.name for c in conditioning.conditioners if getattr(c, "frozen", False)}
        self.optimizers = {"all": optimizer.sparing(optimizer.from_config(config.optimizer, config.train.steps), "conditioner", frozen)}

    def without_remat(self) -> "DiffusionStage":
        """The same, with all activations kept: what it computes is what an update takes at least."""
        plain = ConfigDict(self.config.to_dict())
        plain.train.remat = "none"
        return DiffusionStage(plain, self.first_stage, self.first_stage_params, self.source, self.tokenizer)

    @cached_property
    def abstract_params(self) -> Params:
        """Shapes and types of the parameters of denoiser and conditioners."""
        return jax.eval_shape(lambda key: self.denoiser.init(key, self.latent_shape), jax.random.key(0))

    def start_from(self, params: Params, remarks: Sequence[str] = ()) -> None:
        """Training will begin with these parameters of denoiser and conditioners; `remarks` are for the user.

        Raises UserError where they do not fit.
        """
        self.initial, self.remarks = {name: params[name] for name in self.abstract_params if name in params}, tuple(remarks)
        check_shapes(self.initial, self.abstract_params, "train.init_from")

    def notes(self) -> Iterator[str]:
        """What a user should know before the run."""
        yield from self.remarks
        if not self.config.data.cache:
            yield "data.cache=False: images are encoded in every step"
        conditioning = self.denoiser.conditioning
        if conditioning.names and not conditioning.guides and self.config.sample.guidance != 1:
            names = ", ".join(f"conditioning.{name}.drop_rate" for name in conditioning.names)
            yield f"{names}=0: the unconditional score is not learned, so guidance means nothing"

    def init(self, key: jax.Array) -> State:
        """A fresh state; pure."""
        params = states.cast(self.denoiser.init(key, self.latent_shape), self.dtype)
        if self.config.diffusion.learn_log_variance:
            params["log_variance"] = jnp.zeros(self.denoiser.process.num_times or LOG_VARIANCES)
        return states.create(params, self.optimizers, ("denoiser", "conditioner"), tuple(self.config.ema.decays))

    def batches(self, **kwargs: Any) -> Batches:
        size, seed, data = self.config.train.batch_size, self.config.seed, self.config.data
        own: Any = {"derive": (one_caption,), "transform": self._transform, "flip": data.flip, "workers": data.workers}
        return Batches(self.source, size, seed, **own, **kwargs)

    def _transform(self, batch: dict[str, Any]) -> dict[str, Any]:
        latents, conditioning = "moments" if "moments" in batch else "image", self.trained.conditioning
        holes = {"hole": batch["mask"] > 0} if "mask" in conditioning.names else {}
        return {latents: batch[latents], **holes, **conditioning.prepare(batch, set(conditioning.names) - {"mask"})}

    def phase(self, step: int) -> bool:
        """One program serves all steps."""
        return False

    def update(self, state: State, batch: Mapping[str, jax.Array], frozen: Params, root: jax.Array, phase: bool) -> tuple[State, Metrics]:
        """One update of denoiser and conditioners; `frozen` is the first stage where it encodes in every step. Pure."""
        draws = self._draw(state.step, batch, frozen, root)
        arrays = {k: v for k, v in batch.items() if k not in ("moments", "image", "hole")}
        if "hole" in batch:
            mask = next(c for c in self.denoiser.conditioning.conditioners if isinstance(c, MaskConditioner))
            arrays["mask"] = self.first_stage.masked(frozen, to_float(batch["image"]), batch["hole"], mask)
        arrays = self.trained.conditioning.drop(arrays, key_for(root, "drop", state.step))
        keys = jax.random.split(key_for(root, "dropout", state.step), len(draws[0])) if self.config.denoiser.dropout else None

        def loss(params: Params, part: Any) -> tuple[jax.Array, Metrics]:
            params = gathered(params, self.dtype, self.rules)
            x0, eps, in_state, t, arrays, dropout_keys = part
            condition, fraction = self.trained.condition(params, arrays), self.denoiser.process.fraction_of(t)
            x_t = noised(self.denoiser.process, x0, in_state, t)
            pred = self.denoiser.denoise(params, x_t, t, condition, dropout_keys)
            each, bound = per_example(self.denoiser.process, self.loss, pred, x0, eps, t)
            sums, counts = bucketed(each + bound, fraction, TIME_BUCKETS)
            if "log_variance" in params:
                each = with_log_variance(each, params["log_variance"], fraction)
            return (each + bound).mean(), {"sums": sums, "counts": counts.astype(sums.dtype)}

        def one(part: Any) -> Any:
            (value, buckets), grads = jax.value_and_grad(loss, has_aux=True)(state.params, part)
            return value, buckets, grads

        value, buckets, grads = states.accumulate(one, (*draws, arrays, keys), self.config.train.accumulation)
        decays, max_nan = tuple(self.config.ema.decays), self.config.train.max_nan
        state, metrics = states.apply_updates(state, grads, value, self.optimizers, decays, max_nan)
        by_time = buckets["sums"] / buckets["counts"]
        return state, metrics | {"loss": value} | {f"loss/t{i}": by_time[i] for i in range(TIME_BUCKETS)}

    def _draw(
        self, step: jax.Array, batch: Mapping[str, jax.Array], frozen: Params, root: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(x_0, eps, the noise that is in x_t, t) of the global batch."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        if "moments" in batch:
            moments = batch["moments"].astype(wide)
        else:
            images = to_float(batch["image"], wide)
            moments = jax.lax.stop_gradient(self.first_stage.moments(frozen, images)).astype(wide)
        x0 = self.first_stage.latents(moments, key_for(root, "posterior", step))
        group = self.config.diffusion
        eps, in_state = training_noise(key_for(root, "noise", step), x0.shape, wide, group.offset_noise, group.input_perturbation)
        t = sample_times(self.loss.times, self.denoiser.process, key_for(root, "time", step), x0.shape[0])
        return x0, eps, in_state, t.astype(wide)

    @property
    def buckets(self) -> Sequence[Bucket]:
        """Those of the data, none where all pictures are squares."""
        return getattr(self.source, "buckets", ())

    @property
    def preview_shape(self) -> tuple[int, int, int]:
        """Of the latents that are drawn to look at: the first bucket's."""
        height, width, channels = self.latent_shape
        if self.buckets:
            factor = self.first_stage.network.factor
            height, width = self.buckets[0].height // factor, self.buckets[0].width // factor
        return height, width, channels

    @property
    def guided(self) -> bool:
        """Whether samples of `sample.guidance` take the prediction without condition too."""
        return self.denoiser.conditioning.guides and not is_plain(self.sampling, float(self.config.sample.guidance))

    @cached_property
    def preview_inputs(self) -> dict[str, list[Any]]:
        """What the conditioners of the preview are given: `sample.prompts`, filled up to `PREVIEWS` with captions of the data; where there
        are other conditions than text, the data's first examples."""
        names = self.denoiser.conditioning.fields
        if names == ("text",):
            given = list(self.config.sample.prompts)[:MAX_PROMPTS]
            missing = range(min(max(PREVIEWS - len(given), 0), len(self.source)))
            return {"text": given + [caption(self.source, i) for i in missing]}
        number = min([PREVIEWS, len(self.source), *(bucket.number for bucket in self.buckets)])
        examples = [one_caption(self.source[i], 0, i) for i in range(number)] if names else []
        given = [name for name in (*names, *self.denoiser.conditioning.optional) if examples and name in examples[0]]
        return {name: [example[name] for example in examples] for name in given}

    @cached_property
    def draw(self) -> Any:
        """`draw(averaged, first_stage_params, inputs)`: uint8 [B,H,W,3], by averages that lie as those of the state. Jitted."""
        prefix = f"ema/{self.config.ema.decays[0]}"

        def draw(averaged: Params, first_stage_params: Params, inputs: GenerateInputs) -> jax.Array:
            params = {**gathered(averaged, self.dtype, self.rules, prefix), "first_stage": first_stage_params}
            return generate(self.first_stage, self.denoiser, self.sampling, None, params, inputs)[0]

        return jax.jit(draw)

    def preview(self, state: State) -> tuple[np.ndarray, int, list[str] | None]:
        """Samples of fixed inputs and noise by the EMA weights, below what is told in pictures: (uint8 [N,H,W,3], columns, captions). To be
        called within `jax.set_mesh`."""
        conditioning, inputs, mesh = self.denoiser.conditioning, self.preview_inputs, jax.sharding.get_mesh()
        n = len(next(iter(inputs.values()), range(PREVIEWS)))
        index = np.arange(filled(n, mesh)) % n
        with jax.transfer_guard("allow"):
            arrays = prepare(self.first_stage, conditioning, {"first_stage": self.first_stage_params}, inputs)
            seed = self.config.sample.seed
            noise, keys = initial_noise(seed, index, self.preview_shape), image_keys(seed, index)
            given = {"arrays": arrays, "null": conditioning.unconditional(arrays) if self.guided else None}
            rows = split_host_arrays({"noise": np.asarray(noise), **jax.tree.map(lambda a: np.asarray(a)[index], given)}, mesh)
            drawn = GenerateInputs(keys=keys, scale=float(self.config.sample.guidance), **rows)
            images = on_host(self.draw(state.ema[str(self.config.ema.decays[0])], self.first_stage_params, drawn))[:n]
        told = shown(inputs, *images.shape[1:3])
        if told is None:
            return images, 8, inputs.get("text")
        return alternating(told, images, 8), 8, None

    def model(self, params: Params, info: dict[str, Any]) -> LatentDiffusion:
        """The model of some (EMA) parameters, for sampling and for `model/`."""
        return LatentDiffusion(self.first_stage, self.denoiser, {"first_stage": self.first_stage_params, **params}, info)

    def evaluate(self, state: State, between: Callable[[], None]) -> dict[str, float]:
        """What `evaluation` finds of the averaged weights."""
        if self.evaluation is None:
            return {}
        params = on_host(state.ema[str(self.config.ema.decays[0])])
        return self.evaluation(self.model(params, model_info(self.config, int(state.step))), between)


def model_info(config: ConfigDict, step: int) -> dict[str, Any]:
    """What `model.json` says beside the latent statistics; `step` counts the updates behind the weights."""
    groups = {name: config[name].to_dict() for name in ("diffusion", "sample", "conditioning")}
    return {"task": "diffusion", "step": step, "resolution": config.data.resolution, **groups}


def denoiser_group(config: ConfigDict) -> dict[str, Any]:
    """What the denoiser of a run is built from."""
    return {**config.denoiser.to_dict(), "remat": config.train.remat}


def conditioning_for(config: ConfigDict, autoencoder: Autoencoder, tokenizer: Any) -> Conditioning:
    """The conditioners of a run on the latents of an autoencoder. Raises UserError."""
    groups = config.conditioning.to_dict()
    groups["text"]["remat"] = config.train.remat
    sizes = (config.data.resolution, autoencoder.factor, autoencoder.latent_channels)
    return build_conditioning(groups, Model(*sizes, compute_dtype(config.train.dtype), tokenizer))


def build_sampling(group: ConfigDict, denoiser: Denoiser) -> Sampling:
    """The settings of a `sample` group, checked against the model that is sampled. Raises UserError."""
    sampling = make_sampling(group)
    check_guidance(sampling, float(group.guidance), {}, denoiser.conditioning.guides)
    check_sampler(sampling.sampler, denoiser.process, denoiser.prediction)
    return sampling


def with_log_variance(loss: jax.Array, table: jax.Array, fraction: jax.Array) -> jax.Array:
    """The likelihood of errors whose log-variance u is learned for each noise level, loss/exp(u) + u: [B] to [B]. The bound stays outside.

    `table` [n] holds u for equal parts of `fraction` [B] in [0, 1] (the paper's code, learn_logvar; EDM2, arXiv 2312.02696, eq. 21).
    """
    u = table[jnp.clip((fraction * len(table)).astype(jnp.int32), 0, len(table) - 1)]
    return loss / jnp.exp(u) + u


def caption(source: Any, index: int) -> str:
    """The caption of one example, the first of several, without drawing or decoding its picture where the source can say it alone."""
    text = source.caption(index) if hasattr(source, "caption") else source[index]["text"]
    return text if isinstance(text, str) else text[0]
