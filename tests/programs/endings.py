"""Programs that use the layer and end, in one way or another, without a word about the layer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
from typing import Any

from asgiref.sync import async_to_sync
from channels.exceptions import StopConsumer
from channels.layers import get_channel_layer
from named import call_by_name, tell

layer: Any = get_channel_layer()


async def use() -> str:
    """Everything is connected afterwards; returns a channel."""
    channel: str = await layer.new_channel()
    await layer.group_add("room", channel)
    await layer.group_send("room", {"type": "hello"})
    assert await layer.receive(channel) == {"type": "hello"}
    await layer.carehare_connection
    return channel


async def start_to_wait(channel: str) -> asyncio.Task[Any]:
    waiting = asyncio.create_task(layer.receive(channel))
    await asyncio.sleep(0)  # lets it begin
    return waiting


async def use_and_wait(seconds: float) -> None:
    waiting = await start_to_wait(await use())
    print("ready", flush=True)
    await asyncio.wait([waiting], timeout=seconds)


def asyncio_run() -> None:
    """With a call that waits when the loop ends: ``asyncio.run`` cancels it."""
    asyncio.run(use_and_wait(0))


def asyncio_run_and_close() -> None:
    async def main() -> None:
        await use()
        await layer.close()

    asyncio.run(main())


def interrupted() -> None:
    """By Ctrl-C, while a call waits."""
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(use_and_wait(30))


def sync_code() -> None:
    async_to_sync(use)()


def sync_code_and_close() -> None:
    async_to_sync(use)()
    async_to_sync(layer.close)()


def sync_code_interrupted() -> None:
    """By Ctrl-C, while a call waits on the background loop."""
    with contextlib.suppress(KeyboardInterrupt):
        async_to_sync(use_and_wait)(30)


def both_when_told() -> None:
    """The test does something to the broker before it lets this end."""

    async def main() -> None:
        await use()
        print("ready", flush=True)
        input()  # noqa: ASYNC250 - as a loop is that has much to do

    async_to_sync(use)()
    asyncio.run(main())


def both() -> None:
    """Connections of several loops, one of which is over."""
    asyncio.run(use())
    async_to_sync(use)()


def error() -> None:
    """An exception that nobody catches."""
    async_to_sync(use)()
    sys.exit("an error of its own")


def loop_left_open() -> None:
    """As daphne does it: the loop stops, and nobody closes it."""
    global loop  # so that it lives until the end, as twisted's does
    loop = asyncio.new_event_loop()
    loop.run_until_complete(use_and_wait(0))


def daemon_thread_with_a_loop() -> None:
    """As Django's ``runserver`` does it: the loop runs until the process ends around it."""
    started = threading.Event()

    async def main() -> None:
        channel = await use()
        started.set()
        await layer.receive(channel)

    threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
    started.wait()


def daemon_thread_with_sync_code() -> None:
    """A call waits on the background loop when the process ends."""
    started = threading.Event()

    async def wait(channel: str) -> None:
        waiting = await start_to_wait(channel)
        started.set()
        await waiting

    def work() -> None:
        channel = async_to_sync(use)()
        with contextlib.suppress(StopConsumer):
            async_to_sync(wait)(channel)

    threading.Thread(target=work, daemon=True).start()
    started.wait()


def daemon_thread_that_goes_on() -> None:
    """One call after the other, until one is refused: by the layer, or by Python."""
    from channels_rabbitmq.exceptions import BrokerUnavailable

    started = threading.Event()

    def work() -> None:
        channel = async_to_sync(use)()
        with contextlib.suppress(BrokerUnavailable, StopConsumer, RuntimeError):
            while True:
                async_to_sync(layer.send)(channel, {"type": "one.more"})
                async_to_sync(layer.receive)(channel)
                started.set()

    threading.Thread(target=work, daemon=True).start()
    started.wait()


def no_broker() -> None:
    """Ends while the layer tries to connect."""
    from channels_rabbitmq.exceptions import BrokerUnavailable

    logging.getLogger("channels_rabbitmq").addHandler(logging.NullHandler())
    try:
        async_to_sync(layer.group_send)("room", {"type": "hello"})
    except BrokerUnavailable as err:
        tell(str(err))


if __name__ == "__main__":
    call_by_name(globals())
