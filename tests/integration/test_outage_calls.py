"""A long outage holds up no call, whatever the reason and the caller; a short one is bridged."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_proxy import AmqpProxy
from tests.support.brokers import Broker
from tests.support.calls import CALLS
from tests.support.log_lines import log_lines
from tests.support.loop_thread import LoopThread
from tests.support.patience import connect_patiently
from tools.private_broker import PrivateBroker, TlsFiles, free_port

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

MESSAGE = {"type": "test"}
# Seconds: less than any wait for the broker, and more than a busy machine needs for an error.
AT_ONCE = 0.5


async def seconds_until_unavailable(call: Awaitable[object], *words: str) -> float:
    begun_at = time.monotonic()
    with pytest.raises(BrokerUnavailable, match="No connection to RabbitMQ") as caught:
        await call
    for word in words:
        assert word in str(caught.value)
    assert "s3cret" not in str(caught.value)
    return time.monotonic() - begun_at


async def each_fails_at_once(layer: RabbitmqChannelLayer, channel: str, *words: str) -> None:
    for call in CALLS.values():
        assert await seconds_until_unavailable(call(layer, channel), *words) < AT_ONCE


# A broker that was never there


async def test_nobody_listens(open_layer: OpenLayer) -> None:
    url = f"amqp://me:s3cret@127.0.0.1:{free_port()}/v"
    layer = await open_layer(host=url, operation_timeout=1)
    channel = await layer.new_channel()
    words = (url.replace(":s3cret", ""), "Connect call failed")
    assert 0.9 < await seconds_until_unavailable(layer.group_send("nobody", MESSAGE), *words) < 4
    # Connections that nobody has asked for before count from then on, too.
    await each_fails_at_once(layer, channel, *words)
    await each_fails_at_once(layer, channel, *words)


@pytest.mark.slow
async def test_all_calls_that_wait_fail_together(open_layer: OpenLayer) -> None:
    """The second half of the outage's first seconds is not begun anew by who comes then."""
    host = f"amqp://127.0.0.1:{free_port()}"
    layer = await open_layer(host=host, operation_timeout=3.0)
    channel = await layer.new_channel()
    begun_at = time.monotonic()
    calls = [asyncio.create_task(layer.send(channel, MESSAGE))]
    for call in CALLS.values():
        await asyncio.sleep(0.3)  # so that they begin at different times
        calls.append(asyncio.ensure_future(call(layer, channel)))
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, BrokerUnavailable) for result in results)
    assert time.monotonic() - begun_at < 3.0 + 1.5  # else the last would take 5.4


REFUSED = {
    "password": ("guest:s3cret", "/", "403 ACCESS_REFUSED"),
    "virtual host": ("guest:guest", "/s3cret-no", "530 NOT_ALLOWED"),
}


@pytest.mark.parametrize("what", REFUSED)
async def test_what_is_refused_in_words_fails_at_once(
    open_layer: OpenLayer, broker: Broker, what: str
) -> None:
    login, path, words = REFUSED[what]
    parts = urlsplit(broker.url)
    path = path.replace("s3cret-", "")
    layer = await open_layer(host=f"amqp://{login}@{parts.hostname}:{parts.port}{path}")
    channel = await layer.new_channel()
    for name, call in CALLS.items():
        if name == "connect":
            continue  # waits: the broker may be about to read its definitions
        # The broker itself takes its time to refuse a login.
        assert await seconds_until_unavailable(call(layer, channel), words) < 3
    # connect() has its whole time.
    connecting = asyncio.create_task(layer.connect())
    await asyncio.wait([connecting], timeout=1)
    assert not connecting.done()
    connecting.cancel()


@pytest.mark.slow  # a broker starts
async def test_a_certificate_of_an_unknown_authority_fails_at_once(
    open_layer: OpenLayer, private_broker_factory: Callable[..., PrivateBroker], certs: Path
) -> None:
    broker = private_broker_factory(tls=TlsFiles.in_folder(certs))
    layer = await open_layer(host=broker.tls_url)
    channel = await layer.new_channel()
    words = (f"amqps://guest@127.0.0.1:{urlsplit(broker.tls_url).port}", "TLS certificate refused")
    for name, call in CALLS.items():
        if name != "connect":
            assert await seconds_until_unavailable(call(layer, channel), *words) < 3


# From elsewhere


async def test_calls_that_another_event_loop_serves(open_layer: OpenLayer) -> None:
    host = f"amqp://127.0.0.1:{free_port()}"
    layer = await open_layer(host=host, operation_timeout=1)
    with LoopThread() as owner:
        channel = await owner.run(layer.new_channel())
        assert await seconds_until_unavailable(layer.group_add("g", channel)) < 4
        for _ in range(3):
            assert await seconds_until_unavailable(layer.group_add("g", channel)) < AT_ONCE
        await owner.run(layer.close())


# A broker that goes and comes back


async def used(layer: RabbitmqChannelLayer) -> str:
    """Open all connections; return a member of the group "g"."""
    await connect_patiently(layer)
    channel = await layer.new_channel()
    await layer.group_add("g", channel)
    await layer.send(channel, MESSAGE)
    await layer.carehare_connection
    return channel


async def go_away(proxy: AmqpProxy) -> None:
    """Return when that is noticed: what is written before may be lost without an error."""
    with log_lines() as lines:
        proxy.refuse()
        proxy.cut()
        for _ in range(3):
            await lines.next("WARNING .*: lost the connection")


async def all_go_on(layer: RabbitmqChannelLayer, channel: str) -> None:
    """Also the first ones fail only for a moment: they have the next attempt made."""
    back_at = time.monotonic()
    for name, call in CALLS.items():
        if name == "send":
            continue  # to a process that may be reconnecting: for its sake it takes longer
        while True:
            try:
                await call(layer, channel)
                break
            except BrokerUnavailable:
                await asyncio.sleep(0.01)
        assert time.monotonic() - back_at < 2, name


async def test_a_broker_that_goes_and_comes_back(open_layer: OpenLayer, proxy: AmqpProxy) -> None:
    layer = await open_layer(host=proxy.url, operation_timeout=1)
    channel = await used(layer)
    await go_away(proxy)
    begun_at = time.monotonic()
    calls = [asyncio.ensure_future(call(layer, channel)) for call in CALLS.values()]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, BrokerUnavailable) for result in results)
    assert 0.9 < time.monotonic() - begun_at < 4
    await each_fails_at_once(layer, channel, "Connect call failed")
    # And as soon as it is back, all go on; calls that fail look for it.
    await proxy.accept()
    await all_go_on(layer, channel)


async def test_a_call_bridges_a_restart(open_layer: OpenLayer, proxy: AmqpProxy) -> None:
    layer = await open_layer(host=proxy.url, operation_timeout=30)
    channel = await used(layer)
    await go_away(proxy)
    calls = [
        asyncio.ensure_future(call(layer, channel))
        for name, call in CALLS.items()
        if "fast" not in name
    ]
    await asyncio.sleep(0.5)
    assert not any(call.done() for call in calls)
    await proxy.accept()
    await asyncio.gather(*calls)


async def test_a_receive_waits_however_long_it_lasts(
    open_layer: OpenLayer, proxy: AmqpProxy
) -> None:
    layer = await open_layer(host=proxy.url, operation_timeout=1)
    channel = await layer.new_channel()
    await connect_patiently(layer)
    receiving = asyncio.create_task(layer.receive(channel))
    proxy.refuse()
    proxy.cut()
    failed = 0
    while failed < 5:  # The loss isn't noticed at once.
        try:
            await layer.send(channel, MESSAGE)
        except BrokerUnavailable:
            failed += 1
        await asyncio.sleep(0.1)
    assert not receiving.done()
    await proxy.accept()
    while not receiving.done():
        with contextlib.suppress(BrokerUnavailable):
            await layer.send(channel, MESSAGE)
        await asyncio.sleep(0.01)
    assert await receiving == MESSAGE


async def test_calls_that_wait_for_their_turn_wait_no_longer_than_the_outage_lets_them(
    open_layer: OpenLayer, proxy: AmqpProxy
) -> None:
    """Behind a message that is tried again, since its process may be back."""
    layer = await open_layer(host=proxy.url, operation_timeout=1.5)
    other = await open_layer()
    channel = await other.new_channel()
    await other.connect()
    await used(layer)
    await layer.send(channel, MESSAGE)
    await other.close()
    calls = [asyncio.create_task(layer.send(channel, MESSAGE)) for _ in range(5)]
    await go_away(proxy)
    begun_at = time.monotonic()
    calls += [asyncio.create_task(layer.send(channel, MESSAGE)) for _ in range(5)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    # Some were written before the outage.
    assert sum(isinstance(result, BrokerUnavailable) for result in results) >= 5
    assert time.monotonic() - begun_at < 1.5 + AT_ONCE
    begun_at = time.monotonic()
    calls = [asyncio.create_task(layer.send(channel, MESSAGE)) for _ in range(5)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, BrokerUnavailable) for result in results)
    assert time.monotonic() - begun_at < AT_ONCE


@pytest.mark.slow  # a broker is stopped and started
async def test_a_real_broker_stopped_for_longer_than_a_call_may_take(
    open_layer: OpenLayer, private_broker: PrivateBroker
) -> None:
    layer = await open_layer(host=private_broker.url, operation_timeout=2)
    channel = await used(layer)
    await asyncio.to_thread(private_broker.shut_down)
    await asyncio.sleep(2)
    await each_fails_at_once(layer, channel, str(private_broker.port))
    starting = asyncio.create_task(asyncio.to_thread(private_broker.start))
    # All the time while it starts, which takes longer than operation_timeout.
    while not starting.done():
        begun_at = time.monotonic()
        with contextlib.suppress(BrokerUnavailable):
            await layer.group_send("nobody", MESSAGE)
            break
        assert time.monotonic() - begun_at < AT_ONCE
        await asyncio.sleep(0.05)
    await starting
    await all_go_on(layer, channel)
