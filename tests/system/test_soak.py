"""The soak: what it makes of the participants' notes, and that it runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from soak import memory
from soak.proof import Proof, Verdict, Window
from tests.support.brokers import broker_commands

ROOT = Path(__file__).parents[2]
WINDOWS = [Window("a fault", 100.0, 110.0)]
GOOD = """\
join c c 1
join c g 2
send s c 1 3 3.1 ok
receive c s c 1
send s g 1 4 4.1 ok
send s g 2 5 5.1 ok
receive c s g 1
receive c s g 2
send s c 2 6 6.1 ok
receive c s c 2
leave c g 200
leave c c 201
"""


def judge(*lines: str, notes: str = GOOD) -> Verdict:
    proof = Proof()
    proof.read([*notes.splitlines(), *lines])
    return proof.judge(WINDOWS)


def test_good_notes_have_no_problems() -> None:
    verdict = judge()
    assert verdict.problems == []
    assert (verdict.sent, verdict.received, verdict.required) == (4, 4, 4)
    assert (verdict.failed_in_windows, verdict.lost_in_windows) == (0, 0)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["receive c s c 2"], "c: 2 of s to c twice"),
        (["send s c 3 7 7.1 ok", "receive c s c 3", "receive c s c 1"], "1 of s to c after 3"),
        (["send s c 3 7 7.1 ok"], "c never received 3 of s to c"),
        (["send t g 1 7 7.1 ok"], "c never received 1 of t to g"),
        (["send s c 3 7 7.1 ChannelFull"], "ChannelFull for 3 of s to c, in no window"),
        (["receive c s h 1"], "c received from h, which it never joined"),
        # Just before and just after the window
        (["send s c 3 99 99.9 ok"], "c never received 3 of s to c"),
        (["send s c 3 110.1 110.2 ok"], "c never received 3 of s to c"),
    ],
)
def test_each_kind_of_problem_is_found(lines: list[str], problem: str) -> None:
    (found,) = judge(*lines).problems
    assert problem in found


@pytest.mark.parametrize(
    "lines",
    [
        # It began, or ended, in the window, or went on for all of it.
        ["send s c 3 105 105.1 ok"],
        ["send s c 3 99 100.1 ok"],
        ["send s c 3 109.9 111 ok"],
        ["send s c 3 99 111 ok"],
    ],
)
def test_what_is_lost_in_a_window_is_counted(lines: list[str]) -> None:
    verdict = judge(*lines)
    assert verdict.problems == []
    assert verdict.lost_in_windows == 1


def test_calls_that_fail_in_a_window_are_counted() -> None:
    verdict = judge("send s c 3 105 105.1 BrokerUnavailable")
    assert verdict.problems == []
    assert verdict.failed_in_windows == 1


@pytest.mark.parametrize(
    "lines",
    [
        # Before the channel had joined, and after it had left
        ["send t g 1 1.9 2.1 ok"],
        ["send t g 1 199 200.1 ok"],
        # It never became a member, though it may hear something
        ["join c h inf", "send t h 1 50 50.1 ok", "receive c t h 1", "send t h 2 51 51.1 ok"],
        # Nobody is there
        ["send t i 1 50 50.1 ok"],
    ],
)
def test_only_members_must_receive(lines: list[str]) -> None:
    verdict = judge(*lines)
    assert verdict.problems == []
    assert verdict.lost_in_windows == 0


def test_notes_that_are_none() -> None:
    with pytest.raises(ValueError, match="not a line"):
        judge("nonsense 1 2")


MIB = 2**20


def samples(*sizes: float) -> list[memory.Sample]:
    return [(10.0 * n, int(size * MIB)) for n, size in enumerate(sizes)]


def test_memory_that_grows_only_in_the_warm_up_is_flat() -> None:
    trend = memory.trend(samples(10, 20, 30, 35, 39, 40, *([40, 41] * 20)))
    assert trend is not None
    assert trend.is_flat
    assert trend.highest == 41 * MIB
    assert abs(trend.per_hour) < 10 * MIB


def test_memory_that_goes_on_growing_is_not_flat() -> None:
    trend = memory.trend(samples(*(20 + n for n in range(60))))
    assert trend is not None
    assert not trend.is_flat
    assert trend.per_hour == pytest.approx(360 * MIB)


def test_too_few_samples_say_nothing() -> None:
    assert memory.trend([]) is None
    assert memory.trend(samples(1, 2, 3)) is None


def test_memory_of_processes() -> None:
    assert memory.resident([os.getpid()])[os.getpid()] > MIB


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_very_short_soak() -> None:
    """Its faults are of any kind; without them nothing may be lost at all."""
    commands = broker_commands()
    done = subprocess.run(
        [ROOT / "scripts" / "soak", "--minutes", "0.15", "--seed", "3", "--python", sys.executable],
        env={**os.environ, "RABBITMQ_BIN": str(commands)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Passed" in done.stdout
    assert done.stderr == ""
    due = re.search(r"Outside of faults ([\d,]+) deliveries were due", done.stdout)
    assert due is not None
    assert int(due[1].replace(",", "")) > 0
    faults = done.stdout.partition("Faults")[2].partition("Memory")[0].strip().splitlines()
    assert len(faults) >= 2  # the heading, and one
