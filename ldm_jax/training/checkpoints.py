"""Checkpoints of the training state: asynchronous, bit exact, restored to any mesh.

`directory`/<step>/ is written by Orbax under a temporary name and renamed when it is complete, so that a kill leaves nothing half-written
that counts. Orbax takes long to import, hence the imports inside functions.
"""

import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import jax

from ldm_jax.config import UserError
from ldm_jax.errors import BAD_INPUT, FAILED, TrainingFailed, first_line
from ldm_jax.paths import absolute, passes
from ldm_jax.sharding import watch
from ldm_jax.sharding.processes import exchange, from_first
from ldm_jax.sharding.rules import path_string

logger = logging.getLogger(__name__)
_ITEM = "default"  # Orbax's name of what is saved without one
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
# What says nothing of the checkpoint itself: of the disk or the network, of rights that are not there at the moment, and by Tensorstore.
_PASSING = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ETIMEDOUT, errno.ENOMEM)
_PASSING_WORDS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "UNAUTHENTICATED", "PERMISSION_DENIED")
_WAITS = (1.0, 5.0, 25.0)  # seconds before a reading that failed so is tried again


class _Newest:
    """Orbax's preservation policy: the newest `keep` good ones (None: all), and damaged ones with a higher number than all of these, as
    they might turn out to be good. The others go once the new one is complete."""

    def __init__(self, keep: int | None, damaged: Collection[int]) -> None:
        self._keep, self._damaged = keep, damaged

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        good = sorted({info.step for info in checkpoints} - set(self._damaged))
        newest = good if self._keep is None else good[-self._keep :]
        return [info.step in newest or info.step > max(good, default=0) for info in checkpoints]


class Checkpoints:
    """The checkpoints of one run: `every` steps, the newest `keep` of them kept (None: all)."""

    def __init__(self, directory: str | os.PathLike[str], every: int, keep: int | None = 2, read_only: bool = False) -> None:
        """Opens `directory`, making it where there is none; `read_only` where another process may be writing there.

        Raises:
            UserError: `every` or `keep` is not positive.
        """
        import orbax.checkpoint as ocp
        from orbax.checkpoint import multihost

        if every < 1 or (keep is not None and keep < 1):
            raise UserError(f"checkpoint.every={every} and checkpoint.keep={keep} must be at least 1")
        self._directory = absolute(directory)
        self._every = every
        self._damaged: list[int] = []
        self._at: int | None = None  # the step last saved or restored here
        self.failed = False  # whether the save in the background has failed; in a run of several processes that ends all of them
        self._barrier = multihost.get_barrier_sync_fn()
        if read_only:  # Orbax's own default would remove what another process is about to complete
            self._options = ocp.CheckpointManagerOptions(read_only=True, create=False)
        else:
            self._options = ocp.CheckpointManagerOptions(
                preservation_policy=_Newest(keep, self._damaged),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(barrier_sync_fn=self._meet),
            )
        self._manager = self._open()

    def _open(self) -> Any:
        import orbax.checkpoint as ocp

        with self._disk_errors():
            return ocp.CheckpointManager(self._directory, options=self._options, item_handlers=ocp.StandardCheckpointHandler())

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after update number `step`."""
        return step > 0 and step % self._every == 0

    def latest(self) -> int | None:
        """The newest complete step that was not found damaged; None where there is none."""
        return max(self._present() - set(self._damaged), default=None)

    def _present(self) -> set[int]:
        """The complete steps, as process 0 sees them."""
        return set(from_first(lambda: [int(step) for step in self._manager.all_steps()]))

    def save(self, step: int, state: Any, wait: bool = False) -> None:
        """Saves a pytree of arrays as `step`; the writing goes on in the background unless `wait`.

        The state is copied before this returns, so that the next step may be given its buffers. The step last saved or restored is left
        as it is; another one of the same number, damaged or from an earlier run, is replaced. Old ones are removed only when the new one
        is complete, and damaged ones when one with a higher number is. Where the save before this one has failed, which a warning says,
        this one is waited for.

        Raises:
            UserError: no disk space.
        """
        import orbax.checkpoint as ocp

        again = self._settle()
        with self._disk_errors(), jax.transfer_guard("allow"):
            present = self._present()
            if step != self._at or step not in present:
                if step in present:
                    self._manager.delete(step)
                    self._damaged[:] = [damaged for damaged in self._damaged if damaged != step]
                self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
                self._at = step
        if wait or again:
            self.wait()

    def _settle(self) -> bool:
        """Waits for the save before; where it has failed, what it left is removed. Returns whether it has."""
        try:
            self.wait()
        except Exception as error:
            if watch.current() is not None:
                raise
            self.failed = True
            logger.warning("the last checkpoint was not written (%s); the state of now is saved instead", first_line(error))
        if not self.failed:
            return False
        self._manager.close()
        self._manager, self.failed, self._at = self._open(), False, None
        return True

    def restore(self, abstract_state: Any, step: int | None = None) -> Any:
        """The state of `step`, or the newest that can be read, on the devices of the shardings in `abstract_state`.

        A damaged newest checkpoint is passed over with a warning, and removed once there is one with a higher number; one asked for by
        `step` is not. What may pass, such as a connection that breaks, is no damage: it is tried again, in some `sum(_WAITS)` seconds.

        Args:
            abstract_state: a tree of `jax.ShapeDtypeStruct`, each with its sharding, on whatever mesh.
            step: a step that is there.

        Raises:
            UserError: there is no such checkpoint, none can be read, or it holds another tree, shape or dtype (every leaf is named).
            TrainingFailed: it cannot be read at the moment.
        """
        steps = sorted(self._present() - set(self._damaged), reverse=True)
        if step is not None and step not in steps:
            raise UserError(f"no checkpoint of step {step} in {self._directory}; there are {sorted(steps) or 'none'}")
        reasons = []
        for candidate in steps if step is None else [step]:
            state, reason = self._read_again(candidate, abstract_state)
            if reason:
                logger.warning("CHECKPOINT DAMAGED: step %d in %s is passed over (%s)", candidate, self._directory, reason)
                reasons.append(f"step {candidate}: {reason}")
                if step is None:
                    self._damaged.append(candidate)
            else:
                self._at = candidate
                return state
        raise UserError(f"no checkpoint in {self._directory} can be read; {'; '.join(reasons) or 'there is none'}")

    def wait(self) -> None:
        """Blocks until what is being written is complete.

        Raises:
            UserError: no disk space.
        """
        with self._disk_errors():
            try:
                self._manager.wait_until_finished()
            except Exception:
                self._manager.reload()  # it has forgotten what the save would have replaced
                raise

    def close(self) -> None:
        """Waits, and gives the background threads back."""
        with self._disk_errors():
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _read_again(self, step: int, abstract_state: Any) -> tuple[Any, str]:
        """(the state of a step, "") or (None, why it is damaged), the same in all processes. Raises TrainingFailed, UserError."""
        for wait in (*_WAITS, None):
            state, reason, passing = None, "", False
            try:
                state = self._read(step, abstract_state)
            except Exception as error:
                # Orbax raises a plain `Exception` where the chunk of an array cannot be read: no narrower clause would catch it.
                if type(error) is not Exception and not isinstance(error, OSError | ValueError | LookupError) and not passes(error):
                    raise
                passing = passes(error) or _number(error, _PASSING) is not None or any(word in str(error) for word in _PASSING_WORDS)
                reason = f"{type(error).__name__}: {first_line(error)}"[:300]
            said = [told for told in exchange([reason, passing]) if told[0]]  # each process reads its own parts
            transient = next((told[0] for told in said if told[1]), "")
            if not transient:
                return state, said[0][0] if said else ""
            if wait is not None:
                logger.warning("step %d in %s cannot be read (%s); again in %g s", step, self._directory, transient, wait)
                time.sleep(wait)
        raise TrainingFailed(
            f"the checkpoint {self._directory}/{step} cannot be read at the moment ({transient}); it stays, and the same command tries"
            " again: remove it to go on from the one before"
        )

    def _read(self, step: int, abstract_state: Any) -> Any:
        import orbax.checkpoint as ocp

        metadata = self._manager.item_metadata(step)
        if metadata is None:
            raise ValueError("its metadata is missing")
        _check_same_leaves(metadata.tree, abstract_state, f"{self._directory}/{step}")
        with jax.transfer_guard("allow"):  # not by the manager: where one process fails, the others would wait for it
            return ocp.StandardCheckpointHandler().restore(
                self._directory / str(step) / _ITEM, args=ocp.args.StandardRestore(abstract_state)
            )

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """The barrier of Orbax's threads. One that comes here with an error has not written its part, and would let the others wait for 20
        minutes, each at another barrier: of several processes all end."""
        error = None if threading.current_thread() is threading.main_thread() else sys.exc_info()[1]
        group = watch.current()
        if error is None:
            self._barrier(key=key, timeout_ms=timeout_ms)
        elif group is None:
            self.failed = True
        else:
            try:
                with self._disk_errors():
                    raise error
            except UserError as told:
                group.leave(BAD_INPUT, f"error: {told}")
            except Exception as other:
                group.leave(FAILED, f"error: a checkpoint was not written: {type(other).__name__}: {first_line(other)}", unexpected=True)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            # Tensorstore reports what the disk says as a ValueError with the system's words in it.
            number = _number(error, (*_FULL, *_REFUSED))
            if number is None:
                raise
            if number in _FULL:
                advice = (
                    f"no disk space left for checkpoints in {self._directory} ({os.strerror(number)}): free some, or lower checkpoint.keep"
                )
            else:
                advice = f"cannot write checkpoints in {self._directory}: {os.strerror(number)}"
            raise UserError(f"{advice}; the same command goes on from the last complete one") from error


def _number(error: BaseException, numbers: tuple[int, ...]) -> int | None:
    """Which of the system's errors this one is, or has the words of."""
    return next((n for n in numbers if getattr(error, "errno", None) == n or os.strerror(n) in str(error)), None)


def _check_same_leaves(stored_tree: Any, wanted_tree: Any, where: str) -> None:
    """Raises a UserError that lists every leaf in which the two trees differ."""

    def leaves(tree: Any) -> dict[str, str]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {path_string(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in flat}

    stored, wanted = leaves(stored_tree), leaves(wanted_tree)
    lines = [f"missing {name}: wanted {wanted[name]}" for name in sorted(wanted.keys() - stored.keys())]
    lines += [f"unexpected {name}: stored {stored[name]}" for name in sorted(stored.keys() - wanted.keys())]
    lines += [
        f"{name}: stored {stored[name]}, wanted {wanted[name]}"
        for name in sorted(stored.keys() & wanted.keys())
        if stored[name] != wanted[name]
    ]
    if lines:
        raise UserError(f"checkpoint {where} does not fit this configuration in {len(lines)} leaves: " + "; ".join(lines))
