"""extreme_cases.py for the reference and the C++ kernels; Triton's interpreter runs it from triton_interpreter.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from extreme_cases import *  # noqa: F403

import grpo_fast as gf
from grpo_fast.ops import extension


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "cpu" and not extension.load():
        pytest.skip(f"the extension is not loaded: {extension.status().why}")
    with gf.use_backend(request.param):
        yield
