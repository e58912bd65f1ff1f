"""Hosts with several addresses, of which some are sick: which one is used, and what is told."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import carehare
import pytest
from pamqp import commands

from channels_rabbitmq._amqp import opening, racing
from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._amqp.url import BrokerUrl
from tests.support.amqp_peer import START, Client, ScriptedBroker, close_connection, scripted_broker
from tests.support.fake_servers import swallowing_address
from tests.support.name_server import serve_names
from tests.support.sockets import address_of

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="macOS has 127.0.0.1 only")

SICK = "127.0.0.2"
GOOD = "127.0.0.1"


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    """What another test has found out about the host name isn't known."""
    opening.last_winners.clear()
    yield
    opening.last_winners.clear()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is overtaken; the second address is only tried when the first has failed."""
    monkeypatch.setattr(racing, "ATTEMPT_DELAY", 1000.0)
    monkeypatch.setattr(racing, "ATTEMPT_DELAY_ONCE_ANSWERED", 1000.0)


async def serve(client: Client) -> None:
    await client.greet()
    await client.answer()


async def say_nothing(client: Client) -> None:
    await client.hear_end()


async def refuse(client: Client) -> None:
    client.say(START)
    await client.hear(commands.Connection.StartOk)
    client.say(close_connection(403, "ACCESS_REFUSED - no"))
    await client.hear_end()


def seconds() -> float:
    return asyncio.get_running_loop().time()


def make(port: int) -> Connection:
    return Connection(BrokerUrl.parse(f"amqp://guest:guest@broker.test:{port}"))


async def connect(port: int, limit: float = 10.0) -> str:
    """Connect and close; return the address that was used."""
    connection = make(port)
    await connection.connect(seconds() + limit)
    address = address_of(connection)
    await connection.close()
    return address


async def test_an_address_that_swallows_packets_costs_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve_names(monkeypatch, broker=lambda: [SICK, GOOD])
    async with scripted_broker(serve) as broker:
        with swallowing_address(SICK, broker.port):
            started_at = seconds()
            assert await connect(broker.port) == GOOD
            # A share of the limit would be 5 s.
            assert seconds() - started_at < 2.0


async def test_the_address_that_worked_is_tried_first_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve_names(monkeypatch, broker=lambda: [SICK, GOOD])
    async with scripted_broker(serve) as broker:
        with swallowing_address(SICK, broker.port):
            assert await connect(broker.port) == GOOD
            monkeypatch.setattr(
                racing, "ATTEMPT_DELAY", 1000.0
            )  # the sick one would cost all the time
            for _ in range(3):
                started_at = seconds()
                assert await connect(broker.port, 20) == GOOD
                assert seconds() - started_at < 5.0


@pytest.mark.usefixtures("patient")
async def test_when_it_fails_another_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_names(monkeypatch, broker=lambda: [SICK, GOOD])
    async with scripted_broker(serve) as broker:
        assert await connect(broker.port) == GOOD  # the other refuses
        listener = await asyncio.start_server(broker.on_connect, SICK, broker.port)
        assert await connect(broker.port) == GOOD
        serve_names(monkeypatch, broker=lambda: [SICK])
        assert await connect(broker.port) == SICK
        serve_names(monkeypatch, broker=lambda: [SICK, GOOD])
        assert await connect(broker.port) == GOOD  # one address alone is no choice
        listener.close()


async def test_an_address_that_says_nothing_does_not_win_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It accepts at once, so it would win each race to the first TCP connection."""
    monkeypatch.setattr(racing, "ATTEMPT_DELAY_ONCE_ANSWERED", 0.3)
    serve_names(monkeypatch, broker=lambda: [SICK, GOOD])
    async with scripted_broker(serve) as broker:
        silent = ScriptedBroker(say_nothing)
        listener = await asyncio.start_server(silent.on_connect, SICK, broker.port)
        try:
            for _ in range(3):
                assert await connect(broker.port) == GOOD
            assert silent.accepted == 1
            await silent.until_gone()  # the loser is closed
        finally:
            listener.close()
            await silent.end()


async def test_a_short_limit_leaves_time_for_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_names(monkeypatch, broker=lambda: [SICK, GOOD])
    async with scripted_broker(serve) as broker:
        listener = await asyncio.start_server(
            ScriptedBroker(say_nothing).on_connect, SICK, broker.port
        )
        try:
            assert await connect(broker.port, 1.0) == GOOD
        finally:
            listener.close()


@pytest.mark.usefixtures("patient")
async def test_a_refusal_in_words_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_names(monkeypatch, broker=lambda: [GOOD, SICK])
    other = ScriptedBroker(serve)
    async with scripted_broker(refuse) as broker:
        listener = await asyncio.start_server(other.on_connect, SICK, broker.port)
        try:
            with pytest.raises(carehare.ConnectionClosedByServer, match="403 ACCESS_REFUSED - no"):
                await connect(broker.port)
            assert other.accepted == 0
        finally:
            listener.close()


async def test_all_that_failed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_names(monkeypatch, broker=lambda: [SICK, GOOD])
    async with scripted_broker(serve) as broker:
        port = broker.port
    with pytest.raises(ConnectionRefusedError, match=rf"{SICK}.*; .*{GOOD}"):
        await connect(port)


async def test_what_was_found_out_by_the_deadline_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_names(monkeypatch, broker=lambda: [SICK, "127.0.0.3", GOOD])
    async with scripted_broker(say_nothing) as broker:
        with swallowing_address(SICK, broker.port), pytest.raises(TimeoutError) as caught:
            await connect(broker.port, 0.6)
        await broker.until_gone()
    assert str(caught.value) == (
        f"no answer from amqp://guest@broker.test:{broker.port}/%2F within 0.6 s: it accepts "
        "connections, and doesn't greet as RabbitMQ does (is it Redis, say?): "
        f"[Errno 111] Connect call failed ('127.0.0.3', {broker.port})"
    )


async def test_a_broker_that_falls_silent_after_its_greeting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def greet_only(client: Client) -> None:
        client.say(START)
        await client.hear_end()

    async with scripted_broker(greet_only) as broker:
        url = BrokerUrl.parse(broker.url)
        with pytest.raises(TimeoutError, match=r"within 0\.2 s: RabbitMQ greeted, and then said"):
            await Connection(url).connect(seconds() + 0.2)


@pytest.mark.parametrize("turns", range(0, 40, 3))
async def test_cancelled_at_any_moment_it_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """With two addresses that are good, at which it tries at the same time."""
    monkeypatch.setattr(racing, "ATTEMPT_DELAY", 0.0)
    serve_names(monkeypatch, broker=lambda: [SICK, GOOD])
    async with scripted_broker(serve) as broker:
        listener = await asyncio.start_server(broker.on_connect, SICK, broker.port)
        connection = make(broker.port)
        connecting = asyncio.create_task(connection.connect(seconds() + 10))
        await broker.until_accepted(min(2, turns))
        for _ in range(turns):
            await asyncio.sleep(0)  # lets it go on by a turn
        connecting.cancel()
        await asyncio.wait([connecting])
        if not connecting.cancelled():
            assert connection.is_open
            await connection.close()
        listener.close()
        if broker.accepted:
            await broker.until_gone()
