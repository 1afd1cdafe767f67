"""Stage 1: the autoencoder, with perceptual and patch-adversarial loss (Rombach et al. 2022, section 3.1 and appendix G)."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from ldm_jax.config import UserError
from ldm_jax.data.pipeline import Batches, stack
from ldm_jax.data.sources import Source
from ldm_jax.model_directory import Params, check_shapes
from ldm_jax.nn import quantize
from ldm_jax.nn.autoencoder import KLAutoencoder, VQAutoencoder, kl_divergence
from ldm_jax.nn.discriminator import PatchDiscriminator
from ldm_jax.sharding.mesh import make_mesh, on_host
from ldm_jax.sharding.rules import from_config, gathered
from ldm_jax.stages import FirstStage, apply, build_autoencoder, compute_dtype, init_autoencoder, to_float, to_uint8
from ldm_jax.training import optimizer
from ldm_jax.training import state as states
from ldm_jax.training.autoencoder_loss import (
    AutoencoderLoss,
    AutoencoderParams,
    Networks,
    Penalties,
    combine,
    gan_gradients,
    load_lpips,
    reconstruction_gradients,
    split_gan_gradients,
)
from ldm_jax.training.state import Metrics, State, key_for

_LAST = "conv_out"  # the decoder's last convolution, at which the two losses are weighed


class AutoencoderStage:
    """Stage 1 as the loop takes it: `init`, `update`, `preview`.

    A batch is `image` uint8 [B,H,W,3] and, with accumulation, is cut after its random draws. The discriminator exists from the first step
    on, but acts and learns only from `disc_start` on: `phase` tells the loop which of the two programs a step runs.

    A codebook is learned by gradients, as a part of the autoencoder, or follows the latents by moving averages of their clusters (van den
    Oord et al. 2017, appendix A.1). These are then parameters of their own, "codebook" in the state, and the autoencoder's lack `quantize`:
    with averages m and a batch's clusters b, m <- decay m + (1 - decay) b is a step of size 1 - decay down the gradient of 1/2 |m - b|^2.
    """

    name = "first stage"

    initial: dict[str, Any] | None = None
    evaluation: Callable[[Callable[[np.ndarray], np.ndarray], Callable[[], None]], dict[str, float]] | None = None

    def __init__(self, config: ConfigDict, source: Source, perceptual: Any = None) -> None:
        group, self.config, self.source = config.first_stage, config, source
        self.dtype = compute_dtype(config.train.dtype)
        self.network = build_autoencoder({**group.to_dict(), "remat": config.train.remat}, self.dtype)
        self.discriminator = PatchDiscriminator(**group.discriminator.to_dict(), dtype=self.dtype)
        self.disc_start = group.loss.disc_start
        self.follows = isinstance(self.network, VQAutoencoder) and group.codebook.ema > 0  # averages move the codebook, not gradients
        self.rules = from_config(config.mesh.rules)
        names = ("pixel", "perceptual_weight", "kl_weight", "codebook_weight", "reduction", "disc_weight", "disc_loss")
        try:
            self.loss = AutoencoderLoss(**{name: group.loss[name] for name in names})
            self.abstract_params = jax.eval_shape(self._params, jax.random.key(0))
        except ValueError as error:
            raise UserError(f"first_stage: {error}") from error
        paths = [p for p in (group.loss.vgg, group.loss.linear) if p]
        self.frozen = load_lpips(*paths) if perceptual is None and paths else perceptual
        make = optimizer.from_config(config.optimizer, config.train.steps)
        self.optimizers = {"autoencoder": make, "discriminator": make}
        if self.follows:
            self.optimizers["codebook"] = optax.sgd(1.0 - group.codebook.ema)
        if self.discriminator.norm == "batch" and config.train.accumulation > 1:
            raise UserError(
                "first_stage.discriminator.norm=batch takes its statistics from each micro-batch: use group, or train.accumulation=1"
            )

    def without_remat(self) -> "AutoencoderStage":
        """The same, with all activations kept: what it computes is what an update takes at least."""
        plain = ConfigDict(self.config.to_dict())
        plain.train.remat = "none"
        return AutoencoderStage(plain, self.source, self.frozen)

    def notes(self) -> Iterator[str]:
        """What a user should know before the run."""
        if self.frozen is None:
            yield "perceptual loss off: give first_stage.loss.vgg and first_stage.loss.linear to turn it on"

    def _params(self, key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key)
        images = jnp.zeros((1, self.config.data.resolution, self.config.data.resolution, 3))
        params = {
            "autoencoder": init_autoencoder(self.network, keys[0], self.config.data.resolution),
            "discriminator": self.discriminator.init(keys[1], images)["params"],
        }
        return self._split(states.cast(params, self.dtype))

    def _split(self, params: dict[str, Any]) -> dict[str, Any]:
        """A codebook that follows averages is apart from the rest, which has gradients."""
        if self.follows:
            rest = dict(params["autoencoder"])
            params = {**params, "codebook": quantize.clusters_of(rest.pop("quantize")["embedding"]), "autoencoder": rest}
        return params

    def start_from(self, params: Params) -> None:
        """Training will begin with these parameters of the whole network. Raises UserError where they do not fit."""
        expected = jax.eval_shape(lambda key: init_autoencoder(self.network, key, self.config.data.resolution), jax.random.key(0))
        check_shapes(params, expected, "train.init_from")
        self.initial = self._split({"autoencoder": params})

    def autoencoder(self, params: Params) -> Params:
        """The network's parameters, whole, from those of a state or of one of its averages."""
        followed = {"quantize": {"embedding": quantize.means(params["codebook"])}} if self.follows else {}
        return {**params["autoencoder"], **followed}

    def init(self, key: jax.Array) -> State:
        """A fresh state; pure."""
        averaged = ("autoencoder", "codebook") if self.follows else ("autoencoder",)
        return states.create(self._params(key), self.optimizers, averaged, tuple(self.config.ema.decays))

    def batches(self, **kwargs: Any) -> Batches:
        size, seed, data = self.config.train.batch_size, self.config.seed, self.config.data
        return Batches(self.source, size, seed, transform=only_images, flip=data.flip, workers=data.workers, **kwargs)

    def phase(self, step: int) -> bool:
        """Whether the discriminator acts in the update after `step` others."""
        return step >= self.disc_start

    def _latents(
        self, params: Params, moments: jax.Array, noise: jax.Array | None
    ) -> tuple[jax.Array, Penalties, quantize.Clusters | None]:
        """What the decoder gets, the latents' penalties, and what a batch puts on the entries of a codebook."""
        if noise is not None:
            mean, log_var = jnp.split(moments, 2, axis=-1)
            return mean + jnp.exp(0.5 * log_var) * noise, {"loss/kl": kl_divergence(moments)}, None
        group = self.config.first_stage.codebook
        entries, indices = apply(self.network, params, moments, method="lookup")
        penalties = {"codebook/loss": quantize.codebook_loss(moments, entries, group.beta, group.legacy_beta)}
        return quantize.straight_through(moments, entries), penalties, quantize.clusters(moments, indices, group.size)

    def _networks(self, params: Params) -> Networks:
        """What is trained; `params` are the state's, of which a codebook that follows averages is constant here."""
        whole = self.autoencoder(params)

        def here(part: Params, name: str) -> Params:
            return gathered(part, self.dtype, self.rules, f"params/{name}")

        def forward(body: Params, images: jax.Array, noise: jax.Array | None) -> tuple[jax.Array, Penalties, quantize.Clusters | None]:
            body = {**whole, **here(body, "autoencoder")}
            moments = apply(self.network, body, images, method="moments")
            z, penalties, clusters = self._latents(body, moments, noise)
            return apply(self.network, body, z, method="features"), penalties, clusters

        return Networks(
            forward,
            lambda last, h: apply(self.network, {_LAST: last}, h, method="head"),
            lambda params, images: apply(self.discriminator, here(params, "discriminator"), images),
        )

    def update(
        self, state: State, batch: Mapping[str, jax.Array], frozen: Any, root: jax.Array, adversarial: bool
    ) -> tuple[State, Metrics]:
        """One update of the autoencoder and, where `adversarial` (static), of the discriminator; `frozen` are LPIPS's weights. Pure."""
        images = to_float(batch["image"], jnp.promote_types(self.dtype, jnp.float32))
        noise = self._noise(images, key_for(root, "posterior", state.step))
        grads, metrics, clusters = self._gradients(state.params, frozen, images, noise, adversarial)
        norm = optax.tree.norm(grads)
        if clusters is not None:
            metrics |= {"codebook/perplexity": quantize.perplexity(clusters["size"]), "codebook/usage": quantize.usage(clusters["size"])}
        if self.follows:
            grads["codebook"] = jax.tree.map(jnp.subtract, state.params["codebook"], clusters)
        optimizers = {name: tx for name, tx in self.optimizers.items() if name in grads}
        decays, max_nan = tuple(self.config.ema.decays), self.config.train.max_nan
        state, more = states.apply_updates(state, grads, metrics["loss/nll"], optimizers, decays, max_nan)
        return state, metrics | more | {"gradient_norm": norm}

    def _noise(self, images: jax.Array, key: jax.Array) -> jax.Array | None:
        """What the latents of the global batch are drawn with, [B,h,w,c]; None where there is nothing to draw."""
        if not isinstance(self.network, KLAutoencoder):
            return None
        batch, height, width, _ = images.shape
        factor = self.network.factor
        return jax.random.normal(key, (batch, height // factor, width // factor, self.network.latent_channels), images.dtype)

    def _gradients(
        self, params: dict[str, Any], frozen: Any, images: jax.Array, noise: jax.Array | None, adversarial: bool
    ) -> tuple[dict[str, Any], Metrics, quantize.Clusters | None]:
        body = dict(params["autoencoder"])
        split = AutoencoderParams(body, body.pop(_LAST))
        parts, fixed = self.config.train.accumulation, (self.loss, self._networks(params), split)
        if not adversarial:

            def one(part: Any) -> Any:
                return reconstruction_gradients(*fixed, frozen, *part)

            grads, metrics, clusters = states.accumulate(one, (images, noise), parts)
            return {"autoencoder": _joined(grads)}, metrics, clusters
        disc = params["discriminator"]
        if parts == 1:
            grads, disc_grads, metrics, clusters = gan_gradients(*fixed, disc, frozen, images, noise)
        else:

            def one(part: Any) -> Any:
                return split_gan_gradients(*fixed, disc, frozen, *part)

            rec, gan, disc_grads, metrics, clusters = states.accumulate(one, (images, noise), parts)
            grads, weight = combine(self.loss, rec, gan)
            metrics = metrics | {"adaptive_weight": weight}
        return {"autoencoder": _joined(grads), "discriminator": disc_grads}, metrics, clusters

    @cached_property
    def _reconstruct(self) -> Any:
        stage = FirstStage(self.network)
        return jax.jit(lambda params, images: to_uint8(stage.decode(params, stage.latents(stage.moments(params, to_float(images))))))

    @cached_property
    def _preview_images(self) -> np.ndarray:
        indices = np.arange(min(16, len(self.source)))
        return stack([{"image": self.source[int(i)]["image"]} for i in indices])["image"]

    def evaluate(self, state: State, between: Callable[[], None]) -> dict[str, float]:
        """What `evaluation` finds of reconstructions by the averaged weights."""
        if self.evaluation is None:
            return {}
        with jax.transfer_guard("allow"):
            params = self.autoencoder(on_host(state.ema[str(self.config.ema.decays[0])]))
            with jax.set_mesh(make_mesh(devices=jax.local_devices())):
                return self.evaluation(lambda images: np.asarray(self._reconstruct(params, images)), between)

    def preview(self, state: State) -> tuple[np.ndarray, int, list[str] | None]:
        """Pictures and their reconstructions side by side by the EMA weights: (uint8 [N,H,W,3], columns, captions)."""
        images = self._preview_images
        decay = str(self.config.ema.decays[0])
        with jax.transfer_guard("allow"):
            recon = on_host(self._reconstruct(self.autoencoder(state.ema[decay]), images))
        return np.stack([images, recon], axis=1).reshape(-1, *images.shape[1:]), 8, None


def only_images(batch: dict[str, Any]) -> dict[str, Any]:
    return {"image": batch["image"]}


def _joined(grads: AutoencoderParams) -> dict[str, Any]:
    return {**grads.body, _LAST: grads.last}


def reconstructions(stage: FirstStage, params: Any, images: np.ndarray, batch_size: int = 50) -> np.ndarray:
    """uint8 [N,H,W,3] through their latents (the mode) and back, in batches."""
    run = jax.jit(lambda p, x: to_uint8(stage.decode(p, stage.latents(stage.moments(p, to_float(x))))))
    return np.concatenate([np.asarray(run(params, images[i : i + batch_size])) for i in range(0, len(images), batch_size)])
