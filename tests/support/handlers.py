"""A handler of connections that does what a test says, and what keeps it company."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._broker.supervisor import Supervisor
from tests.support.amqp_peer import (
    Client,
)
from tests.support.changes import Changes


async def nothing(connection: Connection) -> None:
    pass


async def hang(connection: Connection) -> None:
    await asyncio.get_running_loop().create_future()


class FakeHandler:
    """Does on set-up what the test says, time after time; notes what it is told."""

    name = "role"

    def __init__(self, *set_ups: Callable[[Connection], Awaitable[None]]) -> None:
        self._set_ups = iter(set_ups)
        self.set_up_count = 0
        self.events: list[str] = []  # "ready", or why it was lost
        self.changes = Changes()

    async def set_up(self, connection: Connection) -> None:
        self.set_up_count += 1
        self.changes.notify()
        await next(self._set_ups, nothing)(connection)

    def on_ready(self) -> None:
        self._note("ready")

    def on_lost(self, reason: str) -> None:
        self._note(reason)

    def _note(self, event: str) -> None:
        self.events.append(event)
        self.changes.notify()

    async def until_events(self, count: int) -> list[str]:
        await self.changes.until(lambda: len(self.events) >= count)
        return self.events[:count]

    async def until_ready(self, times: int = 1) -> None:
        await self.changes.until(lambda: self.events.count("ready") >= times)

    async def until_set_up(self, times: int = 1) -> None:
        await self.changes.until(lambda: self.set_up_count >= times)


async def end(supervisor: Supervisor) -> None:
    supervisor.close()
    await asyncio.wait_for(supervisor.wait_closed(), 5)


async def serve(client: Client) -> None:
    await client.greet()
    await client.answer()


def failing(exc: BaseException) -> Callable[[Connection], Awaitable[None]]:
    async def set_up(connection: Connection) -> None:
        raise exc

    return set_up
