"""The page is well formed, holds all that the report and the pictures do, asks for nothing from elsewhere, and runs nothing it is told."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ldm_jax.evaluation.page import page

_VOID = {"meta", "img", "wbr"}
_HOSTILE = '<script>alert("&amp;")</script>\'"><img src=x onerror=y>'
_RNG = np.random.Generator(np.random.Philox(key=[0, 0]))
_SAMPLES = _RNG.integers(0, 256, (5, 8, 6, 3), np.uint8)
_PICTURES: dict[str, Any] = {
    "samples": _SAMPLES,
    "captions": ["a red circle", "two squares", "a < b & c", "", _HOSTILE],
    "columns": 3,
    "neighbors": {"samples": _SAMPLES[:2], "nearest": _RNG.integers(0, 256, (2, 3, 8, 6, 3), np.uint8), "note": "by pixels"},
}
_REPORT: dict[str, Any] = {
    "title": "Shapes & co",
    "made": "2026-01-02T03:04:05+00:00",
    "command": "evaluate --num 50 <here>",
    "samples": {"source": "a folder", "sampler": {"name": "ddim", "eta": 0.0, "options": {"order": 2}}, "size": [32, 48]},
    "reference": {"source": "stored.npz", "parts": [{"n": 3}, {"n": 4}], "crop": None, "flip": False, "tags": []},
    "settings": {"batch": 64},
    "rules": {"resize": "bilinear"},
    "weights": {"inception.pth": "6726825d"},
    "versions": {"jax": "0.10.2"},
    "metrics": [
        {"name": "FID", "value": 3.9412345, "error": 0.02134, "n": 50000, "n_reference": 40000, "features": "inception", "better": "lower"},
        {"name": "IS", "value": "nan", "error": None, "n": 70, "n_reference": None, "features": "logits", "better": "higher"},
        {"name": "MIND", "value": 1.93e-7, "error": "inf", "n": 71, "n_reference": None, "features": "slices", "better": None},
    ],
    "missing": [{"name": "FD-DINOv2", "why": "no weights: give --dinov2"}, {"name": "CLIP score", "why": "no captions"}],
    "warnings": ["The reference is of JPEG pictures.", "Fewer than 10,000 samples."],
    "tables": [
        {
            "title": "By class",
            "note": "of held-out scenes",
            "columns": ["class", "accuracy", "n"],
            "rows": [["cat", 0.98765, 12], ["dog", None, 0]],
        },
        {"title": "By factor", "columns": ["factor", "seen"], "rows": [["colour", "all"], ["size", 7]]},
    ],
    "sweep": {
        "parameter": "guidance",
        "values": [1, 1.5, 2],
        "metrics": {"FID": [8.0, 4.25, None], "IS": [50.0, 90.0, 120.0], "other": [1.0, 2.0, "inf"]},
        "better": {"FID": "lower", "IS": "higher"},
    },
    "curves": [
        {"title": "loss", "x": "update", "log": True, "series": {"train": [[0, 1.0], [10, 0.1], [20, None]], "held out": [[0, 1.5]]}}
    ],
}


class _Reader(HTMLParser):
    """Fails where tags are not closed in their order; gathers elements, text, and each element's own text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))

    def within(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]

    def images(self) -> list[np.ndarray]:
        sources = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]
        head = "data:image/png;base64,"
        assert all(source.startswith(head) for source in sources)
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source[len(head) :], validate=True)))) for source in sources]


def _plots(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r'<svg viewBox="0 0 420.*?</svg>', text, re.S)]


def _table(text: str, first: str) -> list[list[str]]:
    """Rows of the table whose first head is `first`."""
    html = next(t for t in re.findall(r"<table.*?</table>", text, re.S) if re.search(rf"<thead><tr><th[^>]*>{first}<", t))
    return [[re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd][ >].*?</t[hd]>", row)] for row in re.findall("<tr>.*?</tr>", html)]


def test_everything_is_there() -> None:
    text = page(_REPORT, _PICTURES)
    reader = _Reader(text)
    assert reader.within("h1") == ["Shapes & co"] and reader.within("title")[0] == "Shapes & co"
    assert reader.within("code") == [_REPORT["command"]] and _REPORT["made"] in reader.within("p")
    assert _table(text, "metric")[1:] == [
        ["FID ↓", "3.941", "± 0.021", "50,000", "40,000", "inception"],
        ["IS ↑", "nan", "", "70", "–", "logits"],
        ["MIND", "1.930e−7", "± ∞", "71", "–", "slices"],
    ]
    titles = {attrs["title"] for _, attrs in reader.tags if "title" in attrs}
    assert {"3.9412345", "0.02134", "50000", "lower is better", "higher is better", "0.98765"} <= titles
    assert _table(text, "class") == [["class", "accuracy", "n"], ["cat", "0.9877", "12"], ["dog", "–", "0"]]
    assert _table(text, "factor") == [["factor", "seen"], ["colour", "all"], ["size", "7"]]
    assert set(_REPORT["warnings"]) <= set(reader.within("li"))
    assert {row["why"] for row in _REPORT["missing"]} | {"stored.npz", "ddim", "0.0", "32, 48", "false", "–"} <= set(reader.within("td"))
    # A name may be broken after its dots.
    names = re.sub("<wbr>", "", text)
    for name in ("sampler.name", "sampler.eta", "sampler.options.order", "parts.0.n", "parts.1.n", "crop", "flip", "tags", "FD-DINOv2"):
        assert f'<th scope="row">{name}</th>' in names
    assert reader.within("summary") == ["Settings", "Rules", "Weights", "Versions"]
    assert {"64", "bilinear", "6726825d", "0.10.2"} <= set(reader.within("td"))


def test_the_order_of_the_sections() -> None:
    reader = _Reader(page(_REPORT, _PICTURES))
    order = [
        "Warnings",
        "Metrics",
        "Not measured",
        "What was compared",
        "Samples",
        "Nearest pictures of the reference",
        "Sweep of guidance",
        "Curves",
    ]
    assert reader.within("h2") == [*order, "By class", "By factor"]


def test_pictures_are_exact_and_in_order() -> None:
    reader = _Reader(page(_REPORT, _PICTURES))
    near = _PICTURES["neighbors"]
    wanted = [*_SAMPLES, near["samples"][0], *near["nearest"][0], near["samples"][1], *near["nearest"][1]]
    images = reader.images()
    assert len(images) == len(wanted)
    for image, picture in zip(images, wanted, strict=True):
        np.testing.assert_array_equal(image, picture)
    assert reader.within("figcaption") == [caption for caption in _PICTURES["captions"] if caption]
    assert "repeat(3," in next(attrs["style"] or "" for _, attrs in reader.tags if attrs.get("class") == "grid")
    assert all(attrs["alt"] for tag, attrs in reader.tags if tag == "img") and "by pixels" in reader.within("p")


def _poisoned(value: Any) -> Any:
    """All its text and names, but those that mean something to the page, with something hostile after them."""
    if isinstance(value, dict):
        known = (
            set(_REPORT)
            | {key for part in ("metrics", "missing", "tables", "curves") for row in _REPORT[part] for key in row}
            | set(_REPORT["sweep"])
        )
        return {key if key in known else key + _HOSTILE: _poisoned(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_poisoned(part) for part in value]
    return value + _HOSTILE if isinstance(value, str) and value not in ("lower", "higher", "nan", "inf") else value


def test_text_stays_text() -> None:
    plain, poisoned = _Reader(page(_REPORT, _PICTURES)), page(_poisoned(_REPORT), _PICTURES)
    reader = _Reader(poisoned)
    assert [tag for tag, _ in reader.tags if tag != "wbr"] == [tag for tag, _ in plain.tags if tag != "wbr"]
    assert not any(name.startswith("on") for _, attrs in reader.tags for name in attrs)
    assert "<script" not in poisoned and "onerror=y&gt;" in poisoned
    assert len(_plots(poisoned)) == 4
    texts = [text for _, text in reader.texts]
    for row in _REPORT["metrics"] + _REPORT["missing"]:
        assert any(text.startswith(row["name"] + _HOSTILE) for text in texts)


def test_it_asks_for_nothing() -> None:
    text = page(_REPORT, _PICTURES)
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
    assert not re.search(r"@import|url\(|<link|<script|<iframe", text)
    assert "default-src 'none'" in text and "prefers-color-scheme:dark" in text and "@media print" in text
    assert all((attrs["src"] or "").startswith("data:") for _, attrs in _Reader(text).tags if "src" in attrs)


def test_sweeps_are_plotted_and_tabled_with_their_best() -> None:
    text = page(_REPORT, _PICTURES)
    assert _table(text, "guidance") == [
        ["guidance", "FID", "IS", "other"],
        ["1", "8.000", "50.00", "1.000"],
        ["1.5", "4.250", "90.00", "2.000"],
        ["2", "–", "120.0", "∞"],
    ]
    assert re.findall(r'class="number best" title="([^"]*)"', text) == ["4.25", "120.0"]
    plots = _plots(text)[:3]
    assert [plot[0].text for plot in plots] == ["FID by guidance", "IS by guidance", "other by guidance"]
    rings = [[(e.get("cx"), e.get("cy")) for e in plot.iter("circle") if e.get("class") == "ring"] for plot in plots]
    dots = [[(e.get("cx"), e.get("cy")) for e in plot.iter("circle") if "dot" in (e.get("class") or "")] for plot in plots]
    assert rings == [[dots[0][1]], [dots[1][2]], []] and [len(d) for d in dots] == [2, 3, 2]
    assert [e.text for e in plots[0].iter("text") if e.get("class") == "best"] == ["4.250"]


def test_a_sweep_over_names() -> None:
    sweep = {"parameter": "sampler", "values": ["ddim", "dpm & co"], "metrics": {"FID": [3.0, 2.0]}, "better": {"FID": "lower"}}
    text = page({"title": "t", "sweep": sweep}, {})
    assert [e.text for e in _plots(text)[0].iter("text") if e.get("class") == "tick"][-2:] == ["ddim", "dpm & co"]
    assert _table(text, "sampler")[1:] == [["ddim", "3.000"], ["dpm &amp; co", "2.000"]]


def test_curves_have_a_legend_and_a_line_each() -> None:
    text = page(_REPORT, _PICTURES)
    plot = _plots(text)[3]
    assert plot[0].text == "loss by update" and len(list(plot.iter("path"))) == 2
    assert {"train", "held out"} <= set(_Reader(text).within("li"))


@pytest.mark.parametrize(
    "report",
    [
        {"title": "empty"},
        {key: [] if isinstance(value, list) else {} if isinstance(value, dict) else "" for key, value in _REPORT.items()},
        dict.fromkeys(_REPORT),
        {"title": "t", "samples": {}, "reference": None, "metrics": [], "sweep": None, "curves": []},
    ],
)
@pytest.mark.parametrize("pictures", [{}, {"samples": _SAMPLES[:0], "columns": 4, "neighbors": None}])
def test_an_empty_report_is_a_page_without_sections(report: dict[str, Any], pictures: dict[str, Any]) -> None:
    reader = _Reader(page(report, pictures))
    assert reader.within("h1") and not reader.within("h2", "h3", "td", "summary") and not reader.images()


def test_it_is_a_pure_function_of_json() -> None:
    before = json.dumps(_REPORT)
    assert page(json.loads(before), _PICTURES) == page(_REPORT, _PICTURES) and json.dumps(_REPORT) == before


@pytest.mark.parametrize(
    ("report", "pictures", "says"),
    [
        ({}, {"samples": _SAMPLES.astype(np.float32)}, "uint8"),
        ({}, {"samples": _SAMPLES[..., 0]}, "uint8"),
        ({}, {"samples": _SAMPLES, "captions": ["one"]}, "zip"),
        ({}, {"neighbors": {"samples": _SAMPLES[:2], "nearest": _SAMPLES[None]}}, "zip"),
        ({"tables": [{"title": "t", "columns": ["a", "b"], "rows": [[1]]}]}, {}, "1 cells in a table of 2 columns"),
        ({"sweep": {"parameter": "p", "values": [1, 2], "metrics": {"FID": [1.0]}}}, {}, "zip"),
    ],
)
def test_what_does_not_fit_is_refused(report: dict[str, Any], pictures: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        page(report, pictures)
