"""The highest age of what was lately received: windows, and what is told of them."""

from __future__ import annotations

import pytest

from channels_rabbitmq._inbox.ages import Ages
from channels_rabbitmq._windows import WINDOW

START = 1000.0


@pytest.fixture
def told() -> list[tuple[float, str]]:
    """(age, channel) of each report."""
    return []


@pytest.fixture
def ages(told: list[tuple[float, str]]) -> Ages:
    return Ages(warn_above=10.0, report=lambda age, channel: told.append((age, channel)))


def test_nothing_was_received(ages: Ages) -> None:
    assert ages.highest == ages.newest(0.0) == ages.newest(START) == 0.0


def test_newest_is_the_highest(ages: Ages) -> None:
    ages.note(3.0, "a", START)
    ages.note(5.0, "b", START + 1)
    assert ages.highest == ages.newest(START + 1) == 5.0


def test_newest_remains_for_one_window_to_two(ages: Ages) -> None:
    ages.note(5.0, "a", START)
    ages.note(7.0, "a", START + WINDOW - 1)
    assert ages.newest(START + 2 * WINDOW - 1) == 7.0, "of the last window, though none has begun"
    assert ages.newest(START + 2 * WINDOW) == 0.0
    ages.begin_window(START + WINDOW)
    assert ages.highest == 0.0, "so any age is noted"
    assert ages.newest(START + 2 * WINDOW - 1) == 7.0
    ages.begin_window(START + 2 * WINDOW)
    assert ages.newest(START + 2 * WINDOW) == 0.0


def test_newest_is_the_higher_one_of_two_windows(ages: Ages) -> None:
    ages.note(5.0, "a", START)
    ages.note(3.0, "a", START + WINDOW)
    assert (ages.highest, ages.newest(START + WINDOW)) == (3.0, 5.0)
    ages.note(4.0, "a", START + 2 * WINDOW)
    assert ages.newest(START + 2 * WINDOW) == 4.0
    ages.begin_window(START + 3 * WINDOW)
    assert ages.newest(START + 3 * WINDOW) == 4.0


def test_window_that_is_not_over_goes_on(ages: Ages) -> None:
    ages.begin_window(START)
    ages.note(5.0, "a", START + 1)
    ages.begin_window(START + WINDOW - 1)
    assert ages.highest == 5.0


def test_nothing_is_left_of_windows_long_ago(ages: Ages) -> None:
    ages.note(5.0, "a", START)
    ages.note(1.0, "a", START + 2 * WINDOW)
    assert ages.newest(START + 2 * WINDOW) == 1.0


def test_reports_what_is_above_the_limit(ages: Ages, told: list[tuple[float, str]]) -> None:
    for age in (9.0, 10.0, 10.5, 11.0):
        ages.note(age, f"c{age}", START)
    assert told == [(10.5, "c10.5"), (11.0, "c11.0")]
    ages.note(10.2, "next", START + WINDOW)
    assert told[2:] == [(10.2, "next")], "each window anew"
