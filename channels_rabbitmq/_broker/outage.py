"""How long a call waits for a connection that isn't there.

*A call waits until its own deadline, or until the outage has lasted ``operation_timeout``,
whichever comes first.* An outage begins when a connection is first asked for, or when it is lost.
It ends when a connection is set up. So calls bridge the restart of a broker, and a long outage
holds up nobody: each call fails at once. (When each call waited its full time, for as long as the
outage lasted, a page that never used the layer took 20 s: other pages' calls held all workers.)

Two cases have rules of their own:

- The broker refuses in words before the first success: a wrong password, a missing virtual host.
  Waiting doesn't mend that, so calls fail at once. Only a *patient* call goes on waiting:
  ``connect()``, for a process that starts together with its broker.
- A connection is first asked for in the midst of an outage which other connections of the layer
  know of (``KnownOutage``). It counts from their beginning, but the connection's first attempt gets
  a second: nobody but that attempt can know whether the outage is over. (Unless another
  connection of its role has just failed, which is as good. On event loops of ``async_to_sync`` each
  call has a ``carehare_connection`` of its own, and each would log in to a broker that refuses it.)

Times are those of ``time.monotonic()``, which all threads share, unless "loop time" is said.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace

# Seconds that calls give the first attempt of a connection which is asked for in an outage.
FIRST_ATTEMPT_TIMEOUT = 1.0
# Seconds for which a failed attempt says something about the next connection's.
_MEMORY = 30.0
# Seconds between two attempts, at least, if calls fail in between: a site whose calls fail at once
# is to find the broker soon when it is back, and isn't to storm it.
SHORTEST_DELAY_FOR_CALLS = 0.25


@dataclass(frozen=True)
class Failure:
    """An attempt that failed, at each URL."""

    began_at: float  # the outage, for its connection
    seen_at: float
    is_refusal: bool
    reasons: dict[str, str]  # by URL, without its password


class KnownOutage:
    """What the connections of one layer in a process, on any event loop, know together.

    From any thread.
    """

    def __init__(self) -> None:
        self._failures: dict[str, Failure] = {}  # by role: the last one
        self._told_at: dict[tuple[str, ...], float] = {}  # what the log was told, and when

    def is_news(self, what: tuple[str, ...], interval: float) -> bool:
        """Whether the log wasn't told this for ``interval`` seconds; from now on it was.

        Not each connection for itself: those that live for one call would tell it at each call.
        """
        now = time.monotonic()
        for old, at in list(self._told_at.items()):
            if now - at >= interval:
                self._told_at.pop(old, None)
        if what in self._told_at:
            return False
        self._told_at[what] = now
        return True

    def began_at(self) -> float | None:
        """Return when the present outage began; None: nobody knows of one."""
        oldest = time.monotonic() - _MEMORY
        failures = list(self._failures.values())  # Other threads may add some.
        return min((one.began_at for one in failures if one.seen_at >= oldest), default=None)

    def just_failed(self, role: str) -> Failure | None:
        """Return the last failure of a role, if another attempt would come too soon after it."""
        failure = self._failures.get(role)
        if failure is None or failure.seen_at <= time.monotonic() - SHORTEST_DELAY_FOR_CALLS:
            return None
        return failure

    def note_failure(self, role: str, failure: Failure) -> None:
        """An attempt has failed."""
        known = self.began_at()
        if known is not None and known < failure.began_at:
            failure = replace(failure, began_at=known)
        self._failures[role] = failure

    def note_connected(self) -> None:
        """The broker can be reached."""
        self._failures.clear()


class Outage:
    """The outages of one connection, and the one rule for all who wait for it."""

    def __init__(self, known: KnownOutage, role: str, operation_timeout: float) -> None:
        self._known = known
        self._role = role
        self._operation_timeout = operation_timeout
        self._began_at: float | None = None  # None: it is connected, or nobody asked for it
        self._first_attempt_until = 0.0
        self._was_tried = False
        self._was_connected = False
        self._is_refused = False

    @property
    def seconds(self) -> float:
        """How long it has lasted; 0: there is none."""
        return 0.0 if self._began_at is None else time.monotonic() - self._began_at

    def begin_with_others(self) -> Failure | None:
        """The connection is asked for, for the first time.

        Returns the failure of another one of its role, if that was only just now: it stands for
        this one's first attempt.
        """
        now = time.monotonic()
        known = self._known.began_at()
        self._began_at = now if known is None else known
        self._first_attempt_until = now + FIRST_ATTEMPT_TIMEOUT
        failure = self._known.just_failed(self._role)
        if failure is not None:
            self._was_tried = True
            self._is_refused = failure.is_refusal
        return failure

    def begin(self) -> None:
        """The connection is lost. Nothing happens if that is known."""
        if self._began_at is None:
            self._began_at = time.monotonic()

    def note_failure(self, reasons: dict[str, str], *, is_refusal: bool) -> None:
        """An attempt, at each URL, has failed; ``is_refusal``: in the broker's words."""
        self._was_tried = True
        self._is_refused = is_refusal and not self._was_connected
        self.tell_others(reasons)

    def tell_others(self, reasons: dict[str, str]) -> None:
        """Let the layer's other connections know of it."""
        if self._began_at is not None:
            self._known.note_failure(
                self._role,
                Failure(self._began_at, time.monotonic(), self._is_refused, dict(reasons)),
            )

    def end(self) -> None:
        """The connection is set up."""
        self._was_tried = self._was_connected = True
        self._is_refused = False
        self._began_at = None
        self._known.note_connected()

    def limit(self, deadline: float, *, patient: bool = False) -> float:
        """Return until when a call waits for the connection whose own time ends at ``deadline``.

        Both in loop time. It may be over; and it changes: who has waited asks again.
        """
        if self._began_at is None:
            return deadline
        now = time.monotonic()
        until = self._began_at + self._operation_timeout
        if not self._was_tried:
            until = max(until, self._first_attempt_until)
        elif self._is_refused and not patient:
            until = now
        return min(deadline, asyncio.get_running_loop().time() + until - now)
