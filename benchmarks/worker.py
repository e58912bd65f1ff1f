"""A process of a run: one role of a scenario, on one layer, in that layer's own environment.

    python worker.py LAYER MODULE.ROLE URL CAPACITY

A line on standard input is a call of one of the role's coroutines, {"id": 1, "method": "send",
"args": {"size": 100}}; calls run side by side, each is answered by a line on standard output,
{"id": 1, "result": ...} or {"id": 1, "error": ["ChannelFull", "its text"]}. Line 0 is written when
the role can be called. The process ends with its input, whatever it is doing.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from typing import Any, TextIO

from problems import describe

_CLOSE_TIMEOUT = 5.0  # seconds for the layer to say goodbye
_LAST_WAY_OUT = 8.0  # seconds after the end of the input; a loop that hangs ends too


class Worker:
    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._calls: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, layer_name: str, role_name: str, url: str, capacity: int) -> None:
        adapter = importlib.import_module(f"layers.{layer_name}")
        module_name, _, class_name = role_name.rpartition(".")
        role_class = getattr(importlib.import_module(f"scenarios.{module_name}"), class_name)
        layer = await adapter.open_layer(url, capacity)
        role = role_class(layer)
        threading.Thread(target=self._read, args=(asyncio.get_running_loop(),), daemon=True).start()
        self._write({"id": 0, "result": None})
        while (call := await self._calls.get()) is not None:
            task = asyncio.create_task(self._answer(role, call))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.wait_for(adapter.close_layer(layer), _CLOSE_TIMEOUT)

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        # A thread of its own notices the end even while the loop is busy or hangs.
        for line in sys.stdin:
            loop.call_soon_threadsafe(self._calls.put_nowait, json.loads(line))
        loop.call_soon_threadsafe(self._calls.put_nowait, None)
        time.sleep(_LAST_WAY_OUT)
        os._exit(1)

    async def _answer(self, role: Any, call: dict[str, Any]) -> None:
        try:
            if call["method"] == "cpu_seconds":
                result = time.process_time()
            else:
                result = await getattr(role, call["method"])(**call["args"])
        except Exception as exc:
            logging.getLogger(__name__).debug("%s", call["method"], exc_info=True)
            self._write({"id": call["id"], "error": describe(exc)})
        else:
            self._write({"id": call["id"], "result": result})

    def _write(self, answer: dict[str, Any]) -> None:
        self._output.write(json.dumps(answer) + "\n")
        self._output.flush()


def main() -> None:
    layer_name, role_name, url, capacity = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    # What a library prints must not get between the answers.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    asyncio.run(Worker(output).run(layer_name, role_name, url, int(capacity)))


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
    # The results are out; a layer that leaves threads behind shan't hold us up.
    sys.stderr.flush()
    os._exit(0)
