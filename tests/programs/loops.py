"""Several event loops in one process: one after the other, side by side, using each other's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from named import call_by_name, tell

layer: Any = get_channel_layer()


async def use_all_of_it() -> str:
    """A channel, a group, messages in order; returns the channel."""
    channel: str = await layer.new_channel()
    await layer.group_add("room", channel)
    for number in range(5):
        await layer.send(channel, {"type": "n", "n": number})
        await layer.group_send("room", {"type": "n", "n": number + 100})
    heard = [(await layer.receive(channel))["n"] for _ in range(10)]
    assert heard == [0, 100, 1, 101, 2, 102, 3, 103, 4, 104], heard
    return channel


def one_after_the_other(times: str) -> None:
    """``asyncio.run`` several times, without ``close()``."""
    tell([asyncio.run(use_all_of_it()) for _ in range(int(times))])


def one_after_the_other_on_uvloop(times: str) -> None:
    import uvloop

    tell([uvloop.run(use_all_of_it()) for _ in range(int(times))])


def side_by_side() -> None:
    """Two threads, each with a loop, channels and groups, send to each other at the same time."""
    together = threading.Barrier(2)
    channels: dict[str, str] = {}

    async def main(me: str, other: str) -> dict[str, list[Any]]:
        channel = channels[me] = await layer.new_channel()
        await layer.group_add("both", channel)
        together.wait()  # holds the loop up for a moment, which does no harm

        async def talk() -> None:
            for number in range(50):
                await layer.send(channels[other], {"type": "direct", "n": number})
                await layer.group_send("both", {"type": me, "n": number})

        heard: dict[str, list[Any]] = {"direct": [], me: [], other: []}
        talking = asyncio.create_task(talk())
        for _ in range(150):
            message = await layer.receive(channel)
            heard[message["type"]].append(message["n"])
        await talking
        await asyncio.to_thread(together.wait)  # neither ends before the other has heard it all
        return heard

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(lambda: asyncio.run(main("one", "two")))
        two = pool.submit(lambda: asyncio.run(main("two", "one")))
        tell([one.result(), two.result()])


# A channel that another loop of this process has made


async def use(channel: str) -> list[str]:
    """All that can be done with a channel; returns what it heard."""
    heard = []
    await layer.group_add("room", channel)
    await layer.group_add("room", channel)  # is no error
    await layer.group_send("room", {"type": "to.room"})
    heard.append((await layer.receive(channel))["type"])
    waiting = asyncio.create_task(layer.receive(channel))
    await asyncio.sleep(0.01)  # it waits by then, or not: all the same
    await layer.send(channel, {"type": "to.channel"})
    heard.append((await waiting)["type"])
    await layer.group_discard("room", channel)
    await layer.group_discard("room", channel)  # is no error
    await layer.group_send("room", {"type": "to.nobody"})
    await layer.send(channel, {"type": "end"})
    heard.append((await layer.receive(channel))["type"])
    return heard


def with_background_channel() -> None:
    """Made by sync code; used on a loop."""
    channel = async_to_sync(layer.new_channel)()
    heard = asyncio.run(use(channel))
    # And sync code goes on with it.
    tell([heard, async_to_sync(use)(channel)])


def _with_running_loop(use_elsewhere: Callable[[str], list[str]]) -> None:
    async def main() -> list[list[str]]:
        channel = await layer.new_channel()
        heard = await asyncio.to_thread(use_elsewhere, channel)
        return [heard, await use(channel)]

    tell(asyncio.run(main()))


def from_sync_code() -> None:
    """Made on a running loop; used by sync code in a thread."""
    _with_running_loop(lambda channel: async_to_sync(use)(channel))


def from_another_loop() -> None:
    """Made on a running loop; used on another one, in a thread."""
    _with_running_loop(lambda channel: asyncio.run(use(channel)))


# A channel of another process


async def use_foreign(channel: str, group: str) -> list[Any]:
    """Receive from it, in vain; add it to a group, and ask who is in that."""
    error = ""
    try:
        await layer.receive(channel)
    except ValueError as err:
        error = str(err)
    await layer.group_add(group, channel, {"by": group})
    result = await layer.group_members(group, 10.0)
    await layer.group_send(group, {"type": group})
    await layer.group_add("left", channel)
    await layer.group_discard("left", channel)
    count = await layer.group_count("left", 10.0)
    return [error, result.is_complete, result.members, count]


def with_foreign_channel(channel: str) -> None:
    on_own_loop = asyncio.run(use_foreign(channel, "own-loop"))
    tell([on_own_loop, async_to_sync(use_foreign)(channel, "sync-code")])


if __name__ == "__main__":
    call_by_name(globals())
