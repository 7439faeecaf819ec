"""bench/gpu_bench.py on tiny CPU shapes: everything of it but CUDA events."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_both_parts_write_one_file_and_a_failure_loses_nothing(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    tiny = ["--output", output, "--device", "cpu", "--repetitions", "3"]
    run = [sys.executable, ROOT / "bench" / "gpu_bench.py"]
    subprocess.run([*run, "bench", *tiny, "--shape", "20x101"], check=True, cwd=ROOT)
    subprocess.run([*run, "head", *tiny, "--shape", "8x0x50", "--shape", "8x16x50"], check=True, cwd=ROOT)
    result = json.loads(output.read_text())
    by_name = {entry["name"]: entry for entry in result["bench"]}
    assert set(by_name) == {"copy", "ours", "eager"}
    assert all("error" not in entry and entry["ms"] > 0 for entry in by_name.values()), by_name
    assert by_name["ours"]["gradient_error"] < 2e-2
    assert "error" in result["head"][0] and result["head"][1]["share_of_floor"] > 0


def test_the_figure_of_a_made_up_result(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    entries = [{"rows": 4, "vocabulary": v, "name": n, "times_copy": t} for v in (10, 20) for n, t in (("ours", 1.5), ("eager", 9.0))]
    entries.append({"rows": 4, "vocabulary": 20, "name": "liger", "error": "made up"})
    source = tmp_path / "fixture.json"
    source.write_text(json.dumps({"machine": {"device": "a test fixture, not a measurement"}, "bench": entries}))
    subprocess.run([sys.executable, ROOT / "bench" / "plot_gpu.py", source], check=True, cwd=ROOT)
    assert source.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
