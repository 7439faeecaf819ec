"""The benchmark of kept sets: its gate, and a run at toy size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from workers_in_process import InThisProcess

from grpo_fast.benchmark.harness.suite import load, run_suite
from grpo_fast.benchmark.head.implementations import Gradients, make_cases, measure_gradients
from grpo_fast.benchmark.kept import implementations, suite
from grpo_fast.benchmark.kept.implementations import OVER_SETS, KeptCase, check, make_kept, make_kept_case
from grpo_fast.benchmark.kept.suite import MEASURED_SIZES, SUITE, KeptSettings, KeptWorker, markdown, sizes_of
from grpo_fast.head import kept as head_kept


def case(size: str = "9", dtype: torch.dtype = torch.float32) -> KeptCase:
    (head,) = make_cases(16, 24, 400, dtype, [1.0], seed=0)
    return make_kept_case(head, sizes_of(size, 16, 400, 0), seed=0)


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
    sizes = sizes_of("top-p", 20_000, 151_936, 0).double()
    assert sizes.min() == 1 and sizes.max() <= 2205 and sizes.mean() == pytest.approx(191, rel=0.1)
    assert sizes.median() == pytest.approx(MEASURED_SIZES[16], rel=0.1)


ROOT = Path(__file__).resolve().parents[1]


def test_the_tables_of_the_guide_say_what_was_measured() -> None:
    guide = (ROOT / "docs/kept-sets.md").read_text()
    for name in ("kept_cpu", "kept_crossover_cpu"):
        result = load(ROOT / f"bench/results/{name}.json", "bench-kept")
        assert not [row for row in markdown(result) if row not in guide]
        assert all(x["question"] == ("kept sets" if x["implementation"] in OVER_SETS else "whole vocabulary") for x in result["results"])


@pytest.mark.parametrize(("size", "times"), [("32", 40), ("128", 15), ("512", 4)])
def test_what_was_measured_is_fast_enough(size: str, times: float) -> None:
    """float32, 896 x 151,936, a frozen head, one thread."""
    results = load(ROOT / "bench/results/kept_cpu.json", "bench-kept")["results"]
    (found,) = (x for x in results if (x["implementation"], x["dtype"], x["trainable"], x["size"]) == ("kept", "float32", False, size))
    assert found["times_faster"] >= times


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_largest_set_by_itself_is_where_both_ways_take_the_same_time(dtype: str) -> None:
    """A set of half that size is faster by itself, and one of twice that size over the whole vocabulary, or no more than a fifth slower."""
    results = load(ROOT / "bench/results/kept_crossover_cpu.json", "bench-kept")["results"]
    times = {(x["implementation"], x["size"], x["trainable"]): x["median"] for x in results if x["dtype"] == dtype}
    share = head_kept.LARGEST_SHARES[getattr(torch, dtype)]
    for trainable in (False, True):
        assert times["apart", f"V/{2 * share}", trainable] < times["chunks", f"V/{2 * share}", trainable]
        larger = ("apart", f"V/{share // 2}", trainable)
        assert larger not in times or times[larger] > times["chunks", f"V/{share // 2}", trainable] / 1.2


def test_the_guide_says_what_products_over_unions_cost() -> None:
    """Of sets that a model has sampled: far below 1, so that they are not built."""
    guide = (ROOT / "docs/kept-sets.md").read_text()
    found = json.loads((ROOT / "bench/results/kept_union_cpu.json").read_text())["results"]
    for x in found:
        block = min(("16", "64", "256", "512"), key=x["ms"].get)
        assert (
            f"| {x['dtype']} | {x['sets']} | {x['union']['16']:.0f} | {x['ms']['single rows']:.3g} | {x['ms'][block]:.3g} ({block}) |"
            in guide
        )
    assert all(x["times_faster"] < 0.5 for x in found if x["sets"].startswith("top-k"))


def test_an_implementation_that_fails_has_a_reason_and_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = case()
    torch.save(given, tmp_path / "case.pt")
    monkeypatch.setitem(implementations._MAKE, "gather", lambda _: lambda hidden, weight: hidden.sum() + weight.sum())
    monkeypatch.setitem(implementations._MAKE, "masked", lambda _: (_ for _ in ()).throw(ImportError("not there")))
    found = KeptWorker(1).measure(["kept", "gather", "masked"], tmp_path / "case.pt", False, 1)
    assert (
        found["kept"]["median"] > 0
        and "result is wrong" in found["gather"]["reason"]
        and found["masked"] == {"reason": "not run: not there"}
    )


def test_a_toy_run_has_a_table_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(suite, "WorkerProcess", InThisProcess)
    names = ("kept", "gather", "ours", "masked")
    settings = KeptSettings(sizes=("1", "V/50"), tokens=16, width=24, vocabulary=400, implementations=names, rounds=1)
    result = run_suite(SUITE, settings, lambda what: None)
    entries = {(x["implementation"], x["size"], x["trainable"]): x for x in result["results"]}
    assert entries.keys() == {(name, size, t) for name in ("kept", "gather") for size in ("1", "V/50") for t in (True, False)} | {
        (name, None, t) for name in ("ours", "masked") for t in (True, False)
    }
    assert all(row.count("|") == 6 for row in markdown(result)) and len(markdown(result)) == 6
    assert entries["ours", None, True]["times_faster"] == 1 and not result["skipped"]
    SUITE.print_report(result, Console(width=100))
    assert "grpo_fast, kept sets" in capsys.readouterr().out
    assert SUITE.write_figure is not None
    SUITE.write_figure(result, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": ("0",)}, "size is '0'"),
        ({"sizes": ("V/2",)}, "size is 'V/2'"),
        ({"sizes": ("V/0",)}, "size is 'V/0'"),
        ({"sizes": ("many",)}, "size is 'many'"),
        ({"tokens": 12}, "tokens is 12"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeptSettings(**settings)
