"""A bare AMQP 0-9-1 client on ``struct``: the least that Python must do for confirmed messages.

It is the ceiling that the layers are compared with, so it has their contract (an exclusive bounded
queue, confirms, acks) and nothing else: no reconnect, no heartbeat, no TLS, no body larger than a
frame, one AMQP channel. All that is written in one turn of the loop goes out together, with one ack
for all messages that came in it.

AMQP's specification, version 0-9-1: frames are in section 4.2, the methods in its XML file.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

_METHOD, _HEADER, _BODY = 1, 2, 3
_END = b"\xce"
_CHANNEL = 1  # the number of our one AMQP channel

_frame_head = struct.Struct(">BHI")  # type, AMQP channel, size of the payload
_index = struct.Struct(">HH")  # class, method
_content = struct.Struct(">HHQH")  # class, weight, size of the body, flags
_HAS_CORRELATION_ID = 1 << 10
_confirm = struct.Struct(">QB")  # delivery tag, multiple
_ack = struct.Struct(">BHIHHQB")

_START, _TUNE, _OPEN_OK, _CLOSE, _CLOSE_OK = (10, 10), (10, 30), (10, 41), (10, 50), (10, 51)
_CHANNEL_OPEN_OK, _CHANNEL_CLOSE = (20, 11), (20, 40)
_EXCHANGE_OK, _EXCHANGE_DELETED = (40, 11), (40, 21)
_DECLARE_OK, _BIND_OK, _DELETE_OK = (50, 11), (50, 21), (50, 41)
_EXCHANGE_BIND_OK = (40, 31)
_QOS_OK, _CONSUME_OK, _DELIVER = (60, 11), (60, 21), (60, 60)
_ACK, _NACK, _SELECT_OK = (60, 80), (60, 120), (85, 11)


class Refused(Exception):
    """A queue was full: its publisher got a nack."""


class RawConnection(asyncio.Protocol):
    """Make it by ``connect``. ``server_version`` is what the broker says of itself."""

    def __init__(self, username: str, password: str, virtual_host: str) -> None:
        self._login = f"\0{username}\0{password}".encode()
        self._virtual_host = virtual_host.encode()
        self.server_version = ""
        self._loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._rest = b""  # of a frame that isn't whole yet
        self._output: list[bytes] = []  # to be written by _flush()
        self._is_flush_due = False
        self._max_body = 0
        self._calls: deque[tuple[tuple[int, int], asyncio.Future[None]]] = deque()
        self._published = 0
        self._confirms: dict[int, asyncio.Future[None]] = {}  # by number, in order
        self._on_body: Callable[[bytes], None] = lambda body: None
        self._delivery_tag = 0  # of the last message that came, and of the last one acked
        self._acked = 0

    @classmethod
    async def connect(cls, url: str) -> RawConnection:
        parts = urlsplit(url)
        if parts.scheme != "amqp":
            raise ValueError("the raw client has no TLS")
        connection = cls(
            unquote(parts.username or "guest"),
            unquote(parts.password or "guest"),
            unquote(parts.path[1:]) or "/",
        )
        await connection._loop.create_connection(
            lambda: connection, parts.hostname or "127.0.0.1", parts.port or 5672
        )
        await connection.opened
        return connection

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    # Calls

    async def confirm_select(self) -> None:
        await self._call((85, 10), b"\0", _SELECT_OK)

    async def declare_queue(self, name: str, arguments: dict[str, str | int]) -> None:
        """An exclusive queue, which goes with the connection."""
        table = b"".join(
            _short(key) + (b"S" + _long(v) if isinstance(v, str) else b"I" + struct.pack(">i", v))
            for key, v in arguments.items()
        )
        exclusive = b"\x04"
        payload = b"\0\0" + _short(name) + exclusive + struct.pack(">I", len(table)) + table
        await self._call((50, 10), payload, _DECLARE_OK)

    async def declare_exchange(self, name: str, kind: str, *, auto_delete: bool = False) -> None:
        """An exchange that isn't durable."""
        bits = b"\x04" if auto_delete else b"\0"
        payload = b"\0\0" + _short(name) + _short(kind) + bits + bytes(4)
        await self._call((40, 10), payload, _EXCHANGE_OK)

    async def delete_exchange(self, name: str) -> None:
        """No error if there is none."""
        await self._call((40, 20), b"\0\0" + _short(name) + b"\0", _EXCHANGE_DELETED)

    async def delete_queue(self, name: str) -> None:
        await self._call((50, 40), b"\0\0" + _short(name) + b"\0", _DELETE_OK)

    def bind(self, queue: str, exchange: str, key: str) -> asyncio.Future[None]:
        payload = b"\0\0" + _short(queue) + _short(exchange) + _short(key) + bytes(5)
        return self._call((50, 20), payload, _BIND_OK)

    async def bind_exchange(self, destination: str, source: str, key: str) -> None:
        payload = b"\0\0" + _short(destination) + _short(source) + _short(key) + bytes(5)
        await self._call((40, 30), payload, _EXCHANGE_BIND_OK)

    async def consume(self, queue: str, prefetch: int, on_body: Callable[[bytes], None]) -> None:
        self._on_body = on_body
        await self._call((60, 10), struct.pack(">IHB", 0, prefetch, 0), _QOS_OK)
        payload = b"\0\0" + _short(queue) + _short("raw") + bytes(5)
        await self._call((60, 20), payload, _CONSUME_OK)

    def publish_start(self, exchange: str, key: str, *, is_mandatory: bool) -> bytes:
        """What all messages to one key begin with, for ``publish``."""
        mandatory = b"\1" if is_mandatory else b"\0"
        payload = _index.pack(60, 40) + b"\0\0" + _short(exchange) + _short(key) + mandatory
        return _frame_head.pack(_METHOD, _CHANNEL, len(payload)) + payload + _END

    def publish(self, start: bytes, body: bytes, *, is_numbered: bool) -> asyncio.Future[None]:
        """The future is done with the confirm; it raises ``Refused`` for a nack."""
        assert len(body) <= self._max_body
        self._published += 1
        future = self._confirms[self._published] = self._loop.create_future()
        if is_numbered:
            number = b"%d" % self._published
            flags, properties = _HAS_CORRELATION_ID, bytes((len(number),)) + number
        else:
            flags, properties = 0, b""
        self._write(
            b"".join(
                (
                    start,
                    _frame_head.pack(_HEADER, _CHANNEL, _content.size + len(properties)),
                    _content.pack(60, 0, len(body), flags),
                    properties,
                    _END,
                    _frame_head.pack(_BODY, _CHANNEL, len(body)),
                    body,
                    _END,
                )
            )
        )
        return future

    def _call(
        self, index: tuple[int, int], arguments: bytes, answer: tuple[int, int], channel: int = 1
    ) -> asyncio.Future[None]:
        future = self._loop.create_future()
        self._calls.append((answer, future))
        self._send(index, arguments, channel)
        return future

    def _send(self, index: tuple[int, int], arguments: bytes, channel: int) -> None:
        size = _index.size + len(arguments)
        head = _frame_head.pack(_METHOD, channel, size)
        self._write(head + _index.pack(*index) + arguments + _END)

    # Bytes

    def _write(self, data: bytes) -> None:
        self._output.append(data)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        assert self._transport is not None
        self._is_flush_due = False
        if self._delivery_tag > self._acked:
            self._acked = self._delivery_tag
            self._output.append(
                _ack.pack(_METHOD, _CHANNEL, 13, 60, 80, self._delivery_tag, True) + _END
            )
        self._transport.write(b"".join(self._output))
        self._output.clear()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(b"AMQP\0\0\x09\x01")

    def connection_lost(self, exc: Exception | None) -> None:
        error = exc or ConnectionError("the connection has ended")
        for future in (self.opened, *(call[1] for call in self._calls), *self._confirms.values()):
            if not future.done():
                future.set_exception(error)
                future.exception()  # asyncio shall not complain if nobody waits for it

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        offset = 0
        end = len(data)
        while offset + 8 <= end:
            kind, _, size = _frame_head.unpack_from(data, offset)
            payload = offset + 7
            next_offset = payload + size + 1
            if next_offset > end:
                break
            if kind == _BODY:
                self._on_body(data[payload : next_offset - 1])
            elif kind == _METHOD:
                index = _index.unpack_from(data, payload)
                if index == _DELIVER:
                    # The tag follows the consumer's tag, a short string.
                    at = payload + 5 + data[payload + 4]
                    self._delivery_tag = int.from_bytes(data[at : at + 8], "big")
                elif index in (_ACK, _NACK):
                    tag, bits = _confirm.unpack_from(data, payload + 4)
                    self._settle(tag, bool(bits & 1), index == _NACK)
                else:
                    self._accept(index, data[payload + 4 : next_offset - 1])
            offset = next_offset
        self._rest = data[offset:]
        if self._delivery_tag > self._acked:
            self._flush_soon()

    def _settle(self, number: int, multiple: bool, is_refused: bool) -> None:
        numbers = [number]
        if multiple:
            numbers = []
            for pending in self._confirms:
                if pending > number:
                    break
                numbers.append(pending)
        for each in numbers:
            future = self._confirms.pop(each)
            if future.done():
                continue
            if is_refused:
                future.set_exception(Refused())
            else:
                future.set_result(None)

    def _accept(self, index: tuple[int, int], arguments: bytes) -> None:
        """What doesn't come with every message."""
        if index == _START:
            version = arguments.partition(b"\x07versionS")[2]
            self.server_version = version[4 : 4 + int.from_bytes(version[:4], "big")].decode()
            mechanism = _short("PLAIN") + _long(self._login.decode()) + _short("en_US")
            self._send((10, 11), struct.pack(">I", 0) + mechanism, 0)
        elif index == _TUNE:
            channel_max, frame_max, _ = struct.unpack(">HIH", arguments)
            self._max_body = (frame_max or 131072) - 8
            self._send((10, 31), struct.pack(">HIH", channel_max, frame_max, 0), 0)
            self._call((10, 40), _short(self._virtual_host.decode()) + b"\0\0", _OPEN_OK, 0)
            opened = self._call((20, 10), b"\0", _CHANNEL_OPEN_OK)
            opened.add_done_callback(lambda _: self.opened.done() or self.opened.set_result(None))
        elif index in (_CLOSE, _CHANNEL_CLOSE):
            code = int.from_bytes(arguments[:2], "big")
            text = arguments[3 : 3 + arguments[2]].decode()
            self.connection_lost(ConnectionError(f"{code} {text}"))
            self.close()
        else:
            expected, future = self._calls.popleft()
            assert index == expected, f"{index} instead of {expected}"
            future.set_result(None)


def _short(text: str) -> bytes:
    data = text.encode()
    return bytes([len(data)]) + data


def _long(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">I", len(data)) + data
