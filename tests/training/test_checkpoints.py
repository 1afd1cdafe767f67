import errno
import logging
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from ldm_jax.config import UserError
from ldm_jax.errors import TrainingFailed
from ldm_jax.sharding.mesh import make_mesh
from ldm_jax.sharding.rules import shardings
from ldm_jax.training import checkpoints as module
from ldm_jax.training.checkpoints import Checkpoints


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt: optax.OptState
    ema: dict


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


def make_state(step=0, width=256):
    params = {"dense": {"kernel": jax.random.normal(jax.random.key(step), (128, width)), "bias": jnp.zeros(width)}}
    return State(jnp.int32(step), params, TX.init(params), {"0.999": jax.tree.map(lambda p: p / 3, params)})


def abstract(state, mesh):
    shapes = jax.eval_shape(lambda: state)
    return jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings(shapes, mesh))


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_round_trip_between_meshes_is_bit_exact(tmp_path):
    mesh, other = make_mesh(2, 4), make_mesh(-1, 2, jax.devices()[:4])
    state = jax.device_put(make_state(7), jax.tree.map(lambda s: s.sharding, abstract(make_state(), mesh)))
    with Checkpoints(tmp_path, every=5) as checkpoints, jax.transfer_guard("disallow"):
        assert checkpoints.latest() is None
        checkpoints.save(7, state)
    with Checkpoints(tmp_path, every=5) as checkpoints, jax.transfer_guard("disallow"):
        assert checkpoints.latest() == 7
        restored = checkpoints.restore(abstract(state, other))
    assert_identical(restored, state)
    assert restored.params["dense"]["kernel"].sharding.mesh == other
    assert restored.params["dense"]["kernel"].addressable_shards[0].data.shape == (128, 128)


def test_donating_the_state_after_an_asynchronous_save_does_not_touch_it(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = make_state(3, width=4096)
    expected = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(3, state)
        for _ in range(5):
            state = step(state)
        checkpoints.wait()
        assert_identical(checkpoints.restore(abstract(state, make_mesh())), expected)


def test_due_keep_and_the_same_step_again(tmp_path):
    with Checkpoints(tmp_path, every=5, keep=2) as checkpoints:
        assert [n for n in range(12) if checkpoints.due(n)] == [5, 10]
        for n in (5, 10, 12):
            checkpoints.save(n, make_state(n))
        checkpoints.save(12, make_state(98), wait=True)
        assert int(checkpoints.restore(abstract(make_state(), make_mesh())).step) == 12
    with Checkpoints(tmp_path, every=5, keep=2) as checkpoints:
        checkpoints.save(12, make_state(99), wait=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "12"]
        assert int(checkpoints.restore(abstract(make_state(), make_mesh())).step) == 99
        assert int(checkpoints.restore(abstract(make_state(), make_mesh()), step=10).step) == 10
        with pytest.raises(UserError, match=r"no checkpoint of step 5 in .*; there are \[10, 12\]"):
            checkpoints.restore(abstract(make_state(), make_mesh()), step=5)


def test_every_leaf_that_differs_is_named(tmp_path):
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(1, make_state(1), wait=True)
        wanted = make_state(1)
        dense = {"kernel": jnp.zeros((128, 64)), "bias": jnp.zeros(256, jnp.bfloat16), "scale": jnp.zeros(256)}
        wanted = wanted.replace(params={"dense": dense}, ema={})
        with pytest.raises(UserError) as caught:
            checkpoints.restore(abstract(wanted, make_mesh()))
    message = str(caught.value)
    assert "in 5 leaves" in message and "\n" not in message
    assert "missing params/dense/scale: wanted float32[256]" in message
    assert "unexpected ema/0.999/dense/kernel: stored float32[128, 256]" in message
    assert "; params/dense/kernel: stored float32[128, 256], wanted float32[128, 64]" in message
    assert "; params/dense/bias: stored float32[256], wanted bfloat16[256]" in message


def largest_file(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage_by_truncation(directory):
    with largest_file(directory).open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)


def damage_by_loss(directory):
    largest_file(directory).unlink()


def damage_of_metadata(directory):
    (directory / "default" / "_METADATA").write_bytes(b"{")


def damage_by_emptying(directory):
    shutil.rmtree(directory / "default")


@pytest.mark.parametrize("damage", [damage_by_truncation, damage_by_loss, damage_of_metadata, damage_by_emptying])
def test_a_damaged_step_is_passed_over_loudly(tmp_path, caplog, damage):
    states = {n: make_state(n) for n in (1, 2)}
    with Checkpoints(tmp_path, every=1) as checkpoints:
        for n, state in states.items():
            checkpoints.save(n, state)
    damage(tmp_path / "2")
    target = abstract(states[1], make_mesh())
    with Checkpoints(tmp_path, every=1) as checkpoints:
        with caplog.at_level(logging.WARNING, "ldm_jax.training.checkpoints"):
            assert_identical(checkpoints.restore(target), states[1])
        assert "CHECKPOINT DAMAGED: step 2" in caplog.text
        assert checkpoints.latest() == 1
        checkpoints.save(2, states[2], wait=True)
        assert checkpoints.latest() == 2
        assert_identical(checkpoints.restore(target), states[2])


PASSING = [
    TimeoutError("a connection that timed out"),
    ConnectionResetError("reset"),
    OSError(errno.ESTALE, "Stale file handle"),
    ValueError("Error opening driver: Input/output error"),
    Exception("UNAVAILABLE: the storage is busy"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_a_reading_that_fails_for_a_moment_is_tried_again(tmp_path, monkeypatch, error):
    """Nothing is passed over, and nothing removed."""
    import orbax.checkpoint as ocp

    fails, read = [error, error], ocp.StandardCheckpointHandler.restore
    monkeypatch.setattr(module, "_WAITS", (0.0, 0.0, 0.0))

    def flaky(self, *args, **kwargs):
        if fails:
            raise fails.pop()
        return read(self, *args, **kwargs)

    with Checkpoints(tmp_path, every=1) as checkpoints:
        for n in (1, 2):
            checkpoints.save(n, make_state(n))
    monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", flaky)
    with Checkpoints(tmp_path, every=1) as checkpoints:
        assert int(checkpoints.restore(abstract(make_state(), make_mesh())).step) == 2
        fails[:] = [error] * 4
        with pytest.raises(TrainingFailed, match=f"{tmp_path}/2 cannot be read at the moment .*{type(error).__name__}: .*it stays"):
            checkpoints.restore(abstract(make_state(), make_mesh()))
        checkpoints.save(3, make_state(3), wait=True)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}


def test_what_was_found_damaged_stays_until_the_steps_have_passed_it(tmp_path):
    with Checkpoints(tmp_path, every=1) as checkpoints:
        for n in (10, 20):
            checkpoints.save(n, make_state(n))
    metadata = tmp_path / "20" / "default" / "_METADATA"
    whole = metadata.read_bytes()
    metadata.write_bytes(b"{")
    with Checkpoints(tmp_path, every=1) as checkpoints:
        assert int(checkpoints.restore(abstract(make_state(), make_mesh())).step) == 10
        for n in (11, 12):
            checkpoints.save(n, make_state(n), wait=True)
        assert {path.name for path in tmp_path.iterdir()} == {"11", "12", "20"} and checkpoints.latest() == 12
    metadata.write_bytes(whole)  # it was the disk
    with Checkpoints(tmp_path, every=1) as checkpoints:
        assert int(checkpoints.restore(abstract(make_state(), make_mesh())).step) == 20
    metadata.write_bytes(b"{")
    with Checkpoints(tmp_path, every=1) as checkpoints:
        assert int(checkpoints.restore(abstract(make_state(), make_mesh())).step) == 12
        checkpoints.save(21, make_state(21), wait=True)
    assert {path.name for path in tmp_path.iterdir()} == {"12", "21"}


@contextmanager
def small_files() -> Iterator[None]:
    """The disk takes no file of over 1 MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_for_failure(checkpoints):
    until = time.monotonic() + 60
    while not checkpoints.failed and time.monotonic() < until:
        time.sleep(0.01)
    assert checkpoints.failed


def test_a_save_that_failed_in_the_background_is_seen_and_the_next_one_tried(tmp_path, caplog):
    large = {n: make_state(n, width=8192) for n in (4, 5, 6)}
    with Checkpoints(tmp_path, every=1, keep=1) as checkpoints:
        checkpoints.save(3, make_state(3), wait=True)
        assert not checkpoints.failed
        with small_files():
            checkpoints.save(4, large[4])
            wait_for_failure(checkpoints)
            with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="no disk space left for checkpoints in"):
                checkpoints.save(5, large[5])  # waited for, as the one before has failed
            assert "the last checkpoint was not written" in caplog.text
        assert checkpoints.latest() == 3
        checkpoints.save(6, large[6], wait=True)
        assert not checkpoints.failed
        assert_identical(checkpoints.restore(abstract(large[6], make_mesh())), large[6])
    assert [path.name for path in tmp_path.iterdir()] == ["6"]


def test_nothing_readable_is_an_error(tmp_path):
    target = abstract(make_state(), make_mesh())
    with Checkpoints(tmp_path, every=1) as checkpoints:
        with pytest.raises(UserError, match="there is none"):
            checkpoints.restore(target)
        checkpoints.save(1, make_state(1), wait=True)
        checkpoints.save(2, make_state(2), wait=True)
    damage_of_metadata(tmp_path / "1")
    damage_of_metadata(tmp_path / "2")
    with Checkpoints(tmp_path, every=1) as checkpoints:
        with pytest.raises(UserError, match=r"no checkpoint in .* can be read; step 1: "):
            checkpoints.restore(target, step=1)
        with pytest.raises(UserError, match=r"no checkpoint in .* can be read; step 2: .*; step 1: "):
            checkpoints.restore(target)


def test_half_written_directory_is_ignored(tmp_path):
    with Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.save(2, make_state(2))
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path, every=1) as checkpoints:
        assert checkpoints.latest() == 1
        assert int(checkpoints.restore(abstract(make_state(), make_mesh())).step) == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: No space left on device")]
)
def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    with Checkpoints(tmp_path, every=1) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "save", fail)
            with pytest.raises(UserError, match="no disk space left for checkpoints in"):
                checkpoints.save(1, make_state())
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "wait_until_finished", fail)
            with pytest.raises(UserError, match="no disk space left for checkpoints in"):
                checkpoints.wait()


@pytest.mark.parametrize(("every", "keep"), [(0, 2), (5, 0)])
def test_bad_settings(tmp_path, every, keep):
    with pytest.raises(UserError, match="must be at least 1"):
        Checkpoints(tmp_path, every, keep)
