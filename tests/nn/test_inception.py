"""The FID's Inception: TensorFlow 1's resize, folded batch norms, and which weights are taken. `tests/peers` compares the whole."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn import inception
from ldm_jax.nn.inception import Conv, Forked, Inception, abstract_params, params_from_state_dict, resize

pytestmark = pytest.mark.usefixtures("quick_compilation")


def plain_resize(image: np.ndarray, side: int) -> np.ndarray:
    """TensorFlow 1's ResizeBilinear of [H,W,C] in float64: from pixel i * size / side, the next one at most the last."""
    found = np.zeros((side, side, image.shape[2]))
    for i in range(side):
        y = i * image.shape[0] / side
        top, down = int(y), min(int(y) + 1, image.shape[0] - 1)
        for j in range(side):
            x = j * image.shape[1] / side
            left, right = int(x), min(int(x) + 1, image.shape[1] - 1)
            upper = image[top, left] + (x - left) * (image[top, right] - image[top, left])
            lower = image[down, left] + (x - left) * (image[down, right] - image[down, left])
            found[i, j] = upper + (y - top) * (lower - upper)
    return found


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (256, 256), (299, 299), (512, 512), (40, 300)])
def test_resize_is_tensorflow_1s(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.float64)
    found = resize(image[None].astype(np.float32))
    assert found.dtype == np.float32 and found.shape == (1, 299, 299, 3)
    np.testing.assert_allclose(found[0], plain_resize(image, 299), rtol=1e-5, atol=1e-5)


def test_resize_has_no_filter_and_no_half_pixels() -> None:
    columns = np.zeros((1, 4, 8, 1), np.float32)
    columns[0, :, 2::2] = [[9.0]] * 3
    np.testing.assert_array_equal(resize(columns, 4)[0, 0, :, 0], [0, 9, 9, 9])  # each second pixel, and nothing of the others
    ramp = np.arange(4, dtype=np.float32)[None, None, :, None].repeat(4, axis=1)
    np.testing.assert_array_equal(resize(ramp, 8)[0, 0, :, 0], [0, 0.5, 1, 1.5, 2, 2.5, 3, 3])


def test_averages_leave_out_the_padding_and_the_maximum_sees_none() -> None:
    x = jnp.full((1, 5, 5, 1), -3.0)
    np.testing.assert_allclose(inception._average(x), x, rtol=1e-6)
    np.testing.assert_array_equal(inception._maximum(x, 1), x)


def random_state() -> dict[str, np.ndarray]:
    """Weights by torch's names, in which no statistic of a norm is trivial."""
    rng, state = np.random.default_rng(0), {}
    for name, shape in inception.torch_shapes().items():
        if name.endswith("running_var"):
            value = rng.uniform(0.5, 1, shape)
        elif name.endswith("bn.weight"):
            value = rng.uniform(0.8, 1.2, shape)
        else:
            value = (
                rng.standard_normal(shape, np.float32) * (2 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1 * rng.normal(size=shape)
            )
        state[name] = value.astype(np.float32)
    return state


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return random_state()


@pytest.fixture(scope="module")
def params(state: dict[str, np.ndarray]) -> Any:
    return params_from_state_dict(state)


def test_every_parameter_is_read_with_its_shape(state: dict[str, np.ndarray], params: Any) -> None:
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract_params())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert len(state) + 94 + 1 == 566  # with the counters of 94 norms and the bias of the head all tensors of the published file


def test_batch_norms_are_folded_into_convolutions(state: dict[str, np.ndarray], params: Any) -> None:
    """Against a convolution, a norm with epsilon 0.001 and ReLU, one after the other in float64 loops."""
    name, x = "Mixed_7c.branch3x3_2a", np.random.default_rng(1).normal(size=(4, 5, 384))
    found = np.asarray(Conv(384, (1, 3)).apply({"params": params["Mixed_7c"]["branch3x3_2a"]}, x[None].astype(np.float32)))[0]
    kernel = state[f"{name}.conv.weight"].astype(np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    raw = np.array([[sum(kernel[:, :, 0, k] @ padded[i, j + k] for k in range(3)) for j in range(5)] for i in range(4)])
    gain, offset, mean, variance = (
        state[f"{name}.bn.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    expected = np.maximum((raw - mean) / np.sqrt(variance + 1e-3) * gain + offset, 0)
    assert (expected == 0).any() and expected.std() > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_a_parameter_is_left(state: dict[str, np.ndarray], params: Any) -> None:
    """The head's bias, which ADM's Inception score leaves out, and torch's counters."""
    more = {"fc.bias": np.ones(1008, np.float32), "Conv2d_1a_3x3.bn.num_batches_tracked": np.array(0)}
    for a, b in zip(jax.tree.leaves(params_from_state_dict(state | more)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_other_weights_are_refused_with_all_that_is_wrong(state: dict[str, np.ndarray]) -> None:
    torchvision = {
        **state,
        "fc.weight": np.zeros((1000, 2048), np.float32),
        "AuxLogits.fc.weight": np.zeros(1),
    }
    del torchvision["Mixed_5b.branch_pool.bn.running_mean"]
    with pytest.raises(ValueError, match="these are not the weights of the FID's Inception: ") as error:
        params_from_state_dict(torchvision)
    for part in (
        "fc.weight: [1000, 2048] there, [1008, 2048] here",
        "branch_pool.bn.running_mean: missing",
        "AuxLogits.fc.weight: not expected",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"; 466 more$"):
        params_from_state_dict({})
    assert "more" not in str(error.value)


def test_the_last_blocks_fork_and_pool_as_the_fids(params: Any) -> None:
    """In the last but one the average, in the last the maximum; channels in torch's order, 320 + 2 x 384 + 2 x 384 + 192."""
    x = np.random.default_rng(2).uniform(0, 1, (1, 8, 8, 2048)).astype(np.float32)
    params = params["Mixed_7c"]
    blocks = [np.asarray(Forked(maximum).apply({"params": params}, x)) for maximum in (False, True)]
    assert blocks[0].shape == (1, 8, 8, 2048)
    np.testing.assert_array_equal(blocks[0][..., :1856], blocks[1][..., :1856])
    assert np.abs(blocks[0][..., 1856:] - blocks[1][..., 1856:]).max() > 0.1
    straight = Conv(320).apply({"params": params["branch1x1"]}, x)
    np.testing.assert_allclose(blocks[0][..., :320], straight, rtol=1e-5, atol=1e-5)


def test_the_whole_has_its_outputs_and_spatial_features_in_tensorflows_order(state: dict[str, np.ndarray], params: Any) -> None:
    """One compilation of the network: pool and logits are tied by the head without a bias, and `spatial` is rows, columns, channels."""
    images = np.random.default_rng(3).integers(0, 256, (1, 32, 32, 3)).astype(np.float32)

    def run(params: Any, images: jax.Array) -> Any:
        return Inception().apply(
            {"params": params}, images, capture_intermediates=lambda module, name: module.name in ("Mixed_6d", "Mixed_7c")
        )

    found, kept = jax.jit(run)(params, images)
    assert {name: (value.shape, value.dtype) for name, value in found.items()} == {
        name: ((1, size), np.float32) for name, size in {"pool": 2048, "spatial": 2023, "logits": 1008}.items()
    }
    grid, last = (np.asarray(kept["intermediates"][name]["__call__"][0]) for name in ("Mixed_6d", "Mixed_7c"))
    assert grid.shape == (1, 17, 17, 768) and last.shape == (1, 8, 8, 2048)
    spatial = np.asarray(found["spatial"])[0]
    for row, column, channel in ((0, 0, 6), (3, 11, 0), (16, 16, 5)):
        assert spatial[(row * 17 + column) * 7 + channel] == grid[0, row, column, channel]
    np.testing.assert_allclose(found["pool"], last.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["logits"], last.mean((1, 2)) @ state["fc.weight"].T, rtol=1e-3, atol=1e-4)
    assert spatial.std() > 1e-3 and np.asarray(found["pool"]).std() > 1e-3
