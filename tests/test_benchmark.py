"""The benchmark: that its gate refuses wrong results, its arithmetic by hand, its files, its errors. Not its figures."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hang import HANG
from typer.testing import CliRunner

import grpo_fast as gf
from grpo_fast.benchmark.eager import CONFIG
from grpo_fast.benchmark.harness.gate import UnavailableError
from grpo_fast.benchmark.harness.suite import SCHEMA
from grpo_fast.benchmark.harness.worker import SharedMemory, aligned_bytes
from grpo_fast.benchmark.logits import implementations, overhead, report
from grpo_fast.benchmark.logits.cases import (
    IMPLEMENTATIONS,
    MALLOC_MODES,
    PASSES,
    LogitsCase,
    LogitsSettings,
    batch_bytes,
    expected_loss,
    fill,
    parse_shape,
    shared_batch,
    write_truth,
)
from grpo_fast.benchmark.logits.implementations import Implementation, Outputs, compare_with_truth, make, tolerance
from grpo_fast.benchmark.logits.suite import needed_memory, repetition
from grpo_fast.cli.bench import app

pytestmark = pytest.mark.skipif(not gf.backends()["cpu"].usable, reason="the C++ backend, which is measured, is not usable here")
ROOT = Path(__file__).parents[1]
TINY = LogitsCase(16, 301, "float32")
READABLE = ("eager", "ours", "ours_inplace", "trl")
RUN = ["--quick", "--shape", "16x301", "--dtype", "bfloat16"]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Not here: the mode would also be in force for what is timed."""


def batch_of(case, active_fraction=1.0):
    memory = SharedMemory.create(batch_bytes(case))
    batch = shared_batch(memory, case)
    fill(batch, temperature=0.9, active_fraction=active_fraction, seed=3)
    write_truth(batch, 0.9)
    return batch


def result_of(name, step, batch, entropy=False):
    try:
        implementation = make(name, temperature=0.9, entropy=entropy, threads=1)
    except UnavailableError as error:
        pytest.skip(str(error))
    return implementation, repetition(implementation, step, batch, torch.empty_like(batch.logits), 1).result


# The gate ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", READABLE)
def test_the_gate_accepts_every_implementation_and_rejects_zeroed_and_doubled_gradients(name, dtype):
    batch = batch_of(LogitsCase(16, 301, dtype))
    implementation, right = result_of(name, "forward_backward", batch)
    allowed = tolerance(batch.logits.dtype, implementation.arithmetic)

    def passes(**changed):
        return compare_with_truth(right._replace(**changed), batch, expected_loss(batch), allowed).passed

    assert passes()
    assert not passes(gradient=torch.zeros_like(right.gradient))
    assert not passes(gradient=right.gradient * 2)
    assert not passes(gradient=-right.gradient)
    assert not passes(gradient=torch.full_like(right.gradient, torch.nan))
    assert not passes(loss=right.loss + 0.1)
    assert not passes(loss=right.loss * torch.nan)
    if implementation.forward is not None:
        _, scored = result_of(name, "forward", batch)
        assert compare_with_truth(scored, batch, 0.0, allowed).passed
        assert not compare_with_truth(scored._replace(logprobs=scored.logprobs + 0.2), batch, 0.0, allowed).passed


def test_one_wrong_row_is_enough():
    batch = batch_of(TINY)
    _, right = result_of("ours", "forward_backward", batch)
    wrong = right.gradient.clone()
    row = int(batch.true_gradient.norm(dim=-1).argmax())
    wrong.flatten(0, 1)[batch.gate_rows[row]] *= 2
    assert not compare_with_truth(right._replace(gradient=wrong), batch, expected_loss(batch), tolerance(torch.float32, "float32")).passed


def test_the_entropy_is_compared_where_it_is_computed():
    batch = batch_of(TINY)
    for name in ("eager", "ours"):
        _, scored = result_of(name, "forward", batch, entropy=True)
        verdict = compare_with_truth(scored, batch, 0.0, tolerance(torch.float32, "float32"))
        assert verdict.passed and verdict.errors["entropy"] is not None
        wrong = compare_with_truth(scored._replace(entropy=scored.entropy + 0.01), batch, 0.0, tolerance(torch.float32, "float32"))
        assert not wrong.passed


# The data ---------------------------------------------------------------------------------------------------------------------------------


def test_the_batch_carries_a_signal():
    batch = batch_of(LogitsCase(512, 97, "float32"), active_fraction=0.75)
    ratio = (batch.true_logprobs - batch.old_logprobs).exp()[batch.mask]
    low, high = 1 - CONFIG.epsilon_low, 1 + CONFIG.epsilon_high
    for share in ((ratio < low), (ratio > high), (ratio > low) & (ratio < high)):
        assert share.double().mean() > 0.15
    assert int(batch.mask.sum()) == 384
    assert (batch.advantages > 0).any() and (batch.advantages < 0).any()
    assert (batch.true_logprobs > -0.2).any() and (batch.true_logprobs < -5).any()


def test_truth_is_the_reference():
    batch = batch_of(TINY, active_fraction=0.5)
    leaf = batch.logits.double().requires_grad_()
    options = {"config": CONFIG, "old_logprobs": batch.old_logprobs.double(), "mask": batch.mask, "temperature": 0.9}
    loss = gf.grpo_loss(leaf, batch.token_ids, batch.advantages.double(), **options).loss
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert expected_loss(batch) == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(batch.true_gradient, gradient.flatten(0, 1)[batch.gate_rows], rtol=1e-9, atol=1e-15)


def test_seeds_decide_the_data():
    first, same = batch_of(TINY), batch_of(TINY)
    assert torch.equal(first.logits, same.logits)
    fill(same, temperature=0.9, active_fraction=1.0, seed=4)
    assert not torch.equal(first.logits, same.logits)


def test_both_processes_of_a_shared_memory_see_the_same():
    memory = SharedMemory.create(aligned_bytes([5], torch.int64) + aligned_bytes([3], torch.bool))
    memory.allocate([5], torch.int64).copy_(torch.arange(5))
    other = SharedMemory(memory.descriptor, memory.size)
    assert other.allocate([5], torch.int64).tolist() == [0, 1, 2, 3, 4]
    assert other.position % 4096 == 0


# The arithmetic, by hand ------------------------------------------------------------------------------------------------------------------


def test_useful_bytes():
    assert LogitsCase(2048, 32000, "float32").useful_bytes("forward") == 2048 * 32000 * 4 == 262_144_000
    assert LogitsCase(2048, 32000, "float32").useful_bytes("forward_backward") == 524_288_000
    assert LogitsCase(512, 152064, "bfloat16").useful_bytes("forward") == 155_713_536
    assert LogitsCase(512, 152064, "bfloat16").useful_bytes("forward_backward") == 311_427_072


def entry(implementation, times, peak=None):
    where = {"malloc": "default", "case": "2x4 float32", "step": "forward", "implementation": implementation}
    return {**where, "logits_bytes": 32, "useful_bytes": 3_000_000, "peak_bytes": peak, "wall_ms": times, "cpu_ms": times}


def test_summary():
    roofline, ours, eager = report.summarise(
        [entry("roofline", [2.0]), entry("ours", [4.0, 3.0, 8.0], 32), entry("eager", [20, 24], 80)], threads=1
    )
    assert ours["summary"] == {
        "median_ms": 4.0,
        "min_ms": 3.0,
        "iqr_ms": 2.5,  # quartiles of 3, 4, 8: 3.5 and 6
        "wall_median_ms": 4.0,
        "gigabytes_per_second": 0.75,  # 3 MB in 4 ms
        "times_roofline": 2.0,
        "times_ours": 1.0,
        "peak_extra_logits": 1.0,
    }
    assert eager["summary"]["times_ours"] == 5.5 and eager["summary"]["peak_extra_logits"] == 2.5
    assert roofline["summary"]["iqr_ms"] == 0 and roofline["summary"]["peak_extra_logits"] is None


def test_one_thread_is_timed_by_its_cpu_time_and_several_by_the_wall():
    assert report.clock(1) == "cpu_ms" and report.clock(2) == "wall_ms"
    batch = batch_of(TINY)
    ours = make("ours", temperature=0.9, entropy=False, threads=1)
    flush = torch.zeros(1, dtype=torch.int64)
    measured = repetition(ours, "forward_backward", batch, torch.empty_like(batch.logits), 2, flush=flush)
    assert (
        measured.cpu_ms is None
        and measured.wall_ms > 0
        and measured.result.gradient is not None
        and measured.result.gradient.abs().sum() > 0
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_what_came_on_top():
    batch, size = batch_of(TINY), 64 << 20

    def step(_):
        torch.zeros(size // 4)  # and gone again
        return Outputs()

    measured = repetition(Implementation("", step, step), "forward", batch, torch.empty_like(batch.logits), 1)
    if measured.peak_bytes is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 0.98 * size < measured.peak_bytes < 1.2 * size  # the system counts in portions of 64 pages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_way_to_the_roofline_touches_every_logit(dtype):
    """A read that ends early, or of too few bytes, would be no roofline."""
    source = torch.randn(3 * 50_001).to(getattr(torch, dtype))
    for way in implementations._WAYS["forward_backward"]:
        target = torch.zeros_like(source)
        way(source, target)
        assert torch.equal(target, source)
    implementations._copy_into_the_cache(source, target)
    seen, size = implementations._CACHED.raw, source.numel() * source.element_size()
    assert seen[: size % len(seen)] == bytes(source.view(torch.uint8).tolist())[size - size % len(seen) :]
    words = source.numel() * source.element_size() // 8 * 8 // source.element_size()
    assert implementations._sum_of_words(source, target) == source[:words].view(torch.int64).sum() and source.numel() - words < 4


def test_overhead_adds_up():
    out = overhead.measure_overhead(blocks=3, calls=3)
    split = out["split_of_forward_backward"]
    assert set(split) == {"checks", "weights", "operator", "autograd", "rest"}
    assert sum(split.values()) == pytest.approx(out["microseconds"]["forward_backward"])
    assert split["operator"] > 0 and split["checks"] > 0


# The command ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One quick run, by the command that a user types, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "grpo_fast.cli", "bench", *RUN, "--output", str(folder / "new" / "tiny.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "new", done.stdout


def test_a_quick_run_ends_with_files_and_tables(measured):
    folder, text = measured
    assert "grpo_fast" in text and "x roofline" in text and "[8, 100]" in text
    names = sorted(path.name for path in folder.iterdir())
    pytest.importorskip("matplotlib")
    assert names == ["tiny.json", "tiny.png"]  # and no partial file
    assert (folder / "tiny.png").read_bytes().startswith(b"\x89PNG")


def test_the_json_says_everything(measured):
    result = json.loads((measured[0] / "tiny.json").read_text())
    fields = {"schema", "date", "seconds", "machine", "load_average", "settings", "results", "gates", "skipped", "overhead"}
    assert set(result) == fields and result["schema"] == SCHEMA and result["skipped"] == []
    machine = {"cpu", "logical_cpus", "isa", "torch_isa", "largest_cache_bytes", "memory_bytes", "huge_pages", "kernel", "libc"}
    assert set(result["machine"]) == machine | {"python", "torch", "trl", "grpo_fast", "commit"}
    assert result["machine"]["commit"] is None or re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", result["machine"]["commit"])
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["grpo_fast"] == gf.__version__
    assert {"threads", "temperature", "clock", "flush_bytes", "equal_work", "entropy", "seed"} <= set(result["settings"])
    assert result["settings"]["threads"] == 1 and result["settings"]["equal_work"]

    seen = {(entry["malloc"], entry["step"], entry["implementation"]) for entry in result["results"]}
    expected = {(malloc, step, name) for malloc in MALLOC_MODES for step in PASSES for name in ("roofline", "ours", "eager")}
    assert seen == expected | {(malloc, "forward_backward", "ours_inplace") for malloc in MALLOC_MODES}
    for entry in result["results"]:
        assert len(entry["wall_ms"]) == len(entry["cpu_ms"]) == result["settings"]["rounds"] == 2
        assert min(entry["wall_ms"]) > 0 and entry["useful_bytes"] == 16 * 301 * 2 * (1 if entry["step"] == "forward" else 2)
        assert (entry["peak_bytes"] is None) or entry["malloc"] == "default"
    for verdict in result["gates"]:
        assert verdict["passed"]
        if verdict["implementation"] != "roofline":
            assert verdict["logprobs"] is not None or (verdict["loss"] is not None and verdict["gradient"] is not None)


def test_a_plot_from_a_file(measured, tmp_path):
    pytest.importorskip("matplotlib")
    copies = [tmp_path / "one.json", tmp_path / "two.json"]
    for copy in copies:
        copy.write_text((measured[0] / "tiny.json").read_text())
    done = CliRunner().invoke(app, ["--plot", *map(str, copies)])
    assert done.exit_code == 0, done.output
    assert all(copy.with_suffix(".png").read_bytes().startswith(b"\x89PNG") for copy in copies)


def test_a_wrong_implementation_gets_no_number_and_the_command_fails(monkeypatch, tmp_path):
    """Children that double every gradient: they inherit the environment, and Python runs the sitecustomize that it finds."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if '--multiprocessing-fork' in sys.orig_argv:\n"
        "    import torch\n"
        "    honest = torch.autograd.grad\n"
        "    torch.autograd.grad = lambda *args: tuple(x * 2 for x in honest(*args))\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    output = tmp_path / "red.json"
    done = CliRunner().invoke(app, [*RUN, "--malloc", "default", "--output", str(output)])
    assert done.exit_code == 1, done.output
    result = json.loads(output.read_text())
    timed = {(entry["implementation"], entry["step"]) for entry in result["results"]}
    assert timed == {("roofline", "forward"), ("roofline", "forward_backward"), ("ours", "forward"), ("eager", "forward")}
    left_out = {(entry["implementation"], entry["step"]) for entry in result["skipped"]}
    assert left_out == {(name, "forward_backward") for name in ("ours", "ours_inplace", "eager")}
    assert all("differs from float64" in entry["reason"] for entry in result["skipped"])
    assert "Left out" in done.output


BAD = {
    "shape": (["--shape", "2048*32000"], "ROWSxVOCABULARY"),
    "shape of one token": (["--shape", "4x1"], "at least one row"),
    "dtype": (["--dtype", "float8"], "one of float32"),
    "implementation": (["--implementation", "roofline", "--implementation", "llama"], "one of roofline"),
    "implementation without the roofline": (["--implementation", "ours"], "'roofline' among them"),
    "implementation twice": (["--implementation", "roofline", "--implementation", "roofline"], "each name once"),
    "malloc": (["--malloc", "jemalloc"], "one of default"),
    "temperature": (["--temperature", "0"], "a finite number > 0"),
    "threads": (["--threads", "0"], "at least 1"),
    "rounds": (["--rounds", "0"], "at least 1"),
    "active_fraction": (["--active-fraction", "1.5"], "a share > 0"),
    "device": (["--device", "cuda"], "'cpu'"),
    "output": (["--output", "{folder}/result.txt"], "a .json file"),
    "output below a file": (["--output", "{folder}/file/result.json"], "a place to write to"),
    "shapes": (["--shape", "100000000x100000"], "GiB are free"),
    "FILES": (["result.json"], "none without --plot"),
    "FILES missing": (["--plot"], "the JSON files to draw"),
    "file": (["--plot", "{folder}/none.json"], "cannot be read"),
    "file of another kind": (["--plot", "{folder}/other.json"], "schema"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "other.json").write_text('{"schema": 0}')
    before = sorted(path.name for path in tmp_path.rglob("*"))
    arguments, expected = BAD[name]
    if name == "shapes" and not Path("/proc/meminfo").exists():
        pytest.skip("this system does not say how much memory is free")
    done = CliRunner().invoke(app, [argument.format(folder=tmp_path) for argument in arguments], env={"COLUMNS": "1000"})
    text = " ".join(done.output.split())
    assert done.exit_code == 2, done.output
    assert name.split()[0] in text and expected in text
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_settings():
    assert parse_shape(" 512x152064 ") == (512, 152064)
    assert LogitsCase(2048, 32000, "float32").batch == (8, 256) and LogitsCase(15, 10, "float32").batch == (1, 15)
    assert LogitsSettings().processes == [(name,) for name in IMPLEMENTATIONS]
    assert LogitsSettings(isolated=False).processes == [IMPLEMENTATIONS]
    assert needed_memory(LogitsSettings(malloc=("default",))) < needed_memory(LogitsSettings())
    assert needed_memory(replace(LogitsSettings(), shapes=((8, 100),))) < needed_memory(LogitsSettings())
    assert callable(app)
