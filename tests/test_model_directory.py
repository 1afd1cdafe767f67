"""Model directories: written whole or not at all, read a tensor at a time, and found."""

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ldm_jax import convert
from ldm_jax.config import UserError
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.model_directory import WEIGHTS, find_finished, find_model, load_params, writing
from ldm_jax.stages import FirstStage
from tests import tiny

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_parameters_are_float32_of_whatever_is_stored(dtype: type, tmp_path: Path) -> None:
    stored = {"conv.kernel": RNG.normal(size=(3, 2)).astype(dtype), "conv.bias": RNG.normal(size=2).astype(dtype)}
    save_file(stored, tmp_path / WEIGHTS)
    params = load_params(tmp_path)
    assert {name: value.dtype for name, value in params["conv"].items()} == {"kernel": np.float32, "bias": np.float32}
    for name, value in params["conv"].items():
        np.testing.assert_array_equal(value, stored[f"conv.{name}"].astype(np.float32))


@pytest.mark.parametrize("content", [None, b"", b"no weights", b"\xff" * 100])
def test_a_damaged_part_is_bad_input(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(UserError, match="is not a complete part of a model"):
        load_params(tmp_path)


@pytest.mark.parametrize("failure", [ValueError("no"), KeyboardInterrupt()])
def test_a_writing_that_fails_leaves_what_was_there(failure: BaseException, tmp_path: Path) -> None:
    with writing(tmp_path / "model", {"step": 1}):
        pass
    with pytest.raises(type(failure)), writing(tmp_path / "model", {"step": 2}) as root:
        (root / "half").mkdir()
        raise failure
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert '"step": 1' in (tmp_path / "model" / "model.json").read_text()


@pytest.mark.slow
def test_a_run_with_its_first_stage_alone_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, params = tiny.first_stage(tiny.config())
    model = LatentDiffusion(FirstStage(stage.network), None, {"first_stage": params}, {"task": "autoencoder", "resolution": 16})
    model.save(tmp_path / "run" / "first_stage" / "model")
    assert find_model(tmp_path / "run") == tmp_path / "run" / "first_stage" / "model"
    assert find_finished(tmp_path / "run" / "first_stage") == tmp_path / "run" / "first_stage" / "model"
    with pytest.raises(UserError, match=r"run in .* is not finished"):
        find_finished(tmp_path / "run")
    for target in convert.FORMATS:
        monkeypatch.setattr(sys, "argv", ["convert", "--to", target, "--model", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
        with pytest.raises(UserError, match=r"run in .* is not finished"):
            convert.main()
        assert not (tmp_path / "out").exists()
