"""bench/gpu.sh and bench/gpu_bench.py on tiny CPU shapes: everything of them but CUDA events."""

from __future__ import annotations

import ast
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import xml.etree.ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from grpo_fast.cli import bench as cli

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu_bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu_bench")


@pytest.fixture
def few(gpu_bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module without the other libraries, which take seconds to import."""
    monkeypatch.setattr(gpu_bench, "imported", lambda module, name: None)
    return gpu_bench


@pytest.fixture
def measure(gpu_bench: ModuleType) -> ModuleType:
    return importlib.import_module("gpu_measure")


def run(module: ModuleType, part: str, output: Path, shapes: list[Any], budget: float = 1e9) -> dict[str, Any]:
    results = module.Results(output, part, "cpu")
    deadline = module.time.monotonic() + budget
    getattr(module, part)(shapes, module.Timer("cpu", 3), "cpu", deadline, results)
    return json.loads(output.read_text())


def test_all_parts_write_one_file_and_a_failure_loses_nothing(few: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    run(few, "bench", output, [(20, 101)])
    run(few, "cluster", output, [(20, 101)])
    result = run(few, "head", output, [(8, 0, 50), (40, 16, 50)])
    assert [(entry["name"], "expected an NVIDIA GPU" in entry.get("error", "")) for entry in result["cluster"]] == [
        ("copy", False),
        ("ours_cluster", True),
        ("ours_cluster_inplace", True),
    ]
    assert result["kind"] == "gpu"
    by_step: dict[str, dict[str, Any]] = {}
    for entry in result["bench"]:
        by_step.setdefault(entry["step"], {})[entry["name"]] = entry
    assert {step: set(names) for step, names in by_step.items()} == {
        "loss": {"copy", "ours", "ours_inplace", "eager"},
        "logprobs": {"eager"},
        "logprobs+entropy": {"ours", "eager"},
    }
    assert all("error" not in entry and entry["ms"] > 0 and len(entry["clocks"]) == 2 for entry in result["bench"]), result["bench"]
    assert all(entry["error_of_allowed"] <= 1 for entry in result["bench"] if entry["name"] != "copy")
    assert "error" in result["head"][0]
    assert result["head"][1]["share_of_roofline"] > 0 and result["head"][1]["error_of_allowed"] <= 1
    kept = {(entry["name"], entry["size"], entry["trainable"]): entry for entry in result["head"][2:]}
    both = (False, True)
    assert kept.keys() == {(name, size, t) for name in ("kept", "gather", "ours") for size in ("1", "8", "top-p") for t in both} | {
        (name, size, t) for name in ("apart", "chunks") for size in ("V/16", "V/32") for t in both
    }
    assert all("error" not in entry and entry["ms"] > 0 and entry["times_faster"] > 0 for entry in kept.values())
    assert {name for (name, _, _), entry in kept.items() if entry["question"] == "whole vocabulary"} == {"ours"}


def test_the_command(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command: list[Any] = [
        sys.executable,
        ROOT / "bench" / "gpu_bench.py",
        "bench",
        "--output",
        output,
        "--device",
        "cpu",
        "--shape",
        "3x33",
    ]
    done = subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "BUDGET_S": "0"}, capture_output=True, text=True)
    assert "the time budget is spent" in done.stdout
    assert all("skipped" in entry for entry in json.loads(output.read_text())["bench"])


def test_what_was_measured_is_in_the_file_before_the_next_case(few: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stops during the run: a BaseException that is no Exception."""

    def lost(*arguments: Any) -> None:
        raise KeyboardInterrupt

    implementations = few.loss_implementations

    def then_lost(device: str, rows: int) -> Any:
        first, *_ = implementations(device, rows)
        return [first, few.Implementation("lost", lost, 0)]

    monkeypatch.setattr(few, "loss_implementations", then_lost)
    output = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        run(few, "bench", output, [(5, 50)])
    assert [entry["name"] for entry in json.loads(output.read_text())["bench"]] == ["copy", "ours"]
    assert list(tmp_path.iterdir()) == [output]


def test_summary_shows_each_measurement_beside_its_target(few: ModuleType) -> None:
    def entry(step: str, name: str, rows: int, **measured: float) -> dict[str, Any]:
        return {"step": step, "name": name, "rows": rows, "vocabulary": 128256, **measured}

    whole = {
        "bench": [
            entry("logprobs", "ours", 4096, ms=1.0, times_read=1.25),
            entry("logprobs", "ours", 16384, ms=4.0, times_read=1.0),
            entry("logprobs", "ours", 256, ms=1.0, times_read=9.0),  # too few bytes to speak of bandwidth
            entry("loss", "ours_cluster", 4096, ms=9.0, times_copy=9.0),  # of an older form of the file
        ],
        "cluster": [
            entry("loss", "ours_cluster", 4096, ms=2.0, times_copy=1.25),
            entry("loss", "liger", 4096, ms=2.5, times_copy=1.875),  # at slower clocks
            {**entry("loss", "liger", 16384), "error": "made up"},
        ],
    }
    assert few.against_targets(whole).splitlines() == [
        "ours, logprobs, of copy bandwidth, asked 0.93: 0.80 (4096 x 128256), 1.00 (16384 x 128256)",
        "ours, logprobs+entropy, of copy bandwidth, asked 0.90: not measured",
        "ours, gradient, of copy bandwidth, asked 0.93: not measured",
        "ours_cluster, loss, of copy bandwidth, asked 0.85: 0.80 (4096 x 128256)",
        "ours_cluster over liger, loss and gradient, asked 1.34: 1.50 (4096 x 128256)",
    ]


def test_a_lost_device_ends_its_part_and_loses_nothing_else(few: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every call raises, also those that ask for memory: the file is whole and says which case it was."""
    lost = [False]

    def broken(*_: Any) -> Any:
        if lost[0]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return (2**40, 2**40)

    def breaks(*_: Any) -> None:
        lost[0] = True
        broken()

    for name in ("empty_cache", "synchronize", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, broken)
    results = few.Results(tmp_path / "gpu.json", "cluster", "cpu")
    shape = few.make_shape(5, 50, few.Timer("cpu", 3), "cpu", math.inf, results)
    few.add("loss", few.Implementation("good", few.eager, 1), shape, few.Timer("cpu", 3), "cuda", math.inf, results)
    with pytest.raises(Exception, match=r"the device is lost to this process.*illegal memory access"):
        few.add("loss", few.Implementation("bad", breaks, 1), shape, few.Timer("cpu", 3), "cuda", math.inf, results)
    entries = json.loads((tmp_path / "gpu.json").read_text())["cluster"]
    assert [(entry["name"], "illegal" in entry.get("error", "")) for entry in entries] == [("copy", False), ("good", False), ("bad", True)]
    assert "illegal" in few.run_case({}, dict, 0, "cuda", math.inf)["error"]


def test_what_another_machine_measured_is_set_aside(
    few: ModuleType, measure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "gpu.json"
    run(few, "bench", output, [(3, 33)])
    measure.Results(output, "head", "cpu").add({"name": "ours_head"})
    kept = json.loads(output.read_text())
    assert kept["bench"] and kept["head"]
    kept["machine"]["device"] = "Another Card 80GB"
    output.write_text(json.dumps(kept))
    monkeypatch.setenv("GRPO_FAST_SOURCES", "abc")
    measure.Results(output, "head", "cpu").add({"name": "ours_head"})
    found = json.loads(output.read_text())
    assert "bench" not in found and found["built_from"] == {"head": "abc"}
    assert json.loads((tmp_path / "gpu_another_card_80gb.json").read_text()) == kept
    monkeypatch.setenv("GRPO_FAST_SOURCES", "def")
    measure.Results(output, "bench", "cpu").add({"name": "ours"})
    assert json.loads(output.read_text())["built_from"] == {"head": "abc", "bench": "def"}


def test_why_a_library_is_missing_is_told(
    gpu_bench: ModuleType, measure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "NOT_IMPORTED", {})
    assert measure.imported("json", "loads") is json.loads
    assert measure.imported("no_such_library.here", "f") is None and measure.imported("json", "no_such_name") is None
    results = measure.Results(tmp_path / "gpu.json", "bench", "cpu")
    results.add({"name": "ours"})
    told = json.loads((tmp_path / "gpu.json").read_text())["not_imported"]
    assert "ModuleNotFoundError" in told["no_such_library.here"] and "AttributeError" in told["json"]
    measure.NOT_IMPORTED.clear()
    measure.Results(tmp_path / "gpu.json", "head", "cpu").add({"name": "ours_head"})
    assert json.loads((tmp_path / "gpu.json").read_text())["not_imported"] == told  # another part's process has found nothing missing


def test_two_are_timed_repetition_by_repetition(few: ModuleType) -> None:
    done: list[str] = []
    found = few.Timer("cpu", 5).in_turn((lambda _: done.append("a"), lambda: None), (lambda _: done.append("b"), lambda: None))
    assert len(found) == 2 and all(each["repetitions"] == 5 for each in found)
    assert done == ["a", "a", "b", "b", *["a", "b"] * 6]


def test_the_timer_on_a_gpu(few: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins: the device is busy while the call is enqueued, caches are cold, and nothing but the call lies between the events."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return float(len(done))

    timer = few.Timer("cpu", 3)
    timer.device = "cuda"
    monkeypatch.setattr(timer, "flush", type("Flush", (), {"zero_": lambda self: done.append("flush")})())
    monkeypatch.setattr(timer, "clean", type("Clean", (), {"sum": lambda self: done.append("read")})())
    stand_ins: dict[str, Any] = {
        "Event": Event,
        "_sleep": lambda cycles: done.append("sleep"),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 350,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    found = timer(lambda given: done.append("call"), lambda: done.append("prepare"))
    assert done[:6] == ["prepare", "call"] * 3 and found["peak_bytes"] == 250
    assert done[6:15] == ["prepare", "sleep", "flush", "read", "event", "call", "event", "wait", "prepare"]
    assert found["repetitions"] == 3 and found["ms"] == len(done) - 8  # the median of the last three, 8 steps apart


def test_a_gpu_machine_is_described(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"name": "a GPU", "total_memory": 80, "multi_processor_count": 132})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    found = measure.machine("cuda")
    assert (found["device"], found["bytes"], found["multiprocessors"]) == ("a GPU", 80, 132) and found["versions"]["torch"]
    assert measure.clocks() is None or set(measure.clocks()) == {"mhz", "celsius", "watts"}
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: 1980)
    monkeypatch.setattr(torch.cuda, "temperature", lambda: 40)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda: 350_000)
    assert measure.clocks() == {"mhz": 1980, "celsius": 40, "watts": 350.0}


def test_memory_is_counted_beforehand(few: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * 2**30, 140 * 2**30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    tried: list[int] = []

    def work() -> dict[str, float]:
        tried.append(1)
        return {"ms": 1.0}

    assert "91 GiB of the 90 GiB" in few.run_case({}, work, 91 * 2**30, "cuda", 1e18)["skipped"] and not tried
    assert few.run_case({}, work, 89 * 2**30, "cuda", 1e18)["ms"] == 1.0


@pytest.mark.parametrize("wrong", ["zeroed", "doubled", "without the others", "nan", "another row"])
def test_the_gate_refuses_a_wrong_gradient(wrong: str, few: ModuleType) -> None:
    lenient = importlib.import_module("gpu_gate").LENIENT
    given = few.case(30, 2000, "cpu")
    truth, ids = given.truth()[0], given.ids[0, given.sample()]
    found = truth.bfloat16()
    assert few.check_gradient(found, truth, ids) <= 1
    if wrong == "zeroed":
        found = found * 0
    elif wrong == "doubled":
        found = found * 2
    elif wrong == "without the others":
        found = found.scatter(1, ids[:, None], 0) * 0 + torch.zeros_like(found).scatter(1, ids[:, None], found.gather(1, ids[:, None]))
    elif wrong == "nan":
        found[3, 7] = float("nan")
    else:
        found = found.roll(1, 0)
    worst = few.check_gradient(found, truth, ids)
    assert worst > lenient
    with pytest.raises(ValueError, match="wrong: off by"):
        few.gate_fields(worst, "eager")


def test_the_heads_gate_refuses_wrong_gradients(few: ModuleType) -> None:
    x, w, ids = torch.randn(40, 32).bfloat16(), (torch.randn(300, 32) / 32**0.5).bfloat16(), torch.randint(300, (40,))
    exact = [t.double().requires_grad_() for t in (x, w)]
    torch.nn.functional.cross_entropy(exact[0] @ exact[1].t(), ids).backward()
    dx, dw = (t.grad.bfloat16() for t in exact if t.grad is not None)
    assert few.head_truth(x, w, ids, dx, dw) <= 1
    for bad in ((dx * 0, dw), (dx, dw * 0), (dx * 2, dw), (dx, dw * 2), (dx, dw * float("nan"))):
        assert few.head_truth(x, w, ids, *bad) > 1


def test_the_figure_of_a_made_up_result(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    entries: list[dict[str, Any]] = [
        {"step": "loss", "rows": 4, "vocabulary": v, "name": n, "times_copy": t, "less_precise": n == "eager"}
        for v in (10, 20)
        for n, t in (("ours", 1.5), ("eager", 9.0))
    ]
    entries.append({"step": "loss", "rows": 4, "vocabulary": 20, "name": "liger", "error": "made up"})
    entries.append({"step": "gradient", "rows": 4, "vocabulary": 20, "name": "ours", "times_copy": 1.0})
    source = tmp_path / "fixture.json"
    source.write_text(json.dumps({"kind": "gpu", "machine": {"device": "a test fixture, not a measurement"}, "bench": entries}))
    done = CliRunner().invoke(cli.app, ["--plot", str(source)])
    assert done.exit_code == 0, done.output
    assert source.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


# ---- the script


def bare_environment(folder: Path) -> Path:
    """The python of an environment that has the packages of this one, and not this package as it is installed here."""
    venv.create(folder, symlinks=True)
    packages = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(torch.__file__).parents[1]))
    own = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(folder), "platbase": str(folder)}))
    (own / "packages.pth").write_text("\n".join(dict.fromkeys(packages)))
    return folder / "bin" / "python"


def marks_gpu(path: Path) -> bool:
    """Whether the file has ``mark.gpu`` in its code, not in a string or a comment."""
    return any(
        isinstance(node, ast.Attribute) and node.attr == "gpu" and isinstance(node.value, ast.Attribute) and node.value.attr == "mark"
        for node in ast.walk(ast.parse(path.read_text()))
    )


@pytest.mark.sweep
@pytest.mark.skipif(sys.platform != "linux", reason="a shell script for machines with a GPU")
def test_the_script_in_a_bare_checkout(tmp_path: Path) -> None:
    """From a checkout that is not installed: it is built, every GPU test is found, and both parts are measured."""
    checkout, out = tmp_path / "checkout", tmp_path / "out"
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "results")
    for name in ("csrc", "grpo_fast", "kernels", "tests", "bench", "tools"):
        shutil.copytree(ROOT / name, checkout / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, checkout / name)
    settings = {
        "PYTHON": str(bare_environment(tmp_path / "environment")),
        "OUT": str(out),
        "DEVICE": "cpu",
        "WORKERS": "1",
        "BUDGET_S": "200",
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "TRITON", "GRPO_FAST"))}
    command: list[Any] = ["bash", checkout / "bench" / "gpu.sh", "build", "smoke", "test", "bench", "head", "profile", "tune"]
    done = subprocess.run(
        command, env={**clean, **settings, "GRPO_FAST_BUILD": "none"}, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.findall(r"^(\w+.*): exit 0 after", (out / "parts.log").read_text(), re.M) == [
        "build",
        "measure smoke",
        "measure smoke_cluster",
        "tests",
        "measure bench",
        "measure cluster",
        "measure head",
        "measure profile",
        "measure tune",
    ]

    assert {path.name for path in out.iterdir()} == {"logs.tar.gz", "parts.log", "rehearsal.json", "test.xml"}
    again = subprocess.run([*command[:2], "smoke"], env={**clean, **settings}, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "smoke_cluster: done before" in again.stdout

    result = json.loads((out / "rehearsal.json").read_text())
    assert len(result["built_from"]["bench"]) > 60 and len(set(result["built_from"].values())) == 1
    assert {entry["name"] for entry in result["bench"]} >= {"copy", "ours", "eager"} and [entry["name"] for entry in result["head"]].count(
        "ours_head"
    ) == 1
    assert not [entry for part in ("bench", "head") for entry in result[part] if "error" in entry or "skipped" in entry]

    suite = next(xml.etree.ElementTree.parse(out / "test.xml").iter("testsuite"))
    assert suite.get("errors") == suite.get("failures") == "0" and int(suite.get("tests", 0)) > 250
    ran = {case.get("classname", "").split(".")[-1] for case in suite.iter("testcase")}
    marked = {path.stem for path in (ROOT / "tests").glob("test_*.py") if marks_gpu(path)}
    assert ran == marked and {"test_triton", "test_cluster", "test_group_advantages", "test_linear_gpu"} <= ran
    if torch.cuda.is_available():
        return
    assert suite.get("skipped") == suite.get("tests")
