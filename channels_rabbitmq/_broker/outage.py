"""How long a call waits while there is no connection.

*A call waits until its own deadline, or until the outage has lasted ``operation_timeout``,
whichever comes first.* An outage begins when a connection is first asked for, or when it is lost.
It ends when a connection is set up. So calls bridge the restart of a broker, and in a long outage
each call fails at once. (When each call waited its full time, for as long as the outage lasted, a
page that never used the layer took 20 s: other pages' calls held all workers.)

Two cases have rules of their own:

- The broker refuses before the first success: a wrong password, a missing virtual host. Waiting
  doesn't mend that, so calls fail at once. Only a *patient* call goes on waiting: ``connect()``,
  for a process that starts together with its broker.
- A connection is first asked for during an outage that other connections of the layer know of
  (``KnownOutage``). Then the outage counts from their beginning. But the connection's first attempt
  gets a second, because only that attempt can find out whether the outage is over. (That second is
  left out if another connection of its role has just failed: its own attempt would fail too. On
  event loops of ``async_to_sync`` each call has a ``carehare_connection`` of its own; without this
  rule each would log in to a broker that refuses it.)

Times are those of ``time.monotonic()``, which all threads share, unless "loop time" is said.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace

# Seconds that calls give the first attempt of a connection which is asked for in an outage, or
# operation_timeout if that is shorter.
FIRST_ATTEMPT_TIMEOUT = 1.0
# Seconds for which a failed attempt tells how the attempt of another connection would end.
_MEMORY = 30.0
# The least seconds between two attempts if calls fail in between. A site whose calls fail at once
# should find the broker soon when it is back, without storming it.
SHORTEST_DELAY_FOR_CALLS = 0.25


@dataclass(frozen=True)
class Failure:
    """A round of attempts that failed at every URL."""

    began_at: float  # the outage, as its connection knows it
    seen_at: float
    is_refusal: bool
    reasons: dict[str, str]  # by URL, without its password


class KnownOutage:
    """What all connections of one layer know of it together, on all event loops of the process.

    Its methods may be called on any thread.
    """

    def __init__(self) -> None:
        self._failures: dict[str, Failure] = {}  # by role: the last one

    def began_at(self) -> float | None:
        """Return when the present outage began, or None if no connection knows of one."""
        oldest = time.monotonic() - _MEMORY
        failures = list(self._failures.values())  # Other threads may add some.
        return min((one.began_at for one in failures if one.seen_at >= oldest), default=None)

    def just_failed(self, role: str) -> Failure | None:
        """Return the last failure of a role, if it is too soon after it for another attempt."""
        failure = self._failures.get(role)
        if failure is None or failure.seen_at <= time.monotonic() - SHORTEST_DELAY_FOR_CALLS:
            return None
        return failure

    def note_failure(self, role: str, failure: Failure) -> None:
        """A round of attempts has failed."""
        known = self.began_at()
        if known is not None and known < failure.began_at:
            failure = replace(failure, began_at=known)
        self._failures[role] = failure

    def note_connected(self) -> None:
        """The broker can be reached."""
        self._failures.clear()


class Outage:
    """The outages of one connection, and the rule for all calls that wait for it."""

    def __init__(self, known: KnownOutage, role: str, operation_timeout: float) -> None:
        self._known = known
        self._role = role
        self._operation_timeout = operation_timeout
        self._began_at: float | None = None  # None: it is connected, or wasn't asked for yet
        self._first_attempt_until = 0.0
        self._was_tried = False
        self._was_connected = False
        self._is_refused = False

    @property
    def seconds(self) -> float:
        """How long the outage has lasted; 0 if there is none."""
        return 0.0 if self._began_at is None else time.monotonic() - self._began_at

    def begin_with_others(self) -> Failure | None:
        """The connection is asked for, for the first time.

        Returns the failure of another connection of its role if that was only just now: it stands
        for the first attempt.
        """
        now = time.monotonic()
        known = self._known.began_at()
        self._began_at = now if known is None else known
        self._first_attempt_until = now + min(FIRST_ATTEMPT_TIMEOUT, self._operation_timeout)
        failure = self._known.just_failed(self._role)
        if failure is not None:
            self._was_tried = True
            self._is_refused = failure.is_refusal
        return failure

    def begin(self) -> None:
        """The connection is lost. Calling it again changes nothing."""
        if self._began_at is None:
            self._began_at = time.monotonic()

    def note_failure(self, reasons: dict[str, str], *, is_refusal: bool) -> None:
        """A round of attempts has failed; ``is_refusal``: because the broker refused."""
        self._was_tried = True
        self._is_refused = is_refusal and not self._was_connected
        self.share_failure(reasons)

    def share_failure(self, reasons: dict[str, str]) -> None:
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

        Both are loop time. The limit may be in the past. It changes, so a call asks again after it
        has waited.
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
