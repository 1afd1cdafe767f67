import itertools
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_jax.config import UserError
from ldm_jax.data.order import coin_flips, permuted
from ldm_jax.data.pipeline import Batches, stack


class Numbers:
    """Example i holds i in every entry."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = np.zeros((4, 4, 3), np.uint8)
        image[:, 0] = index
        boxes = np.tile(np.array([[index, 0.0, 0.1, 0.25, 0.5]], np.float32), (1 + index % 3, 1))
        segmentation = image[..., 0].copy()
        return {"image": image, "text": f"n {index}", "label": index, "boxes": boxes, "segmentation": segmentation}

    def fingerprint(self) -> str:
        return f"numbers-{self.size}"


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys() and a["text"] == b["text"]
    for key in ("image", "label", "segmentation"):
        np.testing.assert_array_equal(a[key], b[key])
    for left, right in zip(a["boxes"], b["boxes"], strict=True):
        np.testing.assert_array_equal(left, right)


def test_batches_have_the_promised_types() -> None:
    batch = Batches(Numbers(20), 6, seed=0).batch(0)
    assert batch["image"].dtype == np.uint8 and batch["image"].shape == (6, 4, 4, 3)
    assert batch["label"].dtype == np.int32 and batch["segmentation"].shape == (6, 4, 4)
    assert isinstance(batch["text"], list) and batch["text"] == [f"n {i}" for i in batch["label"]]
    assert isinstance(batch["boxes"], list) and batch["boxes"][0].shape[1] == 5


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**40), st.integers(0, 5000))
def test_every_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = permuted(np.arange(size), np.full(size, epoch), size, seed)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_epochs_and_seeds_differ_and_nothing_is_left_out() -> None:
    batches = Batches(Numbers(50), 8, seed=3)
    order = np.concatenate([batches.indices(step) for step in range(25)]).reshape(4, 50)  # batches straddle epochs
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(50), (4, 1)))
    other = np.concatenate([Batches(Numbers(50), 8, seed=4).indices(step) for step in range(25)]).reshape(4, 50)
    for a, b in itertools.combinations([*order, *other], 2):
        assert (a == b).mean() < 0.3
    straight = Batches(Numbers(5), 4, seed=3, shuffle=False)
    assert straight.indices(1).tolist() == [4, 0, 1, 2]


def test_batch_larger_than_the_source() -> None:
    assert sorted(Batches(Numbers(3), 9, seed=0).indices(2).tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("workers", [1, 4])
def test_iterating_from_any_step_equals_random_access(workers: int) -> None:
    batches = Batches(Numbers(30), 4, seed=1, flip=True, workers=workers)
    for start in (0, 5, 10**9):
        iterator = batches.iterate(start)
        for step in range(start, start + 12):
            assert_same(next(iterator), batches.batch(step))
        iterator.close()


@pytest.mark.parametrize("count", [2, 4])
def test_shares_of_several_hosts_make_the_global_batch(count: int) -> None:
    whole = Batches(Numbers(30), 8, seed=1, flip=True).batch(7)
    rows = np.arange(8).reshape(count, -1)
    shares = [Batches(Numbers(30), 8, 1, own, flip=True).batch(7) for own in rows]
    for key in ("image", "label", "segmentation"):
        np.testing.assert_array_equal(np.concatenate([share[key] for share in shares]), whole[key])
    assert [text for share in shares for text in share["text"]] == whole["text"]
    odd = Batches(Numbers(30), 8, 1, (1, 4, 6), flip=True).batch(7)
    np.testing.assert_array_equal(odd["image"], whole["image"][[1, 4, 6]])


def test_flips_move_every_map_and_are_fair() -> None:
    batch = Batches(Numbers(200), 200, seed=5, flip=True).batch(0)
    flipped = batch["image"][:, 0, 0, 0] != batch["label"]
    assert 70 < flipped.sum() < 130
    np.testing.assert_array_equal(batch["segmentation"], batch["image"][..., 0])
    left = np.array([boxes[0, 1] for boxes in batch["boxes"]])
    drawn = batch["label"] > 0
    np.testing.assert_allclose(left[drawn], np.where(flipped, 0.75, 0.0)[drawn])


def test_coins_are_fair_and_uncorrelated_in_position_and_seed() -> None:
    coins = np.stack([coin_flips(seed, np.arange(20_000)) for seed in range(4)]) - 0.5
    correlations = np.corrcoef(np.concatenate([coins[:, :-1], coins[:, 1:]])) - np.eye(8)
    assert np.abs(coins.mean(axis=1)).max() < 0.02 and np.abs(correlations).max() < 0.04


def test_transform_sees_the_stacked_batch() -> None:
    def tokenise(batch: dict[str, Any]) -> dict[str, Any]:
        return {"tokens": np.array([[len(text)] for text in batch["text"]]), "label": batch["label"]}

    batch = next(Batches(Numbers(30), 4, seed=0, transform=tokenise).iterate(2))
    assert batch.keys() == {"tokens", "label"} and batch["tokens"].shape == (4, 1)


def test_batched_reads_are_one_call() -> None:
    class Many(Numbers):
        calls = 0

        def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
            self.calls += 1
            return [self[index] for index in indices]

    source = Many(30)
    assert_same(Batches(source, 6, seed=0, flip=True).batch(3), Batches(Numbers(30), 6, seed=0, flip=True).batch(3))
    assert source.calls == 1


def threads() -> int:
    return sum(thread.name.startswith("reader") for thread in threading.enumerate())


def test_threads_read_ahead_and_end_with_the_iterator() -> None:
    class Slow(Numbers):
        read = 0

        def __getitem__(self, index: int) -> dict[str, Any]:
            self.read += 1
            return super().__getitem__(index)

    source = Slow(100)
    iterator = Batches(source, 1, seed=0, workers=3, prefetch=4).iterate()
    next(iterator)
    deadline = time.monotonic() + 5
    while source.read < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert source.read == 5  # the one in use and four ahead
    assert 1 <= threads() <= 3  # the pool starts a thread only where none is idle
    iterator.close()
    assert threads() == 0


def test_every_thread_has_something_to_read() -> None:
    class Waiting(Numbers):
        def __init__(self) -> None:
            super().__init__(100)
            self.together, self.first = threading.Barrier(6, timeout=20), itertools.count()

        def __getitem__(self, index: int) -> dict[str, Any]:
            if next(self.first) < 6:
                self.together.wait()
            return super().__getitem__(index)

    iterator = Batches(Waiting(), 1, seed=0, workers=6).iterate()
    next(iterator)
    iterator.close()


def test_errors_in_a_worker_reach_the_caller_and_end_the_threads() -> None:
    class Failing(Numbers):
        def __getitem__(self, index: int) -> dict[str, Any]:
            raise UserError("the disk is gone")

    with pytest.raises(UserError, match="the disk is gone"):
        next(Batches(Failing(10), 2, seed=0).iterate())
    assert threads() == 0


def test_examples_that_do_not_stack_are_one_line() -> None:
    with pytest.raises(UserError, match=r"'image'.*\(2, 2\), \(3, 2\)"):
        stack([{"image": np.zeros((2, 2))}, {"image": np.zeros((3, 2))}])
    with pytest.raises(UserError, match="differ in their entries"):
        stack([{"label": 1}, {"label": 1, "text": "a"}])


def test_importing_the_data_room_brings_no_jax_and_no_tensorflow() -> None:
    code = (
        "import sys, ldm_jax.data.sources, ldm_jax.data.latents, ldm_jax.data.pipeline\n"
        "assert not {'jax', 'flax', 'grain', 'tensorflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
