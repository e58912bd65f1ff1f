"""What ``manage.py check`` says of ``CHANNEL_LAYERS``."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.test import override_settings

from channels_rabbitmq._tools import system_checks
from channels_rabbitmq._tools.system_checks import check_channel_layers
from channels_rabbitmq.core import RabbitmqChannelLayer

if not settings.configured:
    settings.configure()

BACKEND = "channels_rabbitmq.core.RabbitmqChannelLayer"


IN_MEMORY = "channels_rabbitmq.testing.InMemoryChannelLayer"


class OwnLayer(RabbitmqChannelLayer):
    def __init__(self, *, port: int = 5672, **config: Any) -> None:
        super().__init__(host=f"amqp://guest@elsewhere:{port}", **config)


class FakeApps:
    """As Django's registry, which is there only once Django is set up."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def is_installed(self, name: str) -> bool:
        return name in self._names


@pytest.fixture(autouse=True)
def _no_daphne(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_checks, "apps", FakeApps())


def found_in(layers: object) -> list[tuple[str, str, str]]:
    """The checks' numbers, their texts and their hints."""
    with override_settings(CHANNEL_LAYERS=layers):
        found = check_channel_layers()
    assert all(message.hint for message in found)
    assert all("s3cret" not in f"{message.msg}{message.hint}" for message in found)
    return [(m.id.removeprefix("channels_rabbitmq."), m.msg, m.hint) for m in found]


def found_by(config: Any, backend: str = BACKEND) -> list[tuple[str, str, str]]:
    return found_in({"default": {"BACKEND": backend, "CONFIG": config}})


@pytest.mark.parametrize(
    "layers",
    [
        {},
        [],
        {"default": {"BACKEND": BACKEND}},
        {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer", "CONFIG": {"x": 1}}},
        {"default": {"BACKEND": "another.package.Layer"}},
        {"default": {"BACKEND": IN_MEMORY, "CONFIG": {"host": "amqp://guest@elsewhere"}}},
        {"default": {}},
        {"default": {"BACKEND": BACKEND, "CONFIG": {"host": "amqps://web:s3cret@elsewhere/v"}}},
        {"default": {"BACKEND": BACKEND, "CONFIG": {"host": ["amqp://127.0.0.2", "amqp://[::1]"]}}},
        {"default": {"BACKEND": BACKEND, "CONFIG": {"host": lambda: "amqp://elsewhere"}}},
    ],
)
def test_nothing_to_say(layers: object) -> None:
    assert found_in(layers) == []


def test_all_mistakes_are_told_of() -> None:
    found = found_by(
        {
            "hosts": ["amqp://web:s3cret@elsewhere"],
            "prefix": "asgi",
            "local_capasity": 3,
            "expiry": "s3cret",
            "capacity": 5,
            "group_expiry": 9,
        }
    )
    told = {(number, text.removeprefix("CHANNEL_LAYERS['default']: ")) for number, text, _ in found}
    redis = "is an option of channels_redis, and not of channels_rabbitmq"
    assert {
        ("E003", f"'hosts' {redis}"),
        ("E003", f"'prefix' {redis}"),
        ("E002", "there is no option 'local_capasity'"),
        ("E001", "expiry must be a number of seconds from 0.001 up to 4294967, not str"),
        ("W001", "group_expiry is ignored, a membership needs none here"),
    } < told
    assert len(told) == 6
    hints = [hint for _, _, hint in found]
    assert "Did you mean local_capacity?" in hints
    assert any(hint.startswith("groups_exchange takes its place") for hint in hints)


@pytest.mark.parametrize(
    ("config", "backend", "number", "words"),
    [
        ([], BACKEND, "E001", "CONFIG must be a dict, not list"),
        ({}, "channels_rabbitmq.RabbitmqChannelLayer", "E004", "can't be imported"),
        ({"group_expiry": 3}, BACKEND, "W001", "group_expiry"),
        ({"host": "amqp://elsewhere"}, BACKEND, "W002", "amqp://guest@elsewhere:5672/%2F"),
        ({"host": "amqp://guest:s3cret@192.0.2.1"}, BACKEND, "W002", "guest"),
        ({"host": "amqps://a:b@c?verify=verify_none"}, BACKEND, "W003", "verify_none"),
        ({"port": 1}, f"{__name__}.OwnLayer", "W002", "elsewhere:1/"),
        ({"ports": 1}, f"{__name__}.OwnLayer", "E001", "unknown option 'ports'"),
    ],
)
def test_one_finding(config: Mapping[str, Any], backend: str, number: str, words: str) -> None:
    [(found, text, _)] = found_by(config, backend)
    assert (found, words in text) == (number, True), text


def test_daphne_gives_up_before_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_checks, "apps", FakeApps("daphne"))
    assert found_by({"operation_timeout": 4.9}) == []
    [(number, text, hint)] = found_by({"operation_timeout": 5})
    assert (number, "5 s" in text) == ("W004", True)
    assert "--websocket_connect_timeout 10" in hint


def test_that_is_the_limit_of_daphne() -> None:
    spec = importlib.util.find_spec("daphne")
    if spec is None or spec.origin is None:
        pytest.skip("daphne isn't installed")
    source = Path(spec.origin).with_name("server.py").read_text(encoding="utf-8")
    assert f"websocket_handshake_timeout={system_checks.DAPHNES_HANDSHAKE}," in source


def test_layers_that_share_an_exchange() -> None:
    def layer(**config: Any) -> dict[str, object]:
        return {"BACKEND": BACKEND, "CONFIG": config}

    layers = {
        "default": layer(),
        "other node": layer(host=["amqp://[::1]", "amqp://127.0.0.1"]),
        "other exchange": layer(groups_exchange="other"),
        "other vhost": layer(host="amqp://127.0.0.1/other"),
        "wrong": layer(hosts="x"),
    }
    number, text, _ = found_in(layers)[-1]
    assert number == "W005"
    assert "'default' and 'other node' use the same exchange, 'groups'" in text
    assert [number for number, _, _ in found_in(layers)] == ["E003", "W005"]
