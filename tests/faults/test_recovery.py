"""What production does to the layer: it comes back by itself and says why it was gone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import carehare
import msgpack
import pamqp.commands
import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_proxy import TO_BROKER, TO_CLIENT, AmqpProxy
from tests.support.layers import statistics_of, subscriber_of
from tests.support.lengths import Length
from tests.support.log_lines import LogLines, log_lines
from tests.support.patience import connect_patiently
from tools.private_broker import PrivateBroker

# They inject real faults.
pytestmark = pytest.mark.slow

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}

# Seconds: the options watchdog_interval and heartbeat, at full length the defaults; and within how
# many a deaf queue is to be noticed.
_WATCHDOG_INTERVAL = Length(full=30.0, brief=1.0)
_HEARTBEAT = Length(full=20.0, brief=1.0)
_NOTICED = Length(full=80.0, brief=30.0)


@pytest.fixture
def lines() -> Iterator[LogLines]:
    with log_lines() as lines:
        yield lines
        assert not [line for line in lines.rest() if "Traceback" in line]


class Pair:
    """A sender and a receiver, which has members in many groups and two receive() calls waiting."""

    GROUPS = 300

    def __init__(self, sender: RabbitmqChannelLayer, receiver: RabbitmqChannelLayer) -> None:
        self.sender = sender
        self.receiver = receiver
        self.waiting: dict[str, asyncio.Task[dict[str, Any]]] = {}

    async def prepare(self) -> None:
        self.direct_channel = await self.receiver.new_channel()
        self.group_channel = await self.receiver.new_channel()
        await asyncio.gather(
            *(self.receiver.group_add(f"g{n}", self.group_channel) for n in range(self.GROUPS))
        )
        self.wait_on_both()
        await self.must_deliver()

    def wait_on_both(self) -> None:
        for channel in (self.direct_channel, self.group_channel):
            self.waiting[channel] = asyncio.create_task(self.receiver.receive(channel))

    async def must_deliver(self) -> None:
        """Calls of receive() that waited all the time get the next message, from every group."""
        await asyncio.wait_for(self._deliver_direct(), 45)
        await asyncio.wait_for(self._deliver_to_groups(), 45)
        self.wait_on_both()

    async def _deliver_direct(self) -> None:
        waiting = self.waiting[self.direct_channel]
        while not waiting.done():
            # What was written when the connection broke may be lost: at most once.
            try:
                await self.sender.send(self.direct_channel, MESSAGE)
            except BrokerUnavailable:
                continue
            await asyncio.wait([waiting], timeout=1)
        assert waiting.result() == MESSAGE

    async def _deliver_to_groups(self) -> None:
        first = self.waiting[self.group_channel]
        missing = set(range(self.GROUPS))
        while missing:
            for n in sorted(missing):
                await self.sender.group_send(f"g{n}", {"n": n})
            heard = await self._hear(first)
            while heard is not None:
                missing.discard(heard["n"])
                heard = await self._hear(None)
            first = asyncio.create_task(self.receiver.receive(self.group_channel))
        first.cancel()
        await asyncio.wait([first])

    async def _hear(self, task: asyncio.Task[dict[str, Any]] | None) -> dict[str, Any] | None:
        if task is None:
            task = asyncio.create_task(self.receiver.receive(self.group_channel))
        await asyncio.wait([task], timeout=0.5)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait([task])
        return None

    async def end(self) -> None:
        for task in self.waiting.values():
            task.cancel()
        await asyncio.wait(self.waiting.values())


@pytest.fixture
async def pair(open_layer: OpenLayer, private_broker: PrivateBroker) -> Any:
    config: dict[str, Any] = {"host": private_broker.url, "remote_capacity": 1000}
    pair = Pair(await open_layer(**config), await open_layer(**config))
    await pair.prepare()
    yield pair
    await pair.end()


async def test_connections_closed_by_force(
    pair: Pair, private_broker: PrivateBroker, lines: LogLines
) -> None:
    for _ in range(3):
        await asyncio.to_thread(private_broker.close_all_connections, "for a test")
        assert "320 CONNECTION_FORCED" in await lines.next("WARNING subscriber .*: lost")
        await pair.must_deliver()


async def test_broker_killed_and_started_again(
    pair: Pair, private_broker: PrivateBroker, lines: LogLines
) -> None:
    await asyncio.to_thread(private_broker.kill)
    await lines.next("WARNING subscriber .*: lost")
    await lines.next("WARNING subscriber .*: cannot connect")
    await asyncio.to_thread(private_broker.start)
    await pair.must_deliver()
    assert not [line for line in lines.rest() if re.search("subscriber .*: cannot connect", line)]


async def test_broker_application_stopped_and_started(
    pair: Pair, private_broker: PrivateBroker, lines: LogLines
) -> None:
    await asyncio.to_thread(private_broker.ctl, "stop_app")
    await lines.next("WARNING subscriber .*: lost")
    await asyncio.to_thread(private_broker.ctl, "start_app")
    await pair.must_deliver()


async def test_queue_deleted_underneath(
    pair: Pair, private_broker: PrivateBroker, lines: LogLines
) -> None:
    queue = subscriber_of(pair.receiver).queue
    await asyncio.to_thread(delete_queue, private_broker, queue)
    assert "queue is gone" in await lines.next("WARNING subscriber .*: lost")
    await pair.must_deliver()


def delete_queue(broker: PrivateBroker, queue: str) -> None:
    """By the broker itself: nobody else may touch an exclusive queue."""
    broker.ctl(
        "eval",
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{queue}">>)), '
        'rabbit_amqqueue:delete(Q, false, false, <<"tests">>).',
    )


async def test_groups_exchange_deleted_underneath(
    pair: Pair, groups_exchange: str, lines: LogLines
) -> None:
    # A process that publishes notices at once. (For one that doesn't there is the probe, below.)
    await pair.receiver.group_send("warm-up", MESSAGE)
    await delete_exchange(pair.sender, groups_exchange)
    await pair.receiver.group_send("g0", MESSAGE)
    assert "404 NOT_FOUND" in await lines.next("WARNING publisher .*: lost")
    assert "exchange was deleted" in await lines.next("WARNING subscriber .*: lost")
    await pair.must_deliver()


async def delete_exchange(layer: RabbitmqChannelLayer, name: str) -> None:
    connection = await layer.carehare_connection
    await connection._channels.rpc(pamqp.commands.Exchange.Delete(exchange=name, nowait=True))


async def test_a_binding_deleted_underneath_is_found_by_the_probe(
    open_layer: OpenLayer,
    groups_exchange: str,
    lines: LogLines,
) -> None:
    sender, receiver = await open_layer(), await open_layer(watchdog_interval=0.1)
    channel = await receiver.new_channel()
    await receiver.group_add("g", channel)
    await sender.group_send("g", MESSAGE)
    assert await receiver.receive(channel) == MESSAGE
    await delete_exchange(sender, groups_exchange)
    await sender.group_send("other", MESSAGE)  # its Publisher declares the exchange again
    assert "binding" in await lines.next("WARNING subscriber .*: lost")
    await lines.next("WARNING subscriber .*: connected again")
    await receiver.group_add("g", channel)
    await sender.group_send("g", {"n": 2})
    assert await receiver.receive(channel) == {"n": 2}


def watchful(url: str) -> dict[str, Any]:
    return {
        "host": f"{url}?heartbeat={_HEARTBEAT.count}",
        "watchdog_interval": _WATCHDOG_INTERVAL.value,
    }


async def test_deliveries_that_stop_without_a_word_are_found_by_the_probe(
    open_layer: OpenLayer, broker: Any, lines: LogLines
) -> None:
    """As after a failover in a cluster, when the broker has forgotten the consumer."""
    async with AmqpProxy(broker.url) as proxy:
        sender, receiver = await open_layer(), await open_layer(**watchful(proxy.url))
        channel = await receiver.new_channel()
        await receiver.group_add("g", channel)
        await sender.send(channel, MESSAGE)
        assert await receiver.receive(channel) == MESSAGE
        waiting = asyncio.create_task(receiver.receive(channel))
        rule = proxy.drop(TO_CLIENT, pamqp.commands.Basic.Deliver)
        await sender.send(channel, {"swallowed": True})
        swallowed_at = asyncio.get_running_loop().time()
        line = await lines.next("WARNING subscriber .*: lost", timeout=_NOTICED.value)
        noticed = asyncio.get_running_loop().time() - swallowed_at
        assert "nothing arrives" in line
        proxy.remove(rule)
        await lines.next("WARNING subscriber .*: connected again")
        await sender.send(channel, {"n": 2})
        # The very call that waited all the time.
        assert await asyncio.wait_for(waiting, 10) == {"n": 2}
        await receiver.group_add("g", channel)
        await sender.group_send("g", {"n": 3})
        assert await asyncio.wait_for(receiver.receive(channel), 10) == {"n": 3}
    assert noticed < _NOTICED.value


async def test_a_queue_that_vanished_without_a_word_is_found_by_the_probe(
    open_layer: OpenLayer, private_broker: PrivateBroker, lines: LogLines
) -> None:
    async with AmqpProxy(private_broker.url) as proxy:
        sender = await open_layer(host=private_broker.url)
        receiver = await open_layer(**watchful(proxy.url), local_capacity=1)
        channel = await receiver.new_channel()
        # No probe while it is unread: one that goes down with the queue is confirmed, not returned.
        await sender.send(channel, MESSAGE)
        await lines.next("all of local_capacity is in use")
        # The word would be this.
        proxy.drop(TO_CLIENT, pamqp.commands.Basic.Cancel)
        queue = subscriber_of(receiver).queue
        await asyncio.to_thread(delete_queue, private_broker, queue)
        vanished_at = asyncio.get_running_loop().time()
        assert await receiver.receive(channel) == MESSAGE
        waiting = asyncio.create_task(receiver.receive(channel))
        line = await lines.next("WARNING subscriber .*: lost", timeout=_NOTICED.value)
        noticed = asyncio.get_running_loop().time() - vanished_at
        assert "a binding of the queue is gone" in line
        await lines.next("WARNING subscriber .*: connected again")
        assert proxy.count(TO_CLIENT, pamqp.commands.Basic.Cancel) == 1
        await sender.send(channel, {"n": 2})
        assert await asyncio.wait_for(waiting, 10) == {"n": 2}
    assert noticed < _NOTICED.value


async def test_refused_set_up_is_told_and_tried_again_until_it_works(
    open_layer: OpenLayer, broker: Any, groups_exchange: str, lines: LogLines
) -> None:
    """Without leaving connections behind: of 4.x each attempt's stayed open, one a second."""
    operator = await open_layer()
    connection = await operator.carehare_connection
    await connection.exchange_declare(groups_exchange, exchange_type="topic")
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url)
        with pytest.raises(BrokerUnavailable, match="406 PRECONDITION_FAILED"):
            await layer.group_send("g", MESSAGE)
        channel = await layer.new_channel()
        with pytest.raises(BrokerUnavailable, match="406 PRECONDITION_FAILED"):
            await layer.group_add("g", channel)
        warnings = [line for line in lines.rest() if "WARNING" in line]
        assert len(warnings) == 2, "one for each connection"
        await proxy.until(lambda: proxy.opened > 4)
        await proxy.until(lambda: len(proxy.links) <= 2)

        await delete_exchange(operator, groups_exchange)
        for _ in range(2):  # group_add() needs both: the publisher greets other processes
            await lines.next("WARNING .*: connected to .* after")
        await layer.group_add("g", channel)
        await layer.group_send("g", MESSAGE)
        assert await layer.receive(channel) == MESSAGE
        assert len(proxy.links) == 2


_SET_UP = [
    pamqp.commands.Connection.StartOk,
    pamqp.commands.Connection.TuneOk,
    pamqp.commands.Connection.Open,
    pamqp.commands.Channel.Open,
    pamqp.commands.Exchange.Declare,
    pamqp.commands.Queue.Declare,
    pamqp.commands.Queue.Bind,
    pamqp.commands.Exchange.Bind,
    pamqp.commands.Basic.Qos,
    pamqp.commands.Basic.Consume,
    pamqp.commands.Confirm.Select,
    pamqp.commands.Basic.Publish,
]


@pytest.mark.parametrize("step", _SET_UP, ids=lambda step: step.name)
async def test_a_connection_lost_at_any_step_of_the_set_up_is_replaced(
    open_layer: OpenLayer, broker: Any, lines: LogLines, step: type
) -> None:
    """4.x was dead for good when it was lost while the queue was declared."""
    async with AmqpProxy(broker.url) as proxy:
        proxy.rule(TO_BROKER, step, lambda frame: frame.link.cut(reset=True), times=2)
        layer = await open_layer(host=proxy.url)
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        await layer.group_send("g", MESSAGE)
        assert await asyncio.wait_for(layer.receive(channel), 10) == MESSAGE
        # Each step was cut twice; nothing is left of those connections.
        assert proxy.opened == 4
        assert len(proxy.links) == 2
        warnings = [line for line in lines.rest() if "WARNING" in line]
        failed = [line for line in warnings if "cannot connect" in line]
        over = [line for line in warnings if ": connected to" in line]
        assert 1 <= len(failed) <= 2
        assert 1 <= len(over) <= 2
        assert len(warnings) == len(failed) + len(over)


async def test_what_is_in_memory_when_the_connection_is_lost_arrives_and_takes_no_room(
    open_layer: OpenLayer, broker: Any, lines: LogLines
) -> None:
    """4.x went on counting it, and was dead for good over the next connection's messages."""
    async with AmqpProxy(broker.url) as proxy:
        sender = await open_layer()
        receiver = await open_layer(host=proxy.url, local_capacity=2)
        channel = await receiver.new_channel()
        for n in range(6):
            if n in (2, 4):
                assert statistics_of(receiver).unacked == 2  # all of local_capacity
                proxy.cut(name="subscriber")
                await lines.next("WARNING subscriber .*: lost")
                await lines.next("WARNING subscriber .*: connected again")
            delivered = proxy.count(TO_CLIENT, pamqp.commands.Basic.Deliver)
            await sender.send(channel, {"n": n})
            await proxy.seen(TO_CLIENT, pamqp.commands.Basic.Deliver, delivered + 1)
            while statistics_of(receiver).counters.delivered <= n:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0)
        assert [(await receiver.receive(channel))["n"] for _ in range(6)] == list(range(6))
        await sender.send(channel, {"n": 6})
        assert await asyncio.wait_for(receiver.receive(channel), 10) == {"n": 6}
        assert statistics_of(receiver).unacked == 0


async def test_foreign_bodies_are_counted_logged_and_forgotten(
    open_layer: OpenLayer, groups_exchange: str, lines: LogLines
) -> None:
    layer = await open_layer(local_capacity=2)
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    connection = await layer.carehare_connection
    for body in (b"", b"\xc1", b"junk", b"\x80", b"\x81\xa1a\x01", b"\x93\x01\x02\x03"):
        await connection.publish(body, exchange_name=groups_exchange, routing_key="g")
    await layer.group_send("g", MESSAGE)
    assert await layer.receive(channel) == MESSAGE
    assert statistics_of(layer).counters.malformed == 6
    assert "6 messages dropped: not in this layer's format" in await lines.next("WARNING")


async def test_names_that_others_chose_forge_no_log_line(
    open_layer: OpenLayer, groups_exchange: str, lines: LogLines
) -> None:
    layer = await open_layer()
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    connection = await layer.carehare_connection
    own = channel.partition("!")[0]
    for name in ("other!\nERROR:root:forged" + "x" * 3000, own + "!\n" + "y" * 3000):
        body = msgpack.packb({"__asgi_channel__": name})
        await connection.publish(body, exchange_name=groups_exchange, routing_key="g")
    line = await lines.next("2 messages dropped: for channels of another process")
    assert len(line) < 600
    assert "\n" not in line
    assert statistics_of(layer).buffered == 0


async def test_corrupt_bytes_from_the_broker(
    open_layer: OpenLayer, broker: Any, lines: LogLines
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        sender, receiver = await open_layer(), await open_layer(host=proxy.url)
        channel = await receiver.new_channel()
        await receiver.group_add("g", channel)
        for junk in (b"\x01\x00\x01\x00\x00\x00\x04junk\x00", b"\xff" * 100, b"HTTP/1.1 400\r\n"):
            proxy.inject(junk)
            await lines.next("WARNING subscriber .*: lost")
            await lines.next("WARNING subscriber .*: connected again")
            await receiver.group_add("g", channel)
            await sender.group_send("g", MESSAGE)
            assert await asyncio.wait_for(receiver.receive(channel), 10) == MESSAGE


async def test_what_is_in_flight_when_the_connection_breaks_counts_as_unknown(
    open_layer: OpenLayer, broker: Any, lines: LogLines
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url)
        await layer.group_send("g", MESSAGE)
        acks = proxy.count(TO_CLIENT, pamqp.commands.Basic.Ack)
        rule = proxy.drop(TO_CLIENT, pamqp.commands.Basic.Ack)
        sending = [
            asyncio.create_task(layer.group_send("g", {"secret": "s3cret"})) for _ in range(20)
        ]
        await proxy.seen(TO_CLIENT, pamqp.commands.Basic.Ack, acks + 1)
        proxy.cut()
        proxy.remove(rule)
        await asyncio.wait_for(asyncio.gather(*sending), 10)
        assert statistics_of(layer).counters.outcome_unknown == 20
        line = await lines.next("WARNING crq")
        assert "20 messages written but not confirmed" in line
        await layer.group_send("g", MESSAGE)
        assert not [line for line in lines.rest() if "s3cret" in line]


async def test_a_confirm_that_does_not_come_counts_as_unknown_in_time(
    open_layer: OpenLayer, broker: Any
) -> None:
    async with AmqpProxy(broker.url) as proxy:
        layer = await open_layer(host=proxy.url, operation_timeout=2)
        await connect_patiently(layer)
        await layer.group_send("g", MESSAGE)
        proxy.drop(TO_CLIENT, pamqp.commands.Basic.Ack)
        await asyncio.wait_for(layer.group_send("g", MESSAGE), 10)
        assert statistics_of(layer).counters.outcome_unknown == 1


async def test_publishers_blocked_by_an_alarm(
    open_layer: OpenLayer, private_broker: PrivateBroker, lines: LogLines
) -> None:
    layer = await open_layer(host=private_broker.url, operation_timeout=3)
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    await layer.send(channel, {"before": True})

    await asyncio.to_thread(private_broker.raise_memory_alarm)
    # The broker tells only who publishes: these are written. One caller gives up (of 4.x, that was
    # the end), and the outcome of the other's is unknown.
    impatient = asyncio.create_task(layer.send(channel, {"impatient": True}))
    sending = asyncio.create_task(layer.send(channel, {"during": True}))
    await lines.next("WARNING publisher .*: RabbitMQ blocks publishers")
    impatient.cancel()
    await asyncio.wait([impatient])
    await sending
    assert statistics_of(layer).counters.outcome_unknown == 1
    with pytest.raises(layer.ChannelFull, match="low on memory"):
        await layer.send(channel, {"refused": True})
    await layer.group_send("g", {"refused": True})
    assert statistics_of(layer).counters.blocked == 2
    # Deliveries, acks and binds go on.
    assert await asyncio.wait_for(layer.receive(channel), 10) == {"before": True}
    await layer.group_add("during", channel)
    # A process that connects during the alarm learns of it before it has written a message.
    other = await open_layer(host=private_broker.url)
    with pytest.raises(layer.ChannelFull):
        await other.send(channel, {"refused": True})

    await asyncio.to_thread(private_broker.end_memory_alarm)
    await lines.next("WARNING publisher .*: RabbitMQ takes messages again")
    await lines.next("WARNING publisher .*: RabbitMQ takes messages again")
    await other.send(channel, {"after": True})
    received = []
    while {"after": True} not in received:
        received.append(await asyncio.wait_for(layer.receive(channel), 10))
    assert received == [{"impatient": True}, {"during": True}, {"after": True}]


async def test_user_connection_is_replaced_when_lost(
    open_layer: OpenLayer, private_broker: PrivateBroker
) -> None:
    layer = await open_layer(host=private_broker.url)
    connection = await layer.carehare_connection
    await asyncio.to_thread(private_broker.close_all_connections, "for a test")
    with pytest.raises(carehare.ConnectionClosedByServer):
        await connection.closed
    new = await layer.carehare_connection
    assert new is not connection
    await new.queue_declare("q", exclusive=True)


async def exchanges(broker: PrivateBroker) -> list[str]:
    rows = await asyncio.to_thread(broker.list_exchanges)
    return [row["name"] for row in rows if row["name"].startswith("crq.")]


async def test_nothing_is_left_on_the_broker(
    open_layer: OpenLayer, private_broker: PrivateBroker
) -> None:
    layer = await open_layer(host=private_broker.url)
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    await layer.send(channel, MESSAGE)
    names = {row["name"] for row in await asyncio.to_thread(private_broker.list_queues)}
    id_ = statistics_of(layer).id
    assert names == {id_, f"{id_}.1.lease", f"{id_}.1.requests"}
    await layer.close()
    assert await asyncio.to_thread(private_broker.list_queues) == []
    assert await asyncio.to_thread(private_broker.list_connections) == []
    assert await exchanges(private_broker) == []
