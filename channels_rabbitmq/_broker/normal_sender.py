"""Sending to normal channels: in order, also while RabbitMQ has no queue for them.

The first message on a connection waits in the Publisher's outbox until the queue is declared and
bound (``normal_queues``). Later ones wait behind it, and then they are written at once.

If the queue or its binding is deleted meanwhile, RabbitMQ returns the messages, as they are
mandatory. A message that was returned reached no queue, so it is sent again, behind a new declare.
Two rules keep the order:

- When the first message is returned, later ones may be on their way, and all of them are answered
  before the declare is written. (Otherwise the queue would be there for the last of them.)
- New calls wait until then, too: so the messages that are returned join the outbox before them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from channels.exceptions import ChannelFull

from .._amqp.publishing import Outcome, Route
from .._futures import FairLock, Waiters
from .._reporter import Reporter
from ..exceptions import BrokerUnavailable
from ..statistics import Counters
from .normal_queues import NormalQueues, NormalTopology
from .publisher import Publisher
from .refusals import BLOCKED

# Tries of one message. Each return means that the queue was deleted a moment ago.
_MOST_TRIES = 5
_TOO_LATE = "Messages that came before were not confirmed in time"


@dataclass(eq=False, slots=True)
class _Sending:
    """The calls that send to one channel at the same time."""

    calls: int = 0
    unanswered: int = 0  # messages that are written, or will be in a moment
    all_answered: Waiters = field(default_factory=Waiters)
    # For new calls while the queue isn't bound, until they have joined the outbox
    turn: FairLock = field(default_factory=FairLock)


@dataclass(eq=False, slots=True)
class _Message:
    """The message of one call."""

    channel: str
    body: bytes
    route: Route
    deadline: float  # loop time
    sending: _Sending
    has_turn: bool = False
    # Of its present try: the binding, if it has one; and whether it counts as unanswered
    bind: asyncio.Future[None] | None = None
    is_counted: bool = False

    def count(self, bind: asyncio.Future[None] | None) -> None:
        """It is written in a moment, to the queue of the binding ``bind``."""
        self.bind = bind
        self.is_counted = True
        self.sending.unanswered += 1

    def end_try(self) -> None:
        """It is answered, or won't be written."""
        if self.is_counted:
            self.is_counted = False
            self.sending.unanswered -= 1
            if not self.sending.unanswered:
                self.sending.all_answered.wake()

    def end_turn(self) -> None:
        """It has joined the outbox: let the next call do so."""
        if self.has_turn:
            self.has_turn = False
            self.sending.turn.release()

    async def wait_answered(self) -> None:
        """Wait until all messages are answered that were written before."""
        while self.sending.unanswered:
            if not await self.sending.all_answered.wait(self.deadline):
                raise BrokerUnavailable(_TOO_LATE)


class NormalSender:
    """Sends to normal channels by a ``Publisher``. ``operation_timeout`` is in seconds."""

    def __init__(
        self,
        topology: NormalTopology,
        publisher: Publisher,
        operation_timeout: float,
        counters: Counters,
        reporter: Reporter,
    ) -> None:
        self._topology = topology
        self._publisher = publisher
        self.queues = NormalQueues(topology, publisher.supervisor, publisher.exchange_is_gone)
        self._operation_timeout = operation_timeout
        self._counters = counters
        self._reporter = reporter
        self._sendings: dict[str, _Sending] = {}  # by channel

    async def send(self, channel: str, body: bytes) -> None:
        """Send to a normal channel: see ``RabbitmqChannelLayer.send``."""
        deadline = asyncio.get_running_loop().time() + self._operation_timeout
        sending = self._sendings.get(channel)
        if sending is None:
            sending = self._sendings[channel] = _Sending()
        sending.calls += 1
        message = _Message(channel, body, self._topology.route(channel), deadline, sending)
        try:
            outcome = await self._send(message)
        finally:
            message.end_turn()
            sending.calls -= 1
            if not sending.calls:
                del self._sendings[channel]
        self._tell(channel, outcome)

    async def _send(self, message: _Message) -> Outcome:
        is_direct = (
            self.queues.bound(message.channel) is not None and not message.sending.turn.users
        )
        if not is_direct and not self._publisher.is_blocked:
            await self._wait_turn(message)
        for _ in range(_MOST_TRIES):
            outcome = await self._try(message)
            if outcome is not Outcome.RETURNED:
                return outcome
        raise BrokerUnavailable(f"No queue on RabbitMQ takes messages for {message.channel}")

    async def _wait_turn(self, message: _Message) -> None:
        turn = message.sending.turn
        turn.users += 1
        try:
            message.has_turn = await turn.acquire(message.deadline)
        finally:
            turn.users -= 1
        if not message.has_turn:
            raise BrokerUnavailable(_TOO_LATE)
        await message.wait_answered()

    async def _try(self, message: _Message) -> Outcome:
        """Publish a message once. It is written or in the outbox before this awaits anything."""
        after: Callable[[], Awaitable[object]] | None = None
        bind = self.queues.bound(message.channel)
        if bind is None:
            after = partial(self._bind, message)
        else:
            message.count(bind)
            message.end_turn()  # No other task runs before it is written or in the outbox.
        try:
            outcome = await self._publisher.publish(
                message.body, message.route, message.deadline, after
            )
            if outcome is Outcome.RETURNED:
                self.queues.forget(message.channel, message.bind)
            return outcome
        finally:
            message.end_try()

    async def _bind(self, message: _Message) -> None:
        """Have the queue declared for a message that is in the outbox."""
        message.end_turn()
        await message.wait_answered()
        await self._publisher.supervisor.wait_ready(message.deadline)
        if self._publisher.is_blocked:
            return  # RabbitMQ reads nothing, so the outbox has dropped the message.
        await self.queues.bind(message.channel, message.deadline)
        message.count(self.queues.bound(message.channel))

    def _tell(self, channel: str, outcome: Outcome) -> None:
        """Raise if RabbitMQ didn't take a message, or count it if nobody knows."""
        if outcome is Outcome.NACKED:
            self._counters.nacked += 1
            raise ChannelFull(
                f"The queue of the normal channel {channel} is full: its receivers don't keep up "
                "(capacity, channel_capacity, remote_capacity_bytes)"
            )
        if outcome is Outcome.BLOCKED:
            raise ChannelFull(BLOCKED)
        if outcome is Outcome.UNKNOWN:
            self._reporter.report("outcome_unknown", channel)
