"""Two websocket clients of two server processes chat in one room: does everything arrive?

    check_chat.py http://127.0.0.1:8001 http://127.0.0.1:8002

Each says 100 things, one after the other: the next one when it has heard itself say the last.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Origin

MESSAGES = 100  # each way
TIME_LIMIT = 60.0  # seconds for everything; it takes about one


@dataclass
class Client:
    """One page's side of the chat."""

    name: str
    socket: ClientConnection
    own_id: str = ""
    people: set[str] = field(default_factory=set)
    met_other: asyncio.Event = field(default_factory=asyncio.Event)
    heard_myself: asyncio.Event = field(default_factory=asyncio.Event)
    heard_all: asyncio.Event = field(default_factory=asyncio.Event)
    from_other: list[str] = field(default_factory=list)  # texts, as they came
    round_trips: list[float] = field(default_factory=list)  # seconds

    async def listen(self) -> None:
        async for text in self.socket:
            self._handle(json.loads(text))

    def _handle(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "welcome":
            self.own_id = message["you"]["id"]
        elif kind == "people":
            if len(message["people"]) == 2:
                self.met_other.set()
        elif kind == "not_delivered":
            raise RuntimeError(f"{self.name}: not delivered: {message['reason']}")
        elif kind == "message" and message["person"]["id"] == self.own_id:
            self.heard_myself.set()
        elif kind == "message":
            self.from_other.append(message["text"])
            if len(self.from_other) == MESSAGES:
                self.heard_all.set()

    async def say_everything(self) -> None:
        await self._say({"type": "introduce", "name": self.name})
        await self.met_other.wait()
        for text in self.texts():
            self.heard_myself.clear()
            said_at = time.perf_counter()
            await self._say({"type": "say", "id": text, "text": text})
            await self.heard_myself.wait()
            self.round_trips.append(time.perf_counter() - said_at)

    def texts(self) -> list[str]:
        return [f"{self.name} {number}" for number in range(MESSAGES)]

    async def _say(self, message: dict[str, str]) -> None:
        await self.socket.send(json.dumps(message))


async def chat(one: Client, other: Client) -> None:
    """Returns when both have heard all; raises if a connection ends before."""
    talking = asyncio.gather(
        *(client.say_everything() for client in (one, other)),
        *(client.heard_all.wait() for client in (one, other)),
    )
    listening = [asyncio.ensure_future(client.listen()) for client in (one, other)]
    try:
        done, _ = await asyncio.wait(
            [talking, *listening], timeout=TIME_LIMIT, return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            await task  # raises what went wrong there
    finally:
        for task in (talking, *listening):
            task.cancel()
        await asyncio.gather(talking, *listening, return_exceptions=True)


async def check(addresses: list[str]) -> bool:
    room = f"check-{secrets.token_hex(4)}"
    urls = [f"ws{address.removeprefix('http')}/ws/{room}/" for address in addresses]
    # No proxy on the way to this machine; the Origin is what a browser would send.
    async with (
        connect(urls[0], origin=Origin(addresses[0]), proxy=None) as socket,
        connect(urls[1], origin=Origin(addresses[1]), proxy=None) as other_socket,
    ):
        one, other = Client("one", socket), Client("other", other_socket)
        try:
            await chat(one, other)
        except Exception as exc:
            print(f"The chat ended early: {exc!r}")
    ports = [urlsplit(address).port for address in addresses]
    total = 0
    for speaker, listener, (start, end) in (
        (one, other, ports),
        (other, one, reversed(ports)),
    ):
        arrived = set(speaker.texts()) & set(listener.from_other)
        total += len(arrived)
        print(f"{start} -> {end}: {len(arrived)} of {MESSAGES} messages arrived")
    in_order = one.from_other == other.texts() and other.from_other == one.texts()
    if total == 2 * MESSAGES and not in_order:
        print("Some came twice or out of order.")
    round_trips = one.round_trips + other.round_trips
    if round_trips:
        print(f"Median round trip: {1000 * statistics.median(round_trips):.1f} ms")
    return in_order


if __name__ == "__main__":
    try:
        sys.exit(0 if asyncio.run(check(sys.argv[1:])) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
