"""How long calls wait for a broker that is away: the rule, and its first and last seconds."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import carehare
import pytest

from channels_rabbitmq._amqp.connection import Connection
from channels_rabbitmq._broker import back_off
from channels_rabbitmq._broker import outage as _outage
from channels_rabbitmq._broker import supervisor as _supervisor
from channels_rabbitmq._broker.outage import Failure, KnownOutage, Outage
from channels_rabbitmq._broker.shared import Shared
from channels_rabbitmq._broker.supervisor import Supervisor
from channels_rabbitmq._settings.settings import Settings
from channels_rabbitmq.exceptions import BrokerUnavailable
from tests.support.amqp_peer import scripted_broker
from tests.support.deadlines import soon
from tests.support.fake_servers import closing_server, silent_server
from tests.support.fixtures import shorten_closing
from tests.support.handlers import FakeHandler, end, failing, nothing, serve
from tools.private_broker import free_port

REFUSAL = failing(carehare.ConnectionClosedByServer(530, "NOT_ALLOWED - vhost v not found"))
TROUBLE = failing(OSError("no"))


@pytest.fixture
def known() -> KnownOutage:
    return KnownOutage()


@pytest.fixture
async def make(
    known: KnownOutage, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Supervisor]]:
    shorten_closing(monkeypatch, 0.05)
    supervisors: list[Supervisor] = []

    def make_one(
        *urls: str, handler: FakeHandler | None = None, operation_timeout: float
    ) -> Supervisor:
        settings = Settings.from_config(
            {"host": list(urls), "operation_timeout": operation_timeout}
        )
        made = Supervisor(
            handler or FakeHandler(),
            settings,
            id_="crq.a",
            shared=Shared(outage=known),
        )
        supervisors.append(made)
        return made

    yield make_one
    for one in supervisors:
        await end(one)


def nobody() -> str:
    return f"amqp://someone:secret@127.0.0.1:{free_port()}"


async def failing_after(waiting: Awaitable[object], *, match: str = "No connection") -> float:
    """Return the seconds after which it raises BrokerUnavailable."""
    begun_at = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=match):
        await waiting
    return time.monotonic() - begun_at


async def fails_at_once(
    waiting: Coroutine[Any, Any, object], *, match: str = "No connection"
) -> None:
    """It raises BrokerUnavailable without waiting, on however busy a machine."""
    task = asyncio.create_task(waiting)
    for _ in range(5):
        await asyncio.sleep(0)  # the turns that it takes
    assert task.done()
    await failing_after(task, match=match)


@pytest.fixture
def long_outage(known: KnownOutage) -> None:
    """As another connection has noted it. Calls wait for the first attempt, and no longer."""
    now = time.monotonic()
    known.note_failure("other role", Failure(now - 60, now, False, {}))


# The rule


async def test_a_call_waits_for_the_rest_of_the_outages_first_seconds(
    make: Callable[..., Supervisor],
) -> None:
    supervisor = make(nobody(), operation_timeout=0.3)
    begun_at = time.monotonic()
    supervisor.start()
    await asyncio.sleep(0.1)
    first, second = (asyncio.create_task(supervisor.wait_ready(soon(60))) for _ in range(2))
    await failing_after(first)
    lasted = time.monotonic() - begun_at
    await failing_after(second)
    assert 0.3 <= lasted < 3
    # Later calls don't wait at all.
    for _ in range(3):
        await fails_at_once(supervisor.wait_ready(soon(60)))


async def test_a_call_with_less_time_than_the_outage_has_waits_that_long(
    make: Callable[..., Supervisor],
) -> None:
    supervisor = make(nobody(), operation_timeout=30)
    assert 0.3 <= await failing_after(supervisor.wait_ready(soon(0.3))) < 10


async def test_an_outage_begins_with_the_loss(make: Callable[..., Supervisor]) -> None:
    handler = FakeHandler(nothing, *[TROUBLE] * 100)
    async with scripted_broker(serve) as broker:
        supervisor = make(broker.url, handler=handler, operation_timeout=0.2)
        await supervisor.wait_ready(soon())
        await asyncio.sleep(0.25)  # connected, for longer than that
        supervisor.reconnect("for a test")
        lost_at = time.monotonic()
        await failing_after(supervisor.wait_ready(soon(60)))
        assert 0.2 <= time.monotonic() - lost_at < 5
        await fails_at_once(supervisor.wait_ready(soon(60)))


@pytest.mark.usefixtures("fast")
async def test_a_short_outage_is_bridged(make: Callable[..., Supervisor]) -> None:
    handler = FakeHandler(nothing, *[TROUBLE] * 3)
    async with scripted_broker(serve) as broker:
        supervisor = make(broker.url, handler=handler, operation_timeout=30)
        first = await supervisor.wait_ready(soon())
        supervisor.reconnect("for a test")
        assert await supervisor.wait_ready(soon(30)) is not first


# Refused in words


async def test_a_refusal_before_the_first_success_fails_at_once(
    make: Callable[..., Supervisor],
) -> None:
    async with scripted_broker(serve) as broker:
        supervisor = make(broker.url, handler=FakeHandler(*[REFUSAL] * 100), operation_timeout=60)
        for _ in range(3):
            assert await failing_after(supervisor.wait_ready(soon(60)), match="vhost v not") < 5


async def test_one_refusal_among_several_urls_is_enough(make: Callable[..., Supervisor]) -> None:
    """The error has the reason of each: its reader can't know which one counts."""
    dead = nobody()
    async with scripted_broker(serve) as broker:
        supervisor = make(
            dead, broker.url, nobody(), handler=FakeHandler(*[REFUSAL] * 100), operation_timeout=60
        )
        waiting = supervisor.wait_ready(soon(60))
        assert await failing_after(waiting, match="530 NOT_ALLOWED - vhost v not found") < 5
    with pytest.raises(BrokerUnavailable, match=r"Connect call failed.*; amqp") as caught:
        await supervisor.wait_ready(soon(60))
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("fast")
async def test_a_patient_call_goes_on_waiting_for_what_is_refused(
    make: Callable[..., Supervisor],
) -> None:
    """As a process that starts together with its broker, whose virtual host isn't there yet."""
    async with scripted_broker(serve) as broker:
        supervisor = make(broker.url, handler=FakeHandler(*[REFUSAL] * 3), operation_timeout=60)
        patient = asyncio.create_task(supervisor.wait_ready(soon(60), patient=True))
        assert await failing_after(supervisor.wait_ready(soon(60))) < 5
        assert (await patient).is_open


@pytest.mark.usefixtures("fast")
async def test_a_refusal_after_the_first_success_is_bridged(
    make: Callable[..., Supervisor],
) -> None:
    """A broker that restarts may refuse for a moment, as long as it reads its definitions."""
    async with scripted_broker(serve) as broker:
        handler = FakeHandler(nothing, *[REFUSAL] * 3)
        supervisor = make(broker.url, handler=handler, operation_timeout=60)
        await supervisor.wait_ready(soon())
        supervisor.reconnect("for a test")
        assert (await supervisor.wait_ready(soon(60))).is_open


# Attempts for calls that fail


@pytest.mark.usefixtures("long_outage")
async def test_a_call_that_fails_has_the_next_attempt_made_soon(
    make: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(back_off, "FIRST_DELAY", 300.0)
    monkeypatch.setattr(back_off, "LONGEST_DELAY", 300.0)
    async with scripted_broker(serve) as broker:
        supervisor = make(broker.url, handler=FakeHandler(TROUBLE), operation_timeout=60)
        await failing_after(supervisor.wait_ready(soon()))
        waiting = asyncio.create_task(supervisor.wait_ready(soon(), patient=True))
        await failing_after(waiting)
        while supervisor.connection is None:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)


@pytest.mark.usefixtures("long_outage")
async def test_calls_that_fail_have_four_attempts_a_second_made_at_most(
    make: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(back_off, "FIRST_DELAY", 300.0)
    monkeypatch.setattr(back_off, "LONGEST_DELAY", 300.0)
    begun_at: list[float] = []

    async def note(connection: Connection) -> None:
        begun_at.append(time.monotonic())
        raise OSError("no")

    async with scripted_broker(serve) as broker:
        supervisor = make(broker.url, handler=FakeHandler(*[note] * 100), operation_timeout=60)
        while len(begun_at) < 4:
            await failing_after(supervisor.wait_ready(soon()))
            await asyncio.sleep(0.01)
    pauses = [after - before for before, after in itertools.pairwise(begun_at)]
    # A set-up may be quicker than the one before.
    assert min(pauses) > 0.2
    assert sum(pauses) >= 3 * 0.25 - 0.05


# What a layer's connections know together


async def test_a_connection_asked_for_in_the_midst_of_an_outage_counts_from_its_beginning(
    make: Callable[..., Supervisor], known: KnownOutage
) -> None:
    begun_at = time.monotonic()
    await failing_after(make(nobody(), operation_timeout=0.3).wait_ready(soon(60)))
    began_at = known.began_at()
    assert began_at is not None
    assert begun_at <= began_at < time.monotonic() - 0.3
    # From then on it counts for the next one, whose first attempt is refused at once.
    known.note_failure("other role", Failure(began_at - 60, time.monotonic(), False, {}))
    assert await failing_after(make(nobody(), operation_timeout=60).wait_ready(soon(120))) < 30


@pytest.mark.usefixtures("long_outage")
@pytest.mark.parametrize(("operation_timeout", "seconds"), [(60, 1), (0.2, 0.2)])
async def test_its_first_attempt_has_a_second_at_most(
    known: KnownOutage, operation_timeout: float, seconds: float
) -> None:
    outage = Outage(known, "role", operation_timeout)
    before = soon(0)
    outage.begin_with_others()
    limit = outage.limit(soon(60))
    assert before + seconds <= limit <= soon(0) + seconds


@pytest.mark.usefixtures("long_outage")
async def test_calls_give_its_first_attempt_that_time(
    make: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_outage, "FIRST_ATTEMPT_TIMEOUT", 0.2)
    async with silent_server() as server:
        waiting = make(server.url, operation_timeout=60).wait_ready(soon(60))
        assert 0.2 <= await failing_after(waiting, match="for 6. s: .*still connecting") < 5


async def test_it_connects_if_the_outage_is_over(
    make: Callable[..., Supervisor], known: KnownOutage
) -> None:
    now = time.monotonic()
    known.note_failure("role", Failure(now - 60, now - 1, True, {}))
    async with scripted_broker(serve) as broker:
        supervisor = make(broker.url, operation_timeout=10)
        assert (await supervisor.wait_ready(soon(60))).is_open
        assert known.began_at() is None


@pytest.mark.usefixtures("long_outage")
async def test_a_failure_of_its_role_just_now_stands_for_its_first_attempt(
    make: Callable[..., Supervisor],
) -> None:
    """Else those that live for one call would log in at each call."""
    accepted = 0
    async with closing_server() as server:
        begun_at = time.monotonic()
        while time.monotonic() - begun_at < 0.6:
            supervisor = make(server.url, operation_timeout=10)
            waiting = supervisor.wait_ready(soon(60))
            await failing_after(waiting, match=f"{server.port}.*ended the connection")
            await end(supervisor)
            await asyncio.sleep(0.01)
        accepted = server.accepted
    assert 2 <= accepted <= 5


async def test_a_refusal_of_its_role_just_now_stands_for_its_own(
    make: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_outage, back_off, _supervisor):
        monkeypatch.setattr(module, "SHORTEST_DELAY_FOR_CALLS", 0.5)
    async with scripted_broker(serve) as broker:
        first = make(broker.url, handler=FakeHandler(*[REFUSAL] * 100), operation_timeout=60)
        await failing_after(first.wait_ready(soon(60)))
        await end(first)
        handler = FakeHandler()
        second = make(broker.url, handler=handler, operation_timeout=60)
        await fails_at_once(second.wait_ready(soon(60)), match="vhost v not found")
        assert handler.set_up_count == 0
        await handler.until_ready()  # a moment later


def test_an_outage_that_nobody_has_seen_for_a_minute_is_forgotten(
    known: KnownOutage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(_outage.time, "monotonic", lambda: now)
    known.note_failure("publisher", Failure(990.0, now, False, {}))
    known.note_failure("subscriber", Failure(995.0, now, False, {}))
    assert known.began_at() == 990.0
    now += 61
    assert known.began_at() is None
    known.note_failure("subscriber", Failure(1060.0, now, False, {}))
    assert known.began_at() == 1060.0
    known.note_connected()
    assert known.began_at() is None


# fail_fast


async def test_the_first_round_of_attempts_is_enough_to_fail_fast(
    make: Callable[..., Supervisor],
) -> None:
    async with closing_server() as server:
        supervisor = make(server.url, operation_timeout=60)
        assert await failing_after(supervisor.wait_tried(soon(60)), match=server.url[-5:]) < 5


async def test_in_a_long_outage_failing_fast_needs_no_attempt(
    make: Callable[..., Supervisor], known: KnownOutage
) -> None:
    now = time.monotonic()
    # It stays "just now" for as long as the test lasts.
    known.note_failure("role", Failure(now - 60, now + 60, False, {}))
    async with silent_server() as server:
        await fails_at_once(make(server.url, operation_timeout=1).wait_tried(soon(60)))
