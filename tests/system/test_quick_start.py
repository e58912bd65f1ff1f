"""The quick start of README.rst, word for word."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.brokers import Broker
from tests.support.manual import (
    ROOT,
    URL,
    block,
    commands,
    plain,
    replaced,
)
from tools.private_broker import free_port


class Client:
    """The command by which one talks to a websocket, and what it has shown."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._shown: list[str] = []
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self._shown.append(line)
                self._news.notify_all()

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def wait_for(self, text: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: text in "".join(self._shown), 20), self._shown

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_quick_start(broker: Broker, groups_exchange: str, tmp_path: Path) -> None:
    """Word for word, but for the address of the broker and the ports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    docker, install, (_, *start_project), (_, folder) = commands("quick-start-project")
    assert docker[0] == "docker"
    assert install[:4] == ["python", "-m", "pip", "install"]
    for requirement in install[4:]:
        __import__(Requirement(requirement).name)
    subprocess.run(
        [sys.executable, "-m", "django", *start_project], cwd=tmp_path, env=environment, check=True
    )
    project = tmp_path / folder
    site = project / "mysite"
    config = f'"{broker.url}", "groups_exchange": "{groups_exchange}"'
    own_settings = replaced(block("quick-start-settings"), f'"{URL}"', config)
    with (site / "settings.py").open("a", encoding="utf-8") as stream:
        stream.write(own_settings)
    (site / "consumers.py").write_text(block("quick-start-consumer"), encoding="utf-8")
    (site / "asgi.py").write_text(block("quick-start-asgi"), encoding="utf-8")
    ports: dict[str, str] = {}
    processes: list[subprocess.Popen[bytes]] = []
    clients: list[Client] = []
    try:
        for program, *words in commands("quick-start-servers"):
            python = [sys.executable] if program == "python" else [sys.executable, "-m", program]
            [port] = filter(str.isdigit, words)
            ports[port] = str(free_port())
            command = [*python, *(ports.get(word, word) for word in words)]
            processes.append(
                subprocess.Popen(command, cwd=project, env=environment, start_new_session=True)
            )
        for process, port in zip(processes, ports.values(), strict=True):
            wait_until_it_answers(process, f"http://127.0.0.1:{port}")
        for _, *arguments in commands("quick-start-clients"):
            url = arguments.pop()
            for port, used in ports.items():
                url = url.replace(port, used)
            clients.append(Client([sys.executable, *arguments, url], environment))
        for client in clients:
            client.wait_for("Connected to")
        [text] = re.findall(r"type ``(.*?)`` and press Enter", plain())
        clients[0].type(text)
        for client in clients:
            client.wait_for(f"< {text}")
    finally:
        for client in clients:
            client.stop()
        for process in processes:
            os.killpg(process.pid, signal.SIGINT)  # runserver has a process that reloads it
        for process in processes:
            process.wait(20)


def wait_until_it_answers(process: subprocess.Popen[bytes], address: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        assert process.poll() is None
        try:
            opener.open(address, timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
            return  # a page that isn't there is an answer
        except OSError:
            threading.Event().wait(0.05)  # nobody tells when a server has started
        else:
            return
