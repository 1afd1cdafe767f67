"""`metadata.jsonl` and `metadata.csv`: captions and classes of the pictures in a folder."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_jax.config import UserError
from ldm_jax.data.reader import captions


@dataclass
class Metadata:
    """Captions and classes by the pictures' names relative to the folder."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)


def read_metadata(root: Path) -> Metadata:
    """The metadata of a folder; empty where there is no file. Lines for the same picture add up to several captions.

    Raises:
        UserError: both files are there, a line is not of their form, or gives a picture a second class.
    """
    files = [path for path in (root / "metadata.jsonl", root / "metadata.csv") if path.is_file()]
    if len(files) > 1:
        raise UserError(f"{root} has both metadata.jsonl and metadata.csv; keep one of them")
    found = Metadata()
    for path in files:
        try:
            _collect(found, _json_lines(path) if path.suffix == ".jsonl" else _csv_lines(path))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
        except _WrongLine as error:
            raise UserError(f'{path}: line {error} is not {{"file_name": ..., "text": ..., "label": ...}}') from error
    return found


class _WrongLine(ValueError):
    """Carries the line's number and what is wrong with it."""


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise _WrongLine(f"{number} ({error.msg})") from error


def _csv_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        for row in rows:
            yield rows.line_num, {key: value for key, value in row.items() if key and (value or key != "label")}


def _collect(found: Metadata, lines: Iterator[tuple[int, dict[str, Any]]]) -> None:
    for number, line in lines:
        if not isinstance(line, dict) or not isinstance(line.get("file_name"), str) or not {"text", "label"} & line.keys():
            raise _WrongLine(str(number))
        name = Path(line["file_name"]).as_posix()
        if not isinstance(line.get("text"), str | list | None):
            raise _WrongLine(f"{number} (text is {type(line['text']).__name__})")
        found.texts.setdefault(name, []).extend(captions(line.get("text")))
        label = line.get("label")
        if label is not None and found.labels.setdefault(name, label) != label:
            raise _WrongLine(f"{number} ({name!r} has another class already)")
