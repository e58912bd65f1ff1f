"""The URL comes from a function, and there is a broker behind it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.brokers import Broker
from tests.support.layers import close_for_sync_code
from tests.support.log_lines import log_lines

MESSAGE = {"type": "t"}


URL = "amqp://alice:hush@broker.example/v"


shared_url = URL  # what the functions below return


def url_of_this_module() -> str:
    return shared_url


OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


async def test_with_a_real_broker(open_layer: OpenLayer, broker: Broker) -> None:
    async def url() -> list[str]:
        return [broker.url]

    layer = await open_layer(host=url)
    channel = await layer.new_channel()
    await layer.send(channel, MESSAGE)
    assert await layer.receive(channel) == MESSAGE
    (statistics,) = layer.statistics()
    assert statistics.publisher.url.startswith("amqp://guest@")
    assert "guest:" not in repr(layer)


async def test_by_its_path_and_from_sync_code(
    open_layer: OpenLayer, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "shared_url", broker.url)
    layer = await open_layer(host=f"{__name__}.url_of_this_module")
    await layer.group_send("g", MESSAGE)
    await asyncio.to_thread(async_to_sync(layer.group_send), "g", MESSAGE)
    await close_for_sync_code(layer)


async def test_a_failure_is_a_failed_attempt(open_layer: OpenLayer, broker: Broker) -> None:
    """Told once, in a line without a traceback, in the error and in the statistics."""
    outcomes: list[Any] = []

    def url() -> str:
        if outcomes:
            raise outcomes[0]
        return broker.url

    outcomes.append(RuntimeError(f"sealed: {URL}"))
    layer = await open_layer(host=url, operation_timeout=0.5)
    with log_lines() as lines:
        for _ in range(2):
            with pytest.raises(BrokerUnavailable) as caught:
                await layer.group_send("g", MESSAGE)
        (statistics,) = layer.statistics()
        outcomes.clear()
        await lines.next("WARNING publisher .*connected to")
        logged = lines.rest()
    reason = "it raised RuntimeError: sealed: amqp://...@broker.example/v (test_host_function.py"
    for text in (str(caught.value), statistics.publisher.last_reason):
        assert reason in text
        assert "hush" not in text
    assert not [line for line in logged if "Traceback" in line or "ERROR" in line]
    await layer.group_send("g", MESSAGE)
