"""Joining and leaving groups, as the visitors of a website do it who go from page to page.

50 visitors side by side in one process. A *page load* closes the visitor's websocket and opens the
next: the old channel leaves its two groups, a new channel joins two. An *op* is one ``group_add``
or one ``group_discard``; each is awaited before the next one, so a page load is four ops.

*churn*: of its two groups one is the visitor's own (as ``user.42``), left and joined again at every
page load; the other is that of the page, on which nobody else is and nobody was before.

*churn-distinct*: both groups are new each time. A layer gains nothing here by keeping for a moment
what a visitor left (channels_rabbitmq's linger).

The clock stops with the last call; so what a layer puts off until later, beyond the end, costs it
nothing here. For channels_rabbitmq that is at most 1,000 unbinds.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from benchmarks import problems
from benchmarks.model import CHANNEL_LAYERS
from benchmarks.role import Progress, Role, now
from benchmarks.scenario import Metric, Scenario

if TYPE_CHECKING:
    from benchmarks.stage import Stage

VISITORS = 50
_WARM_UP = 0.3  # seconds
_PAUSE = 0.01  # after an error
_TRICKLE = 0.2  # seconds for a message that mustn't come to come nevertheless


class Visitor:
    def __init__(self, number: int, *, has_own_group: bool) -> None:
        self._number = number
        self._has_own_group = has_own_group
        self._pages = 0
        self.channel = ""
        self.groups: list[str] = []
        self.left = ""  # a group that it is not in any more

    def next_groups(self) -> list[str]:
        self._pages += 1
        own = "own" if self._has_own_group else f"also.{self._pages}"
        return [f"user.{self._number}.{own}", f"page.{self._number}.{self._pages}"]


class Visitors(Role):
    async def load_pages(self, seconds: float, has_own_group: bool) -> dict[str, float]:
        """Goes on for so many seconds; 0: one page for each visitor."""
        if not hasattr(self, "_visitors"):
            self._visitors = [Visitor(n, has_own_group=has_own_group) for n in range(VISITORS)]
            await self.connect(await self.layer.new_channel())
        self._ops = 0
        start = now()
        await asyncio.gather(*(self._go_on(each, start + seconds) for each in self._visitors))
        return {"ops": self._ops, "seconds": now() - start}

    async def _go_on(self, visitor: Visitor, end: float) -> None:
        while not visitor.groups or now() < end:
            try:
                for group in visitor.groups:
                    await self.layer.group_discard(group, visitor.channel)
                    self._ops += 1
                    visitor.left = group
                visitor.channel = await self.layer.new_channel()
                visitor.groups = visitor.next_groups()
                for group in visitor.groups:
                    await self.layer.group_add(group, visitor.channel)
                    self._ops += 1
            except Exception as exc:
                self.tally.note_exc(exc)
                await asyncio.sleep(_PAUSE)

    async def check(self) -> None:
        """Everybody hears the groups they are in, and no others."""
        heard: list[tuple[int, str]] = []
        for n, visitor in enumerate(self._visitors):
            self.spawn(self._hear(n, visitor.channel, heard))
        expected = {(n, group) for n, each in enumerate(self._visitors) for group in each.groups}
        for visitor in self._visitors:
            for group in [*visitor.groups, visitor.left]:
                await self.layer.group_send(group, {"type": "benchmark.message", "group": group})
        await Progress(lambda: len(heard)).reach(len(expected))
        await asyncio.sleep(_TRICKLE)
        self.tally.note(problems.LOST, len(expected - set(heard)))
        self.tally.note("heard after leaving", len(set(heard) - expected))
        self.tally.note(problems.DUPLICATED, len(heard) - len(set(heard)))

    async def _hear(self, visitor: int, channel: str, heard: list[tuple[int, str]]) -> None:
        while True:
            heard.append((visitor, (await self.layer.receive(channel))["group"]))


async def run(stage: Stage, has_own_group: bool) -> dict[str, float]:
    visitors = await stage.start("churn.Visitors")
    await visitors.call("load_pages", seconds=_WARM_UP, has_own_group=has_own_group)
    async with stage.cpu_times(client=visitors) as cpu:
        done = await visitors.call(
            "load_pages", seconds=2.0 if stage.quick else 5.0, has_own_group=has_own_group
        )
    await visitors.call("check")
    return {"ops": done["ops"] / done["seconds"], **cpu.per(done["ops"])}


def _scenario(name: str, title: str, has_own_group: bool) -> Scenario:
    return Scenario(
        name=name,
        title=f"Group churn: {title}",
        metrics=(
            Metric("ops", "ops/s", more_is_better=True),
            Metric("client_us", "client, µs CPU"),
            Metric("server_us", "server, µs CPU"),
        ),
        layers=CHANNEL_LAYERS,
        run=partial(run, has_own_group=has_own_group),
    )


SCENARIOS = (
    _scenario("churn", "page loads, an own group and the page's", True),
    _scenario("churn-distinct", "page loads, groups never used before", False),
)
