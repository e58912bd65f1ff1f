"""A website at default settings: two uvicorn processes with Django Channels, and 300 websockets.

Each user has a group, and all are in one room. The consumers work 0.5 ms for each message and pass
it on to the browser, a real websocket client; all browsers are one process. Another process sends,
in one of three patterns:

- *turn*: three loops over all users, each ``group_send`` awaited before the next one;
- *burst*: the same messages, all ``group_send`` at the same time;
- *room*: eight messages a second to everybody.

A message is lost if the layer took it and no browser got it; messages have numbers. What is timed
is the way from before ``group_send`` to the browser: all processes share a clock. CPU time is that
of both uvicorn processes for each message that a browser got, the consumer's 0.5 ms included.

Before the measurement each user gets a message, slowly.
"""

from __future__ import annotations

import asyncio
import resource
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks import problems
from benchmarks.figures import percentile
from benchmarks.model import CHANNEL_LAYERS, RAW, Failed
from benchmarks.role import Progress, Role, now, side_by_side
from benchmarks.scenario import Metric, Scenario
from benchmarks.sender import GroupSender
from benchmarks.website_groups import ROOM, user_group

if TYPE_CHECKING:
    from benchmarks.stage import Stage
    from benchmarks.workers import WorkerHandle

USERS = 300
PROCESSES = 2
LOOPS = 3
_ROOM_RATE = 8.0  # messages a second
_WARM_UP_RATE = 100.0
_TIMEOUT = 30.0  # seconds for a websocket to open or close


def _allow_many_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Site(Role):
    """A uvicorn process."""

    async def open(self) -> int:
        """The port where it listens."""
        from benchmarks import website

        _allow_many_files()
        listener = socket.create_server(("127.0.0.1", 0), backlog=USERS)
        self._server = website.make_server(self.layer)
        self.spawn(self._server.serve(sockets=[listener]))
        return int(listener.getsockname()[1])

    async def stop(self) -> None:
        self._server.should_exit = True
        await asyncio.wait(self._tasks, timeout=_TIMEOUT)


class Browsers(Role):
    """A websocket for each user."""

    HAS_LAYER = False

    async def open(self, ports: list[int], users: int) -> None:
        _allow_many_files()
        self._websockets: list[Any] = []
        self._expected: set[tuple[int, int]] = set()
        await self.begin(0)
        await side_by_side((self._open, (user, ports[user % len(ports)])) for user in range(users))

    async def _open(self, user: int, port: int) -> None:
        from websockets.asyncio.client import connect

        websocket = await connect(
            f"ws://127.0.0.1:{port}/user/{user}/", open_timeout=_TIMEOUT, compression=None
        )
        self._websockets.append(websocket)
        self.spawn(self._listen(user, websocket))

    async def _listen(self, user: int, websocket: Any) -> None:
        async for text in websocket:
            number, sent_at = text.split()
            self._note(user, int(number), now() - float(sent_at))

    def _note(self, user: int, n: int, wait: float) -> None:
        if n < self._first:
            return  # of what came before the measurement
        if (user, n) in self._waits:
            self.tally.note(problems.DUPLICATED)
            return
        self._waits[user, n] = wait
        self._missing.discard((user, n))

    async def begin(self, first: int) -> None:
        """From now on, messages from this number on count."""
        self._first = first
        self._waits: dict[tuple[int, int], float] = {}
        self._missing: set[tuple[int, int]] = set()

    async def drain(self, messages: list[list[int]]) -> tuple[list[float], int]:
        """Waits for these, each a user and a number: how long each took, and how many are lost."""
        expected = {(user, n) for user, n in messages}
        self._missing = expected - self._waits.keys()
        await Progress(lambda: -len(self._missing)).reach(0)
        self.tally.note(problems.LOST, len(self._missing))
        waits = [wait for key, wait in self._waits.items() if key in expected]
        return waits, len(self._missing)

    async def close(self) -> None:
        await side_by_side((websocket.close, ()) for websocket in self._websockets)


class Sender(GroupSender):
    """A worker of the site, or a view."""


async def _open(stage: Stage, users: int) -> tuple[list[WorkerHandle], WorkerHandle, WorkerHandle]:
    sites = [await stage.start("site.Site") for _ in range(PROCESSES)]
    # The same client for all layers
    browsers = await stage.start("site.Browsers", layer=RAW)
    sender = await stage.start("site.Sender")
    ports = [await site.call("open") for site in sites]
    await browsers.call("open", ports=ports, users=users)
    await sender.call("open")
    return sites, browsers, sender


async def _send(
    stage: Stage, sender: WorkerHandle, pattern: str, users: int, first: int
) -> tuple[int, list[int]]:
    """How many messages were to be sent, and the numbers of those that the layer took."""
    groups = [user_group(user) for user in range(users)]
    if pattern == "room":
        count = 16 if stage.quick else 40
        return count, await sender.call(
            "send_at_rate", groups=[ROOM], first=first, count=count, per_second=_ROOM_RATE
        )
    count = LOOPS * users
    method = "send_in_turn" if pattern == "turn" else "send_at_once"
    return count, await sender.call(method, groups=groups, first=first, count=count)


def _expected(pattern: str, users: int, taken: list[int]) -> list[tuple[int, int]]:
    """Who is to get what: users and numbers."""
    if pattern == "room":
        return [(user, n) for n in taken for user in range(users)]
    return [(n % users, n) for n in taken]


async def run(stage: Stage, pattern: str, users: int) -> dict[str, float]:
    sites, browsers, sender = await _open(stage, users)
    groups = [user_group(user) for user in range(users)]
    await sender.call("send_at_rate", groups=groups, first=0, count=users, per_second=_WARM_UP_RATE)
    await browsers.call("begin", first=users)

    async with stage.cpu_times(**{f"site_{n}": site for n, site in enumerate(sites)}) as cpu:
        count, taken = await _send(stage, sender, pattern, users, first=users)
        expected = _expected(pattern, users, taken)
        waits, lost = await browsers.call("drain", messages=expected)
    await browsers.call("close")
    await asyncio.gather(*(site.call("stop") for site in sites))

    if not waits:
        await stage.fail_on_problems()
        raise Failed("no message arrived")
    used = cpu.per(len(waits))
    return {
        "lost": 100 * lost / len(expected),
        "raised": 100 * (count - len(taken)) / count,
        "p50_ms": percentile(waits, 50) * 1000,
        "p99_ms": percentile(waits, 99) * 1000,
        "site_us": sum(us for role, us in used.items() if role != "server_us"),
        **({"server_us": used["server_us"]} if "server_us" in used else {}),
    }


def _scenario(pattern: str, title: str, users: int = USERS) -> Scenario:
    return Scenario(
        name=f"site-{pattern}" if users == USERS else f"site-{pattern}-{users}",
        title=f"A site at default settings, {users:,} websockets: {title}",
        metrics=(
            Metric("lost", "lost, %", 1, more_is_better=False),
            Metric("raised", "raised, %", 1),
            Metric("p50_ms", "p50, ms"),
            Metric("p99_ms", "p99, ms"),
            Metric("site_us", "site, µs CPU"),
            Metric("server_us", "server, µs CPU"),
        ),
        layers=CHANNEL_LAYERS,
        run=partial(run, pattern=pattern, users=users),
        time_limit=120.0,
        at_defaults=True,
        by_hand=users != USERS,
    )


_PATTERNS = {
    "turn": "each user in turn",
    "burst": "all users at once",
    "room": "eight messages a second to all",
}
SCENARIOS = (
    *(_scenario(pattern, title) for pattern, title in _PATTERNS.items()),
    *(_scenario(pattern, title, 1000) for pattern, title in _PATTERNS.items()),
)
