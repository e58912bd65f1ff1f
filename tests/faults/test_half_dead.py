"""Connections that look well and do nothing: left on what is heard from the broker, not on time.

Measured figures go to the log (``pytest --log-cli-level=INFO``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pamqp.commands
import pytest
from channels.exceptions import ChannelFull
from pamqp.heartbeat import Heartbeat

from channels_rabbitmq._amqp import heartbeat, publishing
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_proxy import TO_BROKER, TO_CLIENT, AmqpProxy
from tests.support.layers import statistics_of, subscriber_of
from tests.support.lengths import Length
from tests.support.log_lines import LogLines, log_lines
from tests.support.patience import connect_patiently
from tests.support.traffic import Books, Traffic
from tools.private_broker import PrivateBroker

# They inject real faults.
pytestmark = pytest.mark.slow

figures = logging.getLogger("figures")

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}

# Seconds: heartbeats, at full length the default. How long an outage lasts that is no reason to
# reconnect. How long calls may wait.
_HEARTBEAT = Length(full=20.0, brief=2.0)
_FREEZE = Length(full=14.0, brief=2.5)
# One by which so long a silence isn't death, half an interval before it included
_PATIENT_HEARTBEAT = Length(full=20.0, brief=4.0)
_TIMEOUT = Length(full=10.0, brief=1.0)
_WATCHDOG_INTERVAL = Length(full=30.0, brief=1.0)
# Seconds by which a busy machine may be late.
_GRACE = 5.0

ALARM = ("set_vm_memory_high_watermark", "0.00000001")
ALL_CLEAR = ("set_vm_memory_high_watermark", "0.8")


@pytest.fixture
def lines() -> Iterator[LogLines]:
    with log_lines() as lines:
        yield lines
        assert not [line for line in lines.rest() if "Traceback" in line]


def config(url: str, heartbeat: Length = _HEARTBEAT, **options: Any) -> dict[str, Any]:
    return {
        "host": f"{url}?heartbeat={heartbeat.count}",
        "operation_timeout": _TIMEOUT.value,
        **options,
    }


async def suspend(broker: PrivateBroker, which: str) -> None:
    """Have the broker's processes for such AMQP channels hang; ``which`` is in Erlang, of ``I``."""
    found = await asyncio.to_thread(
        broker.ctl,
        "eval",
        "length([sys:suspend(P) || P <- rabbit_channel:list(), "
        "I <- [maps:from_list(rabbit_channel:info(P, [confirm, consumer_count, connection]))], "
        f"{which}]).",
    )
    assert int(found.split()[-1]) > 0, "nothing was suspended"


PUBLISHES = "maps:get(confirm, I)"
BINDS = "not maps:get(confirm, I), maps:get(consumer_count, I) =:= 0"


async def test_an_amqp_channel_for_publishing_that_hangs_is_replaced(
    open_layer: OpenLayer, private_broker: PrivateBroker, lines: LogLines
) -> None:
    layer = await open_layer(**config(private_broker.url))
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    await layer.group_send("g", MESSAGE)
    await suspend(private_broker, PUBLISHES)
    begun_at = time.monotonic()
    await layer.group_send("g", {"type": "test.unknown"})
    assert "it is alive" in await lines.next("WARNING publisher .*: lost", timeout=60)
    noticed = time.monotonic() - begun_at
    await lines.next("WARNING publisher .*: connected again")
    figures.info("hang of an AMQP channel, heartbeat %d s: %.1f s", _HEARTBEAT.count, noticed)
    assert noticed < 2 * _HEARTBEAT.value + _GRACE
    await layer.group_send("g", {"n": 2})
    assert await layer.receive(channel) == MESSAGE
    assert await asyncio.wait_for(layer.receive(channel), 10) == {"n": 2}
    (statistics,) = layer.statistics()
    assert statistics.subscriber.reconnects == 0
    assert statistics.counters.outcome_unknown == 1


async def test_an_amqp_channel_for_binds_that_hangs_is_replaced(
    open_layer: OpenLayer, private_broker: PrivateBroker, lines: LogLines
) -> None:
    layer = await open_layer(**config(private_broker.url))
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    await suspend(private_broker, BINDS)
    begun_at = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        await layer.group_add("h", channel)
    assert "it is alive" in await lines.next("WARNING subscriber .*: lost", timeout=60)
    noticed = time.monotonic() - begun_at
    assert noticed < 2 * _HEARTBEAT.value + _GRACE
    await lines.next("WARNING subscriber .*: connected again")
    await layer.group_add("h", channel)
    for group in "gh":
        await layer.group_send(group, {"to": group})
        assert await asyncio.wait_for(layer.receive(channel), 10) == {"to": group}
    (statistics,) = layer.statistics()
    assert statistics.publisher.reconnects == 0


async def freeze_and_thaw(broker: PrivateBroker) -> None:
    await asyncio.to_thread(broker.freeze)
    try:
        await asyncio.sleep(_FREEZE.value)
    finally:
        broker.thaw()


async def send_while_frozen(
    broker: PrivateBroker, sender: RabbitmqChannelLayer, receiver: RabbitmqChannelLayer
) -> Books:
    """Send before, while and after the broker is frozen: nothing is lost, and none reconnects."""
    async with Traffic(sender, receiver, channels=50, rate=100) as traffic:
        await traffic.flows()
        await freeze_and_thaw(broker)
        await traffic.flows()
        await traffic.finish()
    for layer in (sender, receiver):
        statistics = statistics_of(layer)
        assert statistics.publisher.reconnects == statistics.subscriber.reconnects == 0
    assert traffic.books.lost() == []
    return traffic.books


async def test_a_frozen_broker_is_waited_for(
    open_layer: OpenLayer, fault_broker: PrivateBroker
) -> None:
    """Calls run out of time, and the watchdog's message stays out: neither is a reason."""
    watchdog_interval = _TIMEOUT.value / 4
    options = config(fault_broker.url, _PATIENT_HEARTBEAT, watchdog_interval=watchdog_interval)
    sender, receiver = await open_layer(**options), await open_layer(**options)
    books = await send_while_frozen(fault_broker, sender, receiver)
    figures.info("frozen for %g s: %s", _FREEZE.value, books.summary())
    assert statistics_of(sender).counters.outcome_unknown > 0, "it was not frozen for long enough"
    assert books.twice() == []


async def test_a_frozen_broker_does_not_make_a_silent_process_reconnect(
    open_layer: OpenLayer, fault_broker: PrivateBroker, lines: LogLines
) -> None:
    """It is the watchdog that waits for its message, again and again."""
    options = config(fault_broker.url, _PATIENT_HEARTBEAT, watchdog_interval=0.1)
    layer = await open_layer(**options)
    await layer.new_channel()
    await layer.connect()
    for _ in range(3):
        await freeze_and_thaw(fault_broker)
        delivered = layer.statistics()[0].counters.delivered
        while layer.statistics()[0].counters.delivered == delivered:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.05)
    assert not [line for line in lines.rest() if "lost" in line]


async def test_confirms_that_stay_out_are_noticed(
    open_layer: OpenLayer, broker: Any, lines: LogLines
) -> None:
    """One message is enough, however short the time that its call had."""
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(**config(proxy.url, operation_timeout=1))
        await connect_patiently(layer)
        await layer.group_send("g", MESSAGE)
        rule = proxy.drop(TO_CLIENT, pamqp.commands.Basic.Ack, name="publisher")
        heard = proxy.count(TO_CLIENT, Heartbeat)
        await layer.group_send("g", MESSAGE)
        assert "it is alive" in await lines.next("WARNING publisher .*: lost", timeout=60)
        assert proxy.count(TO_CLIENT, Heartbeat) - heard >= 2
        proxy.remove(rule)
        await lines.next("WARNING publisher .*: connected again")
        await layer.group_send("g", MESSAGE)
        (statistics,) = layer.statistics()
        assert statistics.counters.outcome_unknown == 1
        assert statistics.publisher.reconnects == 1


async def test_a_queue_that_hangs_is_not_the_publisher_s_fault(
    open_layer: OpenLayer, private_broker: PrivateBroker, lines: LogLines
) -> None:
    """Its messages are not confirmed; the ping, which goes to no queue, is."""
    sender = await open_layer(**config(private_broker.url, watchdog_interval=0))
    receiver = await open_layer(**config(private_broker.url, watchdog_interval=0.5))
    await receiver.connect()  # A message may come before that.
    channel = await receiver.new_channel()
    await sender.send(channel, MESSAGE)
    assert await receiver.receive(channel) == MESSAGE
    queue = subscriber_of(receiver).queue
    await asyncio.to_thread(
        private_broker.ctl,
        "eval",
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{queue}">>)), '
        "sys:suspend(amqqueue:get_pid(Q)).",
    )
    await sender.send(channel, {"type": "test.unknown"})
    # The receiver can't hear anything any more, and finds out.
    assert "nothing arrives" in await lines.next("WARNING subscriber .*: lost", timeout=60)
    await lines.next("WARNING subscriber .*: connected again")
    await sender.send(channel, {"n": 2})
    assert await asyncio.wait_for(receiver.receive(channel), 10) == {"n": 2}
    for layer in (sender, receiver):
        assert layer.statistics()[0].publisher.reconnects == 0


async def test_the_end_of_an_alarm_is_noticed_though_its_word_is_lost(
    open_layer: OpenLayer,
    fault_broker: PrivateBroker,
    lines: LogLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing, "BLOCKED_BEFORE_PING", _TIMEOUT.value + 1)
    async with AmqpProxy(fault_broker.url) as proxy:
        layer = await open_layer(**config(proxy.url))
        await layer.group_send("g", MESSAGE)
        proxy.drop(TO_CLIENT, pamqp.commands.Connection.Unblocked)
        try:
            await asyncio.to_thread(fault_broker.ctl, *ALARM)
            await layer.group_send("g", MESSAGE)  # which nobody reads
            assert layer.statistics()[0].is_blocked
            published = proxy.count(TO_BROKER, pamqp.commands.Basic.Publish)
            # Long enough for a dozen pings, if one didn't wait for the other.
            await asyncio.sleep(3 * _HEARTBEAT.value)
            with pytest.raises(ChannelFull):
                await layer.send("crq.aaaaaaaaaaaaaaaa!a", MESSAGE)
            assert layer.statistics()[0].is_blocked
            assert layer.statistics()[0].unconfirmed == 0
            assert proxy.count(TO_BROKER, pamqp.commands.Basic.Publish) == published + 1
        finally:
            await asyncio.to_thread(fault_broker.ctl, *ALL_CLEAR)
        await lines.next("WARNING publisher .*: RabbitMQ takes messages again")
        confirmed = layer.statistics()[0].counters.confirmed
        await layer.group_send("g", MESSAGE)
        assert layer.statistics()[0].counters.confirmed == confirmed + 1
        assert proxy.opened == 1
        assert proxy.count(TO_CLIENT, pamqp.commands.Connection.Unblocked) == 1


# Without heartbeats


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """In brief; at full length a dead connection is noticed within 100 s."""
    if _HEARTBEAT.value < 20:
        monkeypatch.setattr(heartbeat, "INTERVAL_WITHOUT_HEARTBEATS", 1.0)
        monkeypatch.setattr(heartbeat, "ANSWER_TIMEOUT_WITHOUT_HEARTBEATS", 4.0)


@pytest.mark.usefixtures("impatient")
async def test_without_heartbeats_a_dead_connection_is_noticed(
    open_layer: OpenLayer, broker: Any, lines: LogLines
) -> None:
    """A firewall has forgotten all of them, and says nothing."""
    async with AmqpProxy(broker.url) as proxy:
        receiver = await open_layer(
            host=f"{proxy.url}?heartbeat=0",
            operation_timeout=_TIMEOUT.value,
            watchdog_interval=_WATCHDOG_INTERVAL.value,
        )
        channel = await receiver.new_channel()
        await receiver.connect()
        proxy.vanish()
        vanished_at = time.monotonic()
        for _ in range(2):
            assert "for too long" in await lines.next("WARNING .*: lost", timeout=100)
        noticed = time.monotonic() - vanished_at
        figures.info("no heartbeats, and all connections dead: noticed after %.1f s", noticed)
        await receiver.connect()
        sender = await open_layer()
        await sender.send(channel, MESSAGE)
        assert await asyncio.wait_for(receiver.receive(channel), 10) == MESSAGE


@pytest.mark.usefixtures("impatient")
async def test_without_heartbeats_a_frozen_broker_is_waited_for_a_while(
    open_layer: OpenLayer, fault_broker: PrivateBroker
) -> None:
    url = f"{fault_broker.url}?heartbeat=0"
    options = {"host": url, "operation_timeout": _TIMEOUT.value, "watchdog_interval": 0.5}
    sender, receiver = await open_layer(**options), await open_layer(**options)
    await send_while_frozen(fault_broker, sender, receiver)


@pytest.mark.parametrize("query", ["", "?heartbeat=0"])
async def test_a_long_alarm_is_no_reason_to_reconnect(
    open_layer: OpenLayer, fault_broker: PrivateBroker, query: str, impatient: None
) -> None:
    """A broker that doesn't read would keep each connection."""
    url = fault_broker.url + (query or f"?heartbeat={_HEARTBEAT.count}")
    layer = await open_layer(
        host=url, operation_timeout=_TIMEOUT.value, watchdog_interval=_WATCHDOG_INTERVAL.value
    )
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    await layer.connect()
    connections = len(await asyncio.to_thread(fault_broker.list_connections))
    try:
        await asyncio.to_thread(fault_broker.ctl, *ALARM)
        ends_at = time.monotonic() + 3 * _HEARTBEAT.value
        while time.monotonic() < ends_at:
            await layer.group_send("g", MESSAGE)
            await asyncio.sleep(0.1)
        assert len(await asyncio.to_thread(fault_broker.list_connections)) == connections
        (statistics,) = layer.statistics()
        assert statistics.is_blocked
        assert statistics.publisher.reconnects == statistics.subscriber.reconnects == 0
    finally:
        await asyncio.to_thread(fault_broker.ctl, *ALL_CLEAR)


# What it costs when nothing is wrong


@pytest.mark.parametrize("interval", [0.5, 0])
async def test_the_watchdog_sends_a_message_an_interval(
    open_layer: OpenLayer, broker: Any, interval: float
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url, watchdog_interval=interval)
        await layer.new_channel()
        await layer.group_count("g")  # It has greeted others, and heard its own greeting.
        published = proxy.count(TO_BROKER, pamqp.commands.Basic.Publish)
        delivered = proxy.count(TO_CLIENT, pamqp.commands.Basic.Deliver)
        await asyncio.sleep(3.2)
        messages = proxy.count(TO_BROKER, pamqp.commands.Basic.Publish) - published
        assert messages <= 3.2 / interval if interval else messages == 0
        assert messages >= 3 if interval else True
        assert proxy.count(TO_CLIENT, pamqp.commands.Basic.Deliver) - delivered == messages
