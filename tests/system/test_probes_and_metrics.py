"""Health and metrics of a server with three processes, asked by HTTP.

One gunicorn for all: its start takes seconds.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from django.test import RequestFactory
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from channels_rabbitmq import prometheus
from channels_rabbitmq.core import RabbitmqChannelLayer
from channels_rabbitmq.prometheus import PREFIX, RabbitmqCollector, families
from channels_rabbitmq.statistics import Counters
from channels_rabbitmq.status import Status
from tests.support.layers import close_for_sync_code
from tests.support.manual import ROOT, block, commands, in_thread, run
from tests.support.programs import Program, Programs
from tests.support.statuses import status_of
from tools.private_broker import free_port

# No proxy on the way to ourselves, whatever the environment says.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
GUNICORN = "-m gunicorn -k uvicorn.workers.UvicornWorker -w 3 mysite.asgi_lifespan:application"


# By name and labels
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Site:
    """A server, and what it answers."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/"

    def _get(self, path: str, method: str = "GET") -> tuple[int, str]:
        request = urllib.request.Request(self._url + path, method=method)
        try:
            with OPENER.open(request, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    async def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        return await asyncio.to_thread(self._get, path, method)

    async def health(self, path: str) -> tuple[int, Any]:
        status, body = await self.get(f"health/{path}")
        return status, json.loads(body)

    async def scrape(self, path: str = "metrics") -> Samples:
        status, body = await self.get(path)
        assert status == 200, body
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
        }


def pids(samples: Samples) -> set[int]:
    """Of the processes that have series."""
    return {int(dict(labels)["pid"]) for _, labels in samples if "pid" in dict(labels)}


def of_all(samples: Samples, name: str) -> float:
    return samples[(f"{PREFIX}_{name}", frozenset())]


async def until(site: Site, processes: int, silent: int = 0) -> Samples:
    """Scrape until so many answer, and so many don't."""
    while True:
        samples = await site.scrape()
        found = of_all(samples, "processes"), of_all(samples, "silent_processes")
        if found == (processes, silent):
            return samples
        await asyncio.sleep(0.1)  # nobody tells


async def start(programs: Programs, folder: Path) -> tuple[Program, Site]:
    port = free_port()
    # uvicorn says that gunicorn's workers will be a package of their own.
    python = [sys.executable, "-W", "ignore::DeprecationWarning"]
    arguments = [*GUNICORN.split(), "--bind", f"127.0.0.1:{port}"]
    program = await programs.start(*arguments, python=python, HOME=str(folder))
    site = Site(port)
    while True:
        try:
            await site.get("health/live")
        except OSError:
            assert program.process.returncode is None, repr(program)
            await asyncio.sleep(0.1)  # nobody tells
        else:
            return program, site


@pytest.mark.slow
async def test_gunicorn_with_three_workers(programs: Programs, tmp_path: Path) -> None:
    program, site = await start(programs, tmp_path)
    before = await until(site, 3)
    workers = pids(before)
    assert len(workers) == 3
    assert program.pid not in workers
    assert await site.health("live") == (200, {"ok": True, "problems": []})
    assert await site.health("ready") == (200, {"ok": True, "problems": []})
    assert (await site.get("health/ready", "POST"))[0] == 405
    assert (await site.get("health/ready", "HEAD")) == (200, "")

    # Whichever process a scrape reaches, it has the same series, and counters only grow.
    for number in range(12):
        await site.get(f"notify/room/{number}/")
        after = await site.scrape("metrics" if number % 3 else "metrics/sync")
        assert pids(after) == workers
        assert after.keys() == before.keys()
        for key, value in before.items():
            if key[0].endswith("_total"):
                assert after[key] >= value, key
        before = after
    sent = [value for (name, _), value in before.items() if name == f"{PREFIX}_confirmed_total"]
    assert sum(sent) >= 12
    assert len(sent) == 3

    # One that is stopped has no values, and one that is gone has none for ever.
    stopped, killed, _ = workers
    os.kill(stopped, signal.SIGSTOP)
    assert pids(await until(site, 2, silent=1)) == workers - {stopped}
    os.kill(stopped, signal.SIGCONT)
    await until(site, 3)
    os.kill(killed, signal.SIGKILL)
    while True:  # gunicorn starts another one
        now = await until(site, 3)
        if killed not in pids(now):
            break
    assert len(pids(now) & workers) == 2

    # Without the broker, a scrape tells of the process that it has reached.
    programs.proxy.refuse()
    programs.proxy.cut()
    while (await site.health("ready"))[0] == 200:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.1)
    status, said = await site.health("ready")
    assert (status, said["ok"]) == (503, False)
    assert any("no connection for" in problem for problem in said["problems"])
    assert (await site.health("live"))[0] == 200
    alone = await site.scrape()
    assert (of_all(alone, "processes"), of_all(alone, "is_complete")) == (1, 0)
    await programs.proxy.accept()
    await until(site, 3)
    await program.stop()


async def test_a_collector_on_an_event_loop_tells_of_its_own_process(
    default_layer: RabbitmqChannelLayer,
) -> None:
    registry = CollectorRegistry()
    registry.register(RabbitmqCollector(scope="exchange"))
    await default_layer.connect()
    text = generate_latest(registry).decode()
    id_ = default_layer.statistics()[0].id
    assert f'{PREFIX}_connected{{connection="publisher",host=' in text
    assert f'process="{id_}"' in text
    assert (await default_layer.status()).is_complete
    with pytest.raises(ValueError, match="scope must be"):
        RabbitmqCollector(scope="world")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_a_scrape_is_a_get(default_layer: RabbitmqChannelLayer, method: str) -> None:
    request = RequestFactory().generic(method, "/metrics")
    response = await prometheus.metrics(request)
    assert (response.status_code, response["Allow"]) == (405, "GET, HEAD")
    assert default_layer.statistics() == (), "nobody is asked"


# The manual's


def test_the_urls() -> None:
    probed = re.findall(r"path: /([\w/]+), port", block("health-probes"))
    assert probed == [str(url.pattern) for url in run("health-urls")["urlpatterns"]]
    assert [str(url.pattern) for url in run("metrics-urls")["urlpatterns"]] == ["metrics"]
    assert "metrics_path: /metrics\n" in block("metrics-scrape")


async def test_the_functions(default_layer: RabbitmqChannelLayer) -> None:
    is_well = (await in_thread("health-function"))["is_well"]
    while not await asyncio.to_thread(is_well):
        pass
    registry = (await in_thread("metrics-collector"))["registry"]
    text = (await asyncio.to_thread(generate_latest, registry)).decode()
    assert f'process="{default_layer.statistics()[0].id}"' in text
    assert f"{PREFIX}_processes 1.0" in text
    await close_for_sync_code(default_layer)


def test_a_registry_takes_one_collector() -> None:
    registry = CollectorRegistry()
    registry.register(RabbitmqCollector())
    with pytest.raises(ValueError, match=f"{PREFIX}_processes"):
        registry.register(RabbitmqCollector("another"))


def test_what_is_installed() -> None:
    assert commands("metrics-install") == [
        ["python", "-m", "pip", "install", "channels_rabbitmq[prometheus]"]
    ]
    assert '"prometheus": [' in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_alerts_and_dashboard_ask_for_what_there_is() -> None:
    status = Status((status_of("crq." + "a" * 16),), (), (), is_complete=True)
    names = {sample.name for family in families(status) for sample in family.samples}
    dashboard = (ROOT / "docs" / "operate" / "grafana.json").read_text(encoding="utf-8")
    for text, least in ((dashboard, 20), (block("metrics-alerts"), 7)):
        used = re.findall(rf"{PREFIX}_\w+", text)
        assert len(used) >= least
        assert set(used) <= names
    panels = json.loads(dashboard)["panels"]
    assert all(target["expr"] for panel in panels for target in panel["targets"])
    # The page names each of them.
    page = (ROOT / "docs" / "operate" / "metrics.rst").read_text(encoding="utf-8")
    totals = {f"{PREFIX}_{field.name}_total" for field in dataclasses.fields(Counters)}
    for name in names - totals:
        assert name.removeprefix(f"{PREFIX}_") in page, name
