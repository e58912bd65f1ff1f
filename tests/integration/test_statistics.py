"""What ``statistics()`` says is so: each number and state, on a real broker."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import msgpack
import pamqp.commands
import pytest
from asgiref.sync import async_to_sync
from channels.exceptions import ChannelFull, StopConsumer

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.statistics import (
    ConnectionStatistics,
    Counters,
    GroupStatistics,
    LoopLayerStatistics,
    ProcessStatistics,
)
from tests.support.amqp_proxy import TO_BROKER, TO_CLIENT, AmqpProxy
from tests.support.changes import until
from tests.support.layers import (
    close_for_sync_code,
    inside,
    loop_layers_of,
    reconnect_subscriber,
    set_linger,
    set_retry_timeout,
    settings_of,
    statistics_of_id,
)
from tests.support.layers import statistics_of as of
from tests.support.log_lines import log_lines
from tests.support.loop_thread import LoopThread

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}
commands = pamqp.commands

NO_GROUPS = GroupStatistics(required=0, bound=0, lingering=0)


async def receive(layer: RabbitmqChannelLayer, channel: str) -> dict[str, Any]:
    return await asyncio.wait_for(layer.receive(channel), 10)


def published(statistics: LoopLayerStatistics) -> int:
    """What ``published`` should be."""
    counters = statistics.counters
    return (
        counters.confirmed
        + counters.nacked
        + counters.group_nacked
        + counters.returned
        + counters.outcome_unknown
        + counters.cancelled
    )


def enqueued(statistics: LoopLayerStatistics) -> int:
    """What ``enqueued`` should be."""
    counters = statistics.counters
    return (
        counters.consumed
        + counters.expired
        + counters.overflowed
        + statistics.buffered
        + statistics.in_hand_over
    )


def must_have_nothing_left(statistics: LoopLayerStatistics) -> None:
    """No channel, receiver, message or group is there any more."""
    assert statistics.buffered == statistics.in_hand_over == statistics.unacked == 0
    assert statistics.channels == statistics.receivers == statistics.stalled_channels == 0
    assert statistics.unconfirmed == statistics.early_acked_bytes == 0
    assert statistics.groups == NO_GROUPS


class TestWhere:
    def test_nothing_without_a_call(self) -> None:
        layer = RabbitmqChannelLayer()
        assert layer.statistics() == ()
        assert asyncio.run(self.ask(layer)) == ()
        assert loop_layers_of(layer).by_loop == {}

    async def ask(self, layer: RabbitmqChannelLayer) -> tuple[LoopLayerStatistics, ...]:
        return layer.statistics()

    async def test_before_anything_is_connected(self) -> None:
        begun = time.time()
        layer = RabbitmqChannelLayer(local_capacity=7)
        loop_layer = inside(layer)
        statistics = of(layer)
        idle = ConnectionStatistics("idle", statistics.publisher.since, "", 0, "")
        assert begun <= statistics.since <= idle.since <= time.time()
        assert statistics.loop_lag < 1.0
        assert statistics == LoopLayerStatistics(
            id=loop_layer.id,
            pid=os.getpid(),
            host=socket.gethostname(),
            since=statistics.since,
            for_sync_code=False,
            publisher=idle,
            subscriber=dataclasses.replace(idle, since=statistics.subscriber.since),
            carehare_connection=dataclasses.replace(
                idle, since=statistics.carehare_connection.since
            ),
            normal_channels=dataclasses.replace(idle, since=statistics.normal_channels.since),
            counters=Counters(),
            is_blocked=False,
            unconfirmed=0,
            highest_age=0.0,
            loop_lag=statistics.loop_lag,
            loop_late=statistics.loop_late,
            buffered=0,
            in_hand_over=0,
            channels=0,
            receivers=0,
            stalled_channels=0,
            unacked=0,
            local_capacity=7,
            early_acked_bytes=0,
            groups=NO_GROUPS,
            processes=ProcessStatistics(known=0, absent=0),
        )
        await layer.close()

    async def test_it_is_frozen_and_json_takes_it(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        await layer.send(channel, MESSAGE)
        statistics = of(layer)
        with pytest.raises(dataclasses.FrozenInstanceError):
            statistics.buffered = 1  # type: ignore[misc]
        as_dict = dataclasses.asdict(statistics)
        assert json.loads(json.dumps(as_dict)) == as_dict
        assert as_dict["publisher"]["state"] == "connected"
        # A value of its own: what comes later doesn't change it.
        await layer.send(channel, MESSAGE)
        assert (statistics.counters.confirmed, of(layer).counters.confirmed) == (1, 2)

    async def test_sync_code_and_other_threads(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        own_id = (await layer.new_channel()).partition("!")[0]
        with LoopThread() as other:
            others_id = (await other.run(layer.new_channel())).partition("!")[0]
            sync_id = (
                await asyncio.to_thread(lambda: async_to_sync(layer.new_channel)())
            ).partition("!")[0]
            expected = [(own_id, False), (others_id, False), (sync_id, True)]
            for statistics in (
                layer.statistics(),
                await other.run(self.ask(layer)),
                await asyncio.to_thread(layer.statistics),
                await asyncio.to_thread(lambda: async_to_sync(self.ask)(layer)),
            ):
                assert [(one.id, one.for_sync_code) for one in statistics] == expected
            await other.run(layer.close())
            await close_for_sync_code(layer)
        # That loop is closed; the background loop goes on.
        own_state = "connected" if statistics_of_id(layer, own_id).subscriber.url else "connecting"
        assert [(one.id, one.subscriber.state) for one in layer.statistics()] == [
            (own_id, own_state),
            (sync_id, "closed"),
        ]

    async def test_after_close(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        await layer.send(channel, MESSAGE)
        waiting = asyncio.create_task(layer.receive(await layer.new_channel()))
        await until(lambda: of(layer).buffered == of(layer).receivers == 1)
        before = of(layer)
        await layer.close()
        await asyncio.wait([waiting])
        with pytest.raises(StopConsumer):
            waiting.result()
        statistics = of(layer)
        assert (statistics.counters.published, statistics.counters.enqueued) == (
            before.counters.published,
            before.counters.enqueued,
        )
        assert statistics.buffered == statistics.unacked == statistics.unconfirmed == 0
        assert statistics.channels == statistics.receivers == 0
        for connection in (statistics.publisher, statistics.subscriber):
            assert (connection.state, connection.url) == ("closed", "")
            assert connection.last_reason == "closed on this side"
            assert connection.since >= before.subscriber.since

    def test_after_a_fork(self) -> None:
        """The child has none; the parent's go on."""
        program = """
import asyncio, os
from channels_rabbitmq.core import RabbitmqChannelLayer

async def main():
    layer = RabbitmqChannelLayer(host="amqp://127.0.0.1:1")
    await layer.new_channel()
    child = os.fork()
    if not child:
        os._exit(len(layer.statistics()))
    print(os.waitpid(child, 0)[1], len(layer.statistics()))
    await layer.close()

asyncio.run(main())
"""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert (done.stdout, done.stderr) == ("0 1\n", "")

    async def test_of_a_child_that_python_was_not_told_of(
        self, open_layer: OpenLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As where uwsgi forks: what is there belongs to the parent, and stays as it is."""
        from channels_rabbitmq._loops import process as _process

        layer = await open_layer()
        await layer.new_channel()
        assert len(layer.statistics()) == 1
        with monkeypatch.context() as patch:
            patch.setattr(_process._current, "_pid", -1)
            assert layer.statistics() == ()
        assert len(layer.statistics()) == 1

    async def test_while_the_loop_works(self, open_layer: OpenLayer) -> None:
        """Another thread asks without a pause: no error, and no total ever falls."""
        layer = await open_layer(local_capacity=1000, remote_capacity=10000)
        seen: list[LoopLayerStatistics] = []
        errors: list[BaseException] = []
        is_over = threading.Event()

        def ask() -> None:
            try:
                while not is_over.is_set():
                    seen.append(of(layer))
            except BaseException as err:
                errors.append(err)

        channels = [await layer.new_channel() for _ in range(200)]
        asking = threading.Thread(target=ask)
        asking.start()
        try:
            for turn in range(5):
                await asyncio.gather(*(layer.group_add(f"g{turn}", one) for one in channels))
                await layer.group_send(f"g{turn}", MESSAGE)
                await asyncio.gather(*(receive(layer, one) for one in channels))
                for one in channels:
                    await layer.group_discard(f"g{turn}", one)
        finally:
            is_over.set()
            await asyncio.to_thread(asking.join)
        assert errors == []
        assert of(layer).counters.consumed == 1000
        for earlier, later in itertools.pairwise(seen):
            before = dataclasses.asdict(earlier.counters)
            for total, after in dataclasses.asdict(later.counters).items():
                assert before[total] <= after
            assert 0 <= later.buffered <= 200

    async def test_it_looks_at_no_channel(self, open_layer: OpenLayer) -> None:
        """There may be 100,000, and the event loop stands still while something looks at each."""

        class Unseen(dict[Any, Any]):
            def refuse(self, *args: Any) -> NoReturn:
                raise AssertionError("a walk through all channels")

            __iter__ = values = items = keys = refuse  # type: ignore[assignment]

        layer = await open_layer()
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        await layer.group_send("g", MESSAGE)
        await until(lambda: of(layer).buffered == 1)
        loop_layer = inside(layer)
        names = {
            loop_layer.router._mailboxes: ("by_channel", "holding"),
            loop_layer.bindings: ("_groups", "_in"),
            loop_layer.publisher._amqp_channel: ("_unconfirmed",),
        }
        kept = {(part, name): getattr(part, name) for part in names for name in names[part]}
        for (part, name), value in kept.items():
            setattr(part, name, Unseen(value))
        by_state = kept[loop_layer.bindings, "_in"]
        loop_layer.bindings._in = {state: Unseen(by_state[state]) for state in by_state}
        try:
            assert (of(layer).buffered, of(layer).channels, of(layer).groups.required) == (1, 1, 1)
        finally:
            for (part, name), value in kept.items():
                setattr(part, name, value)


class TestConnections:
    async def test_from_idle_to_closed(self, open_layer: OpenLayer, proxy: AmqpProxy) -> None:
        layer = await open_layer(host=proxy.url)
        release = proxy.hold(TO_CLIENT, commands.Connection.Tune, times=1)
        begun = time.time()
        await layer.new_channel()
        assert of(layer).subscriber.state == "connecting"
        assert begun <= of(layer).subscriber.since <= time.time()
        assert of(layer).publisher.state == of(layer).carehare_connection.state == "idle"
        release.set()
        await until(lambda: of(layer).subscriber.state == "connected")
        connected = of(layer).subscriber
        assert begun <= connected.since <= time.time()
        assert connected.url == str(settings_of(layer).urls[0])
        assert "guest:" not in connected.url
        assert (connected.reconnects, connected.last_reason) == (0, "")

        # Down: the moment of the loss stays, whatever attempts there are.
        proxy.refuse()
        with log_lines(logging.DEBUG) as lines:
            proxy.cut()
            await lines.next("WARNING subscriber .*: lost")
            lost = of(layer).subscriber
            assert (lost.state, lost.url, lost.reconnects) == ("waiting", "", 0)
            assert lost.last_reason
            assert connected.since <= lost.since <= time.time()
            await lines.next("WARNING subscriber .*: cannot connect")
            await lines.next("DEBUG subscriber .*: reconnecting")
            await lines.next("DEBUG subscriber .*: reconnecting")
            down = of(layer).subscriber
            assert down.state in ("waiting", "connecting")
            assert down.since == lost.since
            assert "refused" in down.last_reason or "Connect call failed" in down.last_reason
            await proxy.accept()
            await lines.next("WARNING subscriber .*: connected again")
        again = of(layer).subscriber
        assert (again.state, again.reconnects) == ("connected", 1)
        assert again.last_reason != lost.last_reason
        assert again.since >= lost.since
        await layer.close()
        assert of(layer).subscriber.state == of(layer).carehare_connection.state == "closed"
        assert of(layer).subscriber.since >= again.since

    async def test_each_reconnect_counts(self, open_layer: OpenLayer, proxy: AmqpProxy) -> None:
        layer = await open_layer(host=proxy.url)
        await layer.connect()
        await layer.carehare_connection
        for times in (1, 2, 3):
            with log_lines() as lines:
                proxy.inject(
                    commands.Connection.Close(
                        reply_code=320, reply_text=f"FORCED {times}", class_id=0, method_id=0
                    )
                )
                for _ in range(3):
                    await lines.next("WARNING .*: connected again")
            statistics = of(layer)
            for connection in (
                statistics.publisher,
                statistics.subscriber,
                statistics.carehare_connection,
            ):
                assert connection.reconnects == times
                assert f"320 FORCED {times}" in connection.last_reason

    async def test_a_connection_that_is_given_up(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        await layer.connect()
        with log_lines() as lines:
            reconnect_subscriber(layer)
            await lines.next("WARNING subscriber .*: connected again")
        assert of(layer).subscriber.last_reason == "for a test"
        assert of(layer).publisher.last_reason == ""

    async def test_blocked(self, open_layer: OpenLayer, proxy: AmqpProxy) -> None:
        layer = await open_layer(host=proxy.url)
        channel = await layer.new_channel()
        await layer.send(channel, MESSAGE)
        assert not of(layer).is_blocked
        with log_lines() as lines:
            proxy.inject(commands.Connection.Blocked(reason="low on tests"), name="publisher")
            await lines.next("blocks publishers")
            assert of(layer).is_blocked
            with pytest.raises(ChannelFull):
                await layer.send(channel, MESSAGE)
            await layer.group_send("g", MESSAGE)
            await layer.group_send("g", MESSAGE)
            assert (of(layer).counters.blocked, of(layer).counters.blocked_groups) == (3, 2)
            assert of(layer).counters.published == of(layer).counters.confirmed == 1
            proxy.inject(commands.Connection.Unblocked(), name="publisher")
            await lines.next("takes messages again")
        assert not of(layer).is_blocked


class TestSent:
    async def test_confirmed(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        for _ in range(3):
            await layer.send(channel, MESSAGE)
        await layer.group_send("nobody", MESSAGE)
        assert of(layer).counters.published == of(layer).counters.confirmed == 4

    async def test_refused(self, open_layer: OpenLayer) -> None:
        receiver = await open_layer(local_capacity=1, remote_capacity=1)
        sender = await open_layer()
        channel = await receiver.new_channel()
        await receiver.group_add("g", channel)
        errors = 0
        for _ in range(20):
            try:
                await sender.send(channel, MESSAGE)
            except ChannelFull:
                errors += 1
        # The one that fits into what a prefetch has emptied, perhaps.
        for _ in range(5):
            await sender.group_send("g", MESSAGE)
        statistics = of(sender)
        assert statistics.counters.nacked == errors > 0
        assert statistics.counters.group_nacked > 0
        # The first that was refused is tried twice again, and then it is asked why.
        assert 25 < statistics.counters.published == published(statistics) <= 25 + 3

    async def test_returned_and_unreachable(self, open_layer: OpenLayer) -> None:
        gone, sender = await open_layer(), await open_layer()
        set_retry_timeout(sender, 0.1)
        channel = await gone.new_channel()
        await gone.connect()  # else the first message, too, may find nobody
        await sender.send(channel, MESSAGE)
        await receive(gone, channel)
        await gone.close()
        await sender.send(channel, MESSAGE)
        statistics = of(sender)
        tries = statistics.counters.returned
        assert tries > 1
        assert statistics.counters.unreachable == 1
        assert statistics.counters.published == published(statistics) == 1 + tries
        await sender.send(channel, MESSAGE)  # one try
        assert (of(sender).counters.returned, of(sender).counters.unreachable) == (tries + 1, 2)

    async def test_unconfirmed_unknown_and_cancelled(
        self, open_layer: OpenLayer, proxy: AmqpProxy
    ) -> None:
        layer = await open_layer(host=proxy.url)
        await layer.group_send("g", MESSAGE)
        rule = proxy.drop(TO_CLIENT, commands.Basic.Ack)
        sending = [asyncio.create_task(layer.group_send("g", MESSAGE)) for _ in range(5)]
        await until(lambda: of(layer).unconfirmed == 5)
        for task in sending[:2]:
            task.cancel()
        await asyncio.wait(sending[:2])
        # Nobody waits for two of them, but the broker's answer is still due.
        assert (of(layer).counters.cancelled, of(layer).unconfirmed) == (2, 5)
        assert (of(layer).counters.published, of(layer).counters.confirmed) == (6, 1)
        proxy.remove(rule)
        proxy.cut()
        await asyncio.gather(*sending[2:])
        statistics = of(layer)
        assert (statistics.counters.outcome_unknown, statistics.unconfirmed) == (3, 0)
        assert statistics.counters.published == published(statistics) == 6

    async def test_a_send_cancelled_before_it_is_written_is_not_published(
        self, open_layer: OpenLayer, proxy: AmqpProxy
    ) -> None:
        release = proxy.hold(TO_CLIENT, commands.Connection.Tune)
        layer = await open_layer(host=proxy.url)
        sending = asyncio.create_task(layer.group_send("g", MESSAGE))
        await proxy.seen(TO_CLIENT, commands.Connection.Tune)
        sending.cancel()
        await asyncio.wait([sending])
        release.set()
        await layer.connect()
        assert of(layer).counters.published == of(layer).counters.cancelled == 0


class TestReceived:
    async def test_a_group_counts_for_each_member(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        channels = [await layer.new_channel() for _ in range(3)]
        for channel in channels:
            await layer.group_add("g", channel)
        await layer.group_send("g", MESSAGE)
        await until(lambda: of(layer).buffered == 3)
        statistics = of(layer)
        assert (
            statistics.counters.delivered,
            statistics.counters.enqueued,
            statistics.unacked,
        ) == (1, 3, 1)
        assert (statistics.channels, statistics.receivers) == (3, 0)
        await receive(layer, channels[0])
        statistics = of(layer)
        assert (statistics.counters.consumed, statistics.buffered, statistics.unacked) == (1, 2, 1)
        for channel in channels[1:]:
            await receive(layer, channel)
        statistics = of(layer)
        assert (statistics.counters.consumed, statistics.buffered, statistics.unacked) == (3, 0, 0)
        assert statistics.counters.enqueued == enqueued(statistics)
        assert statistics.channels == 0

    async def test_receivers(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        channels = [await layer.new_channel() for _ in range(10)]
        waiting = [asyncio.create_task(layer.receive(channel)) for channel in channels]
        waiting.append(asyncio.create_task(layer.receive(channels[0])))
        await until(lambda: of(layer).receivers == 11)
        assert of(layer).channels == 10
        await layer.send(channels[9], MESSAGE)
        await waiting[9]
        assert (of(layer).receivers, of(layer).channels) == (10, 9)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        must_have_nothing_left(of(layer))

    async def test_in_hand_over(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        with LoopThread() as owner:
            channel = await owner.run(layer.new_channel())

            def owners() -> LoopLayerStatistics:
                return statistics_of_id(layer, channel.partition("!")[0])

            receiving = asyncio.create_task(layer.receive(channel))
            await until(lambda: owners().receivers == 1)
            owner.submit_from_thread(layer.send(channel, MESSAGE))
            # This loop stands still, so the answer waits, and the message with it.
            owner.block_until(lambda: owners().in_hand_over == 1)
            statistics = owners()
            assert (statistics.buffered, statistics.unacked, statistics.counters.consumed) == (
                0,
                0,
                0,
            )
            assert statistics.counters.enqueued == enqueued(statistics) == 1
            await receiving
            await until(lambda: owners().counters.consumed == 1)
            must_have_nothing_left(owners())

    async def test_expired(self, open_layer: OpenLayer) -> None:
        layer = await open_layer(local_expiry=0.05)
        channel = await layer.new_channel()
        with log_lines() as lines:
            await layer.send(channel, MESSAGE)
            await lines.next("within local_expiry")
        statistics = of(layer)
        assert (
            statistics.counters.expired,
            statistics.counters.enqueued,
            statistics.counters.consumed,
        ) == (1, 1, 0)
        must_have_nothing_left(statistics)

    async def test_stalled_and_overflowed(self, open_layer: OpenLayer) -> None:
        layer = await open_layer(local_capacity=4, capacity=2)
        stuck, other = await layer.new_channel(), await layer.new_channel()
        waiting = asyncio.create_task(layer.receive(other))
        await layer.send(stuck, {"n": 0})
        await until(lambda: of(layer).unacked == 1)
        assert of(layer).stalled_channels == of(layer).early_acked_bytes == 0
        with log_lines() as lines:
            # One after the other: relief looks at what has arrived together.
            await layer.send(stuck, {"n": 1})
            await until(lambda: of(layer).stalled_channels == 1 and of(layer).unacked == 0)
            await layer.send(stuck, {"n": 2})
            await until(lambda: of(layer).unacked == 1)
            await layer.send(stuck, {"n": 3})
            line = await lines.next("channels that are behind hold more than is kept")
        assert "2 messages dropped: channels" in line
        assert stuck in line
        statistics = of(layer)
        assert statistics.stalled_channels == 1
        assert (statistics.buffered, statistics.unacked, statistics.counters.overflowed) == (
            2,
            0,
            2,
        )
        assert statistics.early_acked_bytes > 0
        assert statistics.counters.enqueued == enqueued(statistics) == 4
        assert [(await receive(layer, stuck))["n"] for _ in range(2)] == [2, 3]
        assert of(layer).stalled_channels == of(layer).early_acked_bytes == 0
        await layer.send(other, MESSAGE)
        await waiting
        must_have_nothing_left(of(layer))

    async def test_a_stalled_channel_that_expires(self, open_layer: OpenLayer) -> None:
        layer = await open_layer(local_capacity=2, local_expiry=0.5)
        stuck, other = await layer.new_channel(), await layer.new_channel()
        waiting = asyncio.create_task(layer.receive(other))
        await layer.send(stuck, MESSAGE)
        await until(lambda: of(layer).stalled_channels == 1)
        await until(lambda: of(layer).counters.expired == 1)
        assert of(layer).stalled_channels == of(layer).early_acked_bytes == of(layer).buffered == 0
        assert of(layer).channels == of(layer).receivers == 1
        waiting.cancel()
        await asyncio.wait([waiting])

    async def test_what_a_reconnect_leaves_in_memory(
        self, open_layer: OpenLayer, proxy: AmqpProxy
    ) -> None:
        layer = await open_layer(host=proxy.url)
        channel = await layer.new_channel()
        await layer.send(channel, MESSAGE)
        await until(lambda: of(layer).unacked == 1)
        with log_lines() as lines:
            proxy.cut(name="subscriber")
            await lines.next("WARNING subscriber .*: connected again")
        statistics = of(layer)
        assert (statistics.buffered, statistics.unacked) == (1, 0)
        assert statistics.early_acked_bytes > 0
        await receive(layer, channel)
        await until(lambda: of(layer).unconfirmed == 0)  # its greeting
        must_have_nothing_left(of(layer))

    async def test_the_highest_age(self, open_layer: OpenLayer) -> None:
        layer = await open_layer(expiry=2)
        channel = await layer.new_channel()
        await layer.send(channel, MESSAGE)
        await receive(layer, channel)
        fresh = of(layer).highest_age
        assert 0 < fresh < 1
        with log_lines() as lines:
            await layer.send(channel, MESSAGE)
            await asyncio.sleep(1.1)
            await receive(layer, channel)
            line = await lines.next("more than half of expiry")
        assert f"{of(layer).id}: messages were up to 1 s old" in line
        assert channel in line
        assert 1.1 <= of(layer).highest_age < 2
        await layer.send(channel, MESSAGE)
        await receive(layer, channel)
        assert of(layer).highest_age >= 1.1

    async def test_what_nobody_wants(self, open_layer: OpenLayer, groups_exchange: str) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        await layer.group_discard("g", channel)
        await layer.group_send("g", MESSAGE)  # It lingers.
        connection = await layer.carehare_connection
        key = channel.partition("!")[0] + "!"
        foreign = msgpack.packb({"__asgi_channel__": "crq.aaaaaaaaaaaaaaaa!x"})
        for body in (b"junk", foreign, b"", foreign):
            await connection.publish(body, exchange_name=groups_exchange, routing_key=key)
        await layer.send(channel, MESSAGE)
        await receive(layer, channel)
        statistics = of(layer)
        counters = statistics.counters
        assert (counters.blocked_groups, counters.unreachable, counters.overflowed) == (0, 0, 0)
        assert (counters.no_members, counters.misrouted, counters.malformed) == (1, 2, 2)
        assert (statistics.counters.delivered, statistics.counters.enqueued) == (6, 1)


class TestGroups:
    async def test_required_bound_lingering(self, open_layer: OpenLayer, proxy: AmqpProxy) -> None:
        layer = await open_layer(host=proxy.url)
        set_linger(layer, 0.5)
        one, two = await layer.new_channel(), await layer.new_channel()
        await layer.group_add("a", one)
        release = proxy.hold(TO_BROKER, commands.Exchange.Bind, times=1)
        adding = asyncio.create_task(layer.group_add("b", one))
        await until(lambda: of(layer).groups.required == 2)
        assert of(layer).groups == GroupStatistics(required=2, bound=1, lingering=0)
        release.set()
        await adding
        await layer.group_add("b", two)
        assert of(layer).groups == GroupStatistics(required=2, bound=2, lingering=0)
        await layer.group_discard("a", one)
        await layer.group_discard("b", one)
        assert of(layer).groups == GroupStatistics(required=1, bound=2, lingering=1)
        await layer.group_discard("b", two)
        assert of(layer).groups == GroupStatistics(required=0, bound=2, lingering=2)
        await until(lambda: of(layer).groups == NO_GROUPS)
        await proxy.seen(TO_BROKER, commands.Exchange.Unbind, 2)

    async def test_without_a_connection_nothing_is_bound(
        self, open_layer: OpenLayer, proxy: AmqpProxy
    ) -> None:
        layer = await open_layer(host=proxy.url)
        channel = await layer.new_channel()
        await layer.group_add("a", channel)
        await layer.group_add("b", channel)
        await layer.group_discard("b", channel)
        with log_lines() as lines:
            proxy.refuse()
            proxy.cut()
            await lines.next("WARNING subscriber .*: lost")
            assert of(layer).groups == GroupStatistics(required=1, bound=0, lingering=0)
            await proxy.accept()
        await until(lambda: of(layer).groups == GroupStatistics(required=1, bound=1, lingering=0))


@pytest.mark.slow
async def test_the_books_balance_after_a_storm(open_layer: OpenLayer) -> None:
    """Sends, groups and receives, a third of them cancelled at some moment; then all is let go."""
    chance = random.Random(5)
    layer = await open_layer(local_capacity=50, remote_capacity=50, local_expiry=1.0)
    set_linger(layer, 0.2)
    channels = [await layer.new_channel() for _ in range(30)]

    async def call(function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        task = asyncio.ensure_future(function(*args))
        if chance.random() < 0.3:
            asyncio.get_running_loop().call_later(chance.random() * 0.02, task.cancel)
        elif function == layer.receive:
            asyncio.get_running_loop().call_later(0.3, task.cancel)
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is not None:
            assert isinstance(task.exception(), ChannelFull)

    await layer.connect()
    # They are written in their first turn; an answer takes another one at least.
    sending = [asyncio.create_task(layer.group_send("g", MESSAGE)) for _ in range(10)]
    await asyncio.sleep(0)
    for task in sending:
        task.cancel()
    for _ in range(6):
        calls = []
        for channel in channels:
            group = f"g{chance.randrange(10)}"
            calls += [
                call(layer.send, channel, MESSAGE),
                call(layer.receive, channel),
                call(layer.group_add, group, channel),
                call(layer.group_send, group, MESSAGE),
                call(layer.group_discard, group, channel),
            ]
        chance.shuffle(calls)
        await asyncio.gather(*calls)
    for channel in channels:
        for n in range(10):
            await layer.group_discard(f"g{n}", channel)

    def is_over() -> bool:
        statistics = of(layer)
        return not statistics.buffered and statistics.groups == NO_GROUPS

    await until(is_over)
    statistics = of(layer)
    must_have_nothing_left(statistics)
    assert statistics.counters.published == published(statistics)
    assert statistics.counters.enqueued == enqueued(statistics)
    assert statistics.counters.cancelled >= 10
    assert (
        min(
            statistics.counters.consumed, statistics.counters.expired, statistics.counters.confirmed
        )
        > 0
    )
