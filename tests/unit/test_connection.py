"""Opening and closing a connection, with a peer that tests play."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import carehare
import pytest
from pamqp import commands

from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq._settings.settings import Settings
from tests.support.amqp_peer import (
    START,
    Client,
    close_connection,
    connected,
    scripted_broker,
    tune,
)
from tests.support.credentials import credentials
from tests.support.deadlines import soon
from tests.support.fake_servers import closing_server, silent_server
from tests.support.name_server import serve_names


def make(url: str, **options: Any) -> Connection:
    return Connection(BrokerUrl.parse(url), **options)


async def test_server_that_says_nothing_is_given_up_at_the_deadline() -> None:
    """carehare 1.0.2's connect_timeout covers TCP and TLS only."""
    async with silent_server() as server:
        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            await make(server.url).connect(soon(0.05))
        await server.until_gone()


async def test_server_that_ends_the_connection_during_the_handshake() -> None:
    """carehare 1.0.2 hangs: AssertionError in connection_lost()."""
    async with closing_server() as server:
        with pytest.raises(carehare.ConnectionClosed, match="server ended the connection"):
            await make(server.url).connect(soon())


async def test_nobody_there() -> None:
    async with silent_server() as server:
        url = server.url
    with pytest.raises(ConnectionRefusedError):
        await make(url).connect(soon())


async def say_nothing(client: Client) -> None:
    await client.hear_end()


async def stop_after_start(client: Client) -> None:
    client.say(START)
    await client.hear(commands.Connection.StartOk)
    await client.hear_end()


async def stop_after_tune(client: Client) -> None:
    client.say(START)
    await client.hear(commands.Connection.StartOk)
    client.say(tune())
    await client.hear(commands.Connection.Open)
    await client.hear_end()


async def stop_when_open(client: Client) -> None:
    await client.greet()
    await client.hear_end()


async def answer_when_open(client: Client) -> None:
    await client.greet()
    await client.answer()


@pytest.mark.parametrize("script", [say_nothing, stop_after_start, stop_after_tune])
@pytest.mark.parametrize("how", ["cancelled", "deadline"])
async def test_connecting_that_is_given_up_closes_its_socket(script: Any, how: str) -> None:
    """At each stage of the handshake; carehare 1.0.2 leaves it open."""
    async with scripted_broker(script) as server:
        connection = make(server.url)
        if how == "cancelled":
            connecting = asyncio.create_task(connection.connect(soon()))
            await server.until_accepted()
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting
        else:
            with pytest.raises((TimeoutError, asyncio.TimeoutError)):
                await connection.connect(soon(0.02))
            await server.until_accepted()
        await server.until_gone()
        assert not connection.is_open
        await connection.close()


@pytest.mark.parametrize("turns", range(12))
async def test_connecting_cancelled_at_any_moment_closes_its_socket(turns: int) -> None:
    """In some of these turns the connection is open already when the cancellation comes."""
    async with scripted_broker(answer_when_open) as server:
        connection = make(server.url)
        connecting = asyncio.create_task(connection.connect(soon()))
        await server.until_accepted()
        for _ in range(turns):
            await asyncio.sleep(0)  # lets the handshake go on by a turn
        connecting.cancel()
        await asyncio.wait([connecting])
        if not connecting.cancelled():
            assert connection.is_open
            await connection.close()
        await server.until_gone()


async def test_tls_handshake_that_is_given_up_closes_its_socket() -> None:
    async with silent_server() as server:
        connection = make(server.url.replace("amqp://", "amqps://"))
        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            await connection.connect(soon(0.1))
        await server.until_gone()


async def test_refused_login_closes_its_socket() -> None:
    async def refuse(client: Client) -> None:
        client.say(START)
        await client.hear(commands.Connection.StartOk)
        client.say(close_connection(403, "ACCESS_REFUSED - no"))
        await client.hear(commands.Connection.CloseOk)
        await client.hear_end()

    async with scripted_broker(refuse) as server:
        with pytest.raises(carehare.ConnectionClosedByServer, match="403 ACCESS_REFUSED - no"):
            await make(server.url).connect(soon())
        await server.until_gone()


async def test_host_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_names(monkeypatch, broker=list)
    with pytest.raises(OSError, match=r"knows no address of the host broker\.test"):
        await make("amqp://broker.test").connect(soon())


async def test_percent_encoded_user_and_password() -> None:
    assert await credentials("amqp://%67uest:p%40ss%2F@127.0.0.1:PORT") == "\0guest\0p@ss/"


async def test_url_without_user_logs_in_as_guest() -> None:
    """carehare 1.0.2 logs in as "None"."""
    assert await credentials("amqp://127.0.0.1:PORT") == "\0guest\0guest"


async def test_ipv6_host() -> None:
    """carehare 1.0.2: ValueError: invalid literal for int()."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert await credentials("amqp://u:p@[::1]:PORT", host="::1") == "\0u\0p"


async def test_heartbeat_of_the_url_counts() -> None:
    """carehare 1.0.2 ignores it."""
    agreed: list[int] = []

    async def listen(client: Client) -> None:
        client.say(START)
        await client.hear(commands.Connection.StartOk)
        client.say(tune(heartbeat=60))
        agreed.append((await client.hear(commands.Connection.TuneOk)).heartbeat)
        await client.hear(commands.Connection.Open)
        client.say(commands.Connection.OpenOk())
        await client.hear(commands.Connection.Close)
        client.say(commands.Connection.CloseOk())

    async with (
        scripted_broker(listen) as server,
        connected(f"{server.url}?heartbeat=5&connection_timeout=2000"),
    ):
        pass
    assert agreed == [5]


async def test_heartbeat_notices_a_broker_that_has_gone_silent() -> None:
    """A half-open connection: no FIN, no RST. It is left without a word, after its time."""
    async with scripted_broker(stop_when_open) as server:
        connection = make(f"{server.url}?heartbeat=1")
        await connection.connect(soon())
        heartbeat = connection.protocol.heartbeat
        started_at = asyncio.get_running_loop().time()
        heartbeat._interval, heartbeat._tick_length = 0.04, 0.01  # instead of 1 and 0.25
        assert isinstance(await connection.closed, carehare.ConnectionClosedByHeartbeatMonitor)
        assert asyncio.get_running_loop().time() - started_at < 1.0
        await server.until_gone()


def test_tls_settings_without_a_tls_url_are_refused_at_once() -> None:
    """carehare refuses them at each connect(), and 4.x hung silently over it."""
    config = {"host": "amqp://broker", "ssl_context": ssl.create_default_context()}
    with pytest.raises(ValueError, match="ssl_context"):
        Settings.from_config(config)


async def test_cancelled_consumer_and_stopped_flow_leave_the_connection_up(queue: str) -> None:
    """carehare 1.0.2: NotImplementedError: Unexpected frame."""

    async def upset(client: Client) -> None:
        await client.greet()
        await client.hear(commands.Basic.Consume)
        client.say(commands.Channel.OpenOk(), commands.Basic.QosOk(), channel=1)
        client.say(commands.Channel.Flow(active=False), channel=1)
        await client.hear(commands.Channel.FlowOk)
        client.say(commands.Basic.Cancel("carehare"), channel=1)
        await client.answer()

    async with scripted_broker(upset) as server, connected(server.url) as connection:
        consumer = connection.acking_consumer(queue)
        with pytest.raises(carehare.ChannelClosed):
            await asyncio.wait_for(consumer.closed, 10)
        await connection.queue_declare(queue)
        assert not connection.closed.done()


@pytest.mark.usefixtures("short_close")
async def test_close_while_the_broker_reads_nothing() -> None:
    """Megabytes wait to be written, and the last words behind them."""
    released = asyncio.Event()

    async def deaf(client: Client) -> None:
        await client.greet()
        await released.wait()

    async with scripted_broker(deaf) as server:
        async with connected(server.url) as connection:
            connection.publish(b"x" * 20_000_000, routing_key="q").cancel()
            await asyncio.sleep(0)  # lets it be written
            await asyncio.wait_for(connection.close(), 5)
            assert await asyncio.wait_for(connection.closed, 5) is None
        released.set()
