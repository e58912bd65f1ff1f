"""What probes are told of this process, on a real broker."""

from __future__ import annotations

import asyncio
import threading

import pytest
from asgiref.sync import async_to_sync
from channels.exceptions import InvalidChannelLayerError
from channels.layers import InMemoryChannelLayer, channel_layers

from channels_rabbitmq import health
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.health import Health, check_live, check_ready
from tests.support.amqp_proxy import AmqpProxy
from tests.support.brokers import Broker
from tests.support.layers import close_for_sync_code, statistics_of
from tests.support.loop_thread import LoopThread

WELL = Health(True, ())


async def test_ready_connects_what_nobody_has_used_yet(default_layer: RabbitmqChannelLayer) -> None:
    assert check_live() == WELL
    assert default_layer.statistics() == ()
    while await check_ready() != WELL:  # It may take longer than a probe waits.
        pass
    assert statistics_of(default_layer).subscriber.state == "connected"


async def test_ready_in_sync_code(default_layer: RabbitmqChannelLayer) -> None:
    def probe() -> Health:
        return async_to_sync(check_ready)()

    while await asyncio.to_thread(probe) != WELL:
        pass
    assert [one.for_sync_code for one in default_layer.statistics()] == [True]
    assert await asyncio.to_thread(check_live) == WELL
    await close_for_sync_code(default_layer)


async def test_a_lost_connection_is_not_ready_but_live(broker: Broker) -> None:
    async with AmqpProxy(broker.url) as proxy:
        layer = RabbitmqChannelLayer(host=proxy.url)
        channel_layers.set("default", layer)
        while await check_ready() != WELL:
            pass
        proxy.refuse()
        proxy.cut()
        while statistics_of(layer).subscriber.state == "connected":  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        found = await check_ready()
        assert not found.is_well
        id_ = statistics_of(layer).id
        for role in ("publisher", "subscriber"):
            assert any(f"{id_}: {role}: no connection for " in one for one in found.problems)
        assert "amqp" not in " ".join(found.problems), "no URL, and nothing of the broker's"
        assert check_live() == WELL
        await layer.close()
        del channel_layers.backends["default"]


async def test_an_event_loop_that_is_blocked_is_not_live(
    default_layer: RabbitmqChannelLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "BLOCKED", 0.2)
    blocks, go_on = threading.Event(), threading.Event()

    async def use_and_block() -> str:
        channel = await default_layer.new_channel()
        asyncio.get_running_loop().call_later(0.05, block)
        return channel.partition("!")[0]

    def block() -> None:
        blocks.set()
        assert go_on.wait(20)

    with LoopThread() as other:
        id_ = await other.run(use_and_block())
        assert await asyncio.to_thread(blocks.wait, 10)
        while check_live().is_well:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.05)
        assert check_live().problems == (f"{id_}: the event loop has been blocked for 0 s",)
        go_on.set()
        await other.run(asyncio.sleep(0))
        assert check_live() == WELL
        await other.run(default_layer.close())


def test_another_layer() -> None:
    channel_layers.set("another", InMemoryChannelLayer())
    with pytest.raises(InvalidChannelLayerError, match="'another' is a InMemoryChannelLayer"):
        check_live("another")
    del channel_layers.backends["another"]
