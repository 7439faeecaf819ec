"""The metrics file, after crashes and resumption too, the progress bar, the table of completions, and the figure of the metrics."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="the callbacks are transformers'")

from transformers import TrainerControl, TrainerState

from grpo_fast.trainer.callbacks import (
    CompletionsCallback,
    JSONLLogCallback,
    ProgressBarCallback,
    RunError,
    add_default_callbacks,
    completions_table,
    drop_later_steps,
    print_completions,
    read_run,
)
from grpo_fast.trainer.callbacks.progress import format_metrics
from grpo_fast.trainer.plot import metric_series, plot_runs

LOGS = {
    "reward": 0.512,
    "reward_std": 0.31,
    "entropy": 0.294,
    "completions/repetition": 0.125,
    "frac_reward_zero_std": 0.25,
    "clip_ratio/region_mean": 0.01,
    "kl": 0.0012,
    "tokens_per_second": 1234.5,
    "step_time/generate": 3.0,
    "step_time/train": 1.0,
    "loss": 0.1,
}


def written_to(console: Console) -> str:
    """What was printed on a console that writes to a StringIO."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def state(step: int = 0, steps: int = 10, *, first: bool = True) -> TrainerState:
    found = TrainerState()
    found.global_step, found.max_steps, found.is_world_process_zero = step, steps, first
    return found


def log(callback: Any, folder: Path, step: int, logs: dict[str, Any], **more: Any) -> None:
    callback.on_log(SimpleNamespace(output_dir=str(folder)), state(step, **more), None, logs=logs)


def begin(callback: Any, folder: Path, step: int = 0, **more: Any) -> None:
    callback.on_train_begin(SimpleNamespace(output_dir=str(folder)), state(step, **more), None)


# --- the metrics file ------------------------------------------------------------------------------------------------------------


def test_one_object_for_each_log(tmp_path: Path) -> None:
    log_callback = JSONLLogCallback()
    begin(log_callback, tmp_path / "run")
    log(
        log_callback,
        tmp_path / "run",
        1,
        {"loss": 0.5, "reward": torch.tensor(0.25), "size": np.float32(2.0), "kl": math.nan, "up": math.inf},
    )
    log(log_callback, tmp_path / "run", 2, {"loss": 0.4, "note": "a\nb"})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "reward": 0.25, "size": 2.0, "kl": None, "up": None},
        {"step": 2, "loss": 0.4, "note": "a\nb"},
    ]
    assert "NaN" not in lines[0]
    log(log_callback, tmp_path / "run", 3, {"loss": 0.3}, first=False)  # another process
    log(log_callback, tmp_path / "run", 3, {})
    assert len(read_run(tmp_path / "run")) == 2


def test_a_resumed_run_drops_the_steps_that_it_repeats(tmp_path: Path) -> None:
    log_callback = JSONLLogCallback()
    begin(log_callback, tmp_path)
    for step in range(1, 6):
        log(log_callback, tmp_path, step, {"loss": step})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # the process was killed in the middle of a line
    assert [record["step"] for record in read_run(path)] == [1, 2, 3, 4, 5]
    begin(JSONLLogCallback(), tmp_path, step=3, first=False)  # other processes do not change the file
    assert path.read_text().endswith('"lo')
    path.chmod(0o640)
    begin(JSONLLogCallback(), tmp_path, step=3)
    for step in (4, 5):
        log(log_callback, tmp_path, step, {"loss": 10 * step})
    assert [(record["step"], record["loss"]) for record in read_run(path)] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]
    assert path.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    begin(JSONLLogCallback(), tmp_path)  # a run that starts over
    assert path.read_text() == ""


def test_dropping_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        drop_later_steps(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_reading_a_missing_run_raises(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no .*metrics\.jsonl; expected a run's folder"):
        read_run(tmp_path)
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "no run").mkdir()
    with pytest.raises(RunError, match=r"Runs beside it, the latest first: good\.$"):
        read_run(tmp_path / "god")
    for number in range(8):
        run = tmp_path / f"run{number}"
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1}\n')
        os.utime(run / "metrics.jsonl", (2e9 + number, 2e9 + number))
    with pytest.raises(RunError, match=r"the latest first: run7, run6, run5, run4, run3 and 4 more\.$"):
        read_run(tmp_path / "god")
    empty = tmp_path / "metrics.jsonl"
    empty.write_text("")
    with pytest.raises(RunError, match="holds no metrics"):
        read_run(tmp_path)
    empty.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"line 2: 'nonsense' is no JSON object"):
        read_run(tmp_path)


# --- the progress bar ------------------------------------------------------------------------------------------------------------


WORDS = [
    *("reward 0.512 ±0.31", "entropy 0.294", "repeats 12.5%", "dead groups 25%", "clipped 1.0%", "kl 0.0012", "tok/s 1,234"),
    "sampling 75% of 4.0 s",
]


def test_the_metrics_that_were_logged_are_shown() -> None:
    assert format_metrics(LOGS) == WORDS
    assert format_metrics({"reward": 1.0, "entropy": math.nan, "epoch": 0.1, "kl": "?"}) == ["reward 1.000"]
    assert format_metrics({"reward_std": 1.0}) == format_metrics({"train_runtime": 3.0}) == []


def play(console: Console, folder: Path, **more: Any) -> None:
    bar = ProgressBarCallback(console)
    args = SimpleNamespace(output_dir=str(folder))
    begin(bar, folder, **more)
    for step in (1, 2):
        log(bar, folder, step, LOGS, **more)
        bar.on_step_end(args, state(step, **more), TrainerControl())
    bar.on_train_end(args, state(2, **more), None)
    assert bar.progress is None


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_every_metric_is_visible_at_any_terminal_width(tmp_path: Path, width: int) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    play(console, tmp_path)
    shown = written_to(console)
    assert "2/10" in shown and "\x1b[" in shown
    last = shown.rpartition("GRPO")[2].split("\n")
    assert [word for line in last[1:] for word in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip().split("  ")][: len(WORDS)] == WORDS
    assert all(len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)) <= width for line in last)


def test_each_evaluation_prints_a_line(tmp_path: Path) -> None:
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
        bar = ProgressBarCallback(console)
        begin(bar, tmp_path)
        log(bar, tmp_path, 1, LOGS)
        log(bar, tmp_path, 1, {"eval_reward": 0.75, "eval_reward_se": 0.0126, "eval_rewards/accuracy/mean": 0.5})
        log(bar, tmp_path, 2, {"eval_hard_reward": 0.5, "eval_hard_reward_se": 0.0, "eval_easy_reward": math.nan})
        bar.stop()
        shown = written_to(console)
        assert "step 1/10  eval 0.750 ±0.013" in shown
        assert "step 2/10  eval_hard 0.500 ±0.000\n" in shown.replace(" \n", "\n") and "easy" not in shown
        assert not terminal or "reward 0.512" in shown.rpartition("eval_hard")[2]  # the metrics of training remain visible


def test_metrics_that_a_step_does_not_log_remain_visible(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    bar = ProgressBarCallback(console)
    begin(bar, tmp_path)
    log(bar, tmp_path, 1, LOGS)
    log(bar, tmp_path, 2, {"entropy": 0.25})
    bar.stop()
    assert "reward 0.512 ±0.31  entropy 0.250" in written_to(console)


def test_the_bar_shows_that_an_evaluation_runs(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
    bar = ProgressBarCallback(console)
    begin(bar, tmp_path)
    assert bar.progress is not None
    bar.on_step_end(SimpleNamespace(), state(1), TrainerControl(should_evaluate=True))
    assert bar.progress.tasks[0].description == "evaluating" and bar.progress.tasks[0].completed == 1
    bar.on_evaluate(SimpleNamespace(), state(1), TrainerControl())
    assert bar.progress.tasks[0].description == "GRPO"
    bar.stop()


def test_transformers_bars_are_disabled_and_the_cursor_is_restored_after_an_error(tmp_path: Path) -> None:
    from transformers.utils import logging

    logging.enable_progress_bar()
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    bar = ProgressBarCallback(console)
    begin(bar, tmp_path)
    assert not logging.is_progress_bar_enabled() and written_to(console).rpartition("\x1b[?25")[2].startswith("l")
    bar.stop()
    assert logging.is_progress_bar_enabled() and written_to(console).rpartition("\x1b[?25")[2].startswith("h")

    program = (
        f"import pathlib, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_callbacks as t\n"
        "from rich.console import Console\n"
        "bar = t.ProgressBarCallback(Console(file=sys.stdout, force_terminal=True)); t.begin(bar, pathlib.Path('.')); raise KeyError('x')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "KeyError" in ended.stdout and ended.stdout.rpartition("\x1b[?25")[2].startswith("h")


def test_without_a_terminal_plain_lines_are_printed(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=40)
    play(console, tmp_path)
    lines = written_to(console).splitlines()
    assert len(lines) == 2 and lines[0].startswith("step 1/10  reward 0.512 ±0.31") and "\x1b" not in lines[0]
    silent = Console(file=io.StringIO(), force_terminal=True)
    play(silent, tmp_path, first=False)
    assert written_to(silent) == ""


def test_dead_groups_are_explained_once(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=400)
    bar = ProgressBarCallback(console)
    for step in (1, 2):
        log(bar, tmp_path, step, {"reward": 0.0, "frac_reward_zero_std": 0.9})
    assert written_to(console).count("in 90% of the groups all rewards are equal") == 1


def test_a_long_run_of_dead_groups_gets_advice_once(tmp_path: Path) -> None:
    """Also where a single dead step has been explained before; a step with a live group starts the count again."""
    console = Console(file=io.StringIO(), force_terminal=False, width=800)
    bar = ProgressBarCallback(console)
    for step in range(10, 250, 10):
        before = written_to(console)
        log(bar, tmp_path, step, {"reward": 0.0, "frac_reward_zero_std": 0.75 if step == 40 else 1.0})
        assert ("for 50 steps all rewards have been equal in every group" in written_to(console)[len(before) :]) == (step == 90)
    assert written_to(console).count("all rewards have been equal in every group") == 1


def test_rewards_that_fail_are_named_once(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    bar = ProgressBarCallback(console)
    for step in (1, 2):
        log(bar, tmp_path, step, {"reward": 0.0, "rewards/mine/timeouts": 0.5, "rewards/mine/errors": 0.0, "rewards/yours/errors": 2.0})
    said = written_to(console)
    assert said.count("rewards/mine/timeouts is 0.5: reward 'mine' took too long, and does not apply") == 1
    assert said.count("rewards/yours/errors is 2: reward 'yours' failed") == 1 and "rewards/mine/errors" not in said


def test_add_default_callbacks_replaces_transformers_own(tmp_path: Path) -> None:
    from transformers import ProgressCallback, Trainer, TrainingArguments

    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=False)  # its default follows the log level
    trainer = Trainer(torch.nn.Linear(1, 1), args)
    for _ in range(2):
        add_default_callbacks(trainer)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert ProgressCallback not in kinds
    assert kinds.count(ProgressBarCallback) == kinds.count(JSONLLogCallback) == 1
    args.disable_tqdm = True
    add_default_callbacks(trainer)
    assert ProgressBarCallback not in [type(callback) for callback in trainer.callback_handler.callbacks]


def test_a_real_trainer_writes_and_resumes_its_file(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.weight * x - labels).square().mean()}

    data = [{"x": float(i), "labels": 2.0 * i} for i in range(8)]

    def run(steps: int, resume: bool) -> None:
        args = TrainingArguments(
            str(tmp_path), max_steps=steps, logging_steps=1, save_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none"
        )
        trainer = Trainer(Line(), args, train_dataset=data)
        add_default_callbacks(trainer)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)

    run(4, resume=False)
    first = [record for record in read_run(tmp_path) if "loss" in record]
    run(4, resume=True)  # from step 2: steps 3 and 4 are repeated
    second = [record for record in read_run(tmp_path) if "loss" in record]
    assert [record["step"] for record in second] == [1, 2, 3, 4]
    assert [record["loss"] for record in second] == pytest.approx([record["loss"] for record in first])


# --- completions -----------------------------------------------------------------------------------------------------------------


def test_the_table_of_completions() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    loop = "start " + "again " * 400 + "end"
    rewards = {"accuracy": [1.0, None], "format": [0.0, math.nan]}
    prompts = [[{"role": "user", "content": "[bold]2+2?"}], "why"]
    assert print_completions(prompts, [loop, "because"], rewards, [1.25, -0.5], step=3, console=console)
    shown = written_to(console)
    assert "Step 3" in shown and "[bold]2+2?" in shown and "+1.25" in shown and "-0.50" in shown and "–" in shown
    assert "start" in shown and "…" in shown and "end" in shown and len(shown) < 8000
    assert completions_table(["a"] * 3, ["b"] * 3, {}, [0.0] * 3, limit=2).row_count == 2
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    advantages = [0.1, -1.5, 0.0, 2.0, 0.5]
    print_completions(["why"] * 5, list("abcde"), {}, advantages, step=3, limit=3, console=console)
    assert re.findall("[+-][0-9.]{4}", written_to(console)) == ["+2.00", "+0.10", "-1.50"]
    assert "Step 3, 3 of 5 completions, from the best to the worst" in written_to(console)
    quiet = Console(file=io.StringIO(), force_terminal=False)
    assert not print_completions(["a"], ["b"], {}, [0.0], console=quiet)
    assert written_to(quiet) == ""
    with pytest.raises(ValueError, match="expected as many of each"):
        print_completions(["a"], ["b"], {"r": [1.0, 2.0]}, [0.0], console=quiet)


def test_completions_of_a_logged_step_are_shown_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "completions").mkdir()
    row = {
        "step": 2,
        "prompt": "2+2?",
        "completion": "four",
        "rewards": {"accuracy": 1.0, "math": None},
        "advantage": 0.5,
        "temperature": 1.0,
    }
    noted = row | {"extra": {"level": "hard"}}
    (tmp_path / "completions" / "step-000003.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(noted) + "\n")
    args = SimpleNamespace(output_dir=str(tmp_path), log_completions=True)
    for terminal, wanted, logs, shown in (
        (True, True, LOGS, 2),
        (False, True, LOGS, 0),
        (True, False, LOGS, 0),
        (True, True, {"loss": 1.0}, 0),
    ):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
        args.log_completions = wanted
        CompletionsCallback(console).on_log(args, state(3), None, logs=logs)
        assert written_to(console).count("four") == shown and written_to(console).count("hard") == shown / 2


def test_many_rewards_share_a_column(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    names = ["accuracy_reward", "format_reward", "repetition_penalty", "language_consistency_reward"]
    print_completions(["2+2?"], ["two and two"], {name: [0.25] for name in names}, [0.5], console=console)
    shown = written_to(console)
    assert "two and two" in shown and all(f"{name} 0.25" in shown for name in names)  # no name or value is split between lines


# --- curves ----------------------------------------------------------------------------------------------------------------------


def make_run(folder: Path, shift: float = 0.0, steps: int = 6) -> Path:
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps):
            times = {"step_time/generate": 1.0 + shift, "step_time/loss": 0.5, "temperature": 1.0}
            file.write(json.dumps({"step": step, "reward": shift + step / 10, "entropy": 1 / step, "kl": None, **times}) + "\n")
        file.write(json.dumps({"step": steps - 1, "eval_hard_reward": 0.9, "eval_hard_reward_se": 0.05, "eval_easy_reward": 0.95}) + "\n")
    return folder


def test_series_skip_values_that_are_not_numbers() -> None:
    records: list[dict[str, Any]] = [
        {"step": 1, "a": 1.0},
        {"step": 2, "a": None},
        {"step": 3, "a": 3},
        {"step": 3, "a": 4.0},
        {"step": 4, "b": 1},
    ]
    assert metric_series(records, "a") == ([1.0, 3.0], [1.0, 4.0])


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_curves_of_two_runs(tmp_path: Path, ending: str) -> None:
    from matplotlib import rc_context

    runs = [make_run(tmp_path / "one" / "out"), make_run(tmp_path / "two" / "out", 0.2)]
    picture = tmp_path / "new" / f"curves.{ending}"
    assert plot_runs(runs, picture, smooth=3) == ["Reward", "Entropy of softmax(z/T)", "Time of a step"]
    assert picture.stat().st_size > 5000 and [file.name for file in picture.parent.iterdir()] == [picture.name]
    if ending == "svg":
        with rc_context({"svg.fonttype": "none"}):  # text elements in place of paths
            assert plot_runs([runs[0]], picture)
        words = picture.read_text()
        assert (
            ">Time of a step (dotted: sampling)<" in words
            and ">Reward (dotted: evaluation)<" in words
            and ">Entropy of softmax(z/T)<" in words
            and ">out<" in words
        )


def test_the_command(tmp_path: Path) -> None:
    from grpo_fast.cli.plot import app

    run = make_run(tmp_path / "run")
    result = CliRunner().invoke(app, [str(run)])
    assert result.exit_code == 0 and "3 panels: Reward, Entropy" in result.output
    assert (run / "curves.png").stat().st_size > 5000
    for arguments, words in (
        ([str(tmp_path / "missing")], "there is no"),
        ([str(run), "-o", str(tmp_path / "curves.doc")], "expected a name that ends in .png"),
        ([str(run), "--smooth", "0"], "smooth is 0"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and words in result.output
    other = tmp_path / "other" / "metrics.jsonl"
    other.parent.mkdir()
    other.write_text('{"step": 1, "weather": 3}\n')
    result = CliRunner().invoke(app, [str(other)])
    assert result.exit_code == 2 and "none of the metrics to draw; the first line has weather" in result.output


def test_plotting_does_not_import_transformers() -> None:
    code = "import sys, grpo_fast.cli.plot, grpo_fast.trainer.plot; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
