"""Keeps log lines from the terminal that a command writes to."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    """Have all present handlers log nothing: what goes wrong, the command itself tells.

    A handler that is added meanwhile gets all records.
    """
    handlers = _present_handlers()
    for handler in handlers:
        handler.addFilter(_refuse)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_refuse)


def _refuse(record: logging.LogRecord) -> bool:
    return False


def _present_handlers() -> set[logging.Handler]:
    """Return those of all loggers: the project may have given one to any of them."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    found = {
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
    }
    if logging.lastResort is not None:  # for loggers without a handler
        found.add(logging.lastResort)
    return found
