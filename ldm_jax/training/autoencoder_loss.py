"""The first stage's losses, and their gradients for autoencoder and discriminator from one forward pass of each.

The losses are those of the paper (Rombach et al., arXiv 2112.10752, eq. 25; weights as in Esser et al., arXiv 2012.09841, eq. 6 and 7):

    L_rec  = 1/B sum_images [ sum_values |x - x'| + values * w_lpips * LPIPS(x, x') ]
    L      = L_rec + w_kl * 1/B sum_images KL + lambda * L_gan,    L_gan = -mean D(x')
    lambda = w_disc * min(|dL_rec/dK| / (|dL_gan/dK| + 1e-4), adaptive_max),    K the kernel of the decoder's last convolution
    L_D    = 1/2 [ mean relu(1 - D(x)) + mean relu(1 + D(x')) ]

With a codebook, values * w_codebook * 1/B sum_images (codebook loss, a mean over the latent's values) takes the place of the KL term.

All that is the reduction "sum". The reduction "mean", which the paper's VQ models were trained with, divides L_rec and the KL or codebook
term by the values of an image: means of |x - x'|, LPIPS and codebook loss by their weights. lambda goes with L_rec, so that the terms
weigh against each other as before, and what changes is their size beside `adaptive_max`, the optimiser's epsilon and a clipped norm.

The network comes in two pieces: `forward` up to the input h of the last convolution, and `last`, which makes x' from h.
So lambda needs only the two losses' gradients at x', pulled back through `last` alone, and the body is pulled back
once, for the sum of all terms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.config import UserError
from ldm_jax.interop.torch_file import load_state_dict
from ldm_jax.nn.lpips import lpips, params_from_state_dict

Tree = Any
Metrics = dict[str, jax.Array]
Penalties = dict[str, jax.Array]

PIXEL_LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "l1": jnp.abs,
    "l2": jnp.square,
    "l1_l2": lambda difference: jnp.abs(difference) + jnp.square(difference),
}


@dataclass(frozen=True)
class AutoencoderLoss:
    """Weights and kinds of the first stage's losses; the defaults are those of the paper's KL models.

    `pixel` "l1_l2" is the sum of both: the squares put more weight on what is wrong by much, small objects at first.
    `disc_loss` is the discriminator's ("vanilla": softplus in place of relu); the generator's is -mean D(x') with both.
    """

    pixel: Literal["l1", "l2", "l1_l2"] = "l1"
    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6
    disc_weight: float = 0.5
    disc_loss: Literal["hinge", "vanilla"] = "hinge"
    adaptive_max: float = 1e4
    codebook_weight: float = 1.0
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if self.pixel not in PIXEL_LOSSES:
            raise ValueError(f"pixel loss {self.pixel!r} is not one of {', '.join(PIXEL_LOSSES)}")
        if self.disc_loss not in ("hinge", "vanilla"):
            raise ValueError(f"discriminator loss {self.disc_loss!r} is neither 'hinge' nor 'vanilla'")
        if self.reduction not in ("sum", "mean"):
            raise ValueError(f"reduction {self.reduction!r} is neither 'sum' nor 'mean'")

    def weights(self, values: int) -> dict[str, float]:
        """What multiplies the terms of L, by the names of their metrics, for images of `values` values."""
        total = values if self.reduction == "sum" else 1
        return {"loss/nll": total, "loss/kl": self.kl_weight * (total / values), "codebook/loss": self.codebook_weight * total}


class Networks(NamedTuple):
    """The functions that are trained.

    forward: (body params, images [B,H,W,C], key: any tree) -> (h, penalties, aux). Penalties of each image's latents [B] go by the name of
      their metric: "loss/kl" (KL divergence of the posterior, in nats) or "codebook/loss" (a mean over the latent's values). aux is any
      tree, and not differentiated.
    last: (last params, h) -> reconstruction [B,H,W,C]; its params are a dict with the convolution's weight under "kernel"
    discriminate: (discriminator params, images) -> logits
    """

    forward: Callable[[Tree, jax.Array, Any], tuple[jax.Array, Penalties, Any]]
    last: Callable[[Tree, jax.Array], jax.Array]
    discriminate: Callable[[Tree, jax.Array], jax.Array]


class AutoencoderParams(NamedTuple):
    """Parameters of `Networks.forward` and of `Networks.last`; gradients have the same form."""

    body: Tree
    last: dict[str, Any]


def load_lpips(*paths: str) -> Tree:
    """The parameters of `nn.lpips` from one file that holds VGG16 and the linear heads, or from two (formats:
    `load_state_dict`).

    Raises UserError for a file that is missing or damaged, and for weights that are missing or of another shape.
    """
    try:
        return params_from_state_dict({name: array for path in paths for name, array in load_state_dict(path).items()})
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"LPIPS weights: {error}") from error


def reconstruction_gradients(
    loss: AutoencoderLoss,
    networks: Networks,
    params: AutoencoderParams,
    perceptual: Tree | None,
    images: jax.Array,
    key: Any,
) -> tuple[AutoencoderParams, Metrics, Any]:
    """Gradients of L without lambda L_gan, the loss before the discriminator starts: (gradients, metrics, aux).

    `images` are floats [B,H,W,C] in [-1, 1]; `perceptual` are the parameters of LPIPS, None turns the term off. Losses are in
    `promote_types(dtype, float32)`; metrics are scalars.
    """
    outputs = _run(networks, params, images, key)
    d_rec, metrics = _reconstruction(loss, perceptual, images, outputs)
    return outputs.pull_back(loss, d_rec), metrics, outputs.aux


def gan_gradients(
    loss: AutoencoderLoss,
    networks: Networks,
    params: AutoencoderParams,
    disc_params: Tree,
    perceptual: Tree | None,
    images: jax.Array,
    key: Any,
) -> tuple[AutoencoderParams, Tree, Metrics, Any]:
    """Gradients of L and of L_D at the same reconstructions: (autoencoder's, discriminator's, metrics, aux).

    Both players move from the same point, where the paper's code takes the discriminator's step after the autoencoder's
    with a second forward pass. Arguments as in `reconstruction_gradients`.
    """
    outputs = _run(networks, params, images, key)
    d_rec, rec_metrics = _reconstruction(loss, perceptual, images, outputs)
    d_gan, disc_grads, gan_metrics = _adversarial(loss, networks, disc_params, images, outputs.recon)
    rec_last, gan_last = outputs.pull_back_last(d_rec)[0], outputs.pull_back_last(d_gan)[0]
    weight = adaptive_weight(loss, rec_last, gan_last)
    grads = outputs.pull_back(loss, d_rec + weight.astype(d_rec.dtype) * d_gan)
    return grads, disc_grads, rec_metrics | gan_metrics | {"adaptive_weight": weight}, outputs.aux


def split_gan_gradients(
    loss: AutoencoderLoss,
    networks: Networks,
    params: AutoencoderParams,
    disc_params: Tree,
    perceptual: Tree | None,
    images: jax.Array,
    key: Any,
) -> tuple[AutoencoderParams, AutoencoderParams, Tree, Metrics, Any]:
    """`gan_gradients` of one micro-batch: (those of L without lambda L_gan, those of L_gan, discriminator's, metrics, aux).

    lambda belongs to the whole batch: average over micro-batches of one size, then call `combine`.
    """
    outputs = _run(networks, params, images, key)
    d_rec, rec_metrics = _reconstruction(loss, perceptual, images, outputs)
    d_gan, disc_grads, gan_metrics = _adversarial(loss, networks, disc_params, images, outputs.recon)
    rec_grads = outputs.pull_back(loss, d_rec)
    gan_grads = outputs.pull_back(None, d_gan)
    return rec_grads, gan_grads, disc_grads, rec_metrics | gan_metrics, outputs.aux


def combine(loss: AutoencoderLoss, rec_grads: AutoencoderParams, gan_grads: AutoencoderParams) -> tuple[AutoencoderParams, jax.Array]:
    """(rec_grads + lambda gan_grads, lambda) of the averages of what `split_gan_gradients` gives."""
    weight = adaptive_weight(loss, rec_grads.last, gan_grads.last)
    return jax.tree.map(lambda rec, gan: rec + weight.astype(rec.dtype) * gan, rec_grads, gan_grads), weight


def adaptive_weight(loss: AutoencoderLoss, rec_last: dict[str, Any], gan_last: dict[str, Any]) -> jax.Array:
    """lambda, a scalar, from both losses' gradients with respect to the parameters of the last convolution."""
    rec, gan = (jnp.linalg.norm(_wide(grads["kernel"]).ravel()) for grads in (rec_last, gan_last))
    return loss.disc_weight * jnp.minimum(rec / (gan + 1e-4), loss.adaptive_max)


class _Outputs(NamedTuple):
    """What one forward pass of the autoencoder leaves: its outputs and how to pull gradients back from them."""

    recon: jax.Array
    penalties: Penalties
    aux: Any
    pull_back_last: Callable[[jax.Array], tuple[dict[str, Any], jax.Array]]
    pull_back_body: Callable[[tuple[jax.Array, Penalties]], tuple[Tree]]

    def pull_back(self, loss: AutoencoderLoss | None, d_recon: jax.Array) -> AutoencoderParams:
        """Parameter gradients from that at the reconstruction, and from the penalties where `loss` is given."""
        last, d_h = self.pull_back_last(d_recon)
        weights = loss.weights(self.recon[0].size) if loss else dict.fromkeys(self.penalties, 0.0)
        d_penalties = {name: jnp.full_like(each, weights[name] / each.size) for name, each in self.penalties.items()}
        (body,) = self.pull_back_body((d_h, d_penalties))
        return AutoencoderParams(body, last)


def _run(networks: Networks, params: AutoencoderParams, images: jax.Array, key: Any) -> _Outputs:
    def forward(body: Tree) -> tuple[tuple[jax.Array, Penalties], Any]:
        h, penalties, aux = networks.forward(body, images, key)
        return (h, jax.tree.map(_wide, penalties)), aux

    (h, penalties), pull_back_body, aux = jax.vjp(forward, params.body, has_aux=True)
    recon, pull_back_last = jax.vjp(networks.last, params.last, h)
    return _Outputs(recon, penalties, aux, pull_back_last, pull_back_body)


def _reconstruction(loss: AutoencoderLoss, perceptual: Tree | None, images: jax.Array, outputs: _Outputs) -> tuple[jax.Array, Metrics]:
    """dL_rec/dx' and the metrics of L_rec and the penalties."""
    total = loss.weights(images[0].size)["loss/nll"]

    def nll(recon: jax.Array) -> tuple[jax.Array, Metrics]:
        difference = _wide(images) - _wide(recon)
        pixel = jnp.mean(PIXEL_LOSSES[loss.pixel](difference))
        metrics = {"loss/pixel": pixel} | {name: jnp.mean(each) for name, each in outputs.penalties.items()}
        mean = pixel
        if perceptual is not None:
            metrics["loss/lpips"] = jnp.mean(lpips(perceptual, images, recon))
            mean = mean + loss.perceptual_weight * metrics["loss/lpips"]
        return total * mean, metrics | {"loss/nll": total * mean}

    (_, metrics), d_recon = jax.value_and_grad(nll, has_aux=True)(outputs.recon)
    return d_recon, metrics


def _adversarial(
    loss: AutoencoderLoss, networks: Networks, disc_params: Tree, images: jax.Array, recon: jax.Array
) -> tuple[jax.Array, Tree, Metrics]:
    """dL_gan/dx', the discriminator's gradients of L_D and the metrics of both; D sees each image once."""
    fake, pull_back_fake = jax.vjp(lambda p, x: _wide(networks.discriminate(p, x)), disc_params, recon)
    real, pull_back_real = jax.vjp(lambda p: _wide(networks.discriminate(p, images)), disc_params)

    def disc_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
        penalty = (lambda x: jax.nn.relu(1 + x)) if loss.disc_loss == "hinge" else jax.nn.softplus
        return 0.5 * (jnp.mean(penalty(-real)) + jnp.mean(penalty(fake)))

    value, (d_real, d_fake) = jax.value_and_grad(disc_loss, argnums=(0, 1))(real, fake)
    disc_grads = jax.tree.map(jnp.add, pull_back_real(d_real)[0], pull_back_fake(d_fake)[0])
    _, d_recon = pull_back_fake(jnp.full_like(fake, -1 / fake.size))
    metrics = {
        "loss/generator": -jnp.mean(fake),
        "loss/discriminator": value,
        "logits/real": jnp.mean(real),
        "logits/fake": jnp.mean(fake),
    }
    return d_recon, disc_grads, metrics


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
