"""What the oracle reads in samples of drawn scenes, as metrics and tables of a report: is each condition obeyed?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ldm_jax.evaluation.obedience import scores
from ldm_jax.evaluation.oracle import METRICS, score_table
from ldm_jax.evaluation.scores import Metric, standard_error

READ = 2000  # samples that are read, at some 30 ms each
# Of the scores of each condition, the one that says most.
_FIRST = {"text": "all seen", "label": "class", "boxes": "iou", "segmentation": "pixels", "low_res": "all", "mask": "object"}
_FIRST |= {"neighbors": "nearer", "": "valid"}

Table = dict[str, Any]


def obeyed(inputs: Sequence[str], images: np.ndarray, examples: Sequence[Mapping[str, Any]]) -> tuple[list[Metric], list[Table]]:
    """The first score of each of a model's inputs as a metric, and all of them as tables.

    Args:
      images: uint8 [N,H,H,3].
      examples: the N scenes, with what the model was told of them.
    """
    metrics, tables = [], []
    for name in [name for name in inputs if name != "image"] or [""]:
        found = {title: values[~np.isnan(values)] for title, values in scores(name, images, examples).items()}
        rows = [[title, float(values.mean()), standard_error(values), len(values)] for title, values in found.items() if len(values)]
        title = f"Is {name} obeyed, as the oracle reads it" if name else "Valid scenes, as the oracle reads them"
        tables.append({"title": title, "columns": ["score", "mean", "standard error", "n"], "rows": rows})
        first = _FIRST[name]
        if len(values := found[first]):
            metrics.append(
                Metric(f"{name or 'scenes'}: {first}", float(values.mean()), len(values), None, "oracle", "higher", standard_error(values))
            )
    if "text" in inputs:
        tables.append(_by_factor(images, [example["text"] for example in examples]))
    return metrics, tables


def by_class(images: np.ndarray, labels: Sequence[int]) -> Table:
    """Of samples uint8 [N,H,H,3] that were told a class and no scene: is the largest object of it?"""
    found = scores("label", images, [{"label": label, "boxes": np.zeros((1, 5))} for label in labels])
    told_of, names = np.array(labels), ("class", "color", "shape")
    rows: list[list[Any]] = [["all", len(labels), *(float(found[name].mean()) for name in names)]]
    for label in np.unique(told_of):
        own = told_of == label
        rows.append([int(label), int(own.sum()), *(float(found[name][own].mean()) for name in names)])
    columns = ["class", "n", *(f"{name} is right" for name in names)]
    return {"title": "Classes, as the oracle reads the largest object", "columns": columns, "rows": rows}


def _by_factor(images: np.ndarray, captions: Sequence[str]) -> Table:
    rows = [[name, *(row.get(metric) for metric in ("n", *METRICS))] for name, row in score_table(images, captions).items()]
    return {"title": "Prompts, by the number of objects", "columns": ["objects", "n", *METRICS], "rows": rows}
