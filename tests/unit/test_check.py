"""What ``check`` says where no RabbitMQ answers, and of which RabbitMQ it is."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import ssl
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from typing import Any

import pytest

from channels_rabbitmq._settings.settings import Settings
from channels_rabbitmq._tools.check_layer import describe_missing
from channels_rabbitmq._tools.check_permissions import needs_of
from channels_rabbitmq._tools.check_report import Finding, Report, Status, Step
from channels_rabbitmq._tools.check_tls import describe_tls
from channels_rabbitmq._tools.check_trial import Trial, collected_warnings
from channels_rabbitmq._tools.check_versions import describe_broker
from channels_rabbitmq._tools.quiet import quiet_log
from channels_rabbitmq._tools.status import limited_settings
from channels_rabbitmq.status import MissingProcess
from channels_rabbitmq.status import Status as ProcessesStatus
from tests.support.checks import Checked, check
from tests.support.fake_servers import (
    closing_server,
    fake_server,
    silent_server,
    swallowing_address,
)
from tests.support.name_server import serve_names
from tools.private_broker import free_port

# Milliseconds for an attempt, so that no test waits for the check's own limit
QUICK = "?connection_timeout=1000"


def assert_failed(checked: Checked, step: str, text: str, advice: str) -> None:
    name, told, todo = checked.the_failed()
    assert name == step
    assert text in told
    assert advice in todo
    everything = json.dumps([each.as_json() for each in checked.report.steps])
    assert "s3cret" not in everything


async def test_nobody_listens() -> None:
    checked = await check(f"amqp://web:s3cret@127.0.0.1:{free_port()}")
    assert_failed(checked, "TCP", "Connect call failed", "is RabbitMQ running")


async def test_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_names(monkeypatch, broker=list)
    checked = await check("amqp://web:s3cret@broker.test")
    assert_failed(checked, "name look-up", "knows no address of the host broker.test", "in Docker")


async def test_a_name_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("channels_rabbitmq._tools.check_connection._LOOK_UP", 0.1)
    serve_names(monkeypatch, broker=lambda: time.sleep(0.5) or [])
    checked = await check("amqp://web:s3cret@broker.test")
    assert_failed(checked, "name look-up", "no answer from the name server", "/etc/resolv.conf")


async def test_a_machine_that_swallows_packets() -> None:
    port = free_port()
    with swallowing_address("127.0.0.1", port):
        checked = await check(f"amqp://web:s3cret@127.0.0.1:{port}{QUICK}")
    assert_failed(checked, "TCP", "no answer", "firewall")


@pytest.mark.parametrize(
    ("server", "scheme", "step", "text", "advice"),
    [
        (silent_server, "amqp", "RabbitMQ", "doesn't greet", "frozen"),
        (silent_server, "amqps", "TLS", "doesn't answer to TLS", "frozen"),
        (closing_server, "amqp", "RabbitMQ", "ended the connection before it greeted", "port"),
        (lambda: fake_server(answer=b"HTTP/1.1 400 Bad\r\n"), "amqp", "RabbitMQ", "HTTP", "port"),
        (lambda: fake_server(answer=b"-ERR unknown\r\n"), "amqp", "RabbitMQ", "Redis", "port"),
        (lambda: fake_server(answer=b"-ERR unknown\r\n"), "amqps", "TLS", "TLS", "amqp://"),
    ],
)
async def test_a_stranger(
    server: Callable[[], Any], scheme: str, step: str, text: str, advice: str
) -> None:
    async with server() as fake:
        checked = await check(f"{scheme}://web:s3cret@127.0.0.1:{fake.port}{QUICK}")
        await fake.until_gone()
    assert_failed(checked, step, text, advice)


async def test_files_for_tls_that_are_missing() -> None:
    checked = await check("amqps://web:s3cret@127.0.0.1/?cacertfile=/nowhere/ca.pem")
    assert_failed(checked, "TLS", "/nowhere/ca.pem", "cacertfile")


async def test_a_function_that_gives_no_url() -> None:
    def no_url() -> str:
        raise KeyError("no vault at https://me:s3cret@vault")

    checked = await check(no_url)  # type: ignore[arg-type]  # as CONFIG takes it
    assert_failed(checked, "settings", "it raised KeyError", "")


async def test_all_urls_are_told_of() -> None:
    ports = [free_port(), free_port()]
    checked = await check(" ".join(f"amqp://web:s3cret@127.0.0.1:{port}" for port in ports))
    failed = [step for step in checked.report.steps if step.finding.status is Status.FAILED]
    assert [step.name for step in failed] == ["TCP", "TCP"]
    assert [step.url for step in failed] == [f"amqp://web@127.0.0.1:{p}/%2F" for p in ports]


def test_status_gives_up_soon_unless_it_is_told_to_wait() -> None:
    settings = Settings.from_config({"host": "amqp://x"})
    limited = limited_settings(settings, timeout=1.0)
    assert (limited.connect_timeout, limited.operation_timeout) == (3, 5)
    assert limited_settings(settings, timeout=8.0).operation_timeout == 8
    quick = Settings.from_config({"host": "amqp://x", "operation_timeout": 2})
    assert limited_settings(quick, timeout=8.0).operation_timeout == 2


def test_silent_and_absent_processes_are_told_apart() -> None:
    silent = (MissingProcess("crq.a", 1.0, 4712, "web-2"), MissingProcess("crq.b", None, 0, ""))
    absent = (MissingProcess("crq.c", 2.0, 17, "web-1"),)
    text, advice = describe_missing(ProcessesStatus((), silent, (), is_complete=False), 3)
    assert text == "of 3 others, no answer within 1 s: 2 (crq.a on web-2, pid 4712, crq.b)"
    assert "blocked, stopped or killed" in advice
    text, advice = describe_missing(ProcessesStatus((), (), absent, is_complete=True), 1)
    assert text == "of 1 other, without a connection: 1 (crq.c on web-1, pid 17)"
    assert "blocked" not in advice


# The log


def test_no_handler_of_the_project_writes_while_it_is_quiet() -> None:
    """Wherever it is; the warnings that no step tells stand in the report all the same."""
    names = ("", "channels_rabbitmq", "channels_rabbitmq.publisher", "channels_rabbitmq.hooks")
    loggers = [logging.getLogger(name) for name in names]
    out = io.StringIO()
    handlers = [logging.StreamHandler(out) for _ in loggers]
    for logger, handler in zip(loggers, handlers, strict=True):
        logger.addHandler(handler)
    trial = Trial(Report(as_json=True), 0.0, str)
    try:
        with quiet_log(), collected_warnings(trial):
            for logger in loggers:
                logger.warning("from %s", logger.name)
            logging.getLogger("made.meanwhile").warning("made meanwhile")
        assert (out.getvalue(), trial.warnings) == ("", ["from channels_rabbitmq.publisher"])
        loggers[0].warning("after")
        assert out.getvalue() == "after\n"
    finally:
        for logger, handler in zip(loggers, handlers, strict=True):
            logger.removeHandler(handler)


# What is known of the broker


@pytest.mark.parametrize(
    ("product", "version", "advice"),
    [
        ("RabbitMQ", "3.10.8", ""),
        ("RabbitMQ", "4.3.6", ""),
        ("RabbitMQ", "3.9.29", "upgrade"),
        ("RabbitMQ", "4.4.0-rc.1", "newer than"),
        ("RabbitMQ", "10.0", "newer than"),
        ("LavinMQ", "2.0", "RabbitMQ only"),
    ],
)
def test_versions(product: str, version: str, advice: str) -> None:
    finding = describe_broker({"product": product, "version": version})
    assert f"{product} {version}" in finding.text
    assert advice in finding.advice
    assert (finding.status is Status.OK) == (not advice)


class FakeTls:
    """As ``ssl.SSLObject``, for a certificate that ends in so many days."""

    def __init__(self, days: float | None) -> None:
        self._days = days

    def version(self) -> str:
        return "TLSv1.3"

    def getpeercert(self) -> dict[str, str]:
        if self._days is None:
            return {}
        date = formatdate(time.time() + 86400 * self._days, usegmt=True)
        _, day, month, year, clock, zone = date.split()
        return {"notAfter": f"{month} {day} {clock} {year} {zone}"}


@pytest.mark.parametrize(
    ("days", "status", "words"),
    [
        (90, Status.OK, "is valid until"),
        (3.5, Status.WARNING, "for 3 more days"),
        (None, Status.WARNING, "nothing checks"),
    ],
)
def test_certificates(days: float | None, status: Status, words: str) -> None:
    tls: Any = FakeTls(days)
    finding = describe_tls(tls)
    assert (finding.status, words in finding.text) == (status, True)


def test_the_fake_certificate_has_openssls_form() -> None:
    date = FakeTls(1).getpeercert()["notAfter"]
    assert ssl.cert_time_to_seconds(date) == pytest.approx(time.time() + 86400, abs=2)


def test_the_layer_needs_each_permission_for_the_names_of_all_its_connections() -> None:
    needs = needs_of("crq.x", Settings.from_config({"groups_exchange": "ours"}))
    told = {(need.permission, need.name): is_needed for need, is_needed in needs.items()}
    assert told["write", "ours"]
    assert told["read", "ours"]
    assert told["configure", "crq.x"]
    assert told["read", "crq.x.1.requests"]
    assert told["write", "crq.x.2.groups"]
    assert ("configure", "ours") not in told  # which may be declared by somebody else
    spared = {name for (_, name), is_needed in told.items() if not is_needed}
    assert spared == {"crq.x.1.lease", "crq.x.2.lease"}


# How it is printed


@contextlib.contextmanager
def printed(capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    lines += capsys.readouterr().out.splitlines()


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(as_json=False)
    report.names = ["settings", "TCP", "login", "queue"]
    with printed(capsys) as lines:
        report.add(Step("settings", Finding("all\nof them")))
        report.add(Step("TCP", Finding("no", "do this", Status.FAILED), 0.00123))
        report.finish(1)
    assert lines == [
        "ok    settings                   all",
        "      of them",
        "FAIL  TCP                1.2 ms  no",
        "      -> do this",
        "-     not tried: login, queue",
    ]


def test_the_end_counts_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(as_json=False)
    with printed(capsys) as lines:
        report.add(Step("TLS", Finding("hm", "", Status.WARNING), 0.5, "amqp://a"))
        report.finish(0.54)
    assert lines[:2] == ["", "amqp://a"]
    assert lines[-1] == "The channel layer works, with 1 warning (0.5 s)."


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(as_json=True)
    report.names = ["TCP", "login"]
    report.add(Step("TCP", Finding("no", "do this", Status.FAILED), 0.25))
    report.finish(1)
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["seconds"]) == (False, 1)
    assert told["steps"] == [
        {
            "name": "TCP",
            "status": "failed",
            "seconds": 0.25,
            "text": "no",
            "advice": "do this",
            "url": None,
        },
        {
            "name": "login",
            "status": "not tried",
            "seconds": None,
            "text": "",
            "advice": "",
            "url": None,
        },
    ]
