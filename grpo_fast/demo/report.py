"""Output of the demonstration: tables for the terminal, and curves as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from grpo_fast.data.tasks.sorting import question
from grpo_fast.demo.evaluate import SamplingQuality
from grpo_fast.utils.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind people can distinguish. Before and after also differ in line style and marker.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"

COLUMNS = (  # heading, field of SamplingQuality
    ("accuracy", "accuracy"),
    ("format", "format"),
    ("endless", "truncated"),
    ("repetition", "repetition"),
    ("coherence", "coherence"),
    ("diversity", "diversity"),
    ("entropy", "entropy"),
)


def quality_table(table: Sequence[SamplingQuality], title: str) -> Table:
    """Return the terminal table of an evaluation, one row per sampling temperature."""
    caption = "endless: cut at the length limit; diversity: distinct completions in a group"
    out = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits into 80 columns
    out.add_column("T", justify="right")
    for heading, _ in COLUMNS:
        out.add_column(heading, justify="right")
    for quality in table:
        out.add_row(f"{quality.temperature:.1f}", *(f"{getattr(quality, field):.3f}" for _, field in COLUMNS))
    return out


def samples_table(samples: Sequence[dict[str, Any]]) -> Table:
    """Return the terminal table of completions before and after GRPO, with correct answers in bold green."""
    out = Table(title="The same questions, before and after", box=box.SIMPLE_HEAD)
    for heading in ("T", "question", "before", "after"):
        out.add_column(heading, overflow="fold")
    for row in samples:
        answer = question(row["prompt"].removeprefix("sort ").removesuffix("="))["answer"]
        cells = [Text(row[when]) for when in ("before", "after")]
        for cell in cells:
            cell.highlight_words([f"<answer>{answer}</answer>"], "bold green")
        out.add_row(f"{row['temperature']:.1f}", row["prompt"], *cells)
    return out


def write_curves(result: dict[str, Any], path: Path) -> None:
    """Draw four panels of the training, and two of the evaluation by sampling temperature."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot, which has global state and may open a window

    history, options = result["history"], result["options"]
    steps = [record["step"] for record in history]
    figure = Figure(figsize=(12, 6.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3).flatten()
    figure.suptitle(
        "A small language model loses its bad habits by GRPO\n"
        f"Qwen2 of 0.1 M parameters, loss type {options['loss_type']}, trained at temperature {options['temperature']:g}, "
        f"{options['prompts']} prompts × {options['group_size']} completions per step, seed {options['seed']}; "
        "thin: single steps, thick: mean of five",
        fontsize=10.5,
    )

    def series(name: str) -> list[float]:
        return [record[name] for record in history]

    best = sum(weight for name, weight in result["rewards"].items() if name != "repetition_penalty")
    _curve(panels[0], steps, [value / best for value in series("reward")], ORANGE, "reward, of the largest possible", "--")
    _curve(panels[0], steps, series("rewards/accuracy_reward"), BLUE, "accuracy", "-")
    _curve(panels[1], steps, series("entropy"), BLUE, None, "-")
    _curve(panels[2], steps, _percent(series("zero_variance_groups")), BLUE, None, "-")
    _curve(panels[3], steps, series("length"), BLUE, None, "-")
    titles = ("Reward and accuracy in training", "Policy entropy", "Groups without a gradient", "Completion length")
    labels = ("share", "nats per token", "groups with equal rewards (%)", "tokens")
    for panel, title, label in zip(panels, titles, labels, strict=False):
        panel.set(title=title, xlabel="GRPO step", ylabel=label, xlim=(0, max(steps[-1], 1)))
        panel.set_ylim(bottom=0)
    panels[0].set_ylim(0, 1.02)
    panels[0].legend(frameon=False, loc="lower right")
    panels[2].set_ylim(0, 102)
    panels[3].yaxis.get_major_locator().set_params(integer=True)

    temperatures = [quality["temperature"] for quality in result["before"]]
    for panel, field, title, label in (
        (panels[4], "accuracy", "Accuracy by temperature", "correct held-out questions (%)"),
        (panels[5], "truncated", "Endless completions by temperature", "cut at the length limit (%)"),
    ):
        for when, colour, style, marker in (("before", ORANGE, "--", "s"), ("after", BLUE, "-", "o")):
            values = _percent([quality[field] for quality in result[when]])
            panel.plot(temperatures, values, color=colour, linestyle=style, marker=marker, label=f"{when} GRPO", clip_on=False, zorder=3)
        panel.set(title=title, xlabel="sampling temperature", ylabel=label, ylim=(0, 102), xticks=temperatures)
        panel.legend(frameon=False, loc="center right")
    for panel in panels:
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(11)
    write_atomically(path, lambda partial: figure.savefig(partial, format="png"))


def _curve(panel: Axes, steps: list[float], values: list[float], colour: str, label: str | None, style: str) -> None:
    """Draw the single steps as a thin line, and their running mean as a thick one."""
    panel.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    panel.plot(steps, _smooth(values), color=colour, linewidth=2, linestyle=style, label=label)


def _smooth(values: list[float], reach: int = 2) -> list[float]:
    windows = [values[max(i - reach, 0) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _percent(values: list[float]) -> list[float]:
    return [100 * value for value in values]
