"""Settings: every option, and errors that name it without showing secrets."""

from __future__ import annotations

import inspect
import re
import ssl
import sys
import warnings
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from channels.exceptions import InvalidChannelLayerError
from channels.layers import BaseChannelLayer
from hypothesis import given, settings
from hypothesis import strategies as st

from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq._settings import foreign_options as _foreign_options
from channels_rabbitmq._settings.mistakes import Mistakes
from channels_rabbitmq._settings.settings import OPTIONS, Settings
from channels_rabbitmq.core import RabbitmqChannelLayer


def test_defaults() -> None:
    assert Settings.from_config({}) == Settings(
        urls=(BrokerUrl.parse("amqp://guest:guest@127.0.0.1/"),),
        ssl_context=None,
        expiry=60.0,
        local_expiry=60.0,
        remote_capacity=10_000,
        remote_capacity_bytes=32 * 1024 * 1024,
        local_capacity=100,
        capacity=10_000,
        channel_capacity={},
        groups_exchange="groups",
        normal_channels=False,
        allow_flush=False,
        connect_timeout=10.0,
        operation_timeout=10.0,
        watchdog_interval=30.0,
        max_message_size=16 * 1024 * 1024,
        symmetric_encryption_keys=(),
        serializer="msgpack",
        on_disconnect=None,
        on_reconnect=None,
    )


def test_every_option_is_taken() -> None:
    context = ssl.create_default_context()
    pattern = re.compile("chat.*")
    result = Settings.from_config(
        {
            "host": ["amqps://a:x@one/v", "amqps://a:x@two:5/v?heartbeat=3"],
            "ssl_context": context,
            "expiry": 30,
            "local_expiry": 4.5,
            "remote_capacity": 7,
            "remote_capacity_bytes": 1234,
            "local_capacity": 8,
            "capacity": 9,
            "channel_capacity": {"http.*": 10, pattern: 11},
            "groups_exchange": "my-groups",
            "normal_channels": True,
            "allow_flush": True,
            "connect_timeout": 0.5,
            "operation_timeout": 3,
            "watchdog_interval": 0,
            "max_message_size": 1000,
            "symmetric_encryption_keys": ["one", b"two"],
            "serializer": "json",
            "on_disconnect": max,
            "on_reconnect": "os.path.join",
        }
    )
    assert result == Settings(
        urls=(
            BrokerUrl.parse("amqps://a:x@one/v"),
            BrokerUrl.parse("amqps://a:x@two:5/v?heartbeat=3"),
        ),
        ssl_context=context,
        expiry=30.0,
        local_expiry=4.5,
        remote_capacity=7,
        remote_capacity_bytes=1234,
        local_capacity=8,
        capacity=9,
        channel_capacity={"http.*": 10, pattern: 11},
        groups_exchange="my-groups",
        normal_channels=True,
        allow_flush=True,
        connect_timeout=0.5,
        operation_timeout=3.0,
        watchdog_interval=0.0,
        max_message_size=1000,
        symmetric_encryption_keys=("one", b"two"),
        serializer="json",
        on_disconnect=max,
        on_reconnect="os.path.join",
    )


def test_settings_are_frozen_and_apart_from_the_config() -> None:
    config: dict[str, Any] = {"channel_capacity": {"a": 1}, "host": ["amqp://one"]}
    result = Settings.from_config(config)
    config["channel_capacity"]["b"] = 2
    config["host"].append("amqp://two")
    assert result.channel_capacity == {"a": 1}
    assert len(result.urls) == 1
    with pytest.raises(FrozenInstanceError):
        result.capacity = 3  # type: ignore[misc]  # that it is refused is the point
    with pytest.raises(TypeError):
        result.channel_capacity["b"] = 2  # type: ignore[index]  # as above


def test_channel_capacity_suits_channels() -> None:
    """BaseChannelLayer compiles it, so its order and its two kinds of key must last."""
    result = Settings.from_config({"channel_capacity": {"a.*": 1, re.compile("^a"): 2}})
    layer = BaseChannelLayer(capacity=3)
    layer.channel_capacity = layer.compile_capacities(result.channel_capacity)
    assert [layer.get_capacity(name) for name in ("a.b", "ab", "b")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("config", "local_expiry"),
    [
        ({}, 60),
        ({"expiry": 5}, 5),
        ({"expiry": 1500}, 1500),
        ({"expiry": 86400}, 1500),
        ({"expiry": None}, 1500),
        ({"expiry": 5, "local_expiry": None}, 5),
        ({"expiry": 5, "local_expiry": 100}, 100),
        ({"expiry": None, "local_expiry": 1500}, 1500),
    ],
)
def test_local_expiry_is_expiry_up_to_1500_seconds(
    config: dict[str, Any], local_expiry: float
) -> None:
    assert Settings.from_config(config).local_expiry == local_expiry


def test_no_limits() -> None:
    result = Settings.from_config(
        {
            "expiry": None,
            "remote_capacity": None,
            "remote_capacity_bytes": None,
            "channel_capacity": None,
            "symmetric_encryption_keys": None,
        }
    )
    assert result.expiry is None
    assert result.remote_capacity is None
    assert result.remote_capacity_bytes is None
    assert result.channel_capacity == {}
    assert result.symmetric_encryption_keys == ()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("expiry", 0.001),
        ("expiry", 4294967.295),
        ("local_expiry", 0.0001),
        ("remote_capacity", 1),
        ("local_capacity", 1),
        ("local_capacity", 65535),
        ("capacity", 1),
        ("max_message_size", 1),
        ("connect_timeout", 0.01),
        ("operation_timeout", 86400),
        ("watchdog_interval", 0),
        ("watchdog_interval", 0.1),
        ("watchdog_interval", 86400),
        ("groups_exchange", 127 * "g"),
        ("groups_exchange", "Amq. groups/A-_.:@#,"),
    ],
)
def test_limits_are_within(option: str, value: object) -> None:
    assert getattr(Settings.from_config({option: value}), option) == value


NUMBERS = [
    "expiry",
    "local_expiry",
    "remote_capacity",
    "remote_capacity_bytes",
    "local_capacity",
    "capacity",
    "connect_timeout",
    "operation_timeout",
    "max_message_size",
]


@pytest.mark.parametrize("option", NUMBERS)
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (True, "not bool"),
        ("10", "not str"),
        ([1], "not list"),
        (0, "not 0"),
        (-1, "not -1"),
        (float("nan"), "not "),
        (float("inf"), "not "),
        (float("-inf"), "not "),
        pytest.param(-(10**5000), "not so large a number", id="huge"),
    ],
)
def test_what_is_no_number_in_range(option: str, value: object, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be a .*{problem}"):
        Settings.from_config({option: value})


def test_room_for_the_largest_message() -> None:
    problem = "^remote_capacity_bytes must be at least max_message_size .1001., not 1000: "
    with pytest.raises(ValueError, match=problem):
        Settings.from_config({"remote_capacity_bytes": 1000, "max_message_size": 1001})
    result = Settings.from_config({"remote_capacity_bytes": 1000, "max_message_size": 1000})
    assert result.remote_capacity_bytes == 1000
    with pytest.raises(ValueError, match="remote_capacity_bytes must be at least"):
        Settings.from_config({"max_message_size": 32 * 1024 * 1024 + 1})
    Settings.from_config({"max_message_size": 2**30, "remote_capacity_bytes": None})


@pytest.mark.parametrize(
    "option",
    [
        "local_capacity",
        "capacity",
        "max_message_size",
        "connect_timeout",
        "operation_timeout",
        "groups_exchange",
    ],
)
def test_options_that_need_a_value(option: str) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be a .*not NoneType"):
        Settings.from_config({option: None})


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("expiry", 0.0009, "from 0.001 up to 4294967, not 0.0009"),
        ("expiry", 4294967.296, "not 4294967.296"),
        pytest.param("expiry", 10**5000, "not so large a number", id="huge expiry"),
        ("local_expiry", 1500.1, "above 0 up to 1500, not 1500.1"),
        ("connect_timeout", 86401, "not 86401"),
        pytest.param("operation_timeout", 10**5000, "not so large a number", id="huge timeout"),
        ("local_capacity", 65536, "from 1 to 65535, not 65536"),
        ("local_capacity", 10.0, "not float"),
        ("remote_capacity", 2**31, "not 2147483648"),
        ("remote_capacity_bytes", 2**40 + 1, "not 1099511627777"),
        ("capacity", 1.5, "not float"),
        ("channel_capacity", [("a", 1)], "channel_capacity must be a dict, not list"),
        ("channel_capacity", {"a.*": 0}, "channel_capacity['a.*'] must be a whole number"),
        ("channel_capacity", {re.compile("b"): "1"}, "channel_capacity['b'] must be"),
        ("channel_capacity", {1: 1}, "a key of channel_capacity must be a str"),
        ("channel_capacity", {re.compile(b"b"): 1}, "a key of channel_capacity must be a str"),
        ("normal_channels", 1, "normal_channels must be True or False, not int"),
        ("allow_flush", "yes", "allow_flush must be True or False, not str"),
        ("normal_channels", None, "normal_channels must be True or False, not NoneType"),
        ("groups_exchange", b"groups", "groups_exchange must be a str, not bytes"),
        ("groups_exchange", "", "groups_exchange must not be empty"),
        ("groups_exchange", "amq.direct", "groups_exchange must not start with amq."),
        ("groups_exchange", 128 * "g", "groups_exchange must not exceed 127 characters"),
        ("groups_exchange", "grüppe", "groups_exchange must hold nothing but ASCII letters"),
        ("groups_exchange", "a\nb", "groups_exchange must hold nothing but"),
        ("groups_exchange", "\udcff", "groups_exchange must hold nothing but"),
        ("symmetric_encryption_keys", "hush", "must be a list of str or bytes, not str"),
        ("symmetric_encryption_keys", b"hush", "must be a list of str or bytes, not bytes"),
        ("symmetric_encryption_keys", {"hush"}, "must be a list of str or bytes, not set"),
        ("symmetric_encryption_keys", ["hush", 1], "symmetric_encryption_keys[1] must be a str"),
        ("symmetric_encryption_keys", ["hush", ""], "symmetric_encryption_keys[1] must not be"),
        ("symmetric_encryption_keys", ["hush\udcff"], "symmetric_encryption_keys[0] is a str with"),
        ("host", None, "host must be a URL or a list of URLs, not NoneType"),
        ("host", b"amqp://a:hush@b", "host must be a URL or a list of URLs, not bytes"),
        ("on_disconnect", "hush", "on_disconnect must be a callable or the dotted path of one"),
        ("on_reconnect", "os.hush hush", "on_reconnect must be a callable or the dotted path of"),
        ("on_reconnect", b"os.hush", "on_reconnect must be a callable or the dotted path of one"),
        ("on_disconnect", lambda: "hush", "on_disconnect is called with two arguments"),
        ("host", {"amqp://a:hush@b"}, "host must be a URL or a list of URLs, not set"),
        ("host", [], "host must be a URL or a list of URLs; the list is empty"),
        ("host", "", "host must be a URL, but is empty; is an environment variable missing?"),
        ("host", "a:hush@b", "host: the URL must start with amqp://"),
        ("host", "amqp://a:hu/sh@b", "host: the URL has an @"),
        ("host", ["amqp://b", "amqp://a:hush@:1"], "host[1]: the URL names no host"),
        ("host", ("amqp://b", ("hush", 1)), "host[1] must be a URL, a str, not tuple"),
        ("ssl_context", True, "ssl_context must be None or an ssl.SSLContext, not bool"),
    ],
)
def test_what_is_refused(option: str, value: object, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        Settings.from_config({option: value})
    assert option in str(caught.value)
    assert "hush" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("hosts", "unknown option 'hosts': host takes its place"),
        ("HOST", "unknown option 'HOST'; did you mean host?"),
        ("Capacity", "did you mean capacity?"),
        ("local_capcity", "did you mean local_capacity?"),
        ("symmetric_encryption_key", "did you mean symmetric_encryption_keys?"),
        ("zzz", "unknown option 'zzz'; known are host, ssl_context, expiry,"),
        (1, "an option's name must be a str, not int"),
        ("host ", "unknown option 'host '; did you mean host?"),
        ("amqp://a:hush@b", "unknown option, with a name like no option's (it isn't shown here)"),
        (70 * "h", "unknown option, with a name like no option's"),
    ],
)
def test_an_unknown_option_names_the_nearest(option: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        Settings.from_config({option: "hush"})
    assert "hush" not in str(caught.value)


def test_all_mistakes_are_in_one_error() -> None:
    config = {
        "hosts": [("127.0.0.1", 6379)],
        "host": ["amqp://", "amqp://broker", "amqp://broker:0"],
        "ssl_context": "hush",
        "expiry": "60",
        "channel_capacity": {"a.*": 0, "b.*": 1, 3: 4},
        "symmetric_encryption_keys": ["", "hush", None],
        "on_reconnect": "hush",
        "groups_exchange": "",
        "zzz": 1,
    }
    with pytest.raises(InvalidChannelLayerError) as caught:
        RabbitmqChannelLayer(**config)
    first, *mistakes = str(caught.value).split("\n- ")
    assert first == "RabbitmqChannelLayer: 12 mistakes in CONFIG:"
    assert [re.split("[ :]", mistake)[0] for mistake in mistakes] == [
        "unknown",
        "unknown",
        "host[0]",
        "host[2]",
        "ssl_context",
        "expiry",
        "channel_capacity['a.*']",
        "a",
        "groups_exchange",
        "symmetric_encryption_keys[0]",
        "symmetric_encryption_keys[2]",
        "on_reconnect",
        "note",
    ]
    assert "hush" not in str(caught.value)


def test_a_single_mistake_needs_no_list() -> None:
    with pytest.raises(InvalidChannelLayerError) as caught:
        RabbitmqChannelLayer(expiry=0)
    assert str(caught.value).startswith("RabbitmqChannelLayer: expiry must be a number of seconds")


def test_the_options_are_parameters_of_the_layer() -> None:
    """help(), editors and type checkers see them, with the defaults that they have."""
    parameters = inspect.signature(RabbitmqChannelLayer).parameters
    assert list(parameters) == [*OPTIONS, "unknown"]
    for option, (default, _) in OPTIONS.items():
        assert parameters[option].default == default, option
        assert parameters[option].annotation != inspect.Parameter.empty
    assert repr(RabbitmqChannelLayer()) == "<RabbitmqChannelLayer: amqp://guest@127.0.0.1:5672/%2F>"


@pytest.mark.parametrize("method", ["serialize", "deserialize"])
def test_a_subclass_with_a_serializer_is_refused(method: str) -> None:
    """In channels_redis it would be called; nobody should believe that it is here."""

    class Mixin:
        pass

    class Derived(Mixin, RabbitmqChannelLayer):
        pass

    assert Derived().extensions == ["groups"]
    setattr(Mixin, method, lambda self, message: message)
    with pytest.raises(InvalidChannelLayerError) as caught:
        Derived()
    assert str(caught.value).startswith(f"Derived has a method {method}(), as one overrides it in")
    assert "give that or its dotted path as the option serializer" in str(caught.value)


def test_options_with_the_names_of_parameters() -> None:
    with pytest.raises(InvalidChannelLayerError) as caught:
        RabbitmqChannelLayer(self=1, unknown=2, given=3)
    for option in ("self", "unknown", "given"):
        assert f"- unknown option {option!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        # channels_redis, its core and its pubsub layer
        ("hosts", 'host takes its place: a URL, such as "amqp://user:password@host:port/vhost"'),
        ("prefix", "groups_exchange takes its place"),
        ("random_prefix_length", "it isn't needed"),
        ("serializer_format", "serializer takes its place"),
        # channels_rabbitmq 1.x
        ("prefetch_count", "local_capacity takes its place"),
        # kombu, Celery, pika, aio-pika
        ("url", "host takes its place"),
        ("broker_url", "host takes its place"),
        ("BROKER_URL", "host takes its place"),
        ("virtual_host", "it is a part of the URL in host"),
        ("userid", "it is a part of the URL in host"),
        ("password", "it is a part of the URL in host"),
        ("broker_use_ssl", "TLS comes with a URL in host that begins with amqps://"),
        ("broker_heartbeat", "it is a parameter of the URL in host"),
        ("socket_timeout", "connect_timeout takes its place"),
        ("connection_attempts", "the layer connects again for as long as it takes"),
        ("broker_pool_limit", "it isn't needed"),
        ("message_ttl", "expiry takes its place"),
    ],
)
def test_options_of_others_are_answered(option: str, answer: str) -> None:
    with pytest.raises(ValueError, match="unknown option") as caught:
        Settings.from_config({option: "hush"})
    assert str(caught.value).startswith(f"unknown option {option!r}: ")
    assert answer in str(caught.value)
    assert "hush" not in str(caught.value)


def test_answers_name_options_that_exist() -> None:
    assert _foreign_options.ANSWER_TO.keys().isdisjoint({*OPTIONS, "group_expiry"})
    for answer in _foreign_options.ANSWERS:
        named = re.match("([a-z_]+) takes its place", answer)
        assert named is None or named[1] in OPTIONS


def test_a_config_of_channels_redis_is_answered_as_a_whole() -> None:
    config = {
        "hosts": [("127.0.0.1", 6379)],
        "prefix": "mysite",
        "expiry": 30,
        "group_expiry": 3600,
        "capacity": 1500,
        "channel_capacity": {"http.request": 200},
        "symmetric_encryption_keys": ["hush"],
        "random_prefix_length": 8,
        "serializer_format": "json",
        "on_disconnect": "redis.disconnect",
    }
    with pytest.raises(InvalidChannelLayerError) as caught:
        RabbitmqChannelLayer(**config)
    first, *lines = str(caught.value).split("\n- ")
    assert first == "RabbitmqChannelLayer: 5 mistakes in CONFIG:"
    assert [line.partition("':")[0] for line in lines[:4]] == [
        "unknown option 'hosts",
        "unknown option 'prefix",
        "unknown option 'random_prefix_length",
        "unknown option 'serializer_format",
    ]
    assert lines[4].startswith("on_disconnect is a dotted path, but there is no module 'redis'")
    assert "the type of a message" in lines[4]
    assert lines[5].startswith("note: group_expiry is ignored")
    assert lines[6].startswith("note: capacity and channel_capacity: not quite what channels_redis")
    assert len(lines) == 7


def test_there_is_no_note_on_an_option_that_is_not_given() -> None:
    with pytest.raises(InvalidChannelLayerError, match="hosts") as caught:
        RabbitmqChannelLayer(hosts=["x"])
    assert "note" not in str(caught.value)
    with pytest.raises(InvalidChannelLayerError, match="note: capacity: "):
        RabbitmqChannelLayer(hosts=["x"], capacity=7)
    with pytest.raises(InvalidChannelLayerError, match="local_capacity must be"):
        RabbitmqChannelLayer(local_capacity=100.0)  # type: ignore[arg-type]  # equals the default


def test_what_both_have_needs_no_note() -> None:
    with pytest.raises(ValueError, match="zzz") as caught:
        Settings.from_config({"capacity": 7, "zzz": 1})
    assert "note" not in str(caught.value)


def test_ssl_context_needs_amqps_everywhere() -> None:
    context = ssl.create_default_context()
    with pytest.raises(ValueError, match="ssl_context needs amqps:// in host") as caught:
        Settings.from_config(
            {"host": ["amqps://a:hush@one", "amqp://a:hush@two"], "ssl_context": context}
        )
    assert "amqp://a@two:5672/%2F" in str(caught.value)
    assert "hush" not in str(caught.value)
    with pytest.raises(ValueError, match="ssl_context needs amqps:// in host"):
        Settings.from_config({"ssl_context": context})


@pytest.mark.parametrize("query", ["cacertfile=a", "certfile=a", "verify=verify_none"])
def test_ssl_context_and_tls_parameters_exclude_each_other(query: str) -> None:
    host = f"amqps://broker?{query}"
    assert Settings.from_config({"host": host}).ssl_context is None
    with pytest.raises(ValueError, match=r"ssl_context excludes the parameters .* in host"):
        Settings.from_config({"host": host, "ssl_context": ssl.create_default_context()})


def test_the_name_to_expect_goes_with_ssl_context() -> None:
    host = "amqps://10.0.0.1?server_name_indication=broker&verify=verify_peer"
    context = ssl.create_default_context()
    assert Settings.from_config({"host": host, "ssl_context": context}).ssl_context is context


def test_encryption_without_cryptography(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
    with pytest.raises(ValueError, match=r"symmetric_encryption_keys .*\[cryptography\]") as caught:
        Settings.from_config({"symmetric_encryption_keys": ["hush"]})
    assert "hush" not in str(caught.value)
    # As channels_redis has it, an empty list means no encryption.
    assert Settings.from_config({"symmetric_encryption_keys": []}).symmetric_encryption_keys == ()


def test_group_expiry_warns_and_does_nothing() -> None:
    class Layer:
        def __init__(self, **config: object) -> None:
            self.settings = Settings.from_config(config)

    with pytest.warns(DeprecationWarning, match="a membership lasts until") as caught:
        layer = Layer(group_expiry=86400)
    assert len(caught) == 1
    # The warning points at the line that made the layer.
    assert caught[0].filename == __file__
    assert layer.settings == Settings.from_config({})


def test_nothing_else_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Settings.from_config({"host": "amqp://broker/"})


def test_repr_shows_no_secrets() -> None:
    result = Settings.from_config(
        {"host": "amqp://alice:hush@broker", "symmetric_encryption_keys": ["hush", b"hush"]}
    )
    assert "alice" in repr(result)
    assert "hush" not in repr(result)


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.binary(),
        st.sampled_from(["amqp://broker", "amqps://broker", "groups"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner),
        st.tuples(inner),
        st.dictionaries(st.one_of(st.text(), st.integers()), inner),
    ),
    max_leaves=4,
)
options = st.sampled_from(
    [
        *NUMBERS,
        "host",
        "ssl_context",
        "channel_capacity",
        "groups_exchange",
        "symmetric_encryption_keys",
        "on_disconnect",
        "on_reconnect",
    ]
)


@settings(deadline=None)
@given(config=st.dictionaries(options, values, max_size=3))
def test_any_config_gives_settings_or_a_value_error(config: dict[str, object]) -> None:
    try:
        result: Settings | ValueError = Settings.from_config(config)
    except ValueError as exc:
        result = exc
    if isinstance(result, ValueError):
        assert type(result) is Mistakes
        assert any(option in str(result) for option in config)
        assert len(result.found) == 1 or str(result).count("\n- ") >= len(result.found)
    else:
        assert 0 < result.local_expiry <= 1500
        assert 1 <= result.local_capacity <= 65535
