"""The supervisor and a real broker."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest
from pamqp import commands

from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._broker.supervisor import State
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_proxy import TO_BROKER, AmqpProxy
from tests.support.brokers import Broker
from tests.support.deadlines import soon
from tests.support.fake_servers import (
    closing_server,
    fake_server,
    silent_server,
)
from tests.support.handlers import FakeHandler, end
from tests.support.supervisors import make, warnings
from tools.private_broker import free_port


@pytest.mark.usefixtures("fast")
async def test_no_password_and_no_traceback_in_the_log(
    broker: Broker, logged: pytest.LogCaptureFixture
) -> None:
    """Whatever answers: nobody, a broker that refuses, one that says nothing, garbage, silence."""
    real = urlsplit(broker.url)
    garbage = b"\x01\0\0\0\0\0\x04abcdX"
    async with (
        silent_server() as silent,
        closing_server() as closing,
        fake_server(answer=b"HTTP/1.1 400 Bad Request\r\n\r\n") as http,
        fake_server(answer=garbage) as damaged,
    ):
        ports = [silent.port, closing.port, http.port, damaged.port, free_port()]
        urls = [f"amqp://someone:hush-hush@127.0.0.1:{port}/no-vhost" for port in ports]
        urls.append(
            f"amqps://someone:hush-hush@127.0.0.1:{closing.port}/no-vhost?verify=verify_none"
        )
        urls.append(f"amqp://guest:hush-hush@{real.hostname}:{real.port}/no-vhost")
        urls.append(f"amqp://someone:hush-hush@{real.hostname}:{real.port}/no-vhost")
        handler = FakeHandler()
        supervisor = make(handler, *urls, connect_timeout=0.2)
        with pytest.raises(BrokerUnavailable) as caught:
            await supervisor.wait_ready(soon(0.1))
        await handler.until_events(2 * len(urls))
        await end(supervisor)
    assert "hush" not in logged.text + str(caught.value) + repr(supervisor)
    assert "Traceback" not in logged.text
    # Each was tried twice. On a busy machine one may answer in time only once: that is news.
    lines = warnings(logged)
    assert len(lines) == len(set(lines)) >= len(urls)


@pytest.mark.usefixtures("fast")
async def test_wait_ready_tells_the_last_reason(broker: Broker) -> None:
    parts = urlsplit(broker.url)
    supervisor = make(FakeHandler(), f"amqp://guest:wrong@{parts.hostname}:{parts.port}")
    waiting = asyncio.create_task(supervisor.wait_ready(soon(0.3)))
    with pytest.raises(BrokerUnavailable, match="403 ACCESS_REFUSED") as caught:
        await waiting
    assert isinstance(caught.value, ConnectionError)
    assert "wrong" not in str(caught.value)
    # Those who come later are told at their deadline too, and it goes on trying.
    with pytest.raises(BrokerUnavailable, match="403 ACCESS_REFUSED"):
        await supervisor.wait_ready(soon(-1))
    assert supervisor.state in (State.CONNECTING, State.WAITING)
    await end(supervisor)


@pytest.mark.usefixtures("fast")
async def test_real_broker_is_met_again_after_each_cut(
    broker: Broker, logged: pytest.LogCaptureFixture
) -> None:
    async def declare(connection: Connection) -> None:
        topology = connection.open_topology()
        await topology.call(commands.Queue.Declare(queue="", exclusive=True))

    async with AmqpProxy(broker.url) as proxy:
        handler = FakeHandler(*[declare] * 4)
        supervisor = make(handler, proxy.url)
        for n in range(1, 4):
            connection = await supervisor.wait_ready(soon())
            assert handler.events.count("ready") == n
            assert len(proxy.links) == 1
            proxy.cut(reset=n % 2 == 0)
            await handler.until_ready(n + 1)
            assert not connection.is_open
        assert len([line for line in warnings(logged) if "lost the connection" in line]) == 3
        await end(supervisor)
        assert proxy.count(TO_BROKER, commands.Connection.Close) == 1
        await proxy.until(lambda: not proxy.links)


@pytest.mark.usefixtures("fast")
async def test_real_refusal_of_the_set_up_is_survived(
    broker: Broker, logged: pytest.LogCaptureFixture
) -> None:
    """The exchange exists with another type, say: 4.x opened a connection a second, for ever."""

    async def declare_wrongly(connection: Connection) -> None:
        await connection.open_topology().call(
            commands.Exchange.Declare(exchange="amq.direct", exchange_type="topic")
        )

    async with AmqpProxy(broker.url) as proxy:
        handler = FakeHandler(declare_wrongly, declare_wrongly, declare_wrongly)
        supervisor = make(handler, proxy.url)
        await supervisor.wait_ready(soon(), patient=True)
        assert (proxy.opened, len(proxy.links)) == (4, 1)
        line, end_of_the_outage = warnings(logged)
        assert "RabbitMQ closed the" in line
        assert "connected to" in end_of_the_outage
        await end(supervisor)
