"""Copies of a layer: ``copy``, ``deepcopy`` and pickle keep the settings and share nothing open."""

from __future__ import annotations

import copy
import pickle
import re
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.layers import settings_of

Copy = Callable[[RabbitmqChannelLayer], RabbitmqChannelLayer]


def pickled(layer: RabbitmqChannelLayer) -> RabbitmqChannelLayer:
    result: RabbitmqChannelLayer = pickle.loads(pickle.dumps(layer))
    return result


COPIES = [copy.copy, copy.deepcopy, pickled]


def hook(id_: str, reason: str) -> None:
    """A function of a module, which pickle takes by its name."""


class ProjectLayer(RabbitmqChannelLayer):
    """With parameters and attributes of its own."""

    def __init__(self, tenant: str, **config: Any) -> None:
        super().__init__(**config)
        self.tenant = [tenant]


@pytest.mark.parametrize("make_copy", COPIES)
def test_all_settings_are_kept(make_copy: Copy) -> None:
    layer = RabbitmqChannelLayer(
        host=["amqps://u:secret@a/v?heartbeat=3", "amqps://b/v"],
        expiry=30,
        capacity=7,
        channel_capacity={"a.*": 8, re.compile("b"): 9},
        symmetric_encryption_keys=["secret", b"other"],
        on_disconnect=hook,
        on_reconnect="os.path.join",
    )
    settings_of(layer).codec  # noqa: B018 - that it is there already may not matter
    copied = make_copy(layer)
    assert settings_of(copied) == settings_of(layer)
    assert settings_of(copied).symmetric_encryption_keys == ("secret", b"other")
    assert repr(copied) == repr(layer)
    assert "secret" not in repr(copied)
    assert [copied.get_capacity(name) for name in ("a.x", "b", "c")] == [8, 9, 7]
    with pytest.raises(TypeError):
        settings_of(copied).channel_capacity["c"] = 1  # type: ignore[index]  # is the point
    message = {"type": "x"}
    body = settings_of(layer).codec.encode_for_group("g", message)
    assert settings_of(copied).codec.decode(body).message() == message


@pytest.mark.parametrize("make_copy", COPIES)
def test_a_subclass_keeps_what_it_has(make_copy: Copy) -> None:
    layer = ProjectLayer("acme", local_capacity=3)
    copied = make_copy(layer)
    assert isinstance(copied, ProjectLayer)
    assert copied.tenant == ["acme"]
    assert (copied.tenant is layer.tenant) == (make_copy is copy.copy)
    assert settings_of(copied).local_capacity == 3


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy])
def test_what_cannot_be_pickled_can_be_copied(make_copy: Copy) -> None:
    context = ssl.create_default_context()
    layer = RabbitmqChannelLayer(
        host="amqps://a", ssl_context=context, on_disconnect=lambda id_, reason: None
    )
    copied = make_copy(layer)
    assert settings_of(copied).ssl_context is context
    assert settings_of(copied) == settings_of(layer)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (
            {"host": "amqps://a:hush@b", "ssl_context": ssl.create_default_context()},
            "the option ssl_context holds a value of type SSLContext which can't; name the "
            "certificates in the URL (cacertfile, certfile, keyfile)",
        ),
        (
            {"on_disconnect": lambda id_, reason: None},
            "the option on_disconnect holds a value of type function which can't; give the dotted "
            "path of a function",
        ),
        (
            {"host": lambda: "amqp://a:hush@b"},
            "the option host holds a value of type function which can't; give the dotted path",
        ),
    ],
    ids=["ssl_context", "on_disconnect", "host"],
)
def test_what_cannot_be_pickled_is_named(config: dict[str, Any], problem: str) -> None:
    layer = RabbitmqChannelLayer(**config)
    with pytest.raises(pickle.PicklingError, match=re.escape(problem)) as caught:
        pickle.dumps(layer)
    assert caught.value.__context__ is None
    assert "hush" not in str(caught.value)
