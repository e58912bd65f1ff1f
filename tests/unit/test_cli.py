"""The command line, and how it ends if it is used wrongly: in one line, never a traceback."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from channels.exceptions import InvalidChannelLayerError

from channels_rabbitmq._tools import cli
from channels_rabbitmq._tools.errors import Failed, Misuse
from channels_rabbitmq.exceptions import BrokerUnavailable
from tools.private_broker import free_port


def main(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int | str | None, str]:
    """The exit status, and what stands on stderr."""
    try:
        status: int | str | None = cli.main(argv)
    except SystemExit as err:
        status = err.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "arguments are required: COMMAND"),
        (["chekc"], "invalid choice: 'chekc'"),
        (["check", "--jsn"], "unrecognized arguments: --jsn"),
        (["check", "a", "b"], "unrecognized arguments: b"),
        (["check", ""], "the URL is empty; is an environment variable missing? Without a URL, the"),
        (["status", "''"], "the URL is empty; "),
        (["check", "redis://:s3cret@host"], "redis:// is Redis's"),
        (["check", "amqp://web:s3/cret@host"], "percent-encode it"),
        (["check", "amqp://web:s3cret@host/?heartbeat=x"], "heartbeat must be a whole number"),
        (["check", "amqp://a", "--layer", "b"], "either a URL or --layer"),
        (["check", "--groups-exchange", "b"], "--groups-exchange is for a URL"),
        (["status", "redis://:s3cret@host"], "redis:// is Redis's"),
        (["status", "amqp://a", "--layer", "b"], "either a URL or --layer"),
        (
            ["check", "amqp://a", "--groups-exchange", "a*b"],
            "groups_exchange must hold nothing but",
        ),
    ],
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    status, err = main(capsys, *argv)
    assert (status, len(err.splitlines())) == (cli.MISUSED, 1)
    assert err.startswith("channels_rabbitmq: ")
    assert words in err
    assert "s3" not in err


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (Misuse("no such layer"), cli.MISUSED, "no such layer"),
        (InvalidChannelLayerError("host: no"), cli.FAILED, "host: no"),
        (Failed("login"), cli.FAILED, "login"),
        (BrokerUnavailable("not there"), cli.FAILED, "not there"),
        (KeyboardInterrupt(), cli.INTERRUPTED, "interrupted"),
        (OSError(28, "No space left"), cli.FAILED, "OSError: [Errno 28] No space left"),
    ],
)
def test_how_a_command_ends(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    words: str,
) -> None:
    class Command:
        def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

        def run(self, arguments: argparse.Namespace) -> int:
            raise error

    monkeypatch.setattr(cli, "COMMANDS", {"x": (Command(), "do something")})
    assert main(capsys, "x") == (status, f"channels_rabbitmq: {words}\n")


# In a process of its own, because these look at what is imported, or at Django's settings

RUN = """
    import contextlib, io, json, os, sys

    blocked, calls = json.loads(sys.argv[1])
    for name in blocked:
        sys.modules[name] = None
    from channels_rabbitmq._tools import cli

    results = []
    for settings, argv in calls:
        os.environ.pop("DJANGO_SETTINGS_MODULE", None)
        if settings:
            os.environ["DJANGO_SETTINGS_MODULE"] = settings
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(argv)
        results.append([status, out.getvalue(), err.getvalue()])
    print(json.dumps(results))
"""


def run(
    calls: list[tuple[str, list[str]]], folder: Path, *blocked: str
) -> list[tuple[int, str, str]]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUN), json.dumps([blocked, calls])],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [tuple(result) for result in json.loads(done.stdout)]


def test_without_django_a_url_will_do(tmp_path: Path) -> None:
    url = f"amqp://127.0.0.1:{free_port()}"
    calls = [("", ["check", url]), ("", ["check"]), ("", ["status", url, "--json"])]
    checked, refused, asked = run(calls, tmp_path, "django")
    assert asked[0] == cli.FAILED
    assert "nobody listens there" in asked[2]
    told = json.loads(asked[1])
    assert set(told) == {"at", "error"}
    assert asked[2] == f"channels_rabbitmq: {told['error']}\n"
    status, out, err = checked
    assert status == cli.FAILED
    assert "FAIL  TCP" in out
    assert err == "channels_rabbitmq: the channel layer doesn't work: TCP\n"
    assert refused[0] == cli.MISUSED
    assert refused[2].startswith("channels_rabbitmq: Django can't be imported: ")


SETTINGS = """
    SECRET_KEY = "x"
    BACKEND = "channels_rabbitmq.core.RabbitmqChannelLayer"
    STDOUT = {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}
    LOGGER = {"handlers": ["stdout"], "level": "DEBUG"}
    LOGGING = {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"stdout": STDOUT},
        "loggers": {"channels_rabbitmq": LOGGER, "channels_rabbitmq.connection": LOGGER},
        "root": LOGGER,
    }
    CHANNEL_LAYERS = {
        "nobody": {"BACKEND": BACKEND, "CONFIG": {"host": "amqp://127.0.0.1:PORT"}},
        "default": {"BACKEND": BACKEND, "CONFIG": {"hosts": ["x"], "expiry": "s3cret"}},
        "memory": {"BACKEND": "channels.layers.InMemoryChannelLayer"},
        "in memory": {"BACKEND": "channels_rabbitmq.testing.InMemoryChannelLayer"},
        "nowhere": {"BACKEND": "nowhere.Layer"},
        "listed": {"BACKEND": BACKEND, "CONFIG": []},
    }
"""


def test_settings_that_are_wrong(tmp_path: Path) -> None:
    text = textwrap.dedent(SETTINGS).replace("PORT", str(free_port()))
    (tmp_path / "wrong_settings.py").write_text(text)
    (tmp_path / "raises.py").write_text("raise KeyError('RABBITMQ_URL')")
    good = "wrong_settings"
    results = run(
        [
            ("", ["check"]),
            ("no_such_settings", ["check"]),
            ("", ["check", "--settings", "raises"]),
            (good, ["check", "--layer", "other"]),
            (good, ["check", "--layer", "memory"]),
            (good, ["check", "--layer", "in memory"]),
            (good, ["check", "--layer", "listed"]),
            (good, ["check", "--layer", "nowhere"]),
            (good, ["status"]),
            (good, ["check", "--json", "--layer", "nobody"]),
            (good, ["status", "--json", "--layer", "nobody"]),
            (good, ["check"]),
        ],
        tmp_path,
    )
    expected: list[tuple[int, str]] = [
        (cli.MISUSED, "no settings: set DJANGO_SETTINGS_MODULE"),
        (cli.MISUSED, "No module named 'no_such_settings'"),
        (cli.MISUSED, "KeyError: 'RABBITMQ_URL'"),
        (cli.MISUSED, "CHANNEL_LAYERS has no 'other'; it has 'nobody', 'default', 'memory'"),
        (cli.MISUSED, "'memory' is channels.layers.InMemoryChannelLayer"),
        (cli.MISUSED, "'in memory' is in memory: it uses no broker"),
        (cli.MISUSED, "'listed' can't be made: TypeError"),
        (cli.FAILED, "doesn't work: settings"),
        (cli.FAILED, "unknown option 'hosts'"),
        (cli.FAILED, "doesn't work: TCP"),
        (cli.FAILED, "nobody listens there"),
        (cli.FAILED, "doesn't work: settings"),
    ]
    for (status, _, err), (expected_status, words) in zip(results, expected, strict=True):
        lines = 3 if "2 mistakes" in err else 1  # and no note on options that aren't given
        assert (status, len(err.splitlines()), words in err) == (expected_status, lines, True), err
    assert json.loads(results[-3][1])["ok"] is False, "no log line stands between"
    assert "error" in json.loads(results[-2][1])
    out = results[-1][1]
    assert "unknown option 'hosts'" in out
    assert "expiry must be a number of seconds" in out
    assert "s3cret" not in out


# manage.py


def test_the_django_app(tmp_path: Path) -> None:
    """Its command has the same commands; Django prints the last line, and ends with the status.

    Its system checks run with all others, and can be silenced.
    """
    settings = f"""
        SECRET_KEY = "x"
        INSTALLED_APPS = ["channels_rabbitmq"]
        SILENCED_SYSTEM_CHECKS = ["channels_rabbitmq.W003"]
        BACKEND = "channels_rabbitmq.core.RabbitmqChannelLayer"
        CHANNEL_LAYERS = {{
            "default": {{"BACKEND": BACKEND, "CONFIG": {{"host": "amqp://[::1]:{free_port()}"}}}},
            "b": {{"BACKEND": BACKEND, "CONFIG": {{"host": "amqps://elsewhere?verify=verify_none"}}}},
        }}
    """
    (tmp_path / "site_settings.py").write_text(textwrap.dedent(settings))
    code = """
        import io
        import django
        from django.core.checks import run_checks
        from django.core.management import CommandError, call_command
        from django.core.management import execute_from_command_line as manage

        django.setup()
        found = [message.id for message in run_checks() if not message.is_silenced()]
        assert found == ["channels_rabbitmq.W002"], found
        out = io.StringIO()
        try:
            call_command("channels_rabbitmq", "check", stdout=out)
        except CommandError as err:
            assert err.returncode == 1
        assert "FAIL  TCP" in out.getvalue()
        manage(["manage.py", "channels_rabbitmq", "check", "--json"])
    """
    done = manage(code, tmp_path, {"DJANGO_SETTINGS_MODULE": "site_settings"})
    assert done.returncode == cli.FAILED
    assert done.stderr == "CommandError: the channel layer doesn't work: TCP\n"
    assert json.loads(done.stdout)["ok"] is False


def manage(
    code: str, folder: Path, variables: Mapping[str, str]
) -> subprocess.CompletedProcess[Any]:
    path = os.pathsep.join([str(folder), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
        env={**os.environ, "PYTHONPATH": path, **variables},
    )
