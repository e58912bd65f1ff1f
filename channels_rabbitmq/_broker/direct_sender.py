"""Sending to one channel, through its process's queue, and what to do when there is none.

A direct send is *mandatory*: the broker returns it if no queue is bound to its key, and then
another try can't duplicate it. So it is with a nack that isn't for a full queue (``refusals``).
How long it is tried again depends on what is known of the process:

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

from .._amqp.publishing import CONFIRMED, Outcome, Route
from .._futures import Waiters, resolve
from ..exceptions import BrokerUnavailable
from .publisher import Publisher
from .refusals import DELETION_TIMEOUT, Refusals

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

_NOT_TAKEN = (Outcome.RETURNED, Outcome.REFUSED)  # by any queue

_NO_QUEUE_YET = (
    "The process of the channel has no queue on RabbitMQ yet: it may still be reconnecting"
)


class _Lane:
    """Who sends by one route while a returned message is being tried again: one at a time.

    In the order of their deadlines, which is that of the calls. Not in that of entering: when many
    that were written together are returned, calls made since then have entered before most of them.
    """

    __slots__ = ("_is_taken", "_numbers", "_queue", "is_refused", "users")

    def __init__(self) -> None:
        self.users = 0
        self.is_refused = False  # all who wait are: the queue turned out to be full
        self._is_taken = False
        # A heap of (deadline, number, turn)
        self._queue: list[tuple[float, int, asyncio.Future[bool]]] = []
        self._numbers = itertools.count()

    async def enter(self, deadline: float) -> bool:
        """Wait for one's turn; False if it doesn't come by ``deadline`` (loop time)."""
        if self.is_refused:
            return True
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

    def refuse(self) -> None:
        """Have those who wait go on at once: the queue is full."""
        self.is_refused = True
        for _, _, turn in self._queue:
            resolve(turn, True)
        self._queue.clear()

    def leave(self) -> None:
        """Let the next one have his turn."""
        while self._queue:
            _, _, turn = heapq.heappop(self._queue)
            if not turn.done():
                turn.set_result(True)
                return
        self._is_taken = False


class _Message:
    """One that no queue took at its first try, or that waits behind such ones."""

    __slots__ = ("after", "begun_at", "body", "deadline", "outcome", "route")

    def __init__(
        self,
        body: bytes,
        route: Route,
        deadline: float,
        after: Callable[[], Awaitable[object]] | None,
        begun_at: float,
    ) -> None:
        self.body = body
        self.route = route
        self.deadline = deadline
        self.after = after
        self.begun_at = begun_at  # loop time of the call
        self.outcome: Outcome | None = None  # of its last try, as the broker said it


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
    ``own_route`` leads to the caller's own process, which is alive. ``refusals`` knows what a nack
    means.
    """

    def __init__(
        self,
        publisher: Publisher,
        operation_timeout: float,
        own_route: Route,
        refusals: Refusals,
    ) -> None:
        self._publisher = publisher
        self._operation_timeout = operation_timeout
        self._own_route = own_route
        self._refusals = refusals
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[Route, _Lane] = {}
        self._pauses = Waiters()  # between two tries
        # By route: when that call was made whose message was the last to be taken (loop time)
        self._heard_at: dict[Route, float] = {}
        self._allowance = _Allowance()
        self._unreachable: dict[Route, float] = {}  # until when, in loop time

    async def send(
        self,
        route: Route,
        body: bytes,
        deadline: float,
        after: Callable[[], Awaitable[object]] | None = None,
    ) -> Outcome:
        """Send; after all tries, RETURNED means that nobody was there, REFUSED: its queue is full.

        ``deadline`` and ``after`` are those of ``Publisher.publish``. Raises BrokerUnavailable as
        that does, and also if the time was over before all tries: either way nothing was sent. With
        one sender that awaits each call, messages by one route arrive in order.
        """
        begun_at = self._loop.time()
        outcome = None
        # Who finds publishers blocked needn't wait for a turn to hear it.
        if not self._lanes or route not in self._lanes or self._publisher.is_blocked:
            outcome = await self._publisher.publish(body, route, deadline, after)
            if outcome is CONFIRMED:  # Almost always: so the rest isn't looked at.
                self._note_taken(route, begun_at)
                return outcome
            if outcome not in _NOT_TAKEN:
                return outcome
        message = _Message(body, route, deadline, after, begun_at)
        message.outcome = outcome
        return await self._send_again(message)

    async def _send_again(self, message: _Message) -> Outcome:
        """Send a message that wasn't taken, or waits behind such ones."""
        final = None
        try:
            final = self._verdict(message) or await self._send_in_turn(message)
        finally:
            self._refusals.count(message.outcome, is_full=final is Outcome.REFUSED)
        return final

    async def _send_in_turn(self, message: _Message) -> Outcome:
        lane = self._lanes.get(message.route)
        is_first = lane is None  # so nobody else has tried since
        if lane is None:
            lane = self._lanes[message.route] = _Lane()
        lane.users += 1
        try:
            if not await lane.enter(message.deadline):
                raise BrokerUnavailable(_NO_QUEUE_YET)
            if lane.is_refused:
                return Outcome.REFUSED
            try:
                outcome = Outcome.RETURNED if is_first else await self._publish(message)
                if outcome in _NOT_TAKEN:
                    outcome = await self._try_again(message)
                if outcome is Outcome.REFUSED:
                    lane.refuse()
                return outcome
            finally:
                lane.leave()
        finally:
            lane.users -= 1
            if not lane.users:
                del self._lanes[message.route]

    async def _publish(self, message: _Message) -> Outcome:
        """Make another try, and note what it says of the process."""
        self._refusals.count(message.outcome, is_full=False)
        message.outcome = None
        outcome = await self._publisher.publish(
            message.body, message.route, message.deadline, message.after
        )
        message.outcome = outcome
        if outcome is CONFIRMED:
            self._note_taken(message.route, message.begun_at)
        return outcome

    def _note_taken(self, route: Route, begun_at: float) -> None:
        """The process is there: its queue has taken the message of a call made at that moment."""
        if len(self._heard_at) >= _MOST_ROUTES:
            self._heard_at.clear()  # of processes that are gone, most of them
        self._heard_at[route] = begun_at
        if self._unreachable:
            self._unreachable.pop(route, None)

    def _verdict(self, message: _Message) -> Outcome | None:
        """Return what becomes of a message that wasn't taken, if that can be told already."""
        if message.outcome is None:
            return None
        if message.outcome is Outcome.REFUSED:
            if self._heard_at.get(message.route, 0.0) > message.begun_at:
                return Outcome.REFUSED  # A later one was taken.
            is_full = self._refusals.known(message.route)
            if is_full is not False:
                return Outcome.REFUSED if is_full else None
        return Outcome.RETURNED if self._is_unreachable(message.route) else None

    async def _try_again(self, message: _Message) -> Outcome:
        """Go on with a message that wasn't taken, as long as its process may turn up."""
        begun_at = self._loop.time()
        pause = _FIRST_PAUSE
        spent = 0.0  # of the allowance
        while (outcome := await self._find_verdict(message, begun_at)) is None:
            at = self._loop.time() + pause  # the next try
            if not self._may_be_back(message.route, begun_at, at):
                if self._is_too_late(begun_at, at) or not self._allowance.spend(pause, at):
                    outcome = await self._give_up(message)
                    break
                spent += pause
            if at > message.deadline - _CONFIRM_TIMEOUT:
                outcome = await self._ask(message)
                if outcome is None:
                    raise BrokerUnavailable(_NO_QUEUE_YET)
                break
            await self._pauses.wait(at)
            if (outcome := self._verdict(message)) is not None:
                break
            pause = min(pause * 2, _LONGEST_PAUSE)
            outcome = await self._publish(message)
            if outcome not in _NOT_TAKEN:
                break
        if outcome is not Outcome.RETURNED:
            self._allowance.give_back(spent)
        return outcome

    async def _find_verdict(self, message: _Message, begun_at: float) -> Outcome | None:
        """As ``_verdict``, but finds out why a queue goes on refusing."""
        is_just_deleted = self._loop.time() < begun_at + DELETION_TIMEOUT
        if is_just_deleted and not self._is_unreachable(message.route):
            return self._verdict(message)
        return await self._ask(message)

    async def _give_up(self, message: _Message) -> Outcome:
        """Return what becomes of a message that won't be tried again."""
        outcome = await self._ask(message)
        if outcome is None:
            self._remember_unreachable(message.route)
            outcome = Outcome.RETURNED
        return outcome

    async def _ask(self, message: _Message) -> Outcome | None:
        """As ``_verdict``, but finds out what a nack means, unless that is known."""
        if (
            message.outcome is Outcome.REFUSED
            and self._verdict(message) is None
            and await self._refusals.is_full(message.route, message.deadline)
        ):
            self._note_taken(message.route, message.begun_at)
            return Outcome.REFUSED
        return self._verdict(message)

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
