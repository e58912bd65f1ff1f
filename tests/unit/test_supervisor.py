"""The supervisor: it keeps one connection open for ever, and ends at once when it is told to."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import carehare
import pytest
from pamqp import commands

from channels_rabbitmq._amqp import protocol as protocol_module
from channels_rabbitmq._amqp import racing
from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._amqp.consuming import ConsumerChannel
from channels_rabbitmq._broker import back_off as _back_off
from channels_rabbitmq._broker import connector as _connector
from channels_rabbitmq._broker import reasons as _reasons
from channels_rabbitmq._broker.back_off import doubling_delays
from channels_rabbitmq._broker.reasons import describe
from channels_rabbitmq._broker.supervisor import State, Supervisor
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_peer import (
    START,
    Client,
    ScriptedBroker,
    close_connection,
    delivery,
    scripted_broker,
)
from tests.support.deadlines import soon
from tests.support.fake_servers import (
    closing_server,
    silent_server,
    swallowing_address,
)
from tests.support.fixtures import shorten_closing
from tests.support.handlers import FakeHandler, end, failing, hang, nothing, serve
from tests.support.supervisors import make, warnings
from tools.private_broker import free_port


async def hear_end_only(client: Client) -> None:
    """Accepts, and says nothing."""
    await client.hear_end()


async def hear_nothing_more(client: Client) -> None:
    """Open, and then deaf: no answer to a good-bye either."""
    await client.greet()
    await client.hear_end()


# back_off


def test_delays_double_up_to_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_back_off.random, "uniform", lambda low, high: high)
    delays = list(itertools.islice(doubling_delays(), 10))
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0]


def test_delays_have_jitter() -> None:
    """So that a broker that restarts isn't met by all processes at once."""
    longest = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    many = [list(itertools.islice(doubling_delays(), 9)) for _ in range(50)]
    for delays in many:
        for delay, limit in zip(delays, longest, strict=True):
            assert limit / 2 <= delay <= limit
    assert len({delays[-1] for delays in many}) > 25


@pytest.mark.parametrize(
    ("error", "longest"),
    [
        (OSError("nobody listens"), 2.0),
        (TimeoutError(), 2.0),
        (carehare.ConnectionClosed("no greeting"), 2.0),
        (carehare.ConnectionClosedByServer(320, "CONNECTION_FORCED"), 2.0),  # it stops
        (carehare.ConnectionClosedByServer(541, "INTERNAL_ERROR"), 2.0),  # it starts
        (carehare.ConnectionClosedByServer(403, "ACCESS_REFUSED"), 10.0),
        (carehare.ConnectionClosedByServer(530, "NOT_ALLOWED"), 10.0),
        (carehare.ChannelClosedByServer(406, "PRECONDITION_FAILED"), 10.0),
    ],
)
async def test_delays_are_short_unless_the_broker_refuses_in_words(
    error: Exception, longest: float, logged: pytest.LogCaptureFixture
) -> None:
    """So that what is up again serves again soon, and what says no isn't asked all the time."""
    async with scripted_broker(serve) as broker:
        handler = FakeHandler(*[failing(error)] * 12)
        supervisor = make(handler, broker.url)
        supervisor.start()
        for attempts in range(1, 13):
            await handler.until_events(attempts)
            while supervisor.state is not State.WAITING:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0)
            supervisor.retry_now()
        supervisor.close()
        await supervisor.wait_closed()
    delays = [
        float(record.args[1])  # type: ignore[index, arg-type]
        for record in logged.records
        if "reconnecting in" in record.getMessage()
    ]
    assert len(delays) == 12
    assert longest / 2 <= max(delays) <= longest


# describe


@pytest.mark.parametrize(
    ("exc", "text"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "[Errno 111] Connection refused"),
        (OSError("several\n  lines"), "several lines"),
        (TimeoutError(), "timed out"),
        (asyncio.TimeoutError(), "timed out"),
        (TimeoutError(110, "Connection timed out"), "[Errno 110] Connection timed out"),
        (ConnectionResetError(), "ConnectionResetError"),
        (
            carehare.ConnectionClosedByServer(403, "ACCESS_REFUSED - no"),
            "RabbitMQ closed the connection: 403 ACCESS_REFUSED - no",
        ),
        (
            carehare.ChannelClosedByServer(406, "PRECONDITION_FAILED - no"),
            "RabbitMQ closed the channel: 406 PRECONDITION_FAILED - no",
        ),
        (carehare.ConnectionClosed(), "ConnectionClosed"),
        (protocol_module.ProtocolError(501, "wrong end"), "wrong end"),
        (ValueError("a bug"), "ValueError: a bug"),
        (KeyError("k"), "KeyError: 'k'"),
        (AssertionError(), "AssertionError"),
        (asyncio.CancelledError(), "CancelledError"),
    ],
)
def test_errors_in_one_line(exc: BaseException, text: str) -> None:
    assert describe(exc) == text


def test_refused_certificate_in_one_line() -> None:
    exc = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] ... (_ssl.c:1006)")
    exc.verify_message = "Hostname mismatch"
    assert describe(exc) == "TLS certificate refused: Hostname mismatch"


# Connecting


async def test_nothing_happens_before_somebody_asks() -> None:
    async with scripted_broker(serve) as broker:
        supervisor = make(FakeHandler(), broker.url)
        await asyncio.sleep(0)  # lets run what shouldn't be there
        assert supervisor.state is State.IDLE
        assert supervisor.connection is None
        assert broker.accepted == 0
        await end(supervisor)


async def test_all_who_wait_get_the_one_connection(logged: pytest.LogCaptureFixture) -> None:
    async with scripted_broker(serve) as broker:
        handler = FakeHandler()
        supervisor = make(handler, broker.url)
        connections = await asyncio.gather(*(supervisor.wait_ready(soon()) for _ in range(5)))
        assert {id(connection) for connection in connections} == {id(supervisor.connection)}
        assert supervisor.state is State.READY
        assert "connected" in repr(supervisor)
        assert await supervisor.wait_ready(soon(-1)) is connections[0]
        assert (broker.accepted, handler.set_up_count, handler.events) == (1, 1, ["ready"])
        assert not warnings(logged)
        await end(supervisor)
        await broker.until_gone()
    assert handler.events == ["ready", "closed on this side"]


async def test_cancelled_waiter_harms_no_other() -> None:
    """In 4.x all callers awaited one future, and cancelling one cancelled all."""
    released = asyncio.Event()

    async def wait_for_release(connection: Connection) -> None:
        await released.wait()

    async with scripted_broker(serve) as broker:
        handler = FakeHandler(wait_for_release)
        supervisor = make(handler, broker.url)
        one, two = (asyncio.create_task(supervisor.wait_ready(soon())) for _ in range(2))
        await handler.until_set_up()
        one.cancel()
        released.set()
        assert await two is supervisor.connection
        assert one.cancelled()
        await end(supervisor)


@pytest.mark.usefixtures("fast")
async def test_urls_are_tried_one_after_the_other() -> None:
    async with scripted_broker(serve) as broker:
        dead = [f"amqp://127.0.0.1:{free_port()}" for _ in range(3)]
        for _ in range(5):
            handler = FakeHandler()
            supervisor = make(handler, *dead, broker.url)
            await supervisor.wait_ready(soon())
            await end(supervisor)
            assert handler.events[-2:] == ["ready", "closed on this side"]


def in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """URLs are tried as the test has them."""
    monkeypatch.setattr(_connector.random, "shuffle", lambda urls: None)


async def test_a_node_that_is_gone_costs_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_order(monkeypatch)
    async with scripted_broker(serve) as broker:
        with swallowing_address("127.0.0.2", broker.port):
            handler = FakeHandler()
            gone = f"amqp://127.0.0.2:{broker.port}"
            supervisor = make(handler, gone, broker.url, connect_timeout=600)
            await supervisor.wait_ready(soon(30))  # of 600
            assert handler.events == ["ready"]
            await end(supervisor)


async def test_a_node_that_hangs_is_left_alone_when_another_answers(
    monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    in_this_order(monkeypatch)
    monkeypatch.setattr(racing, "ATTEMPT_DELAY_ONCE_ANSWERED", 0.1)
    async with scripted_broker(hear_end_only) as frozen, scripted_broker(serve) as broker:
        handler = FakeHandler()
        supervisor = make(handler, frozen.url, broker.url)
        await supervisor.wait_ready(soon())
        assert frozen.accepted == 1
        await frozen.until_gone()
        assert handler.events == ["ready"]
        assert not warnings(logged)
        await end(supervisor)


@pytest.mark.usefixtures("fast")
async def test_if_set_up_fails_the_node_that_was_left_alone_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one that was slow to let us in may be the one that works."""
    in_this_order(monkeypatch)
    monkeypatch.setattr(racing, "ATTEMPT_DELAY_ONCE_ANSWERED", 0.1)
    is_awake = asyncio.Event()

    async def serve_later(client: Client) -> None:
        await is_awake.wait()
        await serve(client)

    async def fail_and_wake(connection: Connection) -> None:
        is_awake.set()
        raise carehare.ConnectionClosed("no majority")

    async with scripted_broker(serve_later) as slow, scripted_broker(serve) as sick:
        handler = FakeHandler(fail_and_wake)
        supervisor = make(handler, slow.url, sick.url)
        await supervisor.wait_ready(soon())
        assert (slow.accepted, sick.accepted) == (2, 1)
        assert handler.events == ["no majority", "ready"]
        assert supervisor.statistics().url.endswith(f":{slow.port}/%2F")
        await end(supervisor)


@pytest.mark.usefixtures("fast")
async def test_each_url_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture
) -> None:
    in_this_order(monkeypatch)

    async def refuse(client: Client) -> None:
        client.say(START)
        await client.hear(commands.Connection.StartOk)
        client.say(close_connection(403, "ACCESS_REFUSED - no"))
        await client.hear_end()

    port = free_port()
    async with scripted_broker(refuse) as refusing:
        supervisor = make(FakeHandler(), f"amqp://127.0.0.1:{port}", refusing.url)
        with pytest.raises(BrokerUnavailable) as caught:
            await supervisor.wait_tried(soon())
        await end(supervisor)
    for text in (str(caught.value), "\n".join(warnings(logged))):
        assert re.search(rf"127.0.0.1:{port}/%2F: .*Connect call failed", text)
        assert f"127.0.0.1:{refusing.port}/%2F: RabbitMQ closed the connection: 403" in text


@pytest.mark.parametrize("turns", range(0, 30, 3))
async def test_stopped_while_urls_race_it_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    monkeypatch.setattr(racing, "ATTEMPT_DELAY", 0.0)
    async with scripted_broker(serve) as one, scripted_broker(serve) as two:
        supervisor = make(FakeHandler(), one.url, two.url)
        supervisor.start()
        await (one if turns % 2 else two).until_accepted()
        for _ in range(turns):
            await asyncio.sleep(0)
        await end(supervisor)
        for broker in (one, two):
            if broker.accepted:
                await broker.until_gone()


@pytest.mark.usefixtures("fast")
async def test_reconnects_when_the_connection_is_lost(
    logged: pytest.LogCaptureFixture,
) -> None:
    async def leave(client: Client) -> None:
        await client.greet()
        client.say(close_connection(320, "CONNECTION_FORCED - bye"))
        await client.hear_end()

    scripts = iter([leave, leave])

    async with scripted_broker(lambda client: next(scripts, serve)(client)) as broker:
        handler = FakeHandler()
        supervisor = make(handler, broker.url)
        supervisor.start()
        await handler.until_ready(3)
        connection = await supervisor.wait_ready(soon())
        assert connection.is_open
        assert broker.open == 1
        lost = "RabbitMQ closed the connection: 320 CONNECTION_FORCED - bye"
        assert handler.events == ["ready", lost, "ready", lost, "ready"]
        assert [line.split(" to ")[0] for line in warnings(logged)] == [
            "role crq.a: lost the connection",
            "role crq.a: connected again",
        ] * 2
        assert all(lost in line for line in warnings(logged)[::2])
        assert all(re.search(r" after \d+\.\d s$", line) for line in warnings(logged)[1::2])
        await end(supervisor)


@pytest.mark.usefixtures("fast")
async def test_connection_that_is_given_up_is_closed_and_replaced(
    logged: pytest.LogCaptureFixture,
) -> None:
    async with scripted_broker(serve) as broker:
        handler = FakeHandler()
        supervisor = make(handler, broker.url)
        supervisor.reconnect("there is none")
        first = await supervisor.wait_ready(soon())
        supervisor.reconnect("it is deaf")
        supervisor.reconnect("said twice")
        second = await supervisor.wait_ready(soon())
        assert second is not first
        assert not first.is_open
        assert handler.events == ["ready", "it is deaf", "ready"]
        url = f"amqp://guest@127.0.0.1:{broker.port}/%2F"
        lost, again = warnings(logged)
        assert lost == f"role crq.a: lost the connection to {url}: it is deaf"
        assert again.startswith(f"role crq.a: connected again to {url} after ")
        await end(supervisor)


# Set-up that fails


EXPECTED = [
    OSError("no"),
    ConnectionResetError(104, "Connection reset by peer"),
    ssl.SSLError(1, "no"),
    carehare.ConnectionClosed("no"),
    carehare.ConnectionClosedByServer(530, "NOT_ALLOWED"),
    carehare.ConnectionClosedByHeartbeatMonitor("silent"),
    carehare.ChannelClosed("no"),
    carehare.ChannelClosedByServer(406, "PRECONDITION_FAILED"),
    carehare.BadBytesFromServer("bad"),
    TimeoutError(),
    asyncio.TimeoutError(),
]
UNEXPECTED = [
    ValueError("a bug"),
    KeyError("a bug"),
    RuntimeError("coroutine raised StopIteration"),
    TypeError("a bug"),
    AssertionError(),
]


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("exc", [*EXPECTED, *UNEXPECTED], ids=repr)
async def test_failed_set_up_is_survived(exc: Exception, logged: pytest.LogCaptureFixture) -> None:
    """Nothing is left of it: 4.x leaked a connection for each."""
    async with scripted_broker(serve) as broker:
        handler = FakeHandler(failing(exc), failing(exc))
        supervisor = make(handler, broker.url)
        await supervisor.wait_ready(soon(), patient=True)
        assert (broker.accepted, broker.open) == (3, 1)
        assert handler.events[2] == "ready"
        assert handler.events[0] == handler.events[1] == supervisor.last_reason
        tracebacks = [record for record in logged.records if record.exc_info]
        assert len(tracebacks) == (2 if exc in UNEXPECTED else 0)
        cannot = [line for line in warnings(logged) if "cannot connect" in line]
        assert len(cannot) == 1
        assert supervisor.last_reason in cannot[0]
        await end(supervisor)


@pytest.mark.usefixtures("fast")
async def test_set_up_that_is_cancelled_from_inside_is_survived() -> None:
    """Somebody cancels a future that it awaits: that is no cancellation of the supervisor."""

    async def await_a_cancelled_future(connection: Connection) -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    async with scripted_broker(serve) as broker:
        handler = FakeHandler(await_a_cancelled_future)
        supervisor = make(handler, broker.url)
        await supervisor.wait_ready(soon())
        assert broker.accepted == 2
        await end(supervisor)


@pytest.mark.usefixtures("fast")
async def test_set_up_that_hangs_is_given_up_with_its_connection() -> None:
    """One time limit spans TCP, TLS, handshake and set-up."""
    async with scripted_broker(serve) as broker:
        handler = FakeHandler(hang)
        supervisor = make(handler, broker.url, connect_timeout=0.2)
        await supervisor.wait_ready(soon())
        assert handler.events[0] == (
            f"no answer from amqp://guest@127.0.0.1:{broker.port}/%2F within 0.2 s"
        )
        assert (broker.accepted, broker.open) == (2, 1)
        await end(supervisor)


@pytest.mark.usefixtures("fast")
async def test_url_may_set_the_time_limit() -> None:
    async with scripted_broker(serve) as broker:
        handler = FakeHandler(hang)
        supervisor = make(handler, f"{broker.url}?connection_timeout=200", connect_timeout=60)
        await supervisor.wait_ready(soon())
        assert handler.events[0].endswith("within 0.2 s")
        await end(supervisor)


@pytest.mark.usefixtures("fast")
async def test_connection_lost_during_set_up_says_why() -> None:
    """4.x died of it: ConnectionClosed from a pending call."""

    async def refuse_the_declare(client: Client) -> None:
        await client.greet()
        await client.hear(commands.Queue.Declare)
        client.say(close_connection(541, "INTERNAL_ERROR"))
        await client.hear_end()

    async def declare(connection: Connection) -> None:
        await connection.open_topology().call(commands.Queue.Declare(queue="q"))

    scripts = iter([refuse_the_declare])
    async with scripted_broker(lambda client: next(scripts, serve)(client)) as broker:
        handler = FakeHandler(declare)
        supervisor = make(handler, broker.url)
        await supervisor.wait_ready(soon())
        assert handler.events[0] == "RabbitMQ closed the connection: 541 INTERNAL_ERROR"
        await end(supervisor)


@pytest.mark.usefixtures("fast")
async def test_bug_during_set_up_says_more_than_that_the_connection_closed(
    logged: pytest.LogCaptureFixture,
) -> None:
    def buggy(body: bytes, tag: int, published: int, consumer: ConsumerChannel) -> None:
        raise ZeroDivisionError("a bug")

    async def consume(connection: Connection) -> None:
        consumer = connection.open_consumer(on_delivery=buggy, on_end=lambda exc: None)
        await consumer.consume("q", 1)

    async def deliver(client: Client) -> None:
        await client.greet()
        await client.hear(commands.Channel.Open)
        client.say(commands.Channel.OpenOk(), *delivery(1, b"x"), channel=1)
        await client.answer()

    scripts = iter([deliver])
    async with scripted_broker(lambda client: next(scripts, serve)(client)) as broker:
        handler = FakeHandler(consume)
        supervisor = make(handler, broker.url)
        await supervisor.wait_ready(soon())
        assert handler.events[0] == "ZeroDivisionError: a bug"
        await end(supervisor)
    assert "in buggy" in logged.text


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("method", ["ready", "lost"])
async def test_error_in_the_role_is_survived_and_logged(
    method: str, logged: pytest.LogCaptureFixture
) -> None:
    class BuggyRole(FakeHandler):
        def _note(self, event: str) -> None:
            super()._note(event)
            if (event == "ready") == (method == "ready") and len(self.events) <= 2:
                raise ZeroDivisionError("a bug")

    async with scripted_broker(serve) as broker:
        handler = BuggyRole()
        supervisor = make(handler, broker.url)
        await supervisor.wait_ready(soon())
        supervisor.reconnect("for a test")
        await handler.until_ready(2)
        await supervisor.wait_ready(soon())
        assert broker.open <= 2
        assert [record.levelname for record in logged.records if record.exc_info] == ["ERROR"]
        await end(supervisor)
        await broker.until_gone()


@pytest.mark.usefixtures("fast")
async def test_bug_that_ends_the_connection_is_logged_with_its_traceback(
    logged: pytest.LogCaptureFixture,
) -> None:
    def buggy(body: bytes, tag: int, published: int, consumer: ConsumerChannel) -> None:
        raise ZeroDivisionError("a bug")

    async def consume(connection: Connection) -> None:
        connection.open_consumer(on_delivery=buggy, on_end=lambda exc: None)

    async def deliver(client: Client) -> None:
        await client.greet()
        await client.hear(commands.Channel.Open)
        client.say(commands.Channel.OpenOk(), *delivery(1, b"its body"), channel=1)
        await client.answer()

    async with scripted_broker(deliver) as broker:
        handler = FakeHandler(consume)
        supervisor = make(handler, broker.url)
        supervisor.start()
        events = await handler.until_events(2)
        assert events == ["ready", "ZeroDivisionError: a bug"]
        await end(supervisor)
    assert [record.levelname for record in logged.records if record.exc_info] == ["ERROR"]
    assert "in buggy" in logged.text
    assert "its body" not in logged.text


# Back-off and log


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """One list for each run of the back-off, with the number of each delay that was taken."""
    runs: list[list[int]] = []

    def fake_back_off() -> Iterator[float]:
        run: list[int] = []
        runs.append(run)
        for number in itertools.count(1):
            run.append(number)
            yield 0.0

    monkeypatch.setattr(_back_off, "doubling_delays", fake_back_off)
    return runs


async def test_success_resets_the_back_off(delays: list[list[int]]) -> None:
    no = failing(OSError("no"))
    async with scripted_broker(serve) as broker:
        handler = FakeHandler(no, no, no, nothing, no, no, nothing)
        supervisor = make(handler, broker.url)
        await supervisor.wait_ready(soon())
        assert delays == [[1, 2, 3]]
        supervisor.reconnect("for a test")
        await handler.until_ready(2)
        assert delays == [[1, 2, 3], [1, 2, 3]]
        await end(supervisor)


async def test_success_that_is_soon_over_does_not_reset_the_back_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else what is set up and refused again and again would be tried ten times a second."""
    taken: list[int] = []

    def long_delays() -> Iterator[float]:
        for number in itertools.count(1):
            taken.append(number)
            yield 60.0

    monkeypatch.setattr(_back_off, "doubling_delays", long_delays)
    monkeypatch.setattr(_back_off, "LONGEST_DELAY", 600.0)
    async with scripted_broker(serve) as broker:
        handler = FakeHandler()
        supervisor = make(handler, broker.url)
        for losses in range(4):
            await supervisor.wait_ready(soon())
            assert len(taken) == losses
            supervisor.reconnect("for a test")
            while supervisor.state is not State.WAITING:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0)
            supervisor.retry_now()
        # The first connection resets it (nothing was waited for before it), to where it was.
        assert taken == [1, 2, 3, 4]
        await end(supervisor)


async def test_retry_now_ends_the_wait_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_back_off, "FIRST_DELAY", 60.0)
    monkeypatch.setattr(_back_off, "LONGEST_DELAY", 60.0)
    async with scripted_broker(serve) as broker:
        handler = FakeHandler(failing(OSError("no")), nothing)
        supervisor = make(handler, broker.url)
        supervisor.retry_now()
        waiting = asyncio.create_task(supervisor.wait_ready(soon()))
        await handler.until_events(1)
        supervisor.retry_now()  # it closes the connection of the first attempt now
        while supervisor.state is not State.WAITING:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0)
        assert not waiting.done()
        supervisor.retry_now()
        connection = await waiting
        supervisor.retry_now()
        assert await supervisor.wait_ready(soon()) is connection
        assert broker.accepted == 2
        await end(supervisor)


async def test_delay_comes_after_a_loss_also_if_there_are_other_urls(
    delays: list[list[int]],
) -> None:
    """Else a broker that throws everybody out would be met again at once."""
    async with scripted_broker(serve) as broker:
        handler = FakeHandler()
        supervisor = make(handler, *[broker.url] * 5)
        for losses in range(4):
            await supervisor.wait_ready(soon())
            assert handler.events.count("ready") == losses + 1
            assert sum(map(len, delays)) == losses
            supervisor.reconnect("for a test")
        await end(supervisor)


async def test_all_urls_are_tried_before_a_delay(delays: list[list[int]]) -> None:
    async with closing_server() as one, closing_server() as two:
        handler = FakeHandler()
        supervisor = make(handler, one.url, two.url)
        supervisor.start()
        await handler.until_events(6)
        await end(supervisor)
    assert sum(map(len, delays)) in (2, 3)
    assert abs(one.accepted - two.accepted) <= 1


@pytest.mark.usefixtures("fast")
async def test_same_reason_is_one_warning(logged: pytest.LogCaptureFixture) -> None:
    """4.x wrote a traceback each second while the broker was down."""
    handler = FakeHandler()
    url = f"amqp://guest:guest@127.0.0.1:{free_port()}"
    supervisor = make(handler, url)
    supervisor.start()
    await handler.until_events(8)
    await end(supervisor)
    (line,) = warnings(logged)
    assert line.startswith("role crq.a: cannot connect to amqp://guest@127.0.0.1:")
    assert "Connect call failed" in line
    assert not [record for record in logged.records if record.exc_info]
    assert warnings(logged, logging.INFO) == [line]
    attempts = [line for line in warnings(logged, logging.DEBUG) if "reconnecting in" in line]
    assert len(attempts) >= 7


@pytest.mark.usefixtures("fast")
async def test_each_broker_of_a_cluster_is_warned_of_once(
    logged: pytest.LogCaptureFixture,
) -> None:
    handler = FakeHandler()
    async with closing_server() as server:
        supervisor = make(handler, f"amqp://127.0.0.1:{free_port()}", server.url)
        supervisor.start()
        await handler.until_events(12)
        await end(supervisor)
    lines = warnings(logged)
    assert len(lines) == 2
    assert sum("Connect call failed" in line for line in lines) == 1
    assert sum("server ended the connection" in line for line in lines) == 1


@pytest.mark.usefixtures("fast")
async def test_another_reason_is_another_warning(logged: pytest.LogCaptureFixture) -> None:
    reasons = ["one", "one", "two", "two", "one"]
    async with scripted_broker(serve) as broker:
        handler = FakeHandler(*(failing(OSError(reason)) for reason in reasons))
        supervisor = make(handler, broker.url)
        await supervisor.wait_ready(soon())
        await end(supervisor)
    *lines, end_of_the_outage = warnings(logged)
    assert [line.rpartition(": ")[2] for line in lines] == ["one", "two"]
    assert re.search("crq.a: connected to .* after", end_of_the_outage)


@pytest.mark.usefixtures("fast")
async def test_reminder_of_the_same_reason(
    logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_reasons, "REMINDER_INTERVAL", 0.0)
    async with scripted_broker(serve) as broker:
        handler = FakeHandler(*(failing(OSError("no")) for _ in range(3)))
        supervisor = make(handler, broker.url)
        await supervisor.wait_ready(soon())
        await end(supervisor)
    assert len([line for line in warnings(logged) if "cannot connect" in line]) == 3


async def test_states_are_logged(logged: pytest.LogCaptureFixture) -> None:
    async with scripted_broker(serve) as broker:
        supervisor = make(FakeHandler(), broker.url)
        await supervisor.wait_ready(soon())
        await end(supervisor)
    assert [line for line in warnings(logged, logging.DEBUG) if "->" in line] == [
        "role crq.a: idle -> connecting",
        "role crq.a: connecting -> connected",
        "role crq.a: connected -> closed",
    ]


# wait_ready


async def test_wait_ready_while_the_first_attempt_goes_on() -> None:
    async with silent_server() as server:
        supervisor = make(FakeHandler(), server.url)
        with pytest.raises(BrokerUnavailable, match="still connecting"):
            await supervisor.wait_ready(soon(0.01))
        await end(supervisor)
        await server.until_gone()


@pytest.mark.usefixtures("fast")
async def test_wait_ready_between_two_connections_waits_for_the_next() -> None:
    released = asyncio.Event()

    async def wait_for_release(connection: Connection) -> None:
        await released.wait()

    async with scripted_broker(serve) as broker:
        handler = FakeHandler(nothing, wait_for_release)
        supervisor = make(handler, broker.url)
        first = await supervisor.wait_ready(soon())
        supervisor.reconnect("for a test")
        await handler.until_set_up(2)
        with pytest.raises(BrokerUnavailable, match="for a test"):
            await supervisor.wait_ready(soon(0.01))
        waiting = asyncio.create_task(supervisor.wait_ready(soon()))
        released.set()
        assert await waiting is not first
        await end(supervisor)


@pytest.mark.usefixtures("fast")
async def test_wait_ready_does_not_return_a_connection_that_has_just_ended() -> None:
    async with scripted_broker(serve) as broker:
        supervisor = make(FakeHandler(), broker.url)
        first = await supervisor.wait_ready(soon())
        first.protocol.abort()
        await first.closed
        assert supervisor.connection is first  # the supervisor hasn't noticed yet
        assert await supervisor.wait_ready(soon()) is not first
        await end(supervisor)


# Ending at each stage


async def greet_and_stop(client: Client) -> None:
    client.say(START)
    await client.hear(commands.Connection.StartOk)
    await client.hear_end()


# By name: what the server does meanwhile.
STAGES: dict[str, Callable[[Client], Awaitable[None]]] = {
    "idle": serve,
    "just started": serve,
    "server says nothing": Client.hear_end,
    "handshake": greet_and_stop,
    "set-up hangs": serve,
    "set-up hangs, and the server is deaf": hear_nothing_more,
    "connected": serve,
    "connected, and the server is deaf": hear_nothing_more,
    "back-off": serve,
    "saying good-bye to a deaf server": hear_nothing_more,
}
stages = pytest.mark.parametrize("name", STAGES)


class Stage:
    """A supervisor that has come to some point of its life."""

    def __init__(self, name: str) -> None:
        self.name = name
        set_up = nothing
        if name.startswith("set-up"):
            set_up = hang
        elif name == "back-off":
            set_up = failing(OSError("no"))  # type: ignore[assignment]  # the name is another one's
        self.handler = FakeHandler(set_up)

    def server(self) -> Any:
        return scripted_broker(STAGES[self.name])

    async def reach(self, broker: ScriptedBroker) -> Supervisor:
        handler = self.handler
        supervisor = make(handler, broker.url, connect_timeout=60)
        if self.name != "idle":
            supervisor.start()
        if self.name in ("server says nothing", "handshake"):
            await broker.until_accepted()
            await asyncio.sleep(0.01)  # for the client's next word, which nobody here hears
        elif self.name.startswith("set-up"):
            await handler.until_set_up()
        elif self.name.startswith("connected"):
            await handler.until_ready()
        elif self.name == "back-off":
            await handler.until_events(1)
            await broker.until_gone()
            while supervisor.state is not State.WAITING:  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0)
        elif self.name == "saying good-bye to a deaf server":
            await handler.until_ready()
            supervisor.reconnect("for a test")
            await handler.until_events(2)
        return supervisor


@pytest.fixture
def long_delays_short_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliseconds for a deaf server; the delays between attempts stay long."""
    monkeypatch.setattr(_back_off, "FIRST_DELAY", 60.0)
    monkeypatch.setattr(_back_off, "LONGEST_DELAY", 60.0)
    shorten_closing(monkeypatch, 0.05)


@stages
@pytest.mark.usefixtures("long_delays_short_close")
async def test_stop_at_each_stage_ends_all_at_once(name: str) -> None:
    stage = Stage(name)
    async with stage.server() as broker:
        supervisor = await stage.reach(broker)
        waiting = None
        if supervisor.connection is None and name != "idle":
            waiting = asyncio.create_task(supervisor.wait_ready(soon(60)))
            await asyncio.sleep(0)  # lets it begin
        supervisor.close()
        supervisor.close()
        await asyncio.wait_for(supervisor.wait_closed(), 2)
        assert supervisor.state is State.CLOSED
        assert supervisor.connection is None
        if waiting is not None:
            with pytest.raises(BrokerUnavailable, match="closed"):
                await waiting
        if broker.accepted:
            await broker.until_gone()
        # It doesn't come back.
        supervisor.start()
        with pytest.raises(BrokerUnavailable, match="closed"):
            await supervisor.wait_ready(soon())
        assert broker.open == 0
        await supervisor.wait_closed()
        assert stage.handler.events.count("ready") <= 1


@stages
@pytest.mark.usefixtures("long_delays_short_close")
def test_asyncio_run_ends_at_each_stage(name: str, logged: pytest.LogCaptureFixture) -> None:
    """It cancels all tasks once and waits for them: who swallows that hangs it for ever."""
    errors: list[dict[str, Any]] = []
    ended_at = 0.0

    async def main() -> None:
        nonlocal ended_at
        asyncio.get_running_loop().set_exception_handler(lambda loop, what: errors.append(what))
        stage = Stage(name)
        broker = stage.server()
        supervisor = await stage.reach(await broker.__aenter__())
        keep.append((broker, supervisor))
        ended_at = time.monotonic()

    keep: list[Any] = []
    asyncio.run(main())
    assert time.monotonic() - ended_at < 2
    assert keep[0][1].state in (State.CLOSED, State.IDLE, State.CONNECTING)
    assert not errors
    assert not warnings(logged, logging.ERROR)


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("turns", range(40))
async def test_stop_at_any_moment_of_connecting(turns: int) -> None:
    """Also in the turn in which the handshake, or the set-up, has just succeeded."""
    async with scripted_broker(serve) as broker:
        supervisor = make(FakeHandler(), broker.url)
        supervisor.start()
        for _ in range(turns):
            await asyncio.sleep(0)  # lets connecting go on by a turn
        supervisor.close()
        await asyncio.wait_for(supervisor.wait_closed(), 2)
        assert supervisor._task is not None
        assert supervisor._task.cancelled()
        if broker.accepted:
            await broker.until_gone()


@pytest.mark.usefixtures("fast")
async def test_task_that_is_cancelled_by_others_ends_and_tells_those_who_wait() -> None:
    """As at the end of asyncio.run, which doesn't call stop()."""
    async with scripted_broker(serve) as broker:
        supervisor = make(FakeHandler(hang), broker.url)
        waiting = asyncio.create_task(supervisor.wait_ready(soon(60)))
        await broker.until_accepted()
        assert supervisor._task is not None
        supervisor._task.cancel()
        with pytest.raises(BrokerUnavailable, match="closed"):
            await waiting
        assert supervisor.state is State.CLOSED
        await broker.until_gone()


@pytest.mark.usefixtures("fast")
async def test_impatient_second_cancel_closes_the_socket_too() -> None:
    async with scripted_broker(hear_nothing_more) as broker:
        handler = FakeHandler()
        supervisor = make(handler, broker.url)
        supervisor.start()
        await handler.until_ready()
        supervisor.close()
        await handler.until_events(2)  # it says good-bye now
        supervisor.close()
        await asyncio.wait_for(supervisor.wait_closed(), 2)
        await broker.until_gone()


# On a real broker
