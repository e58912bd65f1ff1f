"""What goes wrong without ending a run: counted by kind, with the first text of each kind."""

from __future__ import annotations

import asyncio

LOST = "lost"
DUPLICATED = "duplicated"
DAMAGED = "damaged"
REFUSED = "refused (ChannelFull)"
TIMED_OUT = "timed out"
SHARED = "the same object for several receivers"
NOT_CLOSED = "not closed"

_LONGEST_TEXT = 100

# What went wrong in a run, short of ending it: {"lost": (3, ""), "RuntimeError": (955, "its text")}
Problems = dict[str, tuple[int, str]]


class Tally:
    """Counts problems in one process."""

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, str]] = {}

    def note(self, kind: str, times: int = 1, text: str = "") -> None:
        if times:
            before, first_text = self.counts.get(kind, (0, text))
            self.counts[kind] = (before + times, first_text)

    def note_exc(self, exc: BaseException) -> None:
        kind, text = describe(exc)
        self.note(kind, text=text)


def add_problems(total: Problems, more: Problems) -> None:
    """Add the counts of ``more`` to those of ``total``."""
    for name, (times, example) in more.items():
        before, first_example = total.get(name, (0, ""))
        total[name] = (before + times, first_example or example)


def describe(exc: BaseException) -> tuple[str, str]:
    """The kind of an exception, and its text."""
    name = type(exc).__name__
    if name == "ChannelFull":
        return REFUSED, ""
    if isinstance(exc, (TimeoutError, asyncio.TimeoutError)):
        return TIMED_OUT, ""
    return name, " ".join(str(exc).split())[:_LONGEST_TEXT]
