"""Event loops that are only closed: nobody cancels the tasks on them, nor runs them once more."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any

from channels.layers import get_channel_layer
from django.conf import settings
from endings import start_to_wait, use
from named import call_by_name, tell

from channels_rabbitmq.core import RabbitmqChannelLayer

layer: Any = get_channel_layer()

NewLoop = Callable[[], asyncio.AbstractEventLoop]


def run(
    main: Coroutine[Any, Any, Any], new_loop: NewLoop = asyncio.new_event_loop
) -> asyncio.AbstractEventLoop:
    loop = new_loop()
    loop.run_until_complete(main)
    loop.close()
    return loop


def one_call_each(times: str) -> None:
    """As a Celery task does it that knows no ``async_to_sync``."""
    for number in range(int(times)):
        run(layer.group_send("numbers", {"type": "n", "n": number}))
    gc.collect()


def one_call_each_on_uvloop(times: str) -> None:
    import uvloop

    for number in range(int(times)):
        run(layer.group_send("numbers", {"type": "n", "n": number}), uvloop.new_event_loop)
    gc.collect()


async def use_and_leave_calls() -> None:
    """Everything is connected, and calls of all kinds wait."""
    channel = await use()
    waiting = [
        await start_to_wait(channel),
        asyncio.create_task(layer.group_add("another", channel)),
        asyncio.create_task(layer.group_send("room", {"type": "late"})),
        asyncio.create_task(layer.send(channel, {"type": "late"})),
        asyncio.create_task(layer.send("crq.aaaaaaaaaaaaaaaa!gone", {"type": "late"})),
    ]
    await asyncio.wait(waiting, timeout=0)


def with_calls_that_wait(times: str) -> None:
    for _ in range(int(times)):
        run(use_and_leave_calls())
        gc.collect()


def amid_connecting(turns: str) -> None:
    """After none, one, two ... turns of the loop: whatever it is doing then."""

    async def start(turns: int) -> None:
        channel = await layer.new_channel()
        calls = [layer.send(channel, {}), layer.group_send("room", {}), layer.connect()]
        calls += [layer.group_add("room", channel), layer.receive(channel)]
        tasks = [asyncio.create_task(call) for call in calls]

        async def connect() -> None:
            await layer.carehare_connection

        tasks.append(asyncio.create_task(connect()))
        for _ in range(turns):
            await asyncio.sleep(0.0005)

    for number in range(int(turns)):
        run(start(number))
        gc.collect()


def beside_a_running_loop() -> None:
    """A coroutine of one loop closes another one."""

    async def main() -> None:
        other = asyncio.new_event_loop()
        thread = threading.Thread(target=lambda: other.run_until_complete(use()))
        thread.start()
        await asyncio.to_thread(thread.join)
        await use()
        other.close()
        await use()
        await layer.close()

    asyncio.run(main())
    gc.collect()


def two_layers() -> None:
    """Both end, and the loop's ``close`` is its own again."""
    layers = [get_channel_layer(alias) for alias in ("default", "second")]
    loop = asyncio.new_event_loop()
    for each in [*layers, *layers]:
        loop.run_until_complete(each.connect())
    loop.close()
    assert "close" not in vars(loop)
    gc.collect()


def after_the_layer() -> None:
    """Nobody has the layer any more, and the loop hasn't run since."""
    mine = RabbitmqChannelLayer(**settings.CHANNEL_LAYERS["default"]["CONFIG"])
    loop = asyncio.new_event_loop()
    loop.run_until_complete(mine.connect())
    del mine
    gc.collect()
    loop.close()
    gc.collect()


def after_the_layers_own_close() -> None:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(use())
    loop.run_until_complete(layer.close())
    loop.close()
    gc.collect()


def in_vain() -> None:
    """A loop that runs can't be closed; nothing happens to what the layer has there."""

    async def main() -> None:
        channel = await use()
        try:
            asyncio.get_running_loop().close()
        except RuntimeError:
            await layer.send(channel, {"type": "n"})
            tell(await layer.receive(channel))

    run(main())
    gc.collect()


def in_a_child(_: str = "") -> None:
    """The child of a fork closes the parent's loop; the parent goes on with it."""
    loop = asyncio.new_event_loop()
    channel = loop.run_until_complete(use())
    pid = os.fork()
    if pid == 0:
        loop.close()
        os._exit(0)
    os.waitpid(pid, 0)
    loop.run_until_complete(layer.send(channel, {"type": "n"}))
    tell(loop.run_until_complete(layer.receive(channel)))
    loop.close()
    gc.collect()


def by_a_close_looked_up_before(times: str) -> None:
    """``unittest``'s ``addCleanup(loop.close)``, for instance, at the beginning of a test."""
    for _ in range(int(times)):
        loop = asyncio.new_event_loop()
        close = loop.close
        loop.run_until_complete(use())
        close()
        del loop, close
        gc.collect()


def without_a_broker(turns: str) -> None:
    """Nobody answers, or nobody is there: see the test."""

    async def start() -> None:
        tasks = [asyncio.create_task(layer.group_send("room", {})) for _ in range(3)]
        tasks.append(asyncio.create_task(layer.connect()))
        await asyncio.wait(tasks, timeout=0.2)

    for _ in range(int(turns)):
        run(start())
    gc.collect()


if __name__ == "__main__":
    call_by_name(globals())
