"""The broker is low on memory or disk space: it blocks publishers, and nothing else may stop.

Measured figures go to the log (``pytest --log-cli-level=INFO``).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from channels.exceptions import ChannelFull

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.layers import statistics_of, subscriber_of
from tests.support.lengths import Length
from tests.support.log_lines import log_lines, unhandled
from tests.support.traffic import Traffic
from tools.private_broker import PrivateBroker

figures = logging.getLogger("figures")

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

# Seconds: the layers' operation_timeout; and how long the alarm lasts, beyond it.
_TIMEOUT = Length(full=10.0, brief=2.0)
_ALARM = Length(full=20.0, brief=0.5)
# Seconds within which a send that finds publishers blocked fails. (In brief that is shown without a
# clock only: it doesn't wait for anything.)
_AT_ONCE = Length(full=0.05, brief=5.0)
# Seconds by which a busy machine may be late.
_GRACE = 5.0

_RATE = 100  # messages a second
_BACKLOG = 30

ALARMS = {
    "memory": (
        ("set_vm_memory_high_watermark", "0.00000001"),
        ("set_vm_memory_high_watermark", "0.8"),
    ),
    "disk": (("set_disk_free_limit", "900000000000000"), ("set_disk_free_limit", "1MB")),
}


@pytest.fixture(autouse=True)
def _nothing_unhandled(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    assert unhandled(caplog) == []


def step(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a call that must not wait for anything, to its end."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    pytest.fail("it waited")


@pytest.mark.parametrize("kind", ALARMS)
async def test_an_alarm(open_layer: OpenLayer, fault_broker: PrivateBroker, kind: str) -> None:
    broker = fault_broker
    alarm, all_clear = ALARMS[kind]
    config = {"host": broker.url, "operation_timeout": _TIMEOUT.value}
    sender, receiver = await open_layer(**config), await open_layer(**config)
    # Has ten messages itself and twenty on the broker when the alarm comes.
    slow = await open_layer(**config, local_capacity=10)
    backlog = await slow.new_channel()
    for n in range(_BACKLOG):
        await sender.send(backlog, {"type": "test.backlog", "n": n})
    async with Traffic(sender, receiver, channels=50, rate=_RATE) as traffic:
        await traffic.flows()
        with log_lines() as lines:
            try:
                await asyncio.to_thread(broker.ctl, *alarm)
                await lines.next(f"WARNING publisher .*: RabbitMQ blocks publishers.*{kind}")
                blocked_at = time.monotonic()
                sends_fail_at_once(sender, traffic.channels[0])
                await asyncio.wait_for(all_else_works(slow, backlog, broker), 30)
                # Whoever had written waits as long as a call may; and the alarm lasts.
                await asyncio.sleep(_TIMEOUT.value + _ALARM.value)
                unblocked_at = time.monotonic()
            finally:
                await asyncio.to_thread(broker.ctl, *all_clear)
            await lines.next("WARNING publisher .*: RabbitMQ takes messages again")
        again = await traffic.flows() - unblocked_at
        await traffic.finish()

    books = traffic.books
    found_blocked = [
        sent for sent in books.raised(ChannelFull) if blocked_at < sent.begun_at < unblocked_at
    ]
    assert len(found_blocked) > 10
    slowest = max(sent.duration for sent in found_blocked)
    longest = max(sent.duration for sent in books.sent)
    figures.info(
        "%s alarm on %s: %d sends found publishers blocked, the slowest failed after %.1f ms; the "
        "longest call took %.2f s of %g s; %d unknown; passing %.2f s after the alarm's end; %s",
        kind,
        ".".join(map(str, broker.version)),
        len(found_blocked),
        slowest * 1000,
        longest,
        _TIMEOUT.value,
        statistics_of(sender).counters.outcome_unknown,
        again,
        books.summary(),
    )
    assert slowest < _AT_ONCE.value
    assert longest < _TIMEOUT.value + _GRACE
    assert books.twice() == []
    assert books.raised_and_arrived() == []
    assert books.out_of_order == []


def sends_fail_at_once(sender: RabbitmqChannelLayer, channel: str) -> None:
    with pytest.raises(ChannelFull, match="low on memory or disk space"):
        step(sender.send(channel, {"type": "test.refused"}))
    dropped = statistics_of(sender).counters.blocked
    step(sender.group_send("g", {"type": "test.refused"}))
    assert statistics_of(sender).counters.blocked == dropped + 1


async def all_else_works(layer: RabbitmqChannelLayer, backlog: str, broker: PrivateBroker) -> None:
    """What waits is delivered and acked, and groups are bound."""
    for n in range(_BACKLOG):
        assert (await layer.receive(backlog))["n"] == n
    await layer.group_add("during-the-alarm", backlog)
    queue = subscriber_of(layer).queue
    rows = {row["name"]: row for row in await asyncio.to_thread(broker.list_queues)}
    assert rows[queue]["messages"] == 0
    keys = {row["routing_key"] for row in await asyncio.to_thread(broker.list_bindings)}
    assert "during-the-alarm" in keys


async def test_event_loops_of_one_call_tell_an_alarm_once(
    fault_broker: PrivateBroker, groups_exchange: str
) -> None:
    """Also its end, which the first finds whose connection is made after it."""
    layer = RabbitmqChannelLayer(host=fault_broker.url, groups_exchange=groups_exchange)

    def send_thrice() -> None:
        for _ in range(3):
            asyncio.run(layer.group_send("g", {"type": "test.message"}))

    alarm, all_clear = ALARMS["memory"]
    with log_lines() as lines:
        for _ in range(2):
            try:
                await asyncio.to_thread(fault_broker.ctl, *alarm)
                await asyncio.to_thread(send_thrice)
            finally:
                await asyncio.to_thread(fault_broker.ctl, *all_clear)
            await asyncio.to_thread(send_thrice)
    told = re.compile("WARNING publisher .*: RabbitMQ (blocks publishers|takes messages again)")
    found = [match.group(1) for line in lines.all if (match := told.match(line))]
    # On a busy machine RabbitMQ takes the first message of a new connection before that one hears
    # of the alarm. Then both are told once more, each in its turn.
    assert found == ["blocks publishers", "takes messages again"] * (len(found) // 2)
    assert len(found) >= 4
