"""Workers on a normal channel."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from typing import Any

from asgiref.sync import async_to_sync
from channels.exceptions import StopConsumer
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


async def _start_to_wait(channel: str) -> asyncio.Task[Any]:
    waiting = asyncio.create_task(layer.receive(channel))
    await layer.send(channel + "-other", {"type": "x"})
    assert await layer.receive(channel + "-other") == {"type": "x"}
    return waiting


def _wait(channel: str) -> None:
    with contextlib.suppress(StopConsumer):
        async_to_sync(layer.receive)(channel)


def end_while_waiting(how: str, channel: str) -> None:
    """A call waits when its event loop ends, or the process."""
    if how == "run":

        async def main() -> None:
            await _start_to_wait(channel)

        asyncio.run(main())
    elif how == "closed":
        loop = asyncio.new_event_loop()
        waiting = loop.run_until_complete(_start_to_wait(channel))
        loop.close()
        assert waiting.cancelled()
    else:
        threading.Thread(target=_wait, args=(channel,), daemon=True).start()
        async_to_sync(layer.send)(channel + "-other", {"type": "x"})
        async_to_sync(layer.receive)(channel + "-other")
    print("over", flush=True)


def send_and_receive(channel: str) -> None:
    """As Channels' tutorial does, each call by itself."""
    async_to_sync(layer.send)(channel, {"type": "hello"})
    tell(async_to_sync(layer.receive)(channel))


if __name__ == "__main__":
    call_by_name(globals())
