"""Sending to one channel, through its process's queue, and what to do when there is none.

A direct send is *mandatory*: the broker returns it if no queue is bound to its key, and then
another try can't duplicate it. Most often the receiving process is reconnecting and back in a
moment, so the message is tried again for a while. Meanwhile later sends to the same process wait
behind it (a *lane*), which keeps their order. A process that stayed away is remembered for a
minute: messages to it get one try and are dropped, until one gets through.

A call that has little time left, because it waited for our own connection, says nothing about the
receiver: it may be back in a moment. Such a call raises, and the receiver isn't held for gone.
(Otherwise all messages of the next seconds were dropped after an outage of about
``operation_timeout``, 1,800 of 2,500 in a test.)
"""

from __future__ import annotations

import asyncio
from collections import deque
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
# Seconds between two tries: the first delay, and the longest.
_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 0.25
# Seconds that the last try must leave for its confirm, or its outcome would be unknown.
_CONFIRM_TIMEOUT = 0.5
# Seconds for which an id is remembered as unreachable.
UNREACHABLE_TIMEOUT = 60.0

_NO_QUEUE_YET = (
    "The process of the channel has no queue on RabbitMQ yet: it may still be reconnecting"
)


class _Lane:
    """Who sends by one route while a returned message is being tried again: one at a time."""

    __slots__ = ("_is_taken", "_queue", "users")

    def __init__(self) -> None:
        self.users = 0
        self._is_taken = False
        self._queue: deque[asyncio.Future[bool]] = deque()  # first come, first served

    async def enter(self, deadline: float) -> bool:
        """Wait for one's turn; False if it doesn't come by ``deadline`` (loop time)."""
        if not self._is_taken:
            self._is_taken = True
            return True
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_at(deadline, resolve, turn, False)
        self._queue.append(turn)
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
        for turn in self._queue:
            turn.cancel()

    def leave(self) -> None:
        """Let the next one have his turn."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(True)
                return
        self._is_taken = False


class DirectSender:
    """Sends bodies by a ``Publisher``; each process's channels have a route, which is mandatory.

    ``operation_timeout``: seconds that a call may take, which all deadlines are made of.
    """

    def __init__(self, publisher: Publisher, operation_timeout: float) -> None:
        self._publisher = publisher
        self._operation_timeout = operation_timeout
        self._lanes: dict[Route, _Lane] = {}
        self._pauses = Waiters()  # between two tries
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
            if self._unreachable:
                self._note_outcome(route, outcome)
            if (
                outcome is CONFIRMED  # Almost always: so the rest isn't looked at.
                or outcome is not Outcome.RETURNED
                or self._is_unreachable(route)
            ):
                return outcome
        lane = self._lanes.get(route)
        if lane is None:
            lane = self._lanes[route] = _Lane()
        lane.users += 1
        try:
            if not await lane.enter(deadline):
                raise BrokerUnavailable(_NO_QUEUE_YET)
            try:
                return await self._try_again(route, body, deadline, after)
            finally:
                lane.leave()
        finally:
            lane.users -= 1
            if not lane.users:
                del self._lanes[route]

    def _note_outcome(self, route: Route, outcome: Outcome) -> None:
        if outcome in (Outcome.CONFIRMED, Outcome.REFUSED):
            self._unreachable.pop(route, None)

    async def _try_again(
        self,
        route: Route,
        body: bytes,
        deadline: float,
        after: Callable[[], Awaitable[object]] | None,
    ) -> Outcome:
        loop = asyncio.get_running_loop()
        begun_at = loop.time()
        retry_timeout = min(RETRY_TIMEOUT, (self._operation_timeout - _CONFIRM_TIMEOUT) / 2)
        pause = _FIRST_PAUSE
        while True:
            outcome = await self._publisher.publish(body, route, deadline, after)
            self._note_outcome(route, outcome)
            if outcome is not Outcome.RETURNED or self._is_unreachable(route):
                return outcome
            now = loop.time()
            # It may have reconnected since the last try.
            if now + pause > max(
                begun_at + retry_timeout, self._publisher.reconnected_at + RECONNECT_GRACE
            ):
                self._remember_unreachable(route, now)
                return outcome
            if now + pause > deadline - _CONFIRM_TIMEOUT:
                raise BrokerUnavailable(_NO_QUEUE_YET)
            await self._pauses.wait(now + pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def cancel_calls(self) -> None:
        """Cancel the calls that wait for a receiver."""
        self._pauses.cancel()
        for lane in self._lanes.values():
            lane.cancel()

    def _is_unreachable(self, route: Route) -> bool:
        until = self._unreachable.get(route)
        if until is None:
            return False
        return asyncio.get_running_loop().time() < until

    def _remember_unreachable(self, route: Route, now: float) -> None:
        # Oldest first, so what is over is at the front.
        for old, until in list(self._unreachable.items()):
            if until > now:
                break
            del self._unreachable[old]
        self._unreachable.pop(route, None)
        self._unreachable[route] = now + UNREACHABLE_TIMEOUT
