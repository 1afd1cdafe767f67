"""`report.json` and `report.html`: every number with what it depends on."""

import json
import math
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from ldm_jax.evaluation.job import Outcome, Tools
from ldm_jax.evaluation.page import page
from ldm_jax.evaluation.scores import Metric
from ldm_jax.paths import write_bytes, write_json

JSON, HTML = "report.json", "report.html"
QUANTISATION = "rounded to the nearest level, clip(round(127.5 x + 127.5), 0, 255)"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "pillow")


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on, and the device that computed them."""
    return {**{name: version(name) for name in _PACKAGES}, "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}


def make(
    title: str,
    command: Sequence[str],
    samples: Mapping[str, Any],
    reference: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    outcome: Outcome,
    tools: Tools,
    **more: Any,
) -> dict[str, Any]:
    """The report as JSON has it; `more` are its tables, its sweep and its curves."""
    return {
        "title": title,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(command),
        "samples": dict(samples),
        "reference": None if reference is None else dict(reference),
        "settings": dict(settings),
        "rules": tools.rules,
        "weights": tools.weights,
        "versions": versions(),
        "metrics": [asdict(metric) for metric in outcome.metrics],
        "missing": [asdict(missing) for missing in outcome.missing],
        "warnings": outcome.warnings,
        "tables": [],
        "sweep": None,
        "curves": [],
        **more,
    }


def write(output: Path, report: Mapping[str, Any], pictures: Mapping[str, Any]) -> None:
    """Both files, each whole or not at all. Raises UserError."""
    cleaned = finite(report)
    write_bytes(output / HTML, page(cleaned, pictures).encode())
    write_json(output / JSON, cleaned)  # the last: who finds it finds all


def finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: such numbers become null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def swept(parameter: str, values: Sequence[float], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The metrics of one run after another of a sweep, by name; None where one of them lacks a metric."""
    by_value = [{metric.name: metric for metric in outcome.metrics} for outcome in outcomes]
    names = list(dict.fromkeys(name for found in by_value for name in found))
    known: dict[str, Metric] = {name: metric for found in by_value for name, metric in found.items()}
    return {
        "parameter": parameter,
        "values": list(values),
        "metrics": {name: [found[name].value if name in found else None for found in by_value] for name in names},
        "better": {name: known[name].better for name in names},
    }


def curves(run: Path) -> list[dict[str, Any]]:
    """Of a work directory, as far as it is there: losses of training, and what was evaluated on the way."""
    series = _series(record for file in [run / "metrics.jsonl"] if file.exists() for record in map(_record, file.read_text().splitlines()))
    evaluations = _series(map(_record, (file.read_text() for file in sorted((run / "evaluations").glob("*.json")))))
    known: dict[str, dict[str, Any]] = {
        "loss": {name: series[name] for name in ("loss", "loss/nll") if name in series},
        "loss by time, least noisy first": {name: points for name, points in series.items() if name.startswith("loss/t")},
        "held-out loss by time, least noisy first": {n: points for n, points in evaluations.items() if n.startswith("held_out/loss/")},
    }
    if "held_out/loss" in evaluations:
        known["loss"]["held out"] = evaluations["held_out/loss"]
    found = [{"title": title, "x": "update", "log": True, "series": lines} for title, lines in known.items() if lines]
    others = {name: points for name, points in evaluations.items() if not name.startswith("held_out/loss")}
    return found + [{"title": name, "x": "update", "series": {name: points}} for name, points in others.items()]


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # one that is being written
        return {}
    return record if isinstance(record, dict) and "step" in record else {}


def _series(records: Iterable[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """The numbers of each name, with their steps."""
    series: dict[str, list[list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if value is not None and name.startswith(("loss", "held_out/", "samples/")):
                series.setdefault(name, []).append([record["step"], value])
    return series


def lines(outcome: Outcome) -> list[str]:
    """The outcome for the screen."""
    width = max((len(metric.name) for metric in outcome.metrics), default=0)
    shown = []
    for metric in outcome.metrics:
        error = "" if metric.error is None else f" ± {metric.error:.2g}"
        against = "" if metric.n_reference is None else f" against {metric.n_reference}"
        shown.append(f"{metric.name:<{width}}  {metric.value:.6g}{error}  (n = {metric.n}{against}, {metric.features})")
    shown += [f"no {missing.name}: {missing.why}" for missing in outcome.missing]
    return shown + [f"warning: {warning}" for warning in outcome.warnings]
