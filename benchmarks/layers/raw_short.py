"""The bare AMQP client by the shortest way: straight to the queue, and not mandatory."""

from __future__ import annotations

from . import raw
from .raw import NEEDS_LOOP, PACKAGES, REQUIREMENTS, SERVER, close_layer

__all__ = [
    "NEEDS_LOOP",
    "PACKAGES",
    "REQUIREMENTS",
    "SERVER",
    "TITLE",
    "close_layer",
    "make_layer",
]

TITLE = "raw, shortest way"


async def make_layer(url: str, capacity: int) -> raw.RawLayer:
    return await raw.make_layer(url, capacity, exchange="")
