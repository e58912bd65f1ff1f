"""One line for an incident, however many messages; one every few seconds for more of the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from channels_rabbitmq import _reporter
from channels_rabbitmq._reporter import Reporter
from tests.support.log_lines import LogLines, log_lines

logger = logging.getLogger("channels_rabbitmq.tests")


@pytest.fixture
def short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reporter, "INTERVAL", 0.02)
    monkeypatch.setattr(_reporter, "FIRST_INTERVAL", 0.01)


@pytest.fixture
def lines() -> Iterator[LogLines]:
    with log_lines() as lines:
        yield lines


@pytest.mark.usefixtures("short_intervals")
async def test_a_burst_is_one_line_with_the_worst_names(lines: LogLines) -> None:
    reporter = Reporter(logger, "crq.x")
    for n in range(7):
        for _ in range(n + 1):
            reporter.report("expired", f"channel{n}")
    line = await lines.next()
    assert line == (
        "WARNING crq.x: 28 messages dropped: no receive() took them within local_expiry: "
        "channel6 (7), channel5 (6), channel4 (5), channel3 (4), channel2 (3) and 2 more"
    )
    reporter.close()
    assert lines.rest() == []


@pytest.mark.usefixtures("short_intervals")
async def test_more_of_the_same_comes_in_a_later_line(lines: LogLines) -> None:
    reporter = Reporter(logger, "crq.x")
    reporter.report("blocked", "g")
    assert "1 group message dropped" in await lines.next()
    reporter.report("blocked", "g")
    reporter.report("blocked", "g")
    assert "2 group messages dropped" in await lines.next()
    reporter.close()


async def test_close_logs_what_is_left_and_stops(lines: LogLines) -> None:
    reporter = Reporter(logger, "crq.x")
    reporter.report("outcome_unknown", "g")
    assert lines.rest() == []
    reporter.close()
    assert "1 message written but not confirmed" in await lines.next()
    reporter.close()
    assert lines.rest() == []
