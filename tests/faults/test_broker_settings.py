"""What operators may have set on their RabbitMQ, and what the layer makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgpack
import pytest
from channels.exceptions import ChannelFull

from channels_rabbitmq._settings.settings import DEFAULT_HOST
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import broker_commands
from tests.support.layers import statistics_of
from tests.support.log_lines import log_lines
from tools.private_broker import PrivateBroker

pytestmark = pytest.mark.slow  # a broker starts

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}
# Milliseconds, and bytes: everything that the layer may run into by default, made small.
_LARGEST = 100_000
_CONFIG = f"""\
consumer_timeout = 1000
max_message_size = {_LARGEST}
"""
_OFTEN = "application:set_env(rabbit, channel_tick_interval, 300)."  # looks for timeouts, in ms
_VHOST = "quorum-by-default"


@pytest.fixture(scope="module")
def own_broker(rabbitmq: None) -> Iterator[PrivateBroker]:
    with PrivateBroker(broker_commands(), config=_CONFIG) as broker:
        broker.ctl("eval", _OFTEN)
        yield broker


async def receive(layer: RabbitmqChannelLayer, channel: str) -> dict[str, Any]:
    """Receive, with a limit so that a lost message fails here and not at the test's limit."""
    return await asyncio.wait_for(layer.receive(channel), 10)


async def test_the_default_host_needs_nothing_but_a_new_broker(
    open_layer: OpenLayer, own_broker: PrivateBroker
) -> None:
    """No virtual host has to be made first. (Only the port is another one here.)"""
    host = DEFAULT_HOST.replace("127.0.0.1", f"127.0.0.1:{own_broker.port}")
    layer = await open_layer(host=host)
    channel = await layer.new_channel()
    await layer.send(channel, MESSAGE)
    assert await receive(layer, channel) == MESSAGE


async def test_a_message_that_nobody_takes_does_not_make_the_process_deaf(
    open_layer: OpenLayer, own_broker: PrivateBroker
) -> None:
    """The broker closes its consumer after consumer_timeout; 4.x was deaf for good then."""
    if own_broker.version >= (4, 3):
        pytest.skip("from RabbitMQ 4.3 on consumer_timeout is not for such queues")
    sender, receiver = await open_layer(host=own_broker.url), await open_layer(host=own_broker.url)
    untaken, channel = await receiver.new_channel(), await receiver.new_channel()
    await receiver.group_add("g", channel)
    receiving = asyncio.create_task(receive(receiver, channel))
    with log_lines() as lines:
        await sender.send(untaken, {"n": 1})
        line = await lines.next("WARNING subscriber .*: lost")
        assert "406 PRECONDITION_FAILED - delivery acknowledgement" in line
        await lines.next("WARNING subscriber .*: connected again")
        await sender.send(channel, MESSAGE)
        assert await receiving == MESSAGE
        await receiver.group_add("g", channel)  # again: returns when the group is bound again
        await sender.group_send("g", MESSAGE)
        assert await receive(receiver, channel) == MESSAGE
        # It is in memory still, and there only: the next connection has nothing to time out.
        assert statistics_of(receiver).unacked == 0
        assert await receive(receiver, untaken) == {"n": 1}
        await sender.send(untaken, {"n": 2})
        assert await receive(receiver, untaken) == {"n": 2}
        assert not [line for line in lines.rest() if "Traceback" in line]


async def test_a_limit_by_policy_refuses_and_does_not_drop_what_was_confirmed(
    open_layer: OpenLayer, own_broker: PrivateBroker
) -> None:
    """RabbitMQ's own default for a full queue is to drop the oldest, without a word."""
    own_broker.ctl("set_policy", "few", r"^crq\..*", '{"max-length":5}', "--apply-to", "queues")
    try:
        sender = await open_layer(host=own_broker.url)
        receiver = await open_layer(
            host=own_broker.url, local_capacity=1, remote_capacity=None, remote_capacity_bytes=None
        )
        channel = await receiver.new_channel()
        await receiver.connect()
        taken: list[int] = []

        async def fill() -> None:
            for n in range(100):
                await sender.send(channel, {"n": n})
                taken.append(n)

        with pytest.raises(ChannelFull):
            await fill()
        assert [(await receive(receiver, channel))["n"] for _ in taken] == taken
    finally:
        own_broker.ctl("clear_policy", "few")


async def test_max_message_size_as_the_brokers_spares_all_others_a_reconnect(
    open_layer: OpenLayer, own_broker: PrivateBroker
) -> None:
    """A body of exactly that size passes both; one byte more is its own sender's error only."""
    layer = await open_layer(host=own_broker.url, max_message_size=_LARGEST)
    channel = await layer.new_channel()
    overhead = len(msgpack.packb({"n": 1, "body": b"x" * 70_000, "__asgi_channel__": channel}))
    largest = _LARGEST - overhead + 70_000
    with log_lines() as lines:
        results = await asyncio.gather(
            *(
                layer.send(channel, {"n": n, "body": b"x" * (largest + (n == 5))})
                for n in range(10)
            ),
            return_exceptions=True,
        )
        assert [n for n, result in enumerate(results) if result is not None] == [5]
        assert isinstance(results[5], layer.MessageTooLarge)
        received = [(await receive(layer, channel))["n"] for _ in range(9)]
        assert received == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        assert not [line for line in lines.rest() if "lost" in line]


async def test_a_body_over_the_brokers_limit_costs_one_reconnect(
    open_layer: OpenLayer, own_broker: PrivateBroker
) -> None:
    """The broker answers by closing the AMQP channel. (4.x: its error for all who waited.)"""
    layer = await open_layer(host=own_broker.url)
    channel = await layer.new_channel()
    await layer.send(channel, {"n": 0})
    with log_lines() as lines:
        await layer.send(channel, {"body": b"x" * 2 * _LARGEST})
        line = await lines.next("WARNING publisher .*: lost")
        assert "406 PRECONDITION_FAILED - message size" in line
        assert "1 message written but not confirmed" in await lines.next("WARNING crq")
        assert not [line for line in lines.rest() if "Traceback" in line]
    for n in range(1, 10):
        await layer.send(channel, {"n": n})
    assert [(await receive(layer, channel))["n"] for _ in range(10)] == list(range(10))
    assert statistics_of(layer).counters.outcome_unknown == 1


async def test_a_virtual_host_where_queues_are_quorum_queues_by_default(
    open_layer: OpenLayer, own_broker: PrivateBroker
) -> None:
    """Those can't be exclusive, and the layer's own must be."""
    ctl = own_broker.ctl
    await asyncio.to_thread(ctl, "add_vhost", "--default-queue-type", "quorum", _VHOST)
    await asyncio.to_thread(ctl, "set_permissions", "-p", _VHOST, "guest", ".*", ".*", ".*")
    layer = await open_layer(host=f"{own_broker.url}/{_VHOST}")
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    await layer.group_send("g", MESSAGE)
    assert await receive(layer, channel) == MESSAGE
    rows = await asyncio.to_thread(
        own_broker.list_queues, "name", "type", "exclusive", vhost=_VHOST
    )
    queues = {row["name"].rpartition(".")[2]: row["exclusive"] for row in rows}
    assert queues == {channel[4:20]: True, "requests": True, "lease": False}
    assert all("classic" in row["type"] for row in rows)
