"""Runs mixed traffic between several processes, with faults at random, and proves what arrived.

On a RabbitMQ of its own. Every message has a number: nothing may arrive twice or out of order for
one sender and one receiver, all must arrive that was sent outside of the moments of a fault, each
process must come back by itself after each fault, and its memory must stay what it was. The exit
status is 0 only if all of that held. (What exactly is demanded stands in soak/proof.py.)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.proxy import Proxy
from soak import memory
from soak.faults import FAULTS, Stage
from soak.participants import Participant, ParticipantDied
from soak.proof import Proof, Verdict, Window
from tools import brokers, cancellable, environment, interrupts
from tools.brokers import NoBroker, PrivateNode
from tools.environment import EnvironmentFailed
from tools.private_broker import BrokerFailed, PrivateBroker

_PARTICIPANTS = ["ann", "ben", "cat", "dan"]
_DIRECT = ["dan"]  # without a proxy in between

# Seconds from the opening of a window to its fault: what was confirmed before has been received.
_LEAD = 2.0
# Seconds of peace before a window opens.
_PEACE = (2.0, 8.0)
# Seconds after a fault within which everybody must have recovered. The longest is that of a
# connection attempt begun while the broker was frozen, or of the back-off, 10 s each.
_RECOVERY_TIMEOUT = 60.0
_START_TIMEOUT = 30.0
_END_TIMEOUT = 60.0
# Seconds for the broker to delete what the last lost connections had bound: a lease is 20.
_LEASE_TIMEOUT = 40.0
_SAMPLE_INTERVAL = 5.0
_SHOWN_PROBLEMS = 20

# In the participants' logs: what Python prints of what nobody awaited, saw or closed.
_BAD_WORDS = ("Traceback", "was never awaited", "was destroyed", "never retrieved", "unclosed")


class Soak:
    """One run."""

    def __init__(self, options: argparse.Namespace, broker: PrivateBroker, folder: Path) -> None:
        self._options = options
        self._broker = broker
        self._folder = folder
        self._chance = random.Random(options.seed)
        self._participants = [Participant(name, folder) for name in _PARTICIPANTS]
        self._windows: list[Window] = []
        self._recoveries: dict[str, list[float]] = defaultdict(list)  # seconds, by fault
        self._samples: dict[str, list[memory.Sample]] = defaultdict(list)
        self._problems: list[str] = []
        self._activity = "starting"
        self._begun = 0.0

    async def run(self, python: Path) -> list[str]:
        """Return what went wrong."""
        async with contextlib.AsyncExitStack() as stack:
            proxies = []
            for participant in self._participants:
                stack.push_async_callback(participant.kill)
                url = self._broker.url
                if participant.name not in _DIRECT:
                    proxy = Proxy("127.0.0.1", self._broker.port)
                    proxies.append(await stack.enter_async_context(proxy))
                    url = proxy.url_of(url)
                await participant.start(python, url, self._chance.randrange(2**32))
            for participant in self._participants:
                await participant.until(lambda each: each.residents, _START_TIMEOUT)
            self._order(people={each.name: each.residents for each in self._participants})
            self._begun = time.monotonic()
            observers = [
                asyncio.create_task(self._sample_memory()),
                asyncio.create_task(self._show_progress()),
            ]
            try:
                await self._do_harm(Stage(self._broker, proxies, self._chance))
            finally:
                for observer in observers:
                    observer.cancel()
                await asyncio.wait(observers)
            for observer in observers:
                if not observer.cancelled():
                    observer.result()
            await self._end()
        return self._judge()

    def _order(self, **words: object) -> None:
        for participant in self._participants:
            participant.order(**words)

    # Faults

    async def _do_harm(self, stage: Stage) -> None:
        deadline = self._begun + self._options.minutes * 60
        kinds: list[str] = []
        while True:
            self._activity = "all is well"
            await asyncio.sleep(self._chance.uniform(*_PEACE))
            for participant in self._participants:
                participant.check_alive()
            if time.monotonic() > deadline:
                return
            if not kinds:
                # Each as often as the others, in any order
                kinds = list(FAULTS)
                self._chance.shuffle(kinds)
            if not await self._do(kinds.pop(), stage):
                return

    async def _do(self, kind: str, stage: Stage) -> bool:
        """Commit one fault; False if somebody doesn't recover."""
        self._activity = kind
        opened = time.monotonic()
        await asyncio.sleep(_LEAD)
        await FAULTS[kind](stage)
        over = time.monotonic()
        number = len(self._windows) + 1
        self._order(settle=number)
        is_well = True
        for participant in self._participants:
            try:
                await participant.until(
                    lambda each: each.settled >= number, over + _RECOVERY_TIMEOUT - time.monotonic()
                )
            except TimeoutError:
                is_well = False
                self._problems.append(
                    f"{participant.name} did not recover within {_RECOVERY_TIMEOUT:g} s "
                    f"from: {kind}\n{participant.log_tail()}"
                )
        closed = time.monotonic()
        self._windows.append(Window(kind, opened, closed))
        self._recoveries[kind].append(closed - over)
        self._order(settled=number)
        return is_well

    async def _end(self) -> None:
        self._activity = "ending"
        self._order(stop=True)
        for participant in self._participants:
            await participant.until(lambda each: each.is_calm, _END_TIMEOUT)
        self._order(leave=True)
        for participant in self._participants:
            status = await participant.ended(_END_TIMEOUT)
            if status != 0:
                self._problems.append(
                    f"{participant.name} "
                    + ("hangs" if status is None else f"ended with exit status {status}")
                    + f":\n{participant.log_tail()}"
                )
        # What was bound by the last lost connections goes a moment later.
        deadline = time.monotonic() + _LEASE_TIMEOUT
        left = await self._left_on_the_broker()
        while left and time.monotonic() < deadline:
            await asyncio.sleep(1)
            left = await self._left_on_the_broker()
        self._problems += [f"left on the broker: {what}" for what in left]

    async def _left_on_the_broker(self) -> list[str]:
        return [
            f"{kind} {row['name']}"
            for kind, list_all in (
                ("queue", self._broker.list_queues),
                ("connection", self._broker.list_connections),
                ("exchange", self._broker.list_exchanges),
            )
            for row in await asyncio.to_thread(list_all, "name")
            if kind != "exchange" or row["name"].startswith("crq.")
        ]

    # Observers

    async def _sample_memory(self) -> None:
        while True:
            by_pid = await asyncio.to_thread(
                memory.resident, [participant.pid for participant in self._participants]
            )
            for participant in self._participants:
                if participant.pid in by_pid:
                    sample = (time.monotonic(), by_pid[participant.pid])
                    self._samples[participant.name].append(sample)
            await asyncio.sleep(_SAMPLE_INTERVAL)

    async def _show_progress(self) -> None:
        is_terminal = sys.stdout.isatty()
        interval = 1 if is_terminal else 30
        while True:
            await asyncio.sleep(interval)
            line = self._progress()
            # On a terminal always the same line
            print(f"\r\033[K{line}" if is_terminal else line, end="" if is_terminal else "\n")
            sys.stdout.flush()

    def _progress(self) -> str:
        gone = time.monotonic() - self._begun
        sent = sum(each.counts["sent"] for each in self._participants)
        received = sum(each.counts["received"] for each in self._participants)
        used = sum(samples[-1][1] for samples in self._samples.values() if samples)
        problems = len(self._problems) + sum(len(each.problems) for each in self._participants)
        return (
            f"[{_clock(gone)} of {_clock(self._options.minutes * 60)}] {sent:,} sent, "
            f"{received:,} received, {len(self._windows)} faults, {problems} problems, "
            f"{used / 2**20:.0f} MiB; {self._activity}"
        )

    # The report

    def _judge(self) -> list[str]:
        if sys.stdout.isatty():
            print("\r\033[K", end="")
        proof = Proof()
        for participant in self._participants:
            with participant.journal.open() as lines:
                proof.read(lines)
            self._problems += participant.problems
            for line in participant.log.read_text(errors="replace").splitlines():
                if any(words in line for words in _BAD_WORDS):
                    self._problems.append(f"{participant.name}: in its log: {line}")
        verdict = proof.judge(self._windows)
        self._problems += verdict.problems
        self._report(verdict)
        return self._problems

    def _report(self, verdict: Verdict) -> None:
        in_windows = sum(window.closed - window.opened for window in self._windows)
        print(f"\n{verdict.sent:,} messages were sent and {verdict.received:,} received.")
        print(
            f"Outside of faults {verdict.required:,} deliveries were due; in their windows "
            f"({in_windows:.0f} s) {verdict.failed_in_windows:,} calls failed and "
            f"{verdict.lost_in_windows:,} deliveries were lost."
        )
        print("\nFaults, and the seconds until everybody had recovered:")
        for kind, seconds in self._recoveries.items():
            times = " ".join(f"{each:.1f}" for each in seconds)
            print(f"  {kind:32} {times}")
        print("\nMemory, in MiB: after the warm-up, at the end, the highest; and its slope:")
        long_enough = self._options.minutes * 60 >= memory.SHORTEST_RUN
        for name, samples in self._samples.items():
            trend = memory.trend(samples)
            if trend is None:
                print(f"  {name}: the run was too short")
                continue
            sizes = [f"{size / 2**20:.1f}" for size in (trend.before, trend.after, trend.highest)]
            print(f"  {name}: {' '.join(sizes)}; {trend.per_hour / 2**20:+.1f} MiB an hour")
            if long_enough and not trend.is_flat:
                self._problems.append(f"{name}: its memory grew")
        if long_enough and len(self._samples) < len(self._participants):
            self._problems.append("the memory of some could not be measured")
        if not verdict.required:
            self._problems.append("nothing was due: the run was too short to prove anything")


def main() -> int:
    options = _parse_options()
    interrupts.let_signals_interrupt()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    problems = ["it was not finished"]
    try:
        python = options.python or environment.prepare("demo")
        with PrivateBroker(_find_commands()) as broker:
            version = ".".join(map(str, broker.version))
            print(
                f"RabbitMQ {version}, {len(_PARTICIPANTS)} processes, {options.minutes:g} minutes, "
                f"--seed {options.seed}",
                flush=True,
            )
            problems = cancellable.run(Soak(options, broker, folder).run(python))
    except KeyboardInterrupt:
        print("\nInterrupted.", flush=True)
        problems = []
        return 130
    except (EnvironmentFailed, NoBroker, BrokerFailed, ParticipantDied, TimeoutError) as exc:
        problems = [f"{type(exc).__name__}: {exc}"]
    finally:
        if problems:
            print(f"\nThe logs and journals are kept in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if problems:
        print(f"FAILED, {len(problems):,} problems:", file=sys.stderr)
        for problem in problems[:_SHOWN_PROBLEMS]:
            print(f"- {problem}", file=sys.stderr)
        if len(problems) > _SHOWN_PROBLEMS:
            print(f"- and {len(problems) - _SHOWN_PROBLEMS:,} more", file=sys.stderr)
        return 1
    print("\nPassed: nothing twice, nothing out of order, nothing lost outside of faults.")
    return 0


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="N", help="how long (default: 10)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=secrets.randbelow(10**6),
        metavar="N",
        help="of what happens at random (default: another one each time)",
    )
    parser.add_argument(
        "--python",
        type=Path,
        help="a Python that has the package, to be used instead of the project's own .venv",
    )
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error("--minutes: more than 0")
    return options


def _find_commands() -> Path:
    """The commands of a RabbitMQ that may be broken; it is installed if need be."""
    for way in (brokers.installed, brokers.apt, brokers.homebrew):
        broker = way()
        if isinstance(broker, PrivateNode):
            return broker.commands
    raise NoBroker("No RabbitMQ to be started here was found; RABBITMQ_BIN may name one's commands")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


if __name__ == "__main__":
    sys.exit(main())
