"""The benchmark suite: what it makes of figures, that it runs, that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import docutils.core  # type: ignore[import-untyped]  # has no annotations
import docutils.nodes  # type: ignore[import-untyped]  # as above
import pamqp.commands
import pamqp.frame
import pytest

from benchmarks import (
    aims,
    layers,
    machine,
    peers,
    proxy,
    redis_server,
    results_folder,
    tables,
    usage,
)
from benchmarks.charts import bar_chart
from benchmarks.figures import Cell, Figure, find_figure, percentile, summarize
from benchmarks.layers import ours
from benchmarks.model import EXCHANGES, LAYERS, OLD, OURS, RAW, REDIS_PUBSUB, Sample
from benchmarks.problems import REFUSED, Tally
from benchmarks.scenario import Metric, Scenario
from benchmarks.stage import CAPACITY, Server, Stage
from benchmarks.suite import SCENARIOS, plan, run_one
from channels_rabbitmq.core import RabbitmqChannelLayer
from tests.support.brokers import Broker
from tests.support.layers import settings_of
from tools import cancellable
from tools.processes import children, is_alive

ROOT = Path(__file__).parents[2]
TITLES = {layer: f"the layer {layer}" for layer in LAYERS}


async def never_run(stage: object) -> dict[str, float]:
    raise AssertionError


SCENARIO = Scenario(
    name="speed",
    title="How fast <it> & they are",
    metrics=(
        Metric("rate", "messages/s", more_is_better=True),
        Metric("ms", "p50, ms", 2, more_is_better=False),
        Metric("cpu", "µs CPU", 1),
    ),
    layers=(OURS, OLD),
    run=never_run,
)


def sample(layer: str, **metrics: float) -> Sample:
    return Sample(SCENARIO.name, layer, metrics=metrics)


# Figures


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (1, 1), (50, 50), (99, 99), (99.5, 100), (100, 100)]
)
def test_percentile_is_the_smallest_that_so_many_do_not_exceed(
    percent: float, expected: float
) -> None:
    assert percentile([*range(100, 0, -1)], percent) == expected


def test_percentile_of_one_value_and_of_none() -> None:
    assert percentile([7.0], 50) == percentile([7.0], 99) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_figure_is_the_median_with_its_range() -> None:
    assert Figure.of([5.0, 1.0, 2.0]) == Figure(median=2.0, low=1.0, high=5.0, runs=3)
    assert Figure.of([1.0, 2.0]).median == 1.5


def test_summary_puts_the_runs_of_a_layer_together() -> None:
    first, second = sample(OURS, rate=10.0, ms=1.0), sample(OURS, rate=30.0)
    first.problems = {"lost": (3, ""), "OSError": (1, "its text")}
    second.problems = {"OSError": (2, "another text")}
    failed = Sample(SCENARIO.name, OURS, failure="it hung")
    cells = summarize([first, sample(OLD, rate=5.0), second, failed])
    cell = cells[SCENARIO.name, OURS]
    assert cell.figures == {"rate": Figure(20.0, 10.0, 30.0, 2), "ms": Figure(1.0, 1.0, 1.0, 1)}
    assert cell.problems == {"lost": (3, ""), "OSError": (3, "its text")}
    assert cell.failures == ["it hung"]
    assert cell.runs == 3
    assert cells[SCENARIO.name, OLD].failures == []
    assert find_figure(cells, SCENARIO.name, OLD, "rate") == Figure(5.0, 5.0, 5.0, 1)
    assert find_figure(cells, SCENARIO.name, OLD, "ms") is None
    assert find_figure(cells, SCENARIO.name, RAW, "rate") is None


def test_tally_counts_by_kind_and_keeps_the_first_text() -> None:
    class ChannelFull(Exception):
        """As Channels names it; the coordinator's Python has no Channels."""

    tally = Tally()
    tally.note("lost", 0)
    tally.note("lost", 2)
    for exc in (
        ValueError("a\nb"),
        ValueError("c"),
        ChannelFull("queue x"),
        asyncio.TimeoutError(),
    ):
        tally.note_exc(exc)
    assert tally.counts == {
        "lost": (2, ""),
        "ValueError": (2, "a b"),
        REFUSED: (1, ""),
        "timed out": (1, ""),
    }


# The order of the runs


def test_runs_are_interleaved() -> None:
    other = dataclasses.replace(SCENARIO, name="other", layers=(OURS, REDIS_PUBSUB))
    runs = plan([SCENARIO, other], [OURS, OLD], 2)
    assert [(scenario.name, layer) for scenario, layer in runs] == [
        *[("speed", OURS), ("speed", OLD)] * 2,
        *[("other", OURS)] * 2,
    ]


def test_scenarios_are_found_by_the_beginning_of_their_name_or_by_hand() -> None:
    assert SCENARIO.is_wanted(None)
    assert SCENARIO.is_wanted(["other", "spe"])
    assert not SCENARIO.is_wanted(["other", "speed-up"])
    by_hand = dataclasses.replace(SCENARIO, by_hand=True)
    assert by_hand.is_wanted(["other", "speed"])
    assert not by_hand.is_wanted(None)
    assert not by_hand.is_wanted(["spe"])


class IdleServer(Server):
    async def rest(self) -> None:
        """It always is at rest."""


@pytest.mark.parametrize(("at_defaults", "capacity"), [(False, CAPACITY), (True, None)])
async def test_scenario_has_roomy_layers_unless_it_is_at_defaults(
    at_defaults: bool, capacity: int | None
) -> None:
    async def run(stage: Stage) -> dict[str, float]:
        assert stage.capacity == capacity
        return {"rate": 1.0}

    scenario = dataclasses.replace(SCENARIO, run=run, at_defaults=at_defaults)
    server = IdleServer("amqp://other.example", "other.example", 5672, "")
    assert (await run_one(scenario, OURS, server, {}, quick=True)).metrics == {"rate": 1.0}


# The layers


def test_layer_at_defaults_has_them() -> None:
    url = "amqp://127.0.0.1"
    exchange = EXCHANGES[OURS]
    # The scenario of jobs needs normal channels.
    by_user = settings_of(
        RabbitmqChannelLayer(host=url, groups_exchange=exchange, normal_channels=True)
    )
    assert settings_of(ours.make_layer(url, None)) == by_user
    roomy = settings_of(ours.make_layer(url, 1234))
    assert roomy == dataclasses.replace(
        by_user, local_capacity=1234, remote_capacity=1234, capacity=1234
    )


def test_websites_of_all_layers_need_the_same() -> None:
    lines = (ROOT / "example" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert set(layers.WEBSITE) == {line for line in lines if not line.startswith("#")}
    for layer in LAYERS:
        requirements = peers.adapter(layer).REQUIREMENTS
        assert requirements is None or set(layers.WEBSITE) < set(requirements)


# Tables


def parse(text: str) -> docutils.nodes.document:
    """What docutils makes of it; a warning is an error."""
    return docutils.core.publish_doctree(
        text,
        settings_overrides={"halt_level": 2, "report_level": 5, "file_insertion_enabled": False},
    )


def rows(table: docutils.nodes.table) -> list[list[str]]:
    return [
        [entry.astext() for entry in row.findall(docutils.nodes.entry)]
        for row in table.findall(docutils.nodes.row)
    ]


def document(
    samples: Sequence[Sample], facts: Sequence[tuple[str, str]] = (), charts: Sequence[str] = ()
) -> docutils.nodes.document:
    text = tables.document([SCENARIO], summarize(samples), TITLES, facts, charts=charts)
    return parse(text)


def scenario_table(samples: Sequence[Sample]) -> list[list[str]]:
    """The last one: that of the aims comes first, if any was measured."""
    return rows(list(document(samples).findall(docutils.nodes.table))[-1])


def test_table_has_medians_ranges_and_ratios() -> None:
    samples = [
        *(sample(OURS, rate=rate, ms=0.5, cpu=10.04) for rate in (15_000.0, 14_000.0, 16_000.0)),
        sample(OLD, rate=5_000.0, ms=1.0, cpu=20.0),
    ]
    assert scenario_table(samples) == [
        ["layer", "messages/s", "×", "p50, ms", "×", "µs CPU"],
        # Half the time is twice as good.
        [
            "the layer ours",
            *("15,000 (14,000 to 16,000)", "3.00"),
            *("0.50 (0.50 to 0.50)", "2.00"),
            "10.0 (10.0 to 10.0)",
        ],
        ["the layer rabbitmq_4", "5,000", "1.00", "1.00", "1.00", "20.0"],
    ]


def test_table_says_where_a_layer_failed_and_has_no_ratios_to_nothing() -> None:
    samples = [sample(OURS, rate=15.0, ms=0.5), Sample(SCENARIO.name, OLD, failure="it hung")]
    assert scenario_table(samples) == [
        ["layer", "messages/s", "p50, ms", "µs CPU"],
        ["the layer ours", "15", "0.50", "–"],
        ["the layer rabbitmq_4", "fails", "–", "–"],
    ]


def test_problems_are_shown_whatever_their_text() -> None:
    bad = sample(OURS, rate=1.0)
    bad.problems = {"lost": (1234, ""), "OSError": (1, "`x` *y* |z| _a_ b_ <c> \\d ::")}
    failed = Sample(SCENARIO.name, OLD, failure="two\nlines of **text**")
    parsed = document([bad, failed])
    notes = [item.astext() for item in parsed.findall(docutils.nodes.list_item)]
    assert notes == [
        "the layer ours: 1,234 × lost; 1 × OSError (`x` *y* |z| _a_ b_ <c> \\d ::)",
        "the layer rabbitmq_4: 1 of 1 runs failed: two lines of **text**",
    ]


def test_document_has_its_facts_and_charts() -> None:
    facts = [("Mode", "--quick: short"), ("channels_redis core", "redis_x_ 1, y* 2")]
    parsed = document([sample(OURS, rate=1.0)], facts, charts=["speed"])
    fields = [field.astext() for field in parsed.findall(docutils.nodes.field)]
    assert fields == ["Mode\n\n--quick: short", "channels_redis core\n\nredis_x_ 1, y* 2"]
    assert [image["uri"] for image in parsed.findall(docutils.nodes.image)] == ["speed.svg"]


def test_document_has_the_aims_that_were_measured() -> None:
    cells = all_cells(lambda layer, scenario, metric: 1.0)
    text = tables.document(SCENARIOS, cells, TITLES, [], charts=[])
    aims_table = rows(next(iter(parse(text).findall(docutils.nodes.table))))
    assert len(aims_table) == 1 + len(aims.AIMS)
    first = "throughput-100: deliveries/s, times that of channels_rabbitmq 4.0.1"
    assert aims_table[1] == [first, "≥ 7", "1", "missed"]
    assert "not measured" not in text

    few = document([sample(OURS, rate=1.0)])
    assert f"{len(aims.AIMS) - 1} of {len(aims.AIMS)} aims were not measured" in few.astext()


# Charts


SVG = "{http://www.w3.org/2000/svg}"


def chart(samples: Sequence[Sample]) -> xml.etree.ElementTree.Element:
    text = bar_chart(SCENARIO, summarize(samples), TITLES)
    assert text is not None
    return xml.etree.ElementTree.fromstring(text)


def bars(picture: xml.etree.ElementTree.Element) -> dict[str, float]:
    """Width by class."""
    return {
        bar.attrib["class"]: float(bar.attrib["width"])
        for bar in picture.iter(f"{SVG}rect")
        if bar.attrib["class"] != "page"
    }


def test_bars_are_as_long_as_their_figures() -> None:
    picture = chart([sample(OURS, rate=300.0), sample(OLD, rate=100.0)])
    widths = bars(picture)
    assert widths["ours"] == pytest.approx(3 * widths["bar"], abs=0.2)
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert {"How fast <it> & they are", "the layer ours", "300", "100"} <= set(texts)
    assert not list(picture.iter(f"{SVG}path"))  # no range with one run


def test_chart_fits_its_picture_and_shows_the_range() -> None:
    picture = chart([sample(OURS, rate=rate) for rate in (1e6, 2e6, 9e6)])
    assert len(list(picture.iter(f"{SVG}path"))) == 1
    width = float(picture.attrib["width"])
    [figure] = [text for text in picture.iter(f"{SVG}text") if text.text == "2,000,000"]
    assert float(figure.attrib["x"]) < width - 60


def test_chart_says_where_a_layer_failed() -> None:
    picture = chart([sample(OURS, rate=1.0), Sample(SCENARIO.name, OLD, failure="it hung")])
    assert list(bars(picture)) == ["ours"]
    assert "fails" in [text.text for text in picture.iter(f"{SVG}text")]


def test_no_chart_without_any_figure() -> None:
    cells = summarize([Sample(SCENARIO.name, OURS, failure="it hung")])
    assert bar_chart(SCENARIO, cells, TITLES) is None


# Aims


def all_cells(value: Callable[[str, Scenario, Metric], float]) -> dict[tuple[str, str], Cell]:
    """Every scenario on all its layers, ``value(layer, scenario, metric)`` everywhere."""
    return summarize(
        Sample(
            scenario.name,
            layer,
            metrics={metric.key: value(layer, scenario, metric) for metric in scenario.metrics},
        )
        for scenario in SCENARIOS
        for layer in scenario.layers
    )


def verdicts(cells: Mapping[tuple[str, str], Cell]) -> dict[str, str | None]:
    return {aim.text: aim.verdict(cells) for aim in aims.AIMS}


def test_each_aim_is_about_something_that_is_measured() -> None:
    cells = all_cells(lambda layer, scenario, metric: 1.0)
    assert None not in verdicts(cells).values()


def test_no_aim_is_reached_by_a_layer_that_is_as_good_as_any_other() -> None:
    reached = {
        text
        for text, verdict in verdicts(all_cells(lambda *args: 400.0)).items()
        if verdict == "reached"
    }
    assert all(
        "channels_redis" in text  # not behind: as good is good enough
        or "the raw client" in text
        or "failed" in text
        for text in reached
    )
    assert len(reached) == 14


def test_aims_are_reached_by_a_layer_that_is_very_good() -> None:
    def value(layer: str, scenario: Scenario, metric: Metric) -> float:
        if layer != OURS:
            return 1.0
        return 1000.0 if metric.more_is_better else 0.0

    assert set(verdicts(all_cells(value)).values()) == {"reached"}


def test_aims_without_measurements() -> None:
    assert set(verdicts({}).values()) == {None}


def test_aims_are_missed_where_all_runs_failed() -> None:
    failed = summarize(Sample(scenario.name, OURS, failure="it hung") for scenario in SCENARIOS)
    assert set(verdicts(failed).values()) == {"missed"}


def harm_of(**changes: Any) -> float | None:
    [aim] = [aim for aim in aims.AIMS if not aim.scenario]
    return aim.measure(summarize([dataclasses.replace(sample(OURS, rate=1.0), **changes)]))


def test_losses_errors_and_failures_count_but_refusals_do_not() -> None:
    assert harm_of() == 0
    assert harm_of(problems={"lost": (3, ""), "OSError": (1, "text")}) == 4
    assert harm_of(problems={REFUSED: (3, "")}) == 0
    assert harm_of(metrics={}, failure="it hung") == 1
    [aim] = [aim for aim in aims.AIMS if not aim.scenario]
    old = dataclasses.replace(sample(OLD, rate=1.0), problems={"lost": (3, "")})
    assert aim.measure(summarize([sample(OURS, rate=1.0), old])) == 0


def test_longest_confirm_is_that_of_the_worst_run() -> None:
    cells = summarize(
        Sample("reconnect-clean", OURS, metrics={"confirm_s": seconds})
        for seconds in (0.01, 1.5, 0.02)
    )
    [aim] = [
        aim for aim in aims.AIMS if aim.scenario == "reconnect-clean" and "confirm" in aim.what
    ]
    assert aim.measure(cells) == 1.5
    assert aim.verdict(cells) == "missed"


# The folder with the results


def test_results_are_written_and_nothing_else_is_touched(tmp_path: Path) -> None:
    other = dataclasses.replace(SCENARIO, name="other")
    samples = [sample(OURS, rate=1.0), Sample("other", OURS, failure="it hung")]
    (tmp_path / "mine.svg").write_text("mine")
    (tmp_path / "other.svg").write_text("of a former run")
    text = results_folder.write(
        tmp_path, [SCENARIO, other], samples, TITLES, [("Machine", "2 × some CPU")]
    )
    assert {path.name for path in tmp_path.iterdir()} == {
        "mine.svg",
        "speed.svg",
        "results.json",
        "results.rst",
    }
    assert (tmp_path / "results.rst").read_text(encoding="utf-8") == text
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert record["facts"] == {"Machine": "2 × some CPU"}
    assert [each["metrics"] for each in record["samples"]] == [{"rate": 1.0}, {}]
    assert record["samples"][1]["failure"] == "it hung"


# The machine, and CPU time


def test_machine_is_described_without_its_name() -> None:
    text = machine.describe()
    assert sys.version.split()[0] in text
    assert socket.gethostname() not in text


def test_commit_is_empty_without_git(tmp_path: Path) -> None:
    assert machine.commit(tmp_path) == ""


@pytest.fixture
def own_name() -> str:
    path = Path("/proc/self/comm")
    if not path.exists():
        pytest.skip("needs /proc")
    return path.read_text().strip()


def test_listener_is_found_by_port_and_name(own_name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert usage.find_listener(port, [own_name]) == os.getpid()
        assert usage.find_listener(port, ["beam.smp"]) is None
    assert usage.find_listener(port, [own_name]) is None


@pytest.mark.usefixtures("own_name")
def test_cpu_time_is_that_of_all_descendants() -> None:
    # The shell itself does nothing; its child computes until it is killed.
    command = f"{sys.executable} -c 'while True: pass' & read line; kill $!"
    with subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE) as shell:
        assert shell.stdin is not None
        try:
            deadline = time.monotonic() + 30
            while usage.cpu_seconds(shell.pid) < 0.1 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert usage.cpu_seconds(shell.pid) >= 0.1
        finally:
            shell.stdin.close()


# The proxy


def tune(heartbeat: int) -> bytes:
    method = pamqp.commands.Connection.Tune(2047, 131072, heartbeat)
    return pamqp.frame.marshal(method, 0)


def test_heartbeat_is_changed_and_nothing_else() -> None:
    before, after = b"\x01frame before\xce", b"\x01frame after\xce"
    changed, is_tuned = proxy.set_heartbeat(before + tune(60) + after)
    assert is_tuned
    assert changed == before + tune(proxy.HEARTBEAT) + after
    assert proxy.set_heartbeat(before) == (before, False)


@pytest.fixture
async def echo_port() -> AsyncIterator[int]:
    """Of a server that says everything twice."""
    writers = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        while data := await reader.read(1000):
            writer.write(data + data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for writer in writers:
        await writer.wait_closed()


async def test_proxy_passes_on_and_disconnects(echo_port: int) -> None:
    async with proxy.Proxy("127.0.0.1", echo_port) as between:
        reader, writer = await asyncio.open_connection("127.0.0.1", between.port)
        writer.write(b"hello")
        assert await reader.readexactly(10) == b"hellohello"
        lost_at = between.disconnect(orderly=True)
        farewell = await reader.read()
        assert pamqp.frame.unmarshal(farewell)[2].reply_code == 320
        assert between.first_accepted_after(lost_at) is None
        writer.close()
        await writer.wait_closed()


async def test_proxy_swallows_on_old_connections_and_takes_new_ones(echo_port: int) -> None:
    async with proxy.Proxy("127.0.0.1", echo_port) as between:
        old_reader, old_writer = await asyncio.open_connection("127.0.0.1", between.port)
        old_writer.write(b"hello")
        await old_reader.readexactly(10)
        lost_at = between.swallow()
        old_writer.write(b"lost")
        new_reader, new_writer = await asyncio.open_connection("127.0.0.1", between.port)
        new_writer.write(b"hello")
        assert await new_reader.readexactly(10) == b"hellohello"
        assert between.first_accepted_after(lost_at) is not None
        assert not old_reader.at_eof()
    # Its end is silent: the guard of the tests would see an error of the loop's.
    assert await old_reader.read() == b""
    for writer in (old_writer, new_writer):
        writer.close()
        await writer.wait_closed()


def test_proxy_keeps_the_rest_of_the_url() -> None:
    between = proxy.Proxy("127.0.0.1", 5672)
    between.port = 1234
    assert (
        between.url_of("amqp://me:pw@host:5672/%2Fx?y=1") == "amqp://me:pw@127.0.0.1:1234/%2Fx?y=1"
    )
    assert between.url_of("redis://127.0.0.1:6379") == "redis://127.0.0.1:1234"


# Redis


def test_without_redis_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # neither redis-server nor apt-get
    with pytest.raises(redis_server.NoRedis, match="redis-server"):
        redis_server.find_command()


def test_redis_is_emptied_and_leaves_nothing_behind() -> None:
    command = shutil.which("redis-server")
    if command is None:
        pytest.skip("needs redis-server")
    with redis_server.PrivateRedis(Path(command)) as redis:
        assert re.fullmatch(r"\d+\.\d+\.\d+", redis.version)
        redis.ask("SET key value")
        redis.clear()
        assert redis.ask("DBSIZE").startswith(":0")
        folder = Path(redis._folder)
        assert folder.is_dir()
    assert not folder.exists()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", redis.port), timeout=5)


# Signals


@pytest.fixture
def _handlers() -> Iterator[None]:
    """Those of the tests are there again afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_takes_effect_at_an_await_and_only_once(number: signal.Signals) -> None:
    steps = []

    async def main() -> None:
        try:
            signal.raise_signal(number)
            steps.append("not interrupted just anywhere")
            await asyncio.sleep(50)
            steps.append("never")
        finally:
            signal.raise_signal(number)
            await asyncio.sleep(0)
            steps.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        cancellable.run(main())
    assert steps == ["not interrupted just anywhere", "cleaned up"]


@pytest.mark.usefixtures("_handlers")
def test_without_a_signal_the_result_is_returned_and_signals_interrupt_again() -> None:
    async def main() -> int:
        return 3

    assert cancellable.run(main()) == 3
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


# The manual


def test_readme_renders_and_names_every_layer_and_scenario() -> None:
    text = (ROOT / "benchmarks" / "README.rst").read_text(encoding="utf-8")
    literals = {node.astext() for node in parse(text).findall(docutils.nodes.literal)}
    assert set(LAYERS) <= literals
    assert {scenario.name for scenario in SCENARIOS} <= literals
    modules = {path.stem for path in (ROOT / "benchmarks" / "layers").glob("[!_]*.py")}
    assert modules == {*LAYERS, "raw_amqp"}


# The command


class Benchmark:
    """``scripts/benchmark`` as a person starts it, with this package in the tests' own Python."""

    def __init__(self, url: str, folder: Path) -> None:
        self.output_folder = folder / "output"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._environment = {
            **os.environ,
            "RABBITMQ_URL": url,
            "TMPDIR": str(self.temporary),
        }
        self.process: subprocess.Popen[str] | None = None
        self.output = ""

    def start(self, *options: str) -> None:
        command = [ROOT / "scripts" / "benchmark", "--python", sys.executable, *options]
        self.process = subprocess.Popen(
            [*command, "--output", self.output_folder],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, text: str) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(self.output)

    def workers(self) -> list[int]:
        """Process ids."""
        assert self.process is not None
        return children(self.process.pid, "benchmarks.worker")

    def wait(self) -> int:
        assert self.process is not None
        self.output += self.process.communicate(timeout=50)[0]
        return self.process.returncode


@pytest.fixture
def benchmark(broker: Broker, tmp_path: Path) -> Iterator[Benchmark]:
    started = Benchmark(broker.url, tmp_path)
    yield started
    process = started.process
    if process is not None:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.slow
def test_quick_run_writes_its_results(benchmark: Benchmark, broker: Broker) -> None:
    benchmark.start("--quick", "--scenario", "latency", "--layers", "ours", "raw")
    assert benchmark.wait() == 0, benchmark.output
    assert re.search(r"^\[ *2/2, 0:\d\d, about 0:00 left\] latency +raw", benchmark.output, re.M)
    assert "Traceback" not in benchmark.output

    folder = benchmark.output_folder
    names = {path.name for path in folder.iterdir()}
    assert names == {"latency.svg", "results.json", "results.rst"}
    record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [each["layer"] for each in record["samples"]] == ["ours", "raw"]
    for each in record["samples"]:
        assert each["failure"] == ""
        assert each["problems"] == {}
        assert 0 < each["metrics"]["p50_ms"] <= each["metrics"]["p99_ms"]
        assert math.isfinite(each["metrics"]["round_trips"])
        # The server's can't be seen everywhere.
        assert each["metrics"]["asker_us"] > 0
    parsed = parse((folder / "results.rst").read_text(encoding="utf-8"))
    latency = rows(list(parsed.findall(docutils.nodes.table))[1])
    assert [row[0] for row in latency[1:]] == ["channels_rabbitmq (this)", "raw AMQP client"]
    picture = xml.etree.ElementTree.parse(folder / "latency.svg").getroot()
    assert set(bars(picture)) == {"ours", "bar"}

    assert list(benchmark.temporary.iterdir()) == []
    if broker.private is not None:
        exchanges = {row["name"] for row in broker.private.list_exchanges("name")}
        assert not {name for name in exchanges if name.startswith("benchmark-")}


def quick_sample(benchmark: Benchmark, scenario: str) -> dict[str, Any]:
    """One run of it with our layer; nothing may go wrong but losses."""
    benchmark.start("--quick", "--scenario", scenario, "--layers", "ours")
    assert benchmark.wait() == 0, benchmark.output
    text = (benchmark.output_folder / "results.json").read_text(encoding="utf-8")
    [found] = json.loads(text)["samples"]
    assert set(found["problems"]) <= {"lost"}, benchmark.output
    assert not found["failure"], benchmark.output
    return dict(found)


@pytest.mark.slow
def test_site_measures_what_is_lost(benchmark: Benchmark) -> None:
    found = quick_sample(benchmark, "site-turn")
    metrics = found["metrics"]
    assert metrics["lost"] == pytest.approx(100 * found["problems"].get("lost", [0])[0] / 900)
    assert metrics["raised"] == 0
    assert 0 < metrics["p50_ms"] <= metrics["p99_ms"]
    assert metrics["site_us"] > 500  # the consumers' work alone


@pytest.mark.slow
def test_neighbours_measure_what_is_lost(benchmark: Benchmark) -> None:
    found = quick_sample(benchmark, "neighbours")
    metrics = found["metrics"]
    # Six prompt channels, each with the room's 150 messages a second and 25 of its own
    lost = found["problems"].get("lost", [0])[0]
    assert metrics["lost"] == pytest.approx(100 * lost / (6 * (150 + 25) * 4))
    assert 0 < metrics["p50_ms"] <= metrics["p99_ms"]
    assert metrics["more_ms"] == pytest.approx(metrics["p99_ms"] - metrics["alone_p99_ms"])
    assert 0 < metrics["slow"] <= 51


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_nothing_behind(
    benchmark: Benchmark, number: signal.Signals
) -> None:
    benchmark.start("--scenario", "latency", "--layers", "ours", "raw")
    benchmark.wait_for("[  1/6")
    assert benchmark.process is not None
    # The next run's processes
    deadline = time.monotonic() + 20
    while not (workers := benchmark.workers()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers
    benchmark.process.send_signal(number)
    assert benchmark.wait() == 130
    assert benchmark.output.endswith("Interrupted; no results were written.\n")
    assert not [pid for pid in workers if is_alive(pid)]
    assert list(benchmark.temporary.iterdir()) == []
    assert list(benchmark.output_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--scenario", "speed"], "no scenario speed; there are latency"),
        (["--layers", "speed"], "invalid choice: 'speed'"),
        (["--rounds", "0"], "--rounds: at least 1"),
        (["--output", str(Path(__file__) / "x")], "--output: "),
    ],
)
def test_bad_options_are_refused_at_once(options: list[str], complaint: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run_benchmarks", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert complaint in done.stderr
