"""How late an event loop is: what is kept of it, and what the log says."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from channels_rabbitmq import _loop_lag
from channels_rabbitmq._loop_lag import INTERVAL, LINE_INTERVAL, LoopLag
from channels_rabbitmq._windows import WINDOW
from tests.support.loop_thread import LoopThread
from tests.support.virtual_time import VirtualLoop, in_virtual_time

OWNER = "crq.aaaaaaaaaaaaaaaa"


def work(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.work(seconds)


def started() -> LoopLag:
    lag = LoopLag(OWNER)
    lag.start()
    return lag


@in_virtual_time
async def test_the_longest_delay_stays_for_a_window_or_two() -> None:
    lag = started()
    await asyncio.sleep(10 * INTERVAL)
    assert lag.newest() == 0.0
    work(3.0)
    assert 3.0 - INTERVAL <= lag.newest() <= 3.0, "also before the timer has run"
    await asyncio.sleep(INTERVAL)
    work(1.0)
    await asyncio.sleep(WINDOW - 3.0)
    assert 3.0 - INTERVAL <= lag.newest() <= 3.0
    await asyncio.sleep(2 * WINDOW)
    assert lag.newest() == 0.0
    lag.stop()


def test_the_log_tells_of_a_blocked_loop(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    @in_virtual_time
    async def block() -> None:
        lag = started()
        await asyncio.sleep(INTERVAL)
        work(0.9)
        await asyncio.sleep(LINE_INTERVAL)
        assert caplog.messages == []
        work(INTERVAL + 2.0)
        await asyncio.sleep(INTERVAL)
        for seconds in (2.0, 4.0):
            work(INTERVAL + seconds)
            await asyncio.sleep(2 * INTERVAL)
        await asyncio.sleep(LINE_INTERVAL)
        lag.stop()

    block()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    first, second = (record.args for record in caplog.records)
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    assert first[0] == second[0] == OWNER
    assert 1.9 <= first[1] <= 2.0 + INTERVAL
    assert 3.9 <= second[1] <= 4.0 + INTERVAL, "the worst of the time between two lines"


@pytest.mark.parametrize("library", ["asyncio", "uvloop"])
def test_a_loop_that_was_stopped_was_not_blocked(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_loop = pytest.importorskip(library).new_event_loop
    monkeypatch.setattr(_loop_lag, "INTERVAL", 0.01)
    loop = new_loop()

    async def start() -> LoopLag:
        return started()

    async def ask() -> float:
        newest = lag.newest()
        await asyncio.sleep(0.02)
        return max(newest, lag.newest())

    lag = loop.run_until_complete(start())
    time.sleep(0.3)
    assert lag.newest() == 0.0
    assert loop.run_until_complete(ask()) < 0.2
    lag.stop()
    loop.close()


async def test_another_thread_sees_a_loop_that_is_blocked_now() -> None:
    blocks, go_on = threading.Event(), threading.Event()

    def block() -> None:
        blocks.set()
        assert go_on.wait(10)

    async def start() -> LoopLag:
        lag = started()
        asyncio.get_running_loop().call_later(0.05, block)
        return lag

    with LoopThread() as other:
        lag = await other.run(start())
        assert await asyncio.to_thread(blocks.wait, 10)
        await asyncio.sleep(INTERVAL + 0.1)
        assert 0.05 < lag.overdue() <= lag.newest()
        go_on.set()
        await other.run(asyncio.sleep(0))
        lag.stop()
