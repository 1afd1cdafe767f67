"""The first stage's gradients against a plain implementation: one loss function a player, full passes, `jax.grad`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.config import UserError
from ldm_jax.nn.discriminator import PatchDiscriminator
from ldm_jax.nn.lpips import lpips, random_params
from ldm_jax.training.autoencoder_loss import (
    AutoencoderLoss,
    AutoencoderParams,
    Networks,
    adaptive_weight,
    combine,
    gan_gradients,
    load_lpips,
    reconstruction_gradients,
    split_gan_gradients,
)

Tree = Any


class _Body(nn.Module):
    """A tiny KL autoencoder up to the input of its last convolution."""

    @nn.compact
    def __call__(self, images: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, logvar = jnp.split(nn.Conv(4, (4, 4), (2, 2), dtype=images.dtype)(images), 2, axis=-1)
        kl = 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1 - logvar, axis=(1, 2, 3))
        latents = mean + jnp.exp(0.5 * logvar) * noise
        return jnp.tanh(nn.ConvTranspose(6, (4, 4), (2, 2), dtype=images.dtype)(latents)), kl


def _last(params: Tree, h: jax.Array) -> jax.Array:
    return nn.Conv(3, (3, 3), dtype=h.dtype).apply({"params": params}, h)


def _networks(dtype: Any, norm: Any = "batch") -> Networks:
    discriminator = PatchDiscriminator(features=4, num_layers=1, norm=norm, dtype=dtype)

    def forward(body: Tree, images: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
        # Noise comes with the image, so that cutting a batch does not change it.
        noise = jnp.sin(100 * images[:, ::2, ::2, :2])
        h, kl = _Body().apply({"params": body}, images, noise)
        return h, {"loss/kl": kl, "codebook/loss": jnp.mean(h**2, axis=(1, 2, 3))}, jax.random.key_data(key)

    return Networks(forward, _last, lambda params, x: discriminator.apply({"params": params}, x))


def _weights(module: nn.Module, seed: int, dtype: Any, *inputs: jax.Array) -> Tree:
    """Weights drawn by numpy, which compiles nothing."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), dtype), shapes)


def _setup(dtype: Any, norm: Any = "batch", batch: int = 4) -> tuple[Networks, AutoencoderParams, Tree, jax.Array]:
    networks = _networks(dtype, norm)
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (batch, 16, 16, 3)), dtype)
    body = _weights(_Body(), 1, dtype, images, images[:, ::2, ::2, :2])
    last = _weights(nn.Conv(3, (3, 3)), 2, dtype, jnp.zeros((1, 8, 8, 6)))
    disc = _weights(PatchDiscriminator(features=4, num_layers=1, norm=norm), 3, dtype, images)
    return networks, AutoencoderParams(body, last), disc, images


def _small_lpips(params: Tree, x: jax.Array, y: jax.Array) -> jax.Array:
    """A stand-in for LPIPS, which takes long to compile: a distance per image of one layer of features."""
    features = lambda image: jax.nn.relu(jnp.einsum("bhwc,cd->bhwd", image, params))  # noqa: E731
    return jnp.mean(jnp.square(features(x) - features(y)), axis=(1, 2, 3))


def _plain(loss: AutoencoderLoss, networks: Networks, distance: Callable[..., jax.Array], perceptual: Tree | None) -> Callable[..., tuple]:
    """The textbook: separate losses with their own forward passes; lambda from gradients over full passes."""

    def nll(params: AutoencoderParams, images: jax.Array, key: jax.Array) -> jax.Array:
        recon = networks.last(params.last, networks.forward(params.body, images, key)[0])
        difference = sum(jnp.abs(images - recon) ** power for power in {"l1": (1,), "l2": (2,), "l1_l2": (1, 2)}[loss.pixel])
        per_pixel = difference
        if perceptual is not None:
            per_pixel = per_pixel + loss.perceptual_weight * distance(perceptual, images, recon)[:, None, None, None]
        return jnp.mean(per_pixel) if loss.reduction == "mean" else jnp.sum(per_pixel) / images.shape[0]

    def generator(params: AutoencoderParams, disc: Tree, images: jax.Array, key: jax.Array) -> jax.Array:
        recon = networks.last(params.last, networks.forward(params.body, images, key)[0])
        return -jnp.mean(networks.discriminate(disc, recon))

    def autoencoder(params: AutoencoderParams, disc: Tree, images: jax.Array, key: jax.Array) -> tuple:
        rec = jax.grad(nll)(params, images, key).last["kernel"]
        gan = jax.grad(generator)(params, disc, images, key).last["kernel"]
        weight = jnp.sqrt(jnp.sum(rec**2)) / (jnp.sqrt(jnp.sum(gan**2)) + 1e-4)
        weight = jax.lax.stop_gradient(jnp.clip(weight, 0, loss.adaptive_max) * loss.disc_weight)
        penalties = networks.forward(params.body, images, key)[1]
        penalty = loss.kl_weight * jnp.mean(penalties["loss/kl"]) / images[0].size + loss.codebook_weight * jnp.mean(
            penalties["codebook/loss"]
        )
        penalty = penalty * (1 if loss.reduction == "mean" else images[0].size)
        return nll(params, images, key) + weight * generator(params, disc, images, key) + penalty, weight

    def discriminator(disc: Tree, params: AutoencoderParams, images: jax.Array, key: jax.Array) -> jax.Array:
        recon = networks.last(params.last, networks.forward(params.body, images, key)[0])
        real, fake = networks.discriminate(disc, images), networks.discriminate(disc, jax.lax.stop_gradient(recon))
        if loss.disc_loss == "hinge":
            return 0.5 * (jnp.mean(jnp.maximum(1 - real, 0)) + jnp.mean(jnp.maximum(1 + fake, 0)))
        return 0.5 * (jnp.mean(jnp.log1p(jnp.exp(-real))) + jnp.mean(jnp.log1p(jnp.exp(fake))))

    def run(params: AutoencoderParams, disc: Tree, images: jax.Array, key: jax.Array) -> tuple:
        grads, weight = jax.grad(autoencoder, has_aux=True)(params, disc, images, key)
        return grads, jax.grad(discriminator)(disc, params, images, key), weight

    return run


def _assert_close(actual: Tree, expected: Tree, rtol: float) -> None:
    """Every leaf, relative to the largest entry of it."""

    def check(a: jax.Array, b: jax.Array) -> None:
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(jnp.max(jnp.abs(b))) + 1e-30)

    jax.tree.map(check, actual, expected)


@pytest.fixture
def small_lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_jax.training.autoencoder_loss.lpips", _small_lpips)


@pytest.mark.usefixtures("small_lpips")
@pytest.mark.parametrize(
    ("loss", "dtype", "rtol"),
    [
        (AutoencoderLoss(kl_weight=0.1), "float32", 1e-5),
        (AutoencoderLoss(kl_weight=0.1), "float64", 1e-11),
        (AutoencoderLoss("l2", 0.3, disc_weight=0.8, disc_loss="vanilla", adaptive_max=1e-3), "float64", 1e-11),
        (AutoencoderLoss("l1_l2"), "float64", 1e-11),
        (AutoencoderLoss(kl_weight=0.1, codebook_weight=0.3, reduction="mean"), "float64", 1e-11),
    ],
    ids=["paper in float32", "paper in float64", "l2, vanilla, clamped", "l1 and l2", "means"],
)
def test_gradients_equal_a_plain_two_pass_implementation(loss: AutoencoderLoss, dtype: str, rtol: float) -> None:
    with jax.enable_x64(dtype == "float64"):
        networks, params, disc, images = _setup(jnp.dtype(dtype))
        perceptual = jnp.linspace(-1, 1, 24, dtype=dtype).reshape(3, 8)
        key = jax.random.key(4)
        run = jax.jit(lambda *args: gan_gradients(loss, networks, *args))
        grads, disc_grads, metrics, _ = run(params, disc, perceptual, images, key)
        expected, expected_disc, weight = jax.jit(_plain(loss, networks, _small_lpips, perceptual))(params, disc, images, key)
        _assert_close(grads, expected, rtol)
        _assert_close(disc_grads, expected_disc, rtol)
        np.testing.assert_allclose(metrics["adaptive_weight"], weight, rtol=rtol)
        assert metrics["loss/nll"].dtype == dtype
        if loss.adaptive_max == 1e-3:
            np.testing.assert_allclose(weight, 1e-3 * loss.disc_weight, rtol=1e-6)


def test_lpips_weighs_as_one_more_loss_at_every_value() -> None:
    loss = AutoencoderLoss(perceptual_weight=0.7)
    networks, params, _, images = _setup(jnp.float32, batch=1)
    shapes = jax.eval_shape(random_params, jax.random.key(0))
    perceptual = jax.tree.map(lambda w: jnp.asarray(np.random.default_rng(0).normal(0, 0.03, w.shape), w.dtype), shapes)
    run = jax.jit(lambda w: reconstruction_gradients(loss, networks, params, w, images, jax.random.key(4))[1])
    metrics = run(perceptual)
    recon = networks.last(params.last, networks.forward(params.body, images, jax.random.key(4))[0])
    distance = jax.jit(lpips)(perceptual, recon, images)[0]
    np.testing.assert_allclose(metrics["loss/lpips"], distance, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss/nll"], jnp.abs(images - recon).sum() + 768 * 0.7 * distance, rtol=1e-5)


def test_four_micro_batches_equal_the_whole_batch() -> None:
    with jax.enable_x64(True):
        loss = AutoencoderLoss(kl_weight=0.1)
        networks, params, disc, images = _setup(jnp.float64, norm="group", batch=8)
        key = jax.random.key(4)
        whole = jax.jit(lambda x: gan_gradients(loss, networks, params, disc, None, x, key))(images)
        part = jax.jit(lambda x: split_gan_gradients(loss, networks, params, disc, None, x, key)[:4])
        parts = [part(micro) for micro in images.reshape(4, 2, 16, 16, 3)]
        rec, gan, disc_grads, metrics = jax.tree.map(lambda *leaves: sum(leaves) / 4, *parts)
        grads, weight = combine(loss, rec, gan)
        _assert_close(grads, whole[0], 1e-11)
        _assert_close(disc_grads, whole[1], 1e-11)
        _assert_close(metrics | {"adaptive_weight": weight}, whole[2], 1e-11)


def test_reconstruction_phase_is_the_gan_phase_without_its_terms() -> None:
    loss = AutoencoderLoss(kl_weight=0.1, disc_weight=0.0)
    networks, params, disc, images = _setup(jnp.float32)
    key = jax.random.key(4)
    with_gan, _, gan_metrics, _ = jax.jit(lambda p: gan_gradients(loss, networks, p, disc, None, images, key))(params)

    def refuse(params: Tree, images: jax.Array) -> jax.Array:
        raise AssertionError("the discriminator has not started")

    alone = jax.jit(lambda p: reconstruction_gradients(loss, networks._replace(discriminate=refuse), p, None, images, key))
    grads, metrics, aux = alone(params)
    _assert_close(grads, with_gan, 1e-6)
    assert set(metrics) == {"loss/nll", "loss/pixel", "loss/kl", "codebook/loss"} < set(gan_metrics)
    np.testing.assert_array_equal(aux, jax.random.key_data(key))


def test_metrics_are_what_their_names_say() -> None:
    networks, params, disc, images = _setup(jnp.float32)
    run = jax.jit(lambda p: gan_gradients(AutoencoderLoss(), networks, p, disc, None, images, jax.random.key(4))[2])
    metrics = run(params)
    h, penalties, _ = networks.forward(params.body, images, jax.random.key(4))
    recon = networks.last(params.last, h)
    real, fake = networks.discriminate(disc, images), networks.discriminate(disc, recon)
    expected = {
        "loss/pixel": np.abs(images - recon).mean(),
        "loss/nll": np.abs(images - recon).sum() / 4,
        **{name: each.mean() for name, each in penalties.items()},
        "loss/generator": -fake.mean(),
        "loss/discriminator": (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean()) / 2,
        "logits/real": real.mean(),
        "logits/fake": fake.mean(),
    }
    assert metrics.keys() == expected.keys() | {"adaptive_weight"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)


def test_one_forward_pass_of_the_autoencoder_and_two_of_the_discriminator() -> None:
    networks, params, disc, images = _setup(jnp.float32)
    calls = {"forward": 0, "last": 0, "discriminate": 0}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return getattr(networks, name)(*args)

        return call

    counting = Networks(*(counted(name) for name in Networks._fields))
    jax.eval_shape(lambda p: gan_gradients(AutoencoderLoss(), counting, p, disc, None, images, jax.random.key(4))[:3], params)
    assert calls == {"forward": 1, "last": 1, "discriminate": 2}


def test_losses_are_float32_and_gradients_keep_the_parameters_dtype_in_bfloat16() -> None:
    networks, params, disc, images = _setup(jnp.bfloat16)
    key = jax.random.key(4)
    grads, disc_grads, metrics, _ = jax.eval_shape(lambda p: gan_gradients(AutoencoderLoss(), networks, p, disc, None, images, key), params)
    assert {leaf.dtype for leaf in metrics.values()} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves((grads, disc_grads))} == {jnp.dtype(jnp.bfloat16)}


def test_means_are_sums_over_the_values_of_an_image_but_for_the_adversary() -> None:
    """Gradients and lambda are those of the sums divided by the values; the discriminator's are the same."""
    with jax.enable_x64(True):
        networks, params, disc, images = _setup(jnp.float64)
        run = lambda loss: jax.jit(lambda p: gan_gradients(loss, networks, p, disc, None, images, jax.random.key(4))[:3])(params)  # noqa: E731
        sums, means = (run(AutoencoderLoss(kl_weight=0.1, reduction=reduction)) for reduction in ("sum", "mean"))  # type: ignore[arg-type]
        values = images[0].size
        _assert_close(means[0], jax.tree.map(lambda g: g / values, sums[0]), 1e-11)
        _assert_close(means[1], sums[1], 1e-11)
        for name in ("loss/nll", "adaptive_weight"):
            np.testing.assert_allclose(means[2][name] * values, sums[2][name], rtol=1e-11)
        for name in ("loss/pixel", "loss/kl", "codebook/loss", "loss/generator"):
            np.testing.assert_allclose(means[2][name], sums[2][name], rtol=1e-11)


def test_adaptive_weight_at_its_limits() -> None:
    loss = AutoencoderLoss(disc_weight=0.5)
    kernel = lambda value: {"kernel": jnp.full((2, 2), value), "bias": jnp.full(3, 1e9)}  # noqa: E731
    np.testing.assert_allclose(adaptive_weight(loss, kernel(3.0), kernel(2.0)), 0.5 * 6 / (4 + 1e-4), rtol=1e-6)
    np.testing.assert_allclose(adaptive_weight(loss, kernel(3.0), kernel(0.0)), 0.5 * 1e4)
    assert adaptive_weight(loss, kernel(0.0), kernel(0.0)) == 0


def test_unknown_kinds_and_bad_weight_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'l3' is not one of"):
        AutoencoderLoss(pixel="l3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'wgan' is neither"):
        AutoencoderLoss(disc_loss="wgan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'max' is neither 'sum' nor 'mean'"):
        AutoencoderLoss(reduction="max")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="LPIPS weights: no weight file"):
        load_lpips(str(tmp_path / "vgg.pth"))
    np.savez(tmp_path / "heads.npz", **{"lin0.model.1.weight": np.zeros((1, 64, 1, 1))})
    with pytest.raises(UserError, match=r"features\.0\.weight is missing"):
        load_lpips(str(tmp_path / "heads.npz"))


def test_lpips_weights_are_read_from_two_files(tmp_path: Path) -> None:
    params = jax.tree.map(lambda w: np.full(w.shape, 0.5, w.dtype), jax.eval_shape(random_params, jax.random.key(0)))
    params["heads"][2][7] = 2
    params["convolutions"][3]["kernel"][0, 1, 2, 3] = 3
    index = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    vgg = {}
    for n, layer in zip(index, params["convolutions"], strict=True):
        vgg |= {f"features.{n}.weight": layer["kernel"].transpose(3, 2, 0, 1), f"features.{n}.bias": layer["bias"]}
    np.savez(tmp_path / "vgg.npz", **vgg)
    heads = {f"lin{k}.model.1.weight": head[None, :, None, None] for k, head in enumerate(params["heads"])}
    np.savez(tmp_path / "heads.npz", **heads)
    loaded = load_lpips(str(tmp_path / "vgg.npz"), str(tmp_path / "heads.npz"))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
