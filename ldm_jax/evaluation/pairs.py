"""What reconstructions lose of their originals: PSNR, SSIM, LPIPS and PSIM of each pair, and how much of a codebook is in use."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ldm_jax.config import UserError
from ldm_jax.evaluation import parts
from ldm_jax.evaluation.extractors import Extractor
from ldm_jax.evaluation.features import Features
from ldm_jax.evaluation.pictures import Pictures
from ldm_jax.evaluation.scores import Metric, Missing, standard_error
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.nn.autoencoder import VQAutoencoder
from ldm_jax.nn.lpips import lpips
from ldm_jax.sharding.processes import wait_for_all
from ldm_jax.stages import to_float, to_uint8

_WINDOW, _SIGMA = 11, 1.5  # of SSIM, pixels
_PERCEPTUAL = 16  # the smallest side that VGG16's poolings leave something of
_BETTER = {"PSNR": "higher", "SSIM": "higher", "LPIPS": "lower", "PSIM": "lower", "bias": None}


def psnr(x: jax.Array, y: jax.Array) -> jax.Array:
    """Peak signal to noise of uint8 pictures [N,H,W,3], dB [N]; equal ones count as if one value were off by one level."""
    square = jnp.mean(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)), axis=(1, 2, 3))
    return 10 * jnp.log10(255**2 / jnp.maximum(square, 1 / x[0].size))


def ssim(x: jax.Array, y: jax.Array) -> jax.Array:
    """Structural similarity of uint8 pictures [N,H,W,3], H, W >= 11, in [-1, 1], [N] (Wang et al. 2004, eqs. 13 to 16): Gaussian windows of
    11 px that lie within the picture, the mean over places and channels."""
    a, b = (images.astype(jnp.float32) / 255 for images in (x, y))
    means = [_blurred(v) for v in (a, b, a * a, b * b, a * b)]
    mean_a, mean_b = means[:2]
    var_a, var_b, both = means[2] - mean_a**2, means[3] - mean_b**2, means[4] - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.mean((1, 2, 3))


def _blurred(images: jax.Array) -> jax.Array:
    """Under the window, where it lies within the picture: [N,H-10,W-10,3]."""
    places = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(places**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for axis in (1, 2):
        length = images.shape[axis] - _WINDOW + 1
        shifted = [jax.lax.slice_in_dim(images, i, i + length, axis=axis) for i in range(_WINDOW)]
        images = sum((w * part for w, part in zip(weights, shifted, strict=True)), start=jnp.zeros_like(shifted[0]))
    return images


def pair_extractor(perceptual: Any | None, weights: str) -> Extractor:
    """Scores [N,1] of pairs, uint8 [N,H,W,6]: originals and what was made of them. `perceptual` has the parameters of `nn.lpips`.

    SSIM is left out of pictures below 11 px, LPIPS and PSIM of those below 16. `bias` is by how many levels the second are brighter. PSIM,
    which the paper's table 8 gives without a definition, is taken as LPIPS without its learnt weights: squared distances of VGG16's unit
    features, summed over five layers.
    """

    def function(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        x, y = images[..., :3], images[..., 3:]
        found = {"PSNR": psnr(x, y), "bias": jnp.mean(y.astype(jnp.float32) - x.astype(jnp.float32), axis=(1, 2, 3))}
        side = min(x.shape[1:3])
        if side >= _WINDOW:
            found["SSIM"] = ssim(x, y)
        if params and side >= _PERCEPTUAL:
            floats = to_float(x), to_float(y)
            plain = {**params, "heads": [jnp.ones_like(head) for head in params["heads"]]}
            found |= {"LPIPS": lpips(params, *floats), "PSIM": lpips(plain, *floats)}
        return {name: values[:, None] for name, values in found.items()}

    return Extractor("pairs", function, perceptual or {}, weights, "pictures as they are")


class Pairs(Pictures):
    """Two sets of as many pictures of one size, side by side in channels: uint8 [n,H,W,6]. Raises ValueError for others."""

    def __init__(self, originals: Pictures, made: Pictures) -> None:
        if len(originals) != len(made) or originals.size != made.size:
            raise ValueError(f"{len(originals)} originals of {originals.size} and {len(made)} reconstructions of {made.size} are no pairs")
        self._both = originals, made
        self.size, self.provenance = originals.size, {}

    def __len__(self) -> int:
        return len(self._both[0])

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.concatenate([one.read(start, stop) for one in self._both], axis=-1)

    def fingerprint(self) -> str:
        return "-".join(one.fingerprint() for one in self._both)

    def describe(self) -> str:
        return f"pairs of {self._both[0].describe()} and {self._both[1].describe()}"


def pairs_missing(found: Features, perceptual: bool) -> list[Missing]:
    """Why scores of pairs are not there."""
    weights = "no weights: give --vgg (torchvision's vgg16-397923af.pth) and --lpips (the heads, vgg.pth of package lpips)"
    small = "the pictures are smaller than {} px"
    missing = [] if "SSIM" in found.names else [Missing("SSIM", small.format(_WINDOW))]
    if "LPIPS" not in found.names:
        missing.append(Missing("LPIPS, PSIM", small.format(_PERCEPTUAL) if perceptual else weights))
    return missing


def pair_metrics(found: Features) -> list[Metric]:
    """Means over the pairs, with their standard errors."""
    metrics = []
    for name in found.names:
        values = found.rows(name)[:, 0].astype(np.float64)
        title = "bias (levels)" if name == "bias" else name
        metrics.append(Metric(title, float(values.mean()), len(values), len(values), "pairs", _BETTER[name], standard_error(values)))
    return metrics


def reconstruct(model: LatentDiffusion, originals: Pictures, directory: Path, batch_size: int, about: Any) -> None:
    """Writes reconstructions (the mode) of all pictures as .npz files in ADM's form, in parts; of a VQ model with `codes`, how often each
    entry of its codebook was taken. Raises UserError."""
    stage, factor = model.first_stage, model.first_stage.network.factor
    if originals.size[0] % factor or originals.size[1] % factor:
        height, width = originals.size
        raise UserError(f"pictures of {width}x{height} are not divisible by the autoencoder's factor {factor}: --crop makes them fit")
    how = {"part": batch_size, "dtype": np.dtype(stage.network.dtype).name}
    parts.claim(directory, {"pictures": originals.fingerprint(), "number": len(originals), "model": about, **how})

    @jax.jit
    def run(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        latents = stage.latents(stage.moments(params, to_float(images)))
        return to_uint8(stage.decode(params, latents)), latents

    todo = parts.missing(directory, len(originals), batch_size)
    with tqdm(total=sum(stop - start for start, stop in todo), desc="reconstruct", unit="image", mininterval=2, disable=not todo) as bar:
        for part in todo:
            images = originals.read(*part)
            filled = images[np.minimum(np.arange(batch_size), len(images) - 1)]
            made, latents = run(model.params["first_stage"], filled)
            codes = {"codes": _codes(model, latents[: len(images)])} if isinstance(stage.network, VQAutoencoder) else {}
            parts.save(parts.part_file(directory, part), {"arr_0": np.asarray(made)[: len(images)], **codes})
            bar.update(len(images))
    wait_for_all()


def _codes(model: LatentDiffusion, latents: jax.Array) -> np.ndarray:
    """How often each entry of the codebook is the nearest, int64 [entries]."""
    network, scale = model.first_stage.network, model.first_stage
    assert isinstance(network, VQAutoencoder)
    raw = latents * jnp.asarray(scale.scale, latents.dtype) + jnp.asarray(scale.shift, latents.dtype)
    _, indices = network.apply({"params": model.params["first_stage"]}, raw, method="lookup")
    return np.bincount(np.asarray(indices).ravel(), minlength=network.codebook_size)


def codebook_metrics(directory: Path, number: int, batch_size: int) -> list[Metric]:
    """Of what `reconstruct` left: the share of the entries that any latent took, and their perplexity; none where there is no codebook."""
    codes = []
    for part in parts.parts(number, batch_size):
        with parts.load(parts.part_file(directory, part)) as file:
            if "codes" not in file.files:
                return []
            codes.append(file["codes"])
    counts = np.sum(codes, axis=0)
    shares = counts[counts > 0] / counts.sum()
    values = {"codebook usage": float((counts > 0).mean()), "codebook perplexity": float(np.exp(-(shares * np.log(shares)).sum()))}
    return [Metric(name, value, number, None, f"{len(counts)} entries", "higher") for name, value in values.items()]
