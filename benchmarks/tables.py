"""The results as reStructuredText."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.aims import AIMS
from benchmarks.figures import Cell, Figure, find_figure
from benchmarks.model import LAYERS, OLD
from benchmarks.scenario import Metric, Scenario

Cells = Mapping[tuple[str, str], Cell]

_NOTHING = "–"


def document(
    scenarios: Sequence[Scenario],
    cells: Cells,
    titles: Mapping[str, str],
    facts: Sequence[tuple[str, str]],
    *,
    charts: Iterable[str],
) -> str:
    """All of it. ``facts`` say where and how it was made; ``charts`` names those that exist."""
    charts = set(charts)
    parts = [heading("Benchmark results", "=")]
    parts.append("".join(f":{name}: {_plain(text)}\n" for name, text in facts))
    parts.append(
        "Each figure is the median of its runs, with the smallest and the greatest in brackets;\n"
        "× is the ratio to channels_rabbitmq 4.0.1 (above 1 is better). What is measured and how:\n"
        "``benchmarks/README.rst``.\n"
    )
    parts.append(heading("Aims", "-"))
    parts.append(_aims(cells))
    for scenario in scenarios:
        rows = [layer for layer in LAYERS if (scenario.name, layer) in cells]
        if not rows:
            continue
        parts.append(heading(scenario.title, "-"))
        if scenario.name in charts:
            parts.append(f".. image:: {scenario.name}.svg\n   :alt: {scenario.title}\n")
        parts.append(_scenario(scenario, rows, cells, titles))
        parts += _notes(scenario, rows, cells, titles)
    return "\n".join(parts)


def heading(text: str, underline: str) -> str:
    return f"{text}\n{underline * len(text)}\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A "simple table" of reStructuredText. The first column is text, the others are figures."""
    widths = [max(len(row[n]) for row in [header, *rows]) for n in range(len(header))]
    rule = "  ".join("=" * width for width in widths)

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([rule, line(header), rule, *map(line, rows), rule]) + "\n"


def number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def figure(value: Figure | None, digits: int) -> str:
    """ "18,200 (17,900 to 18,400)"; without the range if there was one run."""
    if value is None:
        return _NOTHING
    text = number(value.median, digits)
    if value.runs > 1:
        text += f" ({number(value.low, digits)} to {number(value.high, digits)})"
    return text


def _scenario(
    scenario: Scenario, layers: Sequence[str], cells: Cells, titles: Mapping[str, str]
) -> str:
    compared = [
        metric
        for metric in scenario.metrics
        if metric.more_is_better is not None
        and find_figure(cells, scenario.name, OLD, metric.key) is not None
    ]
    header = ["layer"]
    for metric in scenario.metrics:
        header.append(metric.heading)
        if metric in compared:
            header.append("×")
    rows = []
    for layer in layers:
        cell = cells[scenario.name, layer]
        row = [titles[layer]]
        for metric in scenario.metrics:
            if not cell.figures and metric is scenario.metrics[0]:
                row.append("fails")
            else:
                row.append(figure(cell.figures.get(metric.key), metric.digits))
            if metric in compared:
                row.append(_times_better(scenario, metric, layer, cells))
        rows.append(row)
    return table(header, rows)


def _times_better(scenario: Scenario, metric: Metric, layer: str, cells: Cells) -> str:
    value = find_figure(cells, scenario.name, layer, metric.key)
    old = find_figure(cells, scenario.name, OLD, metric.key)
    if value is None or old is None or not value.median or not old.median:
        return _NOTHING
    times = value.median / old.median
    return number(times if metric.more_is_better else 1 / times, 2)


def _notes(
    scenario: Scenario, layers: Sequence[str], cells: Cells, titles: Mapping[str, str]
) -> list[str]:
    """What went wrong, a line for each layer where something did."""
    lines = []
    for layer in layers:
        cell = cells[scenario.name, layer]
        told = [
            f"{times:,} × {kind}" + (f" ({_plain(text)})" if text else "")
            for kind, (times, text) in cell.problems.items()
        ]
        if cell.failures:
            first = _plain(cell.failures[0])
            told.insert(0, f"{len(cell.failures)} of {cell.runs} runs failed: {first}")
        if told:
            lines.append(f"- {titles[layer]}: {'; '.join(told)}\n")
    return ["".join(lines)] if lines else []


def _plain(text: str) -> str:
    """One line, in which reStructuredText finds no markup."""
    return "".join(f"\\{char}" if char in "\\*`|_" else char for char in " ".join(text.split()))


def _aims(cells: Cells) -> str:
    """Those that could be measured."""
    rows = []
    for aim in AIMS:
        verdict = aim.verdict(cells)
        if verdict is None:
            continue
        limit = f"{'≥' if aim.is_minimum else '≤'} {aim.limit:g}"
        rows.append([aim.text, limit, _short(aim.measure(cells)), verdict])
    text = table(["what", "aim", "measured", "verdict"], rows) if rows else ""
    if missing := len(AIMS) - len(rows):
        text += f"\n{missing} of {len(AIMS)} aims were not measured in this run.\n"
    return text


def _short(value: float | None) -> str:
    if value is None:
        return "fails"
    return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"
