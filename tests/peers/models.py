"""What the comparisons with torch share: random networks of theirs, their state, and how near to them ours must be."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from diffusers.utils import logging
from safetensors.numpy import save_file

from ldm_jax.interop import keymap
from ldm_jax.model_directory import flatten, unflatten

logging.set_verbosity_error()
_NORMS = (torch.nn.GroupNorm, torch.nn.LayerNorm)


def randomised(module: Any, seed: int = 0) -> Any:
    """The torch module with every parameter random: matrices keep the size of what they map, scales of norms lie about 1."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, value in part.named_parameters(recurse=False):
                spread = 0.3 if value.ndim < 2 else 1.0 if isinstance(part, torch.nn.Embedding) else value[0].numel() ** -0.5
                value.normal_(0, spread)
                if isinstance(part, _NORMS) and name == "weight":
                    value.add_(1)
    return module.eval()


def state_of(module: Any) -> dict[str, np.ndarray]:
    """The module's tensors, not copied."""
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def to_torch(images: np.ndarray) -> Any:
    """[B,H,W,C] to [B,C,H,W]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))


def to_numpy(images: Any) -> np.ndarray:
    """[B,C,H,W] to [B,H,W,C]."""
    return np.moveaxis(images.detach().numpy(), 1, -1)


def imported(keys: keymap.KeyMap, shapes: Any, state: Mapping[str, np.ndarray], ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    """Our parameters of their state, which must fit."""
    keymap.check(keys, shapes, {name: value.shape for name, value in state.items()}, "peer", ignored)
    return unflatten(dict(keymap.read(keys, state.__getitem__)))


def exported(folder: Path, config: Mapping[str, Any], keys: keymap.KeyMap, params: Any) -> Path:
    """Our parameters as a folder that diffusers loads."""
    leaves = flatten(params)
    tensors = {name: np.ascontiguousarray(value) for name, value in keymap.write(keys, leaves.__getitem__)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_near(found: Any, expected: np.ndarray, exact: np.ndarray, what: str = "output") -> None:
    """Equal to 2e-5 of the largest value, or to twice the error of torch's own float32 where that is larger."""
    tolerance = max(2e-5 * np.abs(expected).max(), 2 * np.abs(expected - exact).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=what)


def compare(apply: Callable[[Any, jax.Array], jax.Array], params: Any, peer: Any, theirs: Callable[[Any], Any], x: np.ndarray) -> None:
    """Outputs for x [B,H,W,C], and the gradients with respect to it of a random projection of them.

    Args:
      apply: ours, a pure function of parameters and input.
      theirs: the peer's [B,C,H,W] to [B,C',H',W'], in the type of its input.
    """

    def peers(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        peer.to(dtype)
        inputs = to_torch(x).to(dtype).requires_grad_()
        y = theirs(inputs)
        (y * to_torch(projection(y.permute(0, 2, 3, 1).shape))).sum().backward()
        peer.to(torch.float32)
        return to_numpy(y), to_numpy(inputs.grad)

    def projected(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = apply(params, x)
        return (y * projection(y.shape)).sum(), y

    (_, found), gradient = jax.jit(jax.value_and_grad(projected, argnums=1, has_aux=True))(params, x)
    (expected, expected_gradient), (exact, _) = peers(torch.float32), peers(torch.float64)
    assert_near(found, expected, exact)
    assert_gradient(gradient, expected_gradient)


def projection(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def assert_gradient(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg="gradient")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def assert_same_network(ours: Any, theirs: Any, but: tuple[str, ...] = ()) -> None:
    """Two networks of diffusers have the same class, settings (`but` some) and tensors."""
    assert type(ours) is type(theirs)
    settings = [
        {name: list(value) if isinstance(value, tuple) else value for name, value in network.config.items() if name not in but}
        for network in (ours, theirs)
    ]
    for name in ("_use_default_values", "_name_or_path", "_diffusers_version"):  # where it comes from, and not what it is
        for config in settings:
            config.pop(name, None)
    assert settings[0] == settings[1]
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
