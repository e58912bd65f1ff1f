"""Connections that nobody closed and nothing passes through.

Measured figures go to the log (``pytest --log-cli-level=INFO``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from channels.exceptions import ChannelFull

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.amqp_proxy import AmqpProxy
from tests.support.layers import statistics_of
from tests.support.lengths import Length
from tests.support.log_lines import log_lines, unhandled
from tests.support.traffic import Traffic
from tools.private_broker import PrivateBroker

figures = logging.getLogger("figures")

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

_HEARTBEAT = Length(full=10, brief=2)  # seconds
# Beyond the two heartbeats within which a loss is to be noticed: the brief tests run beside others
# on small machines, where a timer may be late.
_GRACE = Length(full=0.0, brief=10.0)
# How long the broker stays frozen after everybody has noticed.
_FROZEN = Length(full=15.0, brief=1.0)

_RATE = 200  # messages a second


@pytest.fixture(autouse=True)
def _nothing_unhandled(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    assert unhandled(caplog) == []


async def test_a_half_open_connection_is_replaced_before_the_broker_notices(
    open_layer: OpenLayer, fault_broker: PrivateBroker
) -> None:
    """The dead queue fills up, and refuses; that must not reach those who send to the new one."""
    async with AmqpProxy(fault_broker.url) as proxy:
        sender = await open_layer(host=fault_broker.url)
        receiver = await open_layer(
            host=f"{proxy.url}?heartbeat={_HEARTBEAT.count}", remote_capacity=100
        )
        async with Traffic(sender, receiver, channels=100, rate=_RATE) as traffic:
            books = traffic.books
            await traffic.flows()
            with log_lines() as lines:
                vanished_at = time.monotonic()
                (link,) = proxy.vanish(name="subscriber")
                line = await lines.next("WARNING subscriber .*: lost", timeout=60)
                noticed = time.monotonic() - vanished_at
                assert "has been silent" in line
                await lines.next("WARNING subscriber .*: connected again")
            connected_at = time.monotonic()
            assert link in proxy.links, "the broker still has the old connection"
            # To names that were handed out before.
            delivering = await traffic.flows() - vanished_at
            assert link in proxy.links
            await proxy.until(lambda: link not in proxy.links, timeout=4 * _HEARTBEAT.value + 20)
            released = time.monotonic() - vanished_at
            await traffic.flows()
            await traffic.finish()
        refused = books.raised(ChannelFull)
        figures.info(
            "half-open on %s, heartbeat %d s: noticed after %.2f s, delivering after %.2f s, "
            "the broker dropped the old queue after %.2f s; %d ChannelFull before that, "
            "%d since the reconnect; %s",
            ".".join(map(str, fault_broker.version)),
            _HEARTBEAT.count,
            noticed,
            delivering,
            released,
            len(refused),
            sum(sent.begun_at > connected_at for sent in refused),
            books.summary(),
        )
        assert noticed < 2 * _HEARTBEAT.value + _GRACE.value
        assert refused, "the dead queue was not full: nothing was shown"
        assert [sent for sent in refused if sent.begun_at > connected_at] == []
        assert books.raised_and_arrived() == []
        assert books.twice() == []
        assert books.out_of_order == []
        assert books.lost(since=connected_at) == []


async def test_a_frozen_broker_is_noticed_and_serves_again_once_it_thaws(
    open_layer: OpenLayer, fault_broker: PrivateBroker
) -> None:
    url = f"{fault_broker.url}?heartbeat={_HEARTBEAT.count}"
    sender, receiver = await open_layer(host=url), await open_layer(host=url)
    async with Traffic(sender, receiver, channels=100, rate=_RATE) as traffic:
        books = traffic.books
        await traffic.flows()
        with log_lines() as lines:
            await asyncio.to_thread(fault_broker.freeze)
            frozen_at = time.monotonic()
            try:
                noticed = []
                for _ in ("publisher", "subscriber"):
                    line = await lines.next("WARNING .*: lost", timeout=60)
                    assert "has been silent" in line
                    noticed.append(time.monotonic() - frozen_at)
                await asyncio.sleep(_FROZEN.value)
            finally:
                fault_broker.thaw()
            thawed_at = time.monotonic()
            delivering = await traffic.flows() - thawed_at
        await traffic.finish()
    figures.info(
        "frozen on %s, heartbeat %d s: noticed after %.2f and %.2f s, delivering %.2f s after it "
        "thawed; %s; %d unknown",
        ".".join(map(str, fault_broker.version)),
        _HEARTBEAT.count,
        *noticed,
        delivering,
        books.summary(),
        statistics_of(sender).counters.outcome_unknown,
    )
    assert max(noticed) < 2 * _HEARTBEAT.value + _GRACE.value
    assert books.raised_and_arrived() == []
    assert books.twice() == []
    assert books.out_of_order == []
    # What was lost was under way when it froze.
    assert books.lost(until=frozen_at - 1) == []
    assert books.lost(since=thawed_at) == []
