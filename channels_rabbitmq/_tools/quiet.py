"""Keeps log lines from the terminal that a command writes to."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_log() -> Iterator[None]:
    """Log nothing: what goes wrong, the command itself tells."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
