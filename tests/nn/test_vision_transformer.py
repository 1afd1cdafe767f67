"""The vision transformer against its definition in numpy, its invariances and types; images before it against Pillow; bad input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import erf

from ldm_jax.model_directory import flatten
from ldm_jax.nn.vision_transformer import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, VisionTransformer, cubic, preprocess

SIZES: dict[str, Any] = {"image_size": 12, "patch_size": 4, "width": 12, "depth": 3, "num_heads": 3, "hidden": 20}
KINDS: dict[str, dict[str, Any]] = {
    "dino": {"layer_scale": True},
    "dino-giant": {"layer_scale": True, "activation": "swiglu"},
    "clip": {"pre_norm": True, "patch_bias": False, "projection": 5, "epsilon": 1e-5, "activation": "quick_gelu"},
}
IMAGES = np.random.default_rng(1).normal(size=(2, 12, 12, 3)).astype(np.float32)
UNIT = ((0.0,) * 3, (1 / 255,) * 3)  # mean and deviation that leave grey levels as they are


def shapes(network: VisionTransformer) -> dict[str, Any]:
    side = network.image_size
    return jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]


def random_params(network: VisionTransformer) -> dict[str, Any]:
    """Every parameter random: scales about 1, the others small."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        return (rng.normal(size=leaf.shape) * 0.4 + ("scale" in path[-1].key)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes(network))


def run(network: VisionTransformer, params: Any, images: Any = IMAGES) -> jax.Array:
    return jax.jit(lambda p, x: network.apply({"params": p}, x))(params, images)


def definition(network: VisionTransformer, params: dict[str, Any], images: np.ndarray) -> np.ndarray:
    """The features in float64, one patch and one head after the other, every token through every layer."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    size, heads = network.patch_size, network.num_heads

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + network.epsilon) * p[name]["scale"] + p[name]["bias"]

    def linear(w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return x @ w["kernel"] + w.get("bias", 0)

    def attention(w: dict[str, Any], x: np.ndarray) -> np.ndarray:
        joined = []
        for q, k, v in zip(*(np.split(linear(w[name], x), heads, axis=-1) for name in "qkv"), strict=True):
            weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
            joined.append(weights / weights.sum(-1, keepdims=True) @ v)
        return linear(w["out"], np.concatenate(joined, axis=-1))

    def activation(h: np.ndarray) -> np.ndarray:
        if network.activation == "swiglu":
            gate, value = np.split(h, 2, axis=-1)
            return gate / (1 + np.exp(-gate)) * value
        return h / (1 + np.exp(-1.702 * h)) if network.activation == "quick_gelu" else h * (1 + erf(h / np.sqrt(2))) / 2

    places = [(i, j) for i in range(0, network.image_size, size) for j in range(0, network.image_size, size)]
    patches = [linear(p["patches"], images[:, i : i + size, j : j + size].reshape(len(images), -1)) for i, j in places]
    x = np.stack([np.broadcast_to(p["class_embedding"], patches[0].shape), *patches], axis=1) + p["position_embedding"]
    x = norm("pre_norm", x) if network.pre_norm else x
    for i in range(network.depth):
        one, two = (p.get(f"layer_{i}_scale{n}", 1.0) for n in (1, 2))
        x = x + one * attention(p[f"layer_{i}_attn"], norm(f"layer_{i}_norm1", x))
        x = x + two * linear(p[f"layer_{i}_ff_out"], activation(linear(p[f"layer_{i}_ff_in"], norm(f"layer_{i}_norm2", x))))
    y = norm("final_norm", x)[:, 0]
    return linear(p["projection"], y) if network.projection else y


@pytest.mark.parametrize("kind", KINDS)
def test_equals_its_definition(kind: str) -> None:
    network = VisionTransformer(**SIZES, **KINDS[kind])
    params = random_params(network)
    found = run(network, params)
    assert (found.dtype, found.shape) == (jnp.float32, (2, network.projection or network.width))
    np.testing.assert_allclose(found, definition(network, params, IMAGES), atol=3e-5)
    with jax.enable_x64(True):
        wide = run(network.clone(dtype=jnp.float64), jax.tree.map(lambda a: a.astype(np.float64), params), IMAGES.astype(np.float64))
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, definition(network, params, IMAGES), atol=1e-12)


def test_patches_that_move_with_their_positions_change_nothing() -> None:
    """Nothing but the table of positions tells the network where a patch is."""
    network = VisionTransformer(**SIZES)
    params = random_params(network)
    moved = IMAGES.copy()
    moved[:, :4, :4], moved[:, 8:, 4:8] = IMAGES[:, 8:, 4:8], IMAGES[:, :4, :4]
    table = params["position_embedding"].copy()
    table[[1, 8]] = table[[8, 1]]
    before = run(network, params)
    np.testing.assert_allclose(run(network, params | {"position_embedding": table}, moved), before, atol=1e-5)
    assert np.abs(run(network, params, moved) - before).max() > 1e-2


def test_an_image_has_its_features_in_any_batch() -> None:
    network = VisionTransformer(**SIZES, **KINDS["clip"])
    params = random_params(network)
    np.testing.assert_allclose(run(network, params)[1:], run(network, params, IMAGES[1:]), atol=1e-5)


def test_bfloat16_is_close() -> None:
    network = VisionTransformer(**SIZES, **KINDS["dino"])
    params = random_params(network)
    full, low = run(network, params), run(network.clone(dtype=jnp.bfloat16), params)
    assert low.dtype == jnp.bfloat16
    assert np.linalg.norm(low.astype(jnp.float32) - full) < 3e-2 * np.linalg.norm(full)


def test_a_feature_of_a_published_size_has_the_published_number_of_parameters() -> None:
    """ViT-L/14: DINOv2's 304,368,640 at 518 px, of which the mask token's 1,024 are not needed; CLIP's 303,179,776 and the projection."""
    large: dict[str, Any] = {"patch_size": 14, "width": 1024, "depth": 24, "num_heads": 16, "hidden": 4096}
    dino = VisionTransformer(image_size=518, **large, layer_scale=True)
    clip = VisionTransformer(image_size=224, **large, pre_norm=True, patch_bias=False, projection=768)
    for network, expected in ((dino, 304_368_640 - 1024), (clip, 303_179_776 + 1024 * 768)):
        assert sum(leaf.size for leaf in flatten(shapes(network)).values()) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_heads": 5}, "width 12 is not divisible into 5 heads"),
        ({"patch_size": 5}, "images of 12 px are not divisible into patches of 5"),
        ({"activation": "relu"}, "activation 'relu' is not one of quick_gelu, gelu, swiglu"),
        ({"depth": 0}, "to be positive"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes(VisionTransformer(**SIZES | wrong))


@pytest.mark.parametrize("shape", [(2, 12, 16, 3), (2, 8, 8, 3), (2, 12, 12, 4), (12, 12, 3)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    network = VisionTransformer(**SIZES)
    with pytest.raises(ValueError, match=r"not \[N,12,12,3\]"):
        network.apply({"params": random_params(network)}, np.zeros(shape, np.float32))


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (*shape, 3)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(64, 48), (21, 33), (16, 16), (5, 9), (230, 301)])
def test_images_are_resized_as_by_pillow(shape: tuple[int, int]) -> None:
    """Pillow's bicubic filter on floats, and the centre of it."""
    images = pictures(2, *shape)
    height, width = (16 * side // min(shape) for side in shape)
    top, left = (height - 16) // 2, (width - 16) // 2

    def pillow(channel: np.ndarray) -> np.ndarray:
        resized = Image.fromarray(channel.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(resized)[top : top + 16, left : left + 16]

    expected = np.stack([[pillow(image[..., c]) for c in range(3)] for image in images]).transpose(0, 2, 3, 1)
    found = preprocess(images, 16, *UNIT)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected.clip(0, 255), rtol=0, atol=3e-4)


@pytest.mark.parametrize(("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), (CLIP_MEAN, CLIP_STD)])
def test_images_of_the_right_size_are_normalised_only(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    images = pictures(2, 16, 16)
    expected = (images / 255 - mean) / std
    np.testing.assert_allclose(preprocess(images, 16, mean, std), expected, atol=2e-6)
    np.testing.assert_array_equal(preprocess(images, 16, mean, std), preprocess(images.astype(np.float32), 16, mean, std))


@pytest.mark.parametrize("shape", [(40, 30), (7, 20), (16, 24)])
def test_resizing_commutes_with_mirrors_and_transposition(shape: tuple[int, int]) -> None:
    """Sizes whose margins are even, so that the centre is the centre."""
    images = pictures(1, *shape)
    found = preprocess(images, 14 if shape == (7, 20) else 12, *UNIT)
    size = found.shape[1]
    for axes in ((1,), (2,), (1, 2)):
        np.testing.assert_allclose(preprocess(np.flip(images, axes), size, *UNIT), jnp.flip(found, axes), atol=1e-3)
    np.testing.assert_allclose(preprocess(images.swapaxes(1, 2), size, *UNIT), found.swapaxes(1, 2), atol=1e-3)


def test_constant_images_stay_constant_and_overshoot_is_cut_off() -> None:
    np.testing.assert_allclose(preprocess(np.full((1, 50, 30, 3), 77, np.uint8), 16, *UNIT), 77, atol=1e-4)
    edge = np.zeros((1, 8, 8, 3), np.uint8)
    edge[:, :, 4:] = 255
    found = np.asarray(preprocess(edge, 32, *UNIT))
    assert found.min() == 0
    np.testing.assert_allclose(found.max(), 255, rtol=1e-6)  # the filter alone goes 7 % beyond


def test_resizing_is_in_full_precision_and_float64_where_asked() -> None:
    with jax.default_matmul_precision("bfloat16"):
        program = str(jax.make_jaxpr(lambda x: preprocess(x, 16, *UNIT))(pictures(1, 40, 30)))
    assert program.count("dot_general") == program.count("Precision.HIGHEST, Precision.HIGHEST") == 2
    with jax.enable_x64(True):
        wide = preprocess(pictures(1, 40, 30).astype(np.float64), 16, *UNIT)
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(preprocess(pictures(1, 40, 30), 16, *UNIT), wide, atol=2e-4)


@pytest.mark.parametrize(("shape", "size"), [((2, 8, 8, 4), 8), ((8, 8, 3), 8), ((2, 0, 8, 3), 8), ((2, 8, 8, 3), 0)])
def test_images_that_cannot_be_resized_are_refused(shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(ValueError, match=r"not \[N,H,W,3\], or the size"):
        preprocess(np.zeros(shape, np.uint8), size, *UNIT)


@pytest.mark.parametrize("a", [-0.5, -0.75])
def test_the_kernel_interpolates_sums_to_one_and_has_its_slope(a: float) -> None:
    np.testing.assert_allclose(cubic(np.arange(-3.0, 4), a), [0, 0, 0, 1, 0, 0, 0], atol=1e-15)
    t = np.linspace(0, 1, 11)
    np.testing.assert_allclose(sum(cubic(t + k, a) for k in range(-2, 2)), 1, atol=1e-14)
    np.testing.assert_allclose((cubic(np.array(1 + 1e-6), a) - cubic(np.array(1 - 1e-6), a)) / 2e-6, a, atol=1e-5)
