"""One AMQP connection's bytes, handshake and end: carehare's ``Protocol``, repaired and faster.

carehare answers for the life cycle of its RPCs, exchanges and consumers; here is what it lacks or
gets wrong:

* bytes: cut into frames by one offset (a consumer reads whole deliveries at once), and given
  undecoded to the layer's own AMQP channels; damaged ones end the connection with AMQP's error code
  instead of leaving it deaf;
* handshake: heartbeat and limits are negotiated, the connection has a name, the broker may tell
  when it blocks publishers or cancels a consumer, the password is in no debug log;
* end: whoever waits gets an answer, whatever happened and whoever was cancelled. A broker that is
  alive and doesn't answer on one of the layer's AMQP channels (``answers``) is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import re
import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

import carehare
import carehare._protocol
import pamqp.commands
import pamqp.exceptions
import pamqp.header
import pamqp.heartbeat

from .._futures import fail, resolve
from . import frames, greeting
from .carehare_channels import (
    AckingConsumer,
    ChannelIds,
    ConfirmingExchange,
    QuietFrameWriter,
    Rpc,
)
from .channel import BytesChannel
from .heartbeat import Heartbeat
from .tls import explain_end
from .transport import CoalescingTransport
from .url import BrokerUrl

# How long a peer may take to read our last words before the socket is closed on it.
FAREWELL_TIMEOUT = 1.0

# Bytes that are read at once. asyncio makes room for 256 KiB at each read. That may be more than
# the C library keeps at hand: then each read has three more system calls and new pages, which was a
# fifth of a receiver's CPU (``throughput-100``, and only in some processes).
_READ_SIZE = 64 * 1024

# Turns of the loop after which it has read what was there, and has told of an end of the connection
# (TLS takes some of them).
_READ_TURNS = 10
# Heartbeat intervals after which RabbitMQ may have closed a connection on which it heard nothing.
_BROKERS_PATIENCE = 2.0

# TCP keepalive, in seconds: where no heartbeats pass, the kernel notices within a minute that the
# other side is gone. (macOS calls the first one otherwise.)
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}

# AMQP 0-9-1, section 1.2: reply codes of connection errors.
_FRAME_ERROR = 501
_SYNTAX_ERROR = 502
_COMMAND_INVALID = 503
_CHANNEL_ERROR = 504
_UNEXPECTED_FRAME = 505
_INTERNAL_ERROR = 541

# A broker that sets no frame_max (0) still doesn't send a frame larger than this; a damaged size
# would have us wait for gigabytes otherwise.
_LARGEST_FRAME = 256 * 1024 * 1024
# AMQP 0-9-1, section 4.2.3: what every peer can take.
_SMALLEST_FRAME_MAX = 4096

# Characters. RabbitMQ's initial_frame_max, which holds for user name and password, is 4096 bytes up
# to 4.0, and 8192 since; a token as the password may exceed it.
_LONG_CREDENTIALS = 3000

# What the broker says in the handshake, in this order.
_HANDSHAKE: tuple[type, ...] = (
    pamqp.commands.Connection.Start,
    pamqp.commands.Connection.Tune,
    pamqp.commands.Connection.OpenOk,
)

_OwnChannel = TypeVar("_OwnChannel", bound=BytesChannel)


class ProtocolError(carehare.BadBytesFromServer):
    """The broker broke the protocol; ``reply_code`` is what it is told."""

    def __init__(self, reply_code: int, text: str) -> None:
        super().__init__(text)
        self.reply_code = reply_code


class Protocol(carehare._protocol.Protocol, asyncio.BufferedProtocol):
    """See the module; ``open`` and ``closed`` are futures that need not be looked at."""

    def __init__(
        self,
        url: BrokerUrl,
        *,
        connection_name: str,
        on_blocked: Callable[[str | None], None],
        tls_problem: str = "",
    ) -> None:
        super().__init__(
            username=url.username, password=url.password, virtual_host=url.virtual_host
        )
        self._url = url
        self._connection_name = connection_name
        self._tls_problem = tls_problem  # see Tls
        # Called with the broker's reason when it blocks publishers, with None when no more.
        self._on_blocked = on_blocked
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # The same for the layer, with the reason as its result; users have and may cancel `closed`.
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.frame_max = 0  # as negotiated; 0: no limit
        self._frame_limit = _LARGEST_FRAME
        # A view: asyncio's TLS slices it, and a slice of a bytearray is a copy.
        self._read_buffer = memoryview(bytearray(_READ_SIZE))
        self._rest = bytearray()  # the start of a frame that isn't whole yet
        self._wanted = frames.OVERHEAD  # bytes that it takes to go on with _rest
        self._heartbeat: Heartbeat | None = None
        self._handshake = iter(_HANDSHAKE)
        self.server_version: tuple[int, ...] = ()  # as (4, 0), if the broker says it
        self._channel_id_store: ChannelIds = ChannelIds(0)  # until the limit is known
        self._exchange_channels: dict[str, ConfirmingExchange]  # type: ignore[assignment]  # narrower
        # Those of _channels that take bytes. (isinstance() for each frame would be an eighth of the
        # time that a delivery takes: carehare's Channel is a typing.Protocol.)
        self._bytes_channels: dict[int, BytesChannel] = {}
        self.is_greeted = False  # RabbitMQ has begun to speak, and nobody else
        self._first_bytes = b""  # until that is known
        self.can_write = True  # Nobody has said goodbye yet.
        self._is_ending = False  # one side said goodbye, or broke the rules: nothing is read now
        self._abort_timer: asyncio.TimerHandle | None = None
        self.blocked_since: float | None = None  # loop time; None: the broker takes messages
        self._turns_to_read = 0  # until what came in a standstill of the loop is read
        self._handlers: dict[type, Callable[[Any], None]] = {
            pamqp.heartbeat.Heartbeat: lambda frame: None,  # data_received() saw it
            pamqp.commands.Connection.Start: self._accept_start,
            pamqp.commands.Connection.Tune: self._accept_tune,
            pamqp.commands.Connection.OpenOk: self._accept_open_ok,
            pamqp.commands.Connection.Close: self._accept_close,
            pamqp.commands.Connection.CloseOk: self._accept_close_ok,
            pamqp.commands.Connection.Blocked: self._accept_blocked,
            pamqp.commands.Connection.Unblocked: lambda frame: self.note_unblocked(),
        }

    # Bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast: uvloop's transports are like asyncio's, but not instances of them.
        _keep_alive(cast("asyncio.Transport", transport))
        self._transport: Any = CoalescingTransport(cast("asyncio.Transport", transport))
        self.transport: CoalescingTransport = self._transport  # its type: carehare's is another
        self.write: Callable[[bytes], None] = self._transport.write
        self.write(pamqp.header.ProtocolHeader().marshal())

    def pause_writing(self) -> None:
        self._transport.pause()

    def resume_writing(self) -> None:
        self._transport.resume()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._read_buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        if self._heartbeat is not None:
            self._heartbeat.received()
        if self._is_ending:
            return
        if not self.is_greeted and not (data := self._accept_first_bytes(data)):
            return
        try:
            offset = self._accept_rest(data) if self._rest else 0
            if offset < len(data):
                offset = self._accept_frames(data, offset)
        except Exception as err:
            self._crash(err)
        else:
            if offset < len(data):
                self._rest += data[offset:]

    def _accept_first_bytes(self, data: bytes) -> bytes:
        """Return what has come if it is RabbitMQ's; else nothing, and name who speaks."""
        data = self._first_bytes + data
        is_rabbitmq = greeting.is_rabbitmq(data)
        if is_rabbitmq:
            self.is_greeted = True
            return data
        self._first_bytes = data
        if is_rabbitmq is not None:
            self._crash(ProtocolError(_FRAME_ERROR, greeting.describe(data)))
        return b""

    def provoke(self) -> None:
        """Have whoever hasn't greeted yet say who it is; RabbitMQ ends the connection over it."""
        if not self.is_greeted and self.can_write:
            self.write(greeting.PROVOCATION)

    def _accept_rest(self, data: bytes) -> int:
        """Handle the frame that ``data`` goes on with; return where the next one begins.

        Nothing else is copied: of a large body almost every read ends amid a frame.
        """
        offset = 0
        while self._rest and not self._is_ending:
            missing = self._wanted - len(self._rest)
            self._rest += data[offset : offset + missing]
            offset += missing
            if offset > len(data):
                return len(data)
            # Its head, which tells its size, or all of it
            whole = bytes(self._rest)
            self._rest.clear()
            self._rest += whole[self._accept_frames(whole, 0) :]
        return offset

    def _accept_frames(self, data: bytes, offset: int) -> int:
        """Handle all whole frames; return where the first that isn't whole begins."""
        end = len(data)
        self._wanted = frames.OVERHEAD
        while offset + frames.OVERHEAD <= end and not self._is_ending:
            frame_type, amqp_channel_id, size = frames.read_frame_head(data, offset)
            if size > self._frame_limit:
                raise ProtocolError(_FRAME_ERROR, "RabbitMQ sent a frame larger than agreed")
            next_offset = offset + size + frames.OVERHEAD
            if next_offset > end:
                self._wanted = next_offset - offset
                break
            if data[next_offset - 1] != frames.FRAME_END:
                raise ProtocolError(_FRAME_ERROR, "RabbitMQ sent a frame with a wrong end")
            amqp_channel = self._bytes_channels.get(amqp_channel_id)
            if amqp_channel is not None and (
                read_to := amqp_channel.accept_bytes(frame_type, data, offset + 7, next_offset - 1)
            ):
                offset = read_to
            else:
                self.accept_frame(frames.decode(data[offset:next_offset]), amqp_channel_id)
                offset = next_offset
        return offset

    def accept_frame(self, frame: Any, channel_id: int) -> None:
        handler = self._handlers.get(type(frame))
        if handler is not None:
            self._assert_channel_id_0(frame, channel_id)
            handler(frame)
        elif isinstance(frame, pamqp.commands.Channel.Flow):
            self.write(frames.encode(pamqp.commands.Channel.FlowOk(frame.active), channel_id))
        elif channel_id not in self._channels or (
            isinstance(frame, pamqp.commands.Channel.CloseOk)
            and channel_id not in self._closing_channels
        ):
            raise ProtocolError(
                _CHANNEL_ERROR, f"RabbitMQ sent {type(frame).__name__} on a channel that isn't open"
            )
        elif isinstance(frame, pamqp.commands.Channel.Close) and channel_id in self._bytes_channels:
            # carehare would free the number only afterwards, but the channel may want it again.
            self.write(frames.encode(pamqp.commands.Channel.CloseOk(), channel_id))
            del self._channels[channel_id]
            amqp_channel = self._bytes_channels.pop(channel_id)
            self._channel_id_store.release(channel_id)
            amqp_channel.accept_channel_closed_by_server(frame)
        else:
            super().accept_frame(frame, channel_id)
            refused = self._channels.get(channel_id)
            if isinstance(frame, pamqp.commands.Channel.Close) and isinstance(refused, Rpc):
                # carehare waits for the answer to the Close that was written behind the call.
                # RabbitMQ 4.0 doesn't always send one when it had closed the channel before (two of
                # 12,000 refused calls). The channel's number stays taken until it comes.
                refused.accept_channel_closed_by_server(frame)

    def _crash(self, exc: Exception) -> None:
        """End the connection over an error; ``closed`` (or ``open``) gets it."""
        code = _INTERNAL_ERROR
        if isinstance(exc, ProtocolError):
            code = exc.reply_code
        elif isinstance(exc, carehare.BadBytesFromServer):
            code = _SYNTAX_ERROR
        elif isinstance(exc, pamqp.exceptions.PAMQPException):
            code = getattr(exc, "value", _SYNTAX_ERROR)
            exc = ProtocolError(code, f"RabbitMQ broke the protocol: {exc}")
        elif isinstance(exc, NotImplementedError):  # of carehare's channels
            code = _UNEXPECTED_FRAME
            exc = ProtocolError(code, f"RabbitMQ broke the protocol: {exc}")
        self._crash_exc = exc
        if self.open.done():
            self.send_close_if_allowed(reply_code=code, reply_text=type(exc).__name__)
        self._end()

    def _end(self) -> None:
        """Close the socket once what was written has gone out, or soon anyway."""
        self._is_ending = True
        self.can_write = False
        self._transport.close()
        if self._abort_timer is None:
            self._abort_timer = asyncio.get_running_loop().call_later(
                FAREWELL_TIMEOUT, self._transport.abort
            )

    # Handshake

    def _expect(self, frame: Any) -> None:
        if type(frame) is not next(self._handshake, None):
            raise ProtocolError(_COMMAND_INVALID, f"RabbitMQ sent {frame.name} out of turn")

    def _accept_start(self, frame: pamqp.commands.Connection.Start) -> None:
        self._expect(frame)
        version = str((frame.server_properties or {}).get("version"))
        self.server_version = tuple(map(int, re.findall(r"\d+", version)))
        if "PLAIN" not in (frame.mechanisms or "").split():
            raise carehare.ConnectionClosed("RabbitMQ offers no login by name and password (PLAIN)")
        # Not through carehare's writer, whose debug log would hold the password.
        self.write(
            frames.encode(
                pamqp.commands.Connection.StartOk(
                    client_properties={
                        "product": "channels_rabbitmq",
                        "platform": f"{platform.python_implementation()} "
                        f"{platform.python_version()}",
                        "connection_name": self._connection_name,
                        "capabilities": {
                            "authentication_failure_close": True,
                            "basic.nack": True,
                            "connection.blocked": True,
                            "consumer_cancel_notify": True,
                            "publisher_confirms": True,
                        },
                    },
                    mechanism="PLAIN",
                    response=f"\0{self._username}\0{self._password}",
                ),
                0,
            )
        )

    def _accept_tune(self, frame: pamqp.commands.Connection.Tune) -> None:
        self._expect(frame)
        # frame_max is echoed: RabbitMQ 4.1 refuses a client that asks for less than 8192.
        self.frame_max = frame.frame_max or 0
        if 0 < self.frame_max < _SMALLEST_FRAME_MAX:
            raise ProtocolError(
                _SYNTAX_ERROR, f"RabbitMQ asked for a frame_max of {frame.frame_max}"
            )
        if self.frame_max:
            self._frame_limit = self.frame_max
        channel_max = _least(frame.channel_max or 0, self._url.channel_max or 0)
        heartbeat = _least(frame.heartbeat or 0, self._url.heartbeat) if self._url.heartbeat else 0
        self.write(
            frames.encode(
                pamqp.commands.Connection.TuneOk(
                    channel_max=channel_max, frame_max=self.frame_max, heartbeat=heartbeat
                ),
                0,
            )
            + frames.encode(pamqp.commands.Connection.Open(virtual_host=self._virtual_host), 0)
        )
        # carehare reads frame_max here when users publish.
        self._lifecycle[pamqp.commands.Connection.Tune] = frame
        self._channel_id_store = ChannelIds(channel_max)
        self._heartbeat = Heartbeat(
            heartbeat, write=self.write, on_dead=self._accept_silence, on_tick=self._look
        )

    def _accept_open_ok(self, frame: pamqp.commands.Connection.OpenOk) -> None:
        self._expect(frame)
        resolve(self.open, None)

    # Half-dead

    @property
    def heartbeat(self) -> Heartbeat:
        assert self._heartbeat is not None, "there is one since the handshake"
        return self._heartbeat

    def _accept_blocked(self, frame: pamqp.commands.Connection.Blocked) -> None:
        self.blocked_since = asyncio.get_running_loop().time()
        self._on_blocked(frame.reason)

    def note_unblocked(self) -> None:
        """The broker takes messages again: it has said so, or has taken one."""
        if self.blocked_since is not None:
            self.blocked_since = None
            self._on_blocked(None)

    def _look(self) -> None:
        """Leave a broker that is alive and doesn't answer."""
        if not self.can_write:
            return
        for amqp_channel in list(self._bytes_channels.values()):
            if amqp_channel.hangs():
                why = "though it is alive" if self.heartbeat.has_heartbeats else "for too long"
                self._crash_exc = carehare.ConnectionClosed(
                    f"RabbitMQ answers nothing on one of the AMQP channels, {why}"
                )
                self.can_write = False
                self._transport.abort()
                return

    def read_first(self) -> None:
        """Have who wants to write wait until what has come is read: the loop stood still.

        The broker may have closed the connection in that time, and what is written then is lost
        without an error. It may also have vanished without a word.
        """
        if self._turns_to_read == 0 and self.can_write:
            self._turns_to_read = _READ_TURNS
            self._transport.hold()
            asyncio.get_running_loop().call_soon(self._finish_turn)

    @property
    def is_being_read(self) -> bool:
        """Whether ``read_first`` isn't done yet."""
        return self._turns_to_read > 0

    def _finish_turn(self) -> None:
        self._turns_to_read -= 1
        if self._turns_to_read and self.can_write:
            asyncio.get_running_loop().call_soon(self._finish_turn)
            return
        self._turns_to_read = 0
        if self.can_write and self.heartbeat.is_silent_for(_BROKERS_PATIENCE):
            self._accept_silence()
        self.heartbeat.refresh()
        self._transport.release()

    # End

    def send_close_if_allowed(self, reply_code: int = 0, reply_text: str = "") -> None:
        """As carehare's; says goodbye also after somebody cancelled ``closed``."""
        if not self.can_write:
            return
        self._closing = True
        self.can_write = False
        self.write(
            frames.encode(
                pamqp.commands.Connection.Close(
                    reply_code=reply_code, reply_text=reply_text, class_id=0, method_id=0
                ),
                0,
            )
        )

    def _accept_close(self, frame: pamqp.commands.Connection.Close) -> None:
        self._close_frame = frame
        self.write(frames.encode(pamqp.commands.Connection.CloseOk(), 0))
        self._end()

    def _accept_silence(self) -> None:
        self._crash_exc = carehare.ConnectionClosedByHeartbeatMonitor(
            "RabbitMQ has been silent for almost two heartbeat intervals"
        )
        self.can_write = False
        self._transport.abort()

    def _accept_close_ok(self, frame: pamqp.commands.Connection.CloseOk) -> None:
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.can_write = False
        self._transport.resume()
        self._transport.release()
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        reason: Exception | None
        if self._crash_exc is not None:
            reason = self._crash_exc
        elif self._close_frame is not None:
            reason = carehare.ConnectionClosedByServer(
                self._close_frame.reply_code or 0, self._close_frame.reply_text
            )
        elif self._closing:
            reason = None  # we said goodbye
        elif self.is_greeted and not self.open.done():
            reason = self._why_not_open(exc)
        elif self.is_greeted:
            reason = exc or carehare.ConnectionClosed("RabbitMQ ended the connection")
        else:
            reason = self._why_not_greeted(exc)

        channels, self._channels = self._channels, {}
        self._bytes_channels.clear()
        self._closing_channels.clear()
        for amqp_channel in channels.values():
            amqp_channel.accept_connection_closed(
                carehare.ConnectionClosed(str(reason or "The connection was closed"))
            )
        self._channel_id_store.close()
        if not self.open.done():
            fail(self.open, reason or carehare.ConnectionClosed("The connection was given up"))
        if reason is None:
            resolve(self.closed, None)
        else:
            fail(self.closed, reason)
        resolve(self.ended, reason)

    def _why_not_open(self, exc: Exception | None) -> Exception:
        """It is rude in the handshake: over a frame that is too large it says nothing."""
        hint = ""
        if len(self._url.username) + len(self._url.password) > _LONG_CREDENTIALS:
            hint = ": user name and password may be too long for its initial_frame_max"
        told = f" ({exc})" if exc else ""
        return carehare.ConnectionClosed(
            f"RabbitMQ ended the connection during the login{hint}{told}"
        )

    def _why_not_greeted(self, exc: Exception | None) -> Exception:
        if self._first_bytes:
            return ProtocolError(_FRAME_ERROR, greeting.describe(self._first_bytes))
        return explain_end(exc, tls=self._url.tls, problem=self._tls_problem)

    def abort(self) -> None:
        """Close the socket at once, without a word to the broker."""
        self._closing = True
        self.can_write = False
        self._transport.abort()

    # AMQP channels

    def _refuse_if_ended(self) -> None:
        if not self.can_write:
            raise carehare.ConnectionClosed("The connection is closed")

    def add_channel(self, make: Callable[[int], _OwnChannel]) -> _OwnChannel:
        """Make one of the layer's own AMQP channels by ``make(amqp_channel_id)``."""
        self._refuse_if_ended()
        amqp_channel_id = self._channel_id_store.acquire()
        amqp_channel = make(amqp_channel_id)
        self._channels[amqp_channel_id] = self._bytes_channels[amqp_channel_id] = amqp_channel
        return amqp_channel

    def rpc(
        self, frame: Any, ignored_frame_types: frozenset[type] = frozenset()
    ) -> asyncio.Future[None]:
        """As carehare's; waits for a free AMQP channel, and fails once the connection is closed."""
        # What can't be written is refused here, not when it is its turn.
        frames.encode(frame, 0)
        rpc = Rpc(frame, ignored_frame_types)
        try:
            self._refuse_if_ended()
        except carehare.ConnectionClosed as err:
            fail(rpc.done, err)
            return rpc.done

        def start(amqp_channel_id: int | None) -> None:
            if amqp_channel_id is None:
                fail(rpc.done, carehare.ConnectionClosed("The connection was closed"))
                return
            self._channels[amqp_channel_id] = rpc
            self._closing_channels[amqp_channel_id] = None
            rpc.start(QuietFrameWriter(self._transport, amqp_channel_id))

        self._channel_id_store.acquire_later(start)
        return rpc.done

    def publish(
        self, message: bytes, *, exchange_name: str, routing_key: str
    ) -> asyncio.Future[None]:
        """As carehare's; goes on after somebody cancelled ``closed``."""
        self._refuse_if_ended()
        return self._get_exchange_channel(exchange_name).publish(message, routing_key=routing_key)

    def acking_consumer(
        self, queue_name: str, *, prefetch_size: int, prefetch_count: int
    ) -> AckingConsumer:
        """As carehare's; raises ConnectionClosed once the connection is closed."""
        self._refuse_if_ended()
        amqp_channel_id = self._channel_id_store.acquire()

        def on_closing() -> None:
            self._closing_channels[amqp_channel_id] = None

        try:
            consumer = AckingConsumer(
                QuietFrameWriter(self._transport, amqp_channel_id, on_closing=on_closing),
                queue_name=queue_name,
                prefetch_size=prefetch_size,
                prefetch_count=prefetch_count,
            )
        except Exception:  # it can't be written
            self._channel_id_store.release(amqp_channel_id)
            raise
        self._channels[amqp_channel_id] = consumer
        return consumer

    def _get_exchange_channel(self, exchange_name: str) -> ConfirmingExchange:
        amqp_channel = self._exchange_channels.get(exchange_name)
        if amqp_channel is None:
            amqp_channel_id = self._channel_id_store.acquire()
            amqp_channel = ConfirmingExchange(
                exchange_name,
                frame_writer=QuietFrameWriter(self._transport, amqp_channel_id),
                frame_max=self.frame_max,
            )
            self._channels[amqp_channel_id] = amqp_channel
            self._exchange_channels[exchange_name] = amqp_channel
        return amqp_channel


def _keep_alive(transport: asyncio.Transport) -> None:
    tcp = transport.get_extra_info("socket")
    if tcp is None:  # in tests
        return
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        option = getattr(socket, name, None)
        if option is not None:
            with contextlib.suppress(OSError):  # The system knows it and doesn't have it.
                tcp.setsockopt(socket.IPPROTO_TCP, option, value)


def _least(ours: int, theirs: int) -> int:
    """Return the smaller of two limits, where 0 stands for none."""
    return min(ours, theirs) if ours and theirs else ours or theirs
