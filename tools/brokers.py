"""Finding or getting a RabbitMQ: the ways are tried in the order of ``WAYS``, below.

Each way is a function that returns a ``Broker``, or ``None`` where this machine doesn't offer it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from tools import root_rights
from tools.private_broker import BrokerFailed, PrivateBroker, find_broker_commands, free_port
from tools.start_stop import StartStop

_DOCKER_IMAGE = "rabbitmq:4"
_DOCKER_START_TIMEOUT = 90.0  # seconds, after the image has been pulled

_HELP = """\
No RabbitMQ was found. Any of these will do:
- RABBITMQ_URL=amqp://user:password@host:port/vhost names one that runs;
- RABBITMQ_BIN=/some/folder, PATH or Debian's /usr/lib/rabbitmq/bin holds the commands
  rabbitmq-server and rabbitmqctl;
- Docker runs on this machine, and you may use it;
- on Debian or Ubuntu: be root, or have sudo without a password, and apt-get installs it;
- on macOS: Homebrew installs it."""


class NoBroker(RuntimeError):
    """No RabbitMQ, by any way; the text says what would help."""


class Broker(StartStop):
    """A RabbitMQ for as long as it is entered (``with broker:``)."""

    url = ""  # known once it is entered
    description = ""

    def start(self) -> None:
        """Returns when it takes connections; raises ``NoBroker`` if it won't."""

    def stop(self) -> None:
        """Leaves nothing behind. May be called at any time, and twice."""

    def variables(self) -> dict[str, str]:
        """The environment variables by which the test suite finds this RabbitMQ."""
        return {"RABBITMQ_URL": self.url}

    can_restart = False

    def restart(self) -> None:
        raise NotImplementedError


class GivenBroker(Broker):
    """The one that ``RABBITMQ_URL`` names. It isn't ours: it runs already and goes on running."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            parts = urlsplit(url)
            default_port = 5671 if parts.scheme == "amqps" else 5672
            self._address = (parts.hostname or "127.0.0.1", parts.port or default_port)
        except ValueError:  # its text could hold a part of the password
            raise NoBroker("RABBITMQ_URL: not a URL") from None
        # Without the password.
        self.description = f"the one at {self._address[0]}:{self._address[1]} (RABBITMQ_URL)"

    def start(self) -> None:
        try:
            socket.create_connection(self._address, timeout=10).close()
        except OSError as exc:
            raise NoBroker(f"RABBITMQ_URL: nobody answers at {self._address}: {exc}") from exc


class PrivateNode(Broker):
    """A node of our own, started with the commands in the given folder."""

    can_restart = True

    def __init__(self, commands: Path) -> None:
        self.commands = commands
        self._node = PrivateBroker(commands)
        self.url = self._node.url

    def start(self) -> None:
        try:
            self._node.start()
        except BrokerFailed as exc:
            raise NoBroker(str(exc)) from exc
        self.url = self._node.url
        version = ".".join(str(part) for part in self._node.version)
        self.description = f"a private node, version {version}, at port {self._node.port}"

    def stop(self) -> None:
        self._node.stop()

    def restart(self) -> None:
        self._node.kill()
        self._node.start()

    def variables(self) -> dict[str, str]:
        # The tests start and break nodes of their own.
        return {"RABBITMQ_BIN": str(self.commands)}


class DockerContainer(Broker):
    """A container, removed at the end."""

    can_restart = True

    def __init__(self) -> None:
        self._port = free_port()
        self._name = f"channels-rabbitmq-{secrets.token_hex(4)}"
        self.url = f"amqp://guest:guest@127.0.0.1:{self._port}"
        self.description = f"a Docker container of {_DOCKER_IMAGE} at port {self._port}"

    def start(self) -> None:
        print(f"Starting {_DOCKER_IMAGE} in Docker...", flush=True)
        published = f"127.0.0.1:{self._port}:5672"
        _run("docker", "run", "-d", "--rm", "--name", self._name, "-p", published, _DOCKER_IMAGE)
        self._wait_for_greeting()

    def stop(self) -> None:
        # With its volume; there is no such container if it was never started.
        subprocess.run(
            ["docker", "rm", "--force", "--volumes", self._name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )

    def restart(self) -> None:
        _run("docker", "restart", "--time", "1", self._name)
        self._wait_for_greeting()

    def _wait_for_greeting(self) -> None:
        # Docker takes connections to a published port before anybody listens in the container.
        deadline = time.monotonic() + _DOCKER_START_TIMEOUT
        while not self._greets():
            if time.monotonic() > deadline:
                log = subprocess.run(["docker", "logs", self._name], capture_output=True, text=True)
                raise NoBroker(f"RabbitMQ in Docker doesn't answer:\n{log.stdout[-2000:]}")
            time.sleep(0.2)

    def _greets(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), timeout=2) as connection:
                connection.sendall(b"AMQP\0\0\x09\x01")
                return connection.recv(1) == b"\x01"  # a method frame: Connection.Start
        except OSError:
            return False


def _run(*command: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise NoBroker(f"{' '.join(command[:2])}: {done.stderr.strip()}")


def given() -> Broker | None:
    url = os.environ.get("RABBITMQ_URL")
    return GivenBroker(url) if url else None


def installed() -> Broker | None:
    try:
        commands = find_broker_commands()
    except FileNotFoundError as exc:
        raise NoBroker(str(exc)) from exc
    return PrivateNode(commands) if commands else None


def docker() -> Broker | None:
    """Docker, if its engine answers and has the image or can pull it."""
    if shutil.which("docker") is None:
        return None
    try:
        _run("docker", "version", "--format", "{{.Server.Version}}")
    except NoBroker:
        return None
    try:
        _run("docker", "image", "inspect", _DOCKER_IMAGE)
    except NoBroker:
        print(f"Pulling {_DOCKER_IMAGE} with Docker...", flush=True)
        try:
            _run("docker", "pull", "--quiet", _DOCKER_IMAGE)
        except NoBroker as exc:
            print(exc, file=sys.stderr)
            return None
    return DockerContainer()


def apt() -> Broker | None:
    if not root_rights.may_install() or not root_rights.install("rabbitmq-server"):
        return None
    return installed()


def homebrew() -> Broker | None:
    if sys.platform != "darwin" or shutil.which("brew") is None:
        return None
    print("Installing rabbitmq with Homebrew...", flush=True)
    if subprocess.run(["brew", "install", "--quiet", "rabbitmq"]).returncode:
        return None
    return installed()


WAYS = (given, installed, docker, apt, homebrew)


def get_broker() -> Broker:
    """A RabbitMQ by the first way that works here. Raises ``NoBroker``."""
    for way in WAYS:
        broker = way()
        if broker is not None:
            return broker
    raise NoBroker(_HELP)
