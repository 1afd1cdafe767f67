"""What a data set holds: every picture decoded once, and what is found counted."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ldm_jax.data.decode import BROKEN
from ldm_jax.data.pipeline import read_ahead

_NO_CLASS = 255  # of a semantic map


@dataclass
class Survey:
    """What was found in the examples that were looked at.

    Attributes:
      good: indices of the examples that can be read, in order.
      broken: (index, what it raised) of the others.
      sizes: (width, height) of each good picture, in pixels.
      captions: those of each good example.
      labels: how often each class occurs.
      boxes: how many boxes each good example has; `box_classes` how often each of their classes occurs.
      map_classes: in how many maps each class occurs.
      holes: the share of each good picture that its mask covers.
    """

    good: list[int] = field(default_factory=list)
    broken: list[tuple[int, Exception]] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    labels: Counter[int] = field(default_factory=Counter)
    boxes: list[int] = field(default_factory=list)
    box_classes: Counter[int] = field(default_factory=Counter)
    map_classes: Counter[int] = field(default_factory=Counter)
    holes: list[float] = field(default_factory=list)


def survey(source: Any, indices: Iterable[int], workers: int) -> Survey:
    """Looks at examples of a source with so many threads."""
    found = Survey()
    for index, facts in read_ahead(lambda index: (index, _look(source, index)), indices, workers, 4 * workers):
        if isinstance(facts, Exception):
            found.broken.append((index, facts))
        else:
            _add(found, index, facts)
    return found


def _look(source: Any, index: int) -> dict[str, Any] | Exception:
    """What is counted of an example, without its arrays; what it raised where it is broken."""
    try:
        example = source[index]
    except BROKEN as error:
        return error
    facts = {name: example[name] for name in ("text", "label") if name in example}
    facts["size"] = (example["image"].shape[1], example["image"].shape[0])
    if "boxes" in example:
        facts["boxes"] = example["boxes"][:, 0].astype(int).tolist()
    if "segmentation" in example:
        facts["map"] = np.unique(example["segmentation"]).tolist()
    if "mask" in example:
        facts["hole"] = float(np.mean(example["mask"]))
    return facts


def _add(found: Survey, index: int, facts: dict[str, Any]) -> None:
    found.good.append(index)
    found.sizes.append(facts["size"])
    if "text" in facts:
        found.captions.append(facts["text"] if isinstance(facts["text"], list) else [facts["text"]])
    if "label" in facts:
        found.labels[facts["label"]] += 1
    if "boxes" in facts:
        found.boxes.append(len(facts["boxes"]))
        found.box_classes.update(facts["boxes"])
    found.map_classes.update(value for value in facts.get("map", ()) if value != _NO_CLASS)
    if "hole" in facts:
        found.holes.append(facts["hole"])


def describe(found: Survey, resolution: int, classes: Sequence[str] = (), box_classes: Sequence[str] = ()) -> list[str]:
    """The survey for people, a line a subject; `classes` and `box_classes` are names of classes where there are any."""
    lines = []
    if found.sizes:
        small = sum(min(size) < resolution for size in found.sizes)
        by_area = sorted(found.sizes, key=lambda size: size[0] * size[1])
        least, median, most = (f"{size[0]}x{size[1]}" for size in (by_area[0], by_area[len(by_area) // 2], by_area[-1]))
        lines.append(f"sizes: {least} to {most}, median {median}; {_share(small, len(by_area))} are enlarged to {resolution} pixels")
    if found.labels:
        lines.append(f"classes: {_classes(found.labels, classes)}")
    if found.captions:
        lines += _captions(found.captions)
    if found.boxes:
        lines.append(f"boxes: {_range(found.boxes)} a picture; classes: {_classes(found.box_classes, box_classes)}")
    if found.map_classes:
        lines.append(f"segmentation: maps that show each of the classes: {_classes(found.map_classes, ())}")
    if found.holes:
        lines.append(f"masks: holes of {_range([round(100 * share, 1) for share in found.holes])} % of the picture")
    return lines


def _captions(captions: Sequence[Sequence[str]]) -> list[str]:
    texts = Counter(text for several in captions for text in several)
    total, lengths = texts.total(), [len(text) for text in texts.elements()]
    most, times = texts.most_common(1)[0]
    lines = [f"captions: {total:,}, {_range([len(several) for several in captions])} a picture, of {_range(lengths)} characters"]
    if times > 1:
        repeated = sum(count for count in texts.values() if count > 1)
        lines.append(f"captions that occur more than once: {_share(repeated, total)}; most often, {times:,} times: {_short(most)!r}")
    return lines


def _range(values: Sequence[float]) -> str:
    return f"{min(values):g} to {max(values):g} (median {np.median(values):g})" if min(values) != max(values) else f"{values[0]:g}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})"


def _classes(counts: Counter[int], names: Sequence[str], shown: int = 4) -> str:
    """How many, and the most and least frequent of them with their counts."""

    def named(pairs: list[tuple[int, int]]) -> str:
        return ", ".join(f"{_short(names[number]) if 0 <= number < len(names) else number} {count:,}" for number, count in pairs)

    ordered = counts.most_common()
    middle = f"{named(ordered[:shown])}, ..., {named(ordered[-shown:])}" if len(ordered) > 2 * shown else named(ordered)
    return f"{len(ordered)} ({middle})" if ordered else "none"


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
