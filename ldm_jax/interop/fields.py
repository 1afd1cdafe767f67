"""JSON settings that other programs wrote: every field is accounted for, and a damaged file is one error."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm_jax.config import UserError

Check = Callable[[Any], bool]
_LARGEST_FILE = 2**20  # bytes; theirs have some thousand
_LARGEST_COUNT = 2**20
_SHOWN = 200  # characters of a value in a message


def count(value: Any) -> bool:
    """A whole number from 1 on."""
    return type(value) is int and 0 < value <= _LARGEST_COUNT


def counts(value: Any) -> bool:
    """Such a number, or one for each level."""
    return count(value) or (isinstance(value, list | tuple) and bool(value) and all(map(count, value)))


def layers(value: Any) -> bool:
    """How many blocks are built one after another, as `counts`: no network has thousands, and they would take forever."""
    return counts(value) and max(value if isinstance(value, list | tuple) else [value]) <= 1000


def number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def positive(value: Any) -> bool:
    return number(value) and value > 0


def numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(number, value))


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def word(value: Any) -> bool:
    return isinstance(value, str)


def words(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(word, value))


def free(value: Any) -> bool:
    """Anything: the field says nothing of what is computed."""
    return True


def maybe(check: Check) -> Check:
    """The same, or null."""
    return lambda value: value is None or check(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises UserError."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path} holds no configuration: it has {path.stat().st_size} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UserError(f"cannot read {path}: it is nested too deeply") from error
    except (OSError, ValueError) as error:  # ValueError: bytes that are no text, and text that is no JSON
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no configuration")
    return content


@contextmanager
def understood(what: Any) -> Iterator[None]:
    """Turns what fields of wrong types and senseless sizes provoke into a UserError that names `what`."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        text = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(f"{what} does not say what it should: {text[: 2 * _SHOWN]}") from error


def account(config: Mapping[str, Any], what: str, must: Mapping[str, Any], known: Mapping[str, Check]) -> None:
    """Raises UserError for a field that is unknown, not as it must be, or of a wrong type. Names with an underscore first are free, and so
    is what is unknown and null."""
    foreign, damaged = [], []
    for name, value in config.items():
        said = f"{name}={value!r}"[:_SHOWN]
        if name in must:
            values = value if isinstance(value, list | tuple) and value else [value]
            foreign += [] if all(one == must[name] for one in values) else [said]
        elif name in known:
            damaged += [] if known[name](value) else [said]
        elif not name.startswith("_") and value is not None:
            foreign.append(said)
    if foreign:
        raise UserError(_line(f"{what}: {', '.join(foreign)} has no counterpart here"))
    if damaged:
        raise UserError(_line(f"{what}: {', '.join(damaged)} makes no sense"))


def _line(text: str) -> str:
    return " ".join(text.split())
