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

from tools import proxy
from tools.proxy import Direction

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


class _Link(proxy.Link):
    """One whose heartbeat is changed on the way to the client."""

    async def pump(self, reader: asyncio.StreamReader, direction: Direction) -> None:
        if direction is Direction.TO_CLIENT:
            await self._pump_until_tuned(reader)
        await super().pump(reader, direction)

    async def _pump_until_tuned(self, reader: asyncio.StreamReader) -> None:
        is_tuned = False
        with contextlib.suppress(OSError):
            while not is_tuned and (data := await reader.read(_CHUNK)):
                data, is_tuned = set_heartbeat(data)
                await self.forward(data, Direction.TO_CLIENT)


def set_heartbeat(data: bytes) -> tuple[bytes, bool]:
    """The data with another heartbeat in its tune, and whether it holds one."""
    heartbeat = HEARTBEAT.to_bytes(2, "big")
    changed, times = _TUNE.subn(rb"\g<1>" + heartbeat + rb"\g<2>", data, count=1)
    return changed, bool(times)


class Proxy(proxy.Proxy):
    """``async with Proxy(host, port) as proxy``; clients connect to ``proxy.port``."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self._accepted_at: list[float] = []  # of CLOCK_MONOTONIC

    async def __aenter__(self) -> Proxy:
        await super().__aenter__()
        return self

    def make_link(self, writer: asyncio.StreamWriter) -> _Link:
        self._accepted_at.append(time.monotonic())
        return _Link(writer)

    def first_accepted_after(self, moment: float) -> float | None:
        return next((at for at in self._accepted_at if at > moment), None)

    def disconnect(self, *, orderly: bool) -> float:
        """Ends all connections on both sides; ``orderly``: after AMQP's Close to the client."""
        for link in self.links:
            link.has_vanished = True
            if orderly:
                link.writers[Direction.TO_CLIENT].write(_CLOSE)
            link.cut(reset=False)
        return time.monotonic()

    def swallow(self) -> float:
        """Lets nothing through any more on the connections there are; they stay open."""
        for link in self.links:
            link.has_vanished = True
        return time.monotonic()
