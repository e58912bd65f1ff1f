"""The proxy between real clients and a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import carehare
import pika  # type: ignore[import-untyped]  # has no annotations
import pytest
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader, ProtocolHeader
from pamqp.heartbeat import Heartbeat

from tests.support.amqp_proxy import TO_BROKER, TO_CLIENT, AmqpProxy, Frame
from tests.support.brokers import Broker
from tests.support.fake_servers import closing_server, fake_server, silent_server
from tools.private_broker import PrivateBroker, TlsFiles


@pytest.fixture
async def client(proxy: AmqpProxy) -> AsyncIterator[carehare.Connection]:
    """Open; the test may break it."""
    connection = carehare.Connection(proxy.url, connect_timeout=5)
    await connection.connect()
    yield connection
    with contextlib.suppress(carehare.ConnectionClosed, carehare.ConnectionClosedByServer, OSError):
        await connection.close()


@pytest.fixture
async def queue(client: carehare.Connection) -> str:
    """The name of a queue that goes with the client."""
    name = f"test-{secrets.token_hex(8)}"
    await client.queue_declare(name, exclusive=True)
    return name


async def send(client: carehare.Connection, queue: str, *bodies: bytes) -> None:
    for body in bodies:
        await client.publish(body, exchange_name="", routing_key=queue)


async def test_everything_passes_by_default(
    proxy: AmqpProxy, client: carehare.Connection, queue: str
) -> None:
    large = bytes(range(256)) * 2000  # several body frames
    async with client.acking_consumer(queue, prefetch_count=10) as consumer:
        await send(client, queue, b"", b"small", large)
        for expected in (b"", b"small", large):
            body, _ = await consumer.next_delivery()
            assert body == expected
    assert proxy.opened == 1
    assert len(proxy.links) == 1
    assert proxy.count(TO_BROKER, ProtocolHeader) == 1
    assert proxy.count(TO_CLIENT, commands.Connection.Start) == 1
    assert proxy.count(TO_BROKER, commands.Basic.Publish) == 3
    assert proxy.count(TO_CLIENT, ContentHeader) == 3
    assert proxy.count(TO_CLIENT, ContentBody) > 2


async def test_links_end_with_the_client(proxy: AmqpProxy, client: carehare.Connection) -> None:
    await client.close()
    await proxy.until(lambda: not proxy.links)
    assert proxy.opened == 1


@contextlib.asynccontextmanager
async def raw_connection(
    proxy: AmqpProxy,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client that hasn't said anything yet, and its link."""
    before = len(proxy.links)
    reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
    try:
        await proxy.until(lambda: len(proxy.links) > before)
        yield reader, writer
    finally:
        writer.close()


async def test_links_end_without_a_broker() -> None:
    async with AmqpProxy("amqp://127.0.0.1:1") as proxy:
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
        assert await reader.read() == b""
        writer.close()


async def test_seen_returns_when_the_frame_has_come(
    proxy: AmqpProxy, client: carehare.Connection
) -> None:
    third = asyncio.create_task(proxy.seen(TO_BROKER, commands.Queue.Declare, 3))
    for n in range(3):
        assert not third.done()
        await client.queue_declare("", exclusive=True)
        assert proxy.count(TO_BROKER, commands.Queue.Declare) == n + 1
    await third


async def test_waiting_in_vain_ends(proxy: AmqpProxy) -> None:
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        await proxy.until(lambda: proxy.opened > 0, timeout=0.01)


async def test_decoded_frame_can_be_changed(proxy: AmqpProxy, broker: Broker) -> None:
    def three_channels(frame: Frame) -> Any:
        tune = frame.decode()
        tune.channel_max = 3
        return tune

    answers: list[int] = []

    def note(frame: Frame) -> Frame:
        answers.append(frame.decode().channel_max)
        return frame

    proxy.rule(TO_CLIENT, commands.Connection.Tune, three_channels)
    proxy.rule(TO_BROKER, commands.Connection.TuneOk, note)
    async with carehare.connect(proxy.url):
        assert answers == [3]


async def test_reply_can_be_replaced_by_several_frames(
    proxy: AmqpProxy, client: carehare.Connection
) -> None:
    """The broker's channel.open-ok becomes a refusal."""
    proxy.replace(
        TO_CLIENT,
        commands.Channel.OpenOk,
        Heartbeat(),
        commands.Connection.Close(541, "as you like", 0, 0),
    )
    declared = asyncio.ensure_future(client.queue_declare("", exclusive=True))
    with pytest.raises(carehare.ConnectionClosedByServer, match="as you like"):
        await client.closed
    await asyncio.gather(declared, return_exceptions=True)


async def test_rule_applies_so_many_times(proxy: AmqpProxy, client: carehare.Connection) -> None:
    proxy.drop(TO_CLIENT, commands.Channel.CloseOk, times=1)  # the end of carehare's calls
    first = asyncio.ensure_future(client.queue_declare("", exclusive=True))
    await proxy.seen(TO_CLIENT, commands.Channel.CloseOk)
    await client.queue_declare("", exclusive=True)
    assert not first.done()
    await client.close()
    with pytest.raises(carehare.ConnectionClosed):
        await first


async def test_dropped_delivery_takes_its_content_along(
    proxy: AmqpProxy, client: carehare.Connection, queue: str
) -> None:
    async with client.acking_consumer(queue, prefetch_count=10) as consumer:
        rule = proxy.drop(TO_CLIENT, commands.Basic.Deliver)
        await send(client, queue, b"lost", b"lost too" * 50_000)
        await proxy.seen(TO_CLIENT, commands.Basic.Deliver, 2)
        proxy.remove(rule)
        await send(client, queue, b"arrives")
        body, _ = await consumer.next_delivery()
        assert body == b"arrives"


async def test_rewritten_delivery_keeps_its_content(
    proxy: AmqpProxy, client: carehare.Connection, queue: str
) -> None:
    def redelivered(frame: Frame) -> Any:
        deliver = frame.decode()
        deliver.redelivered = True
        return deliver

    proxy.rule(TO_CLIENT, commands.Basic.Deliver, redelivered)
    async with client.acking_consumer(queue) as consumer:
        await send(client, queue, b"body")
        body, _ = await consumer.next_delivery()
        assert body == b"body"


async def test_held_frame_waits_and_keeps_its_place(
    proxy: AmqpProxy, client: carehare.Connection
) -> None:
    release = proxy.hold(TO_CLIENT, commands.Channel.CloseOk, times=1)
    declared = [asyncio.ensure_future(client.queue_declare("", exclusive=True)) for _ in range(3)]
    await proxy.seen(TO_CLIENT, commands.Channel.CloseOk)
    assert not any(future.done() for future in declared)
    release.set()
    await asyncio.gather(*declared)


async def test_injected_frames_and_bytes(proxy: AmqpProxy) -> None:
    async with raw_connection(proxy) as (reader, _):
        proxy.inject(Heartbeat(), b"anything")
        assert await reader.readexactly(16) == b"\x08\0\0\0\0\0\0\xceanything"


async def test_cut_by_reset(proxy: AmqpProxy) -> None:
    async with raw_connection(proxy) as (reader, _), raw_connection(proxy):
        assert len(proxy.links) == 2
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        await proxy.until(lambda: not proxy.links)
        assert proxy.opened == 2


async def test_cut_by_fin(proxy: AmqpProxy) -> None:
    async with raw_connection(proxy) as (reader, _):
        proxy.cut(reset=False)
        assert await reader.read() == b""
        await proxy.until(lambda: not proxy.links)


async def test_stalled_connections_stay_open_and_go_on(proxy: AmqpProxy) -> None:
    async with raw_connection(proxy) as (reader, writer):
        proxy.stall(TO_CLIENT)
        writer.write(b"AMQP\0\0\x09\x01")
        await proxy.seen(TO_CLIENT, commands.Connection.Start)
        with pytest.raises(asyncio.TimeoutError):  # "nothing" has no event
            await asyncio.wait_for(reader.read(1), timeout=0.05)
        proxy.resume()
        assert await reader.read(1) == b"\x01"
        assert len(proxy.links) == 1


async def test_stall_in_the_other_direction(proxy: AmqpProxy) -> None:
    async with raw_connection(proxy) as (_, writer):
        proxy.stall(TO_BROKER)
        writer.write(b"AMQP\0\0\x09\x01")
        with pytest.raises(TimeoutError):
            await proxy.until(lambda: proxy.count(TO_CLIENT, object) > 0, timeout=0.05)
        assert proxy.count(TO_BROKER, ProtocolHeader) == 1
        proxy.resume()
        await proxy.seen(TO_CLIENT, commands.Connection.Start)


async def test_a_vanished_link_passes_nothing_and_neither_side_hears_of_the_others_end(
    proxy: AmqpProxy, client: carehare.Connection, queue: str
) -> None:
    await send(client, queue, b"before")
    (link,) = proxy.vanish()
    assert proxy.links == [link]
    client._protocol._transport.abort()
    other = carehare.Connection(proxy.url, connect_timeout=5)
    await other.connect()
    try:
        # The broker still has the first one: its exclusive queue is locked.
        with pytest.raises(carehare.ChannelClosedByServer, match="405 RESOURCE_LOCKED"):
            await other.queue_declare(queue, exclusive=True)
        assert link in proxy.links
    finally:
        await other.close()


async def test_refused_connections(proxy: AmqpProxy, client: carehare.Connection) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(proxy.host, proxy.port)
    await client.queue_declare("", exclusive=True)  # open ones go on
    await proxy.accept()
    async with carehare.connect(proxy.url):
        assert len(proxy.links) == 2


async def test_rules_and_cuts_by_the_name_of_a_connection(proxy: AmqpProxy) -> None:
    def connect(name: str) -> Any:
        parameters = pika.URLParameters(proxy.url)
        parameters.client_properties = {"connection_name": name}
        return pika.BlockingConnection(parameters)

    seen: list[str] = []

    def note(frame: Frame) -> Frame:
        seen.append(frame.link.name)
        return frame

    proxy.rule(TO_BROKER, commands.Channel.Open, note, name="publisher")
    publisher = await asyncio.to_thread(connect, "crq.1 publisher")
    subscriber = await asyncio.to_thread(connect, "crq.1 subscriber")
    await asyncio.to_thread(publisher.channel)
    await asyncio.to_thread(subscriber.channel)
    assert seen == ["crq.1 publisher"]

    proxy.cut(name="subscriber")
    await proxy.until(lambda: len(proxy.links) == 1)
    assert [link.name for link in proxy.links] == ["crq.1 publisher"]
    await asyncio.to_thread(publisher.close)
    with contextlib.suppress(pika.exceptions.AMQPConnectionError):
        await asyncio.to_thread(subscriber.process_data_events)


async def test_error_in_a_rule_is_not_lost(broker: Broker) -> None:
    def broken(frame: Frame) -> None:
        raise ZeroDivisionError

    proxy = AmqpProxy(broker.url)
    await proxy.accept()
    proxy.rule(TO_CLIENT, commands.Connection.Start, broken)
    async with raw_connection(proxy) as (reader, writer):
        writer.write(b"AMQP\0\0\x09\x01")
        assert await reader.read() == b""
    with pytest.raises(ZeroDivisionError):
        await proxy.__aexit__(None, None, None)


async def test_tls_passes_unread(
    private_broker_factory: Callable[..., PrivateBroker], certs: Path
) -> None:
    broker = await asyncio.to_thread(private_broker_factory, tls=TlsFiles.in_folder(certs))
    async with AmqpProxy(broker.tls_url) as proxy:
        trusted = ssl.create_default_context(cafile=str(certs / "ca.pem"))
        async with carehare.connect(proxy.url, ssl=trusted) as client:
            await client.queue_declare("", exclusive=True)
        assert proxy.opened == 1
        assert proxy.count(TO_CLIENT, commands.Connection.Start) == 0


async def test_silent_server_says_nothing() -> None:
    async with silent_server() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"AMQP\0\0\x09\x01")
        await server.until_accepted()
        with pytest.raises(asyncio.TimeoutError):  # "nothing" has no event
            await asyncio.wait_for(reader.read(1), timeout=0.05)
        assert server.open == 1
        writer.close()
        await server.until_gone()


async def test_closing_server_ends_with_fin() -> None:
    async with closing_server() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"AMQP\0\0\x09\x01")
        assert await reader.read() == b""
        writer.close()
        await server.until_gone()
        assert server.accepted == 1


async def test_fake_server_answers() -> None:
    async with fake_server(answer=b"AMQP\0\0\x09\x01", close=True) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"AMQP\0\0\x09\x00")
        assert await reader.read() == b"AMQP\0\0\x09\x01"
        writer.close()
