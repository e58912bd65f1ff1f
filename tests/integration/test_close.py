"""``close()`` at the worst moments: it returns within ``operation_timeout`` and leaves nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import carehare
import pamqp.commands as commands
import pytest
from channels.exceptions import StopConsumer

from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq._broker.supervisor import State
from channels_rabbitmq._carehare.connection import CarehareConnection
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_proxy import TO_CLIENT, AmqpProxy
from tests.support.brokers import Broker
from tests.support.fake_servers import silent_server
from tests.support.layers import inside, statistics_of
from tests.support.log_lines import LogLines
from tests.support.remains import pending_futures
from tools.private_broker import free_port

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test.message"}

# The default. (After clients that have gone in the midst of a handshake RabbitMQ 4.0 may leave the
# next ones waiting for five seconds.)
_OPERATION_TIMEOUT = 10.0


class Closing:
    """Closes a layer within the time that it may take, and looks at what is left."""

    def __init__(self, layer: RabbitmqChannelLayer, proxy: AmqpProxy, broker: Broker) -> None:
        self.layer = layer
        self._proxy = proxy
        self._broker = broker
        self._tasks = asyncio.all_tasks()

    @property
    def supervisors(self) -> list[Any]:
        loop_layer: Any = inside(self.layer)
        return [loop_layer.subscriber.supervisor, loop_layer.publisher.supervisor]

    async def close(self) -> None:
        await asyncio.wait_for(self.layer.close(), _OPERATION_TIMEOUT)

    async def until(self, *states: State) -> None:
        """Wait until both connections are in one of these states."""
        deadline = asyncio.get_running_loop().time() + 20
        while any(supervisor.state not in states for supervisor in self.supervisors):
            assert asyncio.get_running_loop().time() < deadline, self.supervisors
            await asyncio.sleep(0.005)

    async def nothing_is_left(self) -> None:
        """No task, timer, link or queue."""
        loop_layer: Any = inside(self.layer)
        assert loop_layer.is_closed
        assert all(supervisor.state is State.CLOSED for supervisor in self.supervisors)
        await self._proxy.until(lambda: not self._proxy.links)
        layers_own = [
            task for task in asyncio.all_tasks() - self._tasks if "channels_rabbitmq" in repr(task)
        ]
        assert layers_own == []
        await self._no_queue_is_left(loop_layer)
        with pytest.raises(StopConsumer):
            await self.layer.receive(f"{loop_layer.id}!x")
        with pytest.raises(BrokerUnavailable, match="closed"):
            await self.layer.group_send("g", MESSAGE)

    async def _no_queue_is_left(self, loop_layer: Any) -> None:
        """The broker takes a moment, when it wasn't told."""
        names = [loop_layer.id, *(f"{loop_layer.id}.{number}" for number in range(2, 5))]
        deadline = asyncio.get_running_loop().time() + 20
        opened = Connection(BrokerUrl.parse(self._broker.url))
        await opened.connect()
        connection = CarehareConnection(opened)
        for name in names:
            while True:
                try:
                    await connection.queue_declare(name, passive=True)
                except carehare.ChannelClosedByServer as err:
                    if err.reply_code == 404:
                        break
                    if err.reply_code != 405:  # there still, and exclusive
                        raise
                assert asyncio.get_running_loop().time() < deadline, f"{name} is left"
                await asyncio.sleep(0.05)
        await connection.close()


@pytest.fixture
async def closing(open_layer: OpenLayer, proxy: AmqpProxy, broker: Broker) -> Closing:
    layer = await open_layer(host=proxy.url, operation_timeout=_OPERATION_TIMEOUT)
    return Closing(layer, proxy, broker)


# What the broker says last, before it is closed: from the handshake to the set-up's end
_STAGES = [
    commands.Connection.Start,
    commands.Connection.Tune,
    commands.Connection.OpenOk,
    commands.Channel.OpenOk,
    commands.Exchange.DeclareOk,
    commands.Queue.DeclareOk,
    commands.Basic.ConsumeOk,
    commands.Confirm.SelectOk,
]


@pytest.mark.parametrize("stage", _STAGES, ids=lambda stage: stage.name)
async def test_while_connecting(
    closing: Closing, proxy: AmqpProxy, lines_without_errors: LogLines, stage: type
) -> None:
    """Calls of all kinds wait for it; the broker has stopped answering at one point."""
    proxy.drop(TO_CLIENT, stage)
    layer = closing.layer
    channel = await layer.new_channel()
    calls = [
        asyncio.create_task(call)
        for call in (
            layer.receive(channel),
            layer.group_send("g", MESSAGE),
            layer.group_add("g", channel),
            layer.send(channel, MESSAGE),
            layer.connect(),
        )
    ]
    await proxy.seen(TO_CLIENT, stage)
    await closing.close()
    await asyncio.wait(calls, timeout=10)
    for call in calls:
        exc = call.exception()
        # One of the two connections may have been set up: not all stages are both's.
        assert exc is None or isinstance(exc, (StopConsumer, BrokerUnavailable))
    assert isinstance(calls[0].exception(), StopConsumer)
    await closing.nothing_is_left()


async def test_while_nobody_answers(open_layer: OpenLayer, lines_without_errors: LogLines) -> None:
    """Neither a host that refuses, nor one that accepts and says nothing, holds it up."""
    async with silent_server() as server:
        for url in (f"amqp://127.0.0.1:{free_port()}", server.url):
            layer = await open_layer(host=url, operation_timeout=_OPERATION_TIMEOUT)
            channel = await layer.new_channel()
            receiving = asyncio.create_task(layer.receive(channel))
            await asyncio.sleep(0.05)  # so that it has begun, or waits to try again
            await asyncio.wait_for(layer.close(), _OPERATION_TIMEOUT)
            with pytest.raises(StopConsumer):
                await receiving
        await server.until_gone()


@pytest.mark.slow
@pytest.mark.parametrize("state", [State.WAITING, State.CONNECTING])
async def test_while_reconnecting(
    closing: Closing, proxy: AmqpProxy, lines_without_errors: LogLines, state: State
) -> None:
    layer = closing.layer
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    await layer.connect()
    await layer.send(channel, MESSAGE)
    assert await layer.receive(channel) == MESSAGE  # It was on its way here.
    receiving = [asyncio.create_task(layer.receive(channel)) for _ in range(10)]
    if state is State.WAITING:
        proxy.refuse()
    else:
        proxy.drop(TO_CLIENT, commands.Connection.Tune)
    proxy.cut()
    await closing.until(state)
    calls = [
        asyncio.create_task(call)
        for call in (
            layer.send(channel, MESSAGE),
            layer.group_send("g", MESSAGE),
            layer.group_add("other", channel),
        )
    ]
    await asyncio.sleep(0)  # lets them begin
    await closing.close()
    for task in receiving:
        with pytest.raises(StopConsumer):
            await task
    for call in calls:
        with pytest.raises(BrokerUnavailable, match="closed"):
            await call
    await proxy.accept()
    await closing.nothing_is_left()


async def test_during_a_thousand_receives(closing: Closing, lines_without_errors: LogLines) -> None:
    layer = closing.layer
    channels = [await layer.new_channel() for _ in range(500)]
    await layer.connect()
    receiving = [
        asyncio.create_task(layer.receive(channel)) for channel in channels for _ in range(2)
    ]
    await layer.send(channels[0], MESSAGE)  # by then all of them wait
    assert await receiving[0] == MESSAGE
    assert statistics_of(layer).receivers == 999
    futures = pending_futures()
    await closing.close()
    await asyncio.wait(receiving[1:], timeout=10)
    for task in receiving[1:]:
        assert isinstance(task.exception(), StopConsumer)
    await closing.nothing_is_left()
    assert pending_futures() < futures - 2 * 999  # a task and a future for each of them


async def test_with_messages_that_nobody_has_received(
    closing: Closing, lines_without_errors: LogLines
) -> None:
    layer = closing.layer
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    for _ in range(150):  # more than local_capacity: some are on the broker still
        await layer.group_send("g", MESSAGE)
    await closing.close()
    with pytest.raises(StopConsumer):
        await layer.receive(channel)
    await closing.nothing_is_left()


async def test_twice_one_after_the_other_and_at_once(
    closing: Closing, lines_without_errors: LogLines
) -> None:
    layer = closing.layer
    await layer.connect()
    await asyncio.gather(closing.close(), closing.close(), closing.close())
    await closing.close()
    await closing.nothing_is_left()
    await closing.close()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["answers", "frozen"])
async def test_cancelled_at_any_moment(
    open_layer: OpenLayer,
    proxy: AmqpProxy,
    broker: Broker,
    lines_without_errors: LogLines,
    frozen: bool,
) -> None:
    """It ends everything all the same, a moment later; also when it's called again meanwhile."""
    chance = random.Random(11)
    for moment in [*range(5), 0.001, 0.01]:
        layer = await open_layer(host=proxy.url, operation_timeout=_OPERATION_TIMEOUT)
        closing = Closing(layer, proxy, broker)
        channel = await layer.new_channel()
        await layer.group_add("g", channel)
        await layer.connect()
        receiving = asyncio.create_task(layer.receive(channel))
        await asyncio.sleep(0)  # lets it begin
        if frozen:
            proxy.stall()
        task = asyncio.create_task(layer.close())
        if isinstance(moment, int):
            for _ in range(moment):
                await asyncio.sleep(0)  # so that it has come to one point or another
        else:
            await asyncio.sleep(moment)
        task.cancel()
        await asyncio.wait([task], timeout=_OPERATION_TIMEOUT)
        assert task.done()
        if moment == 0:
            await closing.close()  # It never began.
        elif chance.random() < 0.5:
            await closing.close()
        else:
            # Nobody calls it again, and yet all of it ends.
            ends = [supervisor.wait_closed() for supervisor in closing.supervisors]
            await asyncio.wait_for(asyncio.gather(*ends), _OPERATION_TIMEOUT)
        with pytest.raises(StopConsumer):
            await asyncio.wait_for(receiving, _OPERATION_TIMEOUT)
        proxy.resume()
        await closing.close()
        await closing.nothing_is_left()
