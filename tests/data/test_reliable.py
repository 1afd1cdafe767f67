import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ldm_jax.config import UserError
from ldm_jax.data.folder import FolderSource
from ldm_jax.data.reliable import Layer, Reliable, shared
from tests.data.pictures import noise, save


def test_broken_examples_are_replaced_counted_and_named_once(tmp_path: Path) -> None:
    for i in range(6):
        save(tmp_path / "data" / f"{i}.png", value=40 * i, size=(16, 16))
    (tmp_path / "data" / "2.png").write_bytes(b"")
    (tmp_path / "data" / "3.png").write_bytes(b"not a picture")
    noise().save(tmp_path / "data" / "5.jpg")
    (tmp_path / "data" / "5.png").unlink()
    whole = (tmp_path / "data" / "5.jpg").read_bytes()
    (tmp_path / "data" / "5.jpg").write_bytes(whole[: len(whole) // 2])
    log = tmp_path / "logs" / "broken.tsv"
    for _ in range(2):  # the second round is a restart
        source = Reliable(FolderSource(tmp_path / "data"), log, max_broken=0.5)
        for i, expected in enumerate((0, 1, 4, 4, 4, 0)):
            assert source[i]["image"][0, 0, 0] == 40 * expected
        assert source.broken == {2, 3, 5}
    rows = [line.split("\t") for line in log.read_text().splitlines()]
    assert sorted(row[:2] for row in rows) == [["2", "2.png"], ["3", "3.png"], ["5", "5.jpg"]]
    assert all(row[2] for row in rows) and "truncated" in rows[-1][2]


class Flaky:
    """A source whose examples below `broken` are broken."""

    def __init__(self, size: int, broken: int) -> None:
        self.size, self.broken = size, broken

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < self.broken:
            raise OSError("gone\tbad")
        return {"image": index, "text": f"caption {index}"}

    def fingerprint(self) -> str:
        return "flaky"


def test_more_than_max_broken_stop_the_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = Reliable(Flaky(1000, 3), log, max_broken=0.002)
    assert source[1]["image"] == 3  # 1 and 2: as many as may be
    with pytest.raises(UserError, match=r"3 of 1000 .* broken, 0.30%, and data.max_broken allows 0.20%; .* 'example 0'.*log"):
        source[0]
    assert log.read_text() == "".join(f"{i}\texample {i}\tOSError: gone bad\n" for i in (1, 2, 0))
    assert Reliable(Flaky(1000, 3), log, max_broken=0.003)[0]["image"] == 3
    with pytest.raises(UserError, match="max_broken is a share"):
        Reliable(Flaky(3, 0), None, max_broken=2)


def test_processes_that_share_a_source_may_meet_their_part_of_the_broken_ones() -> None:
    for processes, allowed in ((1, 10), (4, 3), (100, 1)):
        source = Layer(Reliable(Flaky(1000, 500), None, max_broken=0.01))
        with shared(source, processes), pytest.raises(UserError, match=rf"{allowed + 1} of {1000 // processes} examples are broken"):
            source[0]


def test_all_broken_is_an_error(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    source = Reliable(FolderSource(tmp_path), tmp_path / "log")
    with pytest.raises(UserError, match=r"all 2 examples are broken.*a.png.*log"):
        source[1]


def test_a_fault_of_the_program_is_not_taken_for_a_broken_file() -> None:
    class Faulty(Flaky):
        def __getitem__(self, index: int) -> dict[str, Any]:
            raise TypeError("a fault")

    with pytest.raises(TypeError):
        Reliable(Faulty(3, 0))[0]


def test_what_lies_below_is_asked_for_the_rest(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("words")
    folder = FolderSource(tmp_path, ("text",))
    source = Reliable(folder)
    (tmp_path / "a.png").write_bytes(b"")  # the caption is there without the picture
    assert source.caption(0) == "words" and source.name(0) == "a.png" and source.fingerprint() == folder.fingerprint() and len(source) == 1
    assert Reliable(Flaky(4, 1)).caption(0) == "caption 1"


def test_threads_agree_and_log_each_broken_example_once(tmp_path: Path) -> None:
    source = Reliable(Flaky(64, 32), tmp_path / "log")
    barrier = threading.Barrier(8)

    def work(start: int) -> list[int]:
        barrier.wait()
        return [source[(start + i) % 64]["image"] for i in range(64)]

    run: Callable[[int], list[int]] = work
    with ThreadPoolExecutor(8) as pool:
        for start, values in enumerate(pool.map(run, range(8))):
            assert values == [max((start + i) % 64, 32) for i in range(64)]
    assert sorted(int(line.split("\t")[0]) for line in (tmp_path / "log").read_text().splitlines()) == list(range(32))


def test_captions_do_not_depend_on_what_was_decoded_before(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    source = Reliable(FolderSource(tmp_path, ["text"]))
    before = source.caption(0), source.size(0)
    assert source[0]["text"] == "caption 1" and source.broken == {0}
    assert (source.caption(0), source.size(0)) == before == ("caption 0", (12, 10))
