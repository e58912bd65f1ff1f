"""Tests of a project's own, for pytest: a new event loop for each, one layer for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import django
import pytest
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer

django.setup()

from mysite.suite import talk, use  # noqa: E402 (Django has to be set up)

layer: Any = get_channel_layer()
loops: list[asyncio.AbstractEventLoop] = []
channels: list[str] = []


@pytest.mark.parametrize("number", range(4))
async def test_each_has_a_loop_of_its_own(number: int) -> None:
    assert asyncio.get_running_loop() not in loops
    loops.append(asyncio.get_running_loop())
    channel = await use(layer)
    assert channel not in channels
    channels.append(channel)


@pytest.fixture
async def channel() -> AsyncIterator[str]:
    name = await layer.new_channel()
    await layer.group_add("fixture", name)
    yield name
    await layer.group_discard("fixture", name)


@pytest.mark.parametrize("number", range(2))
async def test_a_fixture_makes_the_channel(channel: str, number: int) -> None:
    await layer.group_send("fixture", {"type": "n", "n": number})
    assert await asyncio.wait_for(layer.receive(channel), 10) == {"type": "n", "n": number}


async def test_a_call_that_waits_at_the_end() -> None:
    waiting = asyncio.create_task(layer.receive(await layer.new_channel()))
    await asyncio.wait([waiting], timeout=0)
    loops.append(waiting)  # type: ignore[arg-type]  # it is kept, as a careless test keeps things


async def test_consumers() -> None:
    await talk("/async/room/")
    await talk("/sync/room/")


def test_sync_code() -> None:
    async_to_sync(use)(layer)


def test_sync_code_again() -> None:
    async_to_sync(use)(layer)
