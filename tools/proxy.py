"""A TCP proxy between clients and a server, to do harm to the connections through it.

    async with Proxy("127.0.0.1", 5672) as proxy:
        client = await connect(proxy.url_of("amqp://guest:guest@127.0.0.1"))
        proxy.cut()

Each connection of a client is a *link*: two TCP connections and a pump for each direction. What
goes through is bytes here. A subclass of ``Link`` that understands more has its own ``pump``.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from enum import Enum
from urllib.parse import urlsplit

from tools.private_broker import free_port

_CHUNK = 262144  # bytes


class Direction(Enum):
    TO_CLIENT = "to the client"
    TO_SERVER = "to the server"


Flow = dict[Direction, asyncio.Event]


def open_flow() -> Flow:
    """An event for each direction, set while that direction isn't stalled."""
    flow = {direction: asyncio.Event() for direction in Direction}
    for event in flow.values():
        event.set()
    return flow


class Link:
    """One client's connection, and the connection to the server that belongs to it."""

    def __init__(self, writer: asyncio.StreamWriter, flow: Flow | None = None) -> None:
        self.has_vanished = False
        self.writers = {Direction.TO_CLIENT: writer}
        self.flow = flow or open_flow()

    def cut(self, *, reset: bool) -> None:
        """End it on both sides, by RST or by FIN."""
        for writer in self.writers.values():
            if reset:
                # Lingering for at most 0 seconds: close() sends RST.
                linger = struct.pack("ii", 1, 0)
                tcp: socket.socket = writer.get_extra_info("socket")
                with contextlib.suppress(OSError):  # closed already
                    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            else:
                writer.close()

    async def pump(self, reader: asyncio.StreamReader, direction: Direction) -> None:
        """Forward what comes, until either side of this direction ends."""
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self.forward(data, direction)

    async def forward(self, data: bytes, direction: Direction) -> None:
        """Write this, unless the link has vanished; wait first while the direction is stalled."""
        await self.flow[direction].wait()
        if not self.has_vanished:
            self.writers[direction].write(data)
            await self.writers[direction].drain()


class Proxy:
    """One listening port in front of a server."""

    def __init__(self, host: str, port: int) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self.links: list[Link] = []  # those that are open
        self.opened = 0  # links ever opened
        self._address = (host, port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # one for each link
        self._errors: list[BaseException] = []  # of links

    async def __aenter__(self) -> Proxy:
        await self.accept()
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        self.refuse()
        for task in self._tasks:
            task.cancel()  # one may wait for the server, or in a pump
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._errors and exc_type is None:
            raise self._errors[0]

    def make_link(self, writer: asyncio.StreamWriter) -> Link:
        return Link(writer)

    def on_change(self) -> None:
        """A link has come or gone."""

    def url_of(self, url: str) -> str:
        """The same URL, through this proxy."""
        parts = urlsplit(url)
        credentials = parts.netloc.rpartition("@")[0]
        netloc = f"{credentials}@" * bool(credentials) + f"{self.host}:{self.port}"
        return parts._replace(netloc=netloc).geturl()

    def cut(self, *, reset: bool = True) -> None:
        """End all connections on both sides, by RST or (``reset=False``) by FIN."""
        for link in self.links:
            link.cut(reset=reset)

    def stall(self, *directions: Direction) -> None:
        """Forward nothing on the links there are, in these directions or in both."""
        for link in self.links:
            for direction in directions or Direction:
                link.flow[direction].clear()

    def resume(self) -> None:
        """Go on with what came meanwhile."""
        for link in self.links:
            for event in link.flow.values():
                event.set()

    def refuse(self) -> None:
        """New connections are refused; those that are open go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def accept(self) -> None:
        """The opposite of ``refuse()``."""
        if self._server is None:
            self._server = await asyncio.start_server(self._on_connect, self.host, self.port)

    def _on_connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio complains about the end of one that it made itself.
        task = asyncio.create_task(self._run(self.make_link(writer), reader))
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._errors.append(error)

    async def _run(self, link: Link, reader: asyncio.StreamReader) -> None:
        """Serve one link until one of its sides ends, then end the other."""
        self.links.append(link)
        self.opened += 1
        self.on_change()
        pumps: list[asyncio.Task[None]] = []
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._address)
            link.writers[Direction.TO_SERVER] = server_writer
            pumps.append(asyncio.create_task(link.pump(reader, Direction.TO_SERVER)))
            pumps.append(asyncio.create_task(link.pump(server_reader, Direction.TO_CLIENT)))
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if link.has_vanished:
                # Half-open: each side has to find out by itself.
                await asyncio.wait(pumps)
        except OSError:
            pass  # no server: the client sees its connection close
        finally:
            for pump in pumps:
                pump.cancel()
            ends = await asyncio.gather(*pumps, return_exceptions=True)
            for writer in link.writers.values():
                writer.close()
            self.links.remove(link)
            self.on_change()
        for end in ends:
            if isinstance(end, Exception):
                raise end
