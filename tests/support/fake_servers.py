"""Servers that accept a connection and then aren't the broker a client hopes for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import TypeVar

from tests.support.changes import Changes
from tools.private_broker import free_port


class Server:
    """A server for clients of which each has its own ``talk``; then it closes the connection."""

    def __init__(self) -> None:
        self.port = free_port()
        self.accepted = 0  # connections ever
        self.open = 0  # connections that neither side has closed
        self._changes = Changes()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}"

    async def until_accepted(self, count: int = 1) -> None:
        await self._changes.until(lambda: self.accepted >= count)

    async def until_gone(self) -> None:
        """Wait until a client has come, and none is left."""
        await self._changes.until(lambda: self.accepted > 0 and self.open == 0)

    def note_accepted(self) -> None:
        """To be called by ``talk``, once."""
        self.accepted += 1
        self._changes.notify()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError

    def on_connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            with contextlib.suppress(EOFError, OSError):
                await self.talk(reader, writer)
        finally:
            writer.close()
            self.open -= 1
            self._changes.notify()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


_AnyServer = TypeVar("_AnyServer", bound=Server)


@contextlib.asynccontextmanager
async def listening(server: _AnyServer, *, host: str = "127.0.0.1") -> AsyncIterator[_AnyServer]:
    listener = await asyncio.start_server(server.on_connect, host, server.port)
    try:
        yield server
    finally:
        listener.close()
        await server.end()


class FakeServer(Server):
    """Reads the eight bytes with which an AMQP client begins, says ``answer``, may then close."""

    def __init__(self, answer: bytes, close: bool) -> None:
        super().__init__()
        self._answer = answer
        self._close = close

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)
        self.note_accepted()
        writer.write(self._answer)
        while not self._close and await reader.read(65536):
            pass

    async def until_gone(self) -> None:
        """Wait until no client is left. It may have gone before it said anything."""
        await self._changes.until(lambda: self.open == 0)


def fake_server(
    *, answer: bytes = b"", close: bool = False
) -> contextlib.AbstractAsyncContextManager[FakeServer]:
    return listening(FakeServer(answer, close))


def silent_server() -> contextlib.AbstractAsyncContextManager[FakeServer]:
    """Accepts and never says a word."""
    return fake_server()


def closing_server() -> contextlib.AbstractAsyncContextManager[FakeServer]:
    """Closes (FIN) as soon as the client has begun the handshake."""
    return fake_server(close=True)


@contextlib.contextmanager
def swallowing_address(address: str, port: int) -> Iterator[None]:
    """Nobody answers there, as behind a firewall that drops packets: the backlog is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((address, port))
        listener.listen(0)
        for _ in range(3):  # Linux takes one more than it was told, perhaps two
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((address, port))
        yield
