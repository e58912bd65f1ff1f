"""What is done to the broker and the network, each fault with its end.

A fault is a coroutine that does the harm, lets it last for a while and takes it back. What it takes
afterwards until everything works again is not its business.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from benchmarks.proxy import Proxy
from tools.private_broker import PrivateBroker

Fault = Callable[["Stage"], Awaitable[None]]


class Stage:
    """Where faults happen: one broker, and a proxy in front of it for some of the participants."""

    def __init__(
        self, broker: PrivateBroker, proxies: Sequence[Proxy], chance: random.Random
    ) -> None:
        self.broker = broker
        self.proxies = proxies
        self.chance = chance

    def one_proxy(self) -> Proxy:
        return self.chance.choice(self.proxies)

    async def last(self, shortest: float, longest: float) -> None:
        """Let some seconds pass."""
        await asyncio.sleep(self.chance.uniform(shortest, longest))


async def _kill(stage: Stage) -> None:
    await asyncio.to_thread(stage.broker.kill)
    await stage.last(0.0, 4.0)
    await asyncio.to_thread(stage.broker.start)


async def _stop_application(stage: Stage) -> None:
    await asyncio.to_thread(stage.broker.ctl, "stop_app")
    await stage.last(0.0, 4.0)
    await asyncio.to_thread(stage.broker.ctl, "start_app")


async def _close_connections(stage: Stage) -> None:
    await asyncio.to_thread(stage.broker.close_all_connections, "soak")


async def _cut(stage: Stage) -> None:
    stage.one_proxy().disconnect(orderly=False)


async def _half_open(stage: Stage) -> None:
    # It is over when both sides have noticed by themselves: the connections never come back.
    stage.one_proxy().swallow()


async def _stall(stage: Stage) -> None:
    proxy = stage.one_proxy()
    proxy.stall()
    try:
        await stage.last(0.5, 3.0)
    finally:
        proxy.resume()


async def _freeze(stage: Stage) -> None:
    await asyncio.to_thread(stage.broker.freeze)
    try:
        await stage.last(0.5, 12.0)
    finally:
        stage.broker.thaw()


async def _alarm(stage: Stage) -> None:
    await asyncio.to_thread(stage.broker.raise_memory_alarm)
    try:
        await stage.last(1.0, 5.0)
    finally:
        await asyncio.to_thread(stage.broker.end_memory_alarm)


FAULTS: dict[str, Fault] = {
    "broker killed and started": _kill,
    "application stopped and started": _stop_application,
    "all connections closed": _close_connections,
    "one process cut off": _cut,
    "one process half-open": _half_open,
    "one process stalled": _stall,
    "broker frozen": _freeze,
    "memory alarm": _alarm,
}
