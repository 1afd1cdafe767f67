"""LPIPS: what a distance must be, an independent computation, gradients, and the reading of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn.lpips import lpips, params_from_state_dict, random_params

_distance = jax.jit(lpips)
_TORCH_INDEX = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


@pytest.fixture(scope="module")
def params() -> dict:
    return jax.jit(random_params)(jax.random.key(0))


def _images(seed: int, size: int = 16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (2, size, size, 3)), jnp.float32)


def _state_dict(params: dict) -> dict[str, np.ndarray]:
    state = {}
    for n, layer in zip(_TORCH_INDEX, params["convolutions"], strict=True):
        state[f"features.{n}.weight"] = np.asarray(layer["kernel"]).transpose(3, 2, 0, 1)
        state[f"features.{n}.bias"] = np.asarray(layer["bias"])
    return state | {f"lin{k}.model.1.weight": np.asarray(w)[None, :, None, None] for k, w in enumerate(params["heads"])}


def test_distance_is_zero_for_equal_symmetric_and_positive(params: dict) -> None:
    x, y = _images(1), _images(2)
    distance = _distance(params, x, y)
    assert distance.shape == (2,) and distance.dtype == jnp.float32
    assert np.all(distance > 0)
    np.testing.assert_allclose(_distance(params, x, x), 0, atol=1e-12)
    np.testing.assert_allclose(distance, _distance(params, y, x), rtol=1e-6)


def test_images_of_a_batch_are_independent(params: dict) -> None:
    x, y = _images(1), _images(2)
    other = _distance(params, x.at[0].set(_images(5)[0]), y)
    np.testing.assert_allclose(_distance(params, x, y)[1], other[1], rtol=1e-6)
    assert abs(_distance(params, x, y)[0] - other[0]) > 1e-3 * other[0]


def test_equals_a_plain_numpy_computation(params: dict) -> None:
    def convolve(x: np.ndarray, layer: dict) -> np.ndarray:
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1))
        return np.maximum(np.einsum("hwiab,abio->hwo", windows, np.asarray(layer["kernel"], np.float64), optimize=True), 0)

    def features(image: np.ndarray) -> list[np.ndarray]:
        x = (image - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        outputs, layers = [], iter(params["convolutions"])
        for depth in (2, 2, 3, 3, 3):
            if outputs:
                x = x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, -1).max((1, 3))
            for _ in range(depth):
                x = convolve(x, next(layers))
            outputs.append(x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10))
        return outputs

    x, y = _images(3), _images(4)
    pairs = zip(features(np.asarray(x[0], np.float64)), features(np.asarray(y[0], np.float64)), strict=True)
    expected = sum(((a - b) ** 2 @ np.asarray(w)).mean() for (a, b), w in zip(pairs, params["heads"], strict=True))
    np.testing.assert_allclose(_distance(params, x, y)[0], expected, rtol=1e-5)


def test_gradient_is_the_directional_derivative_and_finite_without_features(params: dict) -> None:
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda w: w.astype(jnp.float64), params)
        x, y, direction = (_images(seed)[:1].astype(jnp.float64) for seed in (1, 2, 3))
        value_and_gradient = jax.jit(jax.value_and_grad(lambda x, params: lpips(params, x, y).sum()))
        gradient, step = value_and_gradient(x, wide)[1], 1e-6
        above, below = (value_and_gradient(x + sign * step * direction, wide)[0] for sign in (1, -1))
        np.testing.assert_allclose(jnp.vdot(gradient, direction), (above - below) / (2 * step), rtol=1e-6)
        dead = [layer | {"bias": layer["bias"] - 1e4} for layer in wide["convolutions"]]
        value, gradient = value_and_gradient(x, wide | {"convolutions": dead})
        assert value == 0 and np.all(gradient == 0)


@pytest.mark.parametrize("layout", ["torchvision and heads", "lpips package", "inside a checkpoint"])
def test_weights_are_read_from_every_layout(params: dict, layout: str) -> None:
    state = _state_dict(params)
    if layout != "torchvision and heads":
        blocks = {n: 1 + sum(n >= start for start in (4, 9, 16, 23)) for n in _TORCH_INDEX}
        prefix = "loss.perceptual_loss." if layout == "inside a checkpoint" else ""
        names = {f"features.{n}.{kind}": f"net.slice{b}.{n}.{kind}" for n, b in blocks.items() for kind in ("weight", "bias")}
        state = {prefix + names.get(key, key): value for key, value in state.items()}
        state |= {prefix + "lins.0.model.1.weight": np.zeros(1), "encoder.conv_in.weight": np.zeros(3)}
    state |= {"classifier.0.weight": np.zeros((2, 2))}
    jax.tree.map(np.testing.assert_array_equal, params_from_state_dict(state), params)


def test_missing_and_misshapen_weights_are_all_listed(params: dict) -> None:
    state = _state_dict(params)
    del state["features.5.bias"], state["lin4.model.1.weight"]
    state["features.0.weight"] = np.zeros((64, 1, 3, 3))
    with pytest.raises(ValueError) as caught:
        params_from_state_dict(state)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "features.0.weight has shape (64, 1, 3, 3) instead of (64, 3, 3, 3)",
        "features.5.bias is missing",
        "lin4",
    ):
        assert part in message
    assert message.count(";") == 2
