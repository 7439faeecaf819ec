"""The fused head of a model that DeepSpeed ZeRO-3 has partitioned: two processes have the mean of what each would have alone."""

from __future__ import annotations

import importlib.util
import socket
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import labelled
from peers import PEERS
from ranks import run_ranks
from torch import Tensor, nn

import grpo_fast as gf
from grpo_fast.head.weights import unpartitioned

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None and not (PEERS / "deepspeed").exists(),
    reason="needs deepspeed: pip install --no-deps --target .venv/peers deepspeed hjson py-cpuinfo msgpack einops",
)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    return run_ranks(Path(__file__).with_name("linear_deepspeed_ranks.py"), 2, str(port))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("by", ["loss", "logprobs"])
@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
def test_gradients_are_the_mean_over_processes(kind: str, by: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        expected, found = rank[f"{kind} {by}"], rank[f"{kind} {by} zero"]
        assert found.keys() == expected.keys() and any("lm_head" in name or kind == "tied" for name in found)
        largest = max(x.abs().max().item() for x in expected.values())
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-4, atol=1e-5 * largest, msg=labelled(name))


def test_a_partitioned_weight_is_gathered_once_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for DeepSpeed, which has the weight whole again when its gradient arrives."""
    full, gathers = torch.randn(11, 8), []
    weight = nn.Parameter(torch.empty(0))
    weight.ds_id = 3  # type: ignore[attr-defined]  # as DeepSpeed marks its own

    @contextmanager
    def gather(parameters: list[Tensor]) -> Iterator[None]:
        gathers.append(parameters)
        weight.data = full.clone()
        yield
        weight.data = torch.empty(0)

    stand_in = types.ModuleType("deepspeed")
    stand_in.zero = types.SimpleNamespace(GatheredParameters=gather)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
    call = (torch.randint(11, (2, 5)), torch.tensor([1.0, -0.5]))
    found = []
    for head in (weight, nn.Parameter(full.clone())):
        hidden = torch.arange(80.0).view(2, 5, 8).sin().requires_grad_()
        loss = gf.linear_grpo_loss(hidden, unpartitioned(head), *call, chunk_bytes=3 * 11 * 4).loss
        if head is weight:
            assert weight.numel() == 0 and len(gathers) == 1
            weight.data = full.clone()
        loss.backward()
        found.append((hidden.grad, head.grad))
    assert all(torch.equal(ours, true) and true.abs().max() > 0 for ours, true in zip(*found, strict=True))
