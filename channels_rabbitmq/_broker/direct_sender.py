"""Sending to one channel, through the queue of its process, and trying again if no queue took it.

A direct send is *mandatory*: RabbitMQ returns it if no queue is bound to its key, and then another
try can't duplicate it. The same holds for a nack that isn't due to a full queue (``refusals``). How
long it is tried again depends on what is known of the process (``receivers``):

- It is alive, and probably reconnecting: for ``RETRY_TIMEOUT``. If our own connection was lost a
  moment ago, until ``RECONNECT_GRACE``, whatever else is known.
- It is unreachable: each message to it gets one try, until one is taken.
- Nothing is known of it: as long as the allowance lasts.

Meanwhile later sends to the same process wait behind it, by a ``FairLock``, which keeps their
order.

A call that has little time left, because it waited for our own connection, says nothing about the
receiver, which may be back in a moment. Such a call raises, and the receiver doesn't count as
unreachable. (Otherwise all messages of the next seconds were dropped after an outage of about
``operation_timeout``, 1,800 of 2,500 in a test.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from .._amqp.publishing import CONFIRMED, NOT_TAKEN, Outcome, Route
from .._futures import FairLock, Waiters
from ..exceptions import BrokerUnavailable
from .publisher import Publisher
from .receivers import Receivers
from .refusals import DELETION_TIMEOUT, Refusals

# Seconds for which a returned message is tried again; at most half of the time that the call has.
RETRY_TIMEOUT = 2.0
# Seconds after our own reconnect in which a returned message is tried again in any case: the
# receiver has probably lost its connection too, and may be at the longest delay of its back-off.
RECONNECT_GRACE = 5.0
# Seconds between two tries: the first delay, and the longest.
FIRST_PAUSE = 0.02
LONGEST_PAUSE = 0.25
# Seconds that the last try must leave for its confirm, or its outcome would be unknown.
_CONFIRM_TIMEOUT = 0.5

_NO_QUEUE_YET = (
    "The process of the channel has no queue on RabbitMQ yet: it may still be reconnecting"
)


@dataclass(eq=False, slots=True)
class _Message:
    """A message that no queue took at its first try, or that waits behind such ones."""

    body: bytes
    route: Route
    deadline: float
    after: Callable[[], Awaitable[object]] | None
    called_at: float  # loop time
    outcome: Outcome | None  # of its last try, as RabbitMQ said it


class DirectSender:
    """Sends bodies by a ``Publisher``; the channels of each process have a route, a mandatory one.

    ``operation_timeout``: seconds that a call may take; all deadlines are made of it. ``refusals``
    knows what a nack means, ``receivers`` what is known of the processes. The others are
    seconds: see the constants.
    """

    def __init__(
        self,
        publisher: Publisher,
        operation_timeout: float,
        receivers: Receivers,
        refusals: Refusals,
        *,
        first_pause: float = FIRST_PAUSE,
        longest_pause: float = LONGEST_PAUSE,
        retry_timeout: float = RETRY_TIMEOUT,
        reconnect_grace: float = RECONNECT_GRACE,
    ) -> None:
        self._publisher = publisher
        self._retry_timeout = min(retry_timeout, (operation_timeout - _CONFIRM_TIMEOUT) / 2)
        self._reconnect_grace = reconnect_grace
        self._receivers = receivers
        self._refusals = refusals
        self._first_pause = first_pause
        self._longest_pause = longest_pause
        self._loop = asyncio.get_running_loop()
        # By route, while calls try again: one at a time, and in order. They are written together
        # at first, and returned one after the other. So a later call may ask for the lock before
        # an earlier one.
        self.locks: dict[Route, FairLock] = {}
        self._pauses = Waiters()  # between two tries

    async def send(
        self,
        route: Route,
        body: bytes,
        deadline: float,
        after: Callable[[], Awaitable[object]] | None = None,
    ) -> Outcome:
        """Send; after all tries, RETURNED means that there was no queue, NACKED that it is full.

        ``deadline`` and ``after`` are those of ``Publisher.publish``. Raises BrokerUnavailable as
        that does, and also if the time was over before all tries: either way nothing was sent. With
        one sender that awaits each call, messages by one route arrive in order.
        """
        called_at = self._loop.time()
        outcome = None
        # While RabbitMQ blocks publishers, don't queue behind a retry: return BLOCKED at once.
        if not self.locks or route not in self.locks or self._publisher.is_blocked:
            outcome = await self._publisher.publish(body, route, deadline, after)
            if outcome is CONFIRMED:  # Almost always: so the rest isn't looked at.
                self._receivers.on_taken(route, called_at)
                return outcome
            if outcome not in NOT_TAKEN:
                return outcome
        message = _Message(body, route, deadline, after, called_at, outcome)
        final = None
        try:
            final = self._verdict(message) or await self._send_in_turn(message)
        finally:
            self._refusals.count(message.outcome, is_full=final is Outcome.NACKED)
        return final

    async def _send_in_turn(self, message: _Message) -> Outcome:
        lock = self.locks.get(message.route)
        is_first = lock is None  # so no other call has tried since
        if lock is None:
            lock = self.locks[message.route] = FairLock()
        lock.users += 1
        try:
            if not await lock.acquire(message.deadline):
                raise BrokerUnavailable(_NO_QUEUE_YET)
            if lock.is_aborted:
                return Outcome.NACKED
            try:
                outcome = Outcome.RETURNED if is_first else await self._publish(message)
                if outcome in NOT_TAKEN:
                    outcome = await self._try_again(message)
                if outcome is Outcome.NACKED:
                    lock.abort()  # The queue is full for all of them.
                return outcome
            finally:
                lock.release()
        finally:
            lock.users -= 1
            if not lock.users:
                del self.locks[message.route]

    async def _publish(self, message: _Message) -> Outcome:
        """Make another try, and note what it says of the process."""
        self._refusals.count(message.outcome, is_full=False)
        message.outcome = None
        outcome = await self._publisher.publish(
            message.body, message.route, message.deadline, message.after
        )
        message.outcome = outcome
        if outcome is CONFIRMED:
            self._receivers.on_taken(message.route, message.called_at)
        return outcome

    def _verdict(self, message: _Message) -> Outcome | None:
        """Return what becomes of a message that wasn't taken, if that is known already."""
        if message.outcome is None:
            return None
        if message.outcome is Outcome.NACKED:
            if self._receivers.took_later_one(message.route, message.called_at):
                return Outcome.NACKED
            if self._receivers.has_ended(message.route):
                return Outcome.RETURNED  # Its queue is just being deleted.
            is_full = self._refusals.known(message.route)
            if is_full is not False:
                return Outcome.NACKED if is_full else None
        return Outcome.RETURNED if self._receivers.is_unreachable(message.route) else None

    async def _try_again(self, message: _Message) -> Outcome:
        """Go on with a message that wasn't taken, as long as its process may turn up."""
        begun_at = self._loop.time()
        pause = self._first_pause
        spent = 0.0  # of the allowance
        while (outcome := await self._find_verdict(message, begun_at)) is None:
            at = self._loop.time() + pause  # the next try
            if not self._may_be_back(message.route, begun_at, at):
                is_too_late = self._is_too_late(begun_at, at)
                if is_too_late or not self._receivers.allowance.spend(pause, at):
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
            pause = min(pause * 2, self._longest_pause)
            outcome = await self._publish(message)
            if outcome not in NOT_TAKEN:
                break
        if outcome is not Outcome.RETURNED:
            self._receivers.allowance.refund(spent)
        return outcome

    async def _find_verdict(self, message: _Message, begun_at: float) -> Outcome | None:
        """As ``_verdict``, but finds out why a queue goes on refusing."""
        is_just_deleted = self._loop.time() < begun_at + DELETION_TIMEOUT
        if is_just_deleted and not self._receivers.is_unreachable(message.route):
            return self._verdict(message)
        return await self._ask(message)

    async def _give_up(self, message: _Message) -> Outcome:
        """Return what becomes of a message that won't be tried again."""
        outcome = await self._ask(message)
        if outcome is None:
            self._receivers.on_unreachable(message.route)
            outcome = Outcome.RETURNED
        return outcome

    async def _ask(self, message: _Message) -> Outcome | None:
        """As ``_verdict``, but finds out what a nack means, unless that is known."""
        if (
            message.outcome is Outcome.NACKED
            and self._verdict(message) is None
            and await self._refusals.is_full(message.route, message.deadline)
        ):
            self._receivers.on_taken(message.route, message.called_at)
            return Outcome.NACKED
        return self._verdict(message)

    def _may_be_back(self, route: Route, begun_at: float, at: float) -> bool:
        """Whether what is known of a process gives reason to try it again at that moment."""
        if at <= self._publisher.reconnected_at + self._reconnect_grace:
            return True  # Our own connection may be new since the last try.
        return self._receivers.is_alive(route, begun_at) and not self._is_too_late(begun_at, at)

    def _is_too_late(self, begun_at: float, at: float) -> bool:
        return at > begun_at + self._retry_timeout

    def cancel_calls(self) -> None:
        """Cancel the calls that wait for a receiver."""
        self._pauses.cancel()
        for lock in self.locks.values():
            lock.cancel()
