"""Who is behind once nobody gets on."""

from collections.abc import Sequence

import pytest

from ldm_jax.sharding.stall import OUTSIDE, Place, Stall, stall_line

LIMIT = 10.0
BEFORE, AFTER = (0, OUTSIDE), (1, OUTSIDE)  # the first loop


def behind(*looks: tuple[float, Sequence[Place | None]], limit: float = LIMIT) -> list[int]:
    """What the last of several looks says, and none before says anything."""
    stall, found = Stall(), list[int]()
    for now, places in looks:
        assert not found
        found = stall.behind(dict(enumerate(places)), now, limit)
    return found


@pytest.mark.parametrize(
    ("places", "last"),
    [
        ([(0, 7), (0, 6), (0, 7)], [1]),
        ([(0, 7), (0, 7)], [0, 1]),
        ([(0, 0), BEFORE, BEFORE], [1, 2]),
        ([AFTER, (0, 19)], [1]),
        ([AFTER, (1, 0)], [0]),
        ([BEFORE, BEFORE], []),  # who is in no loop may work alone for hours
        ([AFTER, AFTER], []),
        ([None, (0, 6)], []),
    ],
)
def test_where_no_place_changes_the_last_ones_are_named(places: list[Place | None], last: list[int]) -> None:
    assert behind((3.0, places), (13.0, places), (13.5, places)) == last
    assert behind((3.0, places), (13.5, places), limit=0) == []


def test_any_step_of_anybody_begins_the_time_anew() -> None:
    assert behind((0.0, [(0, 5), (0, 5)]), (9.0, [(0, 6), (0, 5)]), (18.0, [(0, 6), (0, 5)])) == []
    assert behind((0.0, [(0, 5), (0, 5)]), (9.0, [(0, 6), (0, 5)]), (20.0, [(0, 6), (0, 5)])) == [1]


def test_what_takes_long_is_no_stall_and_the_time_runs_from_its_end() -> None:
    inside = [(0, 5), (0, 5)]
    assert behind((0.0, inside), (50.0, [(0, 5), None]), (55.0, inside), (65.0, inside)) == []
    assert behind((0.0, inside), (50.0, [(0, 5), None]), (55.0, inside), (66.0, inside)) == [0, 1]


def test_a_process_that_is_heard_for_the_first_time_is_news() -> None:
    assert behind((0.0, [(0, 5)]), (9.0, [(0, 5), (0, 5)]), (18.0, [(0, 5), (0, 5)])) == []


def test_the_line_names_the_processes_and_their_update() -> None:
    places: dict[int, Place | None] = dict.fromkeys(range(20), (0, 7))
    head = "error: no process has begun an update for 1800 s (train.stall_after); still "
    assert stall_line([3], places, 1800.0) == f"{head}in update 8: process 3 of 20"
    assert stall_line([3, 5], places, 1800.0) == f"{head}in update 8: processes 3, 5 of 20"
    assert stall_line([*range(19)], places, 1800.0) == f"{head}in update 8: processes 0, 1, 2, 3, 4, 5, 6, 7, ... of 20"
    assert stall_line([*places], places, 1800.0) == f"{head}in update 8: all"
    assert stall_line([0], {0: BEFORE, 1: (0, 0)}, 1800.0) == f"{head}outside of the loop: process 0 of 2"
