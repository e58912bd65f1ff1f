"""RabbitMQ is low on memory: what the status, the metrics and the probes tell then."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator

import pytest
from channels.layers import channel_layers
from django.conf import settings
from django.test import RequestFactory

from channels_rabbitmq import prometheus
from channels_rabbitmq._tools import status
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.health import Health, check_ready
from channels_rabbitmq.prometheus import PREFIX
from tests.support.layers import statistics_of
from tools.private_broker import PrivateBroker

if not settings.configured:
    settings.configure()

pytestmark = pytest.mark.slow  # a broker starts

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]


@pytest.fixture
def no_default_layer_afterwards() -> Iterator[None]:
    yield
    channel_layers.backends.pop("default", None)


@pytest.mark.usefixtures("no_default_layer_afterwards")
async def test_nobody_is_blamed(
    own_broker: PrivateBroker,
    open_layer: OpenLayer,
    groups_exchange: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asker, other = [await open_layer(host=own_broker.url) for _ in range(2)]
    await asyncio.gather(asker.connect(), other.connect())
    while len((await asker.status()).processes) < 2:
        pass
    channel_layers.set("default", asker)

    async def command(*arguments: str) -> tuple[int, str]:
        parser = argparse.ArgumentParser()
        status.add_arguments(parser)
        parsed = parser.parse_args(
            [own_broker.url, "--groups-exchange", groups_exchange, *arguments]
        )
        return await asyncio.to_thread(status.run, parsed), capsys.readouterr().out

    try:
        await asyncio.to_thread(own_broker.raise_memory_alarm)
        # By the manual: who publishes nothing isn't told.
        assert await check_ready() == Health(True, ())
        for one in (other, asker):
            await one.group_send("g", {"type": "test.message"})
            while not statistics_of(one).is_blocked:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        problem = f"{statistics_of(asker).id}: RabbitMQ takes no messages"
        assert await check_ready() == Health(False, (problem,))

        found = await asker.status()
        assert (found.is_blocked, found.is_complete, found.silent) == (True, False, ())
        scrape = await prometheus.metrics(RequestFactory().get("/metrics"))
        lines = scrape.content.decode().splitlines()
        for name in ("silent_processes", "is_complete"):
            assert f"{PREFIX}_{name} 0.0" in lines

        exit_status, text = await command()
        assert exit_status == 1
        assert "0 processes answer, RabbitMQ takes no messages" in text
        assert "`rabbitmq-diagnostics alarms`" in text
        assert "uses this exchange" not in text
        exit_status, text = await command("--json")
        told = json.loads(text)
        assert (exit_status, told["is_blocked"], told["is_well"]) == (1, True, False)
    finally:
        await asyncio.to_thread(own_broker.end_memory_alarm)
    while (await asker.status()).is_blocked:
        pass
    while len((await asker.status()).processes) < 2:
        pass
    assert (await command())[0] == 0
