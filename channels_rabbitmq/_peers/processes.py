"""Which other processes are there, as far as this one has heard. (Each is a ``LoopLayer``'s id.)

A process is in one of these states::

                heard            a request to it was returned
      unknown --------> present ------------------------------> absent
         ^                 ^ ^                                     |
         |                 | |               heard                 |
         |                 | +-------------------------------------+
         |           heard |                                       |
         |                 |      "bye", or absent for GONE_AFTER  |
         +-- (forgotten) - gone <----------------------------------+

- *Whatever is heard of a process makes it present*: a greeting, a question, an answer.
- *Returned isn't gone.* A request is returned if no queue is there. That is so, too, while a
  process reconnects: right after a restart of the broker, "returned means gone" was false
  (measured). So it is *absent*, and a result without it isn't complete, until it is back, or
  ``GONE_AFTER`` is over. By then it has tried to connect several times.
- *Time without an own connection doesn't count*, nor does time for which the event loop stood
  still. A process that came back meanwhile wasn't heard.
- *Hearsay.* A process names those that it knows. That makes an unknown one present, and is passed
  on. If a process is stuck, and the one that had heard it has ended, later processes know it by
  hearsay only.
- *Absence is passed on, too*, with its age. Otherwise the name of a process that was killed would
  go round for ever: a process that never asks never finds out, and each new one begins the ten
  seconds anew. So a process that gets a request returned tells all. A process that has heard the
  absent one itself within ``GONE_AFTER`` ignores that: the absent one may be back, and its hello
  may have overtaken the news. (A long silence proves nothing: a process that isn't asked is silent
  for hours.)

*Lost* is a known process that is gone without a bye: it was killed or cut off, or it is blocked or
stopped for so long that RabbitMQ has closed its connection. It is remembered for ``LOST_FOR``, for
``status()``. Nothing else depends on it.

*Strangers* are processes that were never heard of. One is remembered when a request to it is
returned, so that it is gone in the end, too. No result waits for it.

No I/O, and the clock is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from .._identity import Place
from ..statistics import ProcessStatistics
from .requests import Heard

# Seconds for which a process is absent before it is gone.
GONE_AFTER = 10.0
# How many are remembered. Beyond that, the one that wasn't heard for longest is forgotten.
MOST_KNOWN = 10_000
MOST_GONE = 1000
# Seconds for which a lost process is told, and how many are.
LOST_FOR = 600.0
MOST_LOST = 50


class Processes:
    """The processes other than ``own_id``. ``clock()``: seconds."""

    def __init__(self, own_id: str, clock: Callable[[], float]) -> None:
        self._own_id = own_id
        self._clock = clock
        # By id, in the order in which they came there. Times are the clock's.
        self._known: dict[str, float] = {}  # present or absent: when it was heard itself
        self._absent: dict[str, float] = {}  # those of them that are absent: since when
        self._places: dict[str, Place] = {}  # of known ones that have told it
        self._strangers: dict[str, float] = {}  # since when requests to it are returned
        self._gone: dict[str, bool] = {}  # whether it has said bye
        # When it was last heard, and until when it is told
        self._lost: dict[str, tuple[float, Place | None, float]] = {}

    def statistics(self) -> ProcessStatistics:
        """Tell how many are known. From any thread."""
        return ProcessStatistics(known=len(self._known), absent=len(self._absent))

    def on_heard(self, id_: str) -> None:
        """A process is there: something has come from it."""
        if id_ != self._own_id:
            self._gone.pop(id_, None)
            self._lost.pop(id_, None)
            self._absent.pop(id_, None)
            self._known.pop(id_, None)  # so that it comes last
            self._add(id_, self._clock())

    def on_place(self, id_: str, place: Place) -> None:
        """A process that was just heard has told where it runs."""
        if id_ in self._known:
            self._places[id_] = place

    def on_hearsay(self, ids: Iterable[str]) -> None:
        """Another process has named these."""
        for id_ in ids:
            if id_ != self._own_id and id_ not in self._known and id_ not in self._gone:
                self._add(id_, -math.inf)

    def on_absent_elsewhere(self, ages: Mapping[str, float]) -> None:
        """Another process has named these, and for how many seconds each has been absent."""
        now = self._clock()
        for id_, age in ages.items():
            if self._known.get(id_, now) <= now - GONE_AFTER:
                self._absent.setdefault(id_, now - min(age, GONE_AFTER))

    def _add(self, id_: str, heard_at: float) -> None:
        self._strangers.pop(id_, None)
        self._known[id_] = heard_at
        if len(self._known) > MOST_KNOWN:
            self._forget(next(iter(self._known)))

    def on_returned(self, id_: str) -> bool:
        """A request to a process was returned. Return whether the process is absent only now."""
        now = self._clock()
        if id_ in self._known:
            return self._absent.setdefault(id_, now) == now
        if id_ not in self._gone and id_ != self._own_id:
            since = self._strangers.setdefault(id_, now)
            if now - since >= GONE_AFTER:
                self._on_gone(id_, said_bye=False)
            elif len(self._strangers) > MOST_GONE:
                del self._strangers[next(iter(self._strangers))]
        return False

    def on_bye(self, id_: str) -> None:
        """A process has ended."""
        if id_ != self._own_id:
            self._on_gone(id_, said_bye=True)

    def _on_gone(self, id_: str, *, said_bye: bool) -> None:
        if said_bye:
            self._lost.pop(id_, None)
        elif id_ in self._known:
            self._remember_lost(id_)
        self._forget(id_)
        self._strangers.pop(id_, None)
        self._gone[id_] = said_bye
        if len(self._gone) > MOST_GONE:
            del self._gone[next(iter(self._gone))]

    def _remember_lost(self, id_: str) -> None:
        until = self._clock() + LOST_FOR
        self._lost[id_] = (self._known[id_], self._places.get(id_), until)
        if len(self._lost) > MOST_LOST:
            del self._lost[next(iter(self._lost))]

    def lost(self) -> dict[str, Heard]:
        """Return the processes that are gone without a bye in the last ten minutes."""
        now = self._clock()
        self._expire_absent(now)
        self._lost = {id_: one for id_, one in self._lost.items() if one[2] > now}
        return {
            id_: Heard(None if at == -math.inf else now - at, place)
            for id_, (at, place, _) in self._lost.items()
        }

    def _forget(self, id_: str) -> None:
        self._known.pop(id_, None)
        self._absent.pop(id_, None)
        self._places.pop(id_, None)

    def on_nothing_heard(self, since: float) -> None:
        """Nothing was heard since then, so an absent process may have come back.

        The connection is lost now, or the event loop stood still.
        """
        self._expire_absent(since)
        self._absent.clear()
        self._strangers.clear()

    def _expire_absent(self, now: float) -> None:
        limit = now - GONE_AFTER
        for id_ in [one for one, since in self._absent.items() if since <= limit]:
            self._on_gone(id_, said_bye=False)

    def known(self) -> list[str]:
        """Return the present and the absent ones: a complete result has the members of each."""
        self._expire_absent(self._clock())
        return list(self._known)

    def absences(self) -> dict[str, float]:
        """Return the absent ones, each with the seconds for which it has been absent."""
        now = self._clock()
        self._expire_absent(now)
        return {id_: now - since for id_, since in self._absent.items()}

    def heard(self, id_: str) -> Heard:
        """Return when a process was last heard, and where it runs, as far as that is known."""
        at = self._known.get(id_, -math.inf)
        ago = None if at == -math.inf else self._clock() - at
        return Heard(ago, self._places.get(id_))

    def describe(self, id_: str) -> str:
        """Return an id for a log line, with where the process runs if that is known."""
        place = self._places.get(id_)
        return id_ if place is None else f"{id_} on {place.host}, pid {place.pid}"

    def is_gone(self, id_: str) -> bool:
        """Whether a process has ended, as far as that is known."""
        self._expire_absent(self._clock())
        return id_ in self._gone

    def has_said_bye(self, id_: str) -> bool:
        """Whether a process has said that it ends."""
        return self._gone.get(id_, False)
