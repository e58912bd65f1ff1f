"""The demo's server processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools import interrupts
from tools.environment import ROOT
from tools.private_broker import free_port

_START_TIMEOUT = 60.0  # seconds; it takes about two
_STOP_TIMEOUT = 10.0
_LOG_LINES = 25


class ServerFailed(RuntimeError):
    """A server process ended, or never answered; the text carries the end of its log."""


class Server:
    """One uvicorn process with the demo, in a session of its own: Ctrl-C is not meant for it."""

    def __init__(self, python: Path, port: int, log: Path, variables: dict[str, str]) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self._log = log
        self._environment = {**os.environ, **variables}
        self._command = [
            str(python),
            *("-m", "uvicorn", "demo.asgi:application"),
            *("--app-dir", str(ROOT / "example")),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--lifespan", "on"),
            *("--timeout-graceful-shutdown", "3"),
        ]
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as output:
            return subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._answers():
            self._check_alive()
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.address} doesn't answer.\n{self._log_tail()}")
            time.sleep(0.05)

    def keep_alive(self) -> None:
        """Start the process again if it was killed.

        Raises ``ServerFailed`` if it has ended by itself: it would do so again.
        """
        status = self._process.poll()
        if status is not None and status < 0:
            print(f"{self.address} was killed (signal {-status}). It starts again.", flush=True)
            with interrupts.held():
                self._process = self._start()
        else:
            self._check_alive()

    def _check_alive(self) -> None:
        status = self._process.poll()
        if status is not None:
            raise ServerFailed(
                f"The server process of {self.address} ended with exit status {status}. "
                f"The end of its log:\n{self._log_tail()}"
            )

    def ask_to_stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        process = self._process  # another thread may start the next one
        process.kill()
        process.wait()

    def wait_until_stopped(self) -> None:
        try:
            self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        # No proxy on the way to ourselves, whatever the environment says.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self.address, timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def _log_tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join(f"  {line}" for line in lines)


@contextlib.contextmanager
def running_servers(python: Path, url: str, ports: Sequence[int]) -> Iterator[list[Server]]:
    """The demo in one process for each port, with the RabbitMQ at ``url``.

    Entered when all answer; at the end none is left. Raises ``ServerFailed``.
    """
    addresses = " ".join(f"http://127.0.0.1:{port}" for port in ports)
    variables = {"RABBITMQ_URL": url, "CHAT_ADDRESSES": addresses}
    folder = Path(tempfile.mkdtemp(prefix="channels-rabbitmq-demo-"))
    servers: list[Server] = []
    try:
        for port in ports:
            with interrupts.held():
                servers.append(Server(python, port, folder / f"{port}.log", variables))
        for server in servers:
            server.wait_until_ready()
        yield servers
    finally:
        for server in servers:
            server.ask_to_stop()
        for server in servers:
            server.wait_until_stopped()
        shutil.rmtree(folder, ignore_errors=True)


def two_ports(*preferred: int) -> list[int]:
    """Two ports that are free now, the preferred ones first."""
    ports = [port for port in preferred if _is_free(port)]
    while len(ports) < 2:
        port = free_port()
        if port not in ports:
            ports.append(port)
    return ports[:2]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: else the last demo's closed connections would count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
