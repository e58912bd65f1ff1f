"""The manual's how-to pages: what a project does with the layer."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import types
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from channels.testing import WebsocketCommunicator

from channels_rabbitmq import _names
from channels_rabbitmq._settings import settings as _settings
from channels_rabbitmq._settings.foreign_options import ANSWER_TO
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import Broker
from tests.support.manual import ROOT, URL, block, commands, lines_of, run
from tests.support.members import must_work, receive

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]
OpenFromSettings = Callable[[dict[str, Any]], Awaitable[RabbitmqChannelLayer]]

SETTINGS = """
SECRET_KEY = "x"
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
"""


@pytest.mark.slow
def test_pushing(broker: Broker, groups_exchange: str, tmp_path: Path) -> None:
    """From views, signals and a Celery task: after the commit, and without an error if it fails."""
    project = tmp_path / "mysite"
    project.mkdir()
    config = f'"{broker.url}", "groups_exchange": "{groups_exchange}"'
    files = {
        "settings": SETTINGS + block("from-channels-redis").replace(f'"{URL}"', config),
        "push": block("push"),
        "views": block("push-view"),
        "async_views": block("push-async-view"),
        "signals": block("push-signal"),
        "consumers": block("user"),
        "notify": block("user-push"),
        "celery_tasks": block("celery-task"),
        "__init__": "",
    }
    for name, code in files.items():
        (project / f"{name}.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "programs" / "pushes.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [message["type"] for message in result["messages"]] == [
        "user.saved",
        "user.saved",
        "user.renamed",
        "user.called",
        "notification",
        "export.progress",
        "export.progress",
        "logout",
    ]
    assert result["statuses"] == [200, 200, 503]
    assert "not told to user-1: " in done.stderr


async def test_a_users_websockets(default_layer: RabbitmqChannelLayer) -> None:
    names = run("user")
    user = types.SimpleNamespace(pk=7, is_authenticated=True)
    clients = [WebsocketCommunicator(names["NotificationConsumer"].as_asgi(), "/") for _ in "ab"]
    for client in clients:
        client.scope["user"] = user
        assert await client.connect(10) == (True, None)
    group = names["group_of"](user)
    await default_layer.group_send(group, {"type": "notification", "text": "hello"})
    for client in clients:
        assert await client.receive_json_from(10) == {"text": "hello"}
    await default_layer.group_send(group, {"type": "logout"})
    for client in clients:
        assert (await client.receive_output(10))["type"] == "websocket.close"
        await client.disconnect()
    assert await default_layer.group_count(group, 10.0) == 0

    nobody = WebsocketCommunicator(names["NotificationConsumer"].as_asgi(), "/")
    nobody.scope["user"] = types.SimpleNamespace(is_authenticated=False)
    assert (await nobody.connect(10))[0] is False


def test_names_of_groups() -> None:
    name = run("user-group-name")["group_for"]("Grüße, Ada <ada@example.com>")
    _names.require_group_name(name)


async def test_one_url_for_celery_and_the_layer(
    open_from_settings: OpenFromSettings, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RABBITMQ_URL", broker.url)
    namespace = run("celery-settings")
    assert namespace["CELERY_BROKER_URL"] == broker.url
    await must_work(await open_from_settings(namespace))


async def test_several_projects(
    open_layer: OpenLayer, open_from_settings: OpenFromSettings, broker: Broker
) -> None:
    """None hears the others' group of the same name."""
    if broker.private is None:
        pytest.skip("needs rabbitmqctl for the broker")
    for command, *words in commands("several-projects"):
        assert command == "rabbitmqctl"
        await asyncio.to_thread(broker.private.ctl, *words)
    address = broker.private.url.rpartition("@")[2]
    layers = [
        await open_layer(),
        await open_from_settings(run("several-projects-vhost", ("rabbit.example.com", address))),
        await open_from_settings(run("several-projects-exchange", (URL, broker.url))),
    ]
    channels = [await layer.new_channel() for layer in layers]
    for layer, channel in zip(layers, channels, strict=True):
        await layer.group_add("chat", channel)
    for number, layer in enumerate(layers):
        await layer.group_send("chat", {"type": "from", "n": number})
        await layer.group_send("chat", {"type": "last", "n": number})
    for number, (layer, channel) in enumerate(zip(layers, channels, strict=True)):
        heard = [await receive(layer, channel) for _ in range(2)]
        assert heard == [{"type": "from", "n": number}, {"type": "last", "n": number}]


def test_the_options_of_channels_redis() -> None:
    """Those that the layer doesn't have are answered by its errors, too."""
    rows = re.findall(r"^   \* - (``.*)$", "\n".join(lines_of("Options")), re.MULTILINE)
    options = [option for row in rows for option in re.findall("``([a-z_]+)``", row)]
    assert {"hosts", "prefix", "group_expiry", "serializer_format"} <= set(options)
    for option in options:
        known = option in _settings.OPTIONS or option == "group_expiry"
        assert known != (option in ANSWER_TO), option
