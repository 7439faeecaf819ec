"""A vocabulary divided among processes: what one process computes with all of it, and the same bits in all of them and from run to run.

Four are real processes. One and two are threads of this one, which merge the shards in the order of the ranks (rank_threads.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rank_threads import run_as_ranks
from ranks import run_ranks
from torch import Tensor
from vocab_parallel_ranks import IN_BFLOAT16, LARGEST_SHARE, V, cases, measured, results_of

from grpo_fast.head import kept

CHILD = Path(__file__).with_name("vocab_parallel_ranks.py")
SPLIT = ("weight", "bias", "adapter_weight", "logits")


@functools.cache
def ranks(processes: int) -> list[dict[str, Any]]:
    """What each process of a group has found."""
    if processes == 4:
        return run_ranks(CHILD, processes)
    return [{"results": results} for results in as_threads(processes, cases(), torch.float32)]


def as_threads(count: int, names: Iterable[str], dtype: torch.dtype, seed: int | None = None) -> list[dict[str, dict[str, Tensor]]]:
    """The same in one process, merged in the order of the ranks."""
    with mock.patch.dict(kept.LARGEST_SHARES, dict.fromkeys(kept.LARGEST_SHARES, LARGEST_SHARE)):
        return run_as_ranks(count, lambda rank, group: results_of(rank, group, names, dtype), seed=seed)


@functools.cache
def single(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In float64 and in float32, the vocabulary whole."""
    of = cases()[name]
    return measured(name, of, slice(None), None, torch.float64), measured(name, of, slice(None), None, torch.float32)


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_values_and_gradients(processes: int, name: str) -> None:
    truth, alone = single(name)
    found = [rank["results"][name] for rank in ranks(processes)]
    assert all(results.keys() == truth.keys() for results in found)
    for key, exact in truth.items():
        if key == "m.recomputed_fraction":
            continue
        parts = [results[key] for results in found]
        if key.rsplit(".", 1)[-1] in SPLIT:
            actual = torch.cat(parts)
        else:
            actual = parts[0]
            assert all(torch.equal(actual, other) for other in parts[1:]), f"{key} differs between the processes"
        scale = max(exact.abs().max().item(), 1.0 if key.startswith("m.") else 0.0)
        error, allowed = (actual.double() - exact).abs().max().item(), (alone[key].double() - exact).abs().max().item()
        assert scale > 0 or key.startswith("m.") or "loss" in key, f"{key} has no signal"
        assert error <= 2 * allowed + 2.0**-18 * scale + 1e-9, f"{key}: error {error:.3e} of {scale:.3e}; one process has {allowed:.3e}"


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_almost_certain_tokens_keep_their_digits(processes: int) -> None:
    """1 - p to a relative accuracy, wherever the token's weight lies."""
    truth, _ = single("token")
    exact, actual = truth["trainable.logprobs"], ranks(processes)[0]["results"]["token"]["trainable.logprobs"].double()
    sure = (exact < 0) & (exact > -1e-4)
    assert sure.sum() >= 3
    assert ((actual - exact)[sure] / exact[sure]).abs().max() < 1e-4  # of logits of some 30 in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_those_of_the_shards_merged_in_the_order_of_the_ranks(dtype: torch.dtype) -> None:
    """Over logits and in the head. The ranks of the real group and the threads arrive in different orders."""
    found = [rank["results" if dtype == torch.float32 else "in bfloat16"] for rank in ranks(4)]
    for of_process, of_thread in zip(found, as_threads(4, IN_BFLOAT16, dtype, seed=1), strict=True):
        for name, expected in of_thread.items():
            assert expected.keys() == of_process[name].keys()
            different = [key for key, x in expected.items() if not torch.equal(of_process[name][key], x)]
            assert not different, (name, different)


def test_bad_calls() -> None:
    for rank in ranks(4):
        said = rank["messages"]
        assert "process_group was given with float64" in said["float64"] and "process_group was given with a callable" in said["callable"]
        assert "is -1; expected 0 <= id" in said["negative"]
        assert said["too large"] == "nan" or f"is {V}; expected 0 <= id < {V}" in said["too large"]
