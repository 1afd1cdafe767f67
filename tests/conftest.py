"""Settings that must be in place before jax is imported: the CPU seen as eight devices, and one compilation cache for the run."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, where what is started here would be deaf to it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()

# Workers of pytest-xdist and subprocesses inherit the variable, so that all of them share the directory of the first.
_own_cache: str | None = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _own_cache = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ldm_jax_test_cache_")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Of all programs of a module: see `tiny.quick_compilation`."""
    from tests import tiny  # not above: it imports jax

    with tiny.quick_compilation():
        yield


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the cache, in the process that made it."""
    if _own_cache is not None:
        shutil.rmtree(_own_cache, ignore_errors=True)
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
