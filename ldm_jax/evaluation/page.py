"""An evaluation as one HTML page that needs nothing else: no script, no network, no font; dark where the reader's screen is; printable."""

import base64
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from ldm_jax.evaluation.plots import finite, legend, line_plot, significant

_NOTHING = "–"
_ARROWS = {"lower": "↓", "higher": "↑"}
_NOT_FINITE = {"nan": "nan", "inf": "∞", "-inf": "−∞"}
_TILE = 104  # pixels, about, that small pictures are enlarged to, by a whole factor


def page(report: Mapping[str, Any], pictures: Mapping[str, Any]) -> str:
    """The page of a report.

    Args:
      report: the value of report.json. All its text is shown as text, whatever it holds; what is absent or empty is left out.
        title, made, command: text; warnings: list of text; missing: list of {name, why};
        samples, reference, settings, rules, weights, versions: {field: value}, nested as they like;
        metrics: list of {name, value, error, n, n_reference, features, better: "lower" | "higher" | None};
        sweep: {parameter, values [v], metrics: {name: [v]}, better: {name: "lower" | "higher"}};
        curves: list of {title, x, series: {name: [[x, y], ...]}}, logarithmic in y with `log`;
        tables: list of {title, columns, rows}, with a `note`.
        A number that is not finite is null, or the text nan, inf or -inf.
      pictures: samples: uint8 [N,H,W,3], with captions: list of N texts, and columns: int (8 if not given);
        neighbors: {samples: uint8 [n,H,W,3], nearest: uint8 [n,k,H,W,3], note: text}. Each may be absent.

    Raises:
      ValueError: for pictures of another type or shape, captions of another number than theirs, rows or sweeps of another length.
    """
    title = escape(report.get("title") or "Evaluation")
    sections = [
        _heading(title, report),
        _warnings(report.get("warnings") or []),
        _section("Metrics", _metrics(report.get("metrics") or [])),
        _section("Not measured", _definitions((row["name"], row["why"]) for row in report.get("missing") or [])),
        _compared(report),
        _section("Samples", _samples(pictures)),
        _section("Nearest pictures of the reference", _neighbors(pictures.get("neighbors"))),
        _sweep(report.get("sweep")),
        _section("Curves", _curves(report.get("curves") or [])),
        *map(_one_table, report.get("tables") or []),
        *(_details(name, report.get(name.lower())) for name in ("Settings", "Rules", "Weights", "Versions")),
    ]
    return _DOCUMENT.format(title=title, style=_STYLE, body="\n".join(filter(None, sections)))


def _heading(title: str, report: Mapping[str, Any]) -> str:
    made = f'<p class="soft">{escape(str(report["made"]))}</p>' if report.get("made") else ""
    command = f'<p class="command"><code>{escape(report["command"])}</code></p>' if report.get("command") else ""
    return f"<header><h1>{title}</h1>{made}{command}</header>"


def _warnings(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
    return f'<section class="warnings"><h2>{"Warnings" if len(warnings) > 1 else "Warning"}</h2><ul>{items}</ul></section>' if items else ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _note(note: str | None) -> str:
    return f'<p class="soft">{escape(note)}</p>' if note else ""


# ---- numbers and tables


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or (isinstance(value, str) and value in _NOT_FINITE)


def _shown(value: Any) -> str:
    """A cell's text, escaped: whole numbers as they are, others in four digits."""
    number = finite(value)
    if number is None:
        return _NOT_FINITE.get(str(value)) or escape(_text(value))
    return f"{value:,}".replace("-", "−") if isinstance(value, int) else significant(number)


def _text(value: Any) -> str:
    """All of a value: text as it is, numbers in full precision."""
    if value is None:
        return _NOTHING
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(value: Any, number: bool, best: bool = False) -> str:
    if not number:
        return f"<td>{_shown(value)}</td>"
    return f'<td class="number{" best" if best else ""}" title="{escape(_text(value))}">{_shown(value)}</td>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], best: Collection[tuple[int, int]] = ()) -> str:
    """A table with numbers to the right; (row, column) in `best` are set off."""
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns: {row}")
    cells = [[row[j] for row in rows] for j in range(len(columns))]
    numeric = [any(map(_is_number, column)) and all(v is None or _is_number(v) for v in column) for column in cells]
    heads = "".join(f'<th scope="col"{" class=number" if n else ""}>{escape(c)}</th>' for c, n in zip(columns, numeric, strict=True))
    lines = ("".join(_cell(v, numeric[j] or _is_number(v), (i, j) in best) for j, v in enumerate(row)) for i, row in enumerate(rows))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _one_table(table: Mapping[str, Any]) -> str:
    return _section(escape(table["title"]), _note(table.get("note")) + _table(table["columns"], table["rows"]))


def _metrics(metrics: Sequence[Mapping[str, Any]]) -> str:
    if not metrics:
        return ""
    heads = '<th scope="col">metric</th><th scope="col" class="number">value</th><th scope="col"><span class="unseen">error</span></th>'
    heads += '<th scope="col" class="number">n</th><th scope="col" class="number">n reference</th><th scope="col">features</th>'
    body = "".join(f"<tr>{_metric(metric)}</tr>" for metric in metrics)
    return f'<div class="wide"><table class="metrics"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _metric(metric: Mapping[str, Any]) -> str:
    better, error = metric.get("better"), metric.get("error")
    known = finite(error)
    text = _shown(error) if known is None else significant(known, 2)
    spread = "" if error is None else f'<span title="{escape(_text(error))}">± {text}</span>'
    return (
        f'<th scope="row">{escape(metric["name"])}{_arrow(better)}</th>{_cell(metric.get("value"), True)}<td class="error">{spread}</td>'
        f"{_cell(metric.get('n'), True)}{_cell(metric.get('n_reference'), True)}{_cell(metric.get('features'), False)}"
    )


def _arrow(better: str | None) -> str:
    return f' <span class="arrow" title="{better} is better">{_ARROWS[better]}</span>' if better in _ARROWS else ""


def _definitions(pairs: Iterable[tuple[str, Any]]) -> str:
    named = ((escape(name).replace(".", ".<wbr>"), escape(_text(value))) for name, value in pairs)
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in named)
    return f'<table class="definitions"><tbody>{rows}</tbody></table>' if rows else ""


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Names joined by dots, and plain values; a list of plain values stays one line."""
    nested = value if isinstance(value, Mapping) else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        nested = dict(enumerate(value)) if any(isinstance(v, Mapping | list) for v in value) else None
        value = ", ".join(map(_text, value)) or _NOTHING
    if nested:
        for key, part in nested.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value if nested is None else _NOTHING


def _compared(report: Mapping[str, Any]) -> str:
    """What the numbers are of: the samples and the reference, beside each other where there is room."""
    blocks = [(name, _definitions(_flat(report.get(name) or {}))) for name in ("samples", "reference")]
    body = "".join(f"<div><h3>{name.capitalize()}</h3>{table}</div>" for name, table in blocks if table)
    return _section("What was compared", f'<div class="pair">{body}</div>' if body else "")


def _details(name: str, values: Mapping[str, Any] | None) -> str:
    table = _definitions(_flat(values or {}))
    return f"<details><summary>{name}</summary>{table}</details>" if table else ""


# ---- pictures


def _image(picture: np.ndarray, says: str) -> str:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"pictures are uint8 [H,W,3], not {picture.dtype} {list(picture.shape)}")
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    height, width, _ = picture.shape
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    sharp = ' class="sharp"' if width < _TILE else ""  # large ones are shown smaller, which needs smoothing
    return f'<img{sharp} src="{source}" width="{width}" height="{height}" alt="{says}">'


def _tile(picture: np.ndarray) -> int:
    """The width a picture is shown in where there is room: a whole multiple of its own."""
    return picture.shape[1] * max(1, round(_TILE / picture.shape[1]))


def _samples(pictures: Mapping[str, Any]) -> str:
    """A figure for each, since captions are to be read, searched and wrapped as text; on a narrow screen the rows scroll sideways."""
    samples = pictures.get("samples")
    if samples is None or not len(samples):
        return ""
    captions = pictures.get("captions")
    texts = [f"<figcaption>{escape(caption)}</figcaption>" for caption in captions] if captions else [""] * len(samples)
    figures = "".join(
        f"<figure>{_image(sample, f'sample {i}')}{text}</figure>" for i, (sample, text) in enumerate(zip(samples, texts, strict=True))
    )
    least = "5.5rem" if captions else "2.5rem"
    columns = min(pictures.get("columns") or 8, len(samples))
    tracks = f"repeat({columns},minmax(min({least},{_tile(samples[0])}px),{_tile(samples[0])}px))"
    return f'<div class="grid" style="grid-template-columns:{tracks}">{figures}</div>'


def _neighbors(neighbors: Mapping[str, Any] | None) -> str:
    if not neighbors or not len(neighbors["samples"]):
        return ""
    groups = []
    for i, (sample, nearest) in enumerate(zip(neighbors["samples"], neighbors["nearest"], strict=True)):
        images = _image(sample, f"sample {i}") + "".join(_image(near, f"nearest {k + 1} to sample {i}") for k, near in enumerate(nearest))
        groups.append(f'<div class="row" style="--tile:{_tile(sample)}px">{images}</div>')
    note = neighbors.get("note") or "Each sample, and after the bar the training pictures nearest to it."
    return _note(note) + f'<div class="rows">{"".join(groups)}</div>'


# ---- plots


def _sweep(sweep: Mapping[str, Any] | None) -> str:
    """A plot for each metric over the values, and the table of all."""
    if not sweep or not sweep.get("values"):
        return ""
    parameter, values, metrics = sweep["parameter"], sweep["values"], sweep["metrics"]
    numbers = all(finite(value) is not None for value in values)
    xs = values if numbers else range(len(values))
    names = None if numbers else [_text(value) for value in values]
    plots, best_cells = "", set()
    for j, (metric, column) in enumerate(metrics.items()):
        better = (sweep.get("better") or {}).get(metric)
        points = list(zip(xs, column, strict=True))
        best = _best(points, better)
        if best is not None:
            best_cells.add((best, j + 1))
        label = f"{metric} {_ARROWS.get(better or '', '')}".rstrip()
        mark = points[best] if best is not None else None
        plots += f"<figure>{line_plot(f'{metric} by {parameter}', parameter, label, {metric: points}, best=mark, names=names)}</figure>"
    rows = list(zip(map(_text, values), *metrics.values(), strict=True))
    table = _table([parameter, *metrics], rows, best_cells)
    return _section(f"Sweep of {escape(parameter)}", f'<div class="plots">{plots}</div>{table}')


def _best(points: Sequence[tuple[float, Any]], better: str | None) -> int | None:
    """Where the best finite value is; None where there is none, or no better."""
    sign = {"lower": 1, "higher": -1}.get(better or "")
    known = [(sign * y, i) for i, point in enumerate(points) if sign and (y := finite(point[1])) is not None]
    return min(known)[1] if known else None


def _curves(curves: Sequence[Mapping[str, Any]]) -> str:
    figures = ""
    for curve in curves:
        series = curve["series"]
        plot = line_plot(f"{curve['title']} by {curve['x']}", curve["x"], curve["title"], series, log=bool(curve.get("log")))
        figures += f"<figure>{plot}<figcaption>{legend(list(series))}</figcaption></figure>"
    return f'<div class="plots">{figures}</div>' if figures else ""


# The policy has the browser itself see to it that nothing is loaded or run.
_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

# Series colours are those of Okabe and Ito, told apart by colour-blind readers too; lighter on dark.
_STYLE = """
:root{--page:#fff;--ink:#1c2024;--soft:#5d6670;--rule:#dde1e6;--axis:#8b949e;--accent:#0b5cad;--warn:#8a5200;--warn-page:#fdf6e7;
--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#b8578e;--s4:#c98a00;--s5:#3f9bd6}
@media screen and (prefers-color-scheme:dark){:root{--page:#15181b;--ink:#e4e7ea;--soft:#9ba4ae;--rule:#30363d;--axis:#6e7781;
--accent:#79b8ff;--warn:#f0c060;--warn-page:#2a2414;
--s0:#4ba3e3;--s1:#f5854a;--s2:#2fc39b;--s3:#e79cc6;--s4:#f0bc3e;--s5:#9bd6ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:64rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.6rem;line-height:1.25;font-weight:650;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;font-weight:650;margin:2.6rem 0 .7rem}
h3{font-size:.9rem;font-weight:600;color:var(--soft);margin:0 0 .3rem}
p{margin:.2rem 0 .7rem;max-width:46rem}
.soft,.error,.arrow{color:var(--soft)}
code{font:.85rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.command{max-width:none}
.warnings{border-left:3px solid var(--warn);background:var(--warn-page);margin:1.5rem 0 0;padding:.7rem 1.1rem .8rem}
.warnings h2{font-size:1rem;margin:0 0 .2rem;color:var(--warn)}
.warnings ul{list-style:none;margin:0;padding:0}
.warnings li{margin:.25rem 0;overflow-wrap:anywhere}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.92rem}
th,td{padding:.32rem 1.4rem .32rem 0;text-align:left;vertical-align:baseline;border-bottom:1px solid var(--rule);font-weight:400}
th:last-child,td:last-child{padding-right:.3rem}
thead th{font-size:.82rem;color:var(--soft);border-bottom-color:var(--axis);white-space:nowrap}
.number{text-align:right;white-space:nowrap}
.metrics th[scope=row],.best{font-weight:650}
.metrics th[scope=row]{white-space:nowrap}
.metrics .number:nth-child(2){padding-right:.35rem}
.metrics td{white-space:nowrap}
.definitions{width:100%;font-size:.88rem;table-layout:fixed}
.definitions th{color:var(--soft);width:13rem;overflow-wrap:anywhere}
.definitions td{overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1.2rem 2.5rem;align-items:start}
.grid{display:grid;gap:.5rem .35rem;overflow-x:auto}
figure{margin:0;min-width:0}
img{display:block;width:100%;height:auto}
.sharp{image-rendering:pixelated}
.grid figcaption{font-size:.75rem;line-height:1.3;color:var(--soft);margin-top:.2rem;overflow-wrap:anywhere}
.rows{display:flex;flex-wrap:wrap;gap:.6rem 2.2rem}
.row{display:flex;gap:.35rem;max-width:100%}
.row img{width:var(--tile);min-width:0;flex:0 1 auto;align-self:start}
.row img:first-child{margin-right:.3rem;padding-right:.6rem;border-right:2px solid var(--axis);width:calc(var(--tile) + .6rem + 2px)}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1.4rem 2rem;margin-bottom:1.2rem}
.plots>figure{max-width:34rem}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:12px;fill:var(--soft)}
svg .name{font-size:13px;font-weight:600;fill:var(--ink)}
svg .best{font-weight:650;fill:var(--ink);stroke:var(--page);stroke-width:4px;paint-order:stroke;stroke-linejoin:round}
.rule{stroke:var(--rule)}
.axis{stroke:var(--axis)}
.line{fill:none;stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
.dashed{stroke-dasharray:5 4}
.ring{fill:none;stroke:var(--ink);stroke-width:1.5}
.line.s0{stroke:var(--s0)}.line.s1{stroke:var(--s1)}.line.s2{stroke:var(--s2)}
.line.s3{stroke:var(--s3)}.line.s4{stroke:var(--s4)}.line.s5{stroke:var(--s5)}
.dot.s0{fill:var(--s0)}.dot.s1{fill:var(--s1)}.dot.s2{fill:var(--s2)}.dot.s3{fill:var(--s3)}.dot.s4{fill:var(--s4)}.dot.s5{fill:var(--s5)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.1rem 1.2rem;margin:.2rem 0 0;padding:0;font-size:.82rem;color:var(--soft)}
.legend li{display:flex;align-items:center;gap:.4rem}
.swatch{width:24px;flex:none}
details{border-top:1px solid var(--rule);padding:.55rem 0}
section+details{margin-top:2.6rem}
details:last-of-type{border-bottom:1px solid var(--rule)}
summary{cursor:pointer;font-weight:600}
details .definitions{margin:.5rem 0 .6rem}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
@media (max-width:40rem){main{padding:1.4rem 1rem 3rem}th,td{padding-right:.9rem}.definitions th{width:40%}}
@media print{main{max-width:none;padding:0}body{font-size:10pt}.wide,.grid{overflow:visible}figure,tr,.row,.warnings{break-inside:avoid}
h2,h3,summary{break-after:avoid}*{print-color-adjust:exact}details::details-content{content-visibility:visible;block-size:auto}}
"""
