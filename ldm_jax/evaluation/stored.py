"""Statistics of pictures that others, or an earlier job, have stored: means and covariances of features, features, pictures.

What is read, and under which names of extractors it comes:
  ADM's reference batches, .npz: mu, sigma as "inception", mu_s, sigma_s as "inception_spatial", arr_0 as pictures
  pytorch-fid, clean-fid, jax-fid, MAR and EDM, .npz: mu, sigma as "inception"; iMF, .npz: ref_mu, ref_sigma as "inception"
  clean-fid for KID, .npz: feats as features of "inception"
  EDM2, .pkl: num_images, fid {mu, sigma} as "inception", fd_dinov2 {mu, sigma} as "dino"
  our own, .npz: NAME.number, NAME.mean, NAME.cov and NAME.features as NAME, meta as provenance
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm_jax import paths
from ldm_jax.config import UserError
from ldm_jax.evaluation.adm_npz import array_names, read_arrays, read_meta
from ldm_jax.evaluation.numpy_pickle import load_pickle
from ldm_jax.evaluation.pictures import Pictures, open_pictures
from ldm_jax.interop.torch_file import one_line

_KNOWN = (
    "known are .npz with mu, sigma (and mu_s, sigma_s), ref_mu, ref_sigma, feats, or what this program writes, "
    "and EDM2's .pkl with num_images and {mu, sigma} by metric"
)
_WIDTHS = {"inception": 2048, "inception_spatial": 2023}
_PAIRS = {("mu", "sigma"): "inception", ("mu_s", "sigma_s"): "inception_spatial", ("ref_mu", "ref_sigma"): "inception"}
_EDM2_NAMES = {"fid": "inception", "fd_dinov2": "dino"}
_ASYMMETRY = 1e-5  # in shares of the largest entry: what sums of products in another order leave, in float32 too


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance (divided by n - 1) of the features of pictures.

    Attributes:
        number: of pictures; 0 where it is not known.
        mean: float64 [d].
        cov: float64 [d,d], symmetric.

    Raises:
        ValueError: other shapes or dtypes, a number that is not finite, a matrix that is not symmetric, or a negative variance.
    """

    number: int
    mean: np.ndarray
    cov: np.ndarray

    def __post_init__(self) -> None:
        d = self.mean.size
        if not d or self.mean.shape != (d,) or self.cov.shape != (d, d):
            raise ValueError(f"the mean has the shape {list(self.mean.shape)} and the covariance {list(self.cov.shape)}, not [d] and [d,d]")
        if self.mean.dtype != np.float64 or self.cov.dtype != np.float64:
            raise ValueError(f"the mean is {self.mean.dtype} and the covariance {self.cov.dtype}, not float64")
        if self.number < 0:
            raise ValueError(f"{self.number} pictures")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.cov).all()):
            raise ValueError("the mean or the covariance has numbers that are not finite")
        if np.abs(self.cov - self.cov.T).max() > _ASYMMETRY * np.abs(self.cov).max():
            raise ValueError("the covariance is not symmetric")
        if np.diagonal(self.cov).min() < 0:
            raise ValueError("the covariance has a negative variance on its diagonal")


@dataclass(frozen=True, eq=False)
class Stored:
    """What a file of statistics holds.

    Attributes:
        gaussians: by the extractor's name: "inception" (pool3, d = 2048), "inception_spatial" (sFID's, d = 2023), "dino", or any other.
        features: floating point [n,d] by the extractor's name.
        pictures: those in the same file (ADM's 10,000), else None.
        provenance: what the file says of how it was made.
        origin: the form of the file, for people.
    """

    gaussians: Mapping[str, Gaussian]
    features: Mapping[str, np.ndarray]
    pictures: Pictures | None
    provenance: Mapping[str, Any]
    origin: str


def read_stored(path: str | Path) -> Stored | None:
    """Reads a file of statistics; None where the path is something else: a folder, a zip or an .npz of nothing but pictures.

    Raises:
        UserError: it is damaged, incomplete, in a form that is not known, or asks for code to be run.
    """
    path = paths.fetched(path)
    suffix = path.suffix.lower()
    if path.is_dir() or suffix not in (".npz", ".pkl", ".pickle"):
        return None
    return _read_npz(path) if suffix == ".npz" else _read_edm2(path)


def write_stored(
    path: str | Path, gaussians: Mapping[str, Gaussian], features: Mapping[str, np.ndarray], provenance: Mapping[str, Any]
) -> None:
    """Writes statistics in our own form, complete or not at all.

    Args:
        path: ends in .npz.
        gaussians: by the extractor's name.
        features: floating point [n,d] by the extractor's name; stored as float32.
        provenance: what JSON can hold.

    Raises:
        UserError: another suffix, or the disk does not take it.
        ValueError: nothing to write, an empty name, or features of another kind.
    """
    final = paths.resolve(path)
    if final.suffix.lower() != ".npz":
        raise UserError(f"statistics are written as .npz, not as {final.name!r}")
    if not (names := {*gaussians, *features}) or "" in names:
        raise ValueError("statistics belong to extractors, one at least, each with a name")
    arrays: dict[str, np.ndarray] = {"meta": np.array(json.dumps(provenance).encode())}
    for name, gaussian in gaussians.items():
        arrays |= {f"{name}.number": np.array(gaussian.number, np.int64), f"{name}.mean": gaussian.mean, f"{name}.cov": gaussian.cov}
    for name, rows in features.items():
        arrays[f"{name}.features"] = _checked_features(rows).astype(np.float32, copy=False)
    with paths.writing(final) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _read_npz(path: Path) -> Stored | None:
    names = array_names(path)
    own = sorted({name.rpartition(".")[0] for name in names if name.endswith((".number", ".mean", ".cov", ".features"))})
    pairs = [pair for pair in _PAIRS if set(pair) & set(names)]
    if not own and not pairs and "feats" not in names:
        if "arr_0" in names:
            return None
        raise UserError(f"{path} holds {_listed(names)}; {_KNOWN}")
    gaussians, features = _own(path, names, own)
    for pair in pairs:
        name = _PAIRS[pair]
        if name in gaussians:
            raise UserError(f"{path} holds {_listed(names)}: two means and covariances of {name}; take one away")
        mean, cov = read_arrays(path, _complete(path, names, pair)).values()
        gaussians[name] = _gaussian(f"{path}: {' and '.join(pair)}", 0, mean, cov, _WIDTHS[name])
    if "feats" in names:
        features["inception"] = _features(f"{path}: feats", read_arrays(path, ["feats"])["feats"], _WIDTHS["inception"])
    pictures = open_pictures(path) if "arr_0" in names else None
    return Stored(gaussians, features, pictures, read_meta(path, names), _form(own, pairs, pictures))


def _form(own: Collection[str], pairs: Collection[tuple[str, str]], pictures: Pictures | None) -> str:
    if own:
        return "statistics of this program (.npz)"
    if ("mu_s", "sigma_s") in pairs or (pairs and pictures):
        return "reference batch of ADM (.npz)"
    if ("ref_mu", "ref_sigma") in pairs:
        return "ref_mu and ref_sigma, as of iMF (.npz)"
    return "mu and sigma, as of pytorch-fid, clean-fid or EDM (.npz)" if pairs else "features of clean-fid's KID (.npz)"


def _own(path: Path, names: Collection[str], own: Collection[str]) -> tuple[dict[str, Gaussian], dict[str, np.ndarray]]:
    """The Gaussians and the features of our own form."""
    gaussians, features = {}, {}
    for name in own:
        keys = [f"{name}.number", f"{name}.mean", f"{name}.cov"]
        if set(keys) & set(names):
            number, mean, cov = read_arrays(path, _complete(path, names, keys)).values()
            if number.shape or number.dtype.kind not in "iu":
                raise UserError(f"{path}: {name}.number is {number.dtype} {list(number.shape)}, not a whole number")
            gaussians[name] = _gaussian(f"{path}: {name}", int(number), mean, cov)
        if f"{name}.features" in names:
            features[name] = _features(f"{path}: {name}.features", read_arrays(path, [f"{name}.features"])[f"{name}.features"])
    return gaussians, features


def _read_edm2(path: Path) -> Stored:
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        content = load_pickle(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}; {_KNOWN}") from error
    metrics = {name: value for name, value in content.items() if isinstance(value, dict)} if isinstance(content, dict) else {}
    if not metrics or not all(isinstance(name, str) for name in metrics):
        held = _listed(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise UserError(f"{path} holds {held}; {_KNOWN}")
    number = content.get("num_images", 0)
    if not isinstance(number, int | np.integer) or number < 0:
        raise UserError(f"{path}: num_images is not a whole number")
    gaussians = {}
    for metric, arrays in metrics.items():
        name, where = _EDM2_NAMES.get(metric, metric), one_line(f"{path}: {metric}")
        mean, cov = (arrays[key] for key in _complete(where, arrays, ("mu", "sigma")))
        gaussians[name] = _gaussian(where, int(number), mean, cov, _WIDTHS.get(name))
    return Stored(gaussians, {}, None, {}, "statistics of EDM2 (.pkl)")


def _complete(where: Path | str, names: Collection[str], parts: Collection[str]) -> Collection[str]:
    """The parts, all of which have to be there."""
    if missing := [part for part in parts if part not in names]:
        raise UserError(f"{where} holds {_listed(names)} without {', '.join(missing)}; {_KNOWN}")
    return parts


def _listed(names: Collection[Any]) -> str:
    return one_line(", ".join(str(name) for name in list(names)[:20])) or "nothing"


def _gaussian(where: str, number: int, mean: Any, cov: Any, width: int | None = None) -> Gaussian:
    if not all(isinstance(array, np.ndarray) and array.dtype.kind == "f" for array in (mean, cov)):
        raise UserError(f"{where}: a mean and a covariance are arrays of floating-point numbers")
    if width is not None and mean.size != width:
        raise UserError(
            f"{where}: features have d = {mean.size}, but those of this name have {width}; statistics of other features do not fit"
        )
    try:
        return Gaussian(number, np.asarray(mean, np.float64), np.asarray(cov, np.float64))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _features(where: str, rows: np.ndarray, width: int | None = None) -> np.ndarray:
    try:
        return _checked_features(rows, width)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _checked_features(rows: np.ndarray, width: int | None = None) -> np.ndarray:
    if rows.dtype.kind != "f" or rows.ndim != 2 or 0 in rows.shape or (width is not None and rows.shape[1] != width):
        raise ValueError(f"features are {rows.dtype} {list(rows.shape)}, not floating point [n,{width or 'd'}]")
    if not np.isfinite(rows).all():
        raise ValueError("features have numbers that are not finite")
    return rows
