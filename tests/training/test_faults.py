"""Disks that fail: files cut short, no space left, no right to write. What was good stays, and the same command goes on from it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ldm_jax.sharding.mesh import make_mesh
from ldm_jax.training.checkpoints import Checkpoints
from tests.training.test_checkpoints import abstract, assert_identical, make_state

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.training.line_run"]
LIMIT = 300  # seconds a run may take before it counts as hung


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.splitlines()[-1]


def final(workdir: Path) -> list[np.ndarray]:
    """The leaves of the last checkpoint."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(workdir / "checkpoints", item_handlers=ocp.StandardCheckpointHandler()) as manager:
        return jax.tree.leaves(manager.restore(manager.latest_step()))


def assert_same_end(one: Path, other: Path) -> None:
    for x, y in zip(final(one), final(other), strict=True):
        np.testing.assert_array_equal(x, y)


def steps(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed")
    result = run(path, 24)
    assert result.returncode == 0, result.stderr
    return path


# Any file of a checkpoint, by what follows its step's directory; `data`: the largest one.
FILES = (
    "_CHECKPOINT_METADATA",
    "default/_METADATA",
    "default/_sharding",
    "default/array_metadatas/process_0",
    "default/manifest.ocdbt",
    "data",
)
READABLE_WITHOUT = {"_CHECKPOINT_METADATA"}  # Orbax does not need it


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two")
    with Checkpoints(path, every=1) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.save(2, make_state(2))
    return path


@pytest.mark.parametrize("size", ["half", "empty"])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_with_a_file_cut_short_is_passed_over(two_checkpoints: Path, tmp_path: Path, name: str, size: str) -> None:
    """It is removed when the next one is complete, and not before."""
    shutil.copytree(two_checkpoints, tmp_path / "c")
    files = [path for path in (tmp_path / "c" / "2").rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size) if name == "data" else tmp_path / "c" / "2" / name
    os.truncate(file, file.stat().st_size // 2 if size == "half" else 0)
    good = 2 if name in READABLE_WITHOUT else 1
    with Checkpoints(tmp_path / "c", every=1) as checkpoints:
        restored = checkpoints.restore(abstract(make_state(), make_mesh()))
        assert_identical(restored, make_state(good))
        assert {path.name for path in (tmp_path / "c").iterdir()} == {"1", "2"}
        checkpoints.save(3, make_state(3), wait=True)
        assert {path.name for path in (tmp_path / "c").iterdir()} == {str(good), "3"}


def test_a_damaged_checkpoint_of_the_number_that_is_due_is_replaced(two_checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(two_checkpoints, tmp_path / "c")
    (tmp_path / "c" / "2" / "default" / "_METADATA").write_text("{")
    with Checkpoints(tmp_path / "c", every=1, keep=1) as checkpoints:
        assert int(checkpoints.restore(abstract(make_state(), make_mesh())).step) == 1
        checkpoints.save(2, make_state(2), wait=True)
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"2"}
    with Checkpoints(tmp_path / "c", every=1) as checkpoints:
        assert_identical(checkpoints.restore(abstract(make_state(), make_mesh())), make_state(2))


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_was_cut_short_ends_as_if_nothing_had_been(undisturbed: Path, tmp_path: Path) -> None:
    assert run(tmp_path, 12).returncode == 0
    largest = max((p for p in (tmp_path / "checkpoints" / "12").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    result = run(tmp_path, 24)
    assert result.returncode == 0 and "CHECKPOINT DAMAGED: step 12" in result.stderr
    assert_same_end(tmp_path, undisturbed)

    for file in (tmp_path / "checkpoints").glob("*/default/manifest.ocdbt"):
        os.truncate(file, 10)
    result = run(tmp_path, 28)
    assert (
        result.returncode == 2 and "can be read; step 24: " in last_line(result) and last_line(result).startswith("error: no checkpoint in")
    )
    assert steps(tmp_path) == ["20", "24"]  # nothing is begun anew, and nothing removed


@pytest.mark.slow
def test_a_checkpoint_that_the_disk_does_not_take_stops_the_run_with_one_line(undisturbed: Path, tmp_path: Path) -> None:
    """Here by a limit on the size of a file, which every system has."""
    assert run(tmp_path, 8).returncode == 0
    limited = ["bash", "-c", 'ulimit -f 1024; exec "$@"', "bash", *COMMAND, str(tmp_path), "24"]  # KiB
    result = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert result.returncode == 2 and "error: no disk space left for checkpoints in" in last_line(result)
    assert {"4", "8"} <= set(steps(tmp_path))
    assert run(tmp_path, 24).returncode == 0
    assert steps(tmp_path) == ["20", "24"]
    assert_same_end(tmp_path, undisturbed)


# Five times, as which of the leaves are waited for when the first one fails is a matter of chance.
MANY_LEAVES = """
import resource, sys
import jax
from ldm_jax import cli
from ldm_jax.config import UserError
from ldm_jax.training.checkpoints import Checkpoints

def main():
    cli.start()
    state = {str(i): jax.random.normal(jax.random.key(i), (200,)) for i in range(100)}
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for attempt in range(5):
        try:
            with Checkpoints(f"{sys.argv[1]}/{attempt}", every=1) as checkpoints:
                checkpoints.save(1, state, wait=True)
                resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
                checkpoints.save(2, state, wait=True)
        except UserError as error:
            last = error
        else:
            raise AssertionError("written")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    raise last

cli.guarded(main)
"""


def test_what_becomes_of_the_other_leaves_when_one_is_not_written_is_not_told(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MANY_LEAVES, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert result.returncode == 2 and "error: no disk space left for checkpoints in" in last_line(result)
    assert not re.search("Traceback|never retrieved|never awaited", result.stderr), result.stderr


def mounts(script: str, *arguments: Any) -> str:
    """What a shell script prints that may mount file systems; nobody else sees them."""
    shell = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-euo", "pipefail", "-c", script, "bash", *map(str, arguments)]
    result = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=4 * LIMIT)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def can_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("mount")
    try:
        mounts('mount -t tmpfs -o size=1m none "$1"', path)
    except (AssertionError, OSError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")


# `go ARGUMENTS` prints the exit code and the last line of a run.
GO = """
go() { code=0; timeout 300 "${@}" 2> "$log" || code=$?; echo "$code $(tail -n 1 "$log" | tr '\\r' '\\n' | tail -n 1)"; }
disk=$1 log=$2; shift 2
"""


@pytest.mark.slow
def test_a_full_disk_while_saving_leaves_the_last_checkpoints_and_the_next_run_goes_on(
    can_mount: None, undisturbed: Path, tmp_path: Path
) -> None:
    script = """
    mount -t tmpfs -o size=10m none "$disk"
    go "$@" "$disk/run" 24
    ls "$disk/run/checkpoints"
    go "$@" "$disk/run" 24
    echo again
    mount -o remount,size=64m "$disk"
    go "$@" "$disk/run" 24
    ls "$disk/run/checkpoints"
    cp -r "$disk/run" "$log.run"
    """
    (tmp_path / "disk").mkdir()
    first, again = mounts(GO + script, tmp_path / "disk", tmp_path / "log", *COMMAND).split("again\n")
    for line in (first.splitlines()[0], first.splitlines()[-1]):
        assert line.startswith("2 error: no disk space left for checkpoints in"), first
    assert {"4", "8"} <= set(first.splitlines())
    assert again.split("\n")[0].startswith("0") and again.splitlines()[1:] == ["20", "24"]
    assert_same_end(tmp_path / "log.run", undisturbed)


@pytest.mark.slow
def test_a_disk_that_fills_up_between_checkpoints_stops_the_run(can_mount: None, undisturbed: Path, tmp_path: Path) -> None:
    """Metrics do not fit any more; nobody waits for ever for a writer that has died."""
    script = """
    mount -t tmpfs -o size=32m none "$disk"
    go "$@" "$disk/run" 8 8
    ( until [ "$(wc -l < "$disk/run/metrics.jsonl")" -ge 10 ]; do sleep 0.05; done; cat /dev/zero > "$disk/ballast" || true ) 2> /dev/null &
    go "$@" "$disk/run" 400 200 0.1
    wait
    go "$@" "$disk/run" 24 200
    rm "$disk/ballast"
    go "$@" "$disk/run" 24 24
    cp -r "$disk/run" "$log.run"
    """
    (tmp_path / "disk").mkdir()
    lines = mounts(GO + script, tmp_path / "disk", tmp_path / "log", *COMMAND).splitlines()
    assert [line.split()[0] for line in lines] == ["0", "2", "2", "0"], lines
    assert lines[1].startswith("2 error: cannot write the metrics in") and "No space left on device" in lines[2]
    assert_same_end(tmp_path / "log.run", undisturbed)


@pytest.mark.slow
def test_a_read_only_work_directory_is_one_line(can_mount: None, undisturbed: Path, tmp_path: Path) -> None:
    script = """
    mount --bind "$disk" "$disk"
    mount -o remount,ro,bind "$disk"
    go "$@" "$disk" 28
    """
    shutil.copytree(undisturbed, tmp_path / "run")
    line = mounts(GO + script, tmp_path / "run", tmp_path / "log", *COMMAND)
    assert line.startswith("2 error: cannot write ") and line.endswith("Read-only file system\n"), line
    assert_same_end(tmp_path / "run", undisturbed)
    assert run(tmp_path / "run", 28).returncode == 0 and steps(tmp_path / "run") == ["24", "28"]


def test_a_path_below_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(tmp_path / "file" / "run", 8)
    assert result.returncode == 2 and last_line(result).startswith("error: "), result.stderr
