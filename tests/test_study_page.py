"""The HTML page of a study: everything in one file, and what a model writes is text, never markup."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from grpo_fast.study import page

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "</pre><script>document.title = 'taken'</script><img src=http://localhost/x onerror=alert(1)>{{ 7 * 7 }}\"'&lt;"


class Reader(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def published(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"bench/results/temperature_{name}.json").read_text())
    return found


def hostile(kind: str) -> dict[str, Any]:
    """A result in which every text of a model or of a user is HOSTILE."""
    result = published(kind)
    result["advice"]["sentences"].append(HOSTILE)
    if kind == "sampling":
        result["options"]["model"] = result["options"]["dataset"] = HOSTILE
        result["runs"] = [run | {"examples": [HOSTILE, HOSTILE]} for run in result["runs"]]
        return result
    result["options"]["model"] = HOSTILE
    shown = [{"prompt": HOSTILE, "completion": HOSTILE, "right": right} for right in (True, False)]
    result["completions"] = {label: {"0": shown, "1": shown} for label in result["trained_at"]}
    return result


@pytest.mark.parametrize("kind", ["sampling", "truncation"])
def test_what_models_and_users_write_stays_text(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "charts_of", lambda draw, result: page.Charts([(HOSTILE, "AAAA")], "AAAA", 20))
    write = page.write_sampling_page if kind == "sampling" else page.write_training_page
    write(hostile(kind), tmp_path / "found.html")
    read = Reader((tmp_path / "found.html").read_text(encoding="utf-8"))
    assert not {tag for tag, _ in read.tags} & {"script", "iframe", "object", "form", "a", "base"}
    sources = [value for _, attributes in read.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) == 3 and all(str(source).startswith("data:") for source in sources)
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    policies = [attributes["content"] for tag, attributes in read.tags if tag == "meta" and "http-equiv" in attributes]
    assert len(policies) == 1 and str(policies[0]).startswith("default-src 'none'")
    assert read.text.count(HOSTILE) > 10, "shown as it was written"
    assert "49" not in HOSTILE and "{{ 7 * 7 }}" in read.text, "no template is evaluated"


def test_completions_of_a_question_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "charts_of", lambda draw, result: page.Charts([]))
    result = hostile("truncation")
    page.write_training_page(result, tmp_path / "found.html")
    read = Reader((tmp_path / "found.html").read_text(encoding="utf-8"))
    names = [attributes.get("class") for tag, attributes in read.tags if tag in ("div", "span")]
    labels = len(result["trained_at"])
    assert names.count("samples") == 4, "two questions at two temperatures"
    assert names.count("right") == names.count("wrong") == 2 * labels
    assert read.text.count("before") >= 4 and "0.431 ± 0.000" in read.text and "1472.111 to 561.922" in read.text


def test_each_panel_of_a_figure_becomes_a_chart() -> None:
    from PIL import Image

    figure = Figure(figsize=(6, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right, empty = figure.subplots(1, 3)
    (line,) = left.plot([0, 1], [0, 1], color="#ff0000", label="a line")
    left.set_title("Left")
    right.plot([0, 1], [1, 0], color="#0000ff")
    right.set_title("Right")
    empty.set_axis_off()
    figure.legend([line], ["a line"], loc="outside lower center")
    found = page.charts_of(lambda result: figure, {})
    assert [title for title, _ in found.panels] == ["Left", "Right"] and found.legend is not None and found.legend_height > 5
    colours = []
    for _, image in found.panels:
        picture = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")
        assert 100 < picture.width < 250 and 150 < picture.height < 310
        colours.append({colour for _, colour in picture.getcolors(1 << 16) or []} & {(255, 0, 0), (0, 0, 255)})
    assert colours == [{(255, 0, 0)}, {(0, 0, 255)}], "a chart shows its own panel only"
