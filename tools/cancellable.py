"""``asyncio.run`` that SIGINT, SIGTERM and SIGHUP cancel, instead of interrupting it anywhere.

``KeyboardInterrupt`` is raised wherever the program happens to be; within the event loop, while it
starts a process for instance, that leaves things half done, and tracebacks on the screen. A task
that is cancelled notices at an ``await`` and cleans up.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

from tools import interrupts

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Raises ``KeyboardInterrupt`` when all has ended after a signal; later signals are ignored.

    Before and afterwards, signals are handled by ``interrupts``.
    """
    is_interrupted = False

    async def run_main() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def interrupt(number: int, frame: FrameType | None) -> None:
            nonlocal is_interrupted
            is_interrupted = True
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_IGN)
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

        for each in _SIGNALS:
            signal.signal(each, interrupt)
        return await main

    try:
        result = asyncio.run(run_main())
    except asyncio.CancelledError:
        if not is_interrupted:
            raise
    finally:
        if not is_interrupted:
            interrupts.let_signals_interrupt()
    if is_interrupted:
        raise KeyboardInterrupt
    return result
