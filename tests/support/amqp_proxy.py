"""A TCP proxy between a client and RabbitMQ that understands frames: tests break things with it.

    async with AmqpProxy(broker.url) as proxy:
        proxy.rule(TO_CLIENT, commands.Connection.Tune, without_heartbeat)
        client = await connect(proxy.url)
        await proxy.seen(TO_BROKER, commands.Queue.Bind, 3)
        proxy.cut()

Each connection of a client is a *link*: two TCP connections and a pump for each direction. A pump
reads a frame, asks the newest rule that fits and writes the outcome. It writes whole frames only,
so a test may inject frames of its own at any moment. What isn't AMQP (TLS) is passed on unread.

The optional argument ``name`` limits a rule or an action to links whose client called itself so in
its client property ``connection_name`` (a part of the name is enough).
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pamqp.frame
from pamqp import commands
from pamqp.base import Frame as Method
from pamqp.body import ContentBody
from pamqp.header import ContentHeader, ProtocolHeader
from pamqp.heartbeat import Heartbeat

from tests.support.changes import Changes
from tools.proxy import Direction, Link, Proxy, open_flow

TO_CLIENT = Direction.TO_CLIENT
TO_BROKER = Direction.TO_SERVER

# The classes that tell frames apart are those of pamqp: a method's own class, or one of these.
_FRAME_TYPES: dict[int, type] = {1: Method, 2: ContentHeader, 3: ContentBody, 8: Heartbeat}
# Methods that a content header and bodies follow.
_WITH_CONTENT = (
    commands.Basic.Publish,
    commands.Basic.Deliver,
    commands.Basic.Return,
    commands.Basic.GetOk,
)


@dataclass(frozen=True)
class Frame:
    """One frame as it came. ``kind`` is its class in pamqp, ``object`` for bytes without frames."""

    link: AmqpLink
    direction: Direction
    kind: type
    channel: int
    raw: bytes

    def decode(self) -> Any:
        """A fresh pamqp object: change and return it to replace the frame."""
        return pamqp.frame.unmarshal(self.raw)[2]


# Says what goes on instead of a frame: the frame itself, None, a pamqp object (on the frame's
# channel), bytes, or a list of these; or an awaitable of that.
Handler = Callable[[Frame], Any]


@dataclass
class Rule:
    """What to do with frames of one kind. ``times`` is how often it still applies, None: always."""

    direction: Direction
    kind: type
    handler: Handler
    times: int | None
    name: str

    def fits(self, frame: Frame) -> bool:
        return (
            self.times != 0
            and frame.direction is self.direction
            and issubclass(frame.kind, self.kind)
            and self.name in frame.link.name
        )


class AmqpProxy(Proxy):
    """One listening port in front of the broker that ``url`` names. ``url`` is then the proxy's."""

    links: list[AmqpLink]  # type: ignore[assignment]  # make_link() makes no others

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        default_port = 5671 if parts.scheme[4:] else 5672
        super().__init__(parts.hostname or "127.0.0.1", parts.port or default_port)
        self.url = self.url_of(url)
        self.flow = open_flow()  # of all links, also of those to come
        self._rules: list[Rule] = []
        self._counts: Counter[tuple[Direction, type]] = Counter()
        self._changes = Changes()

    async def __aenter__(self) -> AmqpProxy:
        await super().__aenter__()
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        self.refuse()
        self.cut()
        await super().__aexit__(exc_type, *exc_info)

    def make_link(self, writer: asyncio.StreamWriter) -> AmqpLink:
        return AmqpLink(self, writer)

    def on_change(self) -> None:
        self._changes.notify()

    # Rules: the newest that fits decides

    def rule(
        self,
        direction: Direction,
        kind: type,
        handler: Handler,
        *,
        times: int | None = None,
        name: str = "",
    ) -> Rule:
        """Asks ``handler`` (plain or async) what to forward instead of such a frame.

        While an async handler waits, the frames behind this one wait too. A method that isn't
        forwarded takes its content header and bodies with it.
        """
        rule = Rule(direction, kind, handler, times, name)
        self._rules.insert(0, rule)
        return rule

    def drop(self, direction: Direction, kind: type, **limits: Any) -> Rule:
        return self.rule(direction, kind, lambda frame: None, **limits)

    def replace(self, direction: Direction, kind: type, *frames: Any, **limits: Any) -> Rule:
        """Forwards these (pamqp objects on the frame's channel, or bytes) instead."""
        return self.rule(direction, kind, lambda frame: list(frames), **limits)

    def hold(self, direction: Direction, kind: type, **limits: Any) -> asyncio.Event:
        """Such a frame, and all that is behind it, waits until the returned event is set."""
        released = asyncio.Event()

        async def wait(frame: Frame) -> Frame:
            await released.wait()
            return frame

        self.rule(direction, kind, wait, **limits)
        return released

    def remove(self, rule: Rule) -> None:
        self._rules.remove(rule)

    # What a test can see

    def count(self, direction: Direction, kind: type) -> int:
        """How many such frames have arrived here, whatever a rule did with them.

        A base class counts all of its kinds, ``object`` everything.
        """
        return sum(
            times
            for (way, counted), times in self._counts.items()
            if way is direction and issubclass(counted, kind)
        )

    async def seen(self, direction: Direction, kind: type, times: int = 1) -> None:
        """Returns when so many such frames have arrived since the proxy was made."""
        await self.until(lambda: self.count(direction, kind) >= times)

    async def until(self, condition: Callable[[], bool], *, timeout: float = 10.0) -> None:
        """Returns when the condition, over counts and links, holds. Raises ``TimeoutError``."""
        await self._changes.until(condition, timeout=timeout)

    def named(self, name: str) -> list[AmqpLink]:
        return [link for link in self.links if name in link.name]

    # What a test can do to the network

    def cut(self, *, reset: bool = True, name: str = "") -> None:
        """Ends connections on both sides, by RST or (``reset=False``) by FIN."""
        for link in self.named(name):
            link.cut(reset=reset)

    def stall(self, *directions: Direction) -> None:
        """Forwards nothing any more (both directions unless named); connections stay open."""
        for direction in directions or Direction:
            self.flow[direction].clear()

    def vanish(self, *, name: str = "") -> list[AmqpLink]:
        """Lets go of links that are open, for good: whatever either side sends is lost.

        When one side ends its connection the other doesn't hear of it. Returns them; new ones work.
        """
        links = self.named(name)
        for link in links:
            link.has_vanished = True
        return links

    def resume(self) -> None:
        """Goes on with what came meanwhile."""
        for event in self.flow.values():
            event.set()

    def inject(
        self, *frames: Any, channel: int = 0, direction: Direction = TO_CLIENT, name: str = ""
    ) -> None:
        """Sends these (pamqp objects or bytes) as if the other side had sent them now."""
        for link in self.named(name):
            link.writers[direction].write(_to_bytes(frames, channel))

    async def outcome(self, frame: Frame) -> list[Any]:
        """Counts the frame and asks the newest rule that fits what to forward instead."""
        self._counts[frame.direction, frame.kind] += 1
        self._changes.notify()
        rule = next((rule for rule in self._rules if rule.fits(frame)), None)
        if rule is None:
            return [frame]
        if rule.times is not None:
            rule.times -= 1
        outcome = rule.handler(frame)
        if inspect.isawaitable(outcome):
            outcome = await outcome
        if outcome is None:
            return []
        return outcome if isinstance(outcome, list) else [outcome]


class AmqpLink(Link):
    """A link that forwards frame by frame, and asks its proxy what to forward."""

    def __init__(self, proxy: AmqpProxy, writer: asyncio.StreamWriter) -> None:
        super().__init__(writer, proxy.flow)
        self.name = ""  # the client's connection_name, once it has told it
        self._proxy = proxy

    async def pump(self, reader: asyncio.StreamReader, direction: Direction) -> None:
        """Forwards frames in one direction until either side of it ends."""
        unwanted: set[int] = set()  # channels on which the content of a dropped method comes
        framed = True  # until something comes that isn't AMQP
        try:
            while True:
                raw = await (_read_frame(reader) if framed else _read_some(reader))
                if self.has_vanished:
                    continue
                kind = _kind(raw) if framed else object
                framed = kind is not object
                frame = Frame(self, direction, kind, int.from_bytes(raw[1:3], "big"), raw)
                if frame.kind is commands.Connection.StartOk:
                    self.name = frame.decode().client_properties.get("connection_name", "")
                if frame.kind in (ContentHeader, ContentBody) and frame.channel in unwanted:
                    continue
                outcome = await self._proxy.outcome(frame)
                if frame.kind in _WITH_CONTENT:
                    unwanted.discard(frame.channel)
                    if not any(item is frame or isinstance(item, frame.kind) for item in outcome):
                        unwanted.add(frame.channel)
                await self.forward(_to_bytes(outcome, frame.channel), direction)
        except (EOFError, OSError):
            pass


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next frame, or a single byte with which no frame begins."""
    head = await reader.readexactly(1)
    if head == b"A":  # "AMQP" and the version
        return head + await reader.readexactly(7)
    if head[0] in _FRAME_TYPES:
        head += await reader.readexactly(6)
        return head + await reader.readexactly(int.from_bytes(head[3:7], "big") + 1)
    return head


async def _read_some(reader: asyncio.StreamReader) -> bytes:
    received = await reader.read(65536)
    if not received:
        raise EOFError
    return received


def _kind(raw: bytes) -> type:
    if raw.startswith(b"AMQP"):
        return ProtocolHeader
    if raw[0] == 1:
        return commands.INDEX_MAPPING.get(int.from_bytes(raw[7:11], "big"), Method)
    return _FRAME_TYPES.get(raw[0], object)


def _to_bytes(items: Iterable[Any], channel: int) -> bytes:
    return b"".join(
        item
        if isinstance(item, bytes)
        else item.raw
        if isinstance(item, Frame)
        else pamqp.frame.marshal(item, channel)
        for item in items
    )
