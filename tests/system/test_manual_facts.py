"""What the manual says of options, methods, statistics, log lines and numbers is so."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import channels.exceptions
import docutils.core  # type: ignore[import-untyped]  # has no annotations
import docutils.nodes  # type: ignore[import-untyped]  # as above
import pytest

import channels_rabbitmq
import channels_rabbitmq.exceptions
from channels_rabbitmq import _codec, _names, _plain_messages, _reporter, _windows
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
from channels_rabbitmq._inbox import router as _router
from channels_rabbitmq._peers import answerer as _answerer
from channels_rabbitmq._peers import greeter as _greeter
from channels_rabbitmq._peers import processes as _processes
from channels_rabbitmq._settings import settings as _settings
from channels_rabbitmq._settings.hosts import read_hosts
from channels_rabbitmq._settings.settings import Settings
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.statistics import (
    ConnectionStatistics,
    Counters,
    GroupStatistics,
    LoopLayerStatistics,
    ProcessStatistics,
)
from tests.support.manual import (
    DOCS,
    README,
    ROOT,
    TEXT,
    definitions,
    documented_defaults,
    lines_of,
    plain,
    section,
)

PACKAGE = Path(channels_rabbitmq.__file__).parent


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


def test_all_public_modules_are_in_the_api() -> None:
    text = (DOCS / "reference" / "api.rst").read_text(encoding="utf-8")
    modules = {path.stem for path in PACKAGE.glob("[a-z]*.py")} | {
        path.parent.name for path in PACKAGE.glob("[a-z]*/__init__.py")
    }
    for module in modules - {"apps", "management"}:  # which Django imports
        assert f"\nchannels_rabbitmq.{module}\n---" in text, module


def test_the_keys_of_a_body() -> None:
    said = (
        lines_of("Wire format") + lines_of("With encryption") + lines_of("With another serializer")
    )
    keys = {value for name, value in vars(_codec).items() if name.endswith("_KEY")}
    assert len(keys) == 5
    assert set(re.findall(r'``"(__asgi_\w+__)"``', "\n".join(said))) == keys


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
    assert _windows.WINDOW == 30
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
    watched = re.findall(r"``([a-z_]+(?:\.[a-z_]+)?)``", " ".join(lines_of("What to watch")))
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


# What it says of benchmarks

LAYERS = ["(this)", "4.0.1", "core", "pubsub"]
# The manual's rows by the titles of the results, as these begin
SCENARIOS = {
    "Round trips a second": "Latency: one message in flight",
    "Messages of 100 bytes a second": "Throughput: messages of 100 bytes",
    "Messages of 10 KiB a second": "Throughput: messages of 10 KiB",
    "Deliveries a second, bursts to a group of 2,000": "Fan-out: bursts",
    "Deliveries a second, single messages to it": "Fan-out: one message",
    "Joins and leaves a second": "Group churn: page loads, an own",
    "Calls of sync code a second": "Group sends of a script",
    "Milliseconds for a message of 1 MiB": "Messages of 1 MiB",
    "MiB for 10,000 idle channels": "Memory: 10,000 channels",
    "MiB for 10,000 groups": "Memory: 10,000 groups",
}


def medians(title: str, column: int = 1) -> list[str]:
    """One for each layer, out of the newest results."""
    text = (ROOT / "benchmarks" / "results" / "results.rst").read_text(encoding="utf-8")
    found = re.search(
        rf"^{re.escape(title)}.*\n-+\n(?s:.*?)\nchannels_rabbitmq \(this\)", text, re.M
    )
    assert found is not None, title
    lines = text[found.end() - len("channels_rabbitmq (this)") :].splitlines()[: len(LAYERS)]
    rows = [re.split(r"  +", line) for line in lines]
    assert [row[0].partition(" ")[2] for row in rows] == LAYERS
    return [row[column].partition(" ")[0] for row in rows]


def test_the_table_of_benchmarks() -> None:
    rows = "\n".join(lines_of("Benchmarks")).split("   * - ")[2:]
    cells = [re.findall(r"^(?:     - )?(.+)$", row, re.MULTILINE) for row in rows]
    assert {row[0]: row[1:] for row in cells} == {
        what: medians(title) for what, title in SCENARIOS.items()
    }


def test_the_figures_of_the_readme() -> None:
    def rounded(figures: list[str]) -> list[str]:
        return [f"{round(int(figure.replace(',', '')), -2):,}" for figure in figures]

    text = README.read_text(encoding="utf-8")
    own, _, core, pubsub = rounded(medians(SCENARIOS["Messages of 100 bytes a second"]))
    assert re.search(rf"messages/second +{own} +\*core\*: {core}; \*pubsub\*: {pubsub}\n", text)
    own, _, core, pubsub = medians(SCENARIOS["Round trips a second"], column=3)
    row = rf"Round trip, median +{own} ms +\*core\*: {core} ms; \*pubsub\*: {pubsub} ms\n"
    assert re.search(row, text)


# What it says of the log


def logged_lines() -> Iterator[tuple[str, str]]:
    """(format, level) of each line in the package's source, but for those of the reporter."""
    levels = {"warning": "WARNING", "error": "ERROR", "exception": "ERROR"}
    levels |= {"info": "INFO", "debug": "DEBUG"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="logger"), attr=attribute),
                    args=[ast.Constant(value=str(text)), *_],
                ):
                    yield text, levels[attribute]
                case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"), attr=attribute)) if (
                    attribute in levels or attribute == "log"
                ):
                    pytest.fail(f"{path.name}:{node.lineno}: the format isn't a literal")


def documented_lines() -> list[tuple[str, str]]:
    return [(literals[0], remark) for literals, remark in definitions("Logging") if remark]


def as_pattern(text: str) -> str:
    """A regular expression for the manual's form of a format: ``%s`` is a word in capitals."""
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
    # By names of their own: those of private modules may change. (The check reads all of them.)
    names = re.findall(r'getLogger\("channels_rabbitmq(\.\w+)?"\)', source)
    assert set(re.findall(r"(\.\w+)``", text)) == set(filter(None, names))
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
