"""Checks this project: lint, types and the fast tests, in less than five minutes.

With --everything: all tests, the demo's check, and the fast tests on the newest other Python and,
with the oldest Channels, on the oldest one. That takes less than 25 minutes; the longest tests are
cut short. With --full-length they, too, run at their full length, which takes far longer. (tox by
itself runs all tests on all Pythons.)

Arguments which this command doesn't know are pytest's: then nothing but pytest runs, so
``scripts/test tests/unit`` or ``scripts/test -k router`` is the quick way to some of the tests, and
there must be a RabbitMQ only if one of them needs it. A failing step doesn't keep the others from
running; the exit status is 0 only if all steps passed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools import environment, interrupts
from tools.brokers import NoBroker, PrivateNode, get_broker
from tools.environment import ROOT, EnvironmentFailed
from tools.pythons import find_pythons

_STOP_TIMEOUT = 30.0  # seconds for an interrupted step to clean up
# For pytest: long tests at their full length, for which each has half an hour.
_FULL_LENGTH = ["--full", "--timeout", "1800"]
# What is neither fast nor can be left out: brokers that are killed, frozen and cut off.
_ESSENTIAL_FAULTS = [
    f"tests/faults/test_{name}.py" for name in ("fault_restart", "fault_half_open", "lease")
]
# Tests mostly wait: two processes halve the time. A file's tests stay together, they share brokers.
_TWO_AT_A_TIME = ["--numprocesses", "2", "--dist", "loadfile"]


@dataclass
class Step:
    """One command; its output goes where ours goes."""

    name: str
    command: Sequence[str | Path]
    variables: Mapping[str, str] = field(default_factory=dict)  # added to the environment
    seconds: float = 0.0
    outcome: str = "not run"
    _process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        begun_at = time.monotonic()
        # In a session of its own: of Ctrl-C it hears from us, once.
        with interrupts.held():
            self._process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env={**os.environ, **self.variables},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            self.outcome = "interrupted"  # unless it comes to its end
        outcome = "FAILED" if self._process.wait() else "passed"
        self.seconds = time.monotonic() - begun_at
        self.outcome = outcome

    def stop(self) -> None:
        """End it, if it hasn't ended, and all that it started."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_TIMEOUT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/test", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--everything", action="store_true", help="all tests, on three Pythons")
    parser.add_argument(
        "--full-length", action="store_true", help="everything, each test at its full length"
    )
    options, pytest_args = parser.parse_known_args()
    extent = _FULL_LENGTH if options.full_length else []
    interrupts.let_signals_interrupt()
    try:
        python = environment.prepare("tests")
        if pytest_args:
            command = [python, "-m", "pytest", "--get-broker", *extent, *pytest_args]
            return _run_all([Step("pytest", command)])
        with contextlib.ExitStack() as stack:
            broker = get_broker()
            if not isinstance(broker, PrivateNode):  # else the tests start their own
                stack.enter_context(broker)
                print(f"RabbitMQ: {broker.description}", flush=True)
            os.environ.update(broker.variables())
            if options.everything or options.full_length:
                return _run_all(_all_steps(python, extent))
            return _run_all(_fast_steps(python))
    except KeyboardInterrupt:
        return 130
    except (EnvironmentFailed, NoBroker) as exc:
        print(exc, file=sys.stderr)
        return 1


def _fast_steps(python: Path) -> list[Step]:
    pytest = [python, "-m", "pytest", "-q", *_TWO_AT_A_TIME]
    return [
        *_static_steps(python),
        Step("fast tests", [*pytest, "-m", "not slow", "tests/unit", "tests/integration"]),
        Step("essential faults", [*pytest, *_ESSENTIAL_FAULTS]),
    ]


def _all_steps(python: Path, extent: list[str]) -> list[Step]:
    return [
        *_static_steps(python),
        Step("pytest", [python, "-m", "pytest", *_TWO_AT_A_TIME, *extent]),
        _tox_step(python),
        Step("scripts/demo --check", [ROOT / "scripts" / "demo", "--check"]),
    ]


def _static_steps(python: Path) -> list[Step]:
    return [
        Step("ruff check", [python, "-m", "ruff", "check", "."]),
        Step("ruff format", [python, "-m", "ruff", "format", "--check", "."]),
        Step("mypy", [python, "-m", "mypy", "--strict", "channels_rabbitmq"]),
    ]


def _tox_step(python: Path) -> Step:
    """The fast tests on the oldest Python with the oldest Channels, and on the newest one.

    A fault of a Python in between shows on one of these two or on the current one, as far as seen.
    Without the tests of faults, which depend on RabbitMQ more than on Python.
    """
    current = f"{sys.version_info.major}{sys.version_info.minor}"
    pythons = find_pythons()
    oldest, *others = pythons
    # The newest Channels on the current Python: that was the step "pytest".
    newest = [version for version in others if version != current][-1:]
    environments = [f"py{oldest}-oldest", *(f"py{version}-newest" for version in newest)]
    return Step(
        "tox",
        [
            # Most of the time they wait, so two at a time.
            *(python, "-m", "tox", "run-parallel", "--parallel", "2", "--parallel-no-spinner"),
            *("--skip-missing-interpreters", "false"),
            *("--discover", *pythons.values()),
            *("-e", ",".join(environments)),
            *("--", "-q", "-m", "not slow", "tests/unit", "tests/integration"),
        ],
        # The step "pytest" looked thoroughly enough at what doesn't depend on versions.
        {"HYPOTHESIS_PROFILE": "dev"},
    )


def _run_all(steps: list[Step]) -> int:
    begun_at = time.monotonic()
    try:
        for step in steps:
            _print_heading(step.name)
            try:
                step.run()
            finally:
                step.stop()
    finally:
        _print_heading("summary")
        for step in steps:
            print(f"{step.outcome:>12} {step.seconds:7.1f} s   {step.name}")
        print(f"{'':12} {time.monotonic() - begun_at:7.1f} s", flush=True)
    return 0 if all(step.outcome == "passed" for step in steps) else 1


def _print_heading(text: str) -> None:
    print(f"\n=== {text} {'=' * (72 - len(text))}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
