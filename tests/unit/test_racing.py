"""Attempts beside each other: which one counts, when the next begins, and that the others end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from channels_rabbitmq._amqp import racing
from channels_rabbitmq._amqp.racing import Race, most_telling
from tests.support.virtual_time import in_virtual_time

Act = Callable[["Attempt"], Awaitable[None]]


class Refused(Exception):
    pass


class Attempt:
    """Does what the test says; ``events`` are those of all attempts, in order."""

    def __init__(self, name: str, events: list[str], act: Act) -> None:
        self.name = name
        self.has_answered = False
        self._events = events
        self._act = act

    async def run(self) -> None:
        self._events.append(f"{self.name} begins")
        try:
            await self._act(self)
        except asyncio.CancelledError:
            self._events.append(f"{self.name} is stopped")
            raise

    def abort(self) -> None:
        self._events.append(f"{self.name} is undone")


async def hang(attempt: Attempt) -> None:
    await asyncio.get_running_loop().create_future()


async def say_nothing_more(attempt: Attempt) -> None:
    attempt.has_answered = True
    await hang(attempt)


async def work(attempt: Attempt) -> None:
    pass


async def work_when_stopped(attempt: Attempt) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        await hang(attempt)


def fail(exc: Exception) -> Act:
    async def act(attempt: Attempt) -> None:
        raise exc

    return act


async def run(events: list[str], *acts: Act, seconds: float = 30.0) -> str:
    """Return the winner's name; the attempts are named a, b, c, ..."""
    attempts = [Attempt(name, events, act) for name, act in zip("abcdefgh", acts, strict=False)]
    race = Race(attempts, final=(Refused,))
    winner = await race.run(asyncio.get_running_loop().time() + seconds)
    await asyncio.sleep(0)  # those that were stopped end
    await asyncio.sleep(0)
    return winner.name


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt begins only when the former has failed."""
    monkeypatch.setattr(racing, "ATTEMPT_DELAY", 1000.0)
    monkeypatch.setattr(racing, "ATTEMPT_DELAY_ONCE_ANSWERED", 1000.0)


@pytest.mark.usefixtures("patient")
@in_virtual_time
async def test_the_first_is_enough() -> None:
    events: list[str] = []
    assert await run(events, work, work) == "a"
    assert events == ["a begins"]


@pytest.mark.usefixtures("patient")
@in_virtual_time
async def test_after_a_failure_the_next_begins_at_once() -> None:
    events: list[str] = []
    assert await run(events, fail(OSError("no")), fail(OSError("no")), work) == "c"
    assert events == ["a begins", "b begins", "c begins"]


@in_virtual_time
async def test_the_next_begins_while_the_first_hangs() -> None:
    events: list[str] = []
    started_at = asyncio.get_running_loop().time()
    assert await run(events, hang, work) == "b"
    assert asyncio.get_running_loop().time() - started_at == pytest.approx(racing.ATTEMPT_DELAY)
    assert events == ["a begins", "b begins", "a is stopped"]


@in_virtual_time
async def test_what_has_answered_is_given_more_time() -> None:
    events: list[str] = []
    started_at = asyncio.get_running_loop().time()
    assert await run(events, say_nothing_more, work) == "b"
    lasted = asyncio.get_running_loop().time() - started_at
    assert lasted == pytest.approx(racing.ATTEMPT_DELAY_ONCE_ANSWERED)


@pytest.mark.usefixtures("patient")
@in_virtual_time
async def test_each_has_its_share_of_a_short_time() -> None:
    events: list[str] = []
    assert await run(events, hang, say_nothing_more, hang, work, seconds=1.0) == "d"


@pytest.mark.usefixtures("patient")
@in_virtual_time
async def test_a_final_error_ends_the_race() -> None:
    events: list[str] = []
    with pytest.raises(Refused):
        await run(events, fail(Refused("login")), work)
    assert events == ["a begins"]


@in_virtual_time
async def test_a_final_error_stops_the_others() -> None:
    events: list[str] = []
    with pytest.raises(Refused):
        await run(events, hang, fail(Refused("login")), work)
    assert events == ["a begins", "b begins", "a is stopped"]


@pytest.mark.parametrize("acts", [(hang,), (hang, fail(OSError("no"))), (hang, say_nothing_more)])
@in_virtual_time
async def test_at_the_deadline_all_are_stopped(acts: tuple[Act, ...]) -> None:
    events: list[str] = []
    with pytest.raises(TimeoutError):
        await run(events, *acts, seconds=1.0)
    assert events[-1].endswith("is stopped")
    assert len([event for event in events if "begins" in event]) == len(acts)


@in_virtual_time
async def test_cancelled_it_stops_all() -> None:
    events: list[str] = []
    begun = asyncio.Event()

    async def begin(attempt: Attempt) -> None:
        begun.set()
        await hang(attempt)

    race = asyncio.create_task(run(events, hang, begin))
    await begun.wait()
    race.cancel()
    with pytest.raises(asyncio.CancelledError):
        await race
    assert events == ["a begins", "b begins", "a is stopped", "b is stopped"]


@in_virtual_time
async def test_one_that_succeeds_too_late_is_undone() -> None:
    events: list[str] = []
    assert await run(events, work_when_stopped, work) == "b"
    assert events == ["a begins", "b begins", "a is undone"]


@in_virtual_time
async def test_two_at_the_same_time() -> None:
    """One counts, the other is undone."""
    released = asyncio.Event()

    async def wait(attempt: Attempt) -> None:
        await released.wait()

    async def release(attempt: Attempt) -> None:
        released.set()
        await asyncio.sleep(0)

    events: list[str] = []
    winner = await run(events, wait, release)
    (loser,) = {"a", "b"} - {winner}
    assert events == ["a begins", "b begins", f"{loser} is undone"]


@in_virtual_time
async def test_one_that_somebody_else_cancels_has_failed() -> None:
    async def be_cancelled(attempt: Attempt) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    events: list[str] = []
    assert await run(events, be_cancelled, work) == "b"


@pytest.mark.parametrize(
    ("errors", "kind", "text"),
    [
        ([OSError("a")], OSError, "a"),
        (
            [ConnectionRefusedError("a"), ConnectionRefusedError("b")],
            ConnectionRefusedError,
            "a; b",
        ),
        ([ConnectionRefusedError("a"), OSError("b"), OSError("b")], OSError, "a; b"),
        ([ConnectionRefusedError("a"), ValueError("b"), OSError("c")], ValueError, "b"),
    ],
)
def test_the_most_telling_error(errors: list[Exception], kind: type[Exception], text: str) -> None:
    told = most_telling(errors)
    assert (type(told), str(told)) == (kind, text)
