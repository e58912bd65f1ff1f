"""The README renders, its code runs, and what it says of options, log lines and numbers is so.

Each code block has a name. ``block("the-name")`` in a test fetches it, and that a test does so for
each of them is a test, too.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import dataclasses
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import types
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import channels.exceptions
import django
import docutils.core  # type: ignore[import-untyped]  # has no annotations
import docutils.nodes  # type: ignore[import-untyped]  # as above
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from channels.layers import ChannelLayerManager, channel_layers
from channels.testing import ApplicationCommunicator, WebsocketCommunicator
from django.conf import settings
from django.test import override_settings
from packaging.requirements import Requirement

import channels_rabbitmq
import channels_rabbitmq.exceptions
from channels_rabbitmq import _codec, _names, _plain_messages, _reporter
from channels_rabbitmq._amqp import heartbeat
from channels_rabbitmq._amqp import url as broker_url
from channels_rabbitmq._amqp.url import BrokerUrl
from channels_rabbitmq._broker import back_off as _back_off
from channels_rabbitmq._broker import bindings as _bindings
from channels_rabbitmq._broker import direct_sender as _direct_sender
from channels_rabbitmq._broker import reasons as _reasons
from channels_rabbitmq._broker import receivers as _receivers
from channels_rabbitmq._broker import supervisor as _supervisor
from channels_rabbitmq._broker import topology as _topology
from channels_rabbitmq._inbox import accounting as _accounting
from channels_rabbitmq._inbox import ages as _ages
from channels_rabbitmq._inbox import router as _router
from channels_rabbitmq._peers import answerer as _answerer
from channels_rabbitmq._peers import greeter as _greeter
from channels_rabbitmq._peers import processes as _processes
from channels_rabbitmq._settings import settings as _settings
from channels_rabbitmq._settings.hosts import read_hosts
from channels_rabbitmq._settings.settings import Settings
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.exceptions import BrokerUnavailable
from channels_rabbitmq.lifespan import LifespanApp
from channels_rabbitmq.statistics import (
    ConnectionStatistics,
    Counters,
    GroupStatistics,
    LoopLayerStatistics,
    ProcessStatistics,
)
from tests.support.brokers import Broker
from tests.support.members import receive, reconnect
from tests.support.normal_channels import delete_queue, queue_of
from tools.private_broker import BrokerFailed, PrivateBroker, TlsFiles, free_port

OpenLayer = Callable[..., Awaitable[RabbitmqChannelLayer]]

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(channels_rabbitmq.__file__).parent
TEXT = (ROOT / "README.rst").read_text(encoding="utf-8")

# The broker of the README's code, for which the tests put theirs.
URL = "amqp://guest:guest@127.0.0.1"

# Blocks that no test can run, and why.
BY_HAND = {"capacities": "a drawing"}


# Reading it


@lru_cache
def document() -> docutils.nodes.document:
    """The README as PyPI reads it: nothing included, no raw HTML; a warning is an error."""
    overrides = {
        "file_insertion_enabled": False,
        "halt_level": 2,
        "raw_enabled": False,
        "report_level": 2,
        "syntax_highlight": "none",
    }
    return docutils.core.publish_doctree(TEXT, settings_overrides=overrides)


@lru_cache
def blocks() -> dict[str, str]:
    """All literal blocks by name; one without a name is an error."""
    found = list(document().findall(docutils.nodes.literal_block))
    names = [name for node in found for name in node["names"]]
    assert len(set(names)) == len(found), "each block needs a name of its own"
    return dict(zip(names, (node.astext() for node in found), strict=True))


def block(name: str) -> str:
    return blocks()[name]


def commands(name: str) -> list[list[str]]:
    """The lines of a shell block as words."""
    return [shlex.split(line, comments=True) for line in block(name).splitlines()]


def section(title: str) -> docutils.nodes.section:
    [found] = [
        node
        for node in document().findall(docutils.nodes.section)
        if node.next_node(docutils.nodes.title).astext() == title
    ]
    return found


def definitions(title: str) -> Iterator[tuple[list[str], str]]:
    """The terms of a section's own definition lists: (literals, what stands in brackets)."""
    for child in section(title).children:
        if isinstance(child, docutils.nodes.definition_list):
            # Those of lists within lists, too.
            for term in child.findall(docutils.nodes.term):
                literals = [node.astext() for node in term.findall(docutils.nodes.literal)]
                _, bracket, remark = term.astext().partition(f"{literals[0]} (")
                yield literals, remark.removesuffix(")") if bracket else ""


def documented_defaults(title: str) -> dict[str, str]:
    return {literals[0]: remark.partition("default ")[2] for literals, remark in definitions(title)}


def test_it_renders() -> None:
    assert document().next_node(docutils.nodes.title).astext() == "channels_rabbitmq"


def test_every_block_is_run_or_was_run_by_hand() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    calls = r'(?:block|commands|run|in_thread)(?:\(|\)\(|, )\s*"([\w-]+)"'
    fetched = set(re.findall(calls, source)) - {"the-name"}
    assert fetched & BY_HAND.keys() == set()
    assert fetched | BY_HAND.keys() == set(blocks())


# What it says of options


def test_every_option_is_there_with_its_default() -> None:
    documented = documented_defaults("Settings")
    assert list(documented) == list(_settings.OPTIONS)
    defaults = Settings.from_config({})
    for option, default in documented.items():
        value = eval(default, {"__builtins__": {}})
        assert Settings.from_config({option: value}) == defaults, option


def test_the_ignored_option() -> None:
    with pytest.warns(DeprecationWarning, match="group_expiry"):
        assert Settings.from_config({"group_expiry": 1}) == Settings.from_config({})


def test_every_parameter_of_the_url_is_there_with_its_default() -> None:
    documented = documented_defaults("The URL")
    assert tuple(documented) == broker_url.PARAMETERS
    for parameter in ("heartbeat", "auth_mechanism", "verify"):
        url = f"amqps://127.0.0.1?{parameter}={documented[parameter]}"
        assert BrokerUrl.parse(url) == BrokerUrl.parse("amqps://127.0.0.1")


def test_the_urls_of_other_tools() -> None:
    text = plain()
    both = text[text.index("- ``pyamqp``") : text.index("Parameters are those of")]
    without, _, with_tls = both.partition(";")
    for tls, part in ((False, without), (True, with_tls)):
        *schemes, target = re.findall("``([^`]+)``", part)
        assert target == ("amqps" if tls else "amqp")
        assert {*schemes, target} == {
            scheme for scheme, is_tls in broker_url.SCHEMES.items() if is_tls == tls
        }
    [several] = re.findall(r"``(amqp://web:secret@a,[^`]*)``", text)
    first, second = read_hosts("host", several)
    assert [str(first), str(second)] == ["amqp://web@a:5672/asgi", "amqp://web@b:5673/asgi"]


def test_the_defaults_of_the_url() -> None:
    assert "user and password are ``guest``, the virtual host is ``/``" in plain()
    url = BrokerUrl.parse("amqp://127.0.0.1")
    assert (url.username, url.password, url.virtual_host, url.port) == ("guest", "guest", "/", 5672)
    assert "port is 5672, or 5671 for ``amqps``" in plain()
    assert BrokerUrl.parse("amqps://127.0.0.1").port == 5671


# What it says of methods and numbers


def test_the_methods_and_what_they_take() -> None:
    terms = [
        term.astext()
        for term in section("What each method does").findall(docutils.nodes.term)
        if "(" in term.astext()
    ]
    layer = RabbitmqChannelLayer()
    for term in terms:
        name, _, parameters = term.rstrip(")").partition("(")
        signature = inspect.signature(getattr(layer, name))
        assert parameters.replace('"', "'") == ", ".join(
            str(parameter.replace(annotation=parameter.empty))
            for parameter in signature.parameters.values()
        )
    methods = {
        name
        for name, value in vars(RabbitmqChannelLayer).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    assert {term.partition("(")[0] for term in terms} == methods


def test_the_exceptions_exist() -> None:
    terms = [
        literals[0]
        for literals, _ in definitions("What each method does")
        if literals[0][0].isupper()
    ]
    assert len(terms) == 9
    for term in terms:
        homes = (channels.exceptions, channels_rabbitmq.exceptions, __import__("builtins"))
        assert [home for home in homes if hasattr(home, term)], term


def plain() -> str:
    """The source of the README with all white space made one space."""
    return " ".join(TEXT.split())


def test_numbers() -> None:
    constructor = inspect.signature(_bindings.Bindings).parameters
    watchdog = Settings.from_config({}).watchdog_interval
    two_heartbeats = broker_url.DEFAULT_HEARTBEAT  # RabbitMQ sends two in an interval
    for sentence in (
        f"message is tried again for {_direct_sender.RETRY_TIMEOUT:g} seconds",
        f"share {_receivers.STRANGERS_TIMEOUT:g} seconds of tries in all, which come back in "
        f"{_receivers.STRANGERS_INTERVAL:g} seconds",
        f"after a reconnect of the sender's own for {_direct_sender.RECONNECT_GRACE:g} seconds",
        f"after {watchdog:g} to {2 * watchdog:g} seconds of silence",
        f"hears nothing for {watchdog:g} to {2 * watchdog:g} seconds",
        f"noticed within {2 * watchdog + two_heartbeats:g} seconds",
        f"at most {30 * 86400 / watchdog:,.0f} each in a month of 30 days",
        f"within {2 * watchdog + heartbeat.ANSWER_TIMEOUT_WITHOUT_HEARTBEATS + 10:g} seconds if",
        f"``watchdog_interval`` is {watchdog:g}",
        f"isn't answered for {heartbeat.ANSWER_TIMEOUT_WITHOUT_HEARTBEATS:g} seconds",
        f"Notices within {2 * two_heartbeats:g} seconds, when it has heard two heartbeats",
        f"first after {_back_off.FIRST_DELAY:g} seconds",
        f"every {_back_off.LONGEST_DELAY:g} seconds",
        f"every {_back_off.LONGEST_DELAY_IF_REFUSED:g} seconds as long as RabbitMQ refuses it",
        f"stays bound for {constructor['linger'].default:g} seconds",
        f"within {_reporter.FIRST_INTERVAL:g} seconds of the first event, "
        f"then once in {_reporter.INTERVAL:g} seconds",
        f"in {_plain_messages.MAX_DEPTH} levels at most",
        f"at most {_names.LONGEST} ASCII letters",
        f"``local_expiry`` (seconds up to {_settings.LONGEST_LOCAL_EXPIRY:g}",
        f"messages, 1 to {_settings.LARGEST_LOCAL_CAPACITY};",
        f"seconds, at least {_settings.SHORTEST_EXPIRY:g}",
        f"milliseconds, at least {broker_url.SHORTEST_CONNECTION_TIMEOUT};",
        f"silent after {1.5 * broker_url.DEFAULT_HEARTBEAT:g} seconds",
        f"one and a half heartbeats ({1.5 * broker_url.DEFAULT_HEARTBEAT:g} seconds)",
        f"about three heartbeats ({3 * broker_url.DEFAULT_HEARTBEAT:g} seconds)",
        f"within {2 * watchdog + two_heartbeats:g} seconds by a message to itself",
        f"tried for {_direct_sender.RETRY_TIMEOUT:g} seconds and dropped",
        f"beyond ``capacity`` or {_accounting.EARLY_ACKED_BYTES // 2**20} MiB",
        f"{_accounting.EARLY_ACKED_BYTES // 2**20} MiB for stalled channels",
        f"{_accounting.EARLY_ACKED_BYTES // 2**20} MiB for the process",
        f"with {_accounting.MESSAGE_OVERHEAD} bytes for each message beyond its body",
        f"has at most {_codec.LONGEST_INFO} bytes when it is encoded",
        f"the ``info`` has more than {_codec.LONGEST_INFO} bytes",
        f"up to {_topology.MOST_REQUESTS:,} requests or "
        f"{_topology.MOST_REQUEST_BYTES // 2**20} MiB",
        f"or {_answerer.MOST_AT_ONCE} changes were under way or "
        f"{_answerer.MOST_QUESTIONS:,} questions waiting",
    ):
        assert sentence in plain(), sentence
    assert _processes.GONE_AFTER == 10
    assert "After ten seconds such a process counts as gone" in plain()
    assert "has been without a connection for ten seconds" in plain()
    assert _greeter.SETTLE_TIMEOUT == 0.5
    assert "In the first half second after an event loop has connected" in plain()
    assert _topology.REQUEST_EXPIRY == 5
    assert "stood still for more than five seconds may have missed" in plain()
    assert "wait for it on RabbitMQ, for five seconds" in plain()
    assert _receivers.UNREACHABLE_TIMEOUT == _receivers.HEARD_TIMEOUT == 60
    assert "took a message from this one in the last minute" in plain()
    assert "remembered for a minute" in plain()
    assert _reasons.REMINDER_INTERVAL == 60
    assert "told once a minute" in plain()
    assert _router.BEHIND == 1
    assert "messages so for more than a second" in plain()
    assert _ages.WINDOW == 30
    assert "in the last half minute or minute" in plain()
    defaults = Settings.from_config({})
    assert defaults.remote_capacity is not None
    assert f"{defaults.remote_capacity + defaults.local_capacity:,} by default" in plain()


def test_every_field_of_the_statistics_is_explained() -> None:
    explained = [name for literals, _ in definitions("Statistics") for name in literals]
    fields = {field.name for field in dataclasses.fields(LoopLayerStatistics)}
    totals = {f"counters.{field.name}" for field in dataclasses.fields(Counters)}
    assert sorted(explained) == sorted(fields | totals)
    said = " ".join(section("Statistics").astext().split())
    nested = (ConnectionStatistics, GroupStatistics, ProcessStatistics)
    for kind in nested:
        for field in dataclasses.fields(kind):
            assert re.search(rf"\b{field.name}\b", said), field.name
    for state in _supervisor.State:
        assert f'"{state.value}"' in said
    # And what is to be watched is there.
    watched = re.findall(r"``([a-z_]+(?:\.[a-z_]+)?)``", " ".join(block_of("What to watch")))
    known = (
        fields
        | totals
        | {
            f"{name}.{field.name}"
            for name, kind in zip(
                ("publisher", "subscriber", "groups", "processes"),
                (ConnectionStatistics, *nested),
                strict=True,
            )
            for field in dataclasses.fields(kind)
        }
    )
    assert len(watched) > 10
    others = {"since", "last_reason", "messages_ready", "messages_unacknowledged"}
    assert set(watched) - known - others - set(_settings.OPTIONS) == set()


def block_of(title: str) -> list[str]:
    """The lines of a section's source."""
    lines = TEXT.splitlines()
    start = lines.index(title)
    underlined = [n for n, line in enumerate(lines) if re.fullmatch(r"(-{3,}|={3,})", line)]
    end = next(n for n in underlined if n > start + 1 and lines[n - 1].strip())
    return lines[start : end - 1]


# What it says of the log


def logged_lines() -> Iterator[tuple[str, str]]:
    """(format, level) of each line in the package's source, but for those of the reporter."""
    levels = {"exception": "ERROR"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="logger"), attr=attribute),
                    args=[ast.Constant(value=str(text)), *_],
                ):
                    yield text, levels.get(attribute, attribute.upper())
                case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"))):
                    pytest.fail(f"{path.name}:{node.lineno}: the format isn't a literal")


def documented_lines() -> list[tuple[str, str]]:
    return [(literals[0], remark) for literals, remark in definitions("Logging") if remark]


def as_pattern(text: str) -> str:
    """A regular expression for the README's form of a format: ``%s`` is a word in capitals."""
    return "[A-Z]+".join(re.escape(part) for part in re.split(r"%\.?\d*[a-z]", text))


def test_every_log_line_is_explained() -> None:
    documented = documented_lines()
    expected = {(text, level) for text, level in logged_lines()}
    expected |= {(sentence, "WARNING") for sentence in _reporter.SENTENCES.values()}
    assert len(expected) > 15
    explained = set()
    for text, level in expected:
        found = [line for line in documented if re.fullmatch(as_pattern(text), line[0])]
        assert [line_level for _, line_level in found] == [level], text
        explained.update(found)
    assert explained == set(documented)


def test_the_loggers() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    [text] = re.findall("lines come from its children(.*?) No line", TEXT, re.DOTALL)
    # By names of their own: those of private modules may change.
    names = re.findall(r'getLogger\("channels_rabbitmq\.(\w+)"\)', source)
    assert set(re.findall(r"\.(\w+)``", text)) == set(names)
    assert source.count("getLogger(") == len(names)


def test_the_reasons_are_those_in_the_source() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    reasons = [
        literal for literals, remark in definitions("Logging") if not remark for literal in literals
    ]
    ours = [reason for reason in reasons if not re.match(r"\d|\[", reason)]  # not the broker's
    assert len(ours) >= 8
    for reason in ours:
        assert re.split(r"\.\.\.|URL", reason)[0].strip() in source, reason


# Its Python


def run(name: str, *replacements: tuple[str, str]) -> dict[str, Any]:
    """Execute a block in which each (old, new) was replaced; return its names."""
    code = block(name)
    for old, new in replacements:
        code = replaced(code, old, new)
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(code, f"README.rst, {name}", "exec"), namespace)
    return namespace


def replaced(code: str, old: str, new: str) -> str:
    assert old in code
    return code.replace(old, new)


def in_thread(name: str, *replacements: tuple[str, str]) -> Awaitable[dict[str, Any]]:
    return asyncio.to_thread(run, name, *replacements)


@pytest.fixture
async def open_from_settings(
    open_layer: OpenLayer, groups_exchange: str
) -> Callable[[dict[str, Any]], Awaitable[RabbitmqChannelLayer]]:
    """Opens the layer of a block with ``CHANNEL_LAYERS`` as Django and Channels do."""
    if not settings.configured:
        settings.configure()
        django.setup()

    async def open_one(namespace: dict[str, Any]) -> RabbitmqChannelLayer:
        with override_settings(CHANNEL_LAYERS=namespace["CHANNEL_LAYERS"]):
            assert isinstance(ChannelLayerManager()["default"], RabbitmqChannelLayer)
        return await open_layer(**namespace["CHANNEL_LAYERS"]["default"]["CONFIG"])

    return open_one


OpenFromSettings = Callable[[dict[str, Any]], Awaitable[RabbitmqChannelLayer]]


async def must_work(layer: RabbitmqChannelLayer, other: RabbitmqChannelLayer | None = None) -> None:
    """``layer`` gets what it, or ``other``, sends to its channel and group."""
    other = other or layer
    channel = await layer.new_channel()
    await layer.group_add("chat", channel)
    await other.send(channel, {"type": "direct"})
    await other.group_send("chat", {"type": "group"})
    assert (await receive(layer, channel))["type"] == "direct"
    assert (await receive(layer, channel))["type"] == "group"


async def test_encryption(
    open_layer: OpenLayer, open_from_settings: OpenFromSettings, broker: Broker
) -> None:
    layer = await open_from_settings(run("encryption", (URL, broker.url)))
    # As the README says of changing keys, and of programs with other keys.
    await must_work(layer, await open_layer(symmetric_encryption_keys=["old key"]))
    channel = await layer.new_channel()
    for keys in (["third key"], None):
        stranger = await open_layer(symmetric_encryption_keys=keys)
        await stranger.send(channel, {"type": "lost"})
    await layer.send(channel, {"type": "next"})
    assert await receive(layer, channel) == {"type": "next"}


async def test_encryption_by_another_program(open_layer: OpenLayer) -> None:
    import base64
    import hashlib

    import msgpack
    from cryptography.fernet import Fernet

    codec = _codec.MessageCodec(max_message_size=1000, symmetric_encryption_keys=["new key"])
    key = base64.urlsafe_b64encode(hashlib.sha256(b"new key").digest())
    token = Fernet(key).encrypt(msgpack.packb({"type": "t"}))
    body = msgpack.packb({"__asgi_group__": "chat", "__asgi_encrypted__": token})
    assert codec.decode(body).message() == {"type": "t"}


async def test_serializers(
    open_layer: OpenLayer, open_from_settings: OpenFromSettings, broker: Broker
) -> None:
    layer = await open_from_settings(run("serializer", (URL, broker.url)))
    await must_work(layer, await open_layer(serializer="json"))
    own = run("serializer-class")["PickleSerializer"]
    await must_work(await open_layer(serializer=own), await open_layer(serializer=own))
    channel = await layer.new_channel()
    for serializer in (own, "msgpack"):
        stranger = await open_layer(serializer=serializer)
        await stranger.send(channel, {"type": "lost"})
    await layer.send(channel, {"type": "next"})
    assert await receive(layer, channel) == {"type": "next"}


async def test_a_serializer_by_another_program() -> None:
    import msgpack

    from channels_rabbitmq._serializers import load_serializer

    codec = _codec.MessageCodec(max_message_size=1000, serializer=load_serializer("json"))
    content = {"__asgi_serializer__": "json", "__asgi_serialized__": b'{"type": "t"}'}
    body = msgpack.packb({"__asgi_group__": "chat", **content})
    assert codec.decode(body).message() == {"type": "t"}


async def test_host_function(
    open_from_settings: OpenFromSettings,
    broker: Broker,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    password, address = "guest", broker.url.rpartition("@")[2]
    secret = tmp_path / "password"
    secret.write_text(f"{password}\n")
    module = types.ModuleType("mysite.rabbitmq")
    module.__dict__.update(
        run(
            "host-function",
            ("/run/secrets/rabbitmq-password", str(secret)),
            ("web:", "guest:"),
            ("rabbit.example.com/asgi", address),
        )
    )
    monkeypatch.setitem(sys.modules, "mysite", types.ModuleType("mysite"))
    monkeypatch.setitem(sys.modules, "mysite.rabbitmq", module)
    layer = await open_from_settings(run("host-function-settings"))
    await must_work(layer)
    await reconnect(layer)
    await must_work(layer)


async def test_cluster(open_from_settings: OpenFromSettings, broker: Broker) -> None:
    """Two nodes are down, the third takes it."""
    first, second, last = re.findall(r"amqp://web:secret@rabbit.*?(?=\")", block("cluster"))
    virtual_host = urlsplit(broker.url).path
    namespace = run(
        "cluster",
        (first, f"amqp://127.0.0.1:{free_port()}{virtual_host}"),
        (second, f"amqp://127.0.0.1:{free_port()}{virtual_host}"),
        (last, broker.url),
    )
    await must_work(await open_from_settings(namespace))


@pytest.mark.timeout(120)
async def test_tls(
    open_from_settings: OpenFromSettings,
    private_broker_factory: Callable[..., PrivateBroker],
    certs: Path,
) -> None:
    """With a broker that demands a client certificate."""
    private = private_broker_factory(tls=TlsFiles.in_folder(certs, mutual=True))
    replacements = (
        ("web:secret@rabbit.example.com/asgi", f"guest:guest@localhost:{private.tls_port}"),
        ("/etc/mysite/", f"{certs}/"),
    )
    await must_work(await open_from_settings(run("tls-url", *replacements)))
    await must_work(await open_from_settings(run("tls-context", *replacements)))


@pytest.mark.timeout(120)
async def test_permissions(
    open_layer: OpenLayer, private_broker_factory: Callable[..., PrivateBroker]
) -> None:
    private = private_broker_factory()

    def rabbitmqctl(*words: str) -> Awaitable[str]:
        return asyncio.to_thread(private.ctl, *words)

    for command, *words in commands("permissions"):
        assert command == "rabbitmqctl"
        await rabbitmqctl(*words)
    url = private.url.replace("guest:guest", "web:secret") + "/asgi"
    config: dict[str, Any] = {"host": url, "groups_exchange": "groups", "operation_timeout": 2}
    layer = await open_layer(**config)
    await must_work(layer)
    await reconnect(layer)
    await must_work(layer)

    # A channel of a 4.x process is a queue's name, on the default exchange.
    [write] = re.findall(r"``'(\S+amq\S+)'``", TEXT)
    everything = await open_layer(**{**config, "host": private.url + "/asgi"})
    await rabbitmqctl("set_permissions", "-p", "asgi", "guest", ".*", ".*", ".*")
    connection = await everything.carehare_connection
    await connection.queue_declare("channels_abcdefghijkl", exclusive=True)
    same = words[-1]
    await rabbitmqctl("set_permissions", "-p", "asgi", "web", same, write, same)
    async with connection.acking_consumer("channels_abcdefghijkl") as consumer:
        await layer.send("channels_abcdefghijkl!x", {"type": "t"})
        await asyncio.wait_for(consumer.next_delivery(), 10)

    # Who only sends
    [patterns] = re.findall(r"only sends needs ``'(\S*)'``, ``'(\S*)'`` and ``'(\S*)'``", plain())
    await rabbitmqctl("set_permissions", "-p", "asgi", "web", *patterns)
    await must_work(everything, await open_layer(**config))


def test_logging() -> None:
    """In a process of its own: it changes logging for good."""
    program = f"""
import django, logging
from django.conf import settings
{block("logging")}
settings.configure(LOGGING=LOGGING)
django.setup()
logging.getLogger("channels_rabbitmq.connection").info("a line")
logging.getLogger("channels_rabbitmq.connection").debug("not this one")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == "a line\n"


@pytest.fixture
async def default_layer(open_layer: OpenLayer) -> AsyncIterator[RabbitmqChannelLayer]:
    """What ``get_channel_layer()`` returns during the test."""
    layer = await open_layer()
    channel_layers.set("default", layer)
    yield layer
    await asyncio.to_thread(lambda: async_to_sync(layer.close)())
    del channel_layers.backends["default"]


async def test_sync_code(default_layer: RabbitmqChannelLayer) -> None:
    channel = await default_layer.new_channel()
    await default_layer.group_add("chat", channel)
    # On a loop of its own, and on this one, as in a sync view.
    await in_thread("sync")
    await sync_to_async(run)("sync")
    for _ in range(2):
        assert await receive(default_layer, channel) == {"type": "chat.message", "text": "hi"}


async def test_which_loop_sync_code_uses(default_layer: RabbitmqChannelLayer) -> None:
    def new_id() -> str:
        channel: str = async_to_sync(default_layer.new_channel)()
        return channel.partition("!")[0]

    own_id = (await default_layer.new_channel()).partition("!")[0]
    assert await sync_to_async(new_id)() == own_id
    ids = [await asyncio.to_thread(new_id) for _ in range(2)]
    assert own_id not in ids
    assert ids[0] == ids[1]


async def test_sync_codes_channel(
    default_layer: RabbitmqChannelLayer, capsys: pytest.CaptureFixture[str]
) -> None:
    code = block("sync").partition("async_to_sync(get")[0] + block("sync-channel")
    await asyncio.to_thread(exec, code, {})
    said = code.rpartition("# ")[2]
    assert capsys.readouterr().out.strip() == said.strip()


async def test_normal_channels(
    open_layer: OpenLayer,
    open_from_settings: OpenFromSettings,
    broker: Broker,
    groups_exchange: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layer = await open_from_settings(run("normal-channels", (URL, broker.url)))
    monkeypatch.setitem(channel_layers.backends, "default", layer)
    await in_thread("normal-channels-use")
    said = block("normal-channels-use").rpartition("# ")[2]
    assert capsys.readouterr().out.strip() == said.strip()
    await asyncio.to_thread(async_to_sync(layer.close))
    await delete_queue(broker.url, queue_of(groups_exchange, "test_channel"))


async def test_lifespan(default_layer: RabbitmqChannelLayer) -> None:
    to_app = ApplicationCommunicator(run("lifespan")["application"], {"type": "lifespan"})
    await to_app.send_input({"type": "lifespan.startup"})
    assert await to_app.receive_output(10) == {"type": "lifespan.startup.complete"}
    await to_app.send_input({"type": "lifespan.shutdown"})
    assert await to_app.receive_output(10) == {"type": "lifespan.shutdown.complete"}
    with pytest.raises(BrokerUnavailable):
        await default_layer.connect()


def test_the_lifespan_apps_parameters() -> None:
    [said] = re.findall(r"``LifespanApp\((.*?)\)`` connects", TEXT)
    parameters = list(inspect.signature(LifespanApp).parameters.values())
    plain = (str(parameter.replace(annotation=parameter.empty)) for parameter in parameters)
    assert ", ".join(plain) == said.replace('"', "'")


async def test_statistics(default_layer: RabbitmqChannelLayer) -> None:
    metrics = run("statistics")["metrics"]
    assert metrics() == "[]"
    await must_work(default_layer)
    (one,) = json.loads(await asyncio.to_thread(metrics))
    assert (one["counters"]["consumed"], one["subscriber"]["state"]) == (2, "connected")


async def test_presence(default_layer: RabbitmqChannelLayer) -> None:
    consumer = run("presence")["RoomConsumer"]
    await default_layer.group_count("room", 10.0)  # From now on it knows all.
    clients = []
    here = []
    for name in ("Ada", "Bob"):
        client = WebsocketCommunicator(consumer.as_asgi(), "/")
        client.scope["url_route"] = {"kwargs": {"name": name}}
        assert await client.connect(10) == (True, None)
        clients.append(client)
        here.append(name)
        assert await client.receive_json_from(10) == {"here": here, "all": True}
    for client in clients:
        await client.disconnect()
    assert await default_layer.group_count("room", 10.0) == 0


async def test_what_operators_see(default_layer: RabbitmqChannelLayer, broker: Broker) -> None:
    if broker.private is None:
        pytest.skip("needs rabbitmqctl for the broker")
    await must_work(default_layer)
    shown = []
    for command, *words in commands("watch"):
        assert command == "rabbitmqctl"
        words = ["/" if word == "asgi" else word for word in words]
        shown.append(await asyncio.to_thread(broker.private.ctl, *words))
    id_ = default_layer.statistics()[0].id
    assert f"channels_rabbitmq subscriber {id_} " in shown[0]
    assert re.search(rf"^{re.escape(id_)}\t0\t0\t1$", shown[1], re.MULTILINE)
    assert "Alarms" in shown[2]


async def test_definitions(open_layer: OpenLayer, private_broker: PrivateBroker) -> None:
    """The export leaves out what is the layer's; what remains of others' goes, and of it only."""
    if shutil.which("jq") is None:
        pytest.skip("needs jq")
    layer = await open_layer(host=private_broker.url)
    await must_work(layer)
    everything, definitions = (f"{private_broker.folder}/{name}" for name in ("all", "without"))
    export, jq = block("export-definitions").split("\n", maxsplit=1)
    export, jq = (
        text.replace("/tmp/all.json", everything).replace("/tmp/definitions.json", definitions)
        for text in (export, jq)
    )
    await asyncio.to_thread(private_broker.ctl, *shlex.split(export)[1:])
    await asyncio.to_thread(subprocess.run, ["sh", "-c", jq], check=True)
    assert "crq." in Path(everything).read_text(encoding="utf-8")
    assert "crq." not in Path(definitions).read_text(encoding="utf-8")
    await asyncio.to_thread(private_broker.ctl, "import_definitions", definitions)

    # As if it were another process's, without a lease
    remains = Path(everything).read_text(encoding="utf-8")
    remains = remains.replace(layer.statistics()[0].id, "crq.aaaaaaaaaaaaaaaa")
    remains = json.dumps({**json.loads(remains), "queues": []})
    Path(everything).write_text(remains, encoding="utf-8")
    with contextlib.suppress(BrokerFailed):
        await asyncio.to_thread(private_broker.ctl, "import_definitions", everything)

    async def exchanges() -> list[str]:
        rows = await asyncio.to_thread(private_broker.list_exchanges, "name")
        return [row["name"] for row in rows if row["name"].startswith("crq.")]

    before = await exchanges()
    _, *words = shlex.split(block("delete-remains").replace("asgi", "/"))
    await asyncio.to_thread(private_broker.ctl, *words)
    own = [name for name in before if not name.startswith("crq.aaaaaaaaaaaaaaaa")]
    assert (len(before), len(own)) == (8, 4)
    assert sorted(await exchanges()) == sorted(own)
    rows = await asyncio.to_thread(private_broker.list_bindings, "destination_name")
    assert not [row for row in rows if "crq.aaaaaaaaaaaaaaaa" in row["destination_name"]]
    await must_work(layer)


async def test_hooks(
    open_layer: OpenLayer,
    open_from_settings: OpenFromSettings,
    broker: Broker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clients of a process whose connection was lost hear of it, and only these."""
    module = types.ModuleType("mysite.consumers")
    module.__dict__.update(run("hooks"))
    monkeypatch.setitem(sys.modules, "mysite", types.ModuleType("mysite"))
    monkeypatch.setitem(sys.modules, "mysite.consumers", module)
    layer = await open_from_settings(run("hooks-settings", (URL, broker.url)))
    # Those of another server process.
    other = await open_layer()
    clients = []
    for used in (layer, other):
        monkeypatch.setitem(channel_layers.backends, "default", used)
        client = WebsocketCommunicator(module.Dashboard.as_asgi(), "/")
        assert await client.connect(10) == (True, None)
        clients.append(client)
    monkeypatch.setitem(channel_layers.backends, "default", layer)
    for _ in range(2):
        await reconnect(layer)
        assert await clients[0].receive_json_from(10) == {"fetch": "everything"}
    assert await clients[1].receive_nothing(0.1)
    for client in clients:
        await client.disconnect()


async def test_carehare_connection(
    default_layer: RabbitmqChannelLayer, groups_exchange: str
) -> None:
    names = run("carehare", ('"jobs"', f'"jobs-of-{groups_exchange}"'), ("True", "False"))
    assert await default_layer.current_connection is await default_layer.carehare_connection
    done: asyncio.Queue[bytes] = asyncio.Queue()
    working = asyncio.create_task(names["work"](done.put))
    try:
        for job in (b"one", b"two"):
            await names["enqueue"](job)
            assert await asyncio.wait_for(done.get(), 10) == job
    finally:
        working.cancel()
        await asyncio.wait([working])


@pytest.mark.parametrize("program", ["kombu", "pika"])
async def test_other_programs(
    open_layer: OpenLayer, broker: Broker, groups_exchange: str, program: str
) -> None:
    layer = await open_layer()
    channel = await layer.new_channel()
    await layer.group_add("chat", channel)
    replacements = ((URL, broker.url), ('"groups"', repr(groups_exchange)))
    if program == "kombu":
        names = await asyncio.to_thread(run, "kombu", *replacements)
    else:
        names = await asyncio.to_thread(run, "pika", *replacements)
    assert await receive(layer, channel) == {"type": "chat.message", "text": f"from {program}"}
    await asyncio.to_thread(names["send_to_channel"], channel, {"type": "to.one"})
    assert await receive(layer, channel) == {"type": "to.one"}
    await asyncio.to_thread(names["send_to_group"], "chat", {"type": "to.all"})
    assert await receive(layer, channel) == {"type": "to.all"}


# Its commands


def test_what_is_installed() -> None:
    """The names, versions and extras; test_packaging builds and reads what pip gets."""
    extras = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE))
    for line in commands("install"):
        *pip, text = line
        assert pip == ["python", "-m", "pip", "install"]
        requirement = Requirement(text)
        assert requirement.name == "channels_rabbitmq"
        assert channels_rabbitmq.__version__ in requirement.specifier
        assert requirement.extras <= extras


def test_the_scripts() -> None:
    """They exist and know these options. scripts/test --everything runs scripts/demo --check."""
    programs = {"scripts/demo": "tools.run_demo", "scripts/test": "tools.run_tests"}
    lines = commands("commands") + commands("commands-with-a-broker")
    seen = set()
    for line in lines:
        while "=" in line[0]:
            variable, _, _ = line.pop(0).partition("=")
            assert variable in ("RABBITMQ_URL", "RABBITMQ_BIN")
        command, *arguments = line
        assert os.access(ROOT / command, os.X_OK)
        seen.add(command)
        for argument in arguments:
            if argument.startswith("--"):
                done = subprocess.run(
                    [sys.executable, "-m", programs[command], "--help"],
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                assert argument in done.stdout
    assert seen == programs.keys()


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
    install, (_, *start_project), (_, folder) = commands("quick-start-project")
    assert install[:4] == ["python", "-m", "pip", "install"]
    for package in install[4:]:
        __import__(package)
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
        for program, option, port, application, background in commands("quick-start-servers"):
            assert (option, background) == ("--port", "&")
            ports[port] = str(free_port())
            command = [sys.executable, "-m", program, option, ports[port], application]
            processes.append(subprocess.Popen(command, cwd=project, env=environment))
        for process, port in zip(processes, ports.values(), strict=True):
            wait_until_it_answers(process, f"http://127.0.0.1:{port}")
        for _, *arguments in commands("quick-start-clients"):
            url = arguments.pop()
            for port, used in ports.items():
                url = url.replace(port, used)
            clients.append(Client([sys.executable, *arguments, url], environment))
        for client in clients:
            client.wait_for("Connected to")
        [text] = re.findall(r"type ``(\{.*?\})``", plain())
        clients[0].type(text)
        for client in clients:
            client.wait_for(f"< {text}")
    finally:
        for client in clients:
            client.stop()
        for process in processes:
            process.send_signal(signal.SIGINT)
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
