"""How the processes of a run end together: stopped at one step, by the failure of one, or by the loss of one.

A thread in each process looks once a second at the key-value store of the coordination service, so that neither a device nor the loop
waits for it. Under `PREFIX` there are:

    news/stop        somebody was asked to stop
    news/left/P      {"code", "line", "own"}: process P has ended, or is about to; "own" says whether for a reason of its own
    news/lost/P      process P has gone without a word
    news/stalled     the line that says that no process gets on, and who is behind
    turn/P           the first step that process P has not begun, written once it has heard of the stop
    beat/P           {"count", "place"}: a count that goes up while process P lives, and where it is, as `stall.Stall` is told

jax has a mechanism of its own for lost processes: it aborts the rest with a stack trace, at once where process 0 is gone and after
`HEARTBEAT` seconds where another one is. It stays as the second line of defence, with a clear last word (`on_abort`).
"""

import ctypes
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax._src.distributed import global_state

from ldm_jax.errors import FAILED, OK, STOPPED
from ldm_jax.sharding.processes import PREFIX, client, wait_for_all
from ldm_jax.sharding.stall import OUTSIDE, Stall, stall_line

INTERVAL = 1.0  # seconds between two looks
BEAT = 5  # looks between two beats
LOST_AFTER = 45.0  # seconds without a beat
HEARTBEAT = 90  # seconds after which jax itself gives a process up
_LINGER = 15.0  # seconds for which process 0, with which the store goes, waits for the others to end
_SILENT = 12.0  # seconds in which a living process has beaten at least once
_AGAIN = "the same command goes on from the last checkpoint"


class Watch:
    """This process's part in ending together. `asked` is True once any process was asked to stop; `stall_after` are the seconds without
    a new turn of the loop in any process after which all end, 0 for no limit."""

    def __init__(self) -> None:
        self.me, self.number = global_state.process_id, global_state.num_processes
        self.asked, self.stall_after = False, 0.0
        self._store = client()
        self._turns = threading.Condition()
        self._turn: int | None = None  # that the loop is in
        self._loops = 0  # left behind
        self._paused = False
        self._announced = False
        self._stop_at: int | None = None
        self._ending = False
        self._hurry: float | None = None  # when to end without waiting for the main thread
        self._leaving = threading.Lock()
        self._ended = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}  # of each process its last beat, and when it came
        self._stall = Stall()
        self._beat(0)
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def stops_before(self, turn: int) -> bool:
        """Whether all processes stop before they begin this turn of a loop; to be asked before each, in the same order by all."""
        with self._turns:
            while self._announced and self._stop_at is None:  # this turn may lie behind the one that is agreed on
                self._turns.wait(INTERVAL)
            if self._turn is None:
                self._hurry = None  # in the loop a stop is agreed on, even if it was heard before
            self._turn = turn
            return self._stop_at is not None and turn >= self._stop_at

    def leave_turns(self, ending: bool) -> None:
        """The loop is over: from here on a stop needs no agreement. Where this process is `ending` anyway it needs no push either."""
        with self._turns:
            self._turn, self._ending = None, ending
            self._loops += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what may take as long as it likes."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def leave(self, code: int, line: str = "", unexpected: bool = False) -> None:
        """Ends this process, and the others with it; comes back, when all are here, only for a `code` of 0.

        Args:
          line: the last one on the standard error.
          unexpected: whether the failure may come from that of another process; then it is looked for, and named.
        """
        if code == OK:
            wait_for_all()
            self._ended.set()
            self._thread.join()
            return
        if unexpected:
            code, line = self._blamed() or (code, line)
        self._leave(code, line)

    def _leave(self, code: int, line: str, own: bool = True) -> None:
        with self._turns:
            self._ending = True  # whatever becomes of the others meanwhile
        self._leaving.acquire()  # never released: one thread ends the process, and the other waits for that
        try:
            self._tell(f"left/{self.me}", json.dumps({"code": code, "line": line, "own": own}))
            until = time.monotonic() + _LINGER
            while self.me == 0 and len(_of(self._news(), "left") | _of(self._news(), "lost")) < self.number and time.monotonic() < until:
                time.sleep(0.1)
        except jax.errors.JaxRuntimeError:
            pass  # process 0 is gone, and with it the store; the reason is printed all the same
        sys.stdout.flush()
        sys.stderr.write(f"\n{line}\n" if line else "")  # a progress bar has not ended its line
        sys.stderr.flush()
        os._exit(code)

    def _look(self) -> None:
        for count in itertools.count(1):
            if self._ended.wait(INTERVAL):
                return
            try:
                if count % BEAT == 0:
                    self._beat(count)
                    self._listen()
                news = self._news()
                if failure := self._failure(news):
                    self._leave(*failure, own=False)
                self._hear_of_stop(news)
            except jax.errors.JaxRuntimeError:
                continue  # where process 0 is gone jax ends this process, within moments
            if self._hurried():
                self._leave(STOPPED, f"stopped; {_AGAIN}")

    def _hurried(self) -> bool:
        with self._turns:
            return self._hurry is not None and time.monotonic() > self._hurry

    def _news(self) -> dict[str, str]:
        return self._read("news")

    def _read(self, directory: str) -> dict[str, str]:
        start = f"{PREFIX}/{directory}/"
        return {name.removeprefix(start): value for name, value in self._store.key_value_dir_get(start)}

    def _tell(self, name: str, text: str = "") -> None:
        self._store.key_value_set(f"{PREFIX}/news/{name}", text, allow_overwrite=True)

    def _beat(self, count: int) -> None:
        with self._turns:
            place = None if self._paused else (self._loops, OUTSIDE if self._turn is None else self._turn)
        self._store.key_value_set(f"{PREFIX}/beat/{self.me}", json.dumps({"count": count, "place": place}), allow_overwrite=True)

    def _listen(self) -> None:
        """Notes whose beats have gone on, and tells of those whose have not, or that nobody gets on. Process 0 listens to all, the others
        to it."""
        beats, now = self._read("beat"), time.monotonic()
        for process in range(self.number) if self.me == 0 else (0,):
            beat = beats.get(str(process), "")
            if process not in self._heard or self._heard[process][0] != beat:
                self._heard[process] = (beat, now)
            elif now - self._heard[process][1] > LOST_AFTER and process not in _of(self._news(), "left"):
                self._tell(f"lost/{process}")
        if self.me == 0:
            places = {int(process): json.loads(beat)["place"] for process, beat in beats.items()}
            if behind := self._stall.behind(places, now, self.stall_after):
                self._tell("stalled", f"{stall_line(behind, places, self.stall_after)}; {_AGAIN}")

    def _failure(self, news: dict[str, str]) -> tuple[int, str] | None:
        """The exit code and the last line where another process has failed or is lost, or none gets on."""
        for process, text in _of(news, "left").items():
            left = json.loads(text)
            if left["own"] and left["code"] not in (OK, STOPPED) and process != self.me:
                return left["code"], f"error: process {process} of {self.number} has ended: {left['line'].removeprefix('error: ')}"
        for process in _of(news, "lost"):
            return FAILED, self._lost(process)
        return (FAILED, news["stalled"]) if "stalled" in news else None

    def _lost(self, process: int) -> str:
        return f"error: process {process} of {self.number} is lost, nothing is heard of it; {_AGAIN}"

    def _blamed(self) -> tuple[int, str] | None:
        """As `_failure`, after time enough to see whose beats have ended."""
        try:
            before, until = self._read("beat"), time.monotonic() + _SILENT
            while time.monotonic() < until:
                if found := self._failure(self._news()):
                    return found
                time.sleep(0.2)
            after, left = self._read("beat"), _of(self._news(), "left")
            silent = [int(p) for p, beat in before.items() if after.get(p) == beat and int(p) not in left]
            if others := sorted({*silent} - {self.me}):
                self._tell(f"lost/{others[0]}")
                return FAILED, self._lost(others[0])
        except jax.errors.JaxRuntimeError:
            return FAILED, self._lost(0)
        return None

    def _hear_of_stop(self, news: dict[str, str]) -> None:
        gone = any(json.loads(text)["code"] == STOPPED for process, text in _of(news, "left").items() if process != self.me)
        heard = gone or "stop" in news
        if self.asked and not heard:
            self._tell("stop")
        self.asked |= heard
        if self.asked:
            self._agree(gone)

    def _agree(self, gone: bool) -> None:
        """The step that all stop before is the first that none has begun; nothing is begun between saying it and knowing it.

        Where a process is in no loop, or has left before that step, there is nothing to agree on: each ends where it is.
        """
        with self._turns:
            if self._ending:
                return
            if self._turn is None or (gone and (self._stop_at is None or self._turn < self._stop_at)):
                if self._hurry is None:
                    os.kill(os.getpid(), signal.SIGTERM)  # to the main thread, which may be in a call that does not hear it
                    self._hurry = time.monotonic() + _LINGER / 2
                return
            if self._stop_at is not None:
                return
            if not self._announced:
                self._announced = True
                self._store.key_value_set(f"{PREFIX}/turn/{self.me}", str(self._turn + 1))
            turns = self._read("turn")
            if len(turns) == self.number:
                self._stop_at = max(map(int, turns.values()))
                self._turns.notify_all()


def _of(news: dict[str, str], kind: str) -> dict[int, str]:
    """The news of one kind, by process."""
    return {int(name.partition("/")[2]): text for name, text in news.items() if name.startswith(f"{kind}/")}


_watch: Watch | None = None
_on_abort: Any = None  # kept, as C has no reference


def start() -> None:
    """Begins the watch, in a run of several processes whose `jax.distributed` is set up."""
    global _watch
    if client() is not None and _watch is None:
        _watch = Watch()


def current() -> Watch | None:
    """This process's watch; None where it is the only one."""
    return _watch


def on_abort(line: Callable[[], str]) -> None:
    """From now on SIGABRT, by which jax and XLA end a process, is exit code 1 with a last line on the standard error.

    A handler in C: Python's own would wait for the main thread, which does not come back.
    """
    global _on_abort

    def say(number: int) -> None:
        os.write(2, f"\n{line()}\n".encode())
        os._exit(FAILED)

    _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(say)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _on_abort)


def abort_line() -> str:
    """What there is to say of an abort once the processes have met."""
    me, number = global_state.process_id, global_state.num_processes
    lost = "process 0 is lost" if me else "another process is lost"
    return f"error: process {me} of {number} cannot go on: {lost}, or as is said above; {_AGAIN}"
