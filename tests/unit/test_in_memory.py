"""``InMemoryChannelLayer``: what it does without RabbitMQ. (How it resembles the layer with
RabbitMQ is in tests/integration/test_in_memory.py.)
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from channels.exceptions import ChannelFull, InvalidChannelLayerError, StopConsumer
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.layers import channel_layers
from channels.testing import WebsocketCommunicator
from django.conf import settings
from django.test import override_settings

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from channels_rabbitmq.testing import InMemoryChannelLayer
from channels_rabbitmq.testing._memory_broker import flush_all
from tests.support.loop_thread import LoopThread

if not settings.configured:
    settings.configure()


async def receive(layer: InMemoryChannelLayer, channel: str) -> dict[str, Any]:
    return await asyncio.wait_for(layer.receive(channel), 10)


async def member(layer: InMemoryChannelLayer, group: str = "g") -> str:
    channel = await layer.new_channel()
    await layer.group_add(group, channel)
    return channel


@pytest.fixture
def layer() -> InMemoryChannelLayer:
    return InMemoryChannelLayer()


def test_its_methods_are_called_as_those_of_the_layer_with_rabbitmq() -> None:
    def signatures(cls: type) -> dict[str, inspect.Signature]:
        names = [name for name in dir(cls) if not name.startswith("_") or name == "__init__"]
        functions = [(name, getattr(cls, name)) for name in names]
        return {name: inspect.signature(f) for name, f in functions if inspect.isfunction(f)}

    assert signatures(InMemoryChannelLayer) == signatures(RabbitmqChannelLayer)
    assert len(signatures(RabbitmqChannelLayer)) > 12


async def test_django_finds_it_and_its_flush_needs_no_option() -> None:
    config = {"host": "amqp://u:p@rabbitmq/", "groups_exchange": "mine", "allow_flush": True}
    path = "channels_rabbitmq.testing.InMemoryChannelLayer"
    with override_settings(CHANNEL_LAYERS={"default": {"BACKEND": path, "CONFIG": config}}):
        layer = channel_layers["default"]
    assert layer.extensions == InMemoryChannelLayer().extensions == ["groups", "flush"]
    channel = await member(layer)
    await layer.send(channel, {"type": "old"})
    waiting = asyncio.create_task(receive(layer, await layer.new_channel()))
    await layer.flush()
    await layer.group_send("g", {"type": "old"})
    await layer.send(channel, {"type": "new"})
    assert await receive(layer, channel) == {"type": "new"}
    assert await layer.group_count("g") == 0
    assert not waiting.done()
    waiting.cancel()


def test_mistakes_in_config() -> None:
    with pytest.raises(InvalidChannelLayerError) as caught:
        InMemoryChannelLayer(hosts=["redis"], capacity=0)  # type: ignore[arg-type]
    assert "InMemoryChannelLayer: " in str(caught.value)
    assert "'hosts'" in str(caught.value)
    assert "capacity" in str(caught.value)


@pytest.mark.parametrize("option", ["host", "serializer", "on_disconnect", "on_reconnect"])
async def test_dotted_paths_are_imported_by_the_first_call(option: str) -> None:
    with pytest.raises(InvalidChannelLayerError, match=option):
        await InMemoryChannelLayer(**{option: "asyncio.not_there"}).new_channel()


async def test_a_full_channel() -> None:
    layer = InMemoryChannelLayer(capacity=2, channel_capacity={"jobs": 1}, normal_channels=True)
    full, empty = await member(layer), await member(layer)
    for n in range(2):
        await layer.send(full, {"n": n})
    with pytest.raises(ChannelFull, match="capacity"):
        await layer.send(full, {"n": 2})
    await layer.group_send("g", {"n": 3})
    assert [await receive(layer, full) for _ in range(2)] == [{"n": 0}, {"n": 1}]
    assert await receive(layer, empty) == {"n": 3}
    await layer.send("jobs", {})
    with pytest.raises(ChannelFull):
        await layer.send("jobs", {})
    (statistics,) = layer.statistics()
    counters = statistics.counters
    assert (counters.nacked, counters.group_nacked) == (2, 1)
    assert counters.published == counters.confirmed + 3
    assert counters.enqueued == counters.consumed == 3


async def test_messages_expire(caplog: pytest.LogCaptureFixture) -> None:
    layer = InMemoryChannelLayer(expiry=0.01, normal_channels=True)
    channel = await member(layer)
    await layer.send(channel, {"n": 0})
    await layer.send("jobs", {"n": 0})
    time.sleep(0.02)  # noqa: ASYNC251 - nothing else runs on this loop
    for name in (channel, "jobs"):
        await layer.send(name, {"n": 1})
        assert await receive(layer, name) == {"n": 1}
    assert layer.statistics()[0].counters.expired == 1
    assert "1 message dropped: no receive() took them within local_expiry" in caplog.text


async def test_a_channel_that_is_gone(
    layer: InMemoryChannelLayer, caplog: pytest.LogCaptureFixture
) -> None:
    with LoopThread() as thread:
        channel = await thread.run(member(layer))
    await layer.send(channel, {"type": "n"})
    assert "the process of their channel is gone" in caplog.text
    assert await layer.group_count("g") == 0
    for call in (layer.receive(channel), layer.group_add("g", channel)):
        with pytest.raises(ValueError, match="an event loop that has ended"):
            await call
    assert layer.statistics()[0].counters.unreachable == 1


async def test_event_loops_threads_and_sync_code(layer: InMemoryChannelLayer) -> None:
    own = await member(layer)
    of_sync_code = await asyncio.to_thread(_in_thread, lambda: async_to_sync(member)(layer))
    with LoopThread() as thread:
        of_thread = await thread.run(member(layer))
        await layer.group_send("g", {"n": 1})
        assert await receive(layer, own) == {"n": 1}
        assert await thread.run(receive(layer, of_thread)) == {"n": 1}
        assert await receive(layer, of_sync_code) == {"n": 1}
        # By another event loop than its own
        waiting = asyncio.create_task(thread.run(receive(layer, own)))
        await layer.send(own, {"n": 2})
        assert await waiting == {"n": 2}
        assert [one.for_sync_code for one in layer.statistics()] == [False, True, False]
        status = await layer.status()
        assert tuple(one.statistics.id for one in status.processes) == tuple(
            one.id for one in layer.statistics()
        )
    await asyncio.to_thread(_in_thread, lambda: async_to_sync(layer.send)(own, {"n": 3}))
    assert await receive(layer, own) == {"n": 3}
    await asyncio.to_thread(_in_thread, lambda: async_to_sync(layer.close)())
    with pytest.raises(StopConsumer):
        await layer.receive(of_sync_code)


def _in_thread(call: Callable[[], Any]) -> Any:
    """Run sync code in a thread where async_to_sync finds no event loop."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("is_woken", [False, True])
async def test_a_cancelled_receive_takes_nothing(
    layer: InMemoryChannelLayer, is_woken: bool
) -> None:
    channel = await layer.new_channel()
    calls = [asyncio.create_task(layer.receive(channel)) for _ in range(2)]
    await asyncio.sleep(0)
    if is_woken:
        await layer.send(channel, {"n": 1})
    calls[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls[0]
    if not is_woken:
        await layer.send(channel, {"n": 1})
    assert await asyncio.wait_for(calls[1], 10) == {"n": 1}
    assert layer.statistics()[0].channels == 0


async def test_close(layer: InMemoryChannelLayer) -> None:
    channel = await member(layer)
    waiting = asyncio.create_task(layer.receive(channel))
    await asyncio.sleep(0)
    await layer.close_pools()
    for call in (waiting, layer.receive(channel)):
        with pytest.raises(StopConsumer):
            await call
    for call in (layer.send(channel, {}), layer.group_send("g", {})):
        with pytest.raises(BrokerUnavailable, match="is closed"):
            await call
    with pytest.raises(BrokerUnavailable, match="has no RabbitMQ"):
        await layer.carehare_connection


async def test_a_copy_reaches_the_same_channels(layer: InMemoryChannelLayer) -> None:
    channel = await member(layer)
    for copied in (copy.copy(layer), copy.deepcopy({"layer": layer})["layer"]):
        await copied.group_send("g", {"type": "n"})
        assert await receive(copied, channel) == {"type": "n"}
    for other in (pickle.loads(pickle.dumps(layer)), InMemoryChannelLayer()):
        assert await other.group_count("g") == 0
    flush_all()
    assert await layer.group_count("g") == 0


async def test_a_consumer(layer: InMemoryChannelLayer) -> None:
    class Consumer(AsyncWebsocketConsumer):
        groups = ["room"]  # noqa: RUF012 - as Channels has it

        async def say(self, message: dict[str, Any]) -> None:
            await self.send(message["text"])

    path = "channels_rabbitmq.testing.InMemoryChannelLayer"
    with override_settings(CHANNEL_LAYERS={"default": {"BACKEND": path}}):
        client = WebsocketCommunicator(Consumer.as_asgi(), "/")
        assert (await client.connect())[0]
        await channel_layers["default"].group_send("room", {"type": "say", "text": "hello"})
        assert await client.receive_from() == "hello"
        await client.disconnect()
