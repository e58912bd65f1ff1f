"""One AMQP connection's bytes, frames and end. The handshake's rules are in ``handshake``.

* Bytes are cut into frames by one offset, and given undecoded to the AMQP channels; a consumer
  reads whole deliveries at once. Damaged bytes end the connection with AMQP's error code.
* The end answers every caller that waits, whatever happened and whichever caller was cancelled. A
  broker that is alive and doesn't answer on one of the AMQP channels (``answers``) is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar, cast

import carehare
import pamqp.header
import pamqp.heartbeat
from pamqp.commands import Connection

from .._futures import fail, resolve
from . import frames, greeting
from .channel import BytesChannel
from .channel_ids import ChannelIds
from .errors import (
    CHANNEL_ERROR,
    COMMAND_INVALID,
    FRAME_ERROR,
    ProtocolError,
    reply_code_of,
)
from .handshake import Handshake
from .heartbeat import Heartbeat
from .methods import Channel, Method
from .stages import Stage
from .tls import explain_end
from .transport import CoalescingTransport, set_options
from .url import BrokerUrl

# Seconds that a peer may take to read our Connection.Close, or to answer it, before the socket is
# closed on it.
CLOSE_TIMEOUT = 1.0

# Bytes that are read at once. asyncio makes room for 256 KiB at each read. That may be more than
# the C library keeps at hand: then each read has three more system calls and new pages, which was a
# fifth of a receiver's CPU (``throughput-100``, and only in some processes).
_READ_SIZE = 64 * 1024

# Turns of the loop after which all bytes that had arrived are read, and a lost connection is
# noticed (TLS needs several).
_READ_TURNS = 10
# Heartbeat intervals after which RabbitMQ may have closed a connection on which it heard nothing.
_BROKERS_TIMEOUT = 2.0

# A broker that sets no frame_max (0) still doesn't send a frame larger than this; a damaged size
# would have us wait for gigabytes otherwise.
_LARGEST_FRAME = 256 * 1024 * 1024

_Channel = TypeVar("_Channel", bound=BytesChannel)


class Protocol(asyncio.BufferedProtocol):
    """A ``ChannelHost`` for AMQP channels, once the future ``open`` is done.

    ``open`` ends with the reason, as an exception, if the connection is closed before. ``closed``
    ends with the reason as its result, None if we closed the connection. The caller may ignore
    ``open``, and must not cancel ``closed``.
    """

    def __init__(
        self,
        url: BrokerUrl,
        *,
        connection_name: str,
        on_blocked: Callable[[str | None], None],
        on_stage: Callable[[Stage], None] = lambda stage: None,
        tls_problem: str = "",
    ) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._url = url
        self._tls_problem = tls_problem  # see Tls
        # Called with the broker's reason when it blocks publishers, with None when no more.
        self._report_blocked = on_blocked
        self._report_stage = on_stage
        self.open: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[Exception | None] = loop.create_future()
        self.handshake = Handshake(url, connection_name)
        self.frame_max = 0  # as negotiated; 0: no limit
        self._frame_limit = _LARGEST_FRAME
        # A view: asyncio's TLS slices it, and a slice of a bytearray is a copy.
        self._read_buffer = memoryview(bytearray(_READ_SIZE))
        self._rest = bytearray()  # the start of a frame that isn't whole yet
        self._wanted = frames.OVERHEAD  # bytes that it takes to go on with _rest
        self._heartbeat: Heartbeat | None = None
        self._channel_ids = ChannelIds(0)  # until the limit is known
        self._channels: dict[int, BytesChannel] = {}
        self.is_connected = False  # ``transport`` and ``write`` are there
        self.is_greeted = False  # the server's first bytes are RabbitMQ's
        self._first_bytes = b""  # until that is known
        self.is_open = True  # neither side has begun to close the connection
        self._reads = True  # not since one side closed the connection, or broke the rules
        self._is_closed_by_us = False
        self._reason: Exception | None = None  # why the connection is closed: the first that shows
        self._abort_timer: asyncio.TimerHandle | None = None
        self.blocked_since: float | None = None  # loop time; None: the broker takes messages
        # Turns left until what came while the loop stood still is read
        self._turns_to_read = 0
        self._handlers: dict[type, Callable[[Any], None]] = {
            pamqp.heartbeat.Heartbeat: lambda frame: None,  # data_received() saw it
            Connection.Start: self._on_start,
            Connection.Tune: self._on_tune,
            Connection.OpenOk: self._on_open_ok,
            Connection.Close: self._on_close,
            Connection.CloseOk: lambda frame: self.transport.abort(),
            Connection.Blocked: self._on_blocked,
            Connection.Unblocked: lambda frame: self.note_unblocked(),
        }

    # Bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast: uvloop's transports are like asyncio's, but not instances of them.
        below = cast("asyncio.Transport", transport)
        set_options(below)
        self.transport = CoalescingTransport(below)
        self.write: Callable[[bytes], None] = self.transport.write
        self.is_connected = True
        self._report_stage(Stage.SECURED)
        self.write(pamqp.header.ProtocolHeader().marshal())

    def pause_writing(self) -> None:
        self.transport.pause()

    def resume_writing(self) -> None:
        self.transport.resume()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._read_buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        if self._heartbeat is not None:
            self._heartbeat.received()
        if not self._reads:
            return
        if not self.is_greeted and not (data := self._on_first_bytes(data)):
            return
        try:
            offset = self._on_rest(data) if self._rest else 0
            if offset < len(data):
                offset = self._on_frames(data, offset)
        except Exception as err:
            self._crash(err)
        else:
            if offset < len(data):
                self._rest += data[offset:]

    def _on_first_bytes(self, data: bytes) -> bytes:
        """Return the bytes if they are RabbitMQ's; close the connection if they aren't."""
        data = self._first_bytes + data
        is_rabbitmq = greeting.is_rabbitmq(data)
        if is_rabbitmq:
            self.is_greeted = True
            return data
        self._first_bytes = data
        if is_rabbitmq is not None:
            self._crash(ProtocolError(FRAME_ERROR, greeting.describe(data)))
        return b""

    def provoke(self) -> None:
        """Have a server that hasn't greeted say what it is; RabbitMQ would close the connection."""
        if not self.is_greeted and self.is_open:
            self.write(greeting.PROVOCATION)

    def _on_rest(self, data: bytes) -> int:
        """Handle the frame whose start is in ``_rest``; return where the next one begins.

        No other bytes are copied: in a large body almost every read ends amid a frame.
        """
        offset = 0
        while self._rest and self._reads:
            missing = self._wanted - len(self._rest)
            self._rest += data[offset : offset + missing]
            offset += missing
            if offset > len(data):
                return len(data)
            # Its head, which tells its size, or all of it
            whole = bytes(self._rest)
            self._rest.clear()
            self._rest += whole[self._on_frames(whole, 0) :]
        return offset

    def _on_frames(self, data: bytes, offset: int) -> int:
        """Handle all whole frames; return where the first that isn't whole begins."""
        end = len(data)
        self._wanted = frames.OVERHEAD
        while offset + frames.OVERHEAD <= end and self._reads:
            frame_type, amqp_channel_id, size = frames.read_frame_head(data, offset)
            if size > self._frame_limit:
                raise ProtocolError(FRAME_ERROR, "RabbitMQ sent a frame larger than agreed")
            next_offset = offset + size + frames.OVERHEAD
            if next_offset > end:
                self._wanted = next_offset - offset
                break
            if data[next_offset - 1] != frames.FRAME_END:
                raise ProtocolError(FRAME_ERROR, "RabbitMQ sent a frame with a wrong end")
            amqp_channel = self._channels.get(amqp_channel_id)
            if amqp_channel is not None and (
                read_to := amqp_channel.on_bytes(frame_type, data, offset + 7, next_offset - 1)
            ):
                offset = read_to
            else:
                self._on_frame(frames.decode(data[offset:next_offset]), amqp_channel_id)
                offset = next_offset
        return offset

    def _on_frame(self, frame: Any, amqp_channel_id: int) -> None:
        handler = self._handlers.get(type(frame))
        if handler is not None:
            if amqp_channel_id != 0:
                raise ProtocolError(
                    COMMAND_INVALID, f"RabbitMQ sent {frame.name} on AMQP channel {amqp_channel_id}"
                )
            handler(frame)
            return
        if isinstance(frame, Channel.Flow):
            self.write(frames.encode(Channel.FlowOk(frame.active), amqp_channel_id))
            return
        amqp_channel = self._channels.get(amqp_channel_id)
        is_close_ok = isinstance(frame, Channel.CloseOk)
        if amqp_channel is None or (is_close_ok and not amqp_channel.is_closing):
            raise ProtocolError(
                CHANNEL_ERROR, f"RabbitMQ sent {type(frame).__name__} on a channel that isn't open"
            )
        if is_close_ok:
            self._free(amqp_channel_id)
            amqp_channel.on_closed()
        elif isinstance(frame, Channel.Close):
            self.write(frames.encode(Channel.CloseOk(), amqp_channel_id))
            # If both sides close it at once, the number is free when our Close is answered, too.
            # RabbitMQ 4.0 doesn't always do that (two of 12,000 refused calls). So the AMQP channel
            # hears now that it is closed.
            if not amqp_channel.is_closing:
                self._free(amqp_channel_id)
            amqp_channel.on_closed_by_server(frame)
        else:
            amqp_channel.on_frame(frame)

    def _free(self, amqp_channel_id: int) -> None:
        del self._channels[amqp_channel_id]
        self._channel_ids.release(amqp_channel_id)

    def _send(self, *methods: Method) -> None:
        self.write(frames.encode_all(methods, 0))

    # Handshake

    def _on_start(self, frame: Connection.Start) -> None:
        self._send(self.handshake.answer_start(frame))
        self._report_stage(Stage.GREETED)

    def _on_tune(self, frame: Connection.Tune) -> None:
        self._send(*self.handshake.answer_tune(frame))
        self._report_stage(Stage.LOGGED_IN)
        self.frame_max = self.handshake.frame_max
        self._frame_limit = self.frame_max or _LARGEST_FRAME
        self._channel_ids = ChannelIds(self.handshake.channel_max)
        self._heartbeat = Heartbeat(
            self.handshake.heartbeat,
            write=self.write,
            on_dead=self._on_silence,
            on_tick=self._on_tick,
        )

    def _on_open_ok(self, frame: Connection.OpenOk) -> None:
        self.handshake.check_turn(frame)
        self._report_stage(Stage.OPEN)
        resolve(self.open, None)

    # Half-dead

    @property
    def heartbeat(self) -> Heartbeat:
        assert self._heartbeat is not None, "there is one since the handshake"
        return self._heartbeat

    def _on_blocked(self, frame: Connection.Blocked) -> None:
        self.blocked_since = self._loop.time()
        self._report_blocked(frame.reason)

    def note_unblocked(self) -> None:
        """Note that the broker takes messages again: it has said so, or has confirmed one."""
        if self.blocked_since is not None:
            self.blocked_since = None
            self._report_blocked(None)

    def _on_silence(self) -> None:
        self._drop(
            carehare.ConnectionClosedByHeartbeatMonitor(
                "RabbitMQ has been silent for one and a half heartbeat intervals"
            )
        )

    def _on_tick(self) -> None:
        """Leave a broker that is alive and doesn't answer."""
        if self.is_open and any(channel.hangs() for channel in list(self._channels.values())):
            why = "though it is alive" if self.heartbeat.has_heartbeats else "for too long"
            self._drop(
                carehare.ConnectionClosed(
                    f"RabbitMQ answers nothing on one of the AMQP channels, {why}"
                )
            )

    def _drop(self, reason: Exception) -> None:
        self._reason = self._reason or reason
        self.is_open = False
        self.transport.abort()

    def read_first(self) -> None:
        """Have senders wait until what has come is read: the loop may have stood still.

        The broker may have closed the connection in that time, and what is written then is lost
        without an error. It may also have vanished without a word.
        """
        if self.is_open and not self._turns_to_read and not self.is_all_read():
            self._turns_to_read = _READ_TURNS
            self.transport.hold_writers()
            self._loop.call_soon(self._finish_turn)

    def is_all_read(self) -> bool:
        """Look at the socket: return whether nothing lies there. Ends a connection that is dead."""
        if self._turns_to_read or not self.transport.is_read():
            return False
        self._on_all_read()
        return True

    @property
    def is_being_read(self) -> bool:
        """Whether ``read_first`` isn't done yet."""
        return self._turns_to_read > 0

    def _finish_turn(self) -> None:
        self._turns_to_read -= 1
        if self._turns_to_read and self.is_open:
            self._loop.call_soon(self._finish_turn)
            return
        self._turns_to_read = 0
        self._on_all_read()
        self.transport.release_writers()

    def _on_all_read(self) -> None:
        if self.is_open and self.heartbeat.is_silent_for(_BROKERS_TIMEOUT):
            self._on_silence()
        self.heartbeat.refresh()

    # End

    def eof_received(self) -> None:
        # asyncio tells of the end one turn later, and drops what is written until then.
        self.is_open = False

    def send_close(self, reply_code: int = 0, reply_text: str = "") -> None:
        """Write a Connection.Close, unless one side has begun to close the connection."""
        if self.is_open:
            self._is_closed_by_us = True
            self.is_open = False
            self._send(Connection.Close(reply_code, reply_text, class_id=0, method_id=0))

    def abort(self) -> None:
        """Close the socket at once, without a word to the broker."""
        self._is_closed_by_us = True
        self.is_open = False
        self.transport.abort()

    def _crash(self, exc: Exception) -> None:
        """Close the connection over an error; ``closed`` (or ``open``) gets it."""
        self._reason = exc
        if self.open.done():
            self.send_close(reply_code_of(exc), type(exc).__name__)
        self._close_soon()

    def _on_close(self, frame: Connection.Close) -> None:
        self._reason = carehare.ConnectionClosedByServer(frame.reply_code or 0, frame.reply_text)
        self._send(Connection.CloseOk())
        self._close_soon()

    def _close_soon(self) -> None:
        """Close the socket once what was written has gone out, or soon anyway."""
        self._reads = self.is_open = False
        self.transport.close()
        if self._abort_timer is None:
            self._abort_timer = self._loop.call_later(CLOSE_TIMEOUT, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self.transport.resume()
        self.transport.release_writers()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        reason = self._why_closed(exc)
        channels, self._channels = self._channels, {}
        for amqp_channel in channels.values():
            amqp_channel.on_connection_closed(
                carehare.ConnectionClosed(str(reason or "The connection was closed"))
            )
        self._channel_ids.close()
        fail(self.open, reason or carehare.ConnectionClosed("The connection was given up"))
        resolve(self.closed, reason)

    def _why_closed(self, exc: Exception | None) -> Exception | None:
        """Return the reason, None if we closed the connection; ``exc`` is asyncio's."""
        if self._reason is not None or self._is_closed_by_us:
            return self._reason
        if not self.is_greeted:
            if self._first_bytes:
                return ProtocolError(FRAME_ERROR, greeting.describe(self._first_bytes))
            return explain_end(exc, tls=self._url.tls, problem=self._tls_problem)
        if self.open.done():
            return exc or carehare.ConnectionClosed("RabbitMQ ended the connection")
        return self.handshake.explain_end(exc)

    # AMQP channels

    def _refuse_if_closed(self) -> None:
        if not self.is_open:
            raise carehare.ConnectionClosed("The connection is closed")

    def add_channel(self, make: Callable[[int], _Channel]) -> _Channel:
        """Add the AMQP channel that ``make(amqp_channel_id)`` returns: see ``ChannelHost``."""
        self._refuse_if_closed()
        amqp_channel_id = self._channel_ids.acquire()
        try:
            amqp_channel = make(amqp_channel_id)
        except Exception:  # Its first methods can't be written.
            self._channel_ids.release(amqp_channel_id)
            raise
        self._channels[amqp_channel_id] = amqp_channel
        return amqp_channel

    def add_channel_later(
        self, make: Callable[[int], BytesChannel], on_closed: Callable[[], None]
    ) -> None:
        """Add an AMQP channel once a number is free: see ``ChannelHost``."""

        def use(amqp_channel_id: int | None) -> None:
            if amqp_channel_id is None:
                on_closed()
            else:
                self._channels[amqp_channel_id] = make(amqp_channel_id)

        self._refuse_if_closed()
        self._channel_ids.acquire_later(use)
