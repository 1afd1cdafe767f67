"""Sources over other sources: what they have in common, and the one that replaces broken examples."""

import math
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm_jax.config import UserError
from ldm_jax.data.decode import BROKEN
from ldm_jax.data.reader import Source
from ldm_jax.paths import append


class Layer:
    """A source over another, of which everything is asked that a subclass does not answer itself."""

    def __init__(self, below: Any) -> None:
        self.below = below

    def __len__(self) -> int:
        return len(self.below)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.below[index]

    def caption(self, index: int) -> Any:
        """The text of an example, str or list[str], without its picture where the source below can say it alone."""
        return self.below.caption(index) if hasattr(self.below, "caption") else self.below[index]["text"]

    def name(self, index: int) -> str:
        """Where the example lies, for people."""
        return self.below.name(index) if hasattr(self.below, "name") else f"example {index}"

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the picture, without decoding it where the source below can say it alone."""
        if hasattr(self.below, "size"):
            return self.below.size(index)
        height, width = self.below[index]["image"].shape[:2]
        return height, width

    @property
    def buckets(self) -> Any:
        """Of a source that lies in the order of its buckets: where each is, list of `order.Bucket`. Others have no such attribute."""
        return self.below.buckets

    def fingerprint(self) -> str:
        return self.below.fingerprint()


class Reliable(Layer):
    """A source whose broken examples are replaced by the next good one, wrapping around at the end.

    The replacement depends on the index alone, so it is the same on every host and after every restart. `broken` is the
    set of broken indices met so far; each is named once in the log file (index, name, reason; tab separated).

    Args:
        source: the examples.
        log_path: file in which broken examples are named; None for none.
        max_broken: the share of the source that may be broken, in [0, 1].

    Raises:
        UserError: on reading, where more than that share have turned out to be broken, or all. Of processes that share the source each
            may meet its part of them, rounded up.
    """

    def __init__(self, source: Source, log_path: Path | None = None, max_broken: float = 1.0) -> None:
        super().__init__(source)
        if not 0 <= max_broken <= 1:
            raise UserError(f"data.max_broken is a share in [0, 1], not {max_broken}")
        self._log_path, self._max_broken = log_path, max_broken
        self._lock = threading.Lock()
        self.broken: set[int] = set()
        self.processes = 1  # of which each reads a share of its own
        self._logged: set[int] = set()
        if log_path is not None and log_path.exists():
            first_columns = (line.split("\t")[0] for line in log_path.read_text(encoding="utf-8").splitlines())
            self._logged = {int(column) for column in first_columns if column.isdigit()}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._first_good(index, self.below.__getitem__, self.broken)

    def caption(self, index: int) -> Any:
        return self._first_good(index, super().caption)  # whatever of the pictures has been read before

    def size(self, index: int) -> tuple[int, int]:
        return self._first_good(index, super().size)

    def _first_good(self, index: int, read: Callable[[int], Any], known: Collection[int] = ()) -> Any:
        """What is read of the first good example from an index on; `known` are broken."""
        size = len(self)
        for candidate in range(index, index + size):
            candidate %= size
            if candidate in known:
                continue
            try:
                return read(candidate)
            except BROKEN as error:
                self._note(candidate, error)
        raise UserError(f"data: all {size} examples are broken, the first is {self.name(0)!r}{self._where()}")

    def _note(self, index: int, error: Exception) -> None:
        with self._lock:
            self.broken.add(index)
            if self._log_path is not None and index not in self._logged:
                self._logged.add(index)
                append(self._log_path, broken_line(index, self.name(index), error))
            size = -(-len(self) // self.processes)
            if len(self.broken) > math.ceil(self._max_broken * size) or len(self.broken) > self._max_broken * len(self):
                raise UserError(broken_message(len(self.broken), size, self._max_broken, self.name(min(self.broken))) + self._where())

    def _where(self) -> str:
        return "" if self._log_path is None else f"; the reasons are in {self._log_path}"


def broken_line(index: int, name: str, error: Exception) -> str:
    """The line of one broken example in a log."""
    return f"{index}\t{' '.join(name.split())}\t{type(error).__name__}: {' '.join(str(error).split())}\n"


def broken_message(count: int, size: int, allowed: float, first: str) -> str:
    """What is said where more examples are broken than may be."""
    return (
        f"data: {count} of {size} examples are broken, {count / size:.2%}, and data.max_broken allows {allowed:.2%}; the first is {first!r}"
    )


@contextmanager
def shared(source: Any, processes: int) -> Iterator[None]:
    """Inside, each of so many processes reads a share of its own of a source; otherwise all read everything."""
    layers = [source]
    while isinstance(layers[-1], Layer):
        layers.append(layers[-1].below)
    reliable = [layer for layer in layers if isinstance(layer, Reliable)]
    for layer in reliable:
        layer.processes = processes
    try:
        yield
    finally:
        for layer in reliable:
            layer.processes = 1
