"""A polite stop: SIGTERM and SIGINT are noted in the loop, which ends between two updates with a complete checkpoint, and end what is
outside of it at once. Of several processes all stop, whichever the signal comes to (`sharding/watch.py`)."""

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType, TracebackType
from typing import Any

from ldm_jax.errors import Stopped
from ldm_jax.sharding import watch
from ldm_jax.training.preemption import noticed

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Context manager; `requested` is True once SIGTERM or SIGINT has come, to any process. A second SIGINT interrupts at once, as it would
    without it. Of several processes all end, with 1, once none has asked `stops_before` for more than `stall_after` seconds (0: never).

    Only the main thread may set handlers; in another the manager does nothing.
    """

    def __init__(self, stall_after: float = 0.0) -> None:
        self._noted = False
        self._watch = watch.current()
        if self._watch is not None:
            self._watch.stall_after = stall_after
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self._noted if self._watch is None else self._watch.asked

    def stops_before(self, step: int) -> bool:
        """Whether the run ends before update number `step` + 1: the same in all processes, which ask this before each."""
        return self._noted if self._watch is None else self._watch.stops_before(step)

    def paused(self) -> AbstractContextManager[None]:
        """Around what may take as long as it likes: no stall, whoever waits for it."""
        return nullcontext() if self._watch is None else self._watch.paused()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._watch is not None:
            self._watch.leave_turns(ending=error is not None)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        if self._watch is not None:
            self._watch.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Around a whole job that loses nothing by it, as what it leaves is complete at any moment: SIGTERM, which a notice of preemption sends
    too (`preemption.noticed`), and SIGINT raise `Stopped`.

    After a stop the process is about to end, with an exit code for it: SIGTERM is ignored from then on.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN if other == signal.SIGTERM else signal.default_int_handler)
        raise Stopped("stopped; the same command goes on from there")

    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        with noticed():
            yield
    except Stopped:
        previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
