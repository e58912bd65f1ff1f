"""The manual's first pages: what they install, and whether it connects."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # has no annotations
from packaging.requirements import Requirement

import channels_rabbitmq
from channels_rabbitmq._broker import advice
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import Broker
from tests.support.manual import ROOT, URL, block, commands, definitions, in_thread, run
from tests.support.members import must_work

OpenFromSettings = Callable[[dict[str, Any]], Awaitable[RabbitmqChannelLayer]]


def test_the_package_that_is_installed() -> None:
    """The names, versions and extras; test_packaging builds and reads what pip gets."""
    extras = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
    for line in commands("install") + commands("tutorial-install"):
        *pip, text = line
        assert pip == ["python", "-m", "pip", "install"]
        requirement = Requirement(text)
        assert requirement.name == "channels_rabbitmq"
        assert channels_rabbitmq.__version__ in requirement.specifier
        assert requirement.extras <= extras


def test_the_rabbitmq_that_is_installed() -> None:
    """As tools/brokers.py gets it for scripts/test, and of a version that is tested."""
    ways = (ROOT / "tools" / "brokers.py").read_text(encoding="utf-8")
    [apt] = commands("install-apt")
    assert apt[:3] == ["sudo", "apt-get", "install"]
    assert f'root_rights.install("{apt[3]}")' in ways
    brew, start = commands("install-brew")
    assert brew == ["brew", "install", "rabbitmq"]
    assert '["brew", "install", "--quiet", "rabbitmq"]' in ways
    assert start == ["brew", "services", "start", "rabbitmq"]
    [docker] = commands("install-docker")
    [service] = yaml.safe_load(block("install-compose"))["services"].values()
    [in_the_quick_start, *_] = commands("quick-start-project")
    for words in (docker, in_the_quick_start):
        assert words[:3] == ["docker", "run", "-d"]
        assert words[words.index("-p") + 1] in service["ports"]
        assert words[-1] == service["image"]
    newest = re.findall(r"RABBITMQ=(rabbitmq:\d+)", (ROOT / ".travis.yml").read_text())[-1]
    assert service["image"] == newest
    assert service["healthcheck"]["test"] in (ROOT / ".travis.yml").read_text()


async def test_the_tutorials_settings(open_from_settings: OpenFromSettings, broker: Broker) -> None:
    namespace = run("tutorial-settings", (URL, broker.url))
    await must_work(await open_from_settings(namespace))


async def test_the_lines_in_the_shell(
    default_layer: RabbitmqChannelLayer, capsys: pytest.CaptureFixture[str]
) -> None:
    await in_thread("connect-shell")
    said = block("connect-shell").rpartition("# ")[2]
    assert capsys.readouterr().out.strip() == said.strip()


async def test_counting_a_group_from_the_shell(
    default_layer: RabbitmqChannelLayer, capsys: pytest.CaptureFixture[str]
) -> None:
    channel = await default_layer.new_channel()
    await default_layer.group_add("chat", channel)
    await default_layer.group_count("chat", 10.0)  # From now on it can be asked.
    await in_thread("connect-count")
    assert capsys.readouterr().out == "1\n"


def test_the_advice_is_the_layers() -> None:
    source = advice.__file__
    with open(source, encoding="utf-8") as stream:
        text = stream.read()
    terms = [literals[0] for literals, _ in definitions("Does it connect?")]
    assert len(terms) == 3
    for term in terms:
        assert term.removesuffix("NAME") in text, term


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("channels_rabbitmq.__main__") is None, reason="no command line"
)
def test_the_command(broker: Broker, groups_exchange: str) -> None:
    [[python, *words]] = commands("connect-check")
    assert python == "python"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests" / "programs"),
        "DJANGO_SETTINGS_MODULE": "mysite.settings",
        "LAYER_HOST": broker.url,
        "LAYER_EXCHANGE": groups_exchange,
    }
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
