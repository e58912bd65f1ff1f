"""Futures that others may have cancelled.

carehare sets its futures whether or not somebody cancelled them, and the ``InvalidStateError``
ends the connection. Here everybody who answers one asks first. (``asyncio.shield`` around each
would do too, at 9 µs a call.)
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

T = TypeVar("T")


def resolve(future: asyncio.Future[T], result: T) -> None:
    """Set the result, unless the one who waits is gone."""
    if not future.done():
        future.set_result(result)


def fail(future: asyncio.Future[T], exc: BaseException) -> None:
    """Set the exception, unless the one who waits is gone; asyncio won't mind if nobody looks."""
    if not future.done():
        future.set_exception(exc)
        future.exception()


def look_at(future: asyncio.Future[Any]) -> None:
    """Have asyncio not complain of an exception that nobody sees: a callback for one that ends."""
    if not future.cancelled():
        future.exception()
