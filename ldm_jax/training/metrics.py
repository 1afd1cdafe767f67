"""Scalars of a run: JSON lines and TensorBoard events, written one step late; meters of speed, memory and goodput."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.paths import Mirror, reported, write_bytes, write_json

logger = logging.getLogger(__name__)

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


class _Events:
    """A TensorBoard event file, written by the thread that calls: that of tensorboardX's SummaryWriter dies of a full disk, and who feeds
    it waits for ever."""

    def __init__(self, directory: Path, purge_step: int) -> None:
        """TensorBoard forgets what earlier files have of `purge_step` and behind it."""
        from tensorboardX.event_file_writer import EventsWriter  # slow to import
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._writer = EventsWriter(str(directory / "events"))
        self._writer.write_event(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, when: float, scalars: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._writer.write_event(Event(wall_time=when, step=step, summary=Summary(value=values)))
        self._writer.flush()

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class MetricWriter:
    """Appends {"step": n, "time": unix seconds, name: value, ...} to `workdir`/metrics.jsonl, and the same to TensorBoard events.

    Values may be arrays on a device: they are fetched at the next `write` (or `flush`), while the device works on the next step, so
    that the loop never waits for it. A value that is not finite is null in the file, as JSON has no NaN, and left out of the events.
    Only process 0 writes. Each call raises UserError where the disk does not take it.
    """

    def __init__(self, workdir: str | os.PathLike[str], restored_step: int = 0) -> None:
        """Opens the files; what an earlier run wrote after `restored_step` (0: a fresh run keeps step 0 only) is cut."""
        self._workdir = workdir
        self._pending: tuple[int, float, dict[str, Any]] | None = None
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._mirror = Mirror(workdir, (FILE,))
        path = self._mirror.folder / FILE
        with self._reported():
            if path.exists():
                cut(path, restored_step)
            self._file = path.open("a", encoding="utf-8")
            self._events = _Events(path.parent, restored_step + 1)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Takes the scalars of `step` and writes those of the call before."""
        if not self._writes:
            return
        with jax.transfer_guard("allow"):
            for value in scalars.values():
                if isinstance(value, jax.Array):
                    value.copy_to_host_async()
        with self._reported():
            self._write_pending()
        self._pending = (step, time.time(), dict(scalars))

    def flush(self) -> None:
        """Writes what is pending and hands it to the operating system, or to object storage."""
        if self._writes:
            with self._reported():
                self._write_pending()
                self._events.flush()
            self._mirror.push()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._writes:
            self.flush()
            with self._reported():
                self._file.close()
                self._events.close()
            self._mirror.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        with suppress(*[UserError] if error else []):  # what came first says what is wrong
            self.close()

    def _reported(self) -> AbstractContextManager[None]:
        return reported("write the metrics in", self._workdir)

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        (step, when, scalars), self._pending = self._pending, None
        values = {name: float(np.asarray(value)) for name, value in jax.device_get(scalars).items()}
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": round(when, 3), **record}) + "\n")
        self._file.flush()
        self._events.write(step, when, {name: value for name, value in record.items() if value is not None})
        self._mirror.push(now=False)


class Throughput:
    """Speed since the last report, and the seconds spent in updates by this session.

    Args:
        images_per_step: the global batch size.
        chips: devices of the mesh.
        peak: operations a second of one chip, or None.
        clock: monotonic seconds.
    """

    def __init__(
        self, images_per_step: int, chips: int = 1, peak: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._images, self._chips, self._peak, self._clock = images_per_step, chips, peak, clock
        self._earlier = 0.0
        self._reset()

    def _reset(self) -> None:
        self._start, self._steps, self._flops, self._waited, self._paused = self._clock(), 0, 0.0, 0.0, 0.0

    def _seconds(self) -> float:
        return self._clock() - self._start - self._paused

    @property
    def productive(self) -> float:
        """Seconds of this session that were not `paused`."""
        return self._earlier + self._seconds()

    def begin(self) -> None:
        """Starts a new window."""
        self._earlier = self.productive
        self._reset()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the drawing of a batch."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training: compilation, checkpoints, samples, evaluation. This time counts nowhere."""
        start = self._clock()
        yield
        self._paused += self._clock() - start

    def step(self, flops: float) -> None:
        """Counts one update, of so many operations on the global batch (`flops.count_flops`)."""
        self._steps += 1
        self._flops += flops

    def report(self) -> dict[str, float]:
        """`step_time` in seconds, `images_per_second` (`_per_chip`), `data_wait` in [0, 1], `tflops_per_second` (`_per_chip`), and `mfu`
        where the chip's peak is known; starts a new window.

        Exact where the device was waited for at both ends of the window, and close to it over many steps otherwise.
        """
        seconds = max(self._seconds(), 1e-9)
        images = self._steps * self._images / seconds
        figures = {"step_time": seconds / max(self._steps, 1), "data_wait": self._waited / seconds}
        figures |= {"images_per_second": images, "images_per_second_per_chip": images / self._chips}
        rate = self._flops / seconds
        figures |= {"tflops_per_second": rate / 1e12, "tflops_per_second_per_chip": rate / 1e12 / self._chips}
        if self._peak is not None:
            figures["mfu"] = rate / self._chips / self._peak
        self.begin()
        return figures


def memory_in_use() -> dict[str, float]:
    """`hbm_gib` and `hbm_peak_gib`: what the fullest of this process's devices holds, now and at most; {} where they do not tell."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    names = {"hbm_gib": "bytes_in_use", "hbm_peak_gib": "peak_bytes_in_use"}
    return {name: max(s[key] for s in stats) / 2**30 for name, key in names.items() if stats and all(key in s for s in stats)}


class Goodput:
    """The share of the time since a stage's training first began that its updates took, over all sessions.

    `workdir`/goodput.json holds when that was, and the seconds that the updates up to each checkpoint took: a session goes on from
    those of the checkpoint that it was restored from. So whatever else the time went into is lost: updates behind the last checkpoint
    of a killed session, the time between sessions, start-up, compilation, checkpoints, samples, evaluations. Waiting for data is part of an
    update (`data_wait` is its share). Only process 0 writes.
    """

    def __init__(self, workdir: Any, restored_step: int, began: float, clock: Callable[[], float] = time.time) -> None:
        """`began`: when this session did, in the seconds of `clock`; of the first one it is kept."""
        self._path, self._clock = workdir / "goodput.json", clock
        self._began, self._productive = began, {0: 0.0}
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        if self._path.exists():
            try:
                stored = json.loads(self._path.read_text())
                productive = {int(step): float(seconds) for step, seconds in stored["productive"].items()}
                self._began = float(stored["began"])
                self._productive |= {step: seconds for step, seconds in productive.items() if step <= restored_step}
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                logger.warning("%s is damaged (%s): goodput counts from now", self._path, error)
        self._earlier = self._productive[max(self._productive)]
        self._write()

    def save(self, step: int, productive: float) -> None:
        """Before the checkpoint of `step`; `productive`: this session's seconds in updates so far."""
        if self._writes:
            self._productive[step] = self._earlier + productive
            self._write()

    def share(self, productive: float) -> float:
        """In [0, 1], now; NaN on other processes than 0."""
        return (self._earlier + productive) / max(self._clock() - self._began, 1e-9) if self._writes else math.nan

    def _write(self) -> None:
        write_json(self._path, {"began": self._began, "productive": self._productive})
