"""Which processes are known, absent and gone, by a clock of the test's own."""

from __future__ import annotations

import pytest

from channels_rabbitmq._identity import Place
from channels_rabbitmq._peers import processes as _processes
from channels_rabbitmq._peers.processes import GONE_AFTER, LOST_FOR, Processes
from channels_rabbitmq._peers.requests import Heard
from channels_rabbitmq.statistics import ProcessStatistics

OWN, A, B, C = (f"crq.{letter * 16}" for letter in "oabc")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def processes(clock: Clock) -> Processes:
    return Processes(OWN, clock)


def test_nobody_is_known_at_first(processes: Processes) -> None:
    assert processes.known() == list(processes.absences()) == []
    assert processes.absences() == {}
    assert not processes.is_gone(A)


def test_whatever_is_heard_makes_a_process_known(processes: Processes) -> None:
    processes.on_heard(A)
    processes.on_heard(B)
    processes.on_heard(A)
    assert sorted(processes.known()) == [A, B]
    assert processes.statistics() == ProcessStatistics(known=2, absent=0)


def test_it_does_not_know_itself(processes: Processes) -> None:
    processes.on_heard(OWN)
    processes.on_hearsay([OWN])
    processes.on_returned(OWN)
    processes.on_bye(OWN)
    assert processes.known() == []
    assert not processes.is_gone(OWN)


def test_returned_is_absent_and_gone_after_a_while(processes: Processes, clock: Clock) -> None:
    processes.on_heard(A)
    processes.on_returned(A)
    clock.now += GONE_AFTER - 0.1
    processes.on_returned(A)  # doesn't begin anew
    assert processes.known() == list(processes.absences()) == [A]
    assert processes.statistics() == ProcessStatistics(known=1, absent=1)
    assert not processes.is_gone(A)
    clock.now += 0.1
    assert processes.is_gone(A)
    assert processes.known() == list(processes.absences()) == []
    assert not processes.has_said_bye(A)


def test_one_that_is_back_is_present(processes: Processes, clock: Clock) -> None:
    processes.on_heard(A)
    processes.on_returned(A)
    clock.now += GONE_AFTER - 0.1
    processes.on_heard(A)
    clock.now += GONE_AFTER
    assert processes.known() == [A]
    assert list(processes.absences()) == []
    processes.on_returned(A)
    assert list(processes.absences()) == [A]


def test_bye_is_gone_at_once(processes: Processes) -> None:
    processes.on_heard(A)
    processes.on_bye(A)
    processes.on_bye(B)
    assert processes.known() == []
    for id_ in (A, B):
        assert processes.is_gone(id_)
        assert processes.has_said_bye(id_)


def test_one_that_is_heard_again_is_not_gone(processes: Processes) -> None:
    processes.on_bye(A)
    processes.on_heard(A)
    assert processes.known() == [A]
    assert not processes.is_gone(A)
    assert not processes.has_said_bye(A)


def test_a_return_after_bye_changes_nothing(processes: Processes, clock: Clock) -> None:
    processes.on_bye(A)
    processes.on_returned(A)
    clock.now += GONE_AFTER
    processes.on_returned(A)
    assert processes.has_said_bye(A)
    assert list(processes.absences()) == []


def test_hearsay_is_known(processes: Processes) -> None:
    processes.on_heard(A)
    processes.on_hearsay([A, B])
    assert sorted(processes.known()) == [A, B]


def test_the_news_of_an_absence(processes: Processes, clock: Clock) -> None:
    """It goes on where the others have begun it."""
    processes.on_heard(A)
    processes.on_hearsay([B])
    processes.on_bye(C)
    clock.now += GONE_AFTER
    processes.on_absent_elsewhere({A: 3.0, B: 4.0, C: 5.0, OWN: 6.0, "crq.unknown": 7.0})
    assert processes.absences() == {A: 3.0, B: 4.0}
    processes.on_absent_elsewhere({A: 9.0})  # has begun already
    assert processes.absences() == {A: 3.0, B: 4.0}
    clock.now += GONE_AFTER - 4.0
    assert processes.known() == [A]
    assert processes.is_gone(B)


def test_the_news_of_an_absence_may_be_old(processes: Processes, clock: Clock) -> None:
    processes.on_heard(A)
    clock.now += GONE_AFTER - 0.1
    processes.on_absent_elsewhere({A: 3.0})
    assert processes.absences() == {}


def test_it_tells_who_is_absent_only_now(processes: Processes, clock: Clock) -> None:
    processes.on_heard(A)
    assert processes.on_returned(A)
    clock.now += 1
    assert not processes.on_returned(A)
    assert not processes.on_returned(B)


def test_hearsay_revives_nobody(processes: Processes, clock: Clock) -> None:
    """It may be older than the bye."""
    processes.on_bye(A)
    processes.on_heard(B)
    processes.on_returned(B)
    clock.now += GONE_AFTER
    assert processes.is_gone(B)
    processes.on_hearsay([A, B])
    assert processes.known() == []


def test_hearsay_does_not_end_an_absence(processes: Processes) -> None:
    processes.on_heard(A)
    processes.on_returned(A)
    processes.on_hearsay([A])
    assert list(processes.absences()) == [A]


def test_no_result_waits_for_a_stranger(processes: Processes, clock: Clock) -> None:
    processes.on_returned(A)
    assert processes.known() == list(processes.absences()) == []
    assert not processes.is_gone(A)
    clock.now += GONE_AFTER
    assert not processes.is_gone(A)  # It may have come since.
    processes.on_returned(A)
    assert processes.is_gone(A)


def test_a_stranger_that_turns_up(processes: Processes, clock: Clock) -> None:
    processes.on_returned(A)
    processes.on_heard(A)
    clock.now += GONE_AFTER
    assert processes.known() == [A]
    assert list(processes.absences()) == []


def test_time_without_an_own_connection_does_not_count(processes: Processes, clock: Clock) -> None:
    """Those that came back meanwhile were not heard."""
    processes.on_heard(A)
    processes.on_returned(A)
    processes.on_returned(B)
    processes.on_nothing_heard(clock.now)
    clock.now += 10 * GONE_AFTER
    assert processes.known() == [A]
    assert list(processes.absences()) == []
    processes.on_returned(A)
    processes.on_returned(B)
    assert list(processes.absences()) == [A]
    assert not processes.is_gone(B)


def test_time_while_the_loop_stood_still_does_not_count(processes: Processes, clock: Clock) -> None:
    processes.on_heard(A)
    processes.on_returned(A)
    since = clock.now
    clock.now += 2 * GONE_AFTER
    processes.on_nothing_heard(since)
    assert processes.known() == [A]
    assert processes.absences() == {}


def test_those_that_were_gone_before_stay_gone(processes: Processes, clock: Clock) -> None:
    processes.on_bye(A)
    processes.on_heard(B)
    processes.on_returned(B)
    clock.now += GONE_AFTER
    processes.on_nothing_heard(clock.now)
    assert processes.is_gone(A)
    assert processes.is_gone(B)


def test_memory_is_bounded(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever others say: those that were heard least lately are forgotten."""
    monkeypatch.setattr(_processes, "MOST_KNOWN", 2)
    monkeypatch.setattr(_processes, "MOST_GONE", 2)
    for id_ in (A, B, A, C):
        processes.on_heard(id_)
    assert sorted(processes.known()) == [A, C]
    for id_ in (A, B, C):
        processes.on_bye(id_)
    assert [processes.is_gone(id_) for id_ in (A, B, C)] == [False, True, True]
    for number in range(10):
        processes.on_returned(f"crq.{number}")
    assert len(processes._strangers) <= 3


def test_a_line_in_the_log_names_the_place(processes: Processes) -> None:
    processes.on_heard(A)
    assert processes.describe(A) == A
    processes.on_place(A, Place(17, "web-1"))
    assert processes.describe(A) == f"{A} on web-1, pid 17"
    processes.on_place(B, Place(18, "web-2"))  # never heard
    assert processes.describe(B) == B
    processes.on_bye(A)
    assert processes.describe(A) == A


def test_one_that_is_gone_without_a_bye_is_told_as_lost(processes: Processes, clock: Clock) -> None:
    place = Place("web-1", 17)
    for id_ in (A, B, C):
        processes.on_heard(id_)
        processes.on_place(id_, place)
    processes.on_bye(B)
    processes.on_returned(A)
    assert processes.lost() == {}
    clock.now += GONE_AFTER
    assert processes.lost() == {A: Heard(GONE_AFTER, place)}
    clock.now += LOST_FOR - 1
    assert list(processes.lost()) == [A]
    clock.now += 1
    assert processes.lost() == {}


@pytest.mark.parametrize("is_back", [True, False])
def test_a_lost_one_that_is_back_or_says_bye_is_lost_no_more(
    processes: Processes, clock: Clock, is_back: bool
) -> None:
    processes.on_heard(A)
    processes.on_returned(A)
    clock.now += GONE_AFTER
    assert list(processes.lost()) == [A]
    (processes.on_heard if is_back else processes.on_bye)(A)
    assert processes.lost() == {}


def test_only_so_many_are_told_as_lost(
    processes: Processes, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_processes, "MOST_LOST", 2)
    for id_ in (A, B, C):
        processes.on_heard(id_)
        processes.on_returned(id_)
    clock.now += GONE_AFTER
    assert list(processes.lost()) == [B, C]
