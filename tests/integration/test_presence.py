"""Who is in a group, anywhere; and changes of groups from anywhere."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import pika  # type: ignore[import-untyped]  # has no annotations
import pytest
from asgiref.sync import async_to_sync
from channels.exceptions import MessageTooLarge

from channels_rabbitmq._peers.processes import GONE_AFTER
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from channels_rabbitmq.presence import GroupMembers, Member
from tests.support.brokers import Broker
from tests.support.changes import until
from tests.support.layers import close_for_sync_code, inside, statistics_of
from tests.support.log_lines import log_lines
from tests.support.loop_thread import LoopThread
from tests.support.members import GROUP, open_member, receive, reconnect

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}


async def ask(layer: RabbitmqChannelLayer, timeout: float = 10.0) -> GroupMembers:
    """Ask with so much time that a busy machine is no excuse."""
    return await layer.group_members(GROUP, timeout)


def channels(result: GroupMembers) -> set[str]:
    found = [member.channel for member in result.members]
    assert len(found) == len(set(found)), "a member comes twice"
    return set(found)


def complete(*members: Member) -> GroupMembers:
    return GroupMembers(members, is_complete=True, silent=(), absent=())


class TestInfo:
    async def test_each_add_replaces_it(self, open_layer: OpenLayer) -> None:
        layer, other = await open_layer(), await open_layer()
        channel = await layer.new_channel()
        infos: list[dict[str, Any] | None] = [
            {"name": "grüße", "n": [1, {"b": b"\x00"}]},
            {"name": "another"},
            {},
            None,
        ]
        for info in infos:
            await layer.group_add(GROUP, channel, info)
            for asker in (layer, other):
                assert await ask(asker) == complete(Member(channel, info))
        await layer.group_add(GROUP, channel, {"n": 1})
        await layer.group_discard(GROUP, channel)
        assert await ask(other) == complete()
        await layer.group_add(GROUP, channel)
        assert await ask(other) == complete(Member(channel, None))

    async def test_it_is_the_callers_own_copy(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        info = {"tags": ["a"]}
        await layer.group_add(GROUP, channel, info)
        info["tags"].append("b")
        for _ in range(2):
            (member,) = (await ask(layer)).members
            assert member.info == {"tags": ["a"]}
            member.info["tags"].append("c")

    @pytest.mark.parametrize(
        ("info", "place"),
        [
            ({1: 2}, "info has a key of type int"),
            ({"at": {"since": object()}}, r'info\["at"\]\["since"\] is of type object'),
            ({"n": [2**63]}, r'info\["n"\]\[0\] is of type int and beyond 64 bits'),
            (["a"], "info must be a dict, not list"),
            ("a", "info must be a dict, not str"),
        ],
    )
    async def test_a_wrong_one_is_named(self, open_layer: OpenLayer, info: Any, place: str) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        with pytest.raises(TypeError, match=place):
            await layer.group_add(GROUP, channel, info)
        assert await ask(layer) == complete()

    async def test_how_large_it_may_be(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        overhead = len(msgpack.packb({"x": "y" * 1000})) - 1000
        fits = {"x": "y" * (4096 - overhead)}
        await layer.group_add(GROUP, channel, fits)
        with pytest.raises(MessageTooLarge, match="has 4097 bytes; it may have 4096"):
            await layer.group_add(GROUP, channel, {"x": fits["x"] + "y"})
        assert await ask(layer) == complete(Member(channel, fits))


class TestMembers:
    async def test_of_three_layers(self, open_layer: OpenLayer) -> None:
        members = [await open_member(open_layer) for _ in range(3)]
        second = await members[0][0].new_channel()
        await members[0][0].group_add(GROUP, second, {"n": 2})
        expected = {channel for _, channel in members} | {second}
        for layer, _ in members:
            result = await ask(layer)
            assert result.is_complete
            assert channels(result) == expected
            assert await layer.group_count(GROUP) == 4
            assert await layer.group_members("nobody") == complete()
            assert await layer.group_count("nobody") == 0
        await members[1][0].group_discard(GROUP, members[1][1])
        for layer, _ in members:
            assert channels(await ask(layer)) == expected - {members[1][1]}

    @pytest.mark.parametrize("groups", [1, 300], ids=["one group", "many groups"])
    async def test_many_calls_at_once(self, open_layer: OpenLayer, groups: int) -> None:
        members = [await open_member(open_layer) for _ in range(3)]
        layer, _ = members[0]
        await ask(layer)
        names = [GROUP, *(f"nobody{n}" for n in range(1, groups))]
        calls = [layer.group_count(names[n % groups], 10.0) for n in range(900)]
        found = await asyncio.gather(*calls)
        assert found == [3 if n % groups == 0 else 0 for n in range(900)]
        counters = statistics_of(layer).counters
        assert (counters.questions, counters.incomplete) == (901, 0)
        assert counters.requests < 4 * groups + 20

    async def test_one_that_only_asks(self, open_layer: OpenLayer) -> None:
        """Its first call opens what it needs, and waits until it knows all."""
        members = [await open_member(open_layer) for _ in range(2)]
        asker = await open_layer()
        result = await ask(asker)
        assert result.is_complete
        assert channels(result) == {channel for _, channel in members}

    async def test_who_has_joined_is_in_it_at_once(self, open_layer: OpenLayer) -> None:
        asker, _ = await open_member(open_layer)
        for _ in range(10):
            _, channel = await open_member(open_layer)
            result = await ask(asker)
            assert result.is_complete
            assert channel in channels(result)

    async def test_who_ends_in_order_is_gone_at_once(self, open_layer: OpenLayer) -> None:
        asker, own = await open_member(open_layer)
        layer, channel = await open_member(open_layer)
        assert channels(await ask(asker)) == {own, channel}
        await layer.close()
        await until(lambda: statistics_of(asker).processes.known == 0)
        assert await ask(asker) == complete(Member(own, None))

    async def test_a_loop_that_ends_without_a_close_says_so(self, open_layer: OpenLayer) -> None:
        layer, own = await open_member(open_layer)
        with LoopThread() as other:
            channel = await other.run(layer.new_channel())
            await layer.group_add(GROUP, channel)
            assert channels(await ask(layer)) == {own, channel}
        await until(lambda: layer.statistics()[0].processes.known == 0)
        assert await ask(layer) == complete(Member(own, None))
        with pytest.raises(ValueError, match="an event loop of this process that has ended"):
            await layer.group_add(GROUP, channel)

    async def test_who_only_sends_says_nothing(
        self, open_layer: OpenLayer, groups_exchange: str
    ) -> None:
        listener, _ = await open_member(open_layer)
        await ask(listener)
        sender = await open_layer()
        await sender.group_send(GROUP, MESSAGE)
        id_ = inside(sender).id
        await sender.close()
        await (await open_layer()).connect()  # says hello, behind what the sender might have said
        await until(lambda: statistics_of(listener).processes.known == 1)
        assert not inside(listener).peers.processes.is_gone(id_)

    async def test_more_than_one_body_holds(self, open_layer: OpenLayer) -> None:
        """The largest message that may be sent doesn't matter."""
        layer = await open_layer(max_message_size=1000)
        asker = await open_layer(max_message_size=1000)
        made = [await layer.new_channel() for _ in range(150)]
        for number, channel in enumerate(made):
            await layer.group_add(GROUP, channel, {"n": number, "text": "x" * 4000})
        result = await ask(asker)
        assert result.is_complete
        assert {m.channel: m.info["n"] for m in result.members if m.info} == {
            channel: number for number, channel in enumerate(made)
        }

    async def test_after_a_reconnect(self, open_layer: OpenLayer) -> None:
        layer, channel = await open_member(open_layer)
        asker, own = await open_member(open_layer)
        for one in (layer, asker):
            await reconnect(one)
            result = await ask(asker)
            if not result.is_complete:  # One of them was away in this moment.
                await until(lambda: statistics_of(asker).processes.absent == 0)
                result = await ask(asker)
            assert result.is_complete
            assert channels(result) == {channel, own}

    @pytest.mark.parametrize("timeout", [0, -1, float("nan")])
    async def test_a_timeout_that_is_none(self, open_layer: OpenLayer, timeout: float) -> None:
        layer = await open_layer()
        for call in (layer.group_members, layer.group_count):
            with pytest.raises(ValueError, match="timeout must be above 0"):
                await call(GROUP, timeout)

    @pytest.mark.parametrize("timeout", [None, "1", True])
    async def test_a_timeout_that_is_no_number(self, open_layer: OpenLayer, timeout: Any) -> None:
        layer = await open_layer()
        with pytest.raises(TypeError, match="timeout must be a number of seconds"):
            await layer.group_members(GROUP, timeout)

    async def test_a_name_that_is_none(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        with pytest.raises(TypeError, match="Invalid group name"):
            await layer.group_members("a b")
        with pytest.raises(TypeError, match="Invalid group name"):
            await layer.group_count("a b")

    async def test_a_closed_layer(self, open_layer: OpenLayer) -> None:
        layer, _ = await open_member(open_layer)
        await layer.close()
        with pytest.raises(BrokerUnavailable):
            await ask(layer)

    async def test_without_a_broker_it_raises_in_time(self) -> None:
        layer = RabbitmqChannelLayer(host="amqp://127.0.0.1:1")
        begun = time.monotonic()
        with pytest.raises(BrokerUnavailable, match="No connection to RabbitMQ"):
            await layer.group_members(GROUP, 0.3)
        assert time.monotonic() - begun < 5
        await layer.close()


class TestWhere:
    async def test_sync_code_and_two_loops(
        self, open_layer: OpenLayer, broker: Broker, groups_exchange: str
    ) -> None:
        layer = await open_layer()
        channel = await layer.new_channel()
        await layer.group_add(GROUP, channel, {"loop": 1})
        with LoopThread() as other:
            second = await other.run(layer.new_channel())
            # A channel of another event loop of this process
            await layer.group_add(GROUP, second, {"loop": 2})
            expected = {channel: 1, second: 2}

            def in_sync_code() -> tuple[GroupMembers, int]:
                result: GroupMembers = async_to_sync(layer.group_members)(GROUP, 10.0)
                count: int = async_to_sync(layer.group_count)(GROUP, 10.0)
                return result, count

            results = [
                await ask(layer),
                await other.run(layer.group_members(GROUP, 10.0)),
                (await asyncio.to_thread(in_sync_code))[0],
            ]
            for result in results:
                assert result.is_complete
                assert {m.channel: m.info and m.info["loop"] for m in result.members} == expected
            assert (await asyncio.to_thread(in_sync_code))[1] == 2
            assert len(layer.statistics()) == 3
            await other.run(layer.close())
        await close_for_sync_code(layer)

    async def test_sync_code_adds_a_channel_of_another_process(self, open_layer: OpenLayer) -> None:
        layer, own = await open_member(open_layer)
        view = await open_layer()

        def in_sync_code() -> None:
            async_to_sync(view.group_add)("by-view", own, {"n": 1})

        await asyncio.to_thread(in_sync_code)
        assert await layer.group_members("by-view", 10.0) == complete(Member(own, {"n": 1}))
        await close_for_sync_code(view)


class TestChangesElsewhere:
    async def test_a_thousand_joins_and_then_a_message(self, open_layer: OpenLayer) -> None:
        layer, view = await open_layer(), await open_layer()
        channel = await layer.new_channel()
        for number in range(1000):
            group = f"g{number}"
            await view.group_add(group, channel)
            await view.group_send(group, {"n": number})
            assert await receive(layer, channel) == {"n": number}

    async def test_a_discard(self, open_layer: OpenLayer) -> None:
        (layer, channel), view = await open_member(open_layer), await open_layer()
        for _ in range(20):
            await view.group_add(GROUP, channel, {"by": "view"})
            await view.group_discard(GROUP, channel)
            assert await ask(view) == complete()
            await view.group_send(GROUP, {"type": "nobody"})
            await view.send(channel, MESSAGE)
            assert await receive(layer, channel) == MESSAGE
        await view.group_discard(GROUP, channel)  # no error

    async def test_a_process_that_is_gone(self, open_layer: OpenLayer) -> None:
        (layer, channel), view = await open_member(open_layer), await open_layer()
        await ask(view)
        await layer.close()
        await until(lambda: statistics_of(view).processes.known == 0)
        for call in (view.group_add, view.group_discard):
            with pytest.raises(ValueError, match="is gone, and its channels with it"):
                await call(GROUP, channel)

    async def test_a_send_to_it_is_dropped_at_once(self, open_layer: OpenLayer) -> None:
        (layer, channel), sender = await open_member(open_layer), await open_layer()
        await ask(sender)
        await sender.send(channel, MESSAGE)  # So it is one that would be waited for.
        await layer.close()
        await until(lambda: statistics_of(sender).processes.known == 0)
        before = statistics_of(sender).counters
        for _ in range(20):
            await sender.send(channel, MESSAGE)
        after = statistics_of(sender).counters
        assert after.unreachable - before.unreachable == 20
        # Some brokers take it in the moment in which they delete the queue.
        assert after.returned - before.returned <= 22

    async def test_a_process_of_which_nothing_is_known(self, open_layer: OpenLayer) -> None:
        view = await open_layer(operation_timeout=1)
        stranger = f"crq.{'z' * 16}!specific.abc"
        begun = time.monotonic()
        with pytest.raises(BrokerUnavailable, match="has no queue on RabbitMQ"):
            await view.group_add(GROUP, stranger)
        assert 0.9 < time.monotonic() - begun < 5
        inside(view).peers.processes._strangers[f"crq.{'z' * 16}"] -= GONE_AFTER
        with pytest.raises(ValueError, match="is gone"):
            await view.group_add(GROUP, stranger)

    @pytest.mark.parametrize(
        "channel",
        [
            "channels_AbCdEfGhIjKl!specific.abc",  # of 4.x
            "crq.short!specific.abc",
            f"crq.{'0' * 16}!specific.abc",
            f"crq.{'z' * 16}!",
        ],
    )
    async def test_names_that_are_not_ours(self, open_layer: OpenLayer, channel: str) -> None:
        view = await open_layer()
        for call in (view.group_add, view.group_discard):
            with pytest.raises(ValueError, match="wasn't made by new_channel"):
                await call(GROUP, channel)
        # Nothing was connected for that.
        assert statistics_of(view).publisher.state == "idle"

    async def test_an_info_is_checked_here(self, open_layer: OpenLayer) -> None:
        (_, channel), view = await open_member(open_layer), await open_layer()
        with pytest.raises(TypeError, match=r'info\["x"\]'):
            await view.group_add("g2", channel, {"x": object()})
        assert statistics_of(view).counters.requests == 0

    async def test_cancelling_leaves_nothing(self, open_layer: OpenLayer) -> None:
        (_, channel), view = await open_member(open_layer), await open_layer()
        await ask(view)
        for turns in range(20):
            adding = asyncio.create_task(view.group_add("g2", channel))
            for _ in range(turns):
                await asyncio.sleep(0)
            adding.cancel()
            await asyncio.wait([adding])
        assert len(inside(view).peers._asker.questions) == 0
        await view.group_discard("g2", channel)
        assert await view.group_members("g2", 10.0) == complete()


class TestEncryption:
    async def test_with_the_same_keys(self, open_layer: OpenLayer) -> None:
        keys = {"symmetric_encryption_keys": ["a k3y"]}
        (layer, channel), asker = (
            await open_member(open_layer, **keys),
            await open_layer(**keys),
        )
        await asker.group_add(GROUP, channel, {"secret": "Geheimnis"})
        assert await ask(asker) == complete(Member(channel, {"secret": "Geheimnis"}))
        for one in (layer, asker):
            assert statistics_of(one).counters.malformed_requests == 0

    async def test_on_the_wire_all_is_secret(
        self, open_layer: OpenLayer, groups_exchange: str
    ) -> None:
        keys = {"symmetric_encryption_keys": ["a k3y"]}
        asker = await open_layer(**keys)
        await asker.connect()
        connection = await asker.carehare_connection
        queue = f"tap-{groups_exchange}"
        await connection.queue_declare(queue, exclusive=True)
        await connection.queue_bind(queue, groups_exchange, routing_key="!all")
        id_ = inside(asker).id
        await connection.queue_bind(queue, groups_exchange, routing_key=f"{id_}!requests")
        layer = await open_layer(**keys)
        channel = await layer.new_channel()
        await layer.group_add("Salon", channel, {"secret": "Geheimnis"})
        await asker.group_members("Salon", 10.0)
        bodies = []
        async with connection.acking_consumer(queue) as consumer:
            async for body in consumer:
                bodies.append(body)
                if len(bodies) == 3:
                    break
        for body in bodies:
            assert b"__asgi_encrypted__" in body
            for secret in (b"Salon", b"Geheimnis", b"hello", b"members"):
                assert secret not in body

    @pytest.mark.parametrize("keys", [["another k3y"], None])
    async def test_with_others_they_do_not_know_each_other(
        self, open_layer: OpenLayer, keys: list[str] | None
    ) -> None:
        with log_lines() as lines:
            asker, own = await open_member(open_layer, symmetric_encryption_keys=["a k3y"])
            other, channel = await open_member(open_layer, symmetric_encryption_keys=keys)
            line = await lines.next("requests? of other processes dropped")
        assert "a k3y" not in line
        for layer, expected in ((asker, own), (other, channel)):
            assert channels(await ask(layer)) == {expected}
        assert statistics_of(asker).counters.malformed_requests > 0
        assert statistics_of(asker).counters.malformed == 0
        # The others' messages go their way.
        await asker.group_send(GROUP, MESSAGE)
        assert await receive(asker, own) == MESSAGE


async def test_whatever_others_publish_it_lives(
    open_layer: OpenLayer, broker: Broker, groups_exchange: str
) -> None:
    layer, channel = await open_member(open_layer)
    id_ = channel.partition("!")[0]
    key = f"{id_}!requests"
    bodies = [
        b"\x80",
        b"\xc1",
        msgpack.packb({"__asgi_channel__": key}),
        msgpack.packb({"__asgi_channel__": key, "kind": "hello", "from": "nobody"}),
        msgpack.packb({"__asgi_channel__": key, "kind": "answer", "from": id_}),
        msgpack.packb({"__asgi_channel__": f"{id_}!x", "kind": "hello"}),
        msgpack.packb({"__asgi_group__": GROUP, **MESSAGE}),
        msgpack.packb({"__asgi_channel__": "!all", "kind": ["members"]}),
    ]

    def publish() -> None:
        with pika.BlockingConnection(pika.URLParameters(broker.url)) as connection:
            amqp_channel = connection.channel()
            for body in bodies:
                for routing_key in (key, "!all"):
                    amqp_channel.basic_publish(groups_exchange, routing_key, body)

    await asyncio.to_thread(publish)
    await until(lambda: statistics_of(layer).counters.malformed_requests == 2 * len(bodies))
    assert await ask(layer) == complete(Member(channel, None))
    assert statistics_of(layer).counters.malformed == 0


async def test_the_statistics(open_layer: OpenLayer) -> None:
    layer, _ = await open_member(open_layer)
    asker = await open_layer()
    assert (await ask(asker)).is_complete
    statistics = statistics_of(asker)
    assert dataclasses.asdict(statistics.processes) == {"known": 1, "absent": 0}
    counters = statistics.counters
    assert (counters.questions, counters.incomplete, counters.silent) == (1, 0, 0)
    assert counters.published == 0  # These are messages.
    assert counters.requests >= 2
    assert statistics_of(layer).counters.answered >= 1
