"""What holds in every test: one thread, fixed seeds, no network, uninitialised memory is NaN, GPU tests skipped where there is no GPU, and
an error of one test on its GPU is reported for that test and no other."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too: as many of those run as there are cores
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each worker starts as many compiling processes as there are cores

import pytest
import torch

SEED = 1234
# Tests and checks that are not in a test's own file.
pytest.register_assert_rewrite("advantage_cases", "row_cases", "study_cases", "support_cases", "vocabulary_cases")


def pytest_configure(config: pytest.Config) -> None:
    # Small tensors: a second thread costs more than it gives, up to forty times on a shared machine. Tests of parallel code set their own.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "slow" not in item.keywords)  # first: a long test that starts last keeps one worker busy, and no other
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def the_gpu_is_left_working(request: pytest.FixtureRequest) -> Iterator[None]:
    """Waits for the kernels of a test when it ends, so that an error of theirs is reported for this test.

    After an illegal access every call of the process fails with the same message, so a worker of pytest-xdist goes with it: xdist names the
    test and starts another worker. A run without workers continues, so that it can write its report.
    """
    yield
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.fail(f"the GPU is lost: {error}", pytrace=False)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            sys.stderr.write(f"\n{request.node.nodeid}: the GPU is lost, and this worker with it: {error}\n")
            sys.stderr.flush()
        os._exit(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test draws the same numbers, alone or among others."""
    random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator on the CPU, for tests that want their own stream."""
    return torch.Generator().manual_seed(SEED)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Memory that a kernel does not write is NaN (the largest value in an integer tensor), whether Python, ATen or our C++ allocates it.

    torch fills new tensors in this way in deterministic mode; ``warn_only``, since the tests do not need the errors of that mode.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # a module with a property, which its type does not have
    fill_before = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    deterministic.fill_uninitialized_memory = fill_before
