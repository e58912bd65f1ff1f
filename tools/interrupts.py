"""SIGINT, SIGTERM and SIGHUP end a command as Ctrl-C does: once, and never at a bad moment."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_holds = 0
_is_due = False


def let_signals_interrupt() -> None:
    """From now on the first of these signals raises ``KeyboardInterrupt``.

    Later ones are ignored: they would interrupt the cleaning up.
    """
    for number in _SIGNALS:
        signal.signal(number, _interrupt)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A signal that comes within counts at the end of this block.

    For what must not be cut in the middle: a process that was started but isn't noted yet would
    live on.
    """
    global _holds
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1
        if _is_due and not _holds:
            _raise()


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _is_due
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    _is_due = True
    if not _holds:
        _raise()


def _raise() -> None:
    global _is_due
    _is_due = False
    raise KeyboardInterrupt
