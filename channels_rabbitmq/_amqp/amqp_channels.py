"""The AMQP channels of the layer: for calls, binds, consuming, publishing.

They get their frames as bytes from ``Protocol`` by ``accept_bytes`` and say where the next one
begins; what they don't take comes again, decoded by pamqp, through carehare's ``accept_frame``.
They live as long as the connection. (Those of carehare's public methods are in
``carehare_channels``.)
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
from collections import deque
from collections.abc import Callable
from functools import partial
from time import time
from typing import TYPE_CHECKING, Any, NamedTuple

import carehare
import pamqp.base
import pamqp.commands
import pamqp.exceptions
from carehare._channel import Channel

from .._futures import fail, resolve
from . import frames
from .acks import AckBatch
from .answers import AnswerWatch

if TYPE_CHECKING:
    from .protocol import Protocol

# Bytes: no RabbitMQ lets a larger message through, whatever its max_message_size. Whoever announces
# one could have memory fill up with it.
LARGEST_BODY = 512 * 1024 * 1024

_CHANNEL_OPEN = pamqp.commands.Channel.Open()

_EXCHANGE_UNBIND = pamqp.commands.Exchange.Unbind.index
_EXCHANGE_UNBIND_OK = pamqp.commands.Exchange.UnbindOk.index

# Seconds for which publishers are blocked before a ping is written, and for which that may wait for
# its confirm: an alarm may last until somebody comes.
_BLOCKED_BEFORE_PING = 5.0
_PING_TIMEOUT = 86400.0

# Frames of Basic.Publish that are kept (keys have at most 255 bytes)
_MOST_METHODS = 1000


def closed_by_server(frame: pamqp.commands.Channel.Close) -> carehare.ChannelClosedByServer:
    """Return the error that says what the broker said."""
    return carehare.ChannelClosedByServer(frame.reply_code or 0, frame.reply_text)


def _content_due(missing: int | None) -> int:
    """Return the type of the frame that is due in a message of which ``missing`` bytes are."""
    return frames.HEADER if missing is None else frames.BODY


class BytesChannel(Channel):
    """An AMQP channel that takes frames as bytes."""

    def accept_bytes(self, frame_type: int, data: bytes, start: int, end: int) -> int:
        """Handle the frame whose payload is ``data[start:end]``, and perhaps those behind it.

        Only if they are whole, and of this AMQP channel: nobody else looks at them any more.
        Returns where the next frame begins; 0: decode this one for me.
        """
        raise NotImplementedError

    def hangs(self) -> bool:
        """Whether the broker, which is alive, answers nothing here; called now and then."""
        raise NotImplementedError


class CallChannel(BytesChannel):
    """Methods which the broker answers in the order they were called, so any number at once.

    When the broker refuses one it closes the AMQP channel and has ignored what came after: the
    culprit's future gets ``ChannelClosedByServer``, those behind it ``ChannelClosed``.
    """

    def __init__(self, protocol: Protocol, amqp_channel_id: int) -> None:
        self._protocol = protocol
        self._amqp_channel_id = amqp_channel_id
        self._write = protocol.write
        # (index of the expected answer, who waits for it, the method)
        self._calls: deque[tuple[int, asyncio.Future[None], pamqp.base.Frame]] = deque()
        self._heartbeat = protocol.heartbeat
        self._answers = AnswerWatch(self._heartbeat)
        self.call(_CHANNEL_OPEN)

    def call(self, method: pamqp.base.Frame) -> asyncio.Future[None]:
        """Write a synchronous method; the future ends with the broker's answer."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._call(method, done)
        return done

    def _call(self, method: pamqp.base.Frame, done: asyncio.Future[None]) -> None:
        # An answer's index is its method's, plus one, with this exception.
        answer = _EXCHANGE_UNBIND_OK if method.index == _EXCHANGE_UNBIND else method.index + 1
        self._calls.append((answer, done, method))
        self._write(frames.encode(method, self._amqp_channel_id))

    def accept_bytes(self, frame_type: int, data: bytes, start: int, end: int) -> int:
        if (
            frame_type == frames.METHOD
            and self._calls
            and frames.read_index(data, start, end) == self._calls[0][0]
        ):
            resolve(self._calls.popleft()[1], None)
            self._answers.is_answered = True
            return end + 1
        return 0

    def hangs(self) -> bool:
        return self._answers.look(is_due=bool(self._calls))

    def accept_frame(self, frame: Any) -> None:
        raise pamqp.exceptions.AMQPUnexpectedFrame(f"Unexpected {type(frame).__name__}")

    def accept_channel_closed_by_server(self, frame: pamqp.commands.Channel.Close) -> None:
        self._end(closed_by_server(frame), carehare.ChannelClosed(frame.reply_text))

    def accept_channel_closed_by_us(self) -> None:
        raise AssertionError("the layer never closes one of its AMQP channels")

    def accept_connection_closed(self, exc: carehare.ConnectionClosed) -> None:
        self._end(exc, exc)

    def _end(self, culprit_exc: Exception, others_exc: Exception) -> None:
        calls, self._calls = self._calls, deque()
        exc = culprit_exc
        for _, done, _ in calls:
            fail(done, exc)
            exc = others_exc


class TopologyChannel(CallChannel):
    """Binds and unbinds, any number at once; goes on after a refusal.

    When the broker closes the AMQP channel over one of them, that one fails, and the others are
    written again on a new one.
    """

    def accept_channel_closed_by_server(self, frame: pamqp.commands.Channel.Close) -> None:
        calls, self._calls = self._calls, deque()
        self._answers.is_answered = True
        if calls:
            fail(calls.popleft()[1], closed_by_server(frame))
        try:
            self._protocol.add_channel(self._move_to)
        except carehare.ConnectionClosed as err:  # ours, this moment: everybody hears of it
            for _, done, _ in calls:
                fail(done, err)
            return
        self._call(_CHANNEL_OPEN, asyncio.get_running_loop().create_future())
        for _, done, method in calls:
            if method is not _CHANNEL_OPEN:
                self._call(method, done)

    def _move_to(self, amqp_channel_id: int) -> TopologyChannel:
        self._amqp_channel_id = amqp_channel_id
        return self


class ConsumerChannel(CallChannel):
    """Declares a queue and consumes from it; acks are written together, once a turn of the loop.

    ``on_delivery(body, delivery_tag, published, consumer)`` is called for each message, with the
    time of its publishing (milliseconds since 1970, 0 if it doesn't say) and this object to ack it
    by; ``on_end(exc)`` at most once, when the broker cancels the consumer (ChannelClosed:
    the queue was deleted, or its node is gone) or closes the AMQP channel (ChannelClosedByServer);
    not if that is the answer to a call, nor when the connection ends.
    """

    def __init__(
        self,
        protocol: Protocol,
        amqp_channel_id: int,
        *,
        on_delivery: Callable[[bytes, int, int, ConsumerChannel], None],
        on_end: Callable[[Exception], None],
    ) -> None:
        super().__init__(protocol, amqp_channel_id)
        self._on_delivery = on_delivery
        self._on_end = on_end
        self._tag: int | None = None  # of the message whose header or body is due
        self._is_ours = True  # that is for our consumer tag
        self._published = 0  # as its header said
        self._missing: int | None = None  # bytes of its body; None: the header is due
        self._body: list[bytes] = []
        self._max_payload = frames.max_payload(protocol.frame_max)
        self._acks = AckBatch()
        self._ended = False

    def consume(self, queue: str, prefetch_count: int | None = None) -> asyncio.Future[None]:
        """Start deliveries, at most ``prefetch_count`` of them unacked (None: as it was said)."""
        if prefetch_count is not None:
            self.call(pamqp.commands.Basic.Qos(prefetch_count=prefetch_count))
        return self.call(
            pamqp.commands.Basic.Consume(queue=queue, consumer_tag=frames.CONSUMER_TAG)
        )

    def tell(self, method: pamqp.base.Frame) -> None:
        """Write a method that has no answer, if anything can be written."""
        if not self._ended and self._protocol.can_write:
            self._write(frames.encode(method, self._amqp_channel_id))

    def mute(self) -> None:
        """Hand out nothing more, and ack nothing: the connection is given up."""
        self._on_delivery = lambda body, tag, published, consumer: None
        self._ended = True

    def ack(self, delivery_tag: int) -> None:
        """Ack one message; does nothing once the AMQP channel has ended."""
        if self._acks.add(delivery_tag):
            self._protocol.transport.write_last(self._encode_acks)

    def _encode_acks(self) -> bytes:
        acks = self._acks.take()
        if self._ended or not self._protocol.can_write:
            return b""
        return b"".join(
            frames.encode_ack(self._amqp_channel_id, tag, multiple) for tag, multiple in acks
        )

    def accept_bytes(self, frame_type: int, data: bytes, start: int, end: int) -> int:
        if frame_type == frames.METHOD:
            if self._tag is not None:
                raise pamqp.exceptions.AMQPUnexpectedFrame("A method instead of a message's body")
            # Almost always whole deliveries are there. Frame by frame they cost twice as much.
            at = self._accept_deliveries(data, start - 7)
            if at:
                return at
            if frames.read_index(data, start, end) != frames.DELIVER:
                return super().accept_bytes(frame_type, data, start, end)
            self._tag = frames.read_delivery_tag(data, start, end)
            self._is_ours = frames.is_for_our_consumer(data, start)
            return end + 1
        if self._tag is None or frame_type != _content_due(self._missing):
            raise pamqp.exceptions.AMQPUnexpectedFrame("A header or body out of place")
        if self._missing is None:
            self._missing = frames.read_body_size(data, start, end)
            if self._missing > LARGEST_BODY:
                raise pamqp.exceptions.AMQPUnexpectedFrame("A body larger than RabbitMQ's limit")
            self._published = frames.read_published(data, start, end)
        else:
            self._missing -= end - start
            self._body.append(data[start:end])
        if self._missing == 0:
            self._finish_delivery()
        elif self._missing < 0:
            raise pamqp.exceptions.AMQPUnexpectedFrame("A body longer than its header said")
        return end + 1

    def _accept_deliveries(self, data: bytes, at: int) -> int:
        """Handle all deliveries that are whole; return where they end, 0 if there is none."""
        end = 0
        while found := frames.find_delivery(data, at, self._amqp_channel_id, self._max_payload):
            tag, published, body_start, body_end = found
            self._acks.expect(tag)
            self._on_delivery(data[body_start:body_end], tag, published, self)
            at = end = body_end + 1
        if end:
            # The acks of those who are woken now. (Not after a delivery that came in pieces: others
            # may follow in this read, and their acks would be late for it.)
            self._protocol.transport.flush_soon()
        return end

    def _finish_delivery(self) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        tag, self._tag, self._missing = self._tag, None, None
        self._body.clear()
        assert tag is not None
        if self._is_ours:
            self._acks.expect(tag)
            self._on_delivery(body, tag, self._published, self)

    def accept_frame(self, frame: Any) -> None:
        if isinstance(frame, pamqp.commands.Basic.Cancel):
            if frame.consumer_tag == frames.CONSUMER_TAG:  # and not another one
                self._report_end(
                    carehare.ChannelClosed("RabbitMQ cancelled the consumer: its queue is gone")
                )
        else:
            super().accept_frame(frame)

    def _report_end(self, exc: Exception) -> None:
        if not self._ended:
            self._ended = True
            self._on_end(exc)

    def _end(self, culprit_exc: Exception, others_exc: Exception) -> None:
        if isinstance(culprit_exc, carehare.ChannelClosedByServer) and not self._calls:
            self._report_end(culprit_exc)
        self._ended = True
        super()._end(culprit_exc, others_exc)


class Outcome(enum.Enum):
    """What became of a published message."""

    CONFIRMED = "taken by every queue it was routed to"
    REFUSED = "refused by at least one queue"
    RETURNED = "mandatory, and routed to no queue"
    UNKNOWN = "written, but the connection or the time ended before the confirm"
    BLOCKED = "not written: the broker blocks publishers"


# For the path of each message: up to Python 3.11 a look at an enumeration is slow.
CONFIRMED = Outcome.CONFIRMED


class Route(NamedTuple):
    """Where a message is published to."""

    exchange: str
    routing_key: str
    # Whether the broker returns it if no queue is bound to that key
    mandatory: bool


class PublisherChannel(CallChannel):
    """Publishes with confirms, to any exchange, in order.

    ``publish`` gives a future that always ends with an ``Outcome``, never with an exception.
    ``on_end(exc)`` is called when the broker closes the AMQP channel (ChannelClosedByServer: a
    missing exchange, a body too large for it); not when the connection ends.

    Confirms come in any order, acks and nacks both also as *multiple*; a Basic.Return comes before
    the ack of its own message, but others may come in between.

    A message by ``ping_route``, which must lead to no queue, shows whether the AMQP channel works:
    its confirm doesn't wait for a queue. It is published when confirms stay out, and once while
    the broker blocks publishers: RabbitMQ doesn't read a blocked connection, so the confirm proves
    that it goes on, even if ``connection.unblocked`` got lost. One at a time: it waits in the
    socket as long as the alarm lasts, and nobody asks again.
    """

    def __init__(
        self,
        protocol: Protocol,
        amqp_channel_id: int,
        *,
        on_end: Callable[[Exception], None],
        ping_route: Route | None = None,
    ) -> None:
        super().__init__(protocol, amqp_channel_id)
        self._on_end = on_end
        self._ping_route = ping_route
        self._ping: asyncio.Future[Outcome] | None = None  # the one that waits for its confirm
        self._has_expired = False  # some message, and nothing was answered since
        self._write_now = protocol.transport.write_now
        self._loop = asyncio.get_running_loop()
        self._max_payload = frames.max_payload(protocol.frame_max)
        self._methods: dict[Route, bytes] = {}  # the frames of Basic.Publish
        self._sequence_number = 0
        # By sequence number, in order: who waits, and until when (loop time).
        self._unconfirmed: dict[int, tuple[asyncio.Future[Outcome], float]] = {}
        self._returned: set[int] = set()  # those of them that the broker returned
        # Whether the last message that began alone stayed alone until its answer came
        self._was_alone = True
        self._timer: asyncio.TimerHandle | None = None
        self._watched_until = float("inf")  # when it goes off
        self._is_returning = False  # a Basic.Return's header or body is due
        self._missing: int | None = None  # bytes of that body; None: the header is due
        self._ended = False
        self.call(pamqp.commands.Confirm.Select())

    @property
    def is_ended(self) -> bool:
        """Whether nothing can be published any more."""
        return self._ended or not self._protocol.can_write

    def takes_now(self) -> bool:
        """Whether ``publish`` would write now, and not too much waits to be written already.

        (For the latter there is ``call_when_writable``.)
        """
        protocol = self._protocol
        if self._ended or not protocol.can_write:
            return False
        if time() >= self._heartbeat.fresh_until:
            protocol.read_first()
        return not protocol.transport.is_full()

    def call_when_writable(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once when there is room to write again: see the transport."""
        self._protocol.transport.call_when_writable(callback)

    @property
    def unconfirmed(self) -> int:
        """How many messages, but for pings, wait for their confirm."""
        is_pinging = self._ping is not None and not self._ping.done()
        return len(self._unconfirmed) - is_pinging

    def publish(self, body: bytes, route: Route, deadline: float) -> asyncio.Future[Outcome]:
        """Write a message. ``deadline`` (loop time): when an unanswered one counts as UNKNOWN."""
        future: asyncio.Future[Outcome] = self._loop.create_future()
        if self._ended:
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
            int(time() * 1000),
            sequence_number if route.mandatory else None,
            self._max_payload,
        )
        is_first = not self._unconfirmed
        if is_first and self._was_alone:
            # Probably this one has no company either with which it could share a write (nearly
            # Nagle's algorithm). It is gone before the acks of this turn, on the other connection.
            self._write_now(pieces)
        else:
            self._was_alone = is_first
            for piece in pieces:
                self._write(piece)
        # Only now: what could not be encoded is no message, and the broker doesn't count it.
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
        # In a context of its own: the caller's would live as long as there is traffic.
        self._timer = self._loop.call_at(deadline, self._expire, context=contextvars.Context())
        self._watched_until = deadline

    def _expire(self) -> None:
        self._timer = None
        self._watched_until = float("inf")
        # All are looked at: a call that waited for the connection has less time left than those
        # before it. That is about once in operation_timeout, since confirms leave the timer alone.
        now = self._loop.time()
        for sequence_number, (future, deadline) in list(self._unconfirmed.items()):
            if deadline <= now:
                del self._unconfirmed[sequence_number]
                self._returned.discard(sequence_number)
                # It counts as unanswered until something is answered from now on.
                self._has_expired, self._answers.is_answered = True, False
                resolve(future, Outcome.UNKNOWN)
        if self._unconfirmed:
            self._watch(min(deadline for _, deadline in self._unconfirmed.values()))

    def accept_bytes(self, frame_type: int, data: bytes, start: int, end: int) -> int:
        if frame_type == frames.METHOD:
            if self._is_returning:
                raise pamqp.exceptions.AMQPUnexpectedFrame("A method instead of a message's body")
            index = frames.read_index(data, start, end)
            if index == frames.ACK:
                self._confirm(*frames.read_confirm(data, start, end), Outcome.CONFIRMED)
                return end + 1
            if index == frames.NACK:
                self._confirm(*frames.read_confirm(data, start, end), Outcome.REFUSED)
                return end + 1
            if index == frames.RETURN:
                self._is_returning = True
                return end + 1
            return super().accept_bytes(frame_type, data, start, end)
        if not self._is_returning or frame_type != _content_due(self._missing):
            raise pamqp.exceptions.AMQPUnexpectedFrame("A header or body out of place")
        if self._missing is None:
            self._missing = frames.read_body_size(data, start, end)
            sequence_number = frames.read_correlation_id(data, start, end)
            if sequence_number in self._unconfirmed:
                self._returned.add(sequence_number)
        else:
            self._missing -= end - start
        if self._missing == 0:
            self._is_returning, self._missing = False, None
        elif self._missing < 0:
            raise pamqp.exceptions.AMQPUnexpectedFrame("A body longer than its header said")
        return end + 1

    def hangs(self) -> bool:
        if self._answers.is_answered:
            self._has_expired = False
        blocked_since = self._protocol.blocked_since
        if blocked_since is not None:
            # It was told a moment ago: what the broker had read before shall be answered by then.
            if self._loop.time() - blocked_since >= _BLOCKED_BEFORE_PING:
                self._publish_ping(blocked_since)
            return self._answers.look(is_due=False)
        is_due = bool(self._calls or self._unconfirmed or self._has_expired)
        hangs = self._answers.look(is_due=is_due)
        if self._answers.is_waiting:
            self._publish_ping(None)
        return hangs

    def _publish_ping(self, blocked_since: float | None) -> None:
        if self._ping is not None or self._ping_route is None or self.is_ended:
            return
        self._ping = self.publish(b"", self._ping_route, self._loop.time() + _PING_TIMEOUT)
        self._ping.add_done_callback(partial(self._accept_ping, blocked_since))

    def _accept_ping(self, blocked_since: float | None, ping: asyncio.Future[Outcome]) -> None:
        self._ping = None
        protocol = self._protocol
        if ping.result() is not Outcome.UNKNOWN and blocked_since == protocol.blocked_since:
            protocol.note_unblocked()

    def _confirm(self, sequence_number: int, multiple: bool, outcome: Outcome) -> None:
        self._answers.is_answered = True
        if not multiple:
            self._settle(sequence_number, outcome)
            return
        # Sequence numbers stand in order: those meant are at the front.
        front = []
        for number in self._unconfirmed:
            if number > sequence_number:
                break
            front.append(number)
        for number in front:
            self._settle(number, outcome)

    def _settle(self, sequence_number: int, outcome: Outcome) -> None:
        # It may be unknown here: its time was over, and it counts as UNKNOWN already.
        message = self._unconfirmed.pop(sequence_number, None)
        if message is None:
            return
        if self._returned and sequence_number in self._returned:
            self._returned.remove(sequence_number)
            outcome = Outcome.RETURNED
        future = message[0]
        if not future.done():
            future.set_result(outcome)

    def _end(self, culprit_exc: Exception, others_exc: Exception) -> None:
        self._ended = True
        super()._end(culprit_exc, others_exc)
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
