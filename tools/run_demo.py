"""Runs the chat of example/ in two server processes on one RabbitMQ. Ctrl-C stops everything."""

from __future__ import annotations

import argparse
import select
import subprocess
import sys
import time
from pathlib import Path

from tools import environment, interrupts
from tools.brokers import Broker, NoBroker, get_broker
from tools.environment import EnvironmentFailed
from tools.private_broker import BrokerFailed
from tools.servers import Server, ServerFailed, running_servers, two_ports

_CHECK = Path(__file__).resolve().parent / "check_chat.py"


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
                if options.check:
                    return _check(python, servers)
                _serve(broker, servers)
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
        help="no person needed: two clients exchange 100 messages each way; "
        "the exit status is 0 only if all of them arrived",
    )
    parser.add_argument(
        "--python",
        type=Path,
        help="a Python that has the package and what example/requirements.txt names, "
        "to be used instead of the project's own .venv",
    )
    return parser.parse_args()


def _check(python: Path, servers: list[Server]) -> int:
    addresses = [server.address for server in servers]
    # Stopped by the same Ctrl-C; killed, should it be us alone who are to stop.
    check = subprocess.run([str(python), str(_CHECK), *addresses], stdin=subprocess.DEVNULL)
    for server in servers:
        server.check_alive()
    return check.returncode


def _serve(broker: Broker, servers: list[Server]) -> None:
    """Until interrupted, or until a server process ends."""
    print("\nThe chat is open, served by two processes:\n")
    for server in servers:
        print(f"    {server.address}")
    is_interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    can_restart = is_interactive and broker.can_restart
    print("\nOpen both side by side. Ctrl-C stops everything.", flush=True)
    if can_restart:
        print("Enter r to restart RabbitMQ while the pages watch.", flush=True)
    while True:
        for server in servers:
            server.check_alive()
        if not can_restart:
            time.sleep(0.5)
        elif select.select([sys.stdin], [], [], 0.5)[0]:
            line = sys.stdin.readline()
            if not line:
                can_restart = False  # the end of the input
            elif line.strip() == "r":
                print("RabbitMQ restarts...", end=" ", flush=True)
                broker.restart()
                print("it is back.", flush=True)


if __name__ == "__main__":
    sys.exit(main())
