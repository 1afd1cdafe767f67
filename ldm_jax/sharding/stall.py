"""Processes that live and get nowhere: a read that no file server answers, a collective that one of them does not join."""

from collections.abc import Mapping

OUTSIDE = -1
_NAMED = 8  # processes that the line names
Place = tuple[int, int]  # how many loops a process has left behind, and the turn of the one that it is in, or OUTSIDE


class Stall:
    """Looks now and then at the places of all processes, and says who is behind once none has moved for long."""

    def __init__(self) -> None:
        self._places: Mapping[int, Place | None] = {}
        self._since = 0.0

    def behind(self, places: Mapping[int, Place | None], now: float, limit: float) -> list[int]:
        """The processes that are furthest behind; none while it is not over `limit` seconds that a place has changed.

        Args:
          places: by process; None where it is at something that may take as long as it likes, and so may the others that wait for it.
          now: seconds of any clock.
          limit: 0 for no limit.
        """
        found = [place for place in places.values() if place is not None]
        training = len(found) == len(places) and any(turn != OUTSIDE for _, turn in found)
        if places != self._places or not training:
            self._places, self._since = places, now
        if not limit or now - self._since <= limit:
            return []
        return [process for process, place in places.items() if place == min(found)]


def stall_line(behind: list[int], places: Mapping[int, Place | None], limit: float) -> str:
    """What there is to say of it."""
    named = ", ".join(map(str, behind[:_NAMED])) + (", ..." if len(behind) > _NAMED else "")
    who = "all" if len(behind) == len(places) else f"process{'es' if len(behind) > 1 else ''} {named} of {len(places)}"
    place = places[behind[0]]
    where = "outside of the loop" if place is None or place[1] == OUTSIDE else f"in update {place[1] + 1}"
    return f"error: no process has begun an update for {limit:g} s (train.stall_after); still {where}: {who}"
