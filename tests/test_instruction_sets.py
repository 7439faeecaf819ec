"""The numeric tests under the instruction sets of other processors than this one: of ATen, of oneDNN and of our own kernels.

Each library reads its environment variable once, so each run is a separate pytest process.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hang import HANG

HERE = Path(__file__).parent
HOURS = 6 * HANG  # more than a thousand tests in one process, on a machine that may be busy with something else
NUMERIC = (
    "test_grpo_loss",
    "test_linear",
    "test_linear_logprobs",
    "test_linear_loss",
    "test_group_advantages",
    "test_rows",
    "test_product",
)

AVX2, AVX512, AMX = torch.cpu._is_avx2_supported(), torch.cpu._is_avx512_supported(), torch.cpu._is_amx_tile_supported()
X86 = platform.machine() in ("x86_64", "AMD64")
SETS = {  # (variable, value): whether this machine can be one of that kind
    ("ATEN_CPU_CAPABILITY", "default"): True,
    ("ATEN_CPU_CAPABILITY", "avx2"): AVX2,
    ("ATEN_CPU_CAPABILITY", "avx512"): AVX512,
    ("ONEDNN_MAX_CPU_ISA", "AVX2"): AVX2,
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"): AVX512,
    ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX"): AMX,
    ("GRPO_FAST_ISA", "0"): X86,  # elsewhere there is no other
    ("GRPO_FAST_ISA", "1"): AVX2,
    ("GRPO_FAST_ISA", "2"): AVX512,
}
IN_FORCE = """
import torch
print("ATEN_CPU_CAPABILITY", torch.backends.cpu.get_cpu_capability().lower())
import grpo_fast as gf
print("GRPO_FAST_ISA", torch.ops.grpo_fast.cpu_isa() if gf.backends()["cpu"].usable else "none")
"""


def run(*command: str, variable: str, value: str) -> str:
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")} | {variable: value}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False, timeout=HOURS
    )
    assert done.returncode == 0, f"{variable}={value}\n{done.stdout[-6000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.sweep
@pytest.mark.timeout(2 * HOURS)
@pytest.mark.parametrize(("variable", "value"), SETS, ids=lambda text: text)
def test_the_numeric_tests(variable: str, value: str) -> None:
    if not SETS[variable, value]:
        pytest.skip(f"{variable}={value}: this processor ({platform.machine()}) does not have these instructions")
    in_force = dict(line.split() for line in run("-c", IN_FORCE, variable=variable, value=value).splitlines())
    if in_force["GRPO_FAST_ISA"] == "none" and variable == "GRPO_FAST_ISA":
        pytest.skip("the C++ kernels are not built")
    assert in_force.get(variable, value) == value  # of oneDNN nothing is to be had
    files = [str(HERE / f"{name}.py") for name in NUMERIC]
    chosen = ["-m", "not slow and not sweep and not gpu", "-k", "not other_instruction_sets"]
    said = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *files, variable=variable, value=value)
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) > 500, said[-2000:]
