"""Tells the consumers of this process when its channel layer has lost RabbitMQ, and has it again.

The channel layer calls ``begin`` and ``end`` (settings.py): ``end`` as soon as all groups of this
process get messages again. Both run on the event loop of the consumers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

is_up = True
listeners: set[Callable[[], Awaitable[None]]] = set()


async def begin(id: str, reason: str) -> None:
    await _tell(False)


async def end(id: str, reason: str) -> None:
    await _tell(True)


async def _tell(up: bool) -> None:
    global is_up
    is_up = up
    for listener in [*listeners]:
        await listener()
