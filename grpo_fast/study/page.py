"""The result of a study as one HTML page, which needs no network: tables, charts, and sampled completions side by side.

Completions and names come from models and files, which nobody vouches for: the template escapes every text, charts are images (in which
nothing runs), and the page forbids scripts and loads by its content security policy.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from grpo_fast.study import plot, report
from grpo_fast.study.options import temperature_name
from grpo_fast.study.report import TextTable
from grpo_fast.study.result_files import JSONObject
from grpo_fast.study.training_study import BEFORE
from grpo_fast.utils.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

__all__ = ["Charts", "Completions", "charts_of", "write_page", "write_sampling_page", "write_training_page"]

MARGIN = 6  # pixels around a chart
LEGEND_SCALE = 0.6  # CSS pixels of a pixel of the legend: its text is as large as that of the page
TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --faint: #8882; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.charts, .samples { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.charts img { width: 100%; background: #fff; }
.legend { height: {{ legend_height }}px; background: #fff; }
.samples > div { background: var(--faint); padding: .5rem .8rem; min-width: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; }
.right::before { content: "correct \\2713"; color: #00795a; font-weight: bold; }
.wrong::before { content: "not correct"; color: #b34700; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ made }}</p>
<h2>Findings</h2>
<ul>{% for sentence in sentences %}<li>{{ sentence }}</li>{% endfor %}</ul>
<h2>Charts</h2>
<div class="charts">{% for name, image in charts %}<img src="data:image/png;base64,{{ image }}" alt="{{ name }}">{% endfor %}</div>
{% if legend %}<div class="wide"><img class="legend" src="data:image/png;base64,{{ legend }}" alt="legend"></div>{% endif %}
<h2>Tables</h2>
{% for table in tables %}<div class="wide"><table><caption>{{ table.title }}</caption>
<thead><tr>{% for heading in table.headings %}<th scope="col">{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in table.cells %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div><br>
{% endfor %}
{% if samples %}<h2>Completions</h2>
{% for one in samples %}<h3>{{ one.heading }}</h3>
<div class="samples">{% for name, text, right in one.columns %}<div><b>{{ name }}</b>
<pre>{{ text }}</pre>{% if right is not none %}<span class="{{ 'right' if right else 'wrong' }}"></span>{% endif %}</div>
{% endfor %}</div>
{% endfor %}{% endif %}
</body>
</html>
"""


class Charts(NamedTuple):
    """PNG images in base64."""

    panels: list[tuple[str, str]]  # title and image
    legend: str | None = None
    legend_height: int = 0  # in CSS pixels


class Completions(NamedTuple):
    """Completions that are shown side by side."""

    heading: str
    columns: list[tuple[str, str, bool | None]]  # name, text, and whether it is correct, if that is known


def write_sampling_page(result: JSONObject, path: Path) -> None:
    """Write the page of ``grpo-fast study sampling``.

    Args:
        result: what the published JSON file holds.
        path: of the page.
    """
    options, examples = result["options"], [run.get("examples", []) for run in result["runs"]]
    names = [f"T = {temperature_name(run['temperature'])}" for run in result["runs"]]
    samples = [
        Completions(f"Question {number + 1}", [(name, texts[number], None) for name, texts in zip(names, examples, strict=True)])
        for number in range(min(map(len, examples), default=0))
    ]
    title = f"Sampling temperatures: {options['model']} on {options['dataset']}"
    write_page(path, title, result, report.sampling_tables(result), plot.sampling_figure, samples)


def write_training_page(result: JSONObject, path: Path) -> None:
    """Write the page of ``grpo-fast study training``.

    Args:
        result: what the published JSON file holds.
        path: of the page.
    """
    found = result.get("completions", {})
    labels = [label for label in result["trained_at"] if found.get(label)]
    samples = [
        Completions(
            f"{first['prompt']} (T = {place})",
            [(_trained(label), found[label][place][number]["completion"], found[label][place][number]["right"]) for label in labels],
        )
        for place, of_place in (found[labels[0]].items() if labels else ())
        for number, first in enumerate(of_place)
    ]
    title = plot.training_title(result)
    write_page(path, title, result, report.training_tables(result), plot.training_figure, samples)


def write_page(
    path: Path,
    title: str,
    result: JSONObject,
    tables: Sequence[TextTable],
    draw: Callable[[JSONObject], Figure],
    samples: Sequence[Completions],
) -> None:
    """Write one page.

    Args:
        path: of the page.
        title: of the page.
        result: what the published JSON file holds.
        tables: in the order in which they are shown.
        draw: the figure whose panels become charts.
        samples: completions side by side.
    """
    from jinja2 import Environment, StrictUndefined  # a requirement of torch, and slow to import

    machine = result["machine"]
    charts, legend, legend_height = charts_of(draw, result)
    made = f"Measured on {machine['cpu']}, torch {machine['torch']}, grpo_fast {machine['grpo_fast']} ({machine['commit']})."
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE)
    sentences = result["advice"]["sentences"]
    shown = {"title": title, "made": made, "sentences": sentences, "tables": tables, "samples": samples}
    write_text(path, page.render(**shown, charts=charts, legend=legend, legend_height=legend_height))


def charts_of(draw: Callable[[JSONObject], Figure], result: JSONObject) -> Charts:
    """Return each panel of a figure as an image of its own, which is readable on a phone, and the legend of the figure."""
    from PIL import Image  # a requirement of matplotlib

    figure = draw(result)
    figure.canvas.draw()
    whole = Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba())  # type: ignore[attr-defined]

    def image(bounds: Bbox) -> str:
        file = io.BytesIO()
        left, bottom, right, top = bounds.padded(MARGIN).extents
        whole.crop((round(left), round(whole.height - top), round(right), round(whole.height - bottom))).save(file, "png", optimize=True)
        return base64.b64encode(file.getvalue()).decode()

    panels = [axis for axis in figure.axes if axis.has_data() and axis.axison]
    panel_images = [(axis.get_title(), image(bounds)) for axis in panels if (bounds := axis.get_tightbbox()) is not None]
    if not figure.legends:
        return Charts(panel_images)
    of_legend = figure.legends[0].get_window_extent()
    return Charts(panel_images, image(of_legend), round(LEGEND_SCALE * of_legend.height))


def _trained(label: str) -> str:
    return "before" if label == BEFORE else f"trained at {label}"
