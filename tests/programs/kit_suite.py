"""A project's tests with the plugin for pytest, in any number of processes at the same time."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import django
import pytest
from asgiref.sync import async_to_sync

django.setup()

from channels.layers import get_channel_layer  # noqa: E402 (Django has to be set up)
from mysite.suite import talk, use  # noqa: E402 (as above)

from channels_rabbitmq.testing import exchange_of  # noqa: E402 (as above)

layer: Any = get_channel_layer()  # made when the tests are collected
channels: list[str] = []


@pytest.mark.parametrize("number", range(3))
async def test_nobody_else_is_heard(number: int) -> None:
    """All suites use the same group and the same normal channel."""
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    for n in range(20):
        await layer.group_send("room", {"type": "n", "n": n, "pid": os.getpid()})
        await layer.send("jobs", {"type": "n", "n": n, "pid": os.getpid()})
        for name in (channel, "jobs"):
            message = await asyncio.wait_for(layer.receive(name), 10)
            assert message == {"type": "n", "n": n, "pid": os.getpid()}
    assert await layer.group_count("room") == 1
    await layer.send("jobs", {"type": "left"})


@pytest.mark.parametrize("number", range(3))
def test_nothing_of_the_test_before(number: int) -> None:
    assert async_to_sync(layer.group_count)("room") == 0
    channels.append(async_to_sync(layer.new_channel)())
    async_to_sync(layer.group_add)("room", channels[-1])
    for channel in {channels[0], channels[-1]}:  # also what was sent to an older channel
        async_to_sync(layer.send)(channel, {"type": "left"})
    async_to_sync(layer.send)("jobs", {"type": "new"})
    assert async_to_sync(layer.receive)("jobs") == {"type": "new"}
    assert layer.statistics()[-1].buffered <= 2
    async_to_sync(layer.send)("jobs", {"type": "left"})


async def test_consumers() -> None:
    await talk("/async/room/")
    await talk("/sync/room/")
    await use(layer)


def test_the_exchange() -> None:
    assert exchange_of(layer) != os.environ["LAYER_EXCHANGE"]
    assert exchange_of(layer).endswith(os.environ["LAYER_EXCHANGE"])
    print(f"exchange of {os.getpid()}: {exchange_of(layer)}")


async def test_one_that_swallows_what_happens() -> None:
    try:
        await layer.new_channel()
    except Exception:
        raise TimeoutError from None


def test_without_the_layer() -> None:
    assert True
