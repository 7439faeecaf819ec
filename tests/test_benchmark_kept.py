"""The benchmark of kept sets: its gate, and a run at toy size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from grpo_fast.benchmark.harness.suite import load, run_suite
from grpo_fast.benchmark.head.implementations import Gradients, make_cases, measure_gradients
from grpo_fast.benchmark.kept import suite
from grpo_fast.benchmark.kept.implementations import OVER_SETS, KeptCase, check, make_kept, make_kept_case
from grpo_fast.benchmark.kept.suite import MEASURED_SIZES, SUITE, KeptSettings, KeptWorker, sizes_of


def case(size: str = "9", dtype: torch.dtype = torch.float32) -> KeptCase:
    (head,) = make_cases(16, 24, 400, dtype, [1.0], seed=0)
    return make_kept_case(head, sizes_of(size, 16, 0).clamp(max=100), seed=0)


@pytest.mark.parametrize("size", ["1", "9", "top-p"])
@pytest.mark.parametrize("name", OVER_SETS)
def test_what_is_over_sets_is_right_and_wrong_gradients_are_refused(name: str, size: str) -> None:
    given = case(size)
    found = measure_gradients(make_kept(name, given), given.head, True, 1).result
    assert check(found, given).passed, check(found, given)
    if size != "1":
        for factor in (0.0, 2.0):
            assert found.d_weight is not None
            assert not check(Gradients(found.loss, found.d_hidden * factor, found.d_weight), given).passed
            assert not check(Gradients(found.loss, found.d_hidden, found.d_weight * factor), given).passed


def test_a_loss_over_the_whole_vocabulary_does_not_pass() -> None:
    given = case()
    found = measure_gradients(make_kept("ours", given), given.head, True, 1).result
    assert not check(found, given).passed


def test_the_sizes_of_top_p_are_those_that_were_measured() -> None:
    sizes = sizes_of("top-p", 20_000, 0).double()
    assert sizes.min() == 1 and sizes.max() <= 2205 and sizes.mean() == pytest.approx(191, rel=0.1)
    assert sizes.median() == pytest.approx(MEASURED_SIZES[16], rel=0.1)


def test_the_table_of_the_guide_says_what_was_measured() -> None:
    root = Path(__file__).resolve().parents[1]
    found = {
        (x["implementation"], x["size"], x["trainable"]): x for x in load(root / "bench/results/kept_cpu.json", "bench-kept")["results"]
    }
    guide = (root / "docs/kept-sets.md").read_text()
    for size in ("8", "32", "128", "512", "top-p"):
        entries = [found[name, size, trainable] for trainable in (False, True) for name in ("kept", "gather")]
        cells = [f"{1e3 * entry['median']:.3g} ms ({entry['times_faster']:.3g}x)" for entry in entries]
        assert f"| {size} | {' | '.join(cells)} |" in guide
    for trainable in (False, True):
        assert f"{1e3 * found['ours', None, trainable]['median']:,.0f} ms" in guide


class InThisProcess:
    """In place of a worker process."""

    def __init__(self, make: Any, threads: int) -> None:
        self.worker: KeptWorker = make()

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, method: str, **arguments: Any) -> Any:
        return getattr(self.worker, method)(**arguments)


def test_a_toy_run_has_a_table_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(suite, "WorkerProcess", InThisProcess)
    settings = KeptSettings(sizes=("1", "8"), tokens=16, width=24, vocabulary=400, implementations=("kept", "gather", "ours"), rounds=1)
    result = run_suite(SUITE, settings, lambda what: None)
    entries = {(x["implementation"], x["size"], x["trainable"]): x for x in result["results"]}
    assert entries.keys() == {(name, size, t) for name in ("kept", "gather") for size in ("1", "8") for t in (True, False)} | {
        ("ours", None, t) for t in (True, False)
    }
    assert entries["ours", None, True]["times_faster"] == 1 and not result["skipped"]
    SUITE.print_report(result, Console(width=100))
    assert "grpo_fast, kept sets" in capsys.readouterr().out
    assert SUITE.write_figure is not None
    SUITE.write_figure(result, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"sizes": ("0",)}, "size is '0'"), ({"sizes": ("many",)}, "size is 'many'"), ({"tokens": 12}, "tokens is 12")],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeptSettings(**settings)
