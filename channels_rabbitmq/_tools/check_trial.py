"""``Trial``: tries one step after the other, each with a time limit, until one fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from channels.exceptions import ChannelFull

from .._broker.reasons import describe, is_trouble
from .._futures import run_until
from .check_hints import FROZEN
from .check_report import Finding, Report, Status, Step
from .project import tell

# The loggers whose warnings are about the broker, and which no step tells by itself
_TOLD = ("publisher", "subscriber", "normal_channels")
_NO_TIME = "no time was left for it: the steps before took too long"


class Broken(Exception):
    """A step has failed, for a reason that is known."""

    def __init__(self, text: str, advice: str = "") -> None:
        super().__init__(text)
        self.finding = Finding(text, advice, Status.FAILED)


class Stopped(Exception):
    """A step has failed: nothing behind it is tried."""


class Trial:
    """Tries steps until ``deadline`` (loop time).

    ``advise(exc)`` returns what to do about an error, or "".
    """

    def __init__(self, report: Report, deadline: float, advise: Callable[[Exception], str]) -> None:
        self._report = report
        self._deadline = deadline
        self._advise = advise
        self.warnings: list[str] = []  # what the layer has logged and no step has told

    async def step(self, name: str, doing: Coroutine[Any, Any, Finding], *, limit: float) -> None:
        """Report what ``doing`` finds within ``limit`` seconds. Raises Stopped if it fails."""
        loop = asyncio.get_running_loop()
        begun_at = loop.time()
        limit = max(0.0, min(limit, self._deadline - begun_at))
        try:
            finding = await run_until(begun_at + limit, doing)
        except Exception as err:
            finding = self._describe(err, limit)
        warnings, self.warnings = self.warnings, []
        if warnings and finding.status is Status.OK:
            text = "; ".join([finding.text, *warnings])
            finding = Finding(text, finding.advice, Status.WARNING)
        self._report.add(Step(name, finding, loop.time() - begun_at))
        if finding.status is Status.FAILED:
            raise Stopped

    def _describe(self, err: Exception, limit: float) -> Finding:
        if isinstance(err, Broken):
            return err.finding
        if isinstance(err, (TimeoutError, asyncio.TimeoutError)) and not str(err):
            text = f"no answer within {limit:.1f} s" if limit else _NO_TIME
            return Finding(text, FROZEN, Status.FAILED)
        text = describe(err) if is_trouble(err) or isinstance(err, ChannelFull) else tell(err)
        return Finding(text, self._advise(err), Status.FAILED)


class _Collector(logging.Handler):
    def __init__(self, trial: Trial) -> None:
        super().__init__(logging.WARNING)
        self._trial = trial

    def emit(self, record: logging.LogRecord) -> None:
        self._trial.warnings.append(record.getMessage())


@contextlib.contextmanager
def collected_warnings(trial: Trial) -> Iterator[None]:
    """Have the layer's warnings stand in the report."""
    handler = _Collector(trial)
    package = logging.getLogger("channels_rabbitmq")
    loggers = [package.getChild(name) for name in _TOLD]  # The project may let none propagate.
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
