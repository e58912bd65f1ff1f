"""Processes with channels_rabbitmq 4 and with ours on one broker, as during a rolling upgrade."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pamqp import commands

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.amqp_proxy import TO_CLIENT, AmqpProxy, Frame
from tests.support.brokers import Broker
from tests.support.layers import statistics_of
from tests.support.log_lines import log_lines
from tests.support.members import GROUP, open_member, receive, reconnect
from tests.support.old_version import OldProcess, make_environment
from tools.private_broker import PrivateBroker

# A process starts for each test; at the first run its environment is made, from PyPI.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

FROM_OLD = {"type": "from.old", "text": "grüße", "list": [1, [None, True]], "raw": b"\xff\0"}
FROM_NEW = {"type": "from.new", "text": "größe", "list": [2, [None, False]], "raw": b"\0\xff"}


@pytest.fixture(scope="module")
def old_python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python in an environment with channels_rabbitmq 4."""
    return make_environment(request.config, tmp_path_factory)


@pytest.fixture
async def old(broker: Broker, groups_exchange: str, old_python: Path) -> AsyncIterator[OldProcess]:
    async with OldProcess(old_python, host=broker.url, groups_exchange=groups_exchange) as old:
        yield old


async def open_old_member(old: OldProcess) -> str:
    channel: str = await old.call("new_channel")
    await old.call("group_add", GROUP, channel)
    return channel


async def must_share_a_group(
    new: RabbitmqChannelLayer, new_channel: str, old: OldProcess, old_channel: str
) -> None:
    """What each of them sends to the group reaches both, once."""
    await new.group_send(GROUP, FROM_NEW)
    assert await old.receive(old_channel) == FROM_NEW
    assert await receive(new, new_channel) == FROM_NEW
    await old.call("group_send", GROUP, FROM_OLD)
    assert await old.receive(old_channel) == FROM_OLD
    assert await receive(new, new_channel) == FROM_OLD


async def test_groups_in_both_directions_also_after_our_reconnects(
    open_layer: OpenLayer, old: OldProcess
) -> None:
    old_channel = await open_old_member(old)
    new, new_channel = await open_member(open_layer)
    for _ in range(3):
        await must_share_a_group(new, new_channel, old, old_channel)
        await reconnect(new)
        await new.group_add(GROUP, new_channel)  # returns when it is bound again


async def test_ours_first_then_the_old_one(open_layer: OpenLayer, old: OldProcess) -> None:
    """Either declares the exchange so that the other takes it as it is."""
    new, new_channel = await open_member(open_layer)
    await must_share_a_group(new, new_channel, old, await open_old_member(old))


async def test_an_old_process_hears_no_request(
    open_layer: OpenLayer, broker: Broker, groups_exchange: str, old_python: Path
) -> None:
    """It would log each as a message that it can't read."""
    async with (
        AmqpProxy(broker.url) as proxy,
        OldProcess(old_python, host=proxy.url, groups_exchange=groups_exchange) as old,
    ):
        delivered: list[str] = []

        def note(frame: Frame) -> Frame:
            delivered.append(frame.decode().routing_key)
            return frame

        proxy.rule(TO_CLIENT, commands.Basic.Deliver, note)
        old_channel = await open_old_member(old)
        members = [await open_member(open_layer) for _ in range(2)]
        for layer, _ in members:
            await reconnect(layer)
        (one, channel), (other, other_channel) = members
        for _ in range(3):
            # Its members are no concern of ours.
            await one.group_add(GROUP, other_channel, {"n": 1})
            result = await one.group_members(GROUP, 10.0)
            assert {member.channel for member in result.members} == {channel, other_channel}
            await must_share_a_group(one, channel, old, old_channel)
            for _ in range(2):
                await receive(other, other_channel)
            with pytest.raises(ValueError, match="wasn't made by new_channel"):
                await one.group_add(GROUP, old_channel)
        await other.close()  # says bye
        await must_share_a_group(one, channel, old, old_channel)
        assert set(delivered) == {GROUP}


async def test_leaving_a_group(open_layer: OpenLayer, old: OldProcess) -> None:
    old_channel = await open_old_member(old)
    new, new_channel = await open_member(open_layer)
    await new.group_discard(GROUP, new_channel)
    await old.call("group_send", GROUP, FROM_OLD)
    assert await old.receive(old_channel) == FROM_OLD
    await new.group_add(GROUP, new_channel)
    await old.call("group_discard", GROUP, old_channel)
    await new.group_send(GROUP, FROM_NEW)
    assert await receive(new, new_channel) == FROM_NEW
    await new.send(old_channel, {"type": "next"})
    assert await old.receive(old_channel) == {"type": "next"}


async def test_our_sends_to_an_old_process(open_layer: OpenLayer, old: OldProcess) -> None:
    new = await open_layer()
    old_channel = await open_old_member(old)  # it connects only now, new_channel() didn't do it
    await new.send(old_channel, FROM_NEW)
    assert await old.receive(old_channel) == FROM_NEW
    large = {"type": "large", "text": "x" * 2**20}
    await new.send(old_channel, large)
    assert await old.receive(old_channel) == large


async def test_its_sends_to_us_until_our_first_reconnect(
    open_layer: OpenLayer, old: OldProcess
) -> None:
    """Afterwards they go nowhere, without an error on either side; groups go on."""
    new, new_channel = await open_member(open_layer)
    await old.call("send", new_channel, FROM_OLD)
    assert await receive(new, new_channel) == FROM_OLD
    await reconnect(new)
    await new.group_add(GROUP, new_channel)
    await old.call("send", new_channel, FROM_OLD)
    await old.call("group_send", GROUP, {"type": "next"})
    assert await receive(new, new_channel) == {"type": "next"}


async def test_an_old_process_that_died(open_layer: OpenLayer, old: OldProcess) -> None:
    """Sends to it end in time, are counted and logged, and hold up nothing else."""
    new, new_channel = await open_member(open_layer, operation_timeout=3.0)
    old_channel = await open_old_member(old)
    await must_share_a_group(new, new_channel, old, old_channel)
    await old.kill()
    with log_lines() as lines:
        # The broker may take a moment to see that its connection is gone, and its queue with it.
        while not statistics_of(new).counters.unreachable:
            await asyncio.wait_for(new.send(old_channel, FROM_NEW), 5)
        line = await lines.next("WARNING")
        assert "dropped: the process of their channel is gone" in line
        assert old_channel in line
        before = statistics_of(new).counters.unreachable
        # The process is known to be gone now: no second wait.
        await asyncio.wait_for(
            asyncio.gather(*(new.send(old_channel, FROM_NEW) for _ in range(50))), 1
        )
        assert statistics_of(new).counters.unreachable == before + 50
        await new.group_send(GROUP, FROM_NEW)
        assert await receive(new, new_channel) == FROM_NEW
        await new.close()
        assert not [line for line in lines.rest() if "Traceback" in line or "ERROR" in line]


async def test_full_queues_in_both_directions(
    open_layer: OpenLayer, broker: Broker, groups_exchange: str, old_python: Path
) -> None:
    """Back-pressure crosses the versions: ``ChannelFull`` for the sender, nothing else lost."""
    config: dict[str, Any] = {"local_capacity": 1, "remote_capacity": 1}
    new, new_channel = await open_member(open_layer, **config)
    old = OldProcess(old_python, host=broker.url, groups_exchange=groups_exchange, **config)
    async with old:
        old_channel = await open_old_member(old)

        async def fill_old() -> None:
            for n in range(20):
                await new.send(old_channel, {"n": n})

        async def fill_new() -> None:
            for n in range(20):
                await old.call("send", new_channel, {"n": n})

        with pytest.raises(new.ChannelFull):
            await fill_old()
        with pytest.raises(RuntimeError, match=r"^ChannelFull"):
            await fill_new()
        assert await old.receive(old_channel) == {"n": 0}
        assert await receive(new, new_channel) == {"n": 0}


async def test_a_message_which_other_old_processes_would_not_survive(
    open_layer: OpenLayer, old: OldProcess
) -> None:
    """Version 4 lets one send a key that isn't a string, and stops for good where it arrives."""
    new, new_channel = await open_member(open_layer)
    message = {"type": "t", "counts": {1: 2}}
    await old.call("group_send", GROUP, message)
    assert await receive(new, new_channel) == message


async def test_a_restart_of_the_broker(
    open_layer: OpenLayer, private_broker: PrivateBroker, old_python: Path
) -> None:
    """Both come back; from then on groups work in both directions, and our sends to the old one."""
    config: dict[str, Any] = {"host": private_broker.url, "groups_exchange": "groups"}
    async with OldProcess(old_python, **config) as old:
        old_channel = await open_old_member(old)
        new, new_channel = await open_member(open_layer, **config)
        await must_share_a_group(new, new_channel, old, old_channel)
        with log_lines() as lines:
            await asyncio.to_thread(private_broker.kill)
            await lines.next("WARNING subscriber .*: lost the connection")
            await asyncio.to_thread(private_broker.start)
            await lines.next("WARNING subscriber .*: connected again")
        await new.group_add(GROUP, new_channel)
        # Returns once the old process is connected again. It binds its groups before that.
        await old.call("group_add", GROUP, old_channel)
        await must_share_a_group(new, new_channel, old, old_channel)
        await new.send(old_channel, FROM_NEW)
        assert await old.receive(old_channel) == FROM_NEW
