"""What the front doors share: flags, set-up of the process, errors to exit codes. Imports nothing slow."""

import argparse
import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable

from ldm_jax.errors import BAD_INPUT, FAILED, INTERRUPTED, OK, STOPPED, NotJoined, Stopped, TrainingFailed, UserError

# XLA's CPU backend takes its scratch memory, hundreds of megabytes, from malloc for each execution and gives it back. By default glibc
# returns it to the kernel each time, and the page faults of the next execution cost a third of a training step.
_GLIBC_TUNABLES = {"hugetlb": 1, "mmap_max": 0, "trim_threshold": 2**34, "top_pad": 2**28}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2."""

    def error(self, message: str) -> None:  # type: ignore[override]
        sys.stderr.write(f"error: {message}; see --help\n")
        sys.exit(BAD_INPUT)


def config_parser(description: str) -> Parser:
    """The flags of a command that takes a configuration."""
    parser = Parser(description=description, epilog="Any field of the configuration is set by --config.group.field=value.")
    parser.add_argument("--config", required=True, metavar="FILE[:PRESET]", help="a file under configs/, with a preset of it")
    parser.add_argument("--workdir", required=True, help="where the run keeps everything; the same command goes on where it stopped")
    parser.add_argument("--coordinator", help="address of process 0 for a multi-process run that no cluster environment describes")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    return parser


def start(
    dtype: str = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    join: bool = True,
) -> None:
    """Sets the process up before anything touches a device: logging, cluster (`join`), float64 where asked for."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    _tell_errors_once()
    from ldm_jax.sharding import watch
    from ldm_jax.sharding.distributed import initialize
    from ldm_jax.sharding.flags import set_environment

    set_environment(os.environ)  # read when the first device is touched
    import jax

    if join and initialize(coordinator, num_processes, process_id):
        watch.start()
    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)


def _tell_errors_once() -> None:
    """Where a leaf of a checkpoint cannot be read or written, its error is raised, and told by `guarded`. Orbax logs the traceback of it as
    well, and what becomes of the other leaves is told by all those that were at work on them, at the end even after that line."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = lambda found: None if str(found.exc_value) == "Event loop is closed" else sys.__unraisablehook__(found)


def keep_freed_memory() -> None:
    """Starts this very command again with an allocator that keeps freed memory, in huge pages: glibc reads its settings at start only.

    Does nothing on other systems, and where GLIBC_TUNABLES is set, as it is after the first time.
    """
    if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in os.environ or not sys.orig_argv[1:]:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.{name}={value}" for name, value in _GLIBC_TUNABLES.items())
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def guarded(main: Callable[[], int]) -> None:
    """Runs a front door: bad input is one line and exit code 2, a stop with a complete checkpoint 75, an interrupt 130. Of several
    processes all end, with the code and for the reason of the first."""
    code, line, unexpected = OK, "", False
    try:
        code = main()
    except UserError as error:
        code, line = BAD_INPUT, f"error: {error}"
    except (TrainingFailed, NotJoined) as error:
        code, line = FAILED, f"error: {error}"
    except Stopped as stop:
        code, line = STOPPED, str(stop)
    except KeyboardInterrupt:
        code, line = INTERRUPTED, "interrupted"
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            where = f" {error.filename}" if error.filename else ""
            code, line = BAD_INPUT, f"error: cannot write{where}: {error.strerror}; mend that and run the same command again"
        else:
            traceback.print_exc()
            code, line, unexpected = FAILED, f"error: {type(error).__name__}: {str(error).partition(chr(10))[0]}", True
    if "ldm_jax.sharding.watch" in sys.modules and (group := sys.modules["ldm_jax.sharding.watch"].current()):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another Ctrl-C does not wait for the others
        group.leave(code, line, unexpected)
    if line:
        sys.stderr.write(f"{line}\n")
    sys.exit(code)
