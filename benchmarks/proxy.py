"""A TCP proxy in front of a server, to take the connections through it away.

Besides it does one thing to AMQP: every connection's heartbeat becomes ``HEARTBEAT`` seconds, or
the least that the client allows, so that the silence of a half-open connection is noticed soon
and after the same time by all layers (channels_rabbitmq 4.0.1 has no option for it).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from urllib.parse import urlsplit

HEARTBEAT = 4  # seconds

_CHUNK = 262144  # bytes
# Connection.Tune: a method frame with channel_max (2 bytes), frame_max (4) and heartbeat (2)
_TUNE = re.compile(rb"(\x01\0\0\0\0\0\x0c\0\x0a\0\x1e.{6}).{2}(\xce)", re.DOTALL)
# Connection.Close, 320 CONNECTION_FORCED, as an operator's command has the broker send it
_CLOSE_ARGUMENTS = b"\x01\x40\x11CONNECTION_FORCED\0\0\0\0"
_CLOSE = (
    b"\x01\0\0"
    + (4 + len(_CLOSE_ARGUMENTS)).to_bytes(4, "big")
    + b"\0\x0a\0\x32"
    + _CLOSE_ARGUMENTS
    + b"\xce"
)


class _Link:
    """One client's connection, and the one to the server that was made for it."""

    def __init__(self, to_client: asyncio.StreamWriter, to_server: asyncio.StreamWriter) -> None:
        self.to_client = to_client
        self.to_server = to_server
        self.is_swallowing = False
        self.flowing = asyncio.Event()
        self.flowing.set()

    def close(self) -> None:
        self.to_client.close()
        self.to_server.close()

    async def pump_to_server(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._pass_on(data, self.to_server)

    async def pump_to_client(self, reader: asyncio.StreamReader) -> None:
        is_tuned = False
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK):
                if not is_tuned:
                    data, is_tuned = _set_heartbeat(data)
                await self._pass_on(data, self.to_client)

    async def _pass_on(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        await self.flowing.wait()
        if not self.is_swallowing:
            writer.write(data)
            await writer.drain()


def _set_heartbeat(data: bytes) -> tuple[bytes, bool]:
    """The data with another heartbeat in its tune, and whether it holds one."""
    heartbeat = HEARTBEAT.to_bytes(2, "big")
    changed, times = _TUNE.subn(rb"\g<1>" + heartbeat + rb"\g<2>", data, count=1)
    return changed, bool(times)


class Proxy:
    """``async with Proxy(host, port) as proxy``; clients connect to ``proxy.port``."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepted_at: list[float] = []  # of CLOCK_MONOTONIC
        self.port = 0

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def url(self, url: str) -> str:
        """The same URL, through this proxy."""
        parts = urlsplit(url)
        credentials = parts.netloc.rpartition("@")[0]
        netloc = f"{credentials}@" * bool(credentials) + f"127.0.0.1:{self.port}"
        return parts._replace(netloc=netloc).geturl()

    def first_accepted_after(self, moment: float) -> float | None:
        return next((at for at in self._accepted_at if at > moment), None)

    def disconnect(self, *, say_goodbye: bool) -> float:
        """Ends all connections on both sides; with AMQP's farewell to the client, or without."""
        for link in self._links:
            link.is_swallowing = True
            if say_goodbye:
                link.to_client.write(_CLOSE)
            link.close()
        return time.monotonic()

    def swallow(self) -> float:
        """Lets nothing through any more on the connections there are; they stay open."""
        for link in self._links:
            link.is_swallowing = True
        return time.monotonic()

    def stall(self) -> None:
        """Holds what comes on the connections there are until ``resume``."""
        for link in self._links:
            link.flowing.clear()

    def resume(self) -> None:
        for link in self._links:
            link.flowing.set()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of our own: asyncio complains about the end of one that it made itself.
        self._accepted_at.append(time.monotonic())
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._address)
        except OSError:
            writer.close()  # no server: the client sees its connection close
            return
        except asyncio.CancelledError:
            writer.close()
            raise
        link = _Link(writer, server_writer)
        self._links.add(link)
        pumps = [
            asyncio.create_task(link.pump_to_server(reader)),
            asyncio.create_task(link.pump_to_client(server_reader)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if link.is_swallowing:
                # Half-open: each side has to find out by itself, the server too.
                await asyncio.wait(pumps)
        finally:
            for pump in pumps:
                pump.cancel()
            link.close()
            self._links.discard(link)
            await asyncio.gather(*pumps, return_exceptions=True)
