"""LPIPS against the `lpips` package: the same weights, distances and gradients; and torch's own files against our reader."""

import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ldm_jax.interop.torch_file import load_state_dict
from ldm_jax.nn.lpips import lpips, params_from_state_dict

pytestmark = pytest.mark.peers


def _stand_in_for_torchvision() -> types.ModuleType:
    """`torchvision.models.vgg16` with its layers and no weights, for machines where no build of torchvision fits torch."""
    nn = torch.nn

    def vgg16(**_: Any) -> Any:
        layers, channels = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2, 2))
        network = nn.Module()
        network.features = nn.Sequential(*layers)
        return network

    package, models = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")
    models.vgg16 = vgg16  # type: ignore[attr-defined]
    package.models = models  # type: ignore[attr-defined]
    return package


@pytest.fixture(scope="module")
def peer() -> Any:
    """The package's network with random VGG16 weights and the heads that it ships."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError):  # torchvision raises RuntimeError where it was built for another torch
            package = _stand_in_for_torchvision()
            patch.setitem(sys.modules, "torchvision", package)
            patch.setitem(sys.modules, "torchvision.models", package.models)
        import lpips as package

        torch.manual_seed(0)
        return package.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()


def _images(seed: int, shape: tuple[int, ...] = (2, 64, 48, 3)) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def _to_torch(images: np.ndarray) -> Any:
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def test_distances_and_gradients_equal_the_package(peer: Any) -> None:
    params = params_from_state_dict({name: value.numpy() for name, value in peer.state_dict().items()})
    x, y = _images(1), _images(2)
    y[1] = np.clip(x[1] + 0.05 * y[1], -1, 1)
    x_torch = _to_torch(x).requires_grad_()
    expected = peer(x_torch, _to_torch(y)).flatten()
    expected.sum().backward()
    distance, gradient = jax.jit(jax.value_and_grad(lambda x, y: lpips(params, x, y).sum()))(x, y)
    np.testing.assert_allclose(jax.jit(lpips)(params, x, y), expected.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(distance, expected.sum().item(), rtol=1e-5)
    reference = x_torch.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(gradient, reference, rtol=0, atol=1e-4 * np.abs(reference).max())


def test_torch_saves_and_our_reader_reads_the_same(peer: Any, tmp_path: Path) -> None:
    state = peer.state_dict()
    torch.save(state, tmp_path / "lpips.pth")
    torch.save({"state_dict": {"half": torch.arange(6).reshape(2, 3).T.bfloat16()}, "epoch": 1}, tmp_path / "last.ckpt")
    torch.save({"p": torch.nn.Parameter(torch.ones(3)), "size": torch.Size((1, 2)), "set": {1}}, tmp_path / "p.pt")
    read = load_state_dict(tmp_path / "lpips.pth")
    assert read.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(read[name], value.numpy())
    half = load_state_dict(tmp_path / "last.ckpt")["half"]
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.astype(np.int64), [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(load_state_dict(tmp_path / "p.pt")["p"], np.ones(3))


def test_heads_shipped_by_the_package_are_named_as_we_read_them(peer: Any) -> None:
    path = Path(sys.modules["lpips"].__file__ or "").parent / "weights" / "v0.1" / "vgg.pth"
    heads = torch.load(path, map_location="cpu")
    state = {name: value.numpy() for name, value in peer.state_dict().items() if name.startswith("net.")}
    params = params_from_state_dict(state | {name: value.numpy() for name, value in heads.items()})
    for head, name in zip(params["heads"], sorted(heads), strict=True):
        np.testing.assert_array_equal(head, heads[name].numpy().ravel())
        assert np.all(np.asarray(head) >= 0)
