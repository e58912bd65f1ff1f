"""Runs the demo: two server processes on one RabbitMQ, and a page that shows and breaks them."""

from __future__ import annotations

import argparse
import contextlib
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tools import environment, interrupts
from tools.brokers import Broker, NoBroker, get_broker
from tools.control import Control
from tools.environment import EnvironmentFailed
from tools.private_broker import BrokerFailed
from tools.servers import Server, ServerFailed, running_servers, two_ports

_CHECKS = ("tools.check_chat", "tools.check_demo")


def main() -> int:
    options = _parse_options()
    interrupts.let_signals_interrupt()
    try:
        python = options.python or environment.prepare("demo")
        with get_broker() as broker:
            print(f"RabbitMQ: {broker.description}", flush=True)
            # A person likes addresses that are easy to remember; a check doesn't get in the way.
            ports = two_ports() if options.check else two_ports(8001, 8002)
            with running_servers(python, broker.url, ports) as servers:
                port = 0 if options.check else 8000
                with _control(broker, servers, port).running() as control:
                    demo = Demo(broker, servers, control)
                    if options.check:
                        return demo.check(python)
                    demo.serve()
    except KeyboardInterrupt:
        print("\nStopped.", flush=True)
        return 0 if not options.check else 130
    except (EnvironmentFailed, NoBroker, ServerFailed, BrokerFailed) as exc:
        print(exc, file=sys.stderr)
        return 1
    return 0


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="no person needed: two clients exchange 100 messages each way, and Chromium, if there "
        "is one, presses the page's buttons; the exit status is 0 only if nothing was lost",
    )
    parser.add_argument(
        "--python",
        type=Path,
        help="a Python that has the package and what example/requirements.txt names, "
        "to be used instead of the project's own .venv",
    )
    return parser.parse_args()


def _control(broker: Broker, servers: list[Server], port: int) -> Control:
    actions: dict[str, Callable[[], None]] = {
        f"kill-{number}": server.kill for number, server in enumerate(servers)
    }
    if broker.can_restart:
        actions["restart-rabbitmq"] = broker.restart
    return Control([server.address for server in servers], actions, port=port)


class Demo:
    """What runs, until it is interrupted."""

    def __init__(self, broker: Broker, servers: list[Server], control: Control) -> None:
        self._broker = broker
        self._servers = servers
        self._control = control

    def keep_alive(self) -> None:
        """Starts killed processes again; raises what can't be mended."""
        for server in self._servers:
            server.keep_alive()
        self._control.check()

    def check(self, python: Path) -> int:
        addresses = [server.address for server in self._servers]
        for program, arguments in zip(_CHECKS, (addresses, [self._control.address]), strict=True):
            with self._running(python, program, arguments) as check:
                while check.poll() is None:
                    self.keep_alive()
                    time.sleep(0.05)
            if check.returncode:
                return check.returncode
        return 0

    @contextlib.contextmanager
    def _running(
        self, python: Path, program: str, arguments: list[str]
    ) -> Iterator[subprocess.Popen[bytes]]:
        command = [str(python), "-m", program, *arguments]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=environment.ROOT) as check:
            try:
                yield check
            except BaseException:
                # Stopped by the same Ctrl-C; or killed, should it be us alone who are to stop.
                check.terminate()
                raise

    def serve(self) -> None:
        print(f"\nThe demo is open:\n\n    {self._control.address}\n")
        print("Its chat, on two processes:\n")
        for server in self._servers:
            print(f"    {server.address}")
        is_interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        reads_input = is_interactive and self._broker.can_restart
        print("\nCtrl-C stops everything.", flush=True)
        if reads_input:
            print("Enter r to restart RabbitMQ while the pages watch.", flush=True)
        while True:
            self.keep_alive()
            if not reads_input:
                time.sleep(0.1)
            elif select.select([sys.stdin], [], [], 0.1)[0]:
                reads_input = self._obey(sys.stdin.readline())

    def _obey(self, line: str) -> bool:
        """Returns whether more input may come."""
        if line.strip() == "r":
            print("RabbitMQ restarts...", end=" ", flush=True)
            status = self._control.act("restart-rabbitmq")
            print("it is back." if status == 204 else "already.", flush=True)
        return bool(line)


if __name__ == "__main__":
    sys.exit(main())
