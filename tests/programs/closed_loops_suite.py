"""Tests of a project's own, for any version of pytest-asyncio: below 1.1 it only closes loops."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import django
import pytest

django.setup()

from channels.layers import get_channel_layer  # noqa: E402 (Django has to be set up)
from mysite.suite import talk, use  # noqa: E402 (as above)

layer: Any = get_channel_layer()
pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("number", range(8))
async def test_everything(number: int) -> None:
    await use(layer)
    gc.collect()  # What an earlier test left is found while another one runs.


@pytest.mark.parametrize("number", range(8))
async def test_one_call(number: int) -> None:
    await layer.group_send("room", {"type": "n", "n": number})


@pytest.mark.parametrize("number", range(4))
async def test_calls_that_wait_at_the_end(number: int) -> None:
    channel = await layer.new_channel()
    calls = [layer.receive(channel), layer.group_add("room", channel), layer.send(channel, {})]
    waiting = [asyncio.create_task(call) for call in calls]
    await asyncio.wait(waiting, timeout=0.001 * number)


@pytest.mark.parametrize("number", range(4))
async def test_consumers(number: int) -> None:
    await talk("/async/room/")
    await talk("/sync/room/")
    gc.collect()
