"""A process that has used the layer starts another one, by one of Python's ways; both go on.

The child of a fork inherits its parent's sockets, threads' locks and event loops, none of which it
may touch. The child of a spawn or of a fork server (Linux's default since Python 3.14) starts
afresh.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import threading
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import channel_layers, get_channel_layer
from named import call_by_name, tell

ROUNDS = 5
STYLES = ["sync", "loop", "renewed"]  # of children

layer: Any = get_channel_layer()


# The child


def child(style: str, parent: str) -> None:
    """Talk with the parent, from sync code or on a loop of its own, then tell what was heard."""
    if style == "loop":
        asyncio.run(child_on_a_loop(parent))
        return
    if style == "renewed":
        renew_the_layer()
    channel = async_to_sync(layer.new_channel)()
    async_to_sync(layer.group_add)(group_of_child(), channel)
    heard = []
    for number in range(ROUNDS):
        async_to_sync(layer.send)(parent, question(number, channel))
        heard.append(async_to_sync(layer.receive)(channel)["type"])
    async_to_sync(layer.group_send)("parent", {"type": "done", "heard": heard, "pid": os.getpid()})


def renew_the_layer() -> None:
    """So that the one inherited is freed, which may not close what is the parent's."""
    global layer
    layer = None
    channel_layers.backends.clear()
    gc.collect()
    layer = get_channel_layer()


async def child_on_a_loop(parent: str) -> None:
    channel = await layer.new_channel()
    await layer.group_add(group_of_child(), channel)
    heard = []
    for number in range(ROUNDS):
        await layer.send(parent, question(number, channel))
        heard.append((await layer.receive(channel))["type"])
    await layer.group_send("parent", {"type": "done", "heard": heard, "pid": os.getpid()})


def group_of_child() -> str:
    return f"child.{os.getpid()}"


def question(number: int, channel: str) -> dict[str, Any]:
    return {"type": "question", "n": number, "channel": channel, "group": group_of_child()}


# The parent


def answer(message: dict[str, Any]) -> tuple[Any, str, dict[str, Any]]:
    """By which method, to whom and what: by turns to the channel and to its group."""
    text = {"type": f"answer.{message['n']}"}
    if message["n"] % 2:
        return layer.group_send, message["group"], text
    return layer.send, message["channel"], text


def on_a_loop(method: str) -> None:
    """The parent uses it on its main thread's running loop, from which it starts the children."""
    context: Any = multiprocessing.get_context(method)

    async def main() -> list[Any]:
        channel = await layer.new_channel()
        await layer.group_add("parent", channel)
        await layer.send(channel, {"type": "before"})
        seen = [await layer.receive(channel)]
        processes = [context.Process(target=child, args=(style, channel)) for style in STYLES]
        for process in processes:
            process.start()
        done = 0
        while done < len(processes):
            message = await layer.receive(channel)
            seen.append(message)
            if message["type"] == "done":
                done += 1
            else:
                method, *arguments = answer(message)
                await method(*arguments)
        for process in processes:
            await asyncio.to_thread(process.join)
            assert process.exitcode == 0
        # The children's end took nothing with it.
        await layer.send(channel, {"type": "after"})
        seen.append(await layer.receive(channel))
        await layer.group_send("parent", {"type": "after.to.group"})
        seen.append(await layer.receive(channel))
        return seen

    tell({"pid": os.getpid(), "seen": asyncio.run(main())})


def in_sync_code(method: str) -> None:
    """The parent uses it from sync code, so from its background loop."""
    context: Any = multiprocessing.get_context(method)
    channel = async_to_sync(layer.new_channel)()
    async_to_sync(layer.group_add)("parent", channel)
    async_to_sync(layer.send)(channel, {"type": "before"})
    seen = [async_to_sync(layer.receive)(channel)]
    processes = [context.Process(target=child, args=(style, channel)) for style in STYLES]
    for process in processes:
        process.start()
    done = 0
    while done < len(processes):
        message = async_to_sync(layer.receive)(channel)
        seen.append(message)
        if message["type"] == "done":
            done += 1
        else:
            method, *arguments = answer(message)
            async_to_sync(method)(*arguments)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    async_to_sync(layer.send)(channel, {"type": "after"})
    seen.append(async_to_sync(layer.receive)(channel))
    async_to_sync(layer.group_send)("parent", {"type": "after.to.group"})
    seen.append(async_to_sync(layer.receive)(channel))
    tell({"pid": os.getpid(), "seen": seen})


def daemonize() -> None:
    """As a daemon begins: the parent ends and the child goes on. Both end as Python ends."""
    channel = async_to_sync(layer.new_channel)()
    async_to_sync(layer.group_send)("numbers", {"type": "from.parent"})
    if os.fork():
        return
    try:
        async_to_sync(layer.receive)(channel)
    except ValueError as err:  # it is the parent's
        tell(str(err))
    async_to_sync(layer.group_send)("numbers", {"type": "from.child"})


def while_threads_call(children: str) -> None:
    """Forks while other threads are in the middle of calls, and hold whatever locks there are."""
    context: Any = multiprocessing.get_context("fork")
    stopped = threading.Event()
    sent = [0] * 4

    def send(thread: int) -> None:
        while not stopped.is_set():
            async_to_sync(layer.group_send)("nobody", {"type": "noise"})
            sent[thread] += 1

    threads = [threading.Thread(target=send, args=(number,)) for number in range(len(sent))]
    for thread in threads:
        thread.start()
    channel = async_to_sync(layer.new_channel)()
    heard = []
    for number in range(int(children)):
        process = context.Process(target=send_one, args=(channel, number))
        process.start()
        heard.append(async_to_sync(layer.receive)(channel)["n"])
        process.join()
        assert process.exitcode == 0
    stopped.set()
    for thread in threads:
        thread.join()
    assert all(sent), sent
    tell(heard)


def send_one(channel: str, number: int) -> None:
    async_to_sync(layer.send)(channel, {"type": "from.child", "n": number})


if __name__ == "__main__":
    call_by_name(globals())
