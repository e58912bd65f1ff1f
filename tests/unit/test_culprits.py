"""A channel's consumer is found by its task, and no code of the project's runs for that."""

from __future__ import annotations

import asyncio

from channels_rabbitmq._inbox.culprits import Culprits
from channels_rabbitmq._inbox.members import Members


class Consumer:
    def __init__(self, channel: str) -> None:
        self.channel_name = channel

    async def __call__(self) -> None:
        await asyncio.Event().wait()


class Unwilling:
    @property
    def channel_name(self) -> str:
        raise RuntimeError("not now")

    async def __call__(self) -> None:
        await asyncio.Event().wait()


async def test_consumers_and_groups() -> None:
    members = Members()
    for group in ("a", "b", "c"):
        members.add(group, "crq.x!1")
    tasks = [asyncio.create_task(one()) for one in (Unwilling(), Consumer("crq.x!1"))]
    await asyncio.sleep(0)
    assert Culprits(members).describe(["crq.x!1", "crq.x!2"]) == {
        "crq.x!1": "Consumer, in a, b and 1 more",
        "crq.x!2": "",
    }
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
