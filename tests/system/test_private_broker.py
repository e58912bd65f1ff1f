"""Private nodes come up, obey and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pika  # type: ignore[import-untyped]  # has no annotations
import pytest

from tools import private_broker as module
from tools.private_broker import (
    BrokerFailed,
    PrivateBroker,
    TlsFiles,
    find_broker_commands,
    free_port,
)

ROOT = Path(__file__).parents[2]


def wait_until(condition: Callable[[], bool]) -> None:
    """For what ends outside of this process, of which nobody tells us."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def processes_with(folder: Path) -> list[str]:
    """The command lines of processes which were started with this folder in their environment."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("only Linux shows the environment of other processes")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.fsencode(folder) in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def assert_nothing_left(broker: PrivateBroker, folder: Path) -> None:
    assert not folder.exists()
    assert not any(map(is_listening, (broker.port, broker.tls_port)))
    # The port programs of Erlang end a moment after the node, by themselves.
    wait_until(lambda: not processes_with(folder))


@contextlib.contextmanager
def connect(broker: PrivateBroker) -> Iterator[pika.BlockingConnection]:
    connection = pika.BlockingConnection(pika.URLParameters(broker.url))
    try:
        yield connection
    finally:
        if connection.is_open:
            connection.close()


@pytest.fixture
def commands_in(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder with RabbitMQ's commands in it."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for command in ("rabbitmq-server", "rabbitmqctl"):
            (folder / command).write_text("#!/bin/sh\n")
            (folder / command).chmod(0o755)
        return folder

    return make


def test_named_folder_wins(
    monkeypatch: pytest.MonkeyPatch, commands_in: Callable[[str], Path]
) -> None:
    monkeypatch.setenv("PATH", str(commands_in("path")), prepend=os.pathsep)
    monkeypatch.setenv("RABBITMQ_BIN", str(commands_in("named")))
    assert find_broker_commands() == commands_in("x").parent / "named"


def test_named_folder_without_commands_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RABBITMQ_BIN", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="RABBITMQ_BIN: no rabbitmq-server and rabbitmqctl"):
        find_broker_commands()


def test_path_is_searched_and_wrappers_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, commands_in: Callable[[str], Path]
) -> None:
    wrappers = tmp_path / "sbin"
    wrappers.mkdir()
    (tmp_path / "rabbitmq-script-wrapper").write_text("#!/bin/sh\n")
    (tmp_path / "rabbitmq-script-wrapper").chmod(0o755)
    for command in ("rabbitmq-server", "rabbitmqctl"):
        (wrappers / command).symlink_to(tmp_path / "rabbitmq-script-wrapper")
    monkeypatch.delenv("RABBITMQ_BIN", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join(["", str(wrappers), str(commands_in("real"))]))
    assert find_broker_commands() == tmp_path / "real"


def test_no_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RABBITMQ_BIN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "COMMAND_FOLDERS", ())
    assert find_broker_commands() is None


def test_free_ports_are_not_those_of_outgoing_connections() -> None:
    for port in {free_port() for _ in range(20)}:
        assert 15000 <= port < 32000


def test_unstarted_broker_owns_nothing(tmp_path: Path) -> None:
    broker = PrivateBroker(tmp_path)
    broker.stop()
    assert "stopped" in repr(broker)


def test_start_and_stop(private_broker_factory: Callable[..., PrivateBroker]) -> None:
    broker = private_broker_factory()
    other = private_broker_factory(name="crq-other")
    folder = broker.folder
    assert folder.match("/tmp/crq-*")
    assert broker.version >= (3, 8)
    assert broker.node_name.startswith("crq-")
    assert broker.node_name.endswith("@localhost")
    assert other.node_name == "crq-other@localhost"
    with connect(broker), connect(other):
        pass
    assert processes_with(folder)

    broker.stop()
    assert_nothing_left(broker, folder)
    broker.stop()
    with connect(other):  # untouched
        pass


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has 127.0.0.1 only")
def test_nodes_may_share_an_epmd_which_ends_with_the_last_one(
    private_broker_factory: Callable[..., PrivateBroker],
) -> None:
    shared = {"port": free_port(), "epmd_port": free_port(), "cookie": "secret"}
    one = private_broker_factory(address="127.0.0.1", **shared)
    two = private_broker_factory(address="127.0.0.2", **shared)
    assert one.url.replace("127.0.0.1", "127.0.0.2") == two.url
    assert is_listening(shared["epmd_port"])
    folders = [one.folder, two.folder]
    one.shut_down()
    with connect(two):
        pass
    one.start()
    with connect(one):
        pass
    one.stop()
    with connect(two):
        pass
    two.stop()
    assert not is_listening(shared["epmd_port"])
    for broker, folder in zip((one, two), folders, strict=True):
        assert_nothing_left(broker, folder)


def test_killed_node_comes_back_with_its_address_and_data(private_broker: PrivateBroker) -> None:
    broker = private_broker
    address = broker.url
    with connect(broker) as connection:
        connection.channel().queue_declare("kept", durable=True)
        if broker.version < (4, 2):  # Mnesia: RabbitMQ answers before it has written it.
            broker.ctl("eval", "ok = mnesia:sync_log().")
        broker.kill()
        with pytest.raises(pika.exceptions.AMQPConnectionError):
            connection.process_data_events(time_limit=5)
    assert not is_listening(broker.port)
    broker.start()
    assert broker.url == address
    with connect(broker) as connection:
        connection.channel().queue_declare("kept", passive=True)


def test_frozen_node_is_silent_until_it_thaws(private_broker: PrivateBroker) -> None:
    folder = private_broker.folder
    with socket.create_connection(("127.0.0.1", private_broker.port)) as connection:
        private_broker.freeze()
        connection.sendall(b"AMQP\0\0\x09\x01")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        private_broker.thaw()
        connection.settimeout(10)
        assert connection.recv(1) == b"\x01"
    private_broker.freeze()
    private_broker.stop()  # frozen as it is
    assert_nothing_left(private_broker, folder)


def test_control(private_broker: PrivateBroker) -> None:
    parameters = pika.URLParameters(private_broker.url)
    parameters.client_properties = {"connection_name": "somebody"}
    connection = pika.BlockingConnection(parameters)
    amqp_channel = connection.channel()
    amqp_channel.exchange_declare("groups", "direct")
    amqp_channel.queue_declare("mine", exclusive=True)
    amqp_channel.queue_bind("mine", "groups", "key")

    [listed] = private_broker.list_connections()
    assert listed["user"] == "guest"
    assert listed["client_properties"]["connection_name"] == "somebody"
    [queue] = private_broker.list_queues()
    assert (queue["name"], queue["exclusive"], queue["messages"]) == ("mine", True, 0)
    bindings = private_broker.list_bindings("source_name", "destination_name", "routing_key")
    assert {"source_name": "groups", "destination_name": "mine", "routing_key": "key"} in bindings
    exchanges = {row["name"]: row["type"] for row in private_broker.list_exchanges()}
    assert exchanges["groups"] == "direct"

    with pytest.raises(BrokerFailed, match="rabbitmqctl set_nothing: exit status"):
        private_broker.ctl("set_nothing")

    private_broker.close_all_connections("for a test")
    with pytest.raises(pika.exceptions.ConnectionClosedByBroker, match="for a test"):
        connection.process_data_events(time_limit=10)


def test_taken_port_is_replaced(
    private_broker_factory: Callable[..., PrivateBroker], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[socket.socket] = []

    def port_somebody_takes() -> int:
        port = free_port()
        if not taken:
            taken.append(socket.create_server(("127.0.0.1", port)))
            taken[0].settimeout(0)
        return port

    monkeypatch.setattr(PrivateBroker, "choose_ports", _ports_from(port_somebody_takes))
    broker = private_broker_factory()
    assert broker.port != taken[0].getsockname()[1]
    with connect(broker):
        pass
    taken[0].close()


def _ports_from(make: Callable[[], int]) -> Callable[[PrivateBroker], None]:
    def choose(broker: PrivateBroker) -> None:
        broker.port, broker.tls_port, broker._distribution_port, broker._epmd_port = (
            make() for _ in range(4)
        )

    return choose


def test_failed_start_tells_why_and_leaves_nothing(
    private_broker_factory: Callable[..., PrivateBroker],
) -> None:
    name = f"crq-{secrets.token_hex(4)}"
    with pytest.raises(BrokerFailed, match=r"(?s)ended with exit status.*no_such_setting"):
        private_broker_factory(name=name, config="no_such_setting = 1")
    assert not list(Path("/tmp").glob(f"{name}-*"))


# Whatever happens to its owner

OWNER = """
import os, sys, time
from tools.private_broker import PrivateBroker, find_broker_commands

broker = PrivateBroker(find_broker_commands())
broker.start()
print(broker.port, broker.folder, flush=True)
"""


@contextlib.contextmanager
def owner_that(does: str) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """Another Python which starts a broker and then does something."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER + does],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        port, folder = process.stdout.readline().split()
        yield process, int(port), Path(folder)


@pytest.mark.usefixtures("private_broker_factory")  # skips where there can't be one
def test_node_ends_with_its_owner() -> None:
    with owner_that("sys.stdin.read()") as (owner, port, folder):
        assert is_listening(port)
        owner.kill()
    wait_until(lambda: not folder.exists())
    assert not is_listening(port)
    wait_until(lambda: not processes_with(folder))


@pytest.mark.usefixtures("private_broker_factory")  # skips where there can't be one
def test_node_is_stopped_at_exit_but_not_by_a_forked_child() -> None:
    fork = """
child = os.fork()
if child:
    os.waitpid(child, 0)
    print("child has ended", flush=True)
    sys.stdin.readline()
"""
    with owner_that(fork) as (owner, port, folder):
        assert owner.stdout is not None
        assert owner.stdout.readline() == "child has ended\n"
        assert is_listening(port)
        owner.communicate("\n")
        assert owner.returncode == 0
        assert not folder.exists()
    assert not is_listening(port)


# TLS


def handshake(broker: PrivateBroker, context: ssl.SSLContext) -> bytes:
    """The first byte of the broker's greeting."""
    with (
        socket.create_connection(("127.0.0.1", broker.tls_port), timeout=10) as tcp,
        context.wrap_socket(tcp, server_hostname="localhost") as tls,
    ):
        tls.sendall(b"AMQP\0\0\x09\x01")
        return tls.recv(1)


def test_tls(private_broker_factory: Callable[..., PrivateBroker], certs: Path) -> None:
    broker = private_broker_factory(tls=TlsFiles.in_folder(certs, mutual=True))

    def context(name: str | None) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=certs / "ca.pem")
        if name:
            made.load_cert_chain(certs / f"{name}.pem", certs / f"{name}-key.pem")
        return made

    assert broker.tls_url == f"amqps://guest:guest@127.0.0.1:{broker.tls_port}"
    assert handshake(broker, context("client")) == b"\x01"
    with connect(broker):  # without TLS as well
        pass
    for unknown in (None, "wrong-client"):
        # With TLS 1.3 the refusal comes after the client's side of the handshake.
        with pytest.raises((ssl.SSLError, ConnectionError)):
            handshake(broker, context(unknown))


@pytest.mark.slow
def test_certificates_are_made_once(tmp_path: Path) -> None:
    def prepare() -> str:
        script = ROOT / "ssl" / "prepare-certs.sh"
        done = subprocess.run([script, tmp_path], check=True, capture_output=True, text=True)
        return done.stdout

    assert "certificates made" in prepare()
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert prepare() == ""
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    (tmp_path / "client.pem").unlink()
    assert "certificates made" in prepare()
    assert (tmp_path / "client.pem").exists()
