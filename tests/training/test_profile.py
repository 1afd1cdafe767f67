"""`train.profile`: which updates are in the trace, and which are not."""

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.config import UserError, check
from ldm_jax.training.profile import Profiler
from tests import tiny


def session(path: Path, window: tuple[int, ...], start: int, total: int) -> None:
    """Updates start + 1 to total."""
    step = jax.jit(lambda x: x @ x / 8)
    x = jnp.ones((8, 8))
    with Profiler(path, window, start) as profiler:
        for number in range(start + 1, total + 1):
            with profiler.update(number):
                x = step(x)
            profiler.started(number, x)


def traced(path: Path) -> list[int]:
    """Numbers of the updates in the only trace."""
    (trace,) = path.glob("process_0/plugins/profile/*/*.trace.json.gz")
    assert len(list(trace.parent.glob("*.xplane.pb"))) == 1
    events: list[dict[str, Any]] = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted(
        int(event["args"]["step_num"]) for event in events if event.get("name") == "update" and "step_num" in event.get("args", {})
    )


@pytest.mark.parametrize(("start", "total", "updates"), [(0, 9, [3, 4, 5]), (1, 9, [3, 4, 5]), (0, 4, [3, 4])])
def test_a_trace_holds_the_updates_that_were_asked_for(tmp_path: Path, start: int, total: int, updates: list[int]) -> None:
    """Also where the session ends within them."""
    session(tmp_path, (3, 5), start, total)
    assert traced(tmp_path) == updates


@pytest.mark.parametrize(("window", "start"), [((), 0), ((3, 5), 2), ((3, 5), 4), ((3, 5), 7)])
def test_no_trace_where_none_is_asked_for_or_the_session_begins_within_it(tmp_path: Path, window: Any, start: int, caplog: Any) -> None:
    session(tmp_path, window, start, 9)
    assert list(tmp_path.iterdir()) == []
    assert ("ask for later ones" in caplog.text) == (start in (2, 4))


@pytest.mark.parametrize("window", [(3,), (1, 3), (5, 3), (5, 11), (3, 4, 5)])
def test_bad_windows(window: tuple[int, ...]) -> None:
    config = tiny.config()
    config.first_stage.train.profile = window
    with pytest.raises(UserError, match=r"first_stage\.train\.profile is"):
        check(config)
