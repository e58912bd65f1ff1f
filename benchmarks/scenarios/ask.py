"""Who is in a group: one process asks others, each of which has one member.

The processes join at the same moment: what that takes of the server is measured, too. Then one of
them asks, one question after the other. An answer that lacks a member is a problem.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.figures import percentile
from benchmarks.model import OURS, Failed
from benchmarks.role import Role, now
from benchmarks.scenario import Metric, Scenario

if TYPE_CHECKING:
    from benchmarks.stage import Stage

GROUP = "benchmark.ask"
_WARM_UP = 10  # questions
_LONGEST_START = 20.0  # seconds until all know each other


class Member(Role):
    async def open(self) -> None:
        await self.layer.group_add(GROUP, await self.layer.new_channel())

    async def wait_for(self, count: int) -> None:
        """Wait until a question finds so many members."""
        deadline = now() + _LONGEST_START
        # Not group_count(), which raises as long as nobody answers.
        while len((await self.layer.group_members(GROUP)).members) < count:
            if now() > deadline:
                raise TimeoutError(f"not all of {count} members were found")
            await asyncio.sleep(0.05)

    async def ask(self, count: int, questions: int) -> list[float]:
        """Ask so many times; how long each took, in seconds. All must find ``count`` members."""
        times = []
        for _ in range(questions):
            start = now()
            found = await self.layer.group_members(GROUP)
            times.append(now() - start)
            self.tally.note("members not found", count - len(found.members))
            self.tally.note("incomplete", int(not found.is_complete))
        return times


async def run(stage: Stage, processes: int) -> dict[str, float]:
    members = [await stage.start("ask.Member") for _ in range(processes)]
    async with stage.cpu_times() as start:
        await asyncio.gather(*(member.call("open") for member in members))
        await members[0].call("wait_for", count=processes)
    await members[0].call("ask", count=processes, questions=_WARM_UP)
    await stage.server.rest()
    questions = 100 if stage.quick else 500
    async with stage.cpu_times(asker=members[0]) as cpu:
        times = await members[0].call("ask", count=processes, questions=questions)
    if not times:
        raise Failed("no question was asked")
    return {
        "p50_ms": percentile(times, 50) * 1000,
        "p99_ms": percentile(times, 99) * 1000,
        **cpu.per(questions * processes),
        "start_ms": start.seconds.get("server", 0.0) * 1000,
    }


def _scenario(processes: int) -> Scenario:
    return Scenario(
        name=f"ask-{processes}",
        title=f"Who is in a group: {processes} processes",
        metrics=(
            Metric("p50_ms", "p50, ms", 2, more_is_better=False),
            Metric("p99_ms", "p99, ms", 2),
            Metric("asker_us", "asker, µs CPU a process"),
            Metric("server_us", "server, µs CPU a process"),
            Metric("start_ms", "server, ms CPU for their start"),
        ),
        layers=(OURS,),
        run=partial(run, processes=processes),
        time_limit=120.0,
    )


SCENARIOS = tuple(_scenario(processes) for processes in (2, 10, 50))
