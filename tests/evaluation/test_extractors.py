"""Mean colours, and where the weights of networks come from."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from ldm_jax.config import UserError
from ldm_jax.evaluation import extractors
from ldm_jax.evaluation.extractors import absent, colors, inception_of, load_inception, sha256, weight_path
from ldm_jax.nn import inception


@pytest.mark.parametrize("size", [(64, 64), (8, 8), (16, 40), (5, 3), (13, 11), (1, 1)])
def test_colors_are_means_of_parts(size: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    extractor = colors()
    found = np.asarray(jax.jit(extractor.function)(extractor.params, images)["colors"])
    # each pixel as 8 x 8 of them: then the borders of parts lie between pixels
    fine = images.repeat(8, axis=1).repeat(8, axis=2).reshape(3, 8, size[0], 8, size[1], 3) / 255
    np.testing.assert_allclose(found, fine.mean((2, 4)).reshape(3, 192), rtol=1e-5)
    assert found.dtype == np.float32 and extractor.weights == ""


def test_colors_are_in_the_order_of_rows_columns_and_channels() -> None:
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[0, 2:4, 6:8, 2] = 255
    found = np.asarray(colors().function({}, image)["colors"]).reshape(8, 8, 3)
    assert found[1, 3, 2] == pytest.approx(1) and found.sum() == pytest.approx(1)


def small_inception(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A state dict whose only content is a head, which `params_from_state_dict` is made to take."""
    monkeypatch.setattr(inception, "params_from_state_dict", lambda state: {"fc": dict(state)})
    return {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_inception_is_loaded_of_any_file_that_is_asked_for(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, path = small_inception(monkeypatch), tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else np.savez(path, **state)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"is not the file that the FID is defined by: its SHA-256 is [0-9a-f]{8}\.\.\., .*--any-weights"):
        load_inception(path)
    extractor = load_inception(path, any_weights=True)
    assert extractor.weights == sha256(path) and len(extractor.weights) == 64
    np.testing.assert_array_equal(extractor.params["fc"]["fc.weight"], state["fc.weight"])
    monkeypatch.setattr(extractors, "INCEPTION_HASH", sha256(path)[:8])
    assert load_inception(path).weights == extractor.weights


def test_a_file_of_other_weights_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", conv=np.zeros(3))
    with pytest.raises(UserError, match=r"x\.npz: these are not the weights of the FID's Inception: .*missing"):
        load_inception(tmp_path / "x.npz", any_weights=True)
    with pytest.raises(UserError, match=r"cannot read the weights .*nothing\.pth: No such file"):
        load_inception(tmp_path / "nothing.pth")
    with pytest.raises(UserError, match=r"cannot read the weights .*: Is a directory"):
        load_inception(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_a_damaged_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"PK\x03\x04 this is half a file")
    with pytest.raises(UserError, match=rf"x\{suffix}"):
        load_inception(path, any_weights=True)


def test_the_hash_is_that_of_the_published_file() -> None:
    assert extractors.INCEPTION_HASH == "6726825d" and "6726825d" in extractors.WEIGHTS["inception"]


def test_inception_gives_its_three_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named as statistics are; pictures go in as they are, 0 to 255."""

    class Network:
        def apply(self, variables: Any, images: jax.Array) -> dict[str, Any]:
            assert images.dtype == np.float32
            return {"pool": images.max() + variables["params"]["p"], "spatial": "s", "logits": "l"}

    monkeypatch.setattr(inception, "Inception", Network)
    extractor = inception_of({"p": 1.0}, "hash")
    found = extractor.function(extractor.params, np.full((1, 2, 2, 3), 200, np.uint8))
    assert found == {"inception": 201.0, "inception_spatial": "s", "inception_logits": "l"} and extractor.weights == "hash"
    assert "TensorFlow 1" in extractor.rule and "299" in extractor.rule


def test_where_weights_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LDM_INCEPTION", "LDM_DINO"):
        monkeypatch.delenv(name, raising=False)
    flag, variable = tmp_path / "flag", tmp_path / "variable"
    flag.touch()
    variable.touch()
    assert weight_path("inception", None) is None and weight_path("inception", "") is None
    assert weight_path("inception", str(flag)) == flag
    monkeypatch.setenv("LDM_INCEPTION", str(variable))
    assert weight_path("inception", None) == variable and weight_path("inception", str(flag)) == flag
    assert weight_path("dino", None) is None
    with pytest.raises(
        UserError, match=r"the weights of inception are not at .*nowhere: there should be pt_inception-2015-12-05-6726825d\.pth"
    ):
        weight_path("inception", str(tmp_path / "nowhere"))
    assert "--dino or LDM_DINO" in absent("dino") and "dinov2_vitl14_pretrain.pth" in absent("dino")
