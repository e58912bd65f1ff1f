"""Bar charts as SVG, one for each scenario, readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from xml.sax.saxutils import escape

from benchmarks.figures import Cell
from benchmarks.model import LAYERS, OURS
from benchmarks.scenario import Scenario
from benchmarks.tables import number

_WIDTH = 760
_LABELS = 190  # where the bars begin
_FIGURES = 120  # kept free at the right, for the figure behind the longest bar
_TOP = 64
_STEP = 34  # from bar to bar
_BAR = 20

# The picture brings its own background: what page it is shown on doesn't matter.
_STYLE = """\
.page { fill: #ffffff; stroke: #d0d7de }
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 }
.faint { fill: #59636e; font-size: 12px }
.bar { fill: #a8b3be }
.ours { fill: #1f6feb }
.range { stroke: #1f2328; stroke-width: 1.5; fill: none }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117; stroke: #3d444d }
  text { fill: #f0f6fc }
  .faint { fill: #9198a1 }
  .bar { fill: #59636e }
  .ours { fill: #4493f8 }
  .range { stroke: #f0f6fc }
}"""


def bar_chart(
    scenario: Scenario, cells: Mapping[tuple[str, str], Cell], titles: Mapping[str, str]
) -> str | None:
    """The first metric of a scenario, a bar for each layer; ``None`` if there is no figure."""
    metric = scenario.metrics[0]
    layers = [layer for layer in LAYERS if (scenario.name, layer) in cells]
    figures = {layer: cells[scenario.name, layer].figures.get(metric.key) for layer in layers}
    highs = [figure.high for figure in figures.values() if figure is not None]
    if not highs:
        return None
    scale = (_WIDTH - _LABELS - _FIGURES) / (max(highs) or 1.0)
    better = "more is better" if metric.more_is_better else "less is better"
    height = _TOP + _STEP * len(layers) + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{escape(scenario.title)}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="page" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="6"/>',
        _text(16, 28, scenario.title, "title"),
        _text(
            16,
            48,
            f"{metric.heading}; {better}; line: from the least to the most of the runs",
            "faint",
        ),
    ]
    for n, layer in enumerate(layers):
        y = _TOP + n * _STEP
        lines.append(_text(_LABELS - 10, y + 15, titles[layer], "", anchor="end"))
        figure = figures[layer]
        if figure is None:
            lines.append(_text(_LABELS, y + 15, "fails", "faint"))
            continue
        kind = "ours" if layer == OURS else "bar"
        lines.append(
            f'<rect class="{kind}" x="{_LABELS}" y="{y}" '
            f'width="{max(figure.median * scale, 1):.1f}" height="{_BAR}" rx="2"/>'
        )
        if figure.runs > 1:
            low, high = (_LABELS + each * scale for each in (figure.low, figure.high))
            middle = y + _BAR / 2
            lines.append(
                f'<path class="range" d="M{low:.1f} {middle - 4}v8m0 -4H{high:.1f}m0 -4v8"/>'
            )
        end = _LABELS + figure.high * scale
        lines.append(_text(math.ceil(end) + 8, y + 15, number(figure.median, metric.digits), ""))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, kind: str, *, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
