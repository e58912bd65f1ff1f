"""An operator's policy may give exchanges an alternate one: a catch-all, which may be full."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support import manual
from tests.support.amqp_proxy import AmqpProxy
from tests.support.layers import publisher_of
from tests.support.log_lines import LogLines
from tests.support.members import reconnect
from tests.support.users import EVERYTHING, User, call_as_admin

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

pytestmark = pytest.mark.slow  # a broker starts

MESSAGE = {"type": "test.message"}
CATCH_ALL = "catch-all"
FULL = {"x-max-length": 0, "x-overflow": "reject-publish"}
WARNING = "isn't noticed: the exchange '.*' has an alternate exchange"


async def catch(user: User, pattern: str, arguments: dict[str, Any]) -> None:
    """Have a queue take what exchanges of such names route nowhere."""
    call = partial(asyncio.to_thread, call_as_admin, user)
    await call("exchange_declare", CATCH_ALL, "fanout")
    await call("queue_declare", CATCH_ALL, durable=True, arguments=arguments)
    await call("queue_bind", CATCH_ALL, CATCH_ALL)
    definition = f'{{"alternate-exchange":"{CATCH_ALL}"}}'
    words = ("catch", pattern, definition, "--apply-to", "exchanges")
    await asyncio.to_thread(user.broker.ctl, "set_policy", "-p", user.vhost, *words)


async def queues(user: User) -> dict[str, int]:
    """How many messages each holds."""
    rows = await asyncio.to_thread(user.broker.list_queues, "name", "messages", vhost=user.vhost)
    return {row["name"]: row["messages"] for row in rows}


async def must_work(layer: RabbitmqChannelLayer, other: RabbitmqChannelLayer) -> None:
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    for sender in (layer, other):
        for _ in range(5):
            await sender.send(channel, MESSAGE)
            await sender.group_send("g", MESSAGE)
        for _ in range(10):
            assert await asyncio.wait_for(layer.receive(channel), 10) == MESSAGE
    await layer.group_discard("g", channel)


@pytest.mark.parametrize("arguments", [{}, FULL])
@pytest.mark.parametrize("pattern", ["^groups", ".*"])
async def test_it_stops_nobody_and_is_told_once(
    open_layer: OpenLayer,
    user: User,
    lines: LogLines,
    pattern: str,
    arguments: dict[str, Any],
) -> None:
    """Nor does it get a copy of what others get: of each publisher it has the ping."""
    await catch(user, pattern, arguments)
    layer, other = [await open_layer(host=user.admin_url) for _ in range(2)]
    await must_work(layer, other)
    await reconnect(layer)
    publisher_of(layer).supervisor.reconnect("a test wants it so")
    await must_work(layer, other)
    for one in (layer, other):
        statistics = one.statistics()[0]
        assert (
            statistics.counters.nacked,
            statistics.counters.group_nacked,
            statistics.counters.returned,
        ) == (0, 0, 0)
    for role in ("layer", "other"):
        assert await lines.next(f"WARNING publisher .*{WARNING}"), role
    assert len([line for line in lines.all if "alternate exchange" in line]) == 2
    assert (await queues(user))[CATCH_ALL] == (0 if arguments else 3)


async def test_event_loops_of_one_call_tell_it_once(user: User, lines: LogLines) -> None:
    await catch(user, ".*", {})
    layer = RabbitmqChannelLayer(host=user.admin_url)

    def send_thrice() -> None:
        for _ in range(3):
            asyncio.run(layer.group_send("g", MESSAGE))

    await asyncio.to_thread(send_thrice)
    assert len([line for line in lines.all if "alternate exchange" in line]) == 1


async def test_a_full_one_hides_nothing(open_layer: OpenLayer, user: User) -> None:
    """Its nack isn't taken for that of a full queue, which the process would have."""
    await catch(user, ".*", FULL)
    layer, other = [await open_layer(host=user.admin_url) for _ in range(2)]
    await must_work(layer, other)
    channel = await other.new_channel()
    await other.close()
    await layer.send(channel, MESSAGE)
    statistics = layer.statistics()[0]
    assert (statistics.counters.nacked, statistics.counters.unreachable) == (0, 1)


async def test_the_manual_has_a_pattern_that_leaves_out_the_layers(
    open_layer: OpenLayer, user: User, lines: LogLines
) -> None:
    [pattern] = re.findall(r"with the pattern\s+``(\S+)``", manual.TEXT)
    await catch(user, pattern, {})
    layer = await open_layer(host=user.admin_url, groups_exchange="groups")
    await must_work(layer, layer)
    assert not [line for line in lines.all if "alternate exchange" in line]
    assert (await queues(user))[CATCH_ALL] == 0


@pytest.mark.parametrize("arguments", [{}, FULL])
async def test_an_idle_process_keeps_its_connections(
    open_layer: OpenLayer,
    user: User,
    arguments: dict[str, Any],
) -> None:
    await catch(user, ".*", arguments)
    layer = await open_layer(host=user.admin_url, watchdog_interval=0.1)
    await layer.connect()
    while layer.statistics()[0].counters.delivered < 5:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.05)
    assert layer.statistics()[0].subscriber.reconnects == 0
    assert layer.statistics()[0].publisher.reconnects == 0


@pytest.mark.parametrize("arguments", [{}, FULL])
@pytest.mark.parametrize("pattern", ["^groups", ".*"])
async def test_a_process_that_is_away_for_a_moment_is_noticed(
    open_layer: OpenLayer,
    user: User,
    pattern: str,
    arguments: dict[str, Any],
) -> None:
    """Its lease keeps the way to its former queue, so what is sent to it is routed, to nobody."""
    async with AmqpProxy(user.admin_url) as proxy:
        receiver = await open_layer(host=proxy.url)
        sender = await open_layer(host=user.admin_url)
        channel = await receiver.new_channel()
        await receiver.group_add("g", channel)
        await sender.send(channel, MESSAGE)
        await receiver.receive(channel)
        await catch(user, pattern, arguments)
        proxy.refuse()
        proxy.cut()
        id_ = channel.partition("!")[0]
        while id_ in await queues(user):  # noqa: ASYNC110 - nobody tells that it is noticed
            await asyncio.sleep(0.05)
        sending = asyncio.create_task(sender.send(channel, MESSAGE))
        while sender.statistics()[0].counters.returned < 3:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
        assert not sending.done()
        sending.cancel()
        await asyncio.wait([sending])
        assert (await queues(user))[CATCH_ALL] == 0
        await proxy.accept()


async def test_an_exchange_that_is_not_a_direct_one_and_may_not_be_configured(
    open_layer: OpenLayer, user: User, lines: LogLines
) -> None:
    """RabbitMQ doesn't say its type to such a user. Once a queue is bound, it shows."""
    await asyncio.to_thread(call_as_admin, user, "exchange_declare", "groups", "fanout")
    user.allow((r"^crq\..*$", EVERYTHING[1], EVERYTHING[2]))
    layer = await open_layer(host=user.url, groups_exchange="groups")
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    await layer.group_send("g", MESSAGE)
    await lines.next("WARNING publisher .*, or isn't a direct one")
