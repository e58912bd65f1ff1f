"""Measures this project's channel layer beside others, on servers of its own.

The layers are installed into environments of their own at the first run. A full run takes about 30
minutes, --quick below eight: once each instead of three times, and shorter. Results of a full run
go to benchmarks/results, others to benchmarks/results/partial. What is measured and how to read it
is in benchmarks/README.rst.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks import machine, peers, results_folder
from benchmarks.layers.raw_amqp import RawConnection
from benchmarks.model import EXCHANGES, LAYERS, RAW, Sample
from benchmarks.redis_server import NoRedis, PrivateRedis, find_command
from benchmarks.scenario import Scenario
from benchmarks.stage import Server
from benchmarks.suite import SCENARIOS, plan, run_all
from tools import cancellable, interrupts
from tools.brokers import NoBroker, get_broker
from tools.environment import ROOT, EnvironmentFailed
from tools.private_broker import BrokerFailed

_ROUNDS = 3
_PATIENCE = 20.0  # seconds that a RabbitMQ may take to let us in
_RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    options = _parse_options()
    interrupts.let_signals_interrupt()
    try:
        with contextlib.ExitStack() as stack:
            return _run(options, stack)
    except KeyboardInterrupt:
        print("\nInterrupted; no results were written.", flush=True)
        return 130
    except (EnvironmentFailed, NoBroker, BrokerFailed) as exc:
        print(exc, file=sys.stderr)
        return 1


def _parse_options() -> argparse.Namespace:
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark",
        description=__doc__,
        epilog=f"scenarios: {', '.join(names)}; layers: {', '.join(LAYERS)}",
    )
    parser.add_argument("--quick", action="store_true", help="each run once, and shorter")
    parser.add_argument(
        "--scenario", nargs="+", metavar="NAME", help="only these (a name's beginning is enough)"
    )
    parser.add_argument("--layers", nargs="+", metavar="NAME", choices=LAYERS, help="only these")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each is run")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the results go")
    parser.add_argument(
        "--python",
        type=Path,
        help="a Python that has the package, to be used instead of the project's own .venv",
    )
    options = parser.parse_args()
    for wanted in options.scenario or ():
        if not any(each.is_wanted([wanted]) for each in SCENARIOS):
            parser.error(f"no scenario {wanted}; there are {', '.join(names)}")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds: at least 1")
    is_full = not (options.quick or options.scenario or options.layers or options.rounds)
    options.output = options.output or (_RESULTS if is_full else _RESULTS / "partial")
    try:
        # Now rather than after all the runs
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        parser.error(f"--output: {exc}")
    return options


def _run(options: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    load = os.getloadavg()[0]
    scenarios = [each for each in SCENARIOS if each.is_wanted(options.scenario)]
    layers = [layer for layer in LAYERS if layer in (options.layers or LAYERS)]
    rounds = options.rounds or (1 if options.quick else _ROUNDS)

    print("Starting the servers...", flush=True)
    servers, skipped = _start_servers(layers, stack)
    pythons = {}
    for layer in servers:
        try:
            pythons[layer] = peers.prepare(layer, options.python)
        except peers.PeerFailed as exc:
            print(f"{peers.adapter(layer).TITLE} is skipped: {exc}", file=sys.stderr)
            skipped.append((peers.adapter(layer).TITLE, "could not be installed"))
    # The raw client also observes in scenarios of others.
    pythons[RAW] = pythons.get(RAW) or peers.prepare(RAW, options.python)
    measured = [layer for layer in layers if layer in servers and layer in pythons]
    runs = list(plan(scenarios, measured, rounds))
    if not runs:
        print("Nothing to run: no scenario has one of the layers that are left.", file=sys.stderr)
        return 1
    facts = _facts(servers, pythons, load, options.quick, skipped)
    for name, text in facts:
        print(f"{name}: {text}", flush=True)

    progress = _Progress(runs)
    samples = cancellable.run(
        run_all(runs, servers, pythons, quick=options.quick, report=progress.report)
    )
    titles = {layer: peers.adapter(layer).TITLE for layer in LAYERS}
    print(f"\n{results_folder.write(options.output, scenarios, samples, titles, facts)}")
    print(f"Written to {os.path.relpath(options.output)}.", flush=True)
    return 0


def _start_servers(
    layers: Sequence[str], stack: contextlib.ExitStack
) -> tuple[dict[str, Server], list[tuple[str, str]]]:
    """A server for each layer that can have one, and which layers are skipped and why."""
    by_kind = {}
    skipped = []
    kinds = {peers.adapter(layer).SERVER for layer in layers}
    if "rabbitmq" in kinds:
        broker = stack.enter_context(get_broker())
        print(f"RabbitMQ: {broker.description}", flush=True)
        by_kind["rabbitmq"] = _rabbitmq(broker.url)
        stack.callback(_delete_exchanges, broker.url)
    if "redis" in kinds:
        try:
            redis = stack.enter_context(PrivateRedis(find_command()))
        except NoRedis as exc:
            print(f"The layers on Redis are skipped: {exc}.", flush=True)
            skipped.append(("channels_redis", str(exc)))
        else:
            by_kind["redis"] = Server(
                redis.url, "127.0.0.1", redis.port, f"Redis {redis.version}", redis.clear
            )
    servers = {}
    for layer in layers:
        kind = peers.adapter(layer).SERVER
        if kind in by_kind:
            servers[layer] = by_kind[kind]
    return servers, skipped


def _rabbitmq(url: str) -> Server:
    async def ask_version() -> str:
        connection = await asyncio.wait_for(RawConnection.connect(url), _PATIENCE)
        connection.close()
        return connection.server_version

    parts = urlsplit(url)
    if parts.scheme != "amqp":
        raise NoBroker("RABBITMQ_URL: the raw client has no TLS, so it must be an amqp:// URL")
    try:
        version = asyncio.run(ask_version())
    except (OSError, asyncio.TimeoutError) as exc:
        raise NoBroker(f"RabbitMQ doesn't let the raw client in: {exc}") from exc
    return Server(url, parts.hostname or "127.0.0.1", parts.port or 5672, f"RabbitMQ {version}")


def _delete_exchanges(url: str) -> None:
    """On a broker that isn't ours; with our own they go anyway."""

    async def delete() -> None:
        connection = await RawConnection.connect(url)
        for name in EXCHANGES.values():
            await connection.delete_exchange(name)
        connection.close()

    with contextlib.suppress(OSError, asyncio.TimeoutError):  # it has gone meanwhile
        asyncio.run(asyncio.wait_for(delete(), _PATIENCE))


def _facts(
    servers: dict[str, Server],
    pythons: dict[str, Path],
    load: float,
    quick: bool,
    skipped: Sequence[tuple[str, str]],
) -> list[tuple[str, str]]:
    facts = [
        ("Date", f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC"),
        ("Commit", machine.commit(ROOT) or "unknown"),
        ("Machine", machine.describe()),
        ("Load at the start", f"{load:.1f}"),
        ("Servers", ", ".join(dict.fromkeys(each.description for each in servers.values()))),
    ]
    if quick:
        facts.append(("Mode", "--quick: one short run each; good for orders of magnitude only"))
    for layer in LAYERS:
        if layer in pythons and layer in servers and peers.adapter(layer).PACKAGES:
            versions = peers.versions(layer, pythons[layer])
            text = ", ".join(f"{name} {version}" for name, version in versions.items())
            facts.append((peers.adapter(layer).TITLE, text))
    facts += [(title, f"skipped: {reason}") for title, reason in skipped]
    return facts


class _Progress:
    """A line for each run."""

    def __init__(self, runs: Sequence[tuple[Scenario, str]]) -> None:
        self._metrics = {scenario.name: scenario.metrics[0] for scenario, _ in runs}
        self._total = len(runs)
        self._start = time.monotonic()

    def report(self, number: int, sample: Sample) -> None:
        gone = time.monotonic() - self._start
        left = gone / number * (self._total - number)
        metric = self._metrics[sample.scenario]
        if sample.failure:
            outcome = "fails: " + " ".join(sample.failure.split())[:100]
        else:
            outcome = f"{sample.metrics[metric.key]:,.{metric.digits}f} {metric.heading}"
            outcome += "".join(f"; {n:,} × {kind}" for kind, (n, _) in sample.problems.items())
        print(
            f"[{number:3}/{self._total}, {_clock(gone)}, about {_clock(left)} left] "
            f"{sample.scenario:20} {sample.layer:13} {outcome} ({sample.seconds:.0f} s)",
            flush=True,
        )


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


if __name__ == "__main__":
    sys.exit(main())
