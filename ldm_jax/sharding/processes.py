"""What the processes of a run tell each other: values as JSON, through the key-value store of jax's coordination service in process 0.

No device takes part, so a process may wait for hours for one that works alone. Waiting is polling, so that signals are heard meanwhile.
"""

import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src.distributed import global_state

from ldm_jax.config import UserError

PREFIX = "ldm_jax"
_rounds = itertools.count()
_alone: list[bool] = []  # not empty while process 0 is in a `from_first`


def client() -> Any:
    """The client of the coordination service; None in a run of one process."""
    return global_state.client if global_state.num_processes > 1 else None


def exchange(value: Any) -> list[Any]:
    """What each process brings, by its number, once all have brought theirs. All must call this in the same order."""
    store = client()
    if store is None:
        return [value]
    assert not _alone, "process 0 waits for the others inside of what they wait for"
    me, number, here = global_state.process_id, global_state.num_processes, next(_rounds)
    key = f"{PREFIX}/exchange/{here}"
    store.key_value_set(f"{key}/from/{me}", json.dumps(value))
    if me == 0:
        while len(brought := store.key_value_dir_get(f"{key}/from/")) < number:
            time.sleep(0.02)
        values = {int(name.rpartition("/")[2]): text for name, text in brought}
        store.key_value_set(f"{key}/all", "[" + ",".join(values[process] for process in range(number)) + "]")
        store.key_value_delete(f"{key}/from/")
        store.key_value_delete(f"{PREFIX}/exchange/{here - 1}/all")  # all are here, so all have read it
    return json.loads(_wait_for(store, f"{key}/all"))


def _wait_for(store: Any, key: str) -> str:
    while True:
        try:
            return store.blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def wait_for_all() -> None:
    """Until every process is here."""
    exchange(None)


def from_first(find: Callable[[], Any]) -> Any:
    """What process 0 finds (or does), while the others wait. What depends on files is found so: no two hosts may take different ways.

    Raises UserError in all processes where process 0 raises one.
    """
    if client() is None:
        return find()
    found: dict[str, Any] = {}
    if global_state.process_id == 0:
        _alone.append(True)
        try:
            found = {"value": find()}
        except UserError as error:
            found = {"error": str(error)}
        finally:
            _alone.pop()
    said = exchange(found)[0]
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]
