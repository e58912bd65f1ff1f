"""Waiting with a time limit, and what cancelling at any moment does to whom."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from channels_rabbitmq._futures import Waiters, run_until
from tests.support.deadlines import soon


async def turn() -> None:
    await asyncio.sleep(0)  # lets what was scheduled before run


# Waiters


async def test_everybody_who_waits_is_woken_in_order() -> None:
    waiters = Waiters()
    woken: list[int] = []

    async def wait(number: int) -> None:
        assert await waiters.wait(soon())
        woken.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(5)]
    await turn()
    assert len(waiters) == 5
    waiters.wake()
    assert len(waiters) == 0
    await asyncio.gather(*tasks)
    assert woken == [0, 1, 2, 3, 4]


async def test_wake_is_for_those_who_wait_now() -> None:
    waiters = Waiters()
    waiters.wake()
    assert not await waiters.wait(soon(0.001))


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.001])
async def test_deadline_ends_the_wait(seconds: float) -> None:
    waiters = Waiters()
    assert not await waiters.wait(soon(seconds))
    assert len(waiters) == 0


async def test_cancelled_waiter_harms_no_other() -> None:
    waiters = Waiters()
    one, two = (asyncio.create_task(waiters.wait(soon())) for _ in range(2))
    await turn()
    one.cancel()
    await turn()
    assert len(waiters) == 1
    waiters.wake()
    assert await two
    with pytest.raises(asyncio.CancelledError):
        await one


async def test_waiter_cancelled_and_woken_at_once_is_cancelled() -> None:
    waiters = Waiters()
    task = asyncio.create_task(waiters.wait(soon()))
    await turn()
    waiters.wake()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# run_until


async def test_run_until_returns_the_result() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await run_until(soon(), work()) == 7


async def test_run_until_raises_what_the_coroutine_raises() -> None:
    async def work() -> None:
        await asyncio.sleep(0)
        raise LookupError("this")

    with pytest.raises(LookupError, match="this"):
        await run_until(soon(), work())


class Hanging:
    """A coroutine that waits for ever, and notes how it ended."""

    def __init__(self, *, cleanup_turns: int = 0, error: Exception | None = None) -> None:
        self.started = asyncio.Event()
        self.has_ended = False
        self._cleanup_turns = cleanup_turns
        self._error = error

    async def run(self) -> None:
        self.started.set()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            for _ in range(self._cleanup_turns):
                await asyncio.sleep(0)
            self.has_ended = True
            if self._error is not None:
                raise self._error


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 0.001])
async def test_run_until_cancels_at_the_deadline(seconds: float) -> None:
    hanging = Hanging(cleanup_turns=3)
    with pytest.raises(TimeoutError):
        await run_until(soon(seconds), hanging.run())
    assert hanging.has_ended or not hanging.started.is_set()


async def test_cancelled_run_until_has_ended_its_coroutine() -> None:
    hanging = Hanging(cleanup_turns=3)
    task = asyncio.create_task(run_until(soon(), hanging.run()))
    await hanging.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert hanging.has_ended


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("fails", [False, True])
async def test_cancellation_is_never_swallowed_by_the_result(turns: int, fails: bool) -> None:
    """asyncio.wait_for, up to Python 3.11, returns the result of that moment and goes on.

    The cancellation comes before, in the same turn as, and after the result; an exception that
    nobody sees because of it isn't reported as "never retrieved" (the loop's guard would tell).
    """
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def work() -> int:
        return await answer

    async def outer() -> None:
        with contextlib.suppress(LookupError):
            await run_until(soon(), work())
        await asyncio.sleep(60)

    task = asyncio.create_task(outer())
    for _ in range(3):
        await turn()
    if fails:
        answer.set_exception(LookupError())
    else:
        answer.set_result(1)
    for _ in range(turns):
        await turn()
    task.cancel()
    await asyncio.wait([task], timeout=5)
    assert task.cancelled()
    if not answer.cancelled():
        answer.exception()


async def test_error_while_it_is_cancelled_from_outside_is_not_reported_as_never_seen() -> None:
    hanging = Hanging(error=OSError("while cleaning up"))
    task = asyncio.create_task(run_until(soon(), hanging.run()))
    await hanging.started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_error_while_it_is_cancelled_at_the_deadline_is_raised() -> None:
    hanging = Hanging(error=OSError("while cleaning up"))
    with pytest.raises(OSError, match="cleaning up"):
        await run_until(soon(0.001), hanging.run())


async def test_run_until_cancelled_twice_ends() -> None:
    hanging = Hanging(cleanup_turns=20)
    task = asyncio.create_task(run_until(soon(), hanging.run()))
    await hanging.started.wait()
    task.cancel()
    await turn()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not hanging.has_ended  # it goes on to its end, which nobody awaits
    while not hanging.has_ended:
        await turn()


def test_asyncio_run_ends_while_run_until_waits() -> None:
    """It cancels both tasks, the outer and the inner, at the same moment."""
    hanging: list[Hanging] = []

    async def main() -> None:
        hanging.append(Hanging())
        outer = asyncio.create_task(run_until(soon(60), hanging[0].run()))
        await hanging[0].started.wait()
        assert not outer.done()

    asyncio.run(main())
    assert hanging[0].has_ended
