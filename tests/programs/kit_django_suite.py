"""A project's tests with the mix-in: ``manage.py test kit_django_suite --parallel``."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
from typing import Any

import websockets.exceptions
import websockets.sync.client
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from channels.testing import ChannelsLiveServerTestCase
from django.test import SimpleTestCase, TestCase, TransactionTestCase, override_settings, tag

from channels_rabbitmq.testing import ChannelLayerMixin, InMemoryChannelLayer, exchange_of

layer: Any = get_channel_layer()


class Tests(ChannelLayerMixin):
    """What each of the classes below does."""

    def test_sync(self) -> None:
        assert async_to_sync(layer.group_count)("room") == 0
        async_to_sync(layer.group_add)("room", async_to_sync(layer.new_channel)())
        async_to_sync(layer.send)("jobs", {"type": "new"})
        assert async_to_sync(layer.receive)("jobs") == {"type": "new"}
        async_to_sync(layer.send)("jobs", {"type": "left"})
        sys.stdout.write(f"exchange: {exchange_of(layer)}\n")

    test_sync_again = test_sync

    async def test_async(self) -> None:
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await layer.group_send("room", {"type": "n", "pid": os.getpid()})
        assert await layer.receive(channel) == {"type": "n", "pid": os.getpid()}


class Simple(Tests, SimpleTestCase):
    pass


class WithDatabase(Tests, TestCase):
    @classmethod
    def setUpTestData(cls) -> None:
        cls.layer = get_channel_layer()  # Django copies it for each test.

    def test_a_copy(self) -> None:
        async_to_sync(self.layer.send)("jobs", {"type": "new"})
        assert async_to_sync(layer.receive)("jobs") == {"type": "new"}


class Transactions(Tests, TransactionTestCase):
    pass


@override_settings(
    CHANNEL_LAYERS={"default": {"BACKEND": "channels_rabbitmq.testing.InMemoryChannelLayer"}}
)
class InMemory(ChannelLayerMixin, SimpleTestCase):
    def test_it_is_empty(self) -> None:
        layer: Any = get_channel_layer()
        assert isinstance(layer, InMemoryChannelLayer)
        assert async_to_sync(layer.group_count)("room") == 0
        async_to_sync(layer.group_add)("room", async_to_sync(layer.new_channel)())

    test_it_is_empty_again = test_it_is_empty


@tag("live")  # Processes of --parallel can't start one.
class LiveServer(ChannelLayerMixin, ChannelsLiveServerTestCase):
    serve_static = False

    @classmethod
    def setUpClass(cls) -> None:
        # It inherits nothing of this process, as from Python 3.14 on or on macOS.
        multiprocessing.set_start_method("spawn", force=True)
        super().setUpClass()

    @classmethod
    def _is_in_memory_db(cls, connection: object) -> bool:
        return False  # The consumers need no database.

    def _connect(self) -> websockets.sync.client.ClientConnection:
        for _ in range(3):
            # On a busy machine daphne may end the first handshakes, after five seconds each.
            with contextlib.suppress(websockets.exceptions.WebSocketException):
                return websockets.sync.client.connect(self.live_server_ws_url + "/async/room/")
        raise AssertionError("no websocket")

    def test_its_consumers_are_reached(self) -> None:
        with self._connect() as client:
            client.send(json.dumps({"say": "hello"}))
            assert json.loads(client.recv(10)) == {"heard": "hello"}
            message = {"type": "chat.message", "text": "from the test"}
            async_to_sync(layer.group_send)("room", message)
            assert json.loads(client.recv(10)) == {"heard": "from the test"}
