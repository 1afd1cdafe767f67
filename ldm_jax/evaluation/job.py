"""One evaluation: pictures and what they are held against, to metrics, warnings and what the report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ldm_jax.config import UserError
from ldm_jax.evaluation import extractors as ex
from ldm_jax.evaluation import protocol
from ldm_jax.evaluation.extractors import Extractor
from ldm_jax.evaluation.features import Features, measure
from ldm_jax.evaluation.metrics import squared_distances
from ldm_jax.evaluation.pairs import Pairs, codebook_metrics, pair_extractor, pair_metrics, pairs_missing, reconstruct
from ldm_jax.evaluation.pictures import Pictures, crop, open_pictures
from ldm_jax.evaluation.scores import Metric, Missing, Side, score, standard_error
from ldm_jax.evaluation.stored import Gaussian, Stored, read_stored, write_stored
from ldm_jax.interop.torch_file import load_state_dict
from ldm_jax.interop.vision import Clip, sha256, text_embeddings
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.nn.lpips import params_from_state_dict

_KEPT_ROWS = 10_000  # of each network, in statistics that are written, for metrics that need more than a Gaussian
_SHOWN, _NEAREST = 8, 4  # samples whose nearest pictures are shown, and how many of these


@dataclass(frozen=True)
class Tools:
    """What pictures are measured with.

    Attributes:
      extractors: those that can be had; mean colours always.
      missing: what cannot be had for want of weights.
      clip: the whole network, for scores of captions; None without its weights.
      pairs: the extractor for pairs.
      batch_size: pictures that are measured at once.
      allow_small: whether a Fréchet distance is given of fewer samples than features.
    """

    extractors: tuple[Extractor, ...]
    missing: tuple[Missing, ...]
    clip: Clip | None
    pairs: Extractor
    batch_size: int = 64
    allow_small: bool = False

    @property
    def weights(self) -> dict[str, str]:
        """SHA-256 of each network's file."""
        return {e.name: e.weights for e in (*self.extractors, self.pairs) if e.weights}

    @property
    def rules(self) -> dict[str, str]:
        """How each network is given pictures."""
        return {e.name: e.rule for e in self.extractors}


def open_tools(given: Mapping[str, str | None], batch_size: int, allow_small: bool, any_weights: bool) -> Tools:
    """The tools whose weights are given, by name (`extractors.WEIGHTS`, `vgg`, `lpips`) or in the environment. Raises UserError."""
    found, missing, clip = [ex.colors()], [], None
    paths = {name: ex.weight_path(name, given.get(name)) for name in (*ex.WEIGHTS, "vgg", "lpips")}
    if (path := paths["inception"]) is not None:
        found.append(ex.load_inception(path, any_weights))
    if (path := paths["dino"]) is not None:
        found.append(ex.load_dino(path))
    if (path := paths["clip"]) is not None:
        extractor, clip = ex.load_clip(path)
        found.append(extractor)
    named = {
        "inception": "FID, sFID, IS, KID, precision, recall, density, coverage, MIND",
        "dino": "FD-DINOv2",
        "clip": "FD-CLIP, CLIP score",
    }
    missing = [Missing(metrics, ex.absent(name)) for name, metrics in named.items() if paths[name] is None]
    perceptual, digest = _perceptual(paths["vgg"], paths["lpips"])
    return Tools(tuple(found), tuple(missing), clip, pair_extractor(perceptual, digest), batch_size, allow_small)


def _perceptual(vgg: Path | None, heads: Path | None) -> tuple[Any, str]:
    """Parameters of LPIPS and what they come from; None where a part is not given."""
    if vgg is None or heads is None:
        return None, ""
    try:
        params = params_from_state_dict({**load_state_dict(vgg), **load_state_dict(heads)})
    except ValueError as error:
        raise UserError(f"LPIPS: {error}") from error
    return params, f"{sha256(vgg)} and {sha256(heads)}"


class Reference:
    """What samples are held against: pictures, stored statistics, or a file of both.

    Attributes:
      described: for the report.
      directory: where features of its pictures are kept while the job runs.
    """

    def __init__(self, pictures: Pictures | None, stored: Stored | None, described: Mapping[str, Any], directory: Path) -> None:
        self.pictures, self.stored, self.described, self.directory = pictures, stored, described, directory
        self._side: Side | None = None

    @property
    def facts(self) -> protocol.Facts:
        """For warnings."""
        if self.stored is None:
            assert self.pictures is not None
            return protocol.facts_of(self.pictures)
        provenance = self.stored.provenance
        size = provenance.get("size")
        if not (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) for side in size)):
            size = None if self.pictures is None else self.pictures.size
        number = max((gaussian.number for gaussian in self.stored.gaussians.values()), default=0)
        return protocol.Facts(number, tuple(size) if size else None, None, 0, provenance, statistics=True)

    def side(self, tools: Tools) -> Side:
        """Its features, measured once where there are pictures."""
        if self._side is None:
            measured = None
            if self.pictures is not None:
                measured = measure(self.pictures, tools.extractors, self.directory, tools.batch_size, "reference")
            stored = self.stored
            self._side = Side(measured) if stored is None else Side(measured, stored.gaussians, stored.features, _foreign(tools, stored))
        return self._side


def _foreign(tools: Tools, stored: Stored) -> frozenset[str]:
    """Networks that the statistics were measured by with other weights, where both are known."""
    theirs = stored.provenance.get("weights")
    known = theirs if isinstance(theirs, dict) else {}
    return frozenset(name for name, digest in tools.weights.items() if name in known and known[name] != digest)


def open_reference(path: str, directory: Path, size: tuple[int, int] | None = None) -> Reference:
    """Of a file or folder; pictures are cropped to `size` where one is given. Raises UserError."""
    stored = read_stored(path)
    if stored is not None:
        if size:
            raise UserError(f"--crop is of pictures, and {path} holds statistics of what was cropped before")
        return Reference(stored.pictures, stored, {"path": path, "form": stored.origin, **stored.provenance}, directory)
    pictures = open_pictures(path)
    pictures = crop(pictures, size) if size else pictures
    return Reference(pictures, None, {"path": path, "pictures": pictures.describe(), **pictures.provenance}, directory)


@dataclass
class Outcome:
    """What an evaluation found; of one for a report."""

    metrics: list[Metric] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    neighbors: dict[str, Any] | None = None
    tables: list[dict[str, Any]] = field(default_factory=list)


def compare(
    tools: Tools,
    samples: Pictures,
    reference: Reference | None,
    directory: Path,
    captions: Sequence[str] | None = None,
    reconstructions: bool = False,
) -> Outcome:
    """Samples held against a reference, and against their captions where they have some; features are left in `directory`.

    `reconstructions`: they are the reference's own pictures, gone through an autoencoder. Raises UserError.
    """
    found = Outcome(missing=list(tools.missing))
    features = measure(samples, tools.extractors, directory / "samples", tools.batch_size, "samples")
    side = reference.side(tools) if reference else None
    found.warnings += protocol.warnings(protocol.facts_of(samples), reference.facts if reference else None, reconstructions)
    found.warnings += [] if reconstructions else protocol.duplicates(features.keys)
    if any(e.name == "inception" and not e.weights.startswith(ex.INCEPTION_HASH) for e in tools.extractors):
        found.warnings.append("Inception has other weights than the FID's: what is called FID here compares with nothing that is published")
    metrics, missing = score(features, side, tools.allow_small)
    found.metrics += metrics
    found.missing += missing
    if captions is not None and tools.clip is not None:
        found.metrics.append(clip_score(tools.clip, features, captions))
    if side is not None and side.measured is not None and reference is not None and reference.pictures is not None:
        found.neighbors = nearest(features, side.measured, samples, reference.pictures)
        if samples.labels is not None and not reconstructions:
            found.tables.append(by_class(features, side.measured, samples.labels))
    return found


def by_class(ours: Features, theirs: Features, labels: np.ndarray) -> dict[str, Any]:
    """How far the samples of each class lie from the nearest picture of the reference and from each other, by the best features.

    A class far from everything is not learnt; one whose samples lie close together shows less than there is.
    """
    name = best_features(ours)
    rows = np.concatenate(list(ours.blocks(name))).astype(np.float64)
    known = theirs.rows(name, _KEPT_ROWS).astype(np.float64)
    away = np.sqrt(np.concatenate([squares.min(1) for squares in squared_distances(rows, known)]))
    found: list[list[Any]] = []
    for label in np.unique(labels):
        own = rows[labels == label]
        # The mean of |x - y|^2 over pairs of two is twice the trace of the covariance.
        spread = float(np.sqrt(2 * own.var(0, ddof=1).sum())) if len(own) > 1 else None
        found.append([int(label), len(own), float(away[labels == label].mean()), spread])
    columns = ["class", "n", "from the nearest picture", "from each other"]
    return {"title": f"Classes, distances of {name} features", "columns": columns, "rows": found}


def best_features(found: Features) -> str:
    """Of what was measured, the features that see most."""
    return next(name for name in ("dino", "clip", "inception", "colors") if name in found.names)


def clip_score(clip: Clip, features: Features, captions: Sequence[str]) -> Metric:
    """100 max(cos, 0) between a picture and its caption (Hessel et al., arXiv 2104.08718), the mean and its standard error."""
    embed, values, start = jax.jit(text_embeddings), [], 0
    for rows in features.blocks("clip"):
        with jax.default_matmul_precision("float32"):
            texts = embed(clip, clip.tokenizer(list(captions[start : start + len(rows)])))
        values.append(100 * (rows.astype(np.float64) * np.asarray(texts)).sum(1).clip(0))
        start += len(rows)
    scores = np.concatenate(values)
    return Metric("CLIP score", float(scores.mean()), len(scores), None, "clip", "higher", standard_error(scores))


def nearest(ours: Features, theirs: Features, samples: Pictures, reference: Pictures) -> dict[str, Any]:
    """The reference's pictures nearest to the first samples, by the best features there are: has a model learnt pictures by heart?"""
    name = best_features(ours)
    queries = next(iter(ours.blocks(name)))[:_SHOWN].astype(np.float64)
    best = np.full((len(queries), 0), np.inf)
    places = np.zeros((len(queries), 0), int)
    start = 0
    for rows in theirs.blocks(name):
        (squares,) = squared_distances(queries, rows.astype(np.float64))
        best = np.concatenate([best, squares], axis=1)
        places = np.concatenate([places, np.broadcast_to(np.arange(start, start + len(rows)), squares.shape)], axis=1)
        order = np.argsort(best, axis=1, kind="stable")[:, :_NEAREST]
        best, places = np.take_along_axis(best, order, 1), np.take_along_axis(places, order, 1)
        start += len(rows)
    found = np.stack([np.concatenate([reference.read(i, i + 1) for i in row]) for row in places])
    return {"samples": samples.read(0, len(queries)), "nearest": found, "note": f"by {name}, the nearest first"}


def reconstructions(tools: Tools, model: LatentDiffusion, reference: Reference, directory: Path, about: str) -> tuple[Pictures, Outcome]:
    """The first stage: what it makes of the reference's pictures, held against these one by one and as a set (rFID). Raises UserError."""
    originals = reference.pictures
    if originals is None:
        raise UserError("the first stage is evaluated on pictures, and the reference has statistics alone: give a folder, or --config")
    reconstruct(model, originals, directory / "reconstructions", tools.batch_size, about)
    made = open_pictures(directory / "reconstructions")
    outcome = paired(tools, made, reference, directory / "features")
    outcome.metrics += codebook_metrics(directory / "reconstructions", len(originals), tools.batch_size)
    return made, outcome


def paired(tools: Tools, made: Pictures, reference: Reference, directory: Path) -> Outcome:
    """Pictures held against those of the same number in the reference, and both sets against each other. Raises UserError."""
    outcome = compare(tools, made, reference, directory, reconstructions=True)
    outcome.metrics = [replace(m, name=f"r{m.name}") if m.name in ("FID", "sFID") else m for m in outcome.metrics]
    if reference.pictures is not None and not reference.facts.statistics:
        add_pair_scores(outcome, tools, made, reference.pictures, directory)
    return outcome


def add_pair_scores(outcome: Outcome, tools: Tools, made: Pictures, originals: Pictures, directory: Path) -> None:
    """PSNR and its like, before the outcome's other metrics; with a warning where the pictures were cut off to uint8. Raises UserError."""
    try:
        pairs = Pairs(originals, made)
    except ValueError as error:
        raise UserError(str(error)) from error
    features = measure(pairs, [tools.pairs], directory / "pairs", tools.batch_size, "pairs")
    found = pair_metrics(features)
    bias = next(metric for metric in found if metric.name.startswith("bias"))
    outcome.metrics = found + outcome.metrics
    outcome.missing += pairs_missing(features, bool(tools.pairs.params))
    outcome.warnings += protocol.truncation(bias.value, bias.error or 0.0)


def write_reference(tools: Tools, pictures: Pictures, directory: Path, path: Path) -> dict[str, Gaussian]:
    """Statistics of pictures as a file for later jobs, with some rows for the metrics that need them. Raises UserError."""
    features = measure(pictures, tools.extractors, directory, tools.batch_size, "reference")
    side = Side(features)
    gaussians = {name: gaussian for name in features.names if name != "inception_logits" and (gaussian := side.gaussian(name))}
    rows = {name: features.rows(name, _KEPT_ROWS) for name in gaussians if name != "inception_spatial"}
    provenance = {
        **pictures.provenance,
        "number": len(pictures),
        "size": list(pictures.size),
        "jpegs": pictures.jpegs or pictures.provenance.get("jpegs", 0),
        "weights": tools.weights,
        "rules": tools.rules,
    }
    if jax.process_index() == 0:
        write_stored(path, gaussians, rows, provenance)
    return gaussians
