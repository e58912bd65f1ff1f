"""The broker's end of a connection, played by the test: in memory, or on a real socket.

peer = Peer()                                   # a Protocol that is open
channel = peer.publisher()
peer.feed(commands.Basic.Ack(1), channel=1)     # what the broker says
assert peer.taken() == [...]                    # what the client has said

async with scripted_broker(script) as broker:   # script(client) runs for each connection
    await Connection(BrokerUrl.parse(broker.url)).connect()
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pamqp.frame
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader, ProtocolHeader
from pamqp.heartbeat import Heartbeat

from channels_rabbitmq._amqp.binding import TopologyChannel
from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._amqp.consuming import ConsumerChannel
from channels_rabbitmq._amqp.protocol import Protocol
from channels_rabbitmq._amqp.publishing import PublisherChannel
from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq._carehare.channels import UserChannels
from channels_rabbitmq._carehare.connection import CarehareConnection
from tests.support.fake_servers import Server, listening

START = commands.Connection.Start(mechanisms="AMQPLAIN PLAIN", server_properties={})


def tune(*, channel_max: int = 2047, frame_max: int = 131072, heartbeat: int = 0) -> Any:
    return commands.Connection.Tune(channel_max, frame_max, heartbeat)


def close_connection(reply_code: int = 320, reply_text: str = "CONNECTION_FORCED") -> Any:
    return commands.Connection.Close(reply_code, reply_text, 0, 0)


def close_channel(reply_code: int = 404, reply_text: str = "NOT_FOUND") -> Any:
    return commands.Channel.Close(reply_code, reply_text, 0, 0)


def marshal(*frames: Any, channel: int = 0) -> bytes:
    """Return the bytes of pamqp's objects; bytes stay as they are."""
    return b"".join(
        frame if isinstance(frame, bytes) else pamqp.frame.marshal(frame, channel)
        for frame in frames
    )


def content(body: bytes, *, pieces: int = 1, **properties: Any) -> list[Any]:
    """Return the content header of a message, and its body in so many frames (empty: in none)."""
    header = ContentHeader(body_size=len(body), properties=commands.Basic.Properties(**properties))
    length = -(-len(body) // pieces) or 1
    cut = [body[at : at + length] for at in range(0, len(body), length)]
    return [header, *(ContentBody(piece) for piece in cut)]


def delivery(tag: int, body: bytes, *, pieces: int = 1) -> list[Any]:
    deliver = commands.Basic.Deliver("channels", tag, False, "exchange", "key")
    return [deliver, *content(body, pieces=pieces)]


def returned(body: bytes, **properties: Any) -> list[Any]:
    return [commands.Basic.Return(312, "NO_ROUTE", "e", "key"), *content(body, **properties)]


def unmarshal(data: bytes) -> list[tuple[int, Any]]:
    """Return (AMQP channel number, pamqp's object) for each frame."""
    frames = []
    while data:
        length, channel, frame = pamqp.frame.unmarshal(data)
        frames.append((channel, frame))
        data = data[length:]
    return frames


def plain(frame: Any) -> Any:
    """Return something that can be compared: pamqp's content frames can't."""
    if isinstance(frame, ContentHeader):
        return "header", frame.body_size, dict(frame.properties or {})
    if isinstance(frame, ContentBody):
        return "body", frame.value
    if isinstance(frame, (ProtocolHeader, Heartbeat)):
        return frame.name
    return frame.name, dict(frame)


class FakeTransport(asyncio.Transport):
    """Collects what is written; ends as asyncio's do, by ``connection_lost`` a turn later."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: Protocol
        self.written = b""
        self.writes = 0
        self.is_read = True  # by the peer; else close() waits for ever, as with a full socket
        self.is_aborted = False
        self.high_water: int | None = None
        self._is_closing = False
        self._is_lost = False

    def write(self, data: Any) -> None:
        assert not self._is_closing
        self.written += data
        self.writes += 1

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high_water = high

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        self._is_closing = True
        if self.is_read:
            self.lose(None)

    def abort(self) -> None:
        self._is_closing = self.is_aborted = True
        self.lose(None)

    def lose(self, exc: Exception | None) -> None:
        """The network ends the connection."""
        self._is_closing = True
        if not self._is_lost:
            self._is_lost = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, exc)


class Peer:
    """A ``Protocol`` in memory, open unless the test does the handshake (``is_open=False``)."""

    def __init__(
        self,
        url: str = "amqp://guest:guest@broker?heartbeat=0",
        *,
        is_open: bool = True,
        connection_name: str = "test",
        **limits: int,
    ) -> None:
        self.blocked: list[str | None] = []  # what on_blocked was told
        self.protocol = Protocol(
            BrokerUrl.parse(url), connection_name=connection_name, on_blocked=self.blocked.append
        )
        self.user = UserChannels(self.protocol)
        self.transport = FakeTransport()
        self.transport.protocol = self.protocol
        self.protocol.connection_made(self.transport)
        if is_open:
            self.feed(START, tune(**limits), commands.Connection.OpenOk())
            assert self.protocol.open.done()
            self.taken()

    def feed(self, *frames: Any, channel: int = 0) -> None:
        """The broker says this, in one piece."""
        self.protocol.data_received(marshal(*frames, channel=channel))

    def raw(self) -> bytes:
        """Return the bytes written since the last time, without waiting for the loop's turn."""
        if not self.transport.is_closing():
            self.protocol.transport._flush()
        written, self.transport.written = self.transport.written, b""
        return written

    def taken(self) -> list[tuple[int, Any]]:
        """Return the frames written since the last time."""
        return unmarshal(self.raw())

    def names(self) -> list[tuple[int, str]]:
        """Like ``taken``, but only the names of the frames."""
        return [(channel, frame.name) for channel, frame in self.taken()]

    def tick(self) -> None:
        """The heartbeat's timer ticks."""
        self.protocol._on_tick()

    async def lost(self, exc: Exception | None = None) -> None:
        """The network ends the connection, and the client has heard of it."""
        self.transport.lose(exc)
        await self.protocol.closed

    # The layer's channels, opened

    def topology(self) -> TopologyChannel:
        channel = self.protocol.add_channel(lambda number: TopologyChannel(self.protocol, number))
        self.open(channel)
        return channel

    def consumer(
        self,
        on_delivery: Callable[[bytes, int, int, ConsumerChannel], None] = lambda *delivery: None,
        on_end: Callable[[Exception], None] = lambda exc: None,
    ) -> ConsumerChannel:
        channel = self.protocol.add_channel(
            lambda number: ConsumerChannel(
                self.protocol, number, on_delivery=on_delivery, on_end=on_end
            )
        )
        self.open(channel)
        return channel

    def publisher(self, on_end: Callable[[Exception], None] = lambda exc: None) -> PublisherChannel:
        channel = self.protocol.add_channel(
            lambda number: PublisherChannel(self.protocol, number, on_end=on_end)
        )
        self.open(channel, commands.Confirm.SelectOk())
        return channel

    def open(self, channel: Any, *answers: Any) -> None:
        """The broker opens a channel, and answers what is written at once."""
        self.feed(commands.Channel.OpenOk(), *answers, channel=channel._amqp_channel_id)
        self.taken()


# On a socket


@contextlib.asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[CarehareConnection]:
    """An open connection as users get it, closed at the end if the test hasn't done so."""
    connection = Connection(BrokerUrl.parse(url), **options)
    await asyncio.wait_for(connection.connect(), 10)
    try:
        yield CarehareConnection(connection)
    finally:
        await connection.close()


def inside(connection: CarehareConnection) -> Connection:
    """What a user's connection is made of."""
    return connection._connection


class Client:
    """One client of a ``ScriptedBroker``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def say(self, *frames: Any, channel: int = 0) -> None:
        self._writer.write(marshal(*frames, channel=channel))

    async def hear(self, kind: type = object) -> Any:
        """Return the next frame of this kind, leaving out others."""
        while True:
            head = await self._reader.readexactly(7)
            if head.startswith(b"AMQP"):
                rest = await self._reader.readexactly(1)
            else:
                rest = await self._reader.readexactly(int.from_bytes(head[3:7], "big") + 1)
            frame = pamqp.frame.unmarshal(head + rest)[2]
            if isinstance(frame, kind):
                return frame

    async def greet(self, **limits: int) -> None:
        """Do the handshake."""
        self.say(START)
        await self.hear(commands.Connection.StartOk)
        self.say(tune(**limits))
        await self.hear(commands.Connection.Open)
        self.say(commands.Connection.OpenOk())

    async def hear_end(self) -> None:
        """Wait until the client has closed its socket, without a word."""
        while await self._reader.read(65536):
            pass

    async def answer(self, **answers: Any) -> None:
        """Answer what a layer's connection asks for, until it says goodbye."""
        while True:
            head = await self._reader.readexactly(7)
            size = int.from_bytes(head[3:7], "big")
            frame = pamqp.frame.unmarshal(head + await self._reader.readexactly(size + 1))[2]
            reply = answers.get(frame.name, _ANSWERS.get(frame.name))
            if reply is not None:
                self.say(reply, channel=int.from_bytes(head[1:3], "big"))
            if frame.name == "Connection.Close":
                return


_ANSWERS = {
    "Connection.Close": commands.Connection.CloseOk(),
    "Channel.Open": commands.Channel.OpenOk(),
    "Channel.Close": commands.Channel.CloseOk(),
    "Confirm.Select": commands.Confirm.SelectOk(),
    "Exchange.Declare": commands.Exchange.DeclareOk(),
    "Queue.Bind": commands.Queue.BindOk(),
}


class ScriptedBroker(Server):
    """A server that does with each client what the test's script says, then closes."""

    def __init__(self, script: Callable[[Client], Awaitable[None]]) -> None:
        super().__init__()
        self._script = script

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.note_accepted()
        await self._script(Client(reader, writer))


def scripted_broker(
    script: Callable[[Client], Awaitable[None]], *, host: str = "127.0.0.1"
) -> contextlib.AbstractAsyncContextManager[ScriptedBroker]:
    return listening(ScriptedBroker(script), host=host)
