"""Writes what was measured: ``results.json`` with every run, ``results.rst``, and the charts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.charts import bar_chart
from benchmarks.figures import summarize
from benchmarks.model import Sample
from benchmarks.scenario import Scenario
from benchmarks.tables import document


def write(
    folder: Path,
    scenarios: Sequence[Scenario],
    samples: Sequence[Sample],
    titles: Mapping[str, str],
    facts: Sequence[tuple[str, str]],
) -> str:
    """Replaces what is there; returns the text of ``results.rst``. Other files are left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = summarize(samples)
    charts = {scenario.name: bar_chart(scenario, cells, titles) for scenario in scenarios}
    for name, chart in charts.items():
        if chart is not None:
            (folder / f"{name}.svg").write_text(chart, encoding="utf-8")
        else:
            (folder / f"{name}.svg").unlink(missing_ok=True)
    text = document(
        scenarios, cells, titles, facts, charts=[name for name, chart in charts.items() if chart]
    )
    (folder / "results.rst").write_text(text, encoding="utf-8")
    record = {"facts": dict(facts), "samples": [dataclasses.asdict(each) for each in samples]}
    (folder / "results.json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return text
