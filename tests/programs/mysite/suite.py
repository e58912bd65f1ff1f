"""Tests of a project's own, for ``manage.py test``: Django gives each an event loop of its own."""

from __future__ import annotations

import asyncio
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import channel_layers, get_channel_layer
from channels.testing import ApplicationCommunicator, WebsocketCommunicator
from django.conf import settings
from django.test import SimpleTestCase, TestCase, TransactionTestCase, override_settings

from mysite.asgi import application

layer: Any = get_channel_layer()  # one for all tests


async def use(layer: Any) -> str:
    channel: str = await layer.new_channel()
    await layer.group_add("room", channel)
    await layer.group_send("room", {"type": "to.room"})
    await layer.send(channel, {"type": "to.channel"})
    heard = [await asyncio.wait_for(layer.receive(channel), 10) for _ in range(2)]
    assert heard == [{"type": "to.room"}, {"type": "to.channel"}], heard
    await layer.group_discard("room", channel)
    return channel


async def talk(path: str) -> None:
    """Two clients in a room: what one says, both hear."""
    clients = [WebsocketCommunicator(application, path) for _ in range(2)]
    for client in clients:
        connected, _ = await client.connect(timeout=10)
        assert connected
    await clients[0].send_json_to({"say": "hello"})
    for client in clients:
        assert await client.receive_json_from(10) == {"heard": "hello"}
    for client in clients:
        await client.disconnect(timeout=10)


class AsyncTests(TestCase):
    channel = ""  # of the first test

    async def test_1(self) -> None:
        type(self).channel = await use(layer)

    async def test_2_each_test_has_a_loop_and_the_layer_is_one(self) -> None:
        assert get_channel_layer() is layer
        assert await use(layer) != self.channel
        # Made in another test, on another loop; still a channel of this process.
        await layer.send(self.channel, {"type": "from.test.2"})
        heard = await asyncio.wait_for(layer.receive(self.channel), 10)
        assert heard == {"type": "from.test.2"}

    async def test_websocket_communicator(self) -> None:
        await talk("/async/room-1/")

    async def test_websocket_communicator_with_a_sync_consumer(self) -> None:
        await talk("/sync/room-2/")

    async def test_application_communicator(self) -> None:
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/notify/room-3/news/",
            "query_string": b"",
            "headers": [(b"host", b"127.0.0.1")],
        }
        channel = await layer.new_channel()
        await layer.group_add("room-3", channel)
        client = ApplicationCommunicator(application, scope)
        await client.send_input({"type": "http.request", "body": b""})
        start = await client.receive_output(10)
        assert start["status"] == 200
        heard = await asyncio.wait_for(layer.receive(channel), 10)
        assert heard == {"type": "chat.message", "text": "news"}
        await client.receive_output(10)
        await client.wait(10)

    async def test_client(self) -> None:
        """Django's own client runs a sync view."""
        channel = await layer.new_channel()
        await layer.group_add("room-4", channel)
        response = await self.async_client.get("/notify/room-4/news/")
        assert response.status_code == 200
        heard = await asyncio.wait_for(layer.receive(channel), 10)
        assert heard == {"type": "chat.message", "text": "news"}

    @override_settings(
        CHANNEL_LAYERS={
            "default": {
                **settings.CHANNEL_LAYERS["default"],
                "CONFIG": {**settings.CHANNEL_LAYERS["default"]["CONFIG"], "local_capacity": 7},
            }
        }
    )
    async def test_override_settings(self) -> None:
        other = get_channel_layer()
        assert other is not None
        assert other is not layer
        await use(other)


class SyncTests(TransactionTestCase):
    def test_sync_code(self) -> None:
        async_to_sync(use)(layer)

    def test_client(self) -> None:
        channel = async_to_sync(layer.new_channel)()
        async_to_sync(layer.group_add)("room-5", channel)
        assert self.client.get("/notify/room-5/news/").status_code == 200
        heard = async_to_sync(layer.receive)(channel)
        assert heard == {"type": "chat.message", "text": "news"}


class LayerInTestData(TestCase):
    """Django gives each test a deep copy of what ``setUpTestData`` has set."""

    @classmethod
    def setUpTestData(cls) -> None:
        cls.layer = get_channel_layer()

    async def test_1(self) -> None:
        assert self.layer is not layer
        await use(self.layer)

    async def test_2(self) -> None:
        await use(self.layer)


class LayerPerTest(SimpleTestCase):
    """A new layer for each test, as careful projects have it."""

    def setUp(self) -> None:
        channel_layers.backends.clear()

    async def test_1(self) -> None:
        assert get_channel_layer() is not layer
        await use(get_channel_layer())

    async def test_2(self) -> None:
        assert get_channel_layer() is not layer
        await use(get_channel_layer())
