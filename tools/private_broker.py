"""A private RabbitMQ node: own name, ports, data folder, cookie and epmd; nothing stays behind.

    with PrivateBroker(find_broker_commands()) as broker:
        print(broker.url)

Used by ``scripts/demo`` and by the tests, so it needs nothing but Python's standard library, a
Unix and RabbitMQ's own commands. How a node is kept apart from all others and ends without a trace:

- Everything it writes goes to one fresh folder under /tmp (not $TMPDIR: a RabbitMQ in a chroot may
  see nothing else).
- Its ports lie below the range from which systems take the ports of outgoing connections. A client
  that tries again and again to reach a stopped broker could otherwise be given that very port for
  its own end and be connected to itself.
- It is the leader of a session, so one signal to its process group reaches all of it. Two kinds of
  processes live outside that group: Erlang's port programs, which end by themselves when their pipe
  closes, and epmd, which is a daemon and ends when asked in its own protocol.
- A *guard* process waits for the end of the Python process that started the node, however that
  ends (also by kill -9), and then removes the node: an interrupted test run leaves nothing either.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_START_TIMEOUT = 90.0  # seconds; a start takes 3 to 6 on two cores
_STOP_TIMEOUT = 20.0
_CTL_TIMEOUT = 60.0
_LOG_TAIL = 10_000  # characters of the log shown when a start fails

# What 3.10 and 4.0 write when somebody else listens at the AMQP, distribution or epmd port.
_PORT_TAKEN = re.compile("eaddrinuse|port .* in use|epmd error|nodistribution")

_COMMANDS = ("rabbitmq-server", "rabbitmqctl")
COMMAND_FOLDERS = (
    "/usr/lib/rabbitmq/bin",  # Debian, Fedora
    "/opt/rabbitmq/sbin",  # the Docker image, generic builds
    "/opt/homebrew/sbin",  # Homebrew on Apple silicon; often not on PATH
    "/usr/local/sbin",  # Homebrew on Intel
)

# Alarms off for any sane machine, few threads, no statistics: a small node that starts fast.
_CONFIG = """\
listeners.tcp.1 = {address}:{port}
{tls}
log.file = {folder}/rabbit.log
log.file.level = warning
log.console = false
vm_memory_high_watermark.relative = 0.8
disk_free_limit.absolute = 1MB
collect_statistics = none
{config}
"""

_TLS_CONFIG = """\
listeners.ssl.1 = 127.0.0.1:{tls_port}
ssl_options.cacertfile = {folder}/ca.pem
ssl_options.certfile = {folder}/server.pem
ssl_options.keyfile = {folder}/server-key.pem
ssl_options.verify = {verify}
ssl_options.fail_if_no_peer_cert = {mutual}"""

_system_random = random.SystemRandom()  # users (and tests) seed the module's own generator


class BrokerFailed(RuntimeError):
    """The node did not start, or a command was refused; the text carries what the broker said."""


@dataclass(frozen=True)
class TlsFiles:
    """The PEM files a broker needs to offer TLS.

    ``mutual``: clients must show a certificate which the same CA signed.
    """

    ca: Path
    certificate: Path
    key: Path
    mutual: bool = False

    @classmethod
    def in_folder(cls, folder: Path, name: str = "server", *, mutual: bool = False) -> TlsFiles:
        """The files as ``ssl/prepare-certs.sh`` names them: NAME.pem and NAME-key.pem."""
        return cls(folder / "ca.pem", folder / f"{name}.pem", folder / f"{name}-key.pem", mutual)


def find_broker_commands() -> Path | None:
    """The folder with ``rabbitmq-server`` and ``rabbitmqctl``, ``None`` if there is none.

    Looks at $RABBITMQ_BIN, PATH, then the usual places. $RABBITMQ_BIN is binding: if it is set and
    the commands aren't there, ``FileNotFoundError`` is raised.
    """
    named = os.environ.get("RABBITMQ_BIN")
    if named:
        if not _has_commands(Path(named)):
            raise FileNotFoundError(f"$RABBITMQ_BIN: no {' and '.join(_COMMANDS)} in {named}")
        return Path(named).absolute()
    folders = [*os.environ.get("PATH", "").split(os.pathsep), *COMMAND_FOLDERS]
    return next((Path(f).absolute() for f in folders if f and _has_commands(Path(f))), None)


def _has_commands(folder: Path) -> bool:
    return all(
        os.access(folder / command, os.X_OK)
        # Debian's /usr/sbin holds wrappers which drop the environment and switch the user.
        and (folder / command).resolve().name != "rabbitmq-script-wrapper"
        for command in _COMMANDS
    )


def _is_running(group: int) -> bool:
    """Whether a thread of a process group isn't stopped. Linux only; elsewhere False."""
    for stat in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            # PID (NAME) STATE PPID PGRP ...
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[2] == str(group) and fields[0] not in "TtZX":
                return True
    return False


def free_port() -> int:
    """A TCP port that is free on 127.0.0.1 now, below the ports of outgoing connections."""
    while True:
        port = _system_random.randrange(15000, 32000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


class PrivateBroker:
    """One RabbitMQ node on 127.0.0.1 with the user guest (password guest) and the virtual host "/".

    ``config`` is added to its rabbitmq.conf. An object that wasn't started owns nothing yet. All
    methods block, and a broker is used by one thread at a time.

    For nodes that are to be one cluster (``join``): ``address`` and ``port``, where each listens
    for AMQP, and the ``epmd_port`` and ``cookie`` that they share. The last one ends the epmd.
    """

    def __init__(
        self,
        commands: Path,
        *,
        config: str = "",
        name: str | None = None,
        tls: TlsFiles | None = None,
        address: str = "127.0.0.1",
        port: int = 0,
        epmd_port: int = 0,
        cookie: str = "",
    ) -> None:
        self.commands = commands
        self.address = address
        self._given_port, self._given_epmd_port = port, epmd_port
        self._cookie = cookie
        self._short_name = name or f"crq-{_system_random.randrange(16**8):08x}"
        self.node_name = f"{self._short_name}@localhost"
        self.version: tuple[int, ...] = ()  # known once it greeted
        self._config = config
        self._tls = tls
        self._folder: Path | None = None  # from start() to stop()
        self._server: subprocess.Popen[bytes] | None = None  # leader of the node's process group
        self._guard: subprocess.Popen[str] | None = None
        # Chosen as late as possible, by the first start().
        self.port = self.tls_port = self._distribution_port = self._epmd_port = 0

    def __repr__(self) -> str:
        state = "running" if self._server is not None else "stopped"
        return f"<PrivateBroker {self.node_name} {state}, port {self.port}>"

    # Not from StartStop: the guard runs this file alone, and isolated.

    def __enter__(self) -> PrivateBroker:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@{self.address}:{self.port}"

    @property
    def tls_url(self) -> str:
        assert self._tls is not None, "made without tls="
        return f"amqps://guest:guest@127.0.0.1:{self.tls_port}"

    @property
    def folder(self) -> Path:
        assert self._folder is not None, "not started"
        return self._folder

    def start(self) -> None:
        """Returns when the node greets. After ``kill()`` it has the same ports and data as before.

        Raises ``BrokerFailed`` with the end of the log if it doesn't greet within 90 seconds.
        """
        assert self._server is None, "already started"
        fresh = self._folder is None
        for attempts_left in (3, 2, 1, 0):
            try:
                self._start_once()
                return
            except BrokerFailed as exc:
                # Another program may have taken a port since it was chosen. An address that was in
                # use before is kept: clients wait there.
                if not attempts_left or not _PORT_TAKEN.search(str(exc)):
                    if fresh:
                        self.stop()
                    raise
                if fresh:
                    self.stop()
                else:
                    time.sleep(1)  # there is no event for "the port is free again"
            except BaseException:  # Ctrl-C while it starts
                self.stop()
                raise

    def stop(self) -> None:
        """Ends the node and its epmd at once, removes its folder. Stopping twice is fine."""
        if self._folder is None:
            return
        if self._server is not None:
            self.kill()
        _remove_traces(self._epmd_port, self._folder)
        if self._guard is not None:
            self._guard.communicate(timeout=_STOP_TIMEOUT)
            self._guard = None
        self._folder = None
        atexit.unregister(self._stop_at_exit)

    def kill(self) -> None:
        """``kill -9``: connections break, transient data is lost. ``start()`` brings it back."""
        assert self._server is not None, "not started"
        _kill_node(self._server.pid, self._short_name, self._epmd_port, self._server.wait)
        self._server = None
        self._tell_guard(0)

    def shut_down(self) -> None:
        """Ends the node as an operator does, who waits for it. ``start()`` brings it back."""
        assert self._server is not None, "not started"
        self.ctl("stop")
        self._server.wait(_STOP_TIMEOUT)
        self.kill()  # what may be left

    def join(self, other: PrivateBroker) -> None:
        """Makes this node, which nobody has used yet, a member of the other one's cluster."""
        self.ctl("stop_app")
        self.ctl("reset")
        self.ctl("join_cluster", other.node_name)
        self.ctl("start_app")

    def freeze(self) -> None:
        """Holds the node: connections stay open, nothing answers. ``thaw()`` lets it go on."""
        assert self._server is not None, "not started"
        os.killpg(self._server.pid, signal.SIGSTOP)
        # The signal takes effect a moment later, thread by thread.
        deadline = time.monotonic() + _STOP_TIMEOUT
        while _is_running(self._server.pid) and time.monotonic() < deadline:
            time.sleep(0.005)

    def thaw(self) -> None:
        assert self._server is not None, "not started"
        os.killpg(self._server.pid, signal.SIGCONT)

    def ctl(self, *args: str) -> str:
        """Runs ``rabbitmqctl`` against this node (half a second or more) and returns what it wrote.

        Raises ``BrokerFailed`` with the command's messages when it fails.
        """
        command = [str(self.commands / "rabbitmqctl"), "--quiet", *args]
        done = subprocess.run(
            command,
            env=self._environment(),
            cwd="/",
            timeout=_CTL_TIMEOUT,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = "\n".join(text for text in (done.stderr.strip(), done.stdout.strip()) if text)
            raise BrokerFailed(
                f"rabbitmqctl {' '.join(args)}: exit status {done.returncode}\n{said}"
            )
        return done.stdout

    def close_all_connections(self, reason: str) -> None:
        """The broker closes every client's connection, as an operator would do it."""
        self.ctl("close_all_connections", reason)

    def raise_memory_alarm(self) -> None:
        """Returns when every connection, of which there must be one, is held up if it publishes."""
        self.ctl("set_vm_memory_high_watermark", "0.00000001")
        states: set[str] = set()
        while not states or "running" in states:
            states = {row["state"] for row in self.list_connections("state")}

    def end_memory_alarm(self) -> None:
        self.ctl("set_vm_memory_high_watermark", "0.8")

    def list_connections(self, *columns: str) -> list[dict[str, Any]]:
        """``client_properties`` is a dict here; "timeout" is the heartbeat in seconds."""
        default = "name user vhost peer_port state channels timeout client_properties"
        rows = self._list("list_connections", *(columns or default.split()))
        for row in rows:
            if "client_properties" in row:
                properties = row["client_properties"]
                row["client_properties"] = {key: value for key, _type, value in properties}
        return rows

    def list_queues(self, *columns: str, vhost: str = "/") -> list[dict[str, Any]]:
        default = (
            "name exclusive consumers messages messages_ready messages_unacknowledged arguments"
        )
        return self._list("list_queues", "-p", vhost, *(columns or default.split()))

    def list_bindings(self, *columns: str, vhost: str = "/") -> list[dict[str, Any]]:
        default = "source_name destination_name destination_kind routing_key arguments"
        return self._list("list_bindings", "-p", vhost, *(columns or default.split()))

    def list_exchanges(self, *columns: str, vhost: str = "/") -> list[dict[str, Any]]:
        default = "name type durable auto_delete internal arguments"
        return self._list("list_exchanges", "-p", vhost, *(columns or default.split()))

    def _list(self, *args: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.ctl(*args, "--formatter", "json") or "[]")
        return rows

    def choose_ports(self) -> None:
        # All at once, so that they differ.
        ports: set[int] = set()
        while len(ports) < 4:
            ports.add(free_port())
        self.port, self.tls_port, self._distribution_port, self._epmd_port = ports
        self.port = self._given_port or self.port
        self._epmd_port = self._given_epmd_port or self._epmd_port

    def _environment(self) -> dict[str, str]:
        # Such variables of the caller's are meant for another node.
        others = ("RABBITMQ_", "ERL_")
        inherited = {key: v for key, v in os.environ.items() if not key.startswith(others)}
        folder = str(self.folder)
        return {
            **inherited,
            "HOME": folder,  # Erlang's cookie
            "ERL_CRASH_DUMP_SECONDS": "0",  # no dump
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.node_name,
            "RABBITMQ_NODE_IP_ADDRESS": self.address,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/rabbitmq-env.conf",  # empty: not the system's
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{folder}/advanced.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/enabled_plugins",
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOG_BASE": f"{folder}/log",
            "RABBITMQ_PID_FILE": f"{folder}/pid",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2",
            "RABBITMQ_CTL_ERL_ARGS": "+S 1:1",
            # Any free port, not one of the eleven which all rabbitmqctl on this machine share.
            "RABBITMQ_CTL_DIST_PORT_MIN": "0",
            "RABBITMQ_CTL_DIST_PORT_MAX": "0",
        }

    def _start_once(self) -> None:
        if self._folder is None:
            self.choose_ports()
            self._folder = Path(tempfile.mkdtemp(prefix=f"{self._short_name}-", dir="/tmp"))
            self._write_files()
            atexit.register(self._stop_at_exit, os.getpid())
        self._start_guard()
        with (self.folder / "output.log").open("ab") as output:
            log_start = output.tell()
            self._server = subprocess.Popen(
                [str(self.commands / "rabbitmq-server")],
                env=self._environment(),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._tell_guard(self._server.pid)
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            greeting = _greeting(self.address, self.port)
            # Our own node's, not that of another one which took the port a moment ago.
            if f"{self._short_name}@".encode() in greeting:
                self.version = _version_in(greeting)
                self._wait_for_the_rest(log_start)
                return
            status = self._server.poll()
            if status is not None or time.monotonic() > deadline:
                what = (
                    "is not ready in time" if status is None else f"ended with exit status {status}"
                )
                log = self._log_tail()
                self.kill()
                raise BrokerFailed(f"{self.node_name} {what}. The end of its log:\n{log}")
            time.sleep(0.05)

    def _wait_for_the_rest(self, log_start: int) -> None:
        """A moment after its first greeting the node offers TLS and obeys rabbitmqctl."""
        if self._tls is not None:
            _wait_until(lambda: _is_listening(self.tls_port), "its TLS port")
        log = self.folder / "output.log"
        try:
            _wait_until(lambda: b" completed with " in log.read_bytes()[log_start:], "its log", 5)
        except BrokerFailed:
            self.ctl("await_startup")  # takes longer, but doesn't depend on words

    def _write_files(self) -> None:
        folder = self.folder
        tls = ""
        if self._tls is not None:
            for source, name in (
                (self._tls.ca, "ca.pem"),
                (self._tls.certificate, "server.pem"),
                (self._tls.key, "server-key.pem"),
            ):
                shutil.copy(source, folder / name)
            tls = _TLS_CONFIG.format(
                tls_port=self.tls_port,
                folder=folder,
                verify="verify_peer" if self._tls.mutual else "verify_none",
                mutual="true" if self._tls.mutual else "false",
            )
        config = _CONFIG.format(
            address=self.address, port=self.port, tls=tls, folder=folder, config=self._config
        )
        if self._cookie:
            (folder / ".erlang.cookie").write_text(self._cookie)
            (folder / ".erlang.cookie").chmod(0o400)
        (folder / "rabbitmq.conf").write_text(config)
        (folder / "advanced.config").write_text("[].\n")
        (folder / "rabbitmq-env.conf").write_text("")
        (folder / "enabled_plugins").write_text("[].\n")

    def _log_tail(self) -> str:
        texts = [
            (self.folder / name).read_text(errors="replace")[-_LOG_TAIL:]
            for name in ("output.log", "rabbit.log")
            if (self.folder / name).exists()
        ]
        return "\n".join(texts).strip() or "(empty)"

    def _start_guard(self) -> None:
        if self._guard is None:
            self._guard = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    str(Path(__file__).resolve()),
                    "--guard",
                    self._short_name,
                    str(self._epmd_port),
                    str(self.folder),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is not meant for it
                text=True,
            )

    def _tell_guard(self, group: int) -> None:
        assert self._guard is not None
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(f"{group}\n")
            self._guard.stdin.flush()

    def _stop_at_exit(self, owner: int) -> None:
        if os.getpid() == owner:  # not in a forked child
            self.stop()


def _kill_node(
    group: int, name: str, epmd_port: int, wait: Callable[[], object] = lambda: None
) -> None:
    # PermissionError: macOS says so of a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    wait()
    # The leader was a shell. The node itself is gone when epmd has seen its connection close.
    own = f"name {name} at".encode()
    _wait_until(lambda: own not in (_ask_epmd(epmd_port, b"n") or b""), "the end of the node")


def _remove_traces(epmd_port: int, folder: Path) -> None:
    # It stays as long as another node of a cluster needs it, and ends when asked otherwise.
    _wait_until(
        lambda: _ask_epmd(epmd_port, b"n") or _ask_epmd(epmd_port, b"k") is None,
        f"the end of epmd at port {epmd_port}",
    )
    shutil.rmtree(folder, ignore_errors=True)


def _greeting(address: str, port: int) -> bytes:
    """The ``Connection.Start`` frame with which a broker greets, empty if none does."""
    greeting = b""
    with (
        contextlib.suppress(OSError),
        socket.create_connection((address, port), timeout=2) as connection,
    ):
        connection.sendall(b"AMQP\0\0\x09\x01")
        while not greeting.endswith(b"\xce"):  # the end of a frame
            received = connection.recv(4096)
            if not received:
                break
            greeting += received
    # A method frame (1) with class 10, method 10 in it.
    return greeting if greeting[:1] + greeting[7:11] == b"\x01\0\x0a\0\x0a" else b""


def _is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
        return True
    return False


def _version_in(greeting: bytes) -> tuple[int, ...]:
    found = re.search(rb"\x07versionS....(\d+)\.(\d+)\.(\d+)", greeting, re.DOTALL)
    return tuple(int(part) for part in found.groups()) if found else ()


def _ask_epmd(port: int, request: bytes) -> bytes | None:
    """What the Erlang port mapper at the port answers to a request, ``None`` if nobody is there.

    b"n": a line for each node that lives. b"k": it ends, unless a node lives.
    """
    answer = b""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(len(request).to_bytes(2, "big") + request)
            while received := connection.recv(4096):
                answer += received
    except OSError:
        return None
    return answer[4:] if request == b"n" else answer  # names follow the port's number


def _wait_until(condition: Callable[[], object], what: str, timeout: float = _STOP_TIMEOUT) -> None:
    # Of processes that aren't our children and of files nobody tells us: ask again and again.
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise BrokerFailed(f"waited {timeout:g} seconds for {what}")
        time.sleep(0.02)


def _guard(name: str, epmd_port: int, folder: Path) -> None:
    """Waits until the owner is gone, then removes the node whose process group it named last."""
    group = 0
    for line in sys.stdin:
        group = int(line)
    if group:
        _kill_node(group, name, epmd_port)
    _remove_traces(epmd_port, folder)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--guard"]:
        sys.exit(__doc__)
    _guard(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
