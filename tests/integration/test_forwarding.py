"""Calls for which another event loop is responsible: two loops in two threads, a real broker."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from channels.exceptions import ChannelFull, MessageTooLarge, StopConsumer

from channels_rabbitmq._loops import calls as _calls
from channels_rabbitmq._loops import forwarders as _forwarders
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from channels_rabbitmq.statistics import LoopLayerStatistics
from tests.support.cancelling import receive_cancelling
from tests.support.fake_servers import silent_server
from tests.support.layers import inside, inside_of_loop, statistics_of_id
from tests.support.loop_thread import LoopThread

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}


@pytest.fixture
def owner() -> Iterator[LoopThread]:
    """The loop that makes the channels; the test's own loop calls."""
    with LoopThread() as owner:
        yield owner


async def receive(layer: RabbitmqChannelLayer, channel: str) -> dict[str, Any]:
    return await asyncio.wait_for(layer.receive(channel), 10)


def router_of(layer: RabbitmqChannelLayer, owner: LoopThread) -> Any:
    return inside_of_loop(layer, owner.loop).router


async def until_waiting(layer: RabbitmqChannelLayer, owner: LoopThread, count: int) -> None:
    """Until so many ``receive()`` calls wait on the owner's loop."""

    async def waiting() -> bool:
        return bool(router_of(layer, owner).receivers == count)

    while not await owner.run(waiting()):  # noqa: ASYNC110 - another thread's loop tells nobody
        await asyncio.sleep(0.001)


def hand_over(
    layer: RabbitmqChannelLayer, owner: LoopThread, channel: str, message: dict[str, Any]
) -> None:
    """Have a message answer the ``receive()`` that waits, and the answer wait on the caller's loop.

    For this stands still until the owner's loop has sent the message, got it and handed it over.
    """
    owner.submit_from_thread(layer.send(channel, message))
    owner.block_until(lambda: bool(router_of(layer, owner).hand_overs))


class TestCalls:
    async def test_all_that_a_channel_is_for(
        self, open_layer: OpenLayer, owner: LoopThread
    ) -> None:
        layer = await open_layer()
        channel = await owner.run(layer.new_channel())
        await layer.group_add("g", channel)
        await layer.group_send("g", {"n": 1})
        await layer.send(channel, {"n": 2})
        assert [(await receive(layer, channel))["n"] for _ in range(2)] == [1, 2]
        await layer.group_discard("g", channel)
        await layer.group_send("g", {"n": 3})
        await layer.send(channel, {"n": 4})
        assert await owner.run(layer.receive(channel)) == {"n": 4}
        # The caller's own connection only sends.
        own = inside(layer)
        assert own.publisher.supervisor.connection is not None
        assert own.subscriber.supervisor.connection is None

    async def test_errors_are_those_of_the_owner(
        self, open_layer: OpenLayer, owner: LoopThread
    ) -> None:
        layer = await open_layer(host="amqp://guest:wrong@127.0.0.1:1", operation_timeout=0.1)
        channel = await owner.run(layer.new_channel())
        with pytest.raises(BrokerUnavailable, match=r"No connection to RabbitMQ.*127\.0\.0\.1:1/"):
            await layer.group_add("g", channel)

    async def test_order_is_kept(self, open_layer: OpenLayer, owner: LoopThread) -> None:
        layer = await open_layer(local_capacity=1000, remote_capacity=1000)
        channel = await owner.run(layer.new_channel())
        for n in range(300):
            await layer.send(channel, {"n": n})
        # Many at once; they are served in the order in which they were called.
        received = await asyncio.gather(*(receive(layer, channel) for _ in range(300)))
        assert [message["n"] for message in received] == list(range(300))

    async def test_receivers_on_several_loops_get_one_message_each(
        self, open_layer: OpenLayer, owner: LoopThread
    ) -> None:
        layer = await open_layer()
        channel = await owner.run(layer.new_channel())
        here = [asyncio.create_task(receive(layer, channel)) for _ in range(20)]
        there = [owner.submit(layer.receive(channel)) for _ in range(20)]
        for n in range(40):
            await layer.send(channel, {"n": n})
        numbers = [message["n"] for message in await asyncio.gather(*here, *there)]
        assert sorted(numbers) == list(range(40))

    async def test_each_receiver_has_a_copy_of_its_own(
        self, open_layer: OpenLayer, owner: LoopThread
    ) -> None:
        layer = await open_layer()
        channels = [await owner.run(layer.new_channel()) for _ in range(3)]
        for channel in channels:
            await layer.group_add("g", channel)
        await layer.group_send("g", {"list": [1]})
        for channel in channels:
            message = await receive(layer, channel)
            assert message == {"list": [1]}
            message["list"].append(2)

    async def test_a_cancelled_add_leaves_the_channel_as_it_was(
        self, open_layer: OpenLayer, owner: LoopThread
    ) -> None:
        async with silent_server() as server:
            layer = await open_layer(host=server.url)
            channel = await owner.run(layer.new_channel())
            await server.until_accepted()
            members = inside_of_loop(layer, owner.loop).members
            adding = asyncio.create_task(layer.group_add("g", channel))
            await asyncio.sleep(0)  # lets it begin
            owner.block_until(lambda: members.has_members("g"))
            adding.cancel()
            with pytest.raises(asyncio.CancelledError):
                await adding
            owner.block_until(lambda: not members.has_members("g"))
            owner.end()
            await server.until_gone()

    async def test_an_owner_that_is_busy(
        self, open_layer: OpenLayer, owner: LoopThread, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_forwarders, "GRACE", 0.0)
        layer = await open_layer(operation_timeout=0.2)
        channel = await owner.run(layer.new_channel())
        go_on = threading.Event()
        owner.loop.call_soon_threadsafe(go_on.wait)
        try:
            with pytest.raises(BrokerUnavailable, match="busy"):
                await layer.group_add("g", channel)
        finally:
            go_on.set()
        # It doesn't join after all.
        members = inside_of_loop(layer, owner.loop).members
        owner.block_until(lambda: not members.has_members("g"))

    async def test_an_owner_whose_loop_is_closed_without_cancelling_its_tasks(
        self, open_layer: OpenLayer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_calls, "WATCH_INTERVAL", 0.05)
        layer = await open_layer()
        call = _calls.ReceiveCall(FakeLoop(), lambda: None, "channel")  # type: ignore[arg-type, return-value]
        with pytest.raises(StopConsumer):
            await asyncio.wait_for(call.run(None), 10)
        other = _calls.Call(FakeLoop(), lambda: layer.close())  # type: ignore[arg-type]
        with pytest.raises(BrokerUnavailable, match="has ended"):
            await asyncio.wait_for(other.run(60), 10)


class FakeLoop:
    """One that is closed between two looks, with what it had still to do."""

    def __init__(self) -> None:
        self._looks = 0

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: object) -> None:
        pass

    def is_closed(self) -> bool:
        self._looks += 1
        return self._looks > 2


async def start_receiving(
    layer: RabbitmqChannelLayer, owner: LoopThread
) -> tuple[str, asyncio.Task[dict[str, Any]]]:
    """A new channel of the owner's, and a call here that waits for its first message."""
    channel = await owner.run(layer.new_channel())
    receiving = asyncio.create_task(layer.receive(channel))
    await until_waiting(layer, owner, 1)
    return channel, receiving


class TestCancelledReceivers:
    async def test_while_it_waits(self, open_layer: OpenLayer, owner: LoopThread) -> None:
        layer = await open_layer()
        _, receiving = await start_receiving(layer, owner)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        await until_waiting(layer, owner, 0)
        assert router_of(layer, owner).idle

    @pytest.mark.parametrize("has_arrived", [False, True])
    async def test_when_the_message_is_on_its_way_or_has_just_arrived(
        self, open_layer: OpenLayer, owner: LoopThread, has_arrived: bool
    ) -> None:
        layer = await open_layer()
        channel, receiving = await start_receiving(layer, owner)
        hand_over(layer, owner, channel, {"n": 1})
        if has_arrived:
            # After the callback that brings the answer, and before the task that waits for it.
            asyncio.get_running_loop().call_soon(receiving.cancel)
        else:
            receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        await layer.send(channel, {"n": 2})
        assert [(await receive(layer, channel))["n"] for _ in range(2)] == [1, 2]

    async def test_what_is_handed_over_is_acked_and_counts_as_received_when_it_is_accepted(
        self, open_layer: OpenLayer, owner: LoopThread
    ) -> None:
        layer = await open_layer()
        channel, receiving = await start_receiving(layer, owner)
        hand_over(layer, owner, channel, {"n": 1})

        def owners() -> LoopLayerStatistics:
            return statistics_of_id(layer, channel.partition("!")[0])

        assert (owners().unacked, owners().counters.consumed) == (0, 0)
        await receiving
        owner.block_until(lambda: not owners().in_hand_over)
        assert (owners().unacked, owners().counters.consumed) == (0, 1)

    async def test_at_any_moment(self, open_layer: OpenLayer, owner: LoopThread) -> None:
        layer = await open_layer(local_capacity=1000, remote_capacity=1000)
        channel = await owner.run(layer.new_channel())
        count = 300

        async def send_all() -> None:
            for n in range(count):
                await layer.send(channel, {"n": n})

        sending = owner.submit(send_all())
        received = await receive_cancelling(layer, channel, count, turns=6)
        assert received == list(range(count))
        await sending


class TestEnds:
    async def test_of_the_owner(self, open_layer: OpenLayer, owner: LoopThread) -> None:
        layer = await open_layer()
        channel, receiving = await start_receiving(layer, owner)
        owner.end()
        with pytest.raises(StopConsumer):
            await receiving
        for call in (
            layer.receive(channel),
            layer.group_add("g", channel),
            layer.group_discard("g", channel),
        ):
            with pytest.raises(ValueError, match="event loop of this process that has ended"):
                await call
        # Also once its traces are gone.
        with LoopThread() as another:
            await another.run(layer.new_channel())
            with pytest.raises(ValueError, match="event loop of this process that has ended"):
                await layer.receive(channel)

    async def test_of_the_owner_while_it_adds(
        self, open_layer: OpenLayer, owner: LoopThread
    ) -> None:
        async with silent_server() as server:
            layer = await open_layer(host=server.url)
            channel = await owner.run(layer.new_channel())
            adding = asyncio.create_task(layer.group_add("g", channel))
            await server.until_accepted()
            owner.end()
            with pytest.raises(BrokerUnavailable, match=r"ended|closed"):
                await adding
            await server.until_gone()

    async def test_of_the_owners_layer(self, open_layer: OpenLayer, owner: LoopThread) -> None:
        layer = await open_layer()
        channel, receiving = await start_receiving(layer, owner)
        await owner.run(layer.close())
        for call in (receiving, layer.receive(channel)):
            with pytest.raises(StopConsumer):
                await call
        with pytest.raises(BrokerUnavailable, match="closed"):
            await layer.group_add("g", channel)
        # It was not this loop's.
        own = await layer.new_channel()
        await layer.send(own, MESSAGE)
        assert await receive(layer, own) == MESSAGE

    async def test_of_the_caller_that_has_a_message_on_its_way(
        self, open_layer: OpenLayer, owner: LoopThread
    ) -> None:
        layer = await open_layer()
        channel = await owner.run(layer.new_channel())

        def call_and_end() -> None:
            """As programs older than ``asyncio.run`` do it: nothing is cancelled."""
            loop = asyncio.new_event_loop()
            receiving = loop.create_task(layer.receive(channel))
            # This test destroys it while it is pending.
            receiving._log_destroy_pending = False  # type: ignore[attr-defined]
            loop.run_until_complete(until_waiting(layer, owner, 1))
            hand_over(layer, owner, channel, {"n": 1})
            loop.close()

        await asyncio.to_thread(call_and_end)
        gc.collect()  # of the task, which knew its loop
        assert await receive(layer, channel) == {"n": 1}

    async def test_of_the_caller_before_the_message_comes(
        self, open_layer: OpenLayer, owner: LoopThread
    ) -> None:
        layer = await open_layer()
        channel = await owner.run(layer.new_channel())

        def call_and_end() -> asyncio.Task[dict[str, Any]]:
            loop = asyncio.new_event_loop()
            receiving = loop.create_task(layer.receive(channel))
            receiving._log_destroy_pending = False  # type: ignore[attr-defined]  # as above
            loop.run_until_complete(until_waiting(layer, owner, 1))
            loop.close()
            return receiving

        receiving = await asyncio.to_thread(call_and_end)
        # The other half finds that nobody can be told.
        await layer.send(channel, {"n": 1})
        assert await receive(layer, channel) == {"n": 1}
        del receiving
        gc.collect()

    async def test_of_the_owner_without_cancelling_anything(self, open_layer: OpenLayer) -> None:
        layer = await open_layer()
        stopped = asyncio.new_event_loop()
        channel = await asyncio.to_thread(stopped.run_until_complete, layer.new_channel())
        for call in (layer.receive(channel), layer.group_add("g", channel)):
            with pytest.raises(ValueError, match="event loop of this process that isn't running"):
                await call
        await asyncio.to_thread(stopped.run_until_complete, layer.close())
        stopped.close()


class TestErrors:
    async def test_full_queue_and_large_messages(self, open_layer: OpenLayer) -> None:
        """As the background loop forwards them; see also ``test_core.py``."""
        layer = await open_layer(local_capacity=1, remote_capacity=1, max_message_size=1000)
        channel = await layer.new_channel()

        def send_for_ever() -> None:
            while True:
                async_to_sync(layer.send)(channel, MESSAGE)

        def call() -> None:
            with pytest.raises(MessageTooLarge, match="1000"):
                async_to_sync(layer.send)(channel, {"body": b"x" * 1000})
            with pytest.raises(TypeError, match=r'message\["when"\]'):
                async_to_sync(layer.group_send)("g", {"when": object()})
            with pytest.raises(ChannelFull):
                send_for_ever()
            async_to_sync(layer.close)()

        await asyncio.to_thread(call)
