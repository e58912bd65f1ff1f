"""Run attempts side by side and use the first that succeeds (the idea of RFC 8305).

If attempts ran one after the other, an address that swallows packets would cost each connection a
share of its time limit. So the next attempt starts when the newest one has failed, or hasn't been
answered for a moment. An attempt that was answered gets more time, since each attempt costs a busy
broker a login. It doesn't get all the time: a server that accepts a connection and then says
nothing isn't a broker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

# Seconds. RFC 8305 recommends the first. The second is long enough for many processes at once: when
# 200 processes reconnected to a broker on two cores, all had their connections after 1.6 s.
ATTEMPT_DELAY = 0.25
ATTEMPT_DELAY_ONCE_ANSWERED = 2.0


class Attempt(Protocol):
    """One way to reach a broker."""

    @property
    def has_answered(self) -> bool:
        """Whether a server has accepted the connection."""

    async def run(self) -> None:
        """Try, and raise if that fails. A cancelled attempt ends soon and leaves nothing open."""

    def abort(self) -> None:
        """Close at once the connection that ``run`` has opened."""


A = TypeVar("A", bound=Attempt)


class Race(Generic[A]):
    """Runs attempts, the likeliest first. An error in ``final`` ends the race.

    All attempts would end in such an error.
    """

    def __init__(self, attempts: Sequence[A], *, final: tuple[type[Exception], ...] = ()) -> None:
        self._untried = list(reversed(attempts))
        self._final = final
        self._running: dict[asyncio.Task[None], A] = {}
        self._newest: A | None = None  # None if it has failed
        # Loop times at which the next attempt starts: if no server has answered the newest one, and
        # if one has.
        self._next_at = self._next_at_once_answered = 0.0
        self.errors: list[Exception] = []  # of the attempts that have failed

    async def run(self, deadline: float) -> A:
        """Return the first attempt that succeeds.

        Raises a final error at once, the most telling error if all attempts have failed, or
        TimeoutError at ``deadline`` (loop time). If this raises or is cancelled, all attempts have
        ended before.
        """
        try:
            winner = await self._find_winner(deadline)
        except GeneratorExit:  # The event loop was closed: nothing more can be awaited.
            raise
        except BaseException:
            self._stop_others()
            if self._running:
                await asyncio.wait(self._running)
            raise
        self._stop_others()
        return winner

    @property
    def unfinished(self) -> list[A]:
        """The attempts that the deadline has ended."""
        return list(self._running.values())

    async def _find_winner(self, deadline: float) -> A:
        loop = asyncio.get_running_loop()
        while self._untried or self._running:
            now = loop.time()
            if now >= deadline:
                raise TimeoutError
            wake_at = deadline
            if self._untried:
                if self._due_at() <= now:
                    self._start_next(now, deadline)
                wake_at = min(deadline, self._due_at()) if self._untried else deadline
            done, _ = await asyncio.wait(
                self._running, timeout=wake_at - now, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                attempt = self._running[task]
                if self._has_won(task):
                    return attempt
        raise most_telling(self.errors)

    def _due_at(self) -> float:
        """Return when the next attempt is due."""
        if self._newest is None:
            return 0.0
        return self._next_at_once_answered if self._newest.has_answered else self._next_at

    def _start_next(self, now: float, deadline: float) -> None:
        # With little time left, the next attempt starts after an equal share of it.
        share = (deadline - now) / len(self._untried)
        self._next_at = now + min(ATTEMPT_DELAY, share)
        self._next_at_once_answered = now + min(ATTEMPT_DELAY_ONCE_ANSWERED, share)
        self._newest = self._untried.pop()
        self._running[asyncio.get_running_loop().create_task(self._newest.run())] = self._newest

    def _has_won(self, task: asyncio.Task[None]) -> bool:
        """Return whether an attempt that has ended succeeded; raise its error if that is final."""
        if not task.cancelled() and task.exception() is None:
            del self._running[task]
            return True
        attempt = self._running.pop(task)
        if attempt is self._newest:
            self._newest = None
        exc = OSError("it was cancelled") if task.cancelled() else task.exception()
        if not isinstance(exc, Exception) or isinstance(exc, self._final):
            assert exc is not None
            raise exc
        self.errors.append(exc)
        return False

    def _stop_others(self) -> None:
        for task, attempt in self._running.items():
            task.cancel()
            task.add_done_callback(partial(_abort_if_done, attempt))


def _abort_if_done(attempt: Attempt, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is None:
        attempt.abort()


def most_telling(errors: Sequence[Exception]) -> Exception:
    """Return one error for all attempts.

    If there is one that says more than that no server is there, return that one.
    """
    for exc in errors:
        if type(exc) not in (OSError, ConnectionRefusedError, TimeoutError):
            return exc
    texts = dict.fromkeys(map(str, errors))
    if len(texts) == 1:
        return errors[0]
    kinds = {type(exc) for exc in errors}
    return (kinds.pop() if len(kinds) == 1 else OSError)("; ".join(texts))
