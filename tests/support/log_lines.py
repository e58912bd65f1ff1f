"""What was logged: waiting for a line, and finding what should never be there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Iterator

import pytest


class LogLines(logging.Handler):
    """The lines that the package logs, to be waited for one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: asyncio.Queue[str] = asyncio.Queue()
        self.all: list[str] = []  # also those that somebody waited for

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        self._lines.put_nowait(line)
        self.all.append(line)

    async def next(self, pattern: str = "", *, timeout: float = 20.0) -> str:
        """Return the next line in which ``pattern`` is found, leaving out those before it."""
        while True:
            line = await asyncio.wait_for(self._lines.get(), timeout)
            if re.search(pattern, line):
                return line

    def rest(self) -> list[str]:
        """Return all lines that came since and nobody waited for."""
        return [self._lines.get_nowait() for _ in range(self._lines.qsize())]


@contextlib.contextmanager
def log_lines(level: int = logging.INFO) -> Iterator[LogLines]:
    """Collect what ``channels_rabbitmq`` logs, with its tracebacks, from ``level`` upwards."""
    logger = logging.getLogger("channels_rabbitmq")
    handler = LogLines()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    before = logger.level
    logger.setLevel(level)
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def unhandled(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this test logged, by any logger, as an error or with a traceback."""
    return [
        f"{record.name}: {record.getMessage()}"
        for record in caplog.get_records("call")
        if record.levelno >= logging.ERROR or record.exc_info
    ]
