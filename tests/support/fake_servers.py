"""Servers that accept a connection and then aren't the broker a client hopes for."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

from tests.support.changes import Changes
from tools.private_broker import free_port


class FakeServer:
    """Reads the eight bytes with which an AMQP client begins, says ``answer``, may then close."""

    def __init__(self, answer: bytes, close: bool) -> None:
        self.port = free_port()
        self.accepted = 0  # connections ever
        self.open = 0  # connections that neither side has closed
        self._answer = answer
        self._close = close
        self._changes = Changes()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}"

    async def accepted_one(self) -> None:
        """Returns once a client has connected and begun."""
        await self._changes.until(lambda: self.accepted > 0)

    async def all_gone(self) -> None:
        """Returns once every client has closed its connection."""
        await self._changes.until(lambda: self.open == 0)

    def on_connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            with contextlib.suppress(EOFError, OSError):
                await reader.readexactly(8)
                self.accepted += 1
                self._changes.notify()
                writer.write(self._answer)
                while not self._close and await reader.read(65536):
                    pass
        finally:
            writer.close()
            self.open -= 1
            self._changes.notify()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def fake_server(*, answer: bytes = b"", close: bool = False) -> AsyncIterator[FakeServer]:
    fake = FakeServer(answer, close)
    listener = await asyncio.start_server(fake.on_connect, "127.0.0.1", fake.port)
    try:
        yield fake
    finally:
        listener.close()
        await fake.end()


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
