import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.config import UserError
from ldm_jax.evaluation.numpy_pickle import load_pickle
from ldm_jax.evaluation.stored import Gaussian, Stored, read_stored, write_stored
from tests.data.pictures import save

POOL, SPATIAL = 2048, 2023


def moments(d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A mean and the covariance of a few rows."""
    rows = np.random.default_rng(seed).normal(size=(4, d))
    return rows.mean(axis=0), np.cov(rows, rowvar=False)


MU, SIGMA = moments(POOL)
MU_S, SIGMA_S = moments(SPATIAL)


def stored(path: Path) -> Stored:
    read = read_stored(path)
    assert read is not None
    return read


def npz(path: Path, compressed: bool = False, **arrays: Any) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def check(gaussian: Gaussian, number: int, mean: np.ndarray, cov: np.ndarray) -> None:
    assert gaussian.number == number and gaussian.mean.dtype == gaussian.cov.dtype == np.float64
    np.testing.assert_array_equal(gaussian.mean, mean)
    np.testing.assert_array_equal(gaussian.cov, cov)


def test_a_reference_batch_of_adm(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    read = stored(npz(tmp_path / "x.npz", arr_0=images, sigma_s=SIGMA_S, mu_s=MU_S, sigma=SIGMA, mu=MU))
    assert sorted(read.gaussians) == ["inception", "inception_spatial"] and not read.features and not read.provenance
    check(read.gaussians["inception"], 0, MU, SIGMA)
    check(read.gaussians["inception_spatial"], 0, MU_S, SIGMA_S)
    assert read.pictures is not None and "ADM" in read.origin
    np.testing.assert_array_equal(read.pictures.read(1, 3), images[1:])


@pytest.mark.parametrize("names", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
@pytest.mark.parametrize("compressed", [False, True])
def test_mean_and_covariance_alone(tmp_path: Path, names: tuple[str, str], compressed: bool) -> None:
    read = stored(npz(tmp_path / "x.NPZ.npz", compressed, **dict(zip(names, (MU, SIGMA), strict=True))))
    assert list(read.gaussians) == ["inception"] and read.pictures is None and names[0] in read.origin
    check(read.gaussians["inception"], 0, MU, SIGMA)


def test_single_precision_is_widened(tmp_path: Path) -> None:
    mean, cov = MU.astype(np.float32), SIGMA.astype(np.float32)
    check(stored(npz(tmp_path / "x.npz", mu=mean, sigma=cov)).gaussians["inception"], 0, mean.astype(np.float64), cov.astype(np.float64))


def test_features_of_clean_fid(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, POOL)).astype(np.float32)
    read = stored(npz(tmp_path / "x.npz", feats=rows))
    assert list(read.features) == ["inception"] and not read.gaussians and "clean-fid" in read.origin
    np.testing.assert_array_equal(read.features["inception"], rows)


def numpy_1(data: bytes) -> bytes:
    """The pickle as NumPy 1 would have written it: it differs in the name of a package, of which the frame counts the letters."""
    data = data.replace(b"cnumpy._core.", b"cnumpy.core.")
    for name in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        data = data.replace(b"\x8c" + bytes([len(name)]) + name, b"\x8c" + bytes([len(name) - 1]) + name.replace(b"_core", b"core"))
    return data


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_statistics_of_edm2(tmp_path: Path, protocol: int) -> None:
    dino = moments(8)
    content = {"num_images": 50_000, "fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": dino[0], "sigma": dino[1]}}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
    read = stored(tmp_path / "x.pkl")
    assert sorted(read.gaussians) == ["dino", "inception"] and "EDM2" in read.origin
    check(read.gaussians["inception"], 50_000, MU, SIGMA)
    check(read.gaussians["dino"], 50_000, *dino)


def unframed(content: Any, protocol: int) -> bytes:
    """Pickled without frames, so that a test may change the length of names."""
    file = io.BytesIO()
    pickle._Pickler(file, protocol).dump(content)  # type: ignore[attr-defined]
    return re.sub(rb"^(\x80.)\x95.{8}", rb"\1", file.getvalue(), flags=re.DOTALL)


ARRAYS = {
    "float": np.arange(6.0).reshape(2, 3),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "big-endian": np.arange(3, dtype=">i4"),
    "scalar": np.float64(2.5),
    "whole": np.int64(7),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float16),
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("version", [1, 2])
def test_pickled_arrays_are_those_that_numpy_reads(protocol: int, version: int) -> None:
    data = unframed({"arrays": ARRAYS, "twice": [1, "a", None, 2.5], "same": ARRAYS["float"]}, protocol)
    data = numpy_1(data) if version == 1 else data
    assert (b"numpy._core" in data) == (version == 2)
    read = load_pickle(data)
    assert read["twice"] == [1, "a", None, 2.5] and sorted(read["arrays"]) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        assert read["arrays"][name].dtype == array.dtype
        np.testing.assert_array_equal(read["arrays"][name], array)
    np.testing.assert_array_equal(read["same"], ARRAYS["float"])


class Evil:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Plain:
    """An object of a class of its own."""


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "run"
    for function, name in ((os.system, f"{os.name}.system"), (eval, "eval"), (np.load, "numpy"), (os.mkdir, "mkdir")):
        argument = {os.system: f"touch {witness}", eval: f"open({str(witness)!r}, 'w')"}.get(function, str(witness))
        data = pickle.dumps({"fid": {"mu": Evil(function, argument), "sigma": SIGMA}}, protocol)
        (tmp_path / "x.pkl").write_bytes(data)
        with pytest.raises(
            UserError, match=rf"x.pkl cannot be read: it asks for .*{name}.*, which no array needs; nothing of it was run; known"
        ):
            read_stored(tmp_path / "x.pkl")
        assert not witness.exists()


@pytest.mark.parametrize(
    "content",
    [
        np.array([{}], object),
        np.array(["text"]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, [("a", "f8")]),
        Plain(),
        np.float64,
        np.random.default_rng(0),
        np.ma.zeros(3),
        Evil(np.ndarray, (2,)),
        Evil(np.zeros(3).__reduce__()[0], np.ndarray, (0,), b"b"),  # an array that is given no content
        Evil(np.float64(1).__reduce__()[0], np.dtype("f8"), b"1234"),
        Evil(np.float64(1).__reduce__()[0], np.dtype("f8"), "text"),
        Evil(np.dtype, "O"),
        Evil(np.dtype, ["f8"]),
    ],
    ids=[str(number) for number in range(14)],  # names that are the same in every process
)
def test_other_objects_in_a_pickle_are_refused(content: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        load_pickle(pickle.dumps({"x": content}))


def test_containers_that_hold_themselves_or_double_at_each_level_are_read() -> None:
    levels: list[Any] = [np.arange(2.0)]
    for _ in range(100):
        levels = [levels, levels]
    content: dict[str, Any] = {"levels": levels}
    content["self"] = content
    read = load_pickle(pickle.dumps(content, 4))
    assert read["self"] is read
    levels = read["levels"]
    for _ in range(100):
        assert levels[0] is levels[1]
        levels = levels[0]
    np.testing.assert_array_equal(levels[0], [0, 1])


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_pickles_are_refused_or_read_as_plain_values(data: st.DataObject) -> None:
    whole = bytearray(pickle.dumps({"num_images": 3, "fid": {"mu": np.arange(3.0)}}, data.draw(st.integers(2, 5))))
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    del whole[data.draw(st.integers(len(whole) // 2, len(whole))) :]
    try:
        value = load_pickle(bytes(whole))
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert isinstance(value, str | bytes | int | float | dict | list | np.ndarray | np.generic | None)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    pairs = {"inception": moments(5), "shapes.v2": moments(3, 1)}
    gaussians = {name: Gaussian(i, *pair) for i, (name, pair) in enumerate(pairs.items())}
    features = {"oracle": np.random.default_rng(0).normal(size=(4, 2)), "inception": np.ones((1, 5), np.float32)}
    provenance = {"seed": 3, "name": "Größe", "crop": [1, 2.5, None]}
    write_stored(tmp_path / "x.npz", gaussians, features, provenance)
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]
    read = stored(tmp_path / "x.npz")
    assert read.provenance == provenance and read.pictures is None and "this program" in read.origin
    assert sorted(read.gaussians) == sorted(pairs) and sorted(read.features) == sorted(features)
    for i, (name, pair) in enumerate(pairs.items()):
        check(read.gaussians[name], i, *pair)
    for name, rows in features.items():
        assert read.features[name].dtype == np.float32
        np.testing.assert_array_equal(read.features[name], rows.astype(np.float32))
    write_stored(str(tmp_path / "x.npz"), {}, {"b": np.ones((1, 2))}, {})  # takes the place of the other
    again = stored(tmp_path / "x.npz")
    assert list(again.features) == ["b"] and not again.gaussians and not again.provenance


def test_the_order_of_names_does_not_matter(tmp_path: Path) -> None:
    mean, cov = moments(3)
    write_stored(tmp_path / "x.npz", {"a": Gaussian(9, mean, cov)}, {"b": np.ones((2, 2))}, {"seed": 1})
    with np.load(tmp_path / "x.npz") as archive:
        names = list(archive)
        for seed in range(4):
            order = np.random.default_rng(seed).permutation(names)
            read = stored(npz(tmp_path / "y.npz", **{name: archive[name] for name in order}))
            check(read.gaussians["a"], 9, mean, cov)
            assert read.features["b"].shape == (2, 2) and read.provenance == {"seed": 1}


def test_a_failed_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stored(tmp_path / "x.npz", {}, {"old": np.ones((1, 2))}, {})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"cannot write .*x.npz: No space left on device"):
        write_stored(tmp_path / "x.npz", {}, {"new": np.ones((1, 2))}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"] and list(stored(tmp_path / "x.npz").features) == ["old"]
    with pytest.raises(UserError, match=r"cannot write .*No such file"):
        write_stored(tmp_path / "nowhere" / "x.npz", {}, {"new": np.ones((1, 2))}, {})


def test_nonsense_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"written as .npz, not as 'x.pkl'"):
        write_stored(tmp_path / "x.pkl", {}, {"a": np.ones((1, 2))}, {})
    for features in ({}, {"": np.ones((1, 2))}):
        with pytest.raises(ValueError, match="belong to extractors, one at least, each with a name"):
            write_stored(tmp_path / "x.npz", {}, features, {})
    for rows in (np.ones(3), np.ones((2, 2), int), np.ones((0, 2)), np.full((1, 1), np.nan)):
        with pytest.raises(ValueError, match="features"):
            write_stored(tmp_path / "x.npz", {}, {"a": rows}, {})
    assert not list(tmp_path.iterdir())


def test_what_is_no_statistics_is_left_to_others(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "a.png")
    (tmp_path / "folder.npz").mkdir()
    pictures = npz(tmp_path / "x.npz", arr_0=np.zeros((1, 2, 2, 3), np.uint8), arr_1=np.zeros(1, int), meta="{}")
    for path in (tmp_path, tmp_path / "a.png", tmp_path / "x.zip", tmp_path / "folder.npz", pictures, tmp_path / "nowhere"):
        assert read_stored(path) is None


KNOWN = r"known are \.npz with mu, sigma .*, and EDM2's \.pkl"
ASYMMETRIC = SIGMA + np.triu(np.full_like(SIGMA, 0.1), 1)
SMALL = np.eye(2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": MU, "y": MU}, rf"x.npz holds x, y; {KNOWN}"),
        ({}, rf"x.npz holds nothing; {KNOWN}"),
        ({"mu": MU}, rf"x.npz holds mu without sigma; {KNOWN}"),
        ({"sigma": SIGMA}, "x.npz holds sigma without mu; known"),
        ({"mu": MU, "sigma": SIGMA, "sigma_s": SIGMA_S}, "holds mu, sigma, sigma_s without mu_s; known"),
        ({"ref_mu": MU}, "holds ref_mu without ref_sigma"),
        ({"mu": MU, "sigma": SIGMA, "ref_mu": MU, "ref_sigma": SIGMA}, "two means and covariances of inception; take one away"),
        ({"mu": MU[:768], "sigma": SIGMA[:768, :768]}, "mu and sigma: features have d = 768, but those of this name have 2048"),
        ({"mu_s": MU, "sigma_s": SIGMA}, "mu_s and sigma_s: features have d = 2048, but those of this name have 2023"),
        ({"mu": MU, "sigma": SIGMA[:-1]}, r"the mean has the shape \[2048\] and the covariance \[2047, 2048\], not \[d\] and \[d,d\]"),
        ({"mu": MU[None], "sigma": SIGMA}, r"the mean has the shape \[1, 2048\]"),
        ({"mu": MU, "sigma": SIGMA.astype(int)}, "a mean and a covariance are arrays of floating-point numbers"),
        (
            {"mu": np.where(np.arange(POOL), MU, np.nan), "sigma": SIGMA},
            "mu and sigma: the mean or the covariance has numbers .* not finite",
        ),
        ({"mu": MU, "sigma": ASYMMETRIC}, "the covariance is not symmetric"),
        ({"mu": MU, "sigma": -SIGMA}, "a negative variance on its diagonal"),
        ({"mu": MU, "sigma": np.array([{}], object)}, "x.npz is damaged or not complete .*allow_pickle"),
        ({"feats": np.ones((3, 64), np.float32)}, r"feats: features are float32 \[3, 64\], not floating point \[n,2048\]"),
        ({"feats": np.ones(POOL)}, r"features are float64 \[2048\]"),
        ({"feats": np.full((2, POOL), np.inf)}, "feats: features have numbers that are not finite"),
        ({"a.mean": np.ones(2), "a.number": 3}, r"holds a.mean, a.number without a.cov"),
        ({"a.cov": SMALL, "a.mean": np.ones(2)}, r"without a.number"),
        ({"a.cov": SMALL, "a.mean": np.ones(2), "a.number": 2.5}, r"a.number is float64 \[\], not a whole number"),
        ({"a.cov": SMALL, "a.mean": np.ones(2), "a.number": [2]}, r"a.number is int64 \[1\], not a whole number"),
        ({"a.cov": SMALL, "a.mean": np.ones(2), "a.number": -1}, "x.npz: a: -1 pictures"),
        ({"a.cov": SMALL, "a.mean": np.ones(3), "a.number": 1}, r"x.npz: a: the mean has the shape \[3\]"),
        ({"a.features": np.ones(3)}, r"a.features: features are float64 \[3\]"),
        ({"a.features": np.ones((1, 1)), "meta": "x"}, "its array meta is to be one JSON object"),
        ({"mu": MU, "sigma": SIGMA, "arr_0": np.zeros((1, 2, 2, 3))}, "arr_0 is float64; write uint8 by rounding"),
    ],
)
def test_incomplete_and_malformed_npz_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_stored(npz(tmp_path / "x.npz", **arrays))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds a list; known"),
        ({"num_images": 3}, "holds num_images; known"),
        ({}, "holds nothing; known"),
        ({1: {"mu": MU, "sigma": SIGMA}}, "holds 1; known"),
        ({"fid": {"mu": MU}}, "x.pkl: fid holds mu without sigma; known"),
        ({"fid": {"mu": MU[:3], "sigma": SIGMA[:3, :3]}}, "fid: features have d = 3"),
        ({"fd_dinov2": {"mu": MU, "sigma": [1]}}, "fd_dinov2: a mean and a covariance are arrays of floating-point"),
        ({"fd_dinov2": {"mu": np.ones(2), "sigma": SMALL}, "num_images": "x"}, "num_images is not a whole number"),
        ({"fd_dinov2": {"mu": np.ones(2), "sigma": SMALL}, "num_images": -2}, "num_images is not a whole number"),
        ({"fd_dinov2": {"mu": np.ones(2), "sigma": SMALL[:1]}}, r"fd_dinov2: the mean has the shape \[2\]"),
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        read_stored(tmp_path / "x.pkl")
    assert "\n" not in str(error.value)


def test_files_that_are_cut_off_or_missing(tmp_path: Path) -> None:
    whole = {"x.npz": npz(tmp_path / "x.npz", mu=MU, sigma=SIGMA).read_bytes(), "x.pkl": pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}})}
    for name, reason in (("x.npz", "is damaged or not complete"), ("x.pkl", "cannot be read")):
        for length in (0, 10, len(whole[name]) // 2, len(whole[name]) - 1):
            (tmp_path / name).write_bytes(whole[name][:length])
            with pytest.raises(UserError, match=f"{name} {reason}"):
                read_stored(tmp_path / name)
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=f"no file .*{name}"):
            read_stored(tmp_path / name)


def test_a_gaussian_is_checked() -> None:
    mean, cov = moments(3)
    assert Gaussian(0, mean, cov).number == 0
    Gaussian(1, mean, cov * (1 + 1e-7 * np.triu(np.ones((3, 3)), 1)))  # what another order of sums leaves
    for arguments, message in (
        ((0, mean[:2], cov), r"shape \[2\]"),
        ((0, mean, cov[:, :2]), r"\[3, 2\]"),
        ((0, np.empty(0), np.empty((0, 0))), r"shape \[0\]"),
        ((0, mean.astype(np.float32), cov), "the mean is float32"),
        ((-1, mean, cov), "-1 pictures"),
        ((0, mean * np.inf, cov), "not finite"),
        ((0, mean, np.where(np.eye(3), cov, np.nan)), "not finite"),
        ((0, mean, cov + np.triu(np.ones((3, 3)), 1)), "not symmetric"),
        ((0, mean, -np.eye(3)), "negative variance"),
    ):
        with pytest.raises(ValueError, match=message):
            Gaussian(*arguments)
