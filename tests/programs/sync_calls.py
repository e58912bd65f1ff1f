"""Sync code calls the layer: in a plain script, in threads, beside a running loop."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from asgiref.sync import async_to_sync, sync_to_async
from channels.layers import get_channel_layer
from named import call_by_name, tell

layer: Any = get_channel_layer()


def send_numbers(group: str, numbers: str, sender: str = "") -> None:
    """Each call by itself, as a script does it."""
    for number in range(int(numbers)):
        async_to_sync(layer.group_send)(group, {"type": "n", "n": number, "sender": sender})


def send_from_threads(group: str, threads: str, numbers: str) -> None:
    """All at once: the first calls meet a layer that nobody has used."""
    together = threading.Barrier(int(threads))

    def work(sender: str) -> None:
        together.wait()
        send_numbers(group, numbers, sender)

    with ThreadPoolExecutor(int(threads)) as pool:
        for result in [pool.submit(work, str(number)) for number in range(int(threads))]:
            result.result()


def talk_to_myself() -> None:
    """The lines of Channels' tutorial, each call by itself."""
    channel = async_to_sync(layer.new_channel)()
    async_to_sync(layer.send)(channel, {"type": "hello", "n": 1})
    async_to_sync(layer.send)(channel, {"type": "hello", "n": 2})
    heard = [async_to_sync(layer.receive)(channel) for _ in range(2)]
    async_to_sync(layer.group_add)("room", channel)
    async_to_sync(layer.group_send)("room", {"type": "to.room"})
    heard.append(async_to_sync(layer.receive)(channel))
    async_to_sync(layer.group_discard)("room", channel)
    async_to_sync(layer.group_send)("room", {"type": "to.nobody"})
    async_to_sync(layer.send)(channel, {"type": "end"})
    heard.append(async_to_sync(layer.receive)(channel))
    tell(heard)


def answer(questioner: str, questions: int) -> list[Any]:
    """Sync code that has a channel of its own, and talks to another one."""
    mine = async_to_sync(layer.new_channel)()
    heard = []
    for number in range(questions):
        async_to_sync(layer.send)(questioner, {"type": "ready", "n": number, "from": mine})
        heard.append(async_to_sync(layer.receive)(mine)["n"])
    return heard


async def question(channel: str, questions: int) -> list[Any]:
    heard = []
    for _ in range(questions):
        message = await layer.receive(channel)
        heard.append(message["n"])
        await layer.send(message["from"], {"type": "question", "n": message["n"] + 1000})
    return heard


def beside_a_running_loop(where: str) -> None:
    """Sync code, in a thread, and the main thread's event loop talk to each other."""
    run: Any = {"thread": asyncio.to_thread, "sync_to_async": sync_to_async(answer)}[where]

    async def main() -> tuple[list[Any], list[Any]]:
        channel = await layer.new_channel()
        call = run(channel, 20) if where == "sync_to_async" else run(answer, channel, 20)
        asked, answered = await asyncio.gather(question(channel, 20), call)
        return asked, answered

    asked, answered = asyncio.run(main())
    tell({"asked": asked, "answered": answered, "threads": [t.name for t in threading.enumerate()]})


if __name__ == "__main__":
    call_by_name(globals())
