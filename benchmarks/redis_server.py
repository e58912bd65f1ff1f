"""A private Redis server for the peers that need one: own port, no persistence, nothing left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tools import interrupts, root_rights
from tools.private_broker import free_port
from tools.start_stop import StartStop

_START_TIMEOUT = 20.0  # seconds
_STOP_TIMEOUT = 10.0

# The server ends with the pipe on the shell's standard input, so also when we are killed.
_RUN = """\
server=$1 folder=$2
shift 2
"$server" --dir "$folder" "$@" > "$folder/log" 2>&1 &
read -r _
kill $!
wait $!
rm -rf "$folder"
"""


class NoRedis(RuntimeError):
    """No Redis server; the text says why."""


def find_command() -> Path:
    """``redis-server``, installed by apt-get if need be and allowed. Raises ``NoRedis``."""
    found = shutil.which("redis-server")
    if found is None and root_rights.may_install() and root_rights.install("redis-server"):
        found = shutil.which("redis-server")
    if found is None:
        raise NoRedis("no redis-server on PATH, and none could be installed by apt-get")
    return Path(found)


class PrivateRedis(StartStop):
    """Runs while it is entered (``with PrivateRedis(find_command()) as redis:``)."""

    def __init__(self, command: Path) -> None:
        self._command = command
        self._folder = ""
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.version = ""  # known once it is entered

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.port = free_port()
        self._folder = tempfile.mkdtemp(prefix="channels-rabbitmq-redis-")
        with interrupts.held():
            self._process = self._start_server()
        self._wait_until_ready()

    def _start_server(self) -> subprocess.Popen[bytes]:
        options = [
            *("--port", str(self.port), "--bind", "127.0.0.1"),
            *("--save", "", "--appendonly", "no", "--loglevel", "warning"),
        ]
        return subprocess.Popen(
            ["sh", "-c", _RUN, "sh", str(self._command), self._folder, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not meant for it
        )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT
        while not self.version:
            if time.monotonic() > deadline:
                log = (Path(self._folder) / "log").read_text(errors="replace")[-1000:]
                raise NoRedis(f"redis-server doesn't answer: {log.strip() or '(no log)'}")
            with contextlib.suppress(OSError):
                fields = self.ask("INFO server").partition("redis_version:")
                self.version = fields[2].partition("\r")[0]
            time.sleep(0.05)

    def clear(self) -> None:
        """Takes everything out of it."""
        answer = self.ask("FLUSHALL")
        if not answer.startswith("+OK"):
            raise NoRedis(f"redis-server: {answer.strip()}")

    def ask(self, command: str) -> str:
        """What the server answers to one command, as Redis' protocol has it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(f"{command}\r\nQUIT\r\n".encode())
            answer = b""
            while received := connection.recv(65536):
                answer += received
        return answer.decode()

    def stop(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)
