"""Runs scenarios on layers, interleaved: A B C A B C, so that a slow minute hits all alike.

Each run has fresh processes, and waits until its server is at rest. A run that fails or takes too
long is a result; its processes are killed, and the next run starts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.model import Failed, Sample
from benchmarks.problems import Problems, add_problems
from benchmarks.scenario import Scenario
from benchmarks.scenarios import (
    ask,
    churn,
    fanout,
    jobs,
    large,
    latency,
    memory,
    neighbours,
    reconnect,
    site,
    storm,
    sync,
    throughput,
)
from benchmarks.stage import CAPACITY, Server, Stage
from benchmarks.workers import CallFailed, WorkerDied

SCENARIOS: tuple[Scenario, ...] = (
    *latency.SCENARIOS,
    *throughput.SCENARIOS,
    *fanout.SCENARIOS,
    *churn.SCENARIOS,
    *storm.SCENARIOS,
    *reconnect.SCENARIOS,
    *large.SCENARIOS,
    *memory.SCENARIOS,
    *sync.SCENARIOS,
    *jobs.SCENARIOS,
    *site.SCENARIOS,
    *neighbours.SCENARIOS,
    *ask.SCENARIOS,
)


def plan(
    scenarios: Sequence[Scenario], layers: Sequence[str], rounds: int
) -> Iterator[tuple[Scenario, str]]:
    """All runs, in order."""
    for scenario in scenarios:
        for _ in range(rounds):
            for layer in scenario.layers:
                if layer in layers:
                    yield scenario, layer


async def run_all(
    runs: Sequence[tuple[Scenario, str]],
    servers: Mapping[str, Server],
    pythons: Mapping[str, Path],
    *,
    quick: bool,
    report: Callable[[int, Sample], None],
) -> list[Sample]:
    """``servers`` by layer; ``report(number, sample)`` is called after each run."""
    samples = []
    for number, (scenario, layer) in enumerate(runs, 1):
        sample = await run_one(scenario, layer, servers[layer], pythons, quick=quick)
        samples.append(sample)
        report(number, sample)
    return samples


async def run_one(
    scenario: Scenario, layer: str, server: Server, pythons: Mapping[str, Path], *, quick: bool
) -> Sample:
    sample = Sample(scenario.name, layer)
    start = time.monotonic()
    capacity = None if scenario.at_defaults else CAPACITY
    stage = Stage(layer, server, pythons, quick=quick, capacity=capacity)
    try:
        await server.clear()
        await server.rest()
        sample.metrics, sample.problems = await asyncio.wait_for(
            _perform(scenario, stage), scenario.time_limit
        )
        add_problems(sample.problems, await stage.close())
    except (Failed, CallFailed, WorkerDied) as exc:
        sample.failure = str(exc)
    except asyncio.TimeoutError:
        sample.failure = f"did not end within {scenario.time_limit:g} s"
    finally:
        await stage.kill()
        sample.seconds = time.monotonic() - start
    return sample


async def _perform(scenario: Scenario, stage: Stage) -> tuple[dict[str, float], Problems]:
    return await scenario.run(stage), await stage.problems()
