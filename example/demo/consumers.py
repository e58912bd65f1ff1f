"""One window of the demo's page: a websocket, and a member of the page's group.

The page has four windows, two at each of two server processes. What one says goes to the group, so
all four get it. The page counts; all that is counted or measured here is the time of each message
in the channel layer.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any
from weakref import WeakValueDictionary

from channels.consumer import get_handler_name
from channels.exceptions import ChannelFull
from channels.generic.websocket import AsyncJsonWebsocketConsumer

from channels_rabbitmq.exceptions import BrokerUnavailable
from demo import outages

LayerError = (BrokerUnavailable, ChannelFull)

MAX_BURST = 5000  # messages
MAX_TEXT = 60  # characters
LONGEST_FREEZE = 60.0  # seconds
REPORT_INTERVAL = 0.025  # seconds

# This process's windows, by page and number.
windows: WeakValueDictionary[tuple[str, int], DemoConsumer] = WeakValueDictionary()


def now() -> int:
    """Microseconds. All processes of one machine have this clock in common."""
    return time.monotonic_ns() // 1000


class DemoConsumer(AsyncJsonWebsocketConsumer):
    """Between one window (JSON over a websocket) and the page's group.

    From the window: ``say``, ``burst`` (say that many at once), ``freeze`` (another window of this
    process). To the window: ``welcome`` (it is a member now), ``outage``, ``received`` and
    ``not_sent``.
    """

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run until the window is gone, then leave no trace: however this ends."""
        self.tasks: set[asyncio.Task[None]] = set()
        try:
            await super().__call__(scope, receive, send)
        finally:
            outages.listeners.discard(self.show_outage)
            for task in self.tasks:
                task.cancel()
            await self.channel_layer.group_discard(self.group, self.channel_name)

    async def dispatch(self, message: dict[str, Any]) -> None:
        """Call the handler, as Channels does.

        Channels also has a thread look for stale connections to the database before each message.
        There is no database here, and that look takes four fifths of a burst's CPU time.
        """
        await getattr(self, get_handler_name(message))(message)

    # From the window

    async def connect(self) -> None:
        where = self.scope["url_route"]["kwargs"]
        self.page, self.group = where["room"], f"demo.{where['room']}"
        self.received: list[list[Any]] = []  # not yet told to the window
        self.report: asyncio.Task[None] | None = None
        self.may_work = asyncio.Event()  # not set: frozen
        self.may_work.set()
        windows[self.page, where["window"]] = self
        await self.accept()
        try:
            await self.channel_layer.group_add(self.group, self.channel_name)
        except LayerError:
            await self.close()  # the window will come back
            return
        outages.listeners.add(self.show_outage)
        await self.send_json({"type": "welcome", "pid": os.getpid(), "up": outages.is_up})

    async def receive_json(self, content: Any, **kwargs: Any) -> None:
        match content:
            case {"type": "say", "sender": str(sender), "number": int(number), "text": str(text)}:
                # In a task: while RabbitMQ is away a call waits, and the window has to hear of it.
                self.start(self.say(sender, number, text[:MAX_TEXT]))
            case {"type": "burst", "sender": str(sender), "first": int(first), "count": int(count)}:
                for number in range(first, first + min(count, MAX_BURST)):
                    self.start(self.say(sender, number, ""))
            case {"type": "freeze", "window": int(window), "on": bool(on)}:
                if (consumer := windows.get((self.page, window))) is not None:
                    consumer.freeze(on)

    def start(self, coroutine: Any) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def say(self, sender: str, number: int, text: str) -> None:
        message = {"sender": sender, "number": number, "text": text, "sent_at": now()}
        try:
            await self.channel_layer.group_send(self.group, {"type": "demo.message", **message})
        except LayerError:
            await self.send_json({"type": "not_sent", "number": number})

    def freeze(self, on: bool) -> None:
        """From now on this window's messages wait, as if one of them took for ever."""
        if not on:
            self.may_work.set()
        elif self.may_work.is_set():
            self.may_work.clear()
            # A frozen consumer doesn't hear that its window is gone.
            asyncio.get_running_loop().call_later(LONGEST_FREEZE, self.may_work.set)

    # From the group: Channels calls the method named like the message's type.

    async def demo_message(self, event: dict[str, Any]) -> None:
        microseconds = now() - event["sent_at"]
        await self.may_work.wait()
        self.received.append([event["sender"], event["number"], microseconds, event["text"]])
        if self.report is None or self.report.done():
            self.report = self.start(self.show_received())

    # To the window

    async def show_received(self) -> None:
        """The first at once. Then many in one: a browser should draw, not parse."""
        while self.received:
            messages, self.received = self.received, []
            await self.send_json({"type": "received", "messages": messages})
            await asyncio.sleep(REPORT_INTERVAL)

    async def show_outage(self) -> None:
        await self.send_json({"type": "outage", "up": outages.is_up})
