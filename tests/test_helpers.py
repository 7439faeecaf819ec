"""What the tests for a GPU stand on, tried where there is none: a GPU that is lost, and the comparison of whole vocabularies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import apart, untouched_beside
from test_triton import sanitized, sanitizer
from torch import Tensor
from vocabulary_cases import assert_true, big, loss_and_gradient, with_options

HERE = Path(__file__).parent

# Six tests of a GPU whose kernels fail from the third one on, as they do after an illegal access: until the process is another. The last
# test uses no GPU.
LOST = """
import pathlib, pytest, torch

lost = []
once = pathlib.Path(__file__).with_suffix(".once")
torch.cuda.is_available = lambda: True

def synchronize():
    if lost:
        raise torch.AcceleratorError("an illegal memory access was encountered")

torch.cuda.synchronize = synchronize

@pytest.mark.parametrize("number", range(6))
@pytest.mark.gpu
def test_on_it(number):
    if number == 2 and not once.exists():
        once.touch()
        lost.append(number)

@pytest.mark.sweep
def test_elsewhere():
    assert lost or WORKERS
"""


def run_lost(folder: Path, workers: bool, *options: str) -> str:
    file = folder / "test_lost.py"
    file.write_text(LOST.replace("WORKERS", str(workers)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *sys.path])
    settings = ["-c", str(HERE.parent / "pyproject.toml"), "--rootdir", str(folder), "-p", "conftest", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-v", *settings, *options]
    done = subprocess.run([*command, str(file)], env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_worker_that_has_lost_its_gpu_is_replaced(tmp_path: Path) -> None:
    """And the test that lost it is named, with the error; the others pass."""
    pytest.importorskip("xdist")
    said = run_lost(tmp_path, True, "-n", "1", "--dist", "worksteal")
    assert "test_on_it[2]: the GPU is lost, and this worker with it: an illegal memory access was encountered" in said
    assert "crashed while running 'test_lost.py::test_on_it[2]'" in said, said
    assert "1 failed, 7 passed" in said, said  # it had passed before its kernels had finished


def test_without_workers_the_run_ends_with_its_report(tmp_path: Path) -> None:
    """The test that uses no GPU does not wait for one, and passes."""
    said = run_lost(tmp_path, False, "-p", "no:xdist")
    assert "the GPU is lost: an illegal memory access was encountered" in said
    assert "7 passed, 4 errors" in said and "ERROR at teardown of test_elsewhere" not in said, said


TOOL = """#!{python}
import os, subprocess, sys, time
arguments = sys.argv[1:]
program = arguments[arguments.index({python!r}):]
print(*arguments[:arguments.index({python!r})], "caching", os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"])
{what}
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A stand-in for compute-sanitizer, made of Python code; ``program`` is the command that it runs."""

    def install(what: str) -> None:
        file = tmp_path / "compute-sanitizer"
        file.write_text(TOOL.format(python=sys.executable, what=what))
        file.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return install


def test_what_a_sanitizer_finds(tool: Callable[[str], None]) -> None:
    tool("sys.exit(subprocess.call(program))")
    status, said = sanitizer("racecheck", "print('here')", "--num-cuda-barriers", "64")
    assert status == 0 and said.splitlines()[1:] == ["here", "computed"]
    options = "--tool racecheck --error-exitcode 9 --target-processes application-only --report-api-errors no"
    assert said.startswith(f"{options} --racecheck-detect-level error --num-cuda-barriers 64 caching 1")
    sanitized("memcheck", "print('here')")
    with pytest.raises(AssertionError, match="made up"):
        sanitized("memcheck", "raise SystemExit('made up')")
    tool("subprocess.call(program); sys.exit(9)")
    with pytest.raises(AssertionError, match="computed"):
        sanitized("memcheck", "")


def test_a_gpu_that_the_sanitizer_does_not_know(tool: Callable[[str], None]) -> None:
    tool("print('Error: Device not supported. Read on.'); sys.exit(1)")
    with pytest.raises(pytest.skip.Exception, match="Read on"):
        sanitized("memcheck", "")
    tool("print('not supported: an option'); sys.exit(1)")
    with pytest.raises(AssertionError, match="an option"):
        sanitized("memcheck", "")


def test_what_hangs_under_a_sanitizer_is_killed_with_its_child(
    tool: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_triton.SANITIZER_SECONDS", 5)
    tool("sys.exit(subprocess.call(program))")
    child = tmp_path / "child"
    with pytest.raises(pytest.fail.Exception, match="memcheck did not finish within 5 s"):
        sanitized("memcheck", f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # the child of a killed parent is reaped by another process, in its own time
            os.kill(int(child.read_text()), 0)
            if "State:\tZ" in Path(f"/proc/{child.read_text()}/status").read_text():
                raise ProcessLookupError
            time.sleep(0.1)


def test_what_is_written_beside_a_row_is_seen() -> None:
    for column in (0, 1, -2, -1):
        rows = apart(torch.zeros(2, 3, 5))
        assert untouched_beside(rows) and rows.shape == (2, 3, 5) and (rows == 0).all()
        rows.as_strided((2, 3, 8), rows.stride(), 0)[1, 1, [0, 6, 7][column % 3]] = 0
        assert not untouched_beside(rows)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_whole_vocabularies(elsewhere: bool, dtype: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the C++ kernels compute them; in pieces, with and without the entropy."""
    monkeypatch.setattr("vocabulary_cases.LOGITS_AT_ONCE", 2 * 5003)
    for entropy_coef in (0.1, 0.0):
        call = with_options(big(5, 5003, dtype, "cpu"), entropy_coef=entropy_coef, softcap=softcap)
        assert_true(call, *loss_and_gradient(call, elsewhere=elsewhere))


def doubled(gradient: Tensor) -> None:
    gradient *= 2


def without_a_block(gradient: Tensor) -> None:
    gradient[3, 4096:] = 0


def one_column(gradient: Tensor) -> None:
    gradient[3, 17] *= 1.01


def moved(gradient: Tensor) -> None:
    gradient.copy_(gradient.roll(1, -1))


@pytest.mark.parametrize("spoil", [doubled, without_a_block, one_column, moved])
def test_the_comparison_of_whole_vocabularies_rejects(spoil: Callable[[Tensor], None]) -> None:
    call = with_options(big(5, 5003, torch.bfloat16, "cpu"), entropy_coef=0.1, softcap=None)
    out, gradient = loss_and_gradient(call)
    assert_true(call, out, gradient)
    spoil(gradient)
    with pytest.raises(AssertionError, match="row"):
        assert_true(call, out, gradient)


def test_the_comparison_of_whole_vocabularies_rejects_other_statistics() -> None:
    call = with_options(big(5, 5003, torch.bfloat16, "cpu"), entropy_coef=0.1, softcap=None)
    out, gradient = loss_and_gradient(call)
    for wrong in (out._replace(logprobs=out.logprobs + 2e-5), out._replace(entropy=out.entropy - 3e-5), out._replace(loss=out.loss * 1.01)):
        with pytest.raises(AssertionError):
            assert_true(call, wrong, gradient)
