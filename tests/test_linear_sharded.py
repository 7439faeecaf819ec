"""The fused head under FSDP2 and DistributedDataParallel: two processes have the mean of the gradients that each would have alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compare import labelled
from ranks import run_ranks

CHILD = Path(__file__).with_name("linear_sharded_ranks.py")
PROCESSES = 2


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each process has found."""
    return run_ranks(CHILD, PROCESSES)


@pytest.mark.parametrize("wrapper", ["fsdp True", "fsdp False", "ddp True", "ddp False"])
@pytest.mark.parametrize("by", ["loss", "logprobs"])
@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
def test_gradients_are_the_mean_over_processes(kind: str, by: str, wrapper: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        expected, found = rank[f"{kind} {by}"], rank[f"{kind} {by} {wrapper}"]
        assert found.keys() == expected.keys()
        largest = max(x.abs().max().item() for x in expected.values())
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5 * largest, msg=labelled(name))
    first, second = (rank[f"{kind} {by} {wrapper}"] for rank in ranks)
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_a_weight_that_is_divided(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        torch.testing.assert_close(rank["one weight"]["found"], rank["one weight"]["expected"])
