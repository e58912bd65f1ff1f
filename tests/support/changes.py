"""Waiting for a state instead of for time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Changes:
    """Wakes the waiters for a condition on some object's state, each time that object says so."""

    def __init__(self) -> None:
        self._waiters: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    def notify(self) -> None:
        """To be called after each change of the state."""
        for condition, waiter in self._waiters:
            if not waiter.done() and condition():
                waiter.set_result(None)

    async def until(self, condition: Callable[[], bool], *, timeout: float = 10.0) -> None:
        """Returns when the condition holds, at once if it does now.

        Raises ``TimeoutError`` after ``timeout`` seconds: a test says where it waits in vain.
        """
        if condition():
            return
        entry = (condition, asyncio.get_running_loop().create_future())
        self._waiters.append(entry)
        try:
            await asyncio.wait_for(entry[1], timeout)
        except asyncio.TimeoutError as exc:  # isn't the builtin before Python 3.11
            raise TimeoutError(f"no such change within {timeout:g} s") from exc
        finally:
            self._waiters.remove(entry)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what tells nobody."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it doesn't come about"
        await asyncio.sleep(0.005)
