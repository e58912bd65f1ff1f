"""Calls while no broker answers."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from asgiref.sync import async_to_sync

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.calls import CALLS, Call
from tests.support.fake_servers import silent_server
from tests.support.log_lines import log_lines
from tools.private_broker import free_port

MESSAGE = {"type": "test"}


# Seconds: less than any wait for the broker, and more than a busy machine needs for an error.
AT_ONCE = 0.5


def test_sync_code_in_four_threads() -> None:
    """A site's views: the first calls share the wait, and nobody else waits."""
    layer = RabbitmqChannelLayer(host=f"amqp://127.0.0.1:{free_port()}", operation_timeout=1)
    longest: list[float] = []

    async def run(call: Call) -> None:
        await call(layer, "crq.aaaaaaaaaaaaaaaa!x")

    def fail(call: Call) -> float:
        begun_at = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            async_to_sync(run)(call)
        return time.monotonic() - begun_at

    def views() -> None:
        calls = [CALLS[name] for name in ("send", "group_send", "carehare_connection", "connect")]
        longest.append(max(fail(call) for call in calls * 3))

    assert 0.9 < fail(CALLS["send"]) < 4
    threads = [threading.Thread(target=views) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(longest) == 4
    assert max(longest) < 2 * AT_ONCE
    async_to_sync(layer.close)()


def test_calls_of_sync_code_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Each has a carehare_connection of its own, whose first attempt fails."""
    layer = RabbitmqChannelLayer(host=f"amqp://127.0.0.1:{free_port()}", operation_timeout=0.2)

    async def connect() -> None:
        await layer.carehare_connection

    for _ in range(10):
        with pytest.raises(BrokerUnavailable):
            async_to_sync(connect)()
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "cannot connect" in line]) == 1


async def silent_calls(url: str, count: int) -> list[float]:
    """How long calls take, each on an event loop of its own, of a broker that says nothing."""
    layer = RabbitmqChannelLayer(host=url, operation_timeout=1.5)
    seconds = []

    async def call() -> None:
        with pytest.raises(BrokerUnavailable, match="no answer within"):
            await layer.group_send("g", {"type": "t"})

    def call_each() -> None:
        for _ in range(count):
            begun_at = time.monotonic()
            asyncio.run(call())
            seconds.append(time.monotonic() - begun_at)

    await asyncio.to_thread(call_each)
    return seconds


@pytest.mark.slow
async def test_a_silent_broker_is_known_to_the_next_event_loop() -> None:
    async with silent_server() as server:
        with log_lines() as lines:
            first, *others = await silent_calls(server.url, 3)
            line = await lines.next("cannot connect to amqp://.*: no answer within 1.5 s")
            assert "publisher" in line
    assert first > 1.4
    assert max(others) < 1.4
