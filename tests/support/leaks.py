"""What a test may not leave behind: tasks, sockets, errors nobody saw, unclosed resources."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import stat
import warnings
from typing import Any

# How often the loop goes round before what is still there counts as left behind: a transport that
# was closed goes away a turn or two later, which nobody can wait for.
_TURNS = 10
# Seconds after which a socket that was closed has to be gone (TLS says farewell first).
_SOCKET_GRACE = 1.0

Sockets = dict[tuple[int, int], str]


def open_sockets() -> Sockets:
    """This process's TCP sockets: (descriptor, inode) and where each leads."""
    sockets = {}
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the descriptor of this listing is closed by now
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                with socket.socket(fileno=os.dup(int(name))) as duplicate:
                    if duplicate.family in (socket.AF_INET, socket.AF_INET6):
                        sockets[int(name), status.st_ino] = _describe(duplicate)
    return sockets


def _describe(tcp: socket.socket) -> str:
    here = "{}:{}".format(*tcp.getsockname())
    try:
        return "{} to {}:{}".format(here, *tcp.getpeername())
    except OSError:
        return f"{here}, not connected"


def new_sockets(before: Sockets) -> list[str]:
    now = open_sockets()
    return [f"socket still open: {now[key]}" for key in now.keys() - before.keys()]


def unclosed_resources() -> list[str]:
    """What the garbage collector finds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
    return [f"{warning.category.__name__}: {warning.message}" for warning in caught]


class LoopWatch:
    """Collects what the running loop would only log, from now on, and finds what is left behind."""

    def __init__(self, *, socket_grace: float = _SOCKET_GRACE) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket_grace = socket_grace
        self._sockets = open_sockets()
        self._tasks = asyncio.all_tasks()
        self.errors: list[str] = []  # a test that provokes one on purpose takes it out
        self._loop.set_exception_handler(self._on_error)

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # As text, for the context would keep alive what it is about.
        error = context.get("exception")
        self.errors.append(f"{context['message']}: {error!r}" if error else context["message"])

    async def left_behind(self) -> list[str]:
        """One line each. Tasks found are cancelled, so that they don't disturb the next test."""
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        tasks = asyncio.all_tasks() - self._tasks - {asyncio.current_task()}
        problems = [f"task still there: {task!r}" for task in tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=1)
        del tasks
        problems += unclosed_resources()
        deadline = self._loop.time() + self._socket_grace
        while (left := new_sockets(self._sockets)) and self._loop.time() < deadline:  # noqa: ASYNC110 - a socket tells nobody when it goes
            await asyncio.sleep(0.01)
        problems += left
        problems += [f"unhandled in the loop: {error}" for error in self.errors]
        return problems
