"""``Receivers``: what a sender knows of other processes, by the route to their channels.

- A process whose queue took a message in the last minute is *alive*. If a message to it is returned
  now, it is probably reconnecting, and back in a moment.
- A process that stayed away through all tries of a message is *unreachable* for a minute.
- A process that has said that it ends is unreachable for ever (``has_ended``).
- Of any other process nothing is known. Most often it ended long ago, and a table somewhere still
  holds the names of its channels. (At two seconds for each, eight such names held up the ninth for
  14.5 s.) Or it is starting: ``new_channel()`` returns before there is a queue. So all these
  processes share one ``Allowance`` of time, and those that turn up get their part back. All event
  loops of a process share it, too: each may live for one call. (Eight such names then held up
  ``asyncio.run(layer.send(...))`` for 4.5 s together, now for 0.6 s.)
"""

from __future__ import annotations

from collections.abc import Callable

from .._amqp.publishing import Route
from .._identity import id_of

# Seconds after its last message for which a process counts as alive.
HEARD_TIMEOUT = 60.0
# Seconds for which a process is remembered as unreachable.
UNREACHABLE_TIMEOUT = 60.0
# Seconds of tries for all processes of which nothing is known, and the seconds in which a spent
# allowance refills. A process that starts has its queue after 0.02 to 0.1 s.
STRANGERS_TIMEOUT = 0.6
STRANGERS_INTERVAL = 10.0
_MOST_ROUTES = 1000  # that are noted as alive


class Allowance:
    """Seconds that may be spent; spent ones come back with time. Any thread may call it."""

    def __init__(self) -> None:
        self._left = STRANGERS_TIMEOUT
        self._at = 0.0  # loop time, which is nearly the same on all event loops

    def spend(self, seconds: float, now: float) -> bool:
        """Spend them; return False if fewer are left."""
        self.refund(max(0.0, now - self._at) * STRANGERS_TIMEOUT / STRANGERS_INTERVAL)
        self._at = now
        if seconds > self._left:
            return False
        self._left -= seconds
        return True

    def refund(self, seconds: float) -> None:
        self._left = min(self._left + seconds, STRANGERS_TIMEOUT)


class Receivers:
    """``own_route`` leads to the caller's own process, which is alive. ``clock``: loop time.

    ``has_ended(id)``: whether the process with that id has said so. ``allowance`` is shared with
    others.
    """

    def __init__(
        self,
        own_route: Route,
        clock: Callable[[], float],
        has_ended: Callable[[str], bool] = lambda id_: False,
        allowance: Allowance | None = None,
    ) -> None:
        self._own_route = own_route
        self._clock = clock
        self._has_ended = has_ended
        # By route: when that call was made whose message was the last to be taken
        self._heard_at: dict[Route, float] = {}
        self._unreachable: dict[Route, float] = {}  # by route: until when
        self.allowance = allowance or Allowance()

    def on_taken(self, route: Route, called_at: float) -> None:
        """The queue has taken the message of a call made at that moment."""
        if len(self._heard_at) >= _MOST_ROUTES:
            self._heard_at.clear()  # of processes that are gone, most of them
        self._heard_at[route] = called_at
        if self._unreachable:
            self._unreachable.pop(route, None)

    def took_later_one(self, route: Route, called_at: float) -> bool:
        """Whether the queue has taken the message of a later call."""
        return self._heard_at.get(route, 0.0) > called_at

    def is_alive(self, route: Route, now: float) -> bool:
        heard_at = self._heard_at.get(route)
        return route == self._own_route or (heard_at is not None and now - heard_at < HEARD_TIMEOUT)

    def is_unreachable(self, route: Route) -> bool:
        until = self._unreachable.get(route)
        if until is not None and self._clock() < until:
            return True
        return self.has_ended(route)

    def has_ended(self, route: Route) -> bool:
        """Whether the process has said that it ends."""
        return self._has_ended(id_of(route.routing_key))

    def on_unreachable(self, route: Route) -> None:
        """All tries of a message were in vain."""
        now = self._clock()
        # Oldest first, so what is over is at the front.
        for old, until in list(self._unreachable.items()):
            if until > now:
                break
            del self._unreachable[old]
        self._heard_at.pop(route, None)
        self._unreachable.pop(route, None)
        self._unreachable[route] = now + UNREACHABLE_TIMEOUT
