"""Scalars of a run: JSON lines and TensorBoard events, written one step late, and a meter of speed."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from ldm_jax.config import write_bytes

FILE = "metrics.jsonl"


def cut(path: Path, last_step: int) -> None:
    """Leaves the lines of the file with step <= `last_step`; a line that a kill left half-written goes too. Atomic."""
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("step", math.inf) <= last_step:
            kept.append(line + b"\n")
    write_bytes(path, b"".join(kept))


class MetricWriter:
    """Appends {"step": n, "time": unix seconds, name: value, ...} to `workdir`/metrics.jsonl, and the same to TensorBoard events.

    Values may be arrays on a device: they are fetched at the next `write` (or `flush`), while the device works on the next step, so
    that the loop never waits for it. A value that is not finite is null in the file, as JSON has no NaN, and left out of the events.
    Only process 0 writes.
    """

    def __init__(self, workdir: str | os.PathLike[str], restored_step: int = 0) -> None:
        """Opens the files; what an earlier run wrote after `restored_step` (0: a fresh run keeps step 0 only) is cut."""
        self._pending: tuple[int, float, dict[str, Any]] | None = None
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        from tensorboardX import SummaryWriter  # slow to import

        path = Path(workdir) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            cut(path, restored_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(path.parent), purge_step=restored_step + 1)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Takes the scalars of `step` and writes those of the call before."""
        if not self._writes:
            return
        with jax.transfer_guard("allow"):
            for value in scalars.values():
                if isinstance(value, jax.Array):
                    value.copy_to_host_async()
        self._write_pending()
        self._pending = (step, time.time(), dict(scalars))

    def flush(self) -> None:
        """Writes what is pending and hands it to the operating system."""
        if self._writes:
            self._write_pending()
            self._file.flush()
            self._events.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._writes:
            self.flush()
            self._file.close()
            self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        (step, when, scalars), self._pending = self._pending, None
        values = {name: float(np.asarray(value)) for name, value in jax.device_get(scalars).items()}
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": round(when, 3), **record}) + "\n")
        self._file.flush()
        for name, value in record.items():
            if value is not None:
                self._events.add_scalar(name, value, step, walltime=when)


class Throughput:
    """Speed since the last report: images a second, the share of time spent waiting for data, TFLOP a second and MFU.

    Args:
        images_per_step: the global batch size.
        flops_per_step: operations of one update on the global batch (`flops.count_flops`); None leaves the figures of work out.
        peak: operations a second of all chips together, or None.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        images_per_step: int,
        flops_per_step: float | None = None,
        peak: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._images, self._flops, self._peak, self._clock = images_per_step, flops_per_step, peak, clock
        self._reset()

    def _reset(self) -> None:
        self._start, self._steps, self._waited, self._paused = self._clock(), 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the drawing of a batch."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training: checkpoints, samples, evaluation. This time counts nowhere."""
        start = self._clock()
        yield
        self._paused += self._clock() - start

    def step(self) -> None:
        """Counts one update."""
        self._steps += 1

    def report(self) -> dict[str, float]:
        """`images_per_second`, `data_wait` in [0, 1], and where known `tflops_per_second` and `mfu`; starts a new window.

        Exact where the device was waited for at both ends of the window, and close to it over many steps otherwise.
        """
        seconds = max(self._clock() - self._start - self._paused, 1e-9)
        figures = {"images_per_second": self._steps * self._images / seconds, "data_wait": self._waited / seconds}
        if self._flops is not None:
            rate = self._steps * self._flops / seconds
            figures["tflops_per_second"] = rate / 1e12
            if self._peak is not None:
                figures["mfu"] = rate / self._peak
        self._reset()
        return figures
