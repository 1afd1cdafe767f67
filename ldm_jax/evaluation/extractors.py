"""What features of pictures can be had: of networks whose weights the user gives, and mean colours, which need none.

Everything here is float32 on every device: in bfloat16 or TF32, the defaults of accelerators, the FID moves in its second digit.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.interop import vision
from ldm_jax.interop.safetensors_file import open_weights
from ldm_jax.interop.vision import sha256
from ldm_jax.nn import inception
from ldm_jax.nn.vision_transformer import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, preprocess
from ldm_jax.paths import fetched

# The start of the SHA-256 of the FID's weights, which their file's name says too.
INCEPTION_HASH = "6726825d"
COLORS = 8  # parts of a picture along each side
WEIGHTS = {
    "inception": "pt_inception-2015-12-05-6726825d.pth of the pytorch-fid or torch-fidelity releases",
    "dino": "DINOv2 ViT-L/14: dinov2_vitl14_pretrain.pth, or a transformers directory of facebook/dinov2-large",
    "clip": "a transformers directory of CLIP, such as openai/clip-vit-base-patch32",
}


@dataclass(frozen=True)
class Extractor:
    """Features of pictures.

    Attributes:
      name: of the network.
      function: (params, uint8 [N,H,W,3]) to named rows float32 [N,d]; pure.
      params: its parameters.
      weights: SHA-256 of the file that they come from, "" where there are none.
      rule: how pictures are resized and scaled for it.
    """

    name: str
    function: Callable[[Any, jax.Array], dict[str, jax.Array]]
    params: Any
    weights: str
    rule: str


def colors() -> Extractor:
    """Mean colours of 8 x 8 parts of a picture, [N,192] in [0, 1]: what is always there, and sees colours and large shapes alone."""

    def function(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        rows, columns = (jnp.asarray(_means(size), jnp.float32) for size in images.shape[1:3])
        means = jnp.einsum("ih,nhwc,jw->nijc", rows, images.astype(jnp.float32) / 255, columns, precision="highest")
        return {"colors": means.reshape(len(means), -1)}

    return Extractor("colors", function, {}, "", f"means of {COLORS} x {COLORS} parts of the picture as it is")


def _means(size: int) -> np.ndarray:
    """[8,size]: each row takes the mean over its part; parts share the pixels that lie across their borders."""
    edges = np.linspace(0, size, COLORS + 1)
    pixels = np.arange(size)
    shares = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return shares.clip(0) * (COLORS / size)


def inception_of(params: Any, weights: str = "") -> Extractor:
    """Inception-v3 as the FID has it: `inception` [N,2048], `inception_spatial` [N,2023] and `inception_logits` [N,1008]."""
    network = inception.Inception()

    def function(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        found: Any = network.apply({"params": params}, images.astype(jnp.float32))
        return {"inception": found["pool"], "inception_spatial": found["spatial"], "inception_logits": found["logits"]}

    rule = f"TensorFlow 1's bilinear resize to {inception.SIDE} px in float32 (corners not aligned, no filter), then (x - 128) / 128"
    return Extractor("inception", function, params, weights, rule)


def load_inception(path: Path, any_weights: bool = False) -> Extractor:
    """Of a file of weights (.pth, .npz, .safetensors). Raises UserError for another file than the FID's, unless `any_weights`."""
    found = sha256(path)
    if not found.startswith(INCEPTION_HASH) and not any_weights:
        raise UserError(
            f"{path} is not the file that the FID is defined by: its SHA-256 is {found[:8]}..., not {INCEPTION_HASH}...; with"
            " --any-weights it is taken all the same, and the report says so"
        )
    try:
        return inception_of(inception.params_from_state_dict(open_weights(path)), found)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def load_dino(path: Path) -> Extractor:
    """DINOv2: `dino` [N,width], the class token. Raises UserError."""
    network, params, digest = vision.load_dino(path)
    rule = (
        f"bicubic resize with a filter to {network.image_size} px, clipped, ImageNet's mean and deviation; positions interpolated with an"
        f" offset of {vision.HUB_OFFSET:g}"
    )

    def function(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        found: Any = network.apply({"params": params}, preprocess(images, network.image_size, IMAGENET_MEAN, IMAGENET_STD))
        return {"dino": found}

    return Extractor("dino", function, params, digest, rule)


def load_clip(path: Path) -> tuple[Extractor, vision.Clip]:
    """CLIP: `clip` [N,projection], of unit length; and the whole, for the embeddings of texts. Raises UserError."""
    clip = vision.load_clip(path)
    size = clip.image_network.image_size

    def function(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        return {"clip": vision.image_embeddings(replace(clip, image_params=params), preprocess(images, size, CLIP_MEAN, CLIP_STD))}

    rule = f"bicubic resize with a filter to {size} px, clipped, CLIP's mean and deviation"
    return Extractor("clip", function, clip.image_params, clip.sha256, rule), clip


def variable(name: str) -> str:
    """The environment variable that may hold the path of weights."""
    return f"LDM_{name.upper()}"


def weight_path(name: str, given: str | None) -> Path | None:
    """Where the weights of a network lie, by a flag or by the environment; None for nowhere. Raises UserError where nothing is there."""
    where = given or os.environ.get(variable(name))
    if not where:
        return None
    path = fetched(where)
    if not path.exists():
        raise UserError(f"the weights of {name} are not at {path}: there should be {WEIGHTS.get(name, 'a file')}")
    return path


def absent(name: str) -> str:
    """Why a network cannot be had, and where users get its weights."""
    return f"no weights: give --{name} or {variable(name)}, {WEIGHTS[name]}"
