"""Pairs of originals and reconstructions, their scores, and what a first stage makes of pictures."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy.ndimage import correlate1d

from ldm_jax.config import UserError
from ldm_jax.evaluation import features, pairs
from ldm_jax.evaluation.features import Features, measure
from ldm_jax.evaluation.pairs import Pairs, codebook_metrics, pair_extractor, pair_metrics, psnr, reconstruct
from ldm_jax.evaluation.pictures import open_pictures
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.nn.lpips import lpips
from ldm_jax.stages import FirstStage, build_autoencoder, init_autoencoder
from tests import tiny
from tests.evaluation.toy_features import InMemory, images

pytestmark = pytest.mark.usefixtures("quick_compilation")


ssim, distance = jax.jit(pairs.ssim), jax.jit(lpips)


def pair(seed: int, shape: tuple[int, ...], noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Smooth pictures, and the same with noise."""
    rng = np.random.default_rng(seed)
    smooth = rng.uniform(0, 255, shape)
    for axis in (1, 2):
        smooth = correlate1d(smooth, np.ones(7) / 7, axis=axis)
    smooth = (smooth - smooth.min()) / np.ptp(smooth) * 255
    return smooth.astype(np.uint8), np.clip(smooth + noise * rng.normal(size=shape), 0, 255).astype(np.uint8)


def plain_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Of two pictures of one channel: eq. 13 of Wang et al. at each place where the window lies within, in float64."""
    places = np.arange(11) - 5
    window = np.exp(-(places[:, None] ** 2 + places**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = (image[i : i + 11, j : j + 11].astype(np.float64) for image in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            values.append((2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize(("size", "noise"), [((16, 20), 5.0), ((11, 11), 30.0), ((14, 30), 200.0)])
def test_ssim_is_the_plain_formula(size: tuple[int, int], noise: float) -> None:
    x, y = pair(0, (2, *size, 3), noise)
    expected = [np.mean([plain_ssim(x[i, ..., c], y[i, ..., c]) for c in range(3)]) for i in range(2)]
    np.testing.assert_allclose(ssim(x, y), expected, atol=2e-5)
    np.testing.assert_allclose(ssim(y, x), ssim(x, y), rtol=1e-6)
    np.testing.assert_allclose(ssim(x, x), 1, rtol=1e-6)


def test_ssim_of_flat_pictures_and_negatives() -> None:
    x, y = (np.full((1, 12, 12, 3), value, np.uint8) for value in (51, 204))
    assert float(ssim(x, y)[0]) == pytest.approx((2 * 0.2 * 0.8 + 1e-4) / (0.04 + 0.64 + 1e-4), rel=1e-4)
    checks = np.broadcast_to(((np.indices((14, 14)).sum(0) % 2) * 255).astype(np.uint8)[None, ..., None], (1, 14, 14, 3))
    assert -1 <= float(ssim(checks, 255 - checks)[0]) < -0.9


def test_psnr_where_it_is_known() -> None:
    x = np.full((4, 6, 6, 3), 100, np.uint8)
    y = x.copy()
    y[1] += 1
    y[2] = 0
    y[3, :3] += 4
    expected = [10 * np.log10(255**2 * 108), 20 * np.log10(255), 20 * np.log10(2.55), 10 * np.log10(255**2 / 8)]
    np.testing.assert_allclose(psnr(x, y), expected, rtol=1e-6)
    np.testing.assert_allclose(psnr(255 - x, x[::-1] * 0), 10 * np.log10(255**2 / 155**2), rtol=1e-6)  # uint8 does not wrap round


@pytest.fixture(scope="module")
def perceptual() -> Any:
    """Random parameters of LPIPS with few channels."""
    rng = np.random.default_rng(0)
    widths = (4, 4, 6, 6, 8, 8, 8, 8, 8, 8, 8, 8, 8)
    layers = [
        {"kernel": rng.normal(size=(3, 3, i, o)).astype(np.float32) / np.sqrt(9 * i), "bias": 0.1 * rng.normal(size=o).astype(np.float32)}
        for i, o in zip((3, *widths[:-1]), widths, strict=True)
    ]
    return {"convolutions": layers, "heads": [rng.uniform(0, 1, d).astype(np.float32) for d in (4, 6, 8, 8, 8)]}


def test_pairs_have_their_scores(perceptual: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "PART", 8)
    x, y = pair(1, (11, 16, 18, 3), 12.0)
    found = measure(Pairs(InMemory(x), InMemory(y)), [pair_extractor(perceptual, "w")], tmp_path, 4, "x")
    metrics = {metric.name: metric for metric in pair_metrics(found)}
    floats = [2 * images.astype(np.float32) / 255 - 1 for images in (x, y)]
    expected = {
        "PSNR": np.asarray(psnr(x, y)),
        "SSIM": np.asarray(ssim(x, y)),
        "bias (levels)": (y.astype(float) - x).mean((1, 2, 3)),
        "LPIPS": np.asarray(distance(perceptual, *floats)),
        "PSIM": np.asarray(distance({**perceptual, "heads": [np.ones_like(head) for head in perceptual["heads"]]}, *floats)),
    }
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        metric = metrics[name]
        assert metric.value == pytest.approx(values.mean(), rel=1e-4), name
        assert metric.error == pytest.approx(values.std(ddof=1) / np.sqrt(11), rel=1e-3), name
        assert (metric.n, metric.n_reference, metric.features) == (11, 11, "pairs")
    assert {m.better for m in (metrics["PSNR"], metrics["SSIM"])} == {"higher"}
    assert {m.better for m in (metrics["LPIPS"], metrics["PSIM"])} == {"lower"} and metrics["bias (levels)"].better is None
    assert 0 < metrics["LPIPS"].value < metrics["PSIM"].value


def test_pairs_without_weights_and_a_single_pair(tmp_path: Path) -> None:
    x, y = pair(1, (1, 12, 12, 3), 12.0)
    found = pair_metrics(measure(Pairs(InMemory(x), InMemory(y)), [pair_extractor(None, "")], tmp_path, 4, "x"))
    assert {metric.name for metric in found} == {"PSNR", "SSIM", "bias (levels)"} and all(metric.error is None for metric in found)


def test_what_is_no_pair_is_refused() -> None:
    x = InMemory(images(0, 5), "a")
    both = Pairs(x, InMemory(images(1, 5), "b"))
    assert both.read(1, 3).shape == (2, 10, 10, 6) and len(both) == 5 and "pairs of 5 pictures" in both.describe()
    np.testing.assert_array_equal(both.read(1, 3)[..., :3], x.read(1, 3))
    assert both.fingerprint() not in (x.fingerprint(), Pairs(x, x).fingerprint())
    for other in (images(0, 6), images(0, 5, side=12)):
        with pytest.raises(ValueError, match=r"5 originals of \(10, 10\) and .* are no pairs"):
            Pairs(x, InMemory(other))


def first_stage(kind: str) -> LatentDiffusion:
    cfg = tiny.config()
    if kind == "vq":
        tiny.quantised(cfg)
    network = build_autoencoder(cfg.first_stage.to_dict(), np.float32)
    shapes = jax.eval_shape(lambda key: init_autoencoder(network, key, 16), jax.random.key(0))
    params = {"first_stage": tiny.random_like(shapes)}
    return LatentDiffusion(FirstStage(network, (0.1,), (0.7,)), None, params, {"resolution": 16})


@pytest.fixture(scope="module", params=["kl", "vq"])
def model(request: pytest.FixtureRequest) -> LatentDiffusion:
    return first_stage(request.param)


def test_reconstructions_are_the_models_and_survive_kills(model: LatentDiffusion, tmp_path: Path) -> None:
    given = images(3, 21, side=16)
    originals = InMemory(given)
    reconstruct(model, originals, tmp_path / "whole", 8, "weights")
    made = open_pictures(tmp_path / "whole")
    expected = np.rint(127.5 * model.decode(model.encode(given)).clip(-1, 1) + 127.5)
    assert np.abs(made.read(0, 21).astype(int) - expected).max() <= 1 and expected.std() > 5
    assert originals.reads.tolist() == [1] * 21

    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("about.json", "00000000-00000008.npz"):
        (killed / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (killed / ".00000008-00000016.tmp.npz").write_bytes(b"half")
    reconstruct(model, originals, killed, 8, "weights")
    assert originals.reads.tolist() == [1] * 8 + [2] * 13
    np.testing.assert_array_equal(open_pictures(killed).read(0, 21), made.read(0, 21))

    for pictures, about, what in ((InMemory(given, "others"), "weights", "pictures"), (originals, "other weights", "model")):
        with pytest.raises(UserError, match=rf"another job \({what} differ\)"):
            reconstruct(model, pictures, killed, 8, about)


def test_how_much_of_a_codebook_is_in_use(model: LatentDiffusion, tmp_path: Path) -> None:
    given = images(3, 21, side=16)
    reconstruct(model, InMemory(given), tmp_path, 8, "weights")
    found = {metric.name: metric for metric in codebook_metrics(tmp_path, 21, 8)}
    network: Any = model.first_stage.network
    if not hasattr(network, "codebook_size"):
        assert found == {}
        return
    params = {"params": jax.device_get(model.params["first_stage"])}
    raw = network.apply(params, given.astype(np.float32) / 127.5 - 1, method="moments")
    entries = params["params"]["quantize"]["embedding"]
    vectors = np.asarray(raw).reshape(-1, raw.shape[-1])
    nearest = ((vectors[:, None] - entries) ** 2).sum(-1).argmin(1)  # of all 21, and none of what a batch was filled up with
    shares = np.bincount(nearest, minlength=32) / len(nearest)
    assert found["codebook usage"].value == (shares > 0).mean()
    assert found["codebook perplexity"].value == pytest.approx(np.exp(-sum(p * np.log(p) for p in shares if p > 0)), rel=1e-9)
    assert found["codebook usage"].features == "32 entries" and found["codebook usage"].n == 21
    assert 1 < found["codebook perplexity"].value <= 32 * found["codebook usage"].value


def test_usage_of_known_codes(tmp_path: Path) -> None:
    for start, codes in ((0, [2, 0, 1, 0]), (2, [0, 0, 1, 0])):
        np.savez(tmp_path / f"{start:08d}-{start + 2:08d}.npz", arr_0=np.zeros(1), codes=np.array(codes))
    usage, perplexity = codebook_metrics(tmp_path, 4, 2)
    assert (usage.value, perplexity.value) == (0.5, pytest.approx(2))


def test_pair_metrics_take_every_row_once(tmp_path: Path) -> None:
    values = np.arange(5, dtype=np.float32)
    np.savez(tmp_path / "00000000-00000005.npz", key=np.zeros(5, np.uint64), PSNR=values[:, None])
    (metric,) = pair_metrics(Features(tmp_path, 5))
    assert metric.value == 2 and metric.error == pytest.approx(np.sqrt(2.5 / 5))
    assert pairs._BETTER.keys() >= {metric.name}
