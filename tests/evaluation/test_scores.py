"""From features to metrics: which are given, which refused, and that neither batches, devices nor the order of files matter."""

from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_jax.evaluation import features as features_module
from ldm_jax.evaluation import metrics, scores
from ldm_jax.evaluation.extractors import colors
from ldm_jax.evaluation.features import Features, measure
from ldm_jax.evaluation.pictures import Pictures, open_pictures
from ldm_jax.evaluation.scores import Side, score
from ldm_jax.evaluation.statistics import gaussian_of
from tests.evaluation.toy_features import InMemory, images, tiny_inception

pytestmark = pytest.mark.usefixtures("quick_compilation")

FRECHET = {"FID", "sFID", "FD-colors"}
OF_ROWS = {f"{name}{suffix}" for name in ("KID", "precision", "recall", "density", "coverage", "MIND") for suffix in ("", "-colors")}
SAMPLES, REFERENCE = images(1, 90, brightness=220), images(2, 110)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, subsets and bounds that 100 pictures reach."""
    monkeypatch.setattr(features_module, "PART", 32)
    monkeypatch.setattr(scores, "_SUBSET", 30)
    monkeypatch.setattr(scores, "_REFERENCE_ROWS", 60)
    monkeypatch.setattr(scores, "_SAMPLE_ROWS", 80)
    monkeypatch.setattr(scores, "_SPLIT", 45)


def measured(pictures: Pictures, directory: Path, batch_size: int = 16) -> Features:
    return measure(pictures, [tiny_inception(), colors()], directory, batch_size, "x")


def values(samples: Features, reference: Features | Side, allow_small: bool = True) -> dict[str, float]:
    side = reference if isinstance(reference, Side) else Side(reference)
    found, missing = score(samples, side, allow_small)
    assert not missing, missing
    return {metric.name: metric.value for metric in found} | {f"error of {m.name}": m.error for m in found if m.error is not None}


@cache
def undisturbed(root: Path) -> dict[str, float]:
    return values(measured(InMemory(SAMPLES), root / "samples"), measured(InMemory(REFERENCE), root / "reference"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


def assert_same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # An error is a difference of values of which each has that relative error.
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-7 if name.startswith("error") else 1e-12), name


def test_all_metrics_are_there(root: Path) -> None:
    found = undisturbed(root)
    assert {name for name in found if not name.startswith("error")} == {"IS", *FRECHET, *OF_ROWS}
    assert {name for name in found if name.startswith("error")} == {"error of IS", "error of KID", "error of KID-colors"}
    assert all(np.isfinite(value) for value in found.values()) and min(found.values()) >= 0
    assert found["FID"] > 1e-3 and found["IS"] > 1.01 and 0 < found["precision"] < 1 and 0 < found["recall"] < 1


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_the_size_of_batches_does_not_matter(root: Path, tmp_path: Path, batch_size: int) -> None:
    samples = measured(InMemory(SAMPLES), tmp_path / "a", batch_size)
    assert_same(values(samples, measured(InMemory(REFERENCE), tmp_path / "b", batch_size)), undisturbed(root))


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_number_of_devices_does_not_matter(root: Path, tmp_path: Path, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = undisturbed(root)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:devices])
    samples = measured(InMemory(SAMPLES), tmp_path / "a")
    assert_same(values(samples, measured(InMemory(REFERENCE), tmp_path / "b")), expected)


def test_the_order_of_files_does_not_matter(root: Path, tmp_path: Path) -> None:
    rng, sets = np.random.default_rng(0), {}
    for name, given in {"a": SAMPLES, "b": REFERENCE}.items():
        (tmp_path / name).mkdir()
        for number, place in enumerate(rng.permutation(len(given))):
            Image.fromarray(given[place]).save(tmp_path / name / f"{number:04d}.png")
        pictures = open_pictures(tmp_path / name)
        assert not np.array_equal(pictures.read(0, 9), given[:9])
        sets[name] = measured(pictures, tmp_path / f"{name} features")
    assert_same(values(sets["a"], sets["b"]), undisturbed(root))


def test_metrics_are_those_of_the_features(root: Path) -> None:
    """Each against its formula, of all rows or of those that the bounds leave."""
    found = undisturbed(root)
    ours, theirs = (Features(root / name, number) for name, number in (("samples", 90), ("reference", 110)))
    rows = [np.concatenate(list(one.blocks("inception"))) for one in (ours, theirs)]
    spatial = [np.concatenate(list(one.blocks("inception_spatial"))) for one in (ours, theirs)]
    for name, (a, b) in {"FID": rows, "sFID": spatial}.items():
        gaussians = [x for one in (a, b) for x in (one.mean(0, np.float64), np.cov(one, rowvar=False))]
        assert found[name] == pytest.approx(metrics.frechet_distance(*gaussians), rel=1e-9)
    a, b = ours.rows("inception", 80), theirs.rows("inception", 80)
    assert (found["precision"], found["recall"]) == metrics.precision_recall(b[:60], a)
    assert (found["density"], found["coverage"]) == metrics.density_coverage(b[:60], a)
    assert (found["KID"], found["error of KID"]) == metrics.kernel_distance(a, b, size=30)
    assert found["MIND"] == metrics.monge_distance(a, b)
    logits = ours.rows("inception_logits").astype(np.float64)
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found["IS"] == pytest.approx(metrics.inception_score(odds, 45)[0], rel=1e-12)


def test_a_set_and_itself(root: Path) -> None:
    samples = measured(InMemory(SAMPLES), root / "samples")
    found = values(samples, samples)
    assert all(abs(found[name]) < 1e-8 for name in ("FID", "sFID", "FD-colors", "MIND", "MIND-colors"))
    assert found["recall"] == found["coverage"] == 1  # of the 60 that neighbours are searched among, each is a sample


def test_features_by_other_weights_are_not_compared(root: Path) -> None:
    undisturbed(root)
    ours, theirs = (Features(root / name, number) for name, number in (("samples", 90), ("reference", 110)))
    found, missing = score(ours, Side(theirs, foreign=frozenset({"inception"})))
    assert {metric.features for metric in found} == {"inception_logits", "colors"}
    assert any("other weights of inception" in entry.why for entry in missing)


def test_without_a_reference(root: Path) -> None:
    found, missing = score(measured(InMemory(SAMPLES), root / "samples"), None)
    assert [metric.name for metric in found] == ["IS"] and found[0].n == 90 and found[0].n_reference is None
    assert [m.name for m in missing] == ["FID, KID, ...", "FD-colors, KID-colors, ..."]
    assert all("give --reference or --config" in m.why for m in missing)


@pytest.mark.parametrize(("number", "given"), [(5, set()), (6, {"sFID"}), (7, {"FID", "sFID"}), (192, {"FID", "sFID"}), (193, FRECHET)])
def test_frechet_distances_of_too_few_are_refused(tmp_path: Path, number: int, given: set[str]) -> None:
    """Features are 6, 5 and 192."""
    few, many = (measured(InMemory(images(n, n)), tmp_path / str(n)) for n in (number, 200))
    for samples, reference, what in ((few, many, "samples"), (many, few, "pictures of the reference")):
        found, missing = score(samples, Side(reference))
        assert {metric.name for metric in found} & FRECHET == given
        refused = {m.name: m.why for m in missing if m.name in FRECHET}
        assert refused.keys() == FRECHET - given
        assert all(why.startswith(f"{number} {what} have no covariance of") and "--allow-small" in why for why in refused.values())
        allowed, _ = score(samples, Side(reference), allow_small=True)
        assert {metric.name for metric in allowed} >= FRECHET


def test_what_is_left_of_very_few(tmp_path: Path) -> None:
    many = measured(InMemory(images(0, 20)), tmp_path / "many")
    one, three = (measured(InMemory(images(n, n)), tmp_path / str(n)) for n in (1, 3))
    found, missing = score(one, Side(many), allow_small=True)
    assert {metric.name for metric in found} == {"IS", "MIND", "MIND-colors"}
    assert {m.name: m.why for m in missing}["FID"] == "the samples have no statistics of inception"
    found, missing = score(three, Side(many), allow_small=True)
    assert {metric.name for metric in found} == {"IS", *FRECHET, "KID", "KID-colors", "MIND", "MIND-colors"}
    assert {m.name for m in missing} == {f"precision{s}, recall{s}, density{s}, coverage{s}" for s in ("", "-colors")}
    assert all("too few neighbours" in m.why for m in missing)


def test_stored_statistics_are_taken_before_pictures(root: Path) -> None:
    samples, reference = measured(InMemory(SAMPLES), root / "samples"), measured(InMemory(REFERENCE), root / "reference")
    rng = np.random.default_rng(0)
    stored = {name: gaussian_of([rng.normal(size=(50, d))]) for name, d in (("inception", 6), ("inception_spatial", 5))}
    both = values(samples, Side(reference, stored))
    for title, name in (("FID", "inception"), ("sFID", "inception_spatial")):
        ours, theirs = Side(samples).gaussian(name), stored[name]
        assert ours is not None
        assert both[title] == metrics.frechet_distance(ours.mean, ours.cov, theirs.mean, theirs.cov)
    assert both["KID"] == undisturbed(root)["KID"] and both["FD-colors"] == undisturbed(root)["FD-colors"]

    found, missing = score(samples, Side(None, stored))
    assert {metric.name for metric in found} == {"IS", "FID", "sFID"}
    assert {m.name: m.why for m in missing}["MIND"] == "the reference has statistics alone, and no pictures"
    assert {m.name: m.why for m in missing}["FD-colors"] == "the reference has no statistics of colors"

    rows = {name: reference.rows(name) for name in ("inception", "inception_spatial", "colors")}
    assert_same(values(samples, Side(None, {}, rows)), undisturbed(root))


def test_statistics_of_an_unknown_number_and_of_other_features(root: Path) -> None:
    samples = measured(InMemory(SAMPLES), root / "samples")
    known = gaussian_of([np.random.default_rng(0).normal(size=(50, 6))])
    unknown = type(known)(0, known.mean, known.cov)
    (fid,) = [metric for metric in score(samples, Side(None, {"inception": unknown}))[0] if metric.name == "FID"]
    assert fid.n == 90 and fid.n_reference is None
    wider = {"inception": np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)}
    found, missing = score(samples, Side(None, {}, wider))
    assert [metric.name for metric in found] == ["IS"]
    why = {m.name: m.why for m in missing}
    assert all(why[name] == "the reference has 7 features of inception, the samples 6" for name in ("FID", "KID", "MIND"))
