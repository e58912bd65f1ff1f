"""The demo: how it gets a RabbitMQ, that it starts, survives a broker's restart, ends cleanly."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin

from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.presence import GroupMembers, Member
from tests.support.brokers import Broker
from tests.support.changes import Changes
from tools import brokers, root_rights
from tools.brokers import DockerContainer, GivenBroker, NoBroker, PrivateNode
from tools.control import TOKEN_HEADER, Control
from tools.private_broker import PrivateBroker
from tools.processes import children, is_alive
from tools.servers import running_servers, two_ports

ROOT = Path(__file__).parents[2]

_PATIENCE = 120.0  # seconds for which a page waits: delays to reconnect, on a busy machine


# How it gets a RabbitMQ


class Machine:
    """A pretended machine: nothing is on PATH but the commands made here.

    Above all no apt-get that really installs something.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._log = folder / "calls.log"
        for name in ("chmod", "dirname", "grep", "ls", "rm", "sh", "touch", "tr", "true"):
            path = shutil.which(name)
            assert path is not None
            (folder / name).symlink_to(path)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.delenv("RABBITMQ_URL", raising=False)
        monkeypatch.setattr(brokers, "find_broker_commands", self._find_broker_commands)
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(os, "geteuid", lambda: 1000)

    def add_command(self, name: str, script: str = "") -> None:
        """A command that notes its call, then does what the script says."""
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{self._log}"\n{script}\n')
        path.chmod(0o755)

    def install_rabbitmq(self) -> None:
        self.add_command("rabbitmq-server")

    def be_root(self) -> None:
        self._monkeypatch.setattr(os, "geteuid", lambda: 0)

    @property
    def calls(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    def _find_broker_commands(self) -> Path | None:
        return self.folder if (self.folder / "rabbitmq-server").exists() else None


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(root_rights, "POLICY", str(tmp_path / "policy-rc.d"))
    (tmp_path / "units").mkdir()
    monkeypatch.setattr(root_rights, "UNITS", str(tmp_path / "units"))
    return Machine(folder, monkeypatch)


# What apt-get and brew do on the pretended machine.
INSTALLS = 'case "$*" in *rabbitmq*) touch "$(dirname "$0")/rabbitmq-server";; esac'


class TestGetBroker:
    def test_rabbitmq_url_comes_first(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        machine.install_rabbitmq()
        machine.add_command("docker")
        monkeypatch.setenv("RABBITMQ_URL", "amqp://me:secret@example.com:1234/some")
        broker = brokers.get_broker()
        assert isinstance(broker, GivenBroker)
        assert broker.url == "amqp://me:secret@example.com:1234/some"
        assert "example.com:1234" in broker.description
        assert "secret" not in broker.description

    def test_installed_commands_come_before_docker(self, machine: Machine) -> None:
        machine.install_rabbitmq()
        machine.add_command("docker")
        broker = brokers.get_broker()
        assert isinstance(broker, PrivateNode)
        assert broker.commands == machine.folder
        assert machine.calls == []

    def test_docker_comes_before_apt(self, machine: Machine) -> None:
        machine.be_root()
        machine.add_command("docker")
        machine.add_command("apt-get", INSTALLS)
        assert isinstance(brokers.get_broker(), DockerContainer)
        assert not any(call.startswith("apt-get") for call in machine.calls)

    def test_docker_pulls_a_missing_image(self, machine: Machine) -> None:
        machine.add_command("docker", '[ "$1" != image ]')
        assert isinstance(brokers.get_broker(), DockerContainer)
        assert machine.calls[-1].startswith("docker pull")

    @pytest.mark.parametrize(
        "docker",
        [
            pytest.param("exit 1", id="no engine"),
            pytest.param('[ "$1" = version ]', id="no image"),
        ],
    )
    def test_docker_that_does_not_work_is_passed_over(self, machine: Machine, docker: str) -> None:
        machine.be_root()
        machine.add_command("docker", docker)
        machine.add_command("apt-get", INSTALLS)
        assert isinstance(brokers.get_broker(), PrivateNode)

    def test_apt_as_root(self, machine: Machine) -> None:
        machine.be_root()
        machine.add_command("apt-get", INSTALLS)
        assert isinstance(brokers.get_broker(), PrivateNode)
        update, install = (call for call in machine.calls if call.startswith("apt-get"))
        assert "update" in update
        assert install.endswith(" rabbitmq-server")

    def test_apt_by_sudo_without_a_password(self, machine: Machine) -> None:
        machine.add_command("sudo", '[ "$1" = -n ] && shift && exec "$@"')
        machine.add_command("apt-get", INSTALLS)
        assert isinstance(brokers.get_broker(), PrivateNode)

    def test_sudo_that_asks_for_a_password_is_passed_over(self, machine: Machine) -> None:
        machine.add_command("sudo", "exit 1")
        machine.add_command("apt-get", INSTALLS)
        with pytest.raises(NoBroker):
            brokers.get_broker()

    def test_homebrew_on_macos(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        machine.add_command("brew", INSTALLS)
        monkeypatch.setattr(sys, "platform", "darwin")
        assert isinstance(brokers.get_broker(), PrivateNode)
        assert machine.calls == ["brew install --quiet rabbitmq"]

    def test_nothing_at_all_names_every_way(self, machine: Machine) -> None:
        with pytest.raises(NoBroker) as caught:
            brokers.get_broker()
        for way in ("RABBITMQ_URL", "RABBITMQ_BIN", "Docker", "apt-get", "Homebrew"):
            assert way in str(caught.value)

    def test_wrong_rabbitmq_bin_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever names a folder means that one, not whatever else is found."""
        monkeypatch.delenv("RABBITMQ_URL", raising=False)
        monkeypatch.setenv("RABBITMQ_BIN", str(tmp_path))
        with pytest.raises(NoBroker, match="RABBITMQ_BIN"):
            brokers.get_broker()


@pytest.mark.parametrize(
    "url", ["amqp://me:secret@127.0.0.1:1", "amqp://me:secret@127.0.0.1:x", "amqp://[secret"]
)
def test_unreachable_url_is_an_error_without_the_password(url: str) -> None:
    with pytest.raises(NoBroker, match="RABBITMQ_URL") as caught:
        GivenBroker(url).start()
    assert "secret" not in str(caught.value)


class TestInstall:
    """apt-get, as root, on the pretended machine."""

    @pytest.fixture
    def policy(self, machine: Machine) -> Path:
        machine.be_root()
        return Path(root_rights.POLICY)

    def test_services_are_kept_from_starting(self, machine: Machine, policy: Path) -> None:
        machine.add_command("apt-get", f'"{policy}"; echo "policy $?" >> "{policy}.seen"')
        assert root_rights.install("some-package")
        assert Path(f"{policy}.seen").read_text().splitlines()[-1] == "policy 101"
        assert not policy.exists()

    def test_policy_is_removed_after_a_failure(self, machine: Machine, policy: Path) -> None:
        machine.add_command("apt-get", "exit 100")
        assert not root_rights.install("some-package")
        assert not policy.exists()

    def test_policy_of_the_machine_is_left_alone(self, machine: Machine, policy: Path) -> None:
        policy.write_text("the owner's")
        machine.add_command("apt-get")
        assert root_rights.install("some-package")
        assert policy.read_text() == "the owner's"

    def test_new_services_are_kept_from_starting_with_the_machine(
        self, machine: Machine, policy: Path
    ) -> None:
        units = Path(root_rights.UNITS)
        (units / "epmd.service").touch()
        new = [units / "rabbitmq-server.service", units / "logrotate.timer"]
        machine.add_command("apt-get", f'touch "{new[0]}" "{new[1]}"')
        machine.add_command("systemctl")
        assert root_rights.install("some-package")
        disabled = [call for call in machine.calls if "disable" in call]
        assert disabled == ["systemctl disable rabbitmq-server.service"]

    def test_without_systemd_too(self, machine: Machine, policy: Path) -> None:
        units = Path(root_rights.UNITS)
        machine.add_command("apt-get", f'touch "{units}/rabbitmq-server.service"')
        machine.add_command("update-rc.d")
        assert root_rights.install("some-package")
        assert machine.calls[-1] == "update-rc.d rabbitmq-server disable"


class TestDockerContainer:
    @pytest.fixture
    def greeter(self) -> Iterator[Callable[[int], None]]:
        """Starts what greets like RabbitMQ at a port; the first connection is just closed."""
        with closing(socket.socket()) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

            def greet() -> None:
                listener.accept()[0].close()
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(8) == b"AMQP\0\0\x09\x01"
                    connection.sendall(b"\x01\0\0")

            thread = threading.Thread(target=greet)

            def start(port: int) -> None:
                listener.bind(("127.0.0.1", port))
                listener.listen()
                thread.start()

            yield start
            thread.join()

    def test_starts_and_removes_a_container(
        self, machine: Machine, greeter: Callable[[int], None]
    ) -> None:
        machine.add_command("docker")
        broker = DockerContainer()
        port = int(broker.url.rpartition(":")[2])
        greeter(port)
        with broker:
            run = machine.calls[-1].split()
            assert run[:2] == ["docker", "run"]
            assert f"127.0.0.1:{port}:5672" in run
            name = run[run.index("--name") + 1]
        assert machine.calls[-1] == f"docker rm --force --volumes {name}"

    def test_removes_what_failed_to_start(self, machine: Machine) -> None:
        machine.add_command("docker", '[ "$1" != run ] || { echo "no room left" >&2; exit 125; }')
        with pytest.raises(NoBroker, match="no room left"), DockerContainer():
            pytest.fail("not reached")
        assert machine.calls[-1].startswith("docker rm")


def test_ports_in_use_are_not_taken() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        first, second = two_ports(taken)
    assert len({first, second, taken}) == 3


# The whole command


class Demo:
    """``scripts/demo`` in a process of its own, on the broker of this run."""

    def __init__(self, url: str, temporary: Path) -> None:
        self.process = subprocess.Popen(
            # The environment of this test run has everything; don't make another one.
            [ROOT / "scripts" / "demo", "--python", sys.executable],
            env={**os.environ, "RABBITMQ_URL": url, "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.output = ""
        for line in self.process.stdout:
            self.output += line
            if "Ctrl-C" in line:  # the last line it prints
                break
        self.page, *self.addresses = re.findall(r"http://127\.0\.0\.1:\d+", self.output)

    def servers(self) -> list[int]:
        """Process ids."""
        return children(self.process.pid, "uvicorn")

    def wait(self) -> int:
        self.output += self.process.communicate(timeout=30)[0]
        return self.process.returncode


@pytest.fixture
def demo(broker: Broker, tmp_path: Path) -> Iterator[Demo]:
    started = Demo(broker.url, tmp_path)
    yield started
    if started.process.poll() is None:
        started.process.send_signal(signal.SIGTERM)
        started.process.wait(30)
    assert started.process.stdout is not None
    started.process.stdout.close()


def get(url: str) -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as response:
        return response.status, response.read().decode()


class Page:
    """What a person in the room sees now.

    It listens all the time, as a browser does: what the server said some seconds ago, while a test
    did something else, must not be taken for what it says now.
    """

    def __init__(self, websocket: ClientConnection) -> None:
        self._websocket = websocket
        self._changes = Changes()
        self.room_is_up = False
        self.people: list[str] = []
        self.messages: list[str] = []  # also those that weren't delivered, with the reason
        self.listening = asyncio.create_task(self._listen())
        self.listening.add_done_callback(lambda task: self._changes.notify())

    async def _listen(self) -> None:
        """Until the connection ends, whichever side ends it."""
        with suppress(ConnectionClosed):
            while True:
                self._note(json.loads(await self._websocket.recv()))
                self._changes.notify()

    def _note(self, message: dict[str, Any]) -> None:
        match message:
            case {"type": "room", "up": bool(up)}:
                self.room_is_up = up
            case {"type": "people", "people": list(people)}:
                self.people = [person["name"] for person in people]
            case {"type": "message", "text": str(said)}:
                self.messages.append(said)
            case {"type": "not_delivered", "reason": str(reason)}:
                self.messages.append(f"(not delivered: {reason})")

    async def until(self, is_it: Callable[[Page], bool]) -> None:
        await self._changes.until(lambda: is_it(self) or self.listening.done(), timeout=_PATIENCE)
        if self.listening.done():
            self.listening.result()
        assert is_it(self), "the connection has ended"

    async def say(self, text: str) -> None:
        await self._websocket.send(json.dumps({"type": "say", "id": "1", "text": text}))


@asynccontextmanager
async def open_page(address: str, room: str, name: str) -> AsyncIterator[Page]:
    url = f"ws{address.removeprefix('http')}/ws/{room}/"
    async with connect(url, origin=Origin(address), proxy=None) as websocket:
        await websocket.send(json.dumps({"type": "introduce", "name": name}))
        page = Page(websocket)
        yield page
    await page.listening


def both_are_within_reach(page: Page) -> bool:
    """On a very busy machine the room may be up without those who were silent for too long."""
    return page.room_is_up and page.people == ["Ada", "Grace"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_demo_serves_two_addresses_and_ends_without_a_trace(
    demo: Demo,
    broker: Broker,
    open_layer: Callable[..., Awaitable[RabbitmqChannelLayer]],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    # On a busy machine rabbitmqctl has been seen to list nothing at all, twice in a row. It is
    # asked again as long as this one's queues aren't there.
    witness = await open_layer()
    await witness.connect()
    assert len(demo.addresses) == 2
    for address, other in (demo.addresses, demo.addresses[::-1]):
        status, page = get(f"{address}/room/lobby/")
        assert status == 200
        assert f'href="{other}/room/lobby/"' in page
        for script in re.findall(r'(?:src|href)="(/static/[^"]+)"', page):
            assert get(address + script)[0] == 200

    room = secrets.token_hex(8)
    async with (
        open_page(demo.addresses[0], room, "Ada") as ada,
        open_page(demo.addresses[1], room, "Grace") as grace,
    ):
        await ada.until(both_are_within_reach)
        await grace.until(both_are_within_reach)
        queues = of_connected_processes(await queues_besides(witness, broker))
        assert len(queues) >= 4 or broker.private is None  # with its lease's, two a process
        servers = demo.servers()
        assert len(servers) == 2
        # With pages open: they must not keep it from ending.
        demo.process.send_signal(number)
        assert await asyncio.to_thread(demo.wait) == 0

    assert not any(is_alive(pid) for pid in servers)
    for address in demo.addresses:
        with pytest.raises(OSError, match="refused"):
            get(address)
    assert not queues & await queues_besides(witness, broker)
    assert list(tmp_path.iterdir()) == []


def of_connected_processes(queues: set[str]) -> set[str]:
    """Without the leases that processes of earlier tests have left: those end by themselves."""
    ids = {name.split(".")[1] for name in queues if not name.endswith(".lease")}
    return {name for name in queues if name.split(".")[1] in ids}


async def queues_besides(witness: RabbitmqChannelLayer, broker: Broker) -> set[str]:
    """The names of those that other channel layers have, as far as we may ask."""
    if broker.private is None:
        return set()
    [loop_layer] = witness.statistics()
    own: set[str] = set()
    while not own:
        listed = await asyncio.to_thread(broker.private.list_queues, "name")
        names = {row["name"] for row in listed}
        own = {name for name in names if name.startswith(loop_layer.id)}
    return {name for name in names - own if name.startswith("crq.")}


class DemoWindow:
    """One of the windows of the demo's page: what it has received, by the number."""

    def __init__(self, websocket: ClientConnection) -> None:
        self._websocket = websocket
        self.received: list[int] = []

    async def send(self, **message: Any) -> None:
        await self._websocket.send(json.dumps(message))

    async def until_received(self, last: int) -> None:
        while last not in self.received:
            message = json.loads(await self._websocket.recv())
            if message["type"] == "received":
                self.received += [number for _, number, _, _ in message["messages"]]


@asynccontextmanager
async def open_window(demo: Demo, page: str, number: int) -> AsyncIterator[DemoWindow]:
    address = demo.addresses[0 if number < 3 else 1]
    url = f"ws{address.removeprefix('http')}/demo/{page}/{number}/"
    async with connect(url, origin=Origin(demo.page), proxy=None) as websocket:
        welcome = json.loads(await websocket.recv())
        assert welcome["type"] == "welcome"
        yield DemoWindow(websocket)


@pytest.mark.slow
async def test_windows_of_the_page(demo: Demo) -> None:
    """A burst comes in order; one consumer hangs for a while; a killed process comes back."""
    page = secrets.token_hex(8)
    async with (
        open_window(demo, page, 1) as one,
        open_window(demo, page, 3) as three,
        open_window(demo, page, 4) as four,
    ):
        await one.send(type="burst", sender="1.1", first=0, count=500)
        for window in (one, three, four):
            await window.until_received(499)
            assert window.received == list(range(500))

        await three.send(type="freeze", window=4, on=True)
        await three.send(type="say", sender="3.1", number=500, text="Cold?")
        for window in (one, three):
            await window.until_received(500)
        thawed = asyncio.create_task(four.until_received(500))
        await three.send(type="say", sender="3.1", number=501, text="Still?")
        await three.until_received(501)
        assert not thawed.done()
        await three.send(type="freeze", window=4, on=False)
        await thawed

        before = demo.servers()
        await asyncio.to_thread(post, demo.page, "/kill-1", token_of(demo.page))
        with pytest.raises(ConnectionClosed):
            await four.until_received(1000)
        await one.send(type="say", sender="1.1", number=502, text="I'm still here.")
        await one.until_received(502)
        async with reopened_window(demo, page, 3) as three:
            await three.send(type="say", sender="3.2", number=503, text="So am I.")
            await one.until_received(503)
        [survivor] = set(before) & set(demo.servers())
        assert survivor == before[0]


@asynccontextmanager
async def reopened_window(demo: Demo, page: str, number: int) -> AsyncIterator[DemoWindow]:
    """As a page does it: again and again, until the process is back."""
    while True:
        with suppress(OSError):
            async with open_window(demo, page, number) as window:
                yield window
            return
        await asyncio.sleep(0.1)


@pytest.mark.slow
def test_demo_ends_if_a_server_ends_by_itself(demo: Demo) -> None:
    ended, other = demo.servers()
    os.kill(ended, signal.SIGINT)  # an orderly end, with exit status 0
    assert demo.wait() == 1
    assert "ended with exit status 0" in demo.output
    assert "Uvicorn running" in demo.output  # from its log
    assert not is_alive(other)


# The page's buttons


def token_of(page: str) -> str:
    found = re.search('data-token="([^"]+)"', get(page + "/")[1])
    assert found is not None
    return found[1]


def post(address: str, path: str, token: str = "", **headers: str) -> int:
    """Returns the status. As the page's own script does it, but for what headers say."""
    sent = {"Host": address.removeprefix("http://"), "Origin": address, TOKEN_HEADER: token}
    request = urllib.request.Request(address + path, method="POST", headers={**sent, **headers})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


class TestControl:
    @pytest.fixture
    def calls(self) -> list[str]:
        return []

    @pytest.fixture
    def control(self, calls: list[str]) -> Iterator[Control]:
        actions = {"break": lambda: calls.append("break"), "fail": lambda: 1 / 0}
        with Control(["http://127.0.0.1:8001"], actions).running() as control:
            yield control

    def test_a_button_of_the_page(self, control: Control, calls: list[str]) -> None:
        assert post(control.address, "/break", token_of(control.address)) == 204
        assert calls == ["break"]
        assert post(control.address, "/brake", token_of(control.address)) == 404

    @pytest.mark.parametrize(
        "headers",
        [
            pytest.param({"Origin": "http://evil.example"}, id="a foreign page"),
            pytest.param({"Origin": "null"}, id="a page in a sandbox"),
            pytest.param({"Origin": "http://127.0.0.1:8001"}, id="another port"),
            pytest.param({"Host": "evil.example"}, id="a foreign name for this machine"),
            pytest.param({TOKEN_HEADER: "wrong"}, id="a wrong token"),
            pytest.param({TOKEN_HEADER: "fran\xe7ais"}, id="a token that isn't ASCII"),
        ],
    )
    def test_nobody_else_may_press_it(
        self, control: Control, calls: list[str], headers: dict[str, str]
    ) -> None:
        assert post(control.address, "/break", token_of(control.address), **headers) == 403
        assert calls == []

    def test_a_foreign_name_does_not_get_the_page_with_its_token(self, control: Control) -> None:
        request = urllib.request.Request(control.address, headers={"Host": "evil.example"})
        with pytest.raises(urllib.error.HTTPError, match="403") as caught:
            urllib.request.urlopen(request, timeout=10)
        caught.value.close()

    def test_serves_the_page_and_nothing_else(self, control: Control) -> None:
        _, page = get(control.address + "/")
        files = re.findall(r'(?:src|href)="(/[^"]+)"', page)
        assert files
        for name in files:
            assert get(control.address + name)[0] == 200
        for path in ("/../settings.py", "/index.html", "//etc/passwd"):
            with pytest.raises(urllib.error.HTTPError, match="404") as caught:
                get(control.address + path)
            caught.value.close()

    def test_a_failure_is_told(self, control: Control) -> None:
        control.check()
        assert post(control.address, "/fail", token_of(control.address)) == 500
        with pytest.raises(ZeroDivisionError):
            control.check()


@pytest.mark.slow
@pytest.mark.timeout(150)  # a start, a restart, and delays of up to ten seconds to reconnect
async def test_chat_goes_on_after_a_restart_of_the_broker(private_broker: PrivateBroker) -> None:
    python, url = Path(sys.executable), private_broker.url
    with running_servers(python, url, two_ports()) as servers:
        async with (
            open_page(servers[0].address, "lobby", "Ada") as ada,
            open_page(servers[1].address, "lobby", "Grace") as grace,
        ):
            for page in (ada, grace):
                await page.until(both_are_within_reach)

            await asyncio.to_thread(private_broker.kill)
            for page in (ada, grace):
                await page.until(lambda page: not page.room_is_up)

            await asyncio.to_thread(private_broker.start)
            # Once the room is up for one, everybody in it can hear.
            await ada.until(both_are_within_reach)
            await ada.say("Still here?")
            for page in (ada, grace):
                await page.until(lambda page: len(page.messages) == 1)
            await grace.until(both_are_within_reach)
            await grace.say("So am I.")
            for page in (ada, grace):
                await page.until(lambda page: len(page.messages) == 2)
                assert page.messages == ["Still here?", "So am I."]


# Who is in the room


class TestPresence:
    @pytest.fixture
    def presence(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.syspath_prepend(ROOT / "example")
        from chat import presence

        return presence

    def test_people_are_what_the_members_say_of_themselves(self, presence: Any) -> None:
        grace = {"id": "2", "name": "Grace", "port": 8002, "pid": 12}
        ada = {"id": "1", "name": "ada", "port": 8001, "pid": 11}
        members = (Member("a!1", grace), Member("a!2", None), Member("b!1", ada))
        found = GroupMembers(members, is_complete=True, silent=(), absent=())
        people = [presence.Person(**ada), presence.Person(**grace)]
        assert presence.people_in(found) == people

    def test_who_came_and_who_left(self, presence: Any) -> None:
        ada = presence.Person("1", "Ada", 8001, 11)
        augusta = presence.Person("1", "Augusta", 8001, 11)
        grace = presence.Person("2", "Grace", 8002, 12)
        assert presence.missing([ada, grace], [augusta]) == [grace]
        assert presence.missing([augusta], [ada, grace]) == []


@pytest.mark.slow
@pytest.mark.timeout(150)
async def test_chat_shows_who_is_here_after_a_crash(broker: Broker) -> None:
    """Both people of the killed process are gone, the others are not, and the chat goes on."""
    room = secrets.token_hex(8)
    with running_servers(Path(sys.executable), broker.url, two_ports()) as servers:
        async with (
            open_page(servers[0].address, room, "Ada") as ada,
            open_page(servers[0].address, room, "Alan") as alan,
            open_page(servers[1].address, room, "Grace"),
            open_page(servers[1].address, room, "Guido"),
        ):
            for page in (ada, alan):
                await page.until(lambda page: page.people == ["Ada", "Alan", "Grace", "Guido"])
            servers[1].kill()
            for page in (ada, alan):
                await page.until(lambda page: page.people == ["Ada", "Alan"])
                assert page.room_is_up
            await ada.say("Who was that?")
            await alan.until(lambda page: page.messages == ["Who was that?"])
