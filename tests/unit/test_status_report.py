"""The status of all processes as text: what is shown, and that it fits the terminal."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from channels_rabbitmq._tools import status as command
from channels_rabbitmq._tools.status_report import cut_middle, draw, first_lines, is_well, short
from channels_rabbitmq.statistics import ConnectionStatistics, GroupStatistics
from channels_rabbitmq.status import MissingProcess, ProcessStatus, Status, WorstChannel
from tests.support.statuses import status_of

NOW = 1000.0 + 3 * 3600


def id_of(letter: str) -> str:
    return "crq." + letter * 16


def of(*processes: ProcessStatus, **changes: Any) -> Status:
    return replace(Status(processes, (), (), is_complete=True), **changes)


STUCK = status_of(
    id_of("s"),
    oldest=41.0,
    worst=WorstChannel(f"{id_of('s')}!specific.abc", 120, "ChatConsumer, in room-1 and 3 more"),
    pid=17,
    groups=GroupStatistics(7, 7, 0),
    buffered=123,
    stalled_channels=1,
)
SILENT = MissingProcess(id_of("m"), 75.0, 4712, "web-2")


def test_what_is_wrong_comes_first_and_is_named() -> None:
    lines = draw(of(status_of(id_of("a")), STUCK, silent=(SILENT,), is_complete=False), NOW, 100)
    assert lines == [
        "2 processes answer, 1 at fault, 1 silent",
        "ID                    PID HOST  UP CONN GROUPS WAITING STALLED OLDEST  LAG",
        "crq.mmmmmmmmmmmmmmmm 4712 web-2 doesn't answer; last heard 75s ago",
        "crq.ssssssssssssssss   17 web-1 3h    2      7     123       1    41s 0.0s",
        "    !specific.abc: 120 messages (ChatConsumer, in room-1 and 3 more)",
        "crq.aaaaaaaaaaaaaaaa 4711 web-1 3h    2      0       0       0      - 0.0s",
    ]


def test_an_event_loop_that_was_blocked_is_at_fault() -> None:
    slow = status_of(id_of("z"), loop_lag=120.0)
    lines = draw(of(status_of(id_of("a")), slow), NOW, 100)
    assert lines[0] == "2 processes answer, 1 at fault"
    assert [line.split()[0] for line in lines[2:]] == [id_of("z"), "its", id_of("a")]
    assert lines[3] == "    its event loop was blocked for 2m"


def test_an_alarm_is_not_mistaken_for_an_empty_exchange() -> None:
    alarm = of(is_complete=False, is_blocked=True)
    assert not is_well(alarm)
    lines = draw(alarm, NOW, 80)
    assert lines[0] == "0 processes answer, RabbitMQ takes no messages"
    assert "processes can't be asked" in lines[1]
    assert "`rabbitmq-diagnostics alarms`" in lines[2]
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    # Those that had answered before it began are shown all the same.
    answered = draw(replace(alarm, processes=(STUCK,)), NOW, 80)
    assert answered[1:3] == lines[1:]
    assert answered[4].startswith(STUCK.statistics.id)


def test_connections() -> None:
    lost = ConnectionStatistics("waiting", NOW - 90, "", 1, "refused")
    lines = draw(of(status_of(id_of("a"), publisher=lost, is_blocked=True)), NOW, 100)
    assert lines[0] == "1 process answers, 1 at fault"
    assert " 1/2 " in lines[2]
    assert lines[3:] == [
        "    publisher: no connection for 90s: refused",
        "    RabbitMQ takes no messages: it is low on memory or disk space",
    ]


def test_those_that_are_gone_without_a_goodbye() -> None:
    """They are shown, and no fault: it may have been the operator."""
    status = of(status_of(id_of("a")), lost=(SILENT,))
    lines = draw(status, NOW, 100)
    assert lines[0] == "1 process answers, 1 gone without a goodbye"
    assert lines[2] == (
        "crq.mmmmmmmmmmmmmmmm 4712 web-2 is gone without a goodbye: killed, stopped or blocked; "
        "last heard 75s ago"
    )
    assert is_well(status)


def test_those_that_are_missing() -> None:
    unheard = MissingProcess(id_of("x"), None, 0, "")
    lines = draw(of(silent=(unheard,), absent=(SILENT,), is_complete=False), NOW, 100)
    assert lines[0] == "0 processes answer, 1 silent, 1 without a connection"
    assert lines[2:] == [
        "crq.xxxxxxxxxxxxxxxx    ? ?     doesn't answer; heard by nobody",
        "crq.mmmmmmmmmmmmmmmm 4712 web-2 has lost its connection; last heard 75s ago",
    ]
    assert draw(of(), NOW, 100)[1] == "No process that receives uses this exchange."
    assert "perhaps not all" in draw(of(is_complete=False), NOW, 100)[0]


@pytest.mark.parametrize("width", [80, 100])
def test_it_fits(width: int) -> None:
    """With a host name as long as can be, and numbers as large as they come."""
    large: dict[str, Any] = {"pid": 4194304, "buffered": 99_999, "loop_lag": 12.0}
    host = f"{'application-' * 10}7f9c-x2k9p"
    worst = WorstChannel(f"{id_of('s')}!{'x' * 78}", 12_345, f"Consumer, in {'y' * 99}")
    processes = [
        status_of(id_of("a"), host=host, oldest=3000.0, worst=worst, **large),
        replace(STUCK, statistics=replace(STUCK.statistics, host=host.replace("p", "q"))),
    ]
    lines = draw(of(*processes, silent=(replace(SILENT, host=host),)), NOW, width)
    assert max(map(len, lines)) <= width
    assert len({line[:50] for line in lines}) == len(lines)
    if width == 100:
        assert "application-a..on-7f9c-x2k9p" in lines[3]


def test_short_texts() -> None:
    assert cut_middle("web-1", 6) == "web-1"
    assert cut_middle("web-123", 6) == "we..23"
    times = [-1, 0.04, 9.9, 9.96, 99.4, 99.6, 5940, 6000, 359_000, 360_000, 86_400 * 400]
    assert [short(time) for time in times] == [
        *("0.0s", "0.0s", "9.9s", "10s", "99s", "2m", "99m", "2h", "4d", "4d", "400d")
    ]


@pytest.mark.parametrize(
    ("status", "well"),
    [
        (of(), True),
        (of(status_of(id_of("a"), loop_lag=0.9)), True),
        (of(status_of(id_of("a"), loop_lag=1.0)), False),
        (of(status_of(id_of("a"), oldest=9.0)), True),
        (of(status_of(id_of("a"), oldest=10.0)), False),
        (of(STUCK), False),
        (of(status_of(id_of("a"), is_blocked=True)), False),
        (of(is_complete=False), False),
        (of(absent=(SILENT,)), False),
    ],
)
def test_when_it_is_well(status: Status, well: bool) -> None:
    assert is_well(status) is well


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf", ""])
def test_bad_seconds(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--watch={text}"])
    assert "not a number of seconds above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (-1, ["... 3 more lines"]),
        (0, ["... 3 more lines"]),
        (1, ["... 3 more lines"]),
        (2, ["a", "... 2 more lines"]),
        (3, ["a", "b", "c"]),
        (4, ["a", "b", "c"]),
    ],
)
def test_on_a_low_terminal(count: int, shown: list[str]) -> None:
    assert first_lines(["a", "b", "c"], count) == shown


def test_the_time_is_not_that_of_the_projects_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/Chicago")  # as Django does
    time.tzset()
    try:
        before, shown, after = time.gmtime(), command._now(), time.gmtime()
    finally:
        monkeypatch.undo()
        time.tzset()
    assert shown in [time.strftime("%H:%M:%S UTC", one) for one in (before, after)]


def test_on_a_terminal_of_unknown_height(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container: nothing is left out."""
    monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback: os.terminal_size((100, 0)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    arguments = argparse.Namespace(json=False, watch=2.0)
    command._show("amqp://host", of(STUCK), arguments)
    out = capsys.readouterr().out
    assert STUCK.statistics.id in out
    assert "more lines" not in out
