"""AMQP channels by themselves: frames in as bytes, methods and their answers.

An AMQP channel gets its frames as bytes from its connection, by ``on_bytes``, and returns where the
next one begins. If it leaves a frame to pamqp, it gets that frame decoded, by ``on_frame``.
``ChannelHost`` is what it needs of that connection.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import carehare

from .._futures import fail, resolve
from . import frames
from .answers import AnswerWatch
from .errors import unexpected_frame
from .heartbeat import Heartbeat
from .methods import Channel, Exchange, Method
from .transport import CoalescingTransport

CHANNEL_OPEN = Channel.Open()
CHANNEL_CLOSE = Channel.Close(reply_code=0, reply_text="", class_id=0, method_id=0)

_EXCHANGE_UNBIND = Exchange.Unbind.index
_EXCHANGE_UNBIND_OK = Exchange.UnbindOk.index

_Channel = TypeVar("_Channel", bound="BytesChannel")


class ChannelHost(Protocol):
    """What an AMQP channel needs of its connection."""

    write: Callable[[bytes], None]
    transport: CoalescingTransport
    frame_max: int  # bytes; 0: no limit
    is_open: bool  # neither side has begun to close the connection
    blocked_since: float | None  # loop time; None: the broker takes messages

    @property
    def heartbeat(self) -> Heartbeat:
        """When the broker was heard."""

    def add_channel(self, make: Callable[[int], _Channel]) -> _Channel:
        """Add the AMQP channel that ``make(amqp_channel_id)`` returns.

        Raises ``carehare.ConnectionClosed``, or ``ChannelClosed`` if no number is free.
        """

    def add_channel_later(
        self, make: Callable[[int], BytesChannel], on_closed: Callable[[], None]
    ) -> None:
        """Add an AMQP channel once a number is free, perhaps at once.

        ``on_closed`` is called instead if the connection is closed before. Raises
        ``carehare.ConnectionClosed`` if it is now.
        """

    def read_first(self) -> None:
        """Have senders wait until the bytes that have come are read."""

    def note_unblocked(self) -> None:
        """Note that the broker takes messages again."""


def closed_by_server(frame: Channel.Close) -> carehare.ChannelClosedByServer:
    """Return the error that says what the broker said."""
    return carehare.ChannelClosedByServer(frame.reply_code or 0, frame.reply_text)


class BytesChannel:
    """An AMQP channel that takes frames as bytes: what its connection calls."""

    # Whether a Channel.Close was written that the broker hasn't answered. The number stays taken
    # until the broker does.
    is_closing = False

    def on_bytes(self, frame_type: int, data: bytes, start: int, end: int) -> int:
        """Handle the frame whose payload is ``data[start:end]``, and perhaps those behind it.

        It may handle those behind only if they are whole, and of this AMQP channel: the connection
        doesn't look at them again.
        Returns where the next frame begins; 0: decode this one for ``on_frame``.
        """
        return 0

    def on_frame(self, frame: Any) -> None:
        """Handle a frame that was decoded by pamqp."""
        raise NotImplementedError

    def on_closed_by_server(self, frame: Channel.Close) -> None:
        """The broker has closed this AMQP channel; its Close is answered."""
        raise NotImplementedError

    def on_closed(self) -> None:
        """The broker has answered our Close."""
        raise NotImplementedError

    def on_connection_closed(self, exc: carehare.ConnectionClosed) -> None:
        """The connection is closed."""
        raise NotImplementedError

    def hangs(self) -> bool:
        """Return whether the broker answers nothing here though it is alive. Called often."""
        return False


class CallChannel(BytesChannel):
    """Calls methods, any number at once: the broker answers them in the order of the calls.

    When the broker refuses a method it closes the AMQP channel, and ignores the methods behind it.
    The future of the refused call gets ``ChannelClosedByServer``, those behind it
    ``ChannelClosed``.
    """

    def __init__(self, host: ChannelHost, amqp_channel_id: int) -> None:
        self._host = host
        self._amqp_channel_id = amqp_channel_id
        self._write = host.write
        # (index of the expected answer, the caller's future, the method)
        self._calls: deque[tuple[int, asyncio.Future[None], Method]] = deque()
        self._heartbeat = host.heartbeat
        self._answers = AnswerWatch(self._heartbeat)
        self.call(CHANNEL_OPEN)

    def call(self, method: Method) -> asyncio.Future[None]:
        """Write a synchronous method; the future ends with the broker's answer."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._call(method, done)
        return done

    def _call(self, method: Method, done: asyncio.Future[None]) -> None:
        # The index of an answer is its method's plus one, with this exception.
        answer = _EXCHANGE_UNBIND_OK if method.index == _EXCHANGE_UNBIND else method.index + 1
        self._calls.append((answer, done, method))
        self._write(frames.encode(method, self._amqp_channel_id))

    def on_bytes(self, frame_type: int, data: bytes, start: int, end: int) -> int:
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

    def on_frame(self, frame: Any) -> None:
        raise unexpected_frame(f"unexpected {type(frame).__name__}")

    def on_closed_by_server(self, frame: Channel.Close) -> None:
        self._close(closed_by_server(frame), carehare.ChannelClosed(frame.reply_text))

    def on_connection_closed(self, exc: carehare.ConnectionClosed) -> None:
        self._close(exc, exc)

    def _close(self, culprit_exc: Exception, others_exc: Exception) -> None:
        calls, self._calls = self._calls, deque()
        exc = culprit_exc
        for _, done, _ in calls:
            fail(done, exc)
            exc = others_exc
