"""Heartbeats on a clock moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.heartbeat import Heartbeat as Frame

from channels_rabbitmq._amqp import heartbeat
from channels_rabbitmq._amqp.heartbeat import Heartbeat
from tests.support.amqp_peer import marshal

INTERVAL = 20.0


class FakeTimer:
    def __init__(self, at: float, callback: Callable[[], None]) -> None:
        self.at = at
        self.callback = callback
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeLoop:
    """A loop's clock and timers."""

    def __init__(self) -> None:
        self.now = 100.0
        self.asleep = 0.0  # seconds that its clock has missed
        self._timers: list[FakeTimer] = []

    def time(self) -> float:
        return self.now

    def call_at(self, at: float, callback: Callable[[], None]) -> FakeTimer:
        self._timers.append(FakeTimer(at, callback))
        return self._timers[-1]

    def pending(self) -> list[FakeTimer]:
        return [timer for timer in self._timers if not timer.is_cancelled]

    def advance(self, seconds: float) -> None:
        """Let time pass, timers on time."""
        end = self.now + seconds
        while due := [timer for timer in self.pending() if timer.at <= end]:
            timer = min(due, key=lambda timer: timer.at)
            self._timers.remove(timer)
            self.now = max(self.now, timer.at)
            timer.callback()
        self.now = end

    def block(self, seconds: float) -> None:
        """Somebody holds up the loop; timers that were due are late."""
        self.now += seconds


class Bench:
    """A Heartbeat; what it writes and when it calls ``on_dead``."""

    def __init__(self, interval: float = INTERVAL) -> None:
        self.loop = FakeLoop()
        self.started_at = self.loop.now
        self.written: list[tuple[float, bytes]] = []
        self.died_at: list[float] = []
        self.ticked_at: list[float] = []
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(asyncio, "get_running_loop", lambda: self.loop)
            self.heartbeat = Heartbeat(
                interval,
                write=lambda data: self.written.append((self.elapsed(), data)),
                on_dead=lambda: self.died_at.append(self.elapsed()),
                on_tick=lambda: self.ticked_at.append(self.elapsed()),
                clock=lambda: self.loop.now + self.loop.asleep,
            )

    def elapsed(self) -> float:
        return self.loop.now - self.started_at


def test_beats_are_amqp_frames_twice_an_interval() -> None:
    bench = Bench()
    for _ in range(40):
        bench.heartbeat.received()
        bench.loop.advance(INTERVAL / 4)
    assert [at / INTERVAL for at, _ in bench.written] == [0.25 + n / 2 for n in range(20)]
    assert {data for _, data in bench.written} == {marshal(Frame())}
    assert not bench.died_at


def test_silence_of_an_interval_and_a_half_is_death() -> None:
    bench = Bench()
    bench.loop.advance(10 * INTERVAL)
    assert len(bench.died_at) == 1
    assert 1.5 * INTERVAL <= bench.died_at[0] <= 1.75 * INTERVAL
    assert not bench.loop.pending()


@given(st.lists(st.floats(0.0, 1.5), max_size=20))
def test_death_comes_so_long_after_the_last_byte_and_not_sooner(silences: list[float]) -> None:
    """Silences in intervals; RabbitMQ sends something every half one."""
    bench = Bench()
    for silence in silences:
        bench.loop.advance(silence * INTERVAL)
        assert not bench.died_at
        bench.heartbeat.received()
    heard_at = bench.elapsed()
    bench.loop.advance(3 * INTERVAL)
    assert len(bench.died_at) == 1
    assert bench.died_at[0] - heard_at + 1e-6 >= 1.5 * INTERVAL
    assert bench.died_at[0] - heard_at <= 1.75 * INTERVAL + 1e-6


@given(st.floats(0.6, 1000.0))
def test_held_up_loop_is_not_taken_for_a_silent_broker(blocked: float) -> None:
    """What came meanwhile lies unread in the socket: the timer runs before the socket is read."""
    bench = Bench()
    bench.loop.advance(1.6 * INTERVAL)
    bench.loop.block(blocked * INTERVAL)
    bench.loop.advance(0)
    assert not bench.died_at
    bench.heartbeat.received()
    bench.loop.advance(1.4 * INTERVAL)
    assert not bench.died_at


def test_held_up_loop_beats_at_once_afterwards() -> None:
    bench = Bench()
    bench.loop.advance(0.3 * INTERVAL)
    bench.written.clear()
    bench.loop.block(1.4 * INTERVAL)
    bench.loop.advance(0)
    assert len(bench.written) == 1


def test_broker_that_stays_silent_after_a_hold_up_is_dead() -> None:
    bench = Bench()
    bench.loop.block(10 * INTERVAL)
    bench.loop.advance(2 * INTERVAL)
    assert len(bench.died_at) == 1


def test_interval_of_zero_is_no_heartbeats() -> None:
    """carehare 1.0.2 takes it for "dead at once"."""
    bench = Bench(0)
    bench.loop.advance(1000.0)
    assert bench.written == bench.died_at == []
    assert bench.ticked_at == [5.0 * n for n in range(1, 201)]
    bench.heartbeat.stop()
    assert not bench.loop.pending()


def test_cancelled_heartbeat_does_nothing_more() -> None:
    bench = Bench()
    bench.loop.advance(INTERVAL)
    bench.written.clear()
    bench.heartbeat.stop()
    bench.heartbeat.stop()
    bench.loop.advance(10 * INTERVAL)
    assert not bench.written
    assert not bench.died_at
    assert not bench.loop.pending()


def test_cancelling_when_dead_is_fine() -> None:
    bench = Bench()
    bench.loop.advance(10 * INTERVAL)
    bench.heartbeat.stop()
    assert not bench.loop.pending()


# A machine that slept


def test_machine_that_slept_gives_a_silent_broker_one_more_tick() -> None:
    bench = Bench()
    bench.heartbeat.received()
    bench.loop.advance(0.3 * INTERVAL)
    bench.loop.asleep += 10 * INTERVAL
    bench.loop.advance(0.2 * INTERVAL)
    assert not bench.died_at
    bench.loop.advance(0.25 * INTERVAL)
    assert len(bench.died_at) == 1


def test_broker_that_is_heard_after_the_machine_slept_lives() -> None:
    bench = Bench()
    bench.loop.advance(0.3 * INTERVAL)
    bench.loop.asleep += 10 * INTERVAL
    bench.heartbeat.received()
    for _ in range(6):
        bench.loop.advance(0.5 * INTERVAL)
        assert not bench.died_at
        bench.heartbeat.received()


def test_sleep_counts_as_silence() -> None:
    bench = Bench()
    bench.heartbeat.received()
    assert not bench.heartbeat.is_silent_for(2)
    bench.loop.asleep += 2.1 * INTERVAL
    assert bench.heartbeat.is_silent_for(2)


# How long an answer may take


def test_answer_is_overdue_when_the_broker_was_heard_twice() -> None:
    bench = Bench()
    bench.heartbeat.received()
    mark = bench.heartbeat.mark()
    for heard in (False, True):
        bench.loop.advance(INTERVAL / 2)
        assert not bench.heartbeat.is_overdue(mark)
        bench.heartbeat.received()
        assert bench.heartbeat.is_overdue(mark) == heard


def test_what_a_broker_says_at_once_when_it_thaws_counts_once() -> None:
    bench = Bench()
    mark = bench.heartbeat.mark()
    bench.loop.advance(0.7 * INTERVAL)
    for _ in range(5):
        bench.heartbeat.received()
        bench.loop.advance(0.05 * INTERVAL)
    assert not bench.heartbeat.is_overdue(mark)


@given(st.lists(st.floats(0.001, 0.5), min_size=40, max_size=60))
def test_traffic_counts_like_heartbeats(pauses: list[float]) -> None:
    """Pauses in intervals: RabbitMQ sends no heartbeat while it sends something else."""
    bench = Bench()
    mark = bench.heartbeat.mark()
    for pause in pauses:
        bench.loop.advance(pause * INTERVAL)
        bench.heartbeat.received()
        if bench.elapsed() < 0.4 * INTERVAL:
            assert not bench.heartbeat.is_overdue(mark)
        if bench.elapsed() >= 1.5 * INTERVAL:
            assert bench.heartbeat.is_overdue(mark)


def test_without_heartbeats_the_time_counts() -> None:
    bench = Bench(0)
    mark = bench.heartbeat.mark()
    bench.heartbeat.received()
    bench.loop.advance(29.9)
    bench.heartbeat.received()
    assert not bench.heartbeat.is_overdue(mark)
    bench.loop.advance(0.2)
    assert bench.heartbeat.is_overdue(mark)


# A loop that stood still


@pytest.mark.parametrize("interval", [INTERVAL, 0.0])
def test_socket_is_to_be_looked_at_soon_after_the_last_read(
    interval: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(interval)
    monkeypatch.setattr(heartbeat.time, "time", lambda: bench.loop.now)
    for note in (bench.heartbeat.received, bench.heartbeat.refresh):
        note()
        bench.loop.block(0.9 * heartbeat.FRESHNESS)
        assert bench.heartbeat.fresh_until > bench.loop.now
        bench.loop.block(0.2 * heartbeat.FRESHNESS)
        assert bench.heartbeat.fresh_until < bench.loop.now
    bench.loop.block(1.3 * INTERVAL)
    bench.loop.advance(0)  # the tick that was due: nothing is read yet
    assert bench.heartbeat.fresh_until < bench.loop.now
