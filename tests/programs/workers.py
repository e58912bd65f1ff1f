"""Workers on a normal channel."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from named import call_by_name, tell

layer: Any = get_channel_layer()


def _handle(message: dict[str, Any]) -> None:
    """At once, as the first line of a handler would."""
    print(f"working on {message['n']}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def die_of_a_job(channel: str) -> None:
    async def work() -> None:
        _handle(await layer.receive(channel))

    asyncio.run(work())


def die_of_a_job_on_uvloop(channel: str) -> None:
    import uvloop

    async def work() -> None:
        _handle(await layer.receive(channel))

    uvloop.run(work())


def die_of_a_job_in_sync_code(channel: str) -> None:
    _handle(async_to_sync(layer.receive)(channel))


def send_and_receive(channel: str) -> None:
    """As Channels' tutorial does, each call by itself."""
    async_to_sync(layer.send)(channel, {"type": "hello"})
    tell(async_to_sync(layer.receive)(channel))


if __name__ == "__main__":
    call_by_name(globals())
