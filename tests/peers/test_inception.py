"""The FID's Inception against torch-fidelity's, with one random state dict; and the metrics against its formulas."""

from typing import Any

import jax
import numpy as np
import pytest
import torch

from benchmarks.fidelity import import_torch_fidelity
from ldm_jax.evaluation import metrics
from ldm_jax.interop.torch_file import load_state_dict
from ldm_jax.nn.inception import Inception, params_from_state_dict, resize

pytestmark = pytest.mark.peers
fidelity = import_torch_fidelity()
SIZES = (32, 64, 256, 299, 512)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """torch-fidelity's network with random weights, in which no statistic of a norm is trivial, and our function of pictures of 299 px."""
    generator = torch.Generator().manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "random.pth"
    make = fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    blank: dict[str, torch.Tensor] = {}

    def remember(self: Any, state: Any, *args: Any, **kwargs: Any) -> None:
        blank.update(torch.nn.Module.state_dict(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make, "load_state_dict", remember)
        torch.save({}, file)
        make("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(file))
    state = {name: _random(name, value, generator) for name, value in blank.items()}
    torch.save(state, file)
    theirs = make("inception-v3-compat", ["768", "2048", "logits_unbiased"], feature_extractor_weights_path=str(file)).eval()
    params = params_from_state_dict(load_state_dict(file))
    return theirs, jax.jit(lambda images: Inception().apply({"params": params}, images))


def _random(name: str, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("num_batches_tracked"):
        return value
    noise = torch.randn(value.shape, generator=generator)
    if name.endswith(("conv.weight", "fc.weight")):
        return noise * (2 / value[0].numel()) ** 0.5
    if name.endswith("running_var"):
        return 0.5 + 0.5 * torch.rand(value.shape, generator=generator)
    return 1 + 0.1 * noise if name.endswith("bn.weight") else 0.1 * noise


def pictures(size: int, number: int = 3) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (number, size, size, 3), np.uint8)


def closeness(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("size", SIZES)
def test_features_are_torch_fidelitys(networks: tuple[Any, Any], size: int) -> None:
    theirs, ours = networks
    images, kept = pictures(size), {}
    hook = theirs.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: kept.update(spatial=out))
    with torch.no_grad():
        _, pool, logits = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    hook.remove()
    found = ours(resize(images.astype(np.float32)))
    # TensorFlow's order: rows, columns, and then the first seven channels.
    spatial = kept["spatial"][:, :7].permute(0, 2, 3, 1).flatten(1)
    for name, expected in {"pool": pool, "logits": logits, "spatial": spatial}.items():
        assert found[name].dtype == np.float32 and closeness(found[name], expected) < 1e-4, name
        np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("size", SIZES)
def test_resize_is_tensorflows(size: int) -> None:
    images = pictures(size).astype(np.float64)
    function = fidelity.interpolate_compat_tensorflow.interpolate_bilinear_2d_like_tensorflow1x
    expected = function(torch.from_numpy(images).permute(0, 3, 1, 2), size=(299, 299), align_corners=False).permute(0, 2, 3, 1)
    np.testing.assert_allclose(resize(images.astype(np.float32)), expected, rtol=1e-5, atol=1e-5 * 255)


def clouds(n: int, m: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    scale = rng.uniform(0.1, 2, d)
    return rng.normal(size=(n, d)) * scale, rng.normal(0.3, 1.2, size=(m, d)) * scale


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 64), (40, 60, 128)])
def test_metrics_are_torch_fidelitys(n: int, m: int, d: int) -> None:
    samples, reference = clouds(n, m, d)
    ours, theirs = torch.from_numpy(samples), torch.from_numpy(reference)
    close = {"rel": 1e-6, "abs": 1e-9}

    expected = fidelity.metric_kid.kid_features_to_metric(ours, theirs, kid_subset_size=30, kid_subsets=10, verbose=False)
    mean, std = metrics.kernel_distance(samples, reference, subsets=10, size=30)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], **close)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], **close)

    expected = fidelity.metric_prc.prc_features_to_metric(ours, theirs, verbose=False)
    precision, recall = metrics.precision_recall(reference, samples)
    assert (precision, recall) == pytest.approx((expected["precision"], expected["recall"]), **close)

    gaussians = [{"mu": a.mean(0), "sigma": np.cov(a, rowvar=False)} for a in (samples, reference)]
    expected = fidelity.metric_fid.fid_statistics_to_metric(*gaussians, False)["frechet_inception_distance"]
    found = metrics.frechet_distance(*(g[key] for g in gaussians for key in ("mu", "sigma")))
    assert found == pytest.approx(expected, rel=1e-6)

    logits = torch.from_numpy(3 * samples)
    expected = fidelity.metric_isc.isc_features_to_metric(logits, splits=4, shuffle=False)
    mean, std = metrics.inception_score(torch.softmax(logits, 1).numpy(), split=n // 4)
    assert (mean, std) == pytest.approx((expected["inception_score_mean"], expected["inception_score_std"]), **close)
