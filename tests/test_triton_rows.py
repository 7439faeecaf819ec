"""Single rows by the Triton kernels on a GPU: the tests of row_cases.py, which Triton's interpreter runs too (triton_interpreter.py)."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from launches import small_blocks
from row_cases import *  # noqa: F403

import grpo_fast as gf

pytestmark = pytest.mark.gpu

BLOCK = 1024  # as many columns as four warps load 8 at a time: small, so that a small vocabulary has plain blocks


@pytest.fixture(autouse=True)
def by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    status = gf.backends()["triton"]
    assert status.usable, status.why
    small_blocks(monkeypatch, BLOCK)


@pytest.fixture
def device() -> str:
    return "cuda"
