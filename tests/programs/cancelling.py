"""Calls of ``receive()`` for a channel of another loop, cancelled at random, lose nothing."""

from __future__ import annotations

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from named import call_by_name, tell

layer: Any = get_channel_layer()


async def send_all(channel: str, messages: int, permits: asyncio.Semaphore) -> None:
    for number in range(messages):
        await permits.acquire()
        await layer.send(channel, {"type": "n", "n": number})


async def receive_and_cancel(channel: str, calls: int) -> dict[str, Any]:
    """Send and receive; returns the numbers in the order in which they came, and what was tried."""
    chance = random.Random(4)
    messages = calls // 2
    # Never too many under way: this is not about capacities.
    permits = asyncio.Semaphore(10)
    sending = asyncio.create_task(send_all(channel, messages, permits))
    heard: list[int] = []
    # How long a call takes here and now, if a message waits for it.
    begun_at = time.perf_counter()
    for _ in range(20):
        heard.append((await asyncio.wait_for(layer.receive(channel), 10))["n"])
        permits.release()
    usual = (time.perf_counter() - begun_at) / 20
    cancelled = 0
    for _ in range(calls):
        call = asyncio.create_task(layer.receive(channel))
        # Before it starts; at any moment from then until a message arrives; long after that.
        patience = time.perf_counter() + usual * chance.choice((0, 5, *(2 * chance.random(),) * 4))
        while time.perf_counter() < patience and not call.done():  # noqa: ASYNC110 - here it is about time
            await asyncio.sleep(0)  # other tasks run
        call.cancel()
        try:
            heard.append((await call)["n"])
            permits.release()
        except asyncio.CancelledError:
            cancelled += 1
    while len(heard) < messages:
        heard.append((await asyncio.wait_for(layer.receive(channel), 10))["n"])
        permits.release()
    await sending
    return {"heard": heard, "cancelled": cancelled}


def on_an_async_to_sync_loop(calls: str) -> None:
    """The channel is the background loop's, the calls come from the loop of one call."""
    channel = async_to_sync(layer.new_channel)()
    tell(async_to_sync(receive_and_cancel)(channel, int(calls)))


def across_threads(calls: str) -> None:
    """Two threads' loops: one has made the channel, the other receives from it."""

    async def owner() -> dict[str, Any]:
        channel = await layer.new_channel()
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(lambda: asyncio.run(receive_and_cancel(channel, int(calls))))
            return await asyncio.wrap_future(other)

    tell(asyncio.run(owner()))


if __name__ == "__main__":
    call_by_name(globals())
