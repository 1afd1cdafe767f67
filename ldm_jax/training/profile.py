"""A profiler trace of chosen updates (`train.profile`)."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import jax

from ldm_jax.paths import send_tree

logger = logging.getLogger(__name__)


class Profiler:
    """Traces the updates `first` to `last`, numbered as in the metrics, into `directory`/process_<index>/, each process its own.

    The trace is a run of TensorBoard's profile plugin (and xprof), and its `*.trace.json.gz` opens in Perfetto. It begins when what was
    started before `first` has ended, and ends when `last` has. A session compiles in its first update, so one that begins at `first` or
    behind it takes none.
    """

    def __init__(self, directory: Any, window: Sequence[int], start: int) -> None:
        """`window` is (first, last) or empty; the session begins after `start` updates."""
        self._directory = directory / f"process_{jax.process_index()}"
        self._local: TemporaryDirectory[str] | None = None  # while the trace is taken; jax writes to local disks only
        self._first, self._last = window or (0, 0)
        if start < self._last and self._first < start + 2:
            logger.warning("train.profile=%s: no trace, as this session compiles in update %d; ask for later ones", window, start + 1)
            self._first = 0

    def starts(self, number: int) -> bool:
        """Whether the trace begins with this update: the caller waits for those before it."""
        return number == self._first

    @contextmanager
    def update(self, number: int) -> Iterator[None]:
        """Around the batch and the start of update `number`."""
        if self.starts(number):
            self._local = TemporaryDirectory()
            jax.profiler.start_trace(self._local.name)
        with jax.profiler.StepTraceAnnotation("update", step_num=number):
            yield

    def started(self, number: int, results: Any) -> None:
        """After the start of update `number`, whose `results` may still be on their way."""
        if self._local and number == self._last:
            jax.block_until_ready(results)
            self._stop()
            logger.warning("profiler trace of the updates %d to %d in %s", self._first, self._last, self._directory)

    def _stop(self) -> None:
        if self._local:
            with self._local as local:
                self._local = None
                jax.profiler.stop_trace()
                send_tree(local, self._directory)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop()
