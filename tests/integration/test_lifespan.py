"""``LifespanApp`` as a server calls it; real servers are in ``test_everywhere_servers.py``."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import django
import pytest
from channels.layers import channel_layers, get_channel_layer
from channels.routing import ProtocolTypeRouter
from channels.testing import ApplicationCommunicator
from django.conf import settings
from django.test import override_settings

from channels_rabbitmq._broker.supervisor import State
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.lifespan import LifespanApp
from tests.support.brokers import Broker
from tests.support.fake_servers import silent_server
from tests.support.layers import inside
from tests.support.log_lines import log_lines
from tools.private_broker import free_port

if not settings.configured:
    settings.configure()
    django.setup()

STARTUP = {"type": "lifespan.startup"}
SHUTDOWN = {"type": "lifespan.shutdown"}


@asynccontextmanager
async def project(alias: str = "default", **config: Any) -> AsyncIterator[RabbitmqChannelLayer]:
    """A project's settings with one layer, which somebody else has to close."""
    backend = {"BACKEND": "channels_rabbitmq.core.RabbitmqChannelLayer", "CONFIG": config}
    with override_settings(CHANNEL_LAYERS={alias: backend}):
        yield get_channel_layer(alias)
        channel_layers.backends.clear()


def server(app: LifespanApp) -> ApplicationCommunicator:
    """What a server says to a project's application, which routes it on."""
    return ApplicationCommunicator(ProtocolTypeRouter({"lifespan": app}), {"type": "lifespan"})


def states(layer: RabbitmqChannelLayer) -> list[State]:
    loop_layer: Any = inside(layer)
    return [
        loop_layer.publisher.supervisor.state,
        loop_layer.subscriber.supervisor.state,
    ]


@pytest.mark.parametrize("fail_fast", [False, True])
async def test_it_connects_and_closes(
    broker: Broker, groups_exchange: str, fail_fast: bool
) -> None:
    async with project(host=broker.url, groups_exchange=groups_exchange) as layer:
        to_app = server(LifespanApp(fail_fast=fail_fast))
        await to_app.send_input(STARTUP)
        assert await to_app.receive_output(10) == {"type": "lifespan.startup.complete"}
        assert states(layer) == [State.READY, State.READY]
        assert await to_app.receive_nothing()
        await to_app.send_input(SHUTDOWN)
        assert await to_app.receive_output(10) == {"type": "lifespan.shutdown.complete"}
        assert states(layer) == [State.CLOSED, State.CLOSED]
        await to_app.wait()


async def test_another_alias(broker: Broker, groups_exchange: str) -> None:
    async with project("chat", host=broker.url, groups_exchange=groups_exchange) as layer:
        to_app = server(LifespanApp("chat"))
        await to_app.send_input(STARTUP)
        assert await to_app.receive_output(10) == {"type": "lifespan.startup.complete"}
        assert states(layer) == [State.READY, State.READY]
        await to_app.send_input(SHUTDOWN)
        await to_app.wait()


async def test_without_a_broker_the_server_starts_later_and_the_layer_goes_on_trying() -> None:
    async with project(host=f"amqp://127.0.0.1:{free_port()}", operation_timeout=0.2) as layer:
        to_app = server(LifespanApp())
        with log_lines() as lines:
            await to_app.send_input(STARTUP)
            assert await to_app.receive_output(10) == {"type": "lifespan.startup.complete"}
            await lines.next("started without a connection: No connection to RabbitMQ: amqp")
        assert State.CLOSED not in states(layer)
        await to_app.send_input(SHUTDOWN)
        assert await to_app.receive_output(10) == {"type": "lifespan.shutdown.complete"}
        assert states(layer) == [State.CLOSED, State.CLOSED]


class TestFailFast:
    async def failure(self, **config: Any) -> str:
        """Start with these settings; return why the server can't."""
        async with project(**config) as layer:
            to_app = server(LifespanApp(fail_fast=True))
            await to_app.send_input(STARTUP)
            # Far below operation_timeout
            answer = await to_app.receive_output(5)
            assert answer["type"] == "lifespan.startup.failed"
            assert states(layer) == [State.CLOSED, State.CLOSED]
            await to_app.wait()
            return str(answer["message"])

    async def test_nobody_listens(self) -> None:
        message = await self.failure(host=f"amqp://guest:s3cret@127.0.0.1:{free_port()}")
        assert re.match("LifespanApp: No connection to RabbitMQ: .*Connect", message)
        assert "s3cret" not in message

    async def test_the_broker_refuses(self, broker: Broker) -> None:
        message = await self.failure(host=re.sub("//.*@", "//guest:s3cret@", broker.url))
        assert "403 ACCESS_REFUSED" in message
        assert "s3cret" not in message

    async def test_every_url_is_tried(self, broker: Broker, groups_exchange: str) -> None:
        urls = [f"amqp://127.0.0.1:{free_port()}", broker.url]
        for _ in range(5):  # the order is random
            async with project(host=urls, groups_exchange=groups_exchange):
                to_app = server(LifespanApp(fail_fast=True))
                await to_app.send_input(STARTUP)
                assert await to_app.receive_output(5) == {"type": "lifespan.startup.complete"}
                await to_app.send_input(SHUTDOWN)
                await to_app.wait()

    async def test_a_broker_that_says_nothing(self) -> None:
        async with silent_server() as fake:
            message = await self.failure(host=fake.url, connect_timeout=0.2)
            assert "no answer from amqp://" in message
            await fake.until_gone()


class TestMistakes:
    async def failure(self, app: LifespanApp) -> str:
        to_app = server(app)
        await to_app.send_input(STARTUP)
        answer = await to_app.receive_output(5)
        assert answer["type"] == "lifespan.startup.failed"
        await to_app.wait()
        return str(answer["message"])

    async def test_an_unknown_alias(self) -> None:
        async with project():
            assert "CHANNEL_LAYERS has no 'chat'" in await self.failure(LifespanApp("chat"))

    async def test_bad_settings(self) -> None:
        backend = {
            "BACKEND": "channels_rabbitmq.core.RabbitmqChannelLayer",
            "CONFIG": {"expiry": "soon"},
        }
        with override_settings(CHANNEL_LAYERS={"default": backend}):
            assert "expiry" in await self.failure(LifespanApp())

    async def test_another_scope(self) -> None:
        with pytest.raises(ValueError, match="not 'websocket'"):
            await LifespanApp()({"type": "websocket"}, asyncio.Queue[Any]().get, nothing)


async def nothing(message: dict[str, Any]) -> None:
    pass


async def test_a_layer_of_another_package_is_left_alone() -> None:
    backend = {"BACKEND": "channels.layers.InMemoryChannelLayer"}
    with override_settings(CHANNEL_LAYERS={"default": backend}):
        to_app = server(LifespanApp(fail_fast=True))
        await to_app.send_input(STARTUP)
        assert await to_app.receive_output(5) == {"type": "lifespan.startup.complete"}
        await to_app.send_input(SHUTDOWN)
        assert await to_app.receive_output(5) == {"type": "lifespan.shutdown.complete"}
