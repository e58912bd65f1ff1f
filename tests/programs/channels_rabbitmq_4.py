"""A process with channels_rabbitmq 4: ``old_version.py`` runs it in an environment of its own.

    python channels_rabbitmq_4.py "{'host': 'amqp://...', ...}"

Each line on standard input is a call, ``{'id': 1, 'method': 'group_add', 'args': [...]}``; calls
run side by side, and each is answered by a line on standard output, ``{'id': 1, 'result': ...}`` or
``{'id': 1, 'error': 'ChannelFull: ...'}``. The first line written has the version. Ends with its
input. (Python's literals, because JSON has neither bytes nor keys that aren't strings.)
"""

from __future__ import annotations

import ast
import asyncio
import importlib.metadata
import logging
import sys
import warnings
from typing import Any

from channels_rabbitmq.core import RabbitmqChannelLayer

LONGEST_LINE = 2**24


def write(answer: dict[str, Any]) -> None:
    sys.stdout.write(repr(answer) + "\n")
    sys.stdout.flush()


async def answer(layer: RabbitmqChannelLayer, call: dict[str, Any]) -> None:
    try:
        result = await getattr(layer, call["method"])(*call["args"])
    except Exception as exc:
        write({"id": call["id"], "error": f"{type(exc).__name__}: {exc}"})
    else:
        write({"id": call["id"], "result": result})


async def main(config: dict[str, Any]) -> None:
    layer = RabbitmqChannelLayer(**config)
    lines = asyncio.StreamReader(limit=LONGEST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    write({"id": 0, "result": importlib.metadata.version("channels_rabbitmq")})
    calls = set()
    while line := await lines.readline():
        call = asyncio.create_task(answer(layer, ast.literal_eval(line.decode())))
        calls.add(call)
        call.add_done_callback(calls.discard)
    for call in calls:
        call.cancel()
    await layer.close()


# It asks Channels by a function that newer releases deprecate.
warnings.simplefilter("ignore", DeprecationWarning)
logging.basicConfig(level=logging.INFO)
asyncio.run(main(ast.literal_eval(sys.argv[1])))
