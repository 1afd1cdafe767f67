"""Low-resolution pictures for super-resolution: bicubic, and the random degradations of BSRGAN (Zhang et al., arXiv 2103.14006).

A chain of BSRGAN is a list of steps: blurs, two resizes, noise and JPEG compression in random order, and one more compression. The
steps are drawn first, each with all its settings, and then done to the picture, so what is drawn can be read and counted. The step
with a camera's image pipeline is left out, as in the published latent diffusion models, which had no model of a camera for it.
"""

import dataclasses
import functools
import io
from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

from ldm_jax.config import UserError

Filter = Literal["bilinear", "bicubic", "area", "antialiased"]
FILTERS: tuple[Filter, ...] = ("bilinear", "bicubic", "area")
"""What the resizes of a chain draw from. Bilinear and bicubic read the picture at points and so alias when they shrink it."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """Ranges, ends included, from which the steps of a chain are drawn; at a factor f of super-resolution.

    The ranges of the paper's section 3 and, where they differ, of its published code.

    Attributes:
        blurs: steps of blur.
        blur_share: of the paper's widths: the standard deviation of an isotropic blur is uniform in (0, 2 + f / 5] pixels (section 3.1),
            the two variances of an anisotropic one in (0, 4 + f] square pixels (code), each times this share.
        isotropic_sides: pixels of an isotropic blur's kernel, odd.
        anisotropic_sides: pixels of an anisotropic blur's kernel, odd.
        halve_share: chance that the picture is halved beforehand, at even factors from 4 on (section 3.2: at 4).
        rescale_share: chance that the first resize is to a random scale in [1 / (2 f), 1], not to each f-th pixel after a blur
            (section 3.2).
        noise_levels: whole numbers of standard deviations, in units of 1/255 (section 3.3).
        qualities: whole numbers of JPEG qualities (section 3.4).
        jpeg_share: chance of the first compression (code); the second is always done.
    """

    blurs: int = 2
    blur_share: float = 1.0
    isotropic_sides: tuple[int, int] = (7, 25)
    anisotropic_sides: tuple[int, int] = (7, 25)
    halve_share: float = 0.25
    rescale_share: float = 0.75
    noise_levels: tuple[int, int] = (2, 25)
    qualities: tuple[int, int] = (30, 95)
    jpeg_share: float = 0.9


BSR = Chain()
# "BSR-light" of the published super-resolution model bsr_sr, whose paper names it without numbers: these are those of its code.
BSR_LIGHT = Chain(blurs=1, blur_share=0.25, isotropic_sides=(7, 11), rescale_share=0.8, noise_levels=(1, 2), qualities=(80, 95))


@dataclasses.dataclass(frozen=True)
class Blur:
    """A Gaussian blur: a kernel of `side` pixels with these variances (square pixels) along axes turned by `angle` (radians)."""

    side: int
    variances: tuple[float, float]
    angle: float = 0.0

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return convolve(image, gaussian_kernel(self.side, self.variances, self.angle))


@dataclasses.dataclass(frozen=True)
class Resize:
    """A resize to [height, width] pixels."""

    height: int
    width: int
    filter: Filter

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return resize(image, self.height, self.width, self.filter)


@dataclasses.dataclass(frozen=True)
class Pick:
    """A Gaussian blur about the centre of each cell of factor x factor pixels, of which one value is taken."""

    factor: int
    deviation: float

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        offset = (self.factor - 1) / 2
        side = 2 * int(np.ceil(offset + 3 * self.deviation)) + 1
        kernel = gaussian_kernel(side, (self.deviation**2, self.deviation**2), offset=offset)
        return convolve(image, kernel)[:: self.factor, :: self.factor]


@dataclasses.dataclass(frozen=True)
class Noise:
    """Gaussian noise: `mix` [3][k] times k standard normal values a pixel, in units of 1/255, so its covariance is mix mix^T."""

    mix: tuple[tuple[float, ...], ...]

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        mix = np.array(self.mix, np.float32)
        return image + rng.standard_normal((*image.shape[:2], mix.shape[1]), np.float32) @ mix.T


@dataclasses.dataclass(frozen=True)
class Jpeg:
    """JPEG compression at a quality in [0, 100]."""

    quality: int

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(np.rint(image).astype(np.uint8)).save(file, "JPEG", quality=self.quality)
        return np.asarray(Image.open(file), np.float32)


Step = Blur | Resize | Pick | Noise | Jpeg
"""A step is called with a picture, float32 [H, W, 3] in [0, 255], and draws from the generator only what is drawn for each pixel."""


def draw_steps(rng: np.random.Generator, height: int, width: int, factor: int, chain: Chain) -> list[Step]:
    """The steps that take a picture of [height, width], both divisible by the factor, to one of [height, width] / factor."""
    steps: list[Step] = []
    if factor >= 4 and factor % 2 == 0 and rng.random() < chain.halve_share:
        height, width, factor = height // 2, width // 2, factor // 2
        steps.append(Resize(height, width, "antialiased" if rng.random() < 0.5 else draw_filter(rng)))
    for name in draw_order(rng, chain):
        match name:
            case "blur":
                steps.append(draw_blur(rng, factor, chain))
            case "rescale":
                steps.append(draw_rescale(rng, height, width, factor, chain))
            case "resize":
                steps.append(Resize(height // factor, width // factor, draw_filter(rng)))
            case "noise":
                steps.append(draw_noise(rng, chain))
            case "jpeg" if rng.random() < chain.jpeg_share:
                steps.append(draw_jpeg(rng, chain))
    return [*steps, draw_jpeg(rng, chain)]


def draw_order(rng: np.random.Generator, chain: Chain) -> list[str]:
    """The order of the steps, uniform among those in which the resize to the final size comes after the one to a random scale."""
    names = ["blur"] * chain.blurs + ["rescale", "resize", "noise", "jpeg"]
    order = [names[i] for i in rng.permutation(len(names))]
    first, last = sorted((order.index("rescale"), order.index("resize")))
    order[first], order[last] = "rescale", "resize"
    return order


def draw_filter(rng: np.random.Generator) -> Filter:
    """One of `FILTERS`."""
    return FILTERS[rng.integers(len(FILTERS))]


def draw_blur(rng: np.random.Generator, factor: int, chain: Chain) -> Blur:
    """A blur, isotropic or anisotropic with equal chances."""
    # 1 - random() is in (0, 1], so that no width is zero.
    if rng.random() < 0.5:
        deviation = chain.blur_share * (2 + 0.2 * factor) * (1 - rng.random())
        return Blur(_odd(rng, chain.isotropic_sides), (deviation**2, deviation**2))
    first, second = (chain.blur_share * (4 + factor) * (1 - rng.random()) for _ in range(2))
    return Blur(_odd(rng, chain.anisotropic_sides), (first, second), np.pi * rng.random())


def draw_rescale(rng: np.random.Generator, height: int, width: int, factor: int, chain: Chain) -> Resize | Pick:
    """The first of the two resizes: to a random scale, or to one value of each cell after a blur."""
    if rng.random() < chain.rescale_share:
        divisor = rng.uniform(1, 2 * factor)
        return Resize(max(int(height / divisor), 1), max(int(width / divisor), 1), draw_filter(rng))
    return Pick(factor, rng.uniform(0.1, 0.6 * factor))


def draw_noise(rng: np.random.Generator, chain: Chain) -> Noise:
    """Noise that is one value for all channels (chance 0.4), one for each (0.4), or of a random covariance (0.2); section 3.3."""
    kind = rng.random()
    if kind >= 0.8:
        # Random axes, whose variances are uniform up to that of the highest level.
        axes, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        return Noise(tuple(map(tuple, (axes * np.sqrt(rng.random(3)) * chain.noise_levels[1]).tolist())))
    level = float(rng.integers(chain.noise_levels[0], chain.noise_levels[1] + 1))
    if kind < 0.4:
        return Noise(((level,), (level,), (level,)))
    return Noise(((level, 0.0, 0.0), (0.0, level, 0.0), (0.0, 0.0, level)))


def draw_jpeg(rng: np.random.Generator, chain: Chain) -> Jpeg:
    """A compression of uniform quality."""
    return Jpeg(int(rng.integers(chain.qualities[0], chain.qualities[1] + 1)))


def _odd(rng: np.random.Generator, ends: tuple[int, int]) -> int:
    """A uniform odd number between two odd ends, both included."""
    return int(ends[0] + 2 * rng.integers((ends[1] - ends[0]) // 2 + 1))


def gaussian_kernel(side: int, variances: tuple[float, float], angle: float = 0.0, offset: float = 0.0) -> np.ndarray:
    """A Gaussian on a square of pixels, of sum one.

    Args:
        side: of the square, odd.
        variances: along the first and second axis, square pixels, positive.
        angle: of the first axis from x towards y, radians.
        offset: pixels, in both directions, by which the Gaussian reads the picture to the right of and below each pixel.

    Returns:
        float32 [side, side], for `convolve`.
    """
    at = np.arange(side) - side // 2 + offset
    along = np.cos(angle) * at[None] + np.sin(angle) * at[:, None]
    across = np.cos(angle) * at[:, None] - np.sin(angle) * at[None]
    exponent = -0.5 * (along**2 / variances[0] + across**2 / variances[1])
    kernel = np.exp(exponent - exponent.max())  # far narrower than a pixel, it would else vanish at all of them
    return (kernel / kernel.sum()).astype(np.float32)


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """A picture, float32 [H, W, 3], convolved with a kernel [side, side] of odd side, reflected at its border pixels."""
    reach = kernel.shape[0] // 2
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), "reflect")
    size = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, size, axes=(0, 1))[..., None]
    return np.fft.irfft2(spectrum, size, axes=(0, 1))[2 * reach :, 2 * reach :].astype(np.float32)


def resize(image: np.ndarray, height: int, width: int, method: Filter) -> np.ndarray:
    """A picture, float32 [H, W, 3], at [height, width].

    "area" gives each pixel the mean of what it covers, larger or smaller; "antialiased" is a bicubic filter as wide as the pixels;
    "bilinear" and "bicubic" read the picture at the centres of pixels only.
    """
    if method == "area":
        return np.einsum("ih,hwc,jw->ijc", _overlaps(image.shape[0], height), image, _overlaps(image.shape[1], width), optimize=True)
    channels = [Image.fromarray(np.ascontiguousarray(image[..., i])) for i in range(image.shape[2])]
    if method == "antialiased":
        resized = [channel.resize((width, height), Image.Resampling.BICUBIC) for channel in channels]
    else:
        points = Image.Resampling.BILINEAR if method == "bilinear" else Image.Resampling.BICUBIC
        scaling = (image.shape[1] / width, 0, 0, 0, image.shape[0] / height, 0)
        resized = [channel.transform((width, height), Image.Transform.AFFINE, scaling, points) for channel in channels]
    return np.stack([np.asarray(channel, np.float32) for channel in resized], axis=-1)


def _overlaps(length: int, count: int) -> np.ndarray:
    """How much of each of `count` equal parts of a line lies in each of its `length` pixels, in shares of the part: [count, length]."""
    edges = np.arange(count + 1)[:, None] * length / count
    pixels = np.arange(length)
    common = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return (common.clip(0) * count / length).astype(np.float32)


def bicubic(image: np.ndarray, factor: int, rng: np.random.Generator) -> np.ndarray:
    """Bicubic downsampling with antialiasing, as Pillow does it; nothing is drawn."""
    size = (image.shape[1] // factor, image.shape[0] // factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def blind(image: np.ndarray, factor: int, rng: np.random.Generator, chain: Chain) -> np.ndarray:
    """A drawn chain of BSRGAN."""
    degraded = image.astype(np.float32)
    for step in draw_steps(rng, image.shape[0], image.shape[1], factor, chain):
        degraded = step(degraded, rng).clip(0, 255)
    return degraded.astype(np.uint8)  # whole numbers, since the last step is a compression


DEGRADATIONS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "bicubic": bicubic,
    "bsr": functools.partial(blind, chain=BSR),
    "bsr_light": functools.partial(blind, chain=BSR_LIGHT),
}
"""Degradations by name: of a picture uint8 [H, W, 3] whose sides the factor divides, to uint8 [H / factor, W / factor, 3]."""


def mod_crop(image: np.ndarray, factor: int) -> np.ndarray:
    """The largest part of a picture [H, W, ...] whose sides the factor divides, from its top left corner.

    The corner is kept so that pixel (i, j) of the small picture belongs to the cell that begins at (factor i, factor j) of the large
    one, whatever was cut off.
    """
    height, width = image.shape[:2]
    return image[: height - height % factor, : width - width % factor]


def degrade(kind: str, image: np.ndarray, factor: int, rng: np.random.Generator) -> np.ndarray:
    """The low-resolution picture that super-resolution starts from.

    Args:
        kind: one of `DEGRADATIONS`.
        image: uint8 [H, W, 3]; where the factor does not divide a side, the picture is first cut to `mod_crop`.
        factor: of super-resolution, at least 1.
        rng: which alone decides what is drawn.

    Returns:
        uint8 [H // factor, W // factor, 3].

    Raises:
        UserError: no such kind, or a picture smaller than the factor.
    """
    if kind not in DEGRADATIONS:
        raise UserError(f"degradation {kind!r} is unknown; it must be one of {', '.join(DEGRADATIONS)}")
    if factor < 1 or min(image.shape[:2]) < factor:
        raise UserError(f"degradation: a picture of {image.shape[1]} x {image.shape[0]} pixels cannot be reduced by a factor of {factor}")
    return DEGRADATIONS[kind](mod_crop(image, factor), factor, rng)
