"""``PublisherChannel``: publishes with confirms."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Iterable
from functools import partial
from itertools import takewhile
from time import time, time_ns
from typing import NamedTuple

import carehare

from .._futures import call_at, resolve
from . import frames
from .channel import CallChannel, ChannelHost
from .content import Content
from .errors import unexpected_frame
from .methods import Confirm

# Seconds for which publishers are blocked before a ping is written, and for which the ping may wait
# for its confirm: an alarm may last until an operator ends it.
BLOCKED_BEFORE_PING = 5.0
_PING_TIMEOUT = 86400.0

# Frames of Basic.Publish that are kept (keys have at most 255 bytes)
_MOST_METHODS = 1000


class Outcome(enum.Enum):
    """What became of a published message."""

    CONFIRMED = "acked: every queue that it was routed to has it"
    NACKED = "nacked by at least one queue"
    RETURNED = "mandatory, and routed to no queue"
    UNKNOWN = "written, but the connection or the time ended before the confirm"
    BLOCKED = "not written: the broker blocks publishers"


# For the path of every message: up to Python 3.11 reading a member of an enumeration is slow.
CONFIRMED = Outcome.CONFIRMED

# What becomes of a message for one queue that the queue doesn't take.
NOT_TAKEN = (Outcome.RETURNED, Outcome.NACKED)


class Route(NamedTuple):
    """Where a message is published to."""

    exchange: str
    routing_key: str
    # Whether the broker returns it if no queue is bound to that key
    mandatory: bool


def numbers_up_to(last: int, unconfirmed: Iterable[int]) -> list[int]:
    """Return the sequence numbers that a confirm with ``multiple`` means; they stand in order."""
    return list(takewhile(last.__ge__, unconfirmed))


class PublisherChannel(CallChannel):
    """Publishes with confirms, to any exchange, in order.

    ``publish`` returns a future that always ends with an ``Outcome``, never with an exception.
    ``on_end(exc)`` is called when the broker closes the AMQP channel (ChannelClosedByServer: a
    missing exchange, a body too large for the broker), not when the connection is closed.

    Confirms come in any order, and both acks and nacks may be *multiple*. A Basic.Return comes
    before the ack of its own message, but other confirms may come in between.

    A *ping* shows whether the AMQP channel works: a message by ``ping_route``, which must lead to
    no queue, so that its confirm waits for none. It is published when confirms stay out, and
    once while the broker blocks publishers. RabbitMQ doesn't read from a blocked connection, so
    the confirm proves that publishers aren't blocked any more, even if ``connection.unblocked`` got
    lost. There is one ping at a time: it waits in the socket as long as the alarm lasts.
    """

    def __init__(
        self,
        host: ChannelHost,
        amqp_channel_id: int,
        *,
        on_end: Callable[[Exception], None],
        ping_route: Route | None = None,
    ) -> None:
        super().__init__(host, amqp_channel_id)
        self._on_end = on_end
        self._ping_route = ping_route
        self._ping: asyncio.Future[Outcome] | None = None  # that waits for its confirm
        self._has_expired = False  # some message, and nothing was answered since
        self._write_now = host.transport.write_now
        self._loop = asyncio.get_running_loop()
        self._max_payload = frames.max_payload(host.frame_max)
        self._methods: dict[Route, bytes] = {}  # the frames of Basic.Publish
        self._sequence_number = 0
        # By sequence number, in order: the sender's future, and its deadline (loop time).
        self._unconfirmed: dict[int, tuple[asyncio.Future[Outcome], float]] = {}
        self._returned: set[int] = set()  # those of them that the broker returned
        # Whether the last message that began alone stayed alone until its answer came
        self._was_alone = True
        self._timer: asyncio.TimerHandle | None = None
        self._watched_until = float("inf")  # when it goes off
        self._returned_content = Content()
        self._is_closed = False
        self.call(Confirm.Select())

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be published any more."""
        return self._is_closed or not self._host.is_open

    def can_publish(self) -> bool:
        """Return whether ``publish`` would write, and there is room for it in the buffers.

        If there isn't, ``call_when_writable`` says when there is again.
        """
        host = self._host
        if self._is_closed or not host.is_open:
            return False
        if time() >= self._heartbeat.fresh_until:
            host.read_first()
        return host.is_open and not host.transport.is_full()

    def call_when_writable(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once when there is room to write again: see the transport."""
        self._host.transport.call_when_writable(callback)

    @property
    def unconfirmed(self) -> int:
        """How many messages, but for pings, wait for their confirm."""
        is_pinging = self._ping is not None and not self._ping.done()
        return len(self._unconfirmed) - is_pinging

    def publish(self, body: bytes, route: Route, deadline: float) -> asyncio.Future[Outcome]:
        """Write a message. ``deadline`` (loop time): when an unanswered one counts as UNKNOWN."""
        future: asyncio.Future[Outcome] = self._loop.create_future()
        if self._is_closed:
            future.set_result(Outcome.UNKNOWN)
            return future
        method = self._methods.get(route)
        if method is None:
            method = self._encode_method(route)
        sequence_number = self._sequence_number + 1
        pieces = frames.encode_publish(
            self._amqp_channel_id,
            method,
            body,
            time_ns() // 1_000_000,
            sequence_number if route.mandatory else None,
            self._max_payload,
        )
        is_first = not self._unconfirmed
        if is_first and self._was_alone:
            # Probably no other message follows in this turn that could share its write (nearly
            # Nagle's algorithm). It leaves before the acks of this turn, on the other connection.
            self._write_now(pieces)
        else:
            self._was_alone = is_first
            for piece in pieces:
                self._write(piece)
        # Only now: the broker doesn't count a message that couldn't be encoded.
        self._sequence_number = sequence_number
        self._unconfirmed[sequence_number] = (future, deadline)
        if deadline < self._watched_until:
            self._watch(deadline)
        return future

    def _encode_method(self, route: Route) -> bytes:
        if len(self._methods) >= _MOST_METHODS:
            self._methods.clear()
        method = frames.encode_publish_method(self._amqp_channel_id, *route)
        self._methods[route] = method
        return method

    def _watch(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = call_at(deadline, self._expire)
        self._watched_until = deadline

    def _expire(self) -> None:
        self._timer = None
        self._watched_until = float("inf")
        # Deadlines aren't in order: a call that waited for the connection has less time left than
        # those before it. To look at all happens about once in operation_timeout, since confirms
        # leave the timer alone.
        now = self._loop.time()
        for sequence_number, (future, deadline) in list(self._unconfirmed.items()):
            if deadline <= now:
                del self._unconfirmed[sequence_number]
                self._returned.discard(sequence_number)
                # An answer is due until the broker answers anything from now on.
                self._has_expired, self._answers.is_answered = True, False
                resolve(future, Outcome.UNKNOWN)
        if self._unconfirmed:
            self._watch(min(deadline for _, deadline in self._unconfirmed.values()))

    def on_bytes(self, frame_type: int, data: bytes, start: int, end: int) -> int:
        if frame_type != frames.METHOD:
            if self._returned_content.add(frame_type, data, start, end):
                self._on_returned()
            return end + 1
        if self._returned_content.is_due:
            raise unexpected_frame("a method instead of a message's body")
        index = frames.read_index(data, start, end)
        if index == frames.ACK:
            self._on_confirm(*frames.read_confirm(data, start, end), Outcome.CONFIRMED)
        elif index == frames.NACK:
            self._on_confirm(*frames.read_confirm(data, start, end), Outcome.NACKED)
        elif index == frames.RETURN:
            self._returned_content.begin()
        else:
            return super().on_bytes(frame_type, data, start, end)
        return end + 1

    def _on_returned(self) -> None:
        self._returned_content.take_body()  # It is of no use.
        header = self._returned_content.header
        sequence_number = frames.read_correlation_id(header, 0, len(header))
        if sequence_number in self._unconfirmed:
            self._returned.add(sequence_number)

    def hangs(self) -> bool:
        if self._answers.is_answered:
            self._has_expired = False
        blocked_since = self._host.blocked_since
        if blocked_since is not None:
            # By then the broker has answered what it had read before it blocked publishers.
            if self._loop.time() - blocked_since >= BLOCKED_BEFORE_PING:
                self._publish_ping(blocked_since)
            return self._answers.look(is_due=False)
        is_due = bool(self._calls or self._unconfirmed or self._has_expired)
        hangs = self._answers.look(is_due=is_due)
        if self._answers.is_waiting:
            self._publish_ping(None)
        return hangs

    def _publish_ping(self, blocked_since: float | None) -> None:
        if self._ping is not None or self._ping_route is None or self.is_closed:
            return
        self._ping = self.publish(b"", self._ping_route, self._loop.time() + _PING_TIMEOUT)
        self._ping.add_done_callback(partial(self._on_ping, blocked_since))

    def _on_ping(self, blocked_since: float | None, ping: asyncio.Future[Outcome]) -> None:
        self._ping = None
        host = self._host
        if ping.result() is not Outcome.UNKNOWN and blocked_since == host.blocked_since:
            host.note_unblocked()

    def _on_confirm(self, sequence_number: int, multiple: bool, outcome: Outcome) -> None:
        self._answers.is_answered = True
        if multiple:
            for number in numbers_up_to(sequence_number, self._unconfirmed):
                self._resolve_confirm(number, outcome)
        else:
            self._resolve_confirm(sequence_number, outcome)

    def _resolve_confirm(self, sequence_number: int, outcome: Outcome) -> None:
        # None: its deadline has passed, and it is UNKNOWN already.
        message = self._unconfirmed.pop(sequence_number, None)
        if message is None:
            return
        if self._returned and sequence_number in self._returned:
            self._returned.remove(sequence_number)
            outcome = Outcome.RETURNED
        future = message[0]
        if not future.done():
            future.set_result(outcome)

    def _close(self, culprit_exc: Exception, others_exc: Exception) -> None:
        self._is_closed = True
        super()._close(culprit_exc, others_exc)
        if isinstance(culprit_exc, carehare.ChannelClosedByServer):
            self._on_end(culprit_exc)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._watched_until = float("inf")
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for sequence_number, (future, _) in unconfirmed.items():
            is_returned = sequence_number in self._returned
            resolve(future, Outcome.RETURNED if is_returned else Outcome.UNKNOWN)
