"""A process of a run: one role of a scenario, on one layer, in that layer's own environment.

    python -m benchmarks.worker LAYER MODULE.ROLE URL CAPACITY

The capacity is a number, or "default": that of the layer itself.

A line on standard input is a call of one of the role's methods, {"id": 1, "method": "send",
"args": {"size": 100}}, and is answered by a line on standard output, {"id": 1, "result": ...} or
{"id": 1, "error": ["ChannelFull", "its text"]}. Line 0 is written when the role can be called. The
process ends with its input, whatever it is doing; the exit status is 0 if its layer was closed.

Calls of a ``Role`` run side by side, on an event loop. Those of a ``PlainRole`` come one after the
other, in a process that has no event loop, as a script or a WSGI server is one.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, TextIO

from benchmarks.problems import describe
from benchmarks.role import PlainRole, Role

_CLOSE_TIMEOUT = 5.0  # seconds for the layer to say goodbye
_LAST_WAY_OUT = 8.0  # seconds after the end of the input; a process that hangs ends too

Call = dict[str, Any]


class Output:
    """Where the answers go."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write_result(self, id_: int, result: Any) -> None:
        self._write({"id": id_, "result": result})

    def write_error(self, id_: int, exc: Exception) -> None:
        self._write({"id": id_, "error": describe(exc)})

    def _write(self, answer: dict[str, Any]) -> None:
        self._stream.write(json.dumps(answer) + "\n")
        self._stream.flush()


def start_reading(accept: Callable[[Call | None], object]) -> None:
    """Hands calls on, ``None`` for the end of the input, from a thread of its own.

    It notices the end even while the process is busy or hangs, and ends it then.
    """

    def read() -> None:
        for line in sys.stdin:
            accept(json.loads(line))
        accept(None)
        time.sleep(_LAST_WAY_OUT)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()


async def serve(
    adapter: ModuleType, role_class: type[Role], url: str, capacity: int | None, output: Output
) -> None:
    """Until the end of the input, with a layer that is closed then (if the role has one)."""
    layer = adapter.make_layer(url, capacity) if role_class.HAS_LAYER else None
    if inspect.isawaitable(layer):
        layer = await layer
    role = role_class(layer)
    calls: asyncio.Queue[Call | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    start_reading(partial(loop.call_soon_threadsafe, calls.put_nowait))
    output.write_result(0, None)
    tasks = set()
    while (call := await calls.get()) is not None:
        task = asyncio.create_task(_answer(role, call, output))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    if role_class.HAS_LAYER:
        await asyncio.wait_for(adapter.close_layer(layer), _CLOSE_TIMEOUT)


async def _answer(role: Any, call: Call, output: Output) -> None:
    try:
        if call["method"] == "cpu_seconds":
            result = time.process_time()
        else:
            result = await getattr(role, call["method"])(**call["args"])
    except Exception as exc:
        output.write_error(call["id"], exc)
    else:
        output.write_result(call["id"], result)


def serve_plainly(role: PlainRole, output: Output) -> None:
    """As ``serve``, without an event loop."""
    calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
    start_reading(calls.put)
    output.write_result(0, None)
    while (call := calls.get()) is not None:
        try:
            if call["method"] == "cpu_seconds":
                result = time.process_time()
            else:
                result = getattr(role, call["method"])(**call["args"])
        except Exception as exc:
            output.write_error(call["id"], exc)
        else:
            output.write_result(call["id"], result)
    role.close()


def main() -> None:
    layer_name, role_name, url, capacity_text = sys.argv[1:]
    capacity = None if capacity_text == "default" else int(capacity_text)
    logging.basicConfig(level=logging.WARNING)
    # What a library prints must not get between the answers.
    output = Output(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    adapter = importlib.import_module(f"benchmarks.layers.{layer_name}")
    module_name, _, class_name = role_name.rpartition(".")
    role_class = getattr(importlib.import_module(f"benchmarks.scenarios.{module_name}"), class_name)
    if issubclass(role_class, PlainRole):
        serve_plainly(role_class(adapter, url, capacity), output)
    else:
        asyncio.run(serve(adapter, role_class, url, capacity, output))


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    except BaseException:
        traceback.print_exc()
    # The results are out; a layer that leaves threads behind shan't hold us up.
    sys.stderr.flush()
    os._exit(status)
