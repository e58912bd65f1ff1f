"""Sending to one channel, through its process's queue, and what to do when there is none.

A direct send is *mandatory*: the broker returns it if no queue is bound to its key, and then
another try can't duplicate it. How long it is tried again depends on what is known of the process:

- It may be reconnecting, and is back in a moment: if it took a message in the last minute, for
  ``RETRY_TIMEOUT``; if our own connection was lost a moment ago, until ``RECONNECT_GRACE``.
- It stayed away, through all tries: for a minute each message to it gets one try, until one gets
  through.
- Nothing is known of it. Most often it ended long ago, and somebody's table holds its channels'
  names still. (At two seconds for each, eight such names held up the ninth for 14.5 s.) Or it is
  starting: ``new_channel()`` returns before there is a queue. So all processes of which nothing is
  known share one ``_Allowance``; those who turn up get theirs back.

Meanwhile later sends to the same process wait behind it (a *lane*), which keeps their order.

A call that has little time left, because it waited for our own connection, says nothing about the
receiver: it may be back in a moment. Such a call raises, and the receiver isn't held for gone.
(Otherwise all messages of the next seconds were dropped after an outage of about
``operation_timeout``, 1,800 of 2,500 in a test.)
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Awaitable, Callable

from ._amqp.amqp_channels import CONFIRMED, Outcome, Route
from ._amqp.futures import resolve
from ._publisher import Publisher
from ._waiting import Waiters
from .exceptions import BrokerUnavailable

# Seconds for which a returned message is tried again (at most half of what the call may take), and
# seconds since a reconnect of our own until which it is, at least: the receiver has probably lost
# its connection too, and may be at the longest delay of its back-off.
RETRY_TIMEOUT = 2.0
RECONNECT_GRACE = 5.0
# Seconds after its last message for which a process counts as alive.
HEARD_TIMEOUT = 60.0
# Seconds of tries for all processes of which nothing is known, and how long it takes until they
# are there again. A process that starts has its queue after 0.02 to 0.1 s.
STRANGERS_TIMEOUT = 0.6
_STRANGERS_INTERVAL = 10.0
# Seconds between two tries: the first delay, and the longest.
_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 0.25
# Seconds that the last try must leave for its confirm, or its outcome would be unknown.
_CONFIRM_TIMEOUT = 0.5
# Seconds for which an id is remembered as unreachable.
UNREACHABLE_TIMEOUT = 60.0
_MOST_ROUTES = 1000  # that are noted as alive

_NO_QUEUE_YET = (
    "The process of the channel has no queue on RabbitMQ yet: it may still be reconnecting"
)


class _Lane:
    """Who sends by one route while a returned message is being tried again: one at a time.

    In the order of their deadlines, which is that of the calls. Not in that of entering: when many
    that were written together are returned, calls made since then have entered before most of them.
    """

    __slots__ = ("_is_taken", "_numbers", "_queue", "users")

    def __init__(self) -> None:
        self.users = 0
        self._is_taken = False
        # A heap of (deadline, number, turn)
        self._queue: list[tuple[float, int, asyncio.Future[bool]]] = []
        self._numbers = itertools.count()

    async def enter(self, deadline: float) -> bool:
        """Wait for one's turn; False if it doesn't come by ``deadline`` (loop time)."""
        if not self._is_taken:
            self._is_taken = True
            return True
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_at(deadline, resolve, turn, False)
        heapq.heappush(self._queue, (deadline, next(self._numbers), turn))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.result():
                self.leave()
            raise
        finally:
            timer.cancel()

    def cancel(self) -> None:
        """Cancel those who wait for their turn."""
        for _, _, turn in self._queue:
            turn.cancel()

    def leave(self) -> None:
        """Let the next one have his turn."""
        while self._queue:
            _, _, turn = heapq.heappop(self._queue)
            if not turn.done():
                turn.set_result(True)
                return
        self._is_taken = False


class _Allowance:
    """Seconds that may be spent; spent ones come back with time."""

    def __init__(self) -> None:
        self._left = STRANGERS_TIMEOUT
        self._at = 0.0  # loop time

    def spend(self, seconds: float, now: float) -> bool:
        """Take so many; False if there aren't as many left."""
        self.give_back((now - self._at) * STRANGERS_TIMEOUT / _STRANGERS_INTERVAL)
        self._at = now
        if seconds > self._left:
            return False
        self._left -= seconds
        return True

    def give_back(self, seconds: float) -> None:
        self._left = min(self._left + seconds, STRANGERS_TIMEOUT)


class DirectSender:
    """Sends bodies by a ``Publisher``; each process's channels have a route, which is mandatory.

    ``operation_timeout``: seconds that a call may take, which all deadlines are made of.
    ``own_route`` leads to the caller's own process, which is alive.
    """

    def __init__(self, publisher: Publisher, operation_timeout: float, own_route: Route) -> None:
        self._publisher = publisher
        self._operation_timeout = operation_timeout
        self._own_route = own_route
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[Route, _Lane] = {}
        self._pauses = Waiters()  # between two tries
        self._heard_at: dict[Route, float] = {}  # loop time
        self._allowance = _Allowance()
        self._unreachable: dict[Route, float] = {}  # until when, in loop time

    async def send(
        self,
        route: Route,
        body: bytes,
        deadline: float,
        after: Callable[[], Awaitable[object]] | None = None,
    ) -> Outcome:
        """Send; RETURNED means that nobody was there, after all tries.

        ``deadline`` and ``after`` are those of ``Publisher.publish``. Raises BrokerUnavailable as
        that does, and also if the time was over before all tries: either way nothing was sent. With
        one sender that awaits each call, messages by one route arrive in order.
        """
        # Who finds publishers blocked needn't wait for a turn to hear it.
        if not self._lanes or route not in self._lanes or self._publisher.is_blocked:
            outcome = await self._publisher.publish(body, route, deadline, after)
            self._note(route, outcome)
            if (
                outcome is CONFIRMED  # Almost always: so the rest isn't looked at.
                or outcome is not Outcome.RETURNED
                or self._is_unreachable(route)
            ):
                return outcome
        lane = self._lanes.get(route)
        was_returned = lane is None  # just now, and nobody else has tried since
        if lane is None:
            lane = self._lanes[route] = _Lane()
        lane.users += 1
        try:
            if not await lane.enter(deadline):
                raise BrokerUnavailable(_NO_QUEUE_YET)
            try:
                outcome = Outcome.RETURNED
                if not was_returned:
                    outcome = await self._publisher.publish(body, route, deadline, after)
                    self._note(route, outcome)
                if outcome is Outcome.RETURNED:
                    outcome = await self._try_again(route, body, deadline, after)
                return outcome
            finally:
                lane.leave()
        finally:
            lane.users -= 1
            if not lane.users:
                del self._lanes[route]

    def _note(self, route: Route, outcome: Outcome) -> None:
        """Note what the outcome of a try says of the process."""
        if outcome is CONFIRMED or outcome is Outcome.REFUSED:
            if len(self._heard_at) >= _MOST_ROUTES:
                self._heard_at.clear()  # of processes that are gone, most of them
            self._heard_at[route] = self._loop.time()
            if self._unreachable:
                self._unreachable.pop(route, None)

    async def _try_again(
        self,
        route: Route,
        body: bytes,
        deadline: float,
        after: Callable[[], Awaitable[object]] | None,
    ) -> Outcome:
        """Go on with a message that was returned, as long as its process may turn up."""
        begun_at = self._loop.time()
        pause = _FIRST_PAUSE
        spent = 0.0  # of the allowance
        while not self._is_unreachable(route):
            at = self._loop.time() + pause  # the next try
            if not self._may_be_back(route, begun_at, at):
                if self._is_too_late(begun_at, at) or not self._allowance.spend(pause, at):
                    self._remember_unreachable(route)
                    break
                spent += pause
            if at > deadline - _CONFIRM_TIMEOUT:
                raise BrokerUnavailable(_NO_QUEUE_YET)
            await self._pauses.wait(at)
            pause = min(pause * 2, _LONGEST_PAUSE)
            outcome = await self._publisher.publish(body, route, deadline, after)
            self._note(route, outcome)
            if outcome is not Outcome.RETURNED:
                self._allowance.give_back(spent)
                return outcome
        return Outcome.RETURNED

    def _may_be_back(self, route: Route, begun_at: float, at: float) -> bool:
        """Whether what is known of a process gives reason to try it again at that moment."""
        if at <= self._publisher.reconnected_at + RECONNECT_GRACE:
            return True  # Our own connection may be new since the last try.
        return self._is_alive(route, begun_at) and not self._is_too_late(begun_at, at)

    def _is_too_late(self, begun_at: float, at: float) -> bool:
        longest = min(RETRY_TIMEOUT, (self._operation_timeout - _CONFIRM_TIMEOUT) / 2)
        return at > begun_at + longest

    def _is_alive(self, route: Route, now: float) -> bool:
        heard_at = self._heard_at.get(route)
        return route == self._own_route or (heard_at is not None and now - heard_at < HEARD_TIMEOUT)

    def cancel_calls(self) -> None:
        """Cancel the calls that wait for a receiver."""
        self._pauses.cancel()
        for lane in self._lanes.values():
            lane.cancel()

    def _is_unreachable(self, route: Route) -> bool:
        until = self._unreachable.get(route)
        return until is not None and self._loop.time() < until

    def _remember_unreachable(self, route: Route) -> None:
        now = self._loop.time()
        # Oldest first, so what is over is at the front.
        for old, until in list(self._unreachable.items()):
            if until > now:
                break
            del self._unreachable[old]
        self._heard_at.pop(route, None)
        self._unreachable.pop(route, None)
        self._unreachable[route] = now + UNREACHABLE_TIMEOUT
