"""Normal channels while their broker breaks, and with users who may not do everything."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from channels.exceptions import ChannelFull

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.changes import until
from tests.support.declared import queues
from tests.support.layers import statistics_of
from tests.support.log_lines import LogLines
from tests.support.members import receive
from tests.support.normal_channels import ready_messages
from tests.support.users import EVERYTHING, User, call_as_admin
from tools.private_broker import PrivateBroker

pytestmark = pytest.mark.slow  # brokers start

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

# What RabbitMQ 4 lets an operator forbid, and will drop one day; older ones don't know it.
_FEATURES = ("transient_nonexcl_queues", "global_qos", "queue_master_locator", "ram_node_type")
_STRICT = "".join(f"deprecated_features.permit.{feature} = false\n" for feature in _FEATURES)
_QUEUE = "crq.channel.{}:jobs"


async def numbers(layer: RabbitmqChannelLayer, count: int) -> list[int]:
    return [(await receive(layer, "jobs"))["n"] for _ in range(count)]


def job(n: int) -> dict[str, Any]:
    return {"type": "job", "n": n}


async def test_all_connections_are_closed_by_force(
    open_layer: OpenLayer, own_broker: PrivateBroker
) -> None:
    host = own_broker.url
    sender = await open_layer(host=host, normal_channels=True)
    receiver = await open_layer(host=host, normal_channels=True)
    await sender.send("jobs", job(0))
    assert await numbers(receiver, 1) == [0]
    for n in range(1, 4):
        waiting = asyncio.create_task(numbers(receiver, 1))
        await until(lambda: statistics_of(receiver).receivers == 1)
        await asyncio.to_thread(own_broker.close_all_connections, "for a test")
        await until(lambda: statistics_of(sender).publisher.state == "connected")
        await sender.send("jobs", job(n))
        assert await waiting == [n]


async def test_a_restart(
    open_layer: OpenLayer, private_broker: PrivateBroker, groups_exchange: str
) -> None:
    """The queue is still there, but not the exchange and the binding."""
    host = private_broker.url
    sender = await open_layer(host=host, normal_channels=True, operation_timeout=40)
    receiver = await open_layer(host=host, normal_channels=True)
    await sender.send("jobs", job(0))
    assert await numbers(receiver, 1) == [0]
    waiting = asyncio.create_task(receiver.receive("jobs"))
    await until(lambda: statistics_of(receiver).receivers == 1)
    await asyncio.to_thread(private_broker.kill)
    sending = asyncio.create_task(sender.send("jobs", job(1)))
    await asyncio.to_thread(private_broker.start)
    assert _QUEUE.format(groups_exchange) in await queues(private_broker)
    await sending
    assert await asyncio.wait_for(waiting, 40) == job(1)


async def test_a_broker_that_denies_what_is_deprecated(
    open_layer: OpenLayer, private_broker_factory: Callable[..., PrivateBroker]
) -> None:
    broker = await asyncio.to_thread(private_broker_factory)
    version = await asyncio.to_thread(broker.ctl, "version")
    if not version.startswith("3."):
        await asyncio.to_thread(broker.stop)
        broker = await asyncio.to_thread(private_broker_factory, config=_STRICT)
    sender = await open_layer(host=broker.url, normal_channels=True)
    receiver = await open_layer(host=broker.url, normal_channels=True)
    waiting = asyncio.create_task(numbers(receiver, 5))
    for n in range(5):
        await sender.send("jobs", job(n))
    assert await waiting == list(range(5))
    # And the rest of the layer:
    channel = await receiver.new_channel()
    await sender.send(channel, {"type": "x"})
    assert await receive(receiver, channel) == {"type": "x"}


async def test_an_alarm(open_layer: OpenLayer, own_broker: PrivateBroker) -> None:
    """Also the first message, for which there is no queue yet, is refused at once."""
    bystander = await open_layer(host=own_broker.url)
    await bystander.connect()  # The broker is asked whether it has blocked a connection.
    layer = await open_layer(host=own_broker.url, normal_channels=True, operation_timeout=30)
    await asyncio.to_thread(own_broker.raise_memory_alarm)
    try:
        for _ in range(3):
            with pytest.raises(ChannelFull, match="RabbitMQ takes no messages"):
                await asyncio.wait_for(layer.send("jobs", job(0)), 15)
    finally:
        await asyncio.to_thread(own_broker.end_memory_alarm)
    await until(lambda: not statistics_of(layer).is_blocked)
    await layer.send("jobs", job(1))
    assert await numbers(layer, 1) == [1]


# Users


@pytest.fixture
def of_user(open_layer: OpenLayer, user: User) -> OpenLayer:
    async def open_one(**config: Any) -> RabbitmqChannelLayer:
        return await open_layer(
            host=user.url, groups_exchange="groups", normal_channels=True, **config
        )

    return open_one


async def test_the_permissions_of_the_manual(of_user: OpenLayer, user: User) -> None:
    user.allow(EVERYTHING)
    receiver = await of_user()
    await receiver.send("jobs", job(0))
    assert await numbers(receiver, 1) == [0]


async def test_a_process_that_only_sends(of_user: OpenLayer, user: User) -> None:
    own = r"^(groups|crq\.channel\..*)$"
    user.allow((own, own, "^groups$"))
    await (await of_user()).send("jobs", job(0))
    assert await ready_messages(user.admin_url, _QUEUE.format("groups")) == 1


async def test_a_user_who_may_not_declare_it(
    of_user: OpenLayer, user: User, lines: LogLines
) -> None:
    """Senders are told. What an operator has declared is used as it is."""
    user.allow(("^groups$", r"^(groups|crq\.channel\..*)$", ".*"))
    layer = await of_user()
    with pytest.raises(BrokerUnavailable, match=r"RabbitMQ refused to declare the queue .* 403 "):
        await layer.send("jobs", job(0))
    queue = _QUEUE.format("groups")
    await asyncio.to_thread(call_as_admin, user, "queue_declare", queue, durable=True)
    await layer.send("jobs", job(1))
    assert "ACCESS_REFUSED" in await lines.next("the queue of the normal channel jobs is used as")
    assert await numbers(layer, 1) == [1]


async def test_a_user_who_may_not_read_it(of_user: OpenLayer, user: User, lines: LogLines) -> None:
    """A receiver waits until it may; the log says why; nothing else is disturbed."""
    user.allow((".*", ".*", r"^(groups|crq\.(?!channel).*)$"))
    layer = await of_user()
    await layer.send("jobs", job(0))
    waiting = asyncio.create_task(numbers(layer, 1))
    line = await lines.next("RabbitMQ refuses to let the normal channel jobs be received from")
    assert "403 ACCESS_REFUSED" in line
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "x"})
    assert await receive(layer, channel) == {"type": "x"}
    assert statistics_of(layer).subscriber.reconnects == 0
    assert statistics_of(layer).normal_channels.reconnects == 0
    user.allow((".*", ".*", ".*"))
    assert await asyncio.wait_for(waiting, 20) == [0]


async def test_a_refused_channel_leaves_another_its_consumer(
    of_user: OpenLayer, user: User, lines: LogLines
) -> None:
    user.allow((".*", ".*", r"^(groups|crq\.(?!channel\.groups:forbidden).*)$"))
    layer = await of_user()
    await layer.send("forbidden", job(0))
    waiting = [asyncio.create_task(layer.receive(name)) for name in ("jobs", "forbidden")]
    await lines.next("be received from: ")
    assert await consumer_tags(user) == ["1.jobs"]  # its first one
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


async def consumer_tags(user: User) -> list[str]:
    """Return the tags of the consumers of normal channels' queues."""
    listing = await asyncio.to_thread(
        user.broker.ctl, "list_consumers", "-p", user.vhost, "queue_name", "consumer_tag"
    )
    rows = [line.split() for line in listing.splitlines()]
    return [tag for queue, tag in rows if queue.startswith("crq.channel.")]


async def test_a_refused_channel_holds_up_no_other(
    of_user: OpenLayer, user: User, lines: LogLines
) -> None:
    """Neither one that may not be read, nor one for whose queue there is no room."""
    names = r"^(groups|crq\.(?!channel\.groups:forbidden).*)$"
    user.allow((".*", ".*", names))
    layer = await of_user()
    await layer.send("forbidden", job(0))
    await layer.send("jobs", job(0))
    await asyncio.to_thread(
        user.broker.ctl, "set_vhost_limits", "-p", user.vhost, '{"max-queues": 0}'
    )
    refused = [asyncio.create_task(layer.receive(name)) for name in ("forbidden", "no-room")]
    for _ in range(2):  # in either order
        await lines.next("be received from: ")
    for n in range(200):
        assert await numbers(layer, 1) == [n]
        await layer.send("jobs", job(n + 1))
    assert statistics_of(layer).normal_channels.reconnects == 0
    warnings = [line for line in lines.all if "be received from" in line]
    assert len(warnings) == 2
    assert any("queue limit" in line for line in warnings)
    await asyncio.to_thread(user.broker.ctl, "clear_vhost_limits", "-p", user.vhost)
    user.allow((".*", ".*", ".*"))
    assert await asyncio.wait_for(refused[0], 20) == job(0)
    refused[1].cancel()
    await asyncio.wait(refused)
