"""Jobs for two workers: a normal channel, of which each message goes to one receiver.

The jobs need no work, so it is the way of a message that is measured. The workers wait before the
first one is sent. Each awaits a ``receive`` before the next one, as ``runworker`` does. One process
sends, ten calls at any time. Whether each job came to one worker, once, is counted by numbers:
``jobs/s`` counts a job once. (channels_redis core puts a message back that another process is
receiving, so two workers get some jobs twice.)
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING

from benchmarks import problems
from benchmarks.model import OURS, REDIS_CORE
from benchmarks.role import PATIENCE, Role, now
from benchmarks.scenario import Metric, Scenario

if TYPE_CHECKING:
    from benchmarks.stage import Stage
    from benchmarks.workers import WorkerHandle

CHANNEL = "benchmark-jobs"
_SENDERS = 10
_WARM_UP = 50  # jobs
_LOOK_INTERVAL = 0.02  # seconds


class Sender(Role):
    async def send(self, run: str, first: int, count: int) -> float:
        """Send so many jobs, numbered from ``first`` on; return when it began."""
        pending = iter(range(first, first + count))

        async def work() -> None:
            for n in pending:
                try:
                    job = {"type": "benchmark.job", "run": run, "n": n, "data": b"x" * 100}
                    await self.layer.send(CHANNEL, job)
                except Exception as exc:
                    self.tally.note_exc(exc)

        start = now()
        await asyncio.gather(*(work() for _ in range(_SENDERS)))
        return start


class Worker(Role):
    def __init__(self, layer: object) -> None:
        super().__init__(layer)
        self._done: list[int] = []
        self._last_at = 0.0

    async def work(self, run: str) -> None:
        """From now on; what an earlier run has left behind is ignored."""
        self.spawn(self._receive(run))

    async def _receive(self, run: str) -> None:
        while True:
            job = await self.layer.receive(CHANNEL)
            if job["run"] == run:
                self._done.append(job["n"])
                self._last_at = now()

    async def done(self) -> int:
        return len(self._done)

    async def note(self, duplicated: int, lost: int) -> None:
        """Count what went wrong with the jobs of all workers."""
        if duplicated:
            self.tally.note(problems.DUPLICATED, duplicated)
        if lost:
            self.tally.note(problems.LOST, lost)

    async def books(self) -> dict[str, object]:
        return {"done": self._done, "last_at": self._last_at}


async def _wait(workers: list[WorkerHandle], target: int) -> None:
    """Until so many jobs are done, or none is for a while."""
    last, deadline = 0, now() + PATIENCE
    while True:
        done = sum([await worker.call("done") for worker in workers])
        if done != last:
            last, deadline = done, now() + PATIENCE
        if done >= target or now() > deadline:
            return
        await asyncio.sleep(_LOOK_INTERVAL)


async def run(stage: Stage) -> dict[str, float]:
    name = secrets.token_hex(4)
    workers = [await stage.start("jobs.Worker") for _ in range(2)]
    sender = await stage.start("jobs.Sender")
    for worker in workers:
        await worker.call("work", run=name)
    await sender.call("send", run=name, first=0, count=_WARM_UP)
    await _wait(workers, _WARM_UP)
    count = 1_000 if stage.quick else 10_000
    first, second = workers
    async with stage.cpu_times(sender=sender, first=first, second=second) as cpu:
        start = await sender.call("send", run=name, first=_WARM_UP, count=count)
        await _wait(workers, _WARM_UP + count)
    books = [await worker.call("books") for worker in workers]
    done = [n for each in books for n in each["done"]]
    different = len(set(done))
    lost = _WARM_UP + count - different
    await first.call("note", duplicated=len(done) - different, lost=lost)
    microseconds = cpu.per(count)
    return {
        "jobs": (count - lost) / (max(each["last_at"] for each in books) - start),
        "sender_us": microseconds["sender_us"],
        "worker_us": microseconds["first_us"] + microseconds["second_us"],
        "server_us": microseconds.get("server_us", 0.0),
        "share": 100 * max(len(each["done"]) for each in books) / len(done),
    }


SCENARIOS = (
    Scenario(
        name="jobs",
        title="Jobs of a normal channel: two workers, ten calls of one process send",
        metrics=(
            Metric("jobs", "jobs/s", more_is_better=True),
            Metric("sender_us", "sender, µs CPU", 1),
            Metric("worker_us", "worker, µs CPU", 1),
            Metric("server_us", "server, µs CPU", 1),
            Metric("share", "share of the busier worker, %", 0),
        ),
        layers=(OURS, REDIS_CORE),
        run=run,
    ),
)
