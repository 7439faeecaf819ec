"""The most memory alive at once, beside the arguments: a chunk of logits, the gradient of the weight in float32, that of the states."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo_fast as gf
from grpo_fast.head import memory

B, T, D, V = 4, 256, 256, 4003
ROWS = 128  # tokens per chunk


class Peak(TorchDispatchMode):
    """Counts the bytes of all storages that operators hand out while it is in force, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("rows", [32, ROWS])
@pytest.mark.parametrize("of", ["loss", "gspo", "logprobs", "logprobs and entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_a_call_holds_a_chunk_and_the_gradients(
    trainable: bool, dtype: torch.dtype, of: str, rows: int, generator: torch.Generator
) -> None:
    """The sum of a bfloat16 weight's gradient is float32 and is rounded when the chunk is gone."""
    hidden = torch.randn(B, T, D, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) * 0.2).to(dtype).requires_grad_(trainable)
    token_ids, advantages = torch.randint(V, (B, T), generator=generator), torch.randn(B, 1, generator=generator)
    chunk = rows * V * dtype.itemsize
    gc.collect()
    with Peak() as memory:
        if of in ("loss", "gspo"):
            config = gf.LossConfig(loss_type="gspo" if of == "gspo" else "dapo")
            old = torch.full((B, T), -9.0)
            gf.linear_grpo_loss(
                hidden, weight, token_ids, advantages[:, 0], config=config, old_logprobs=old, chunk_bytes=chunk
            ).loss.backward()
        else:
            out = gf.linear_token_logprobs(hidden, weight, token_ids, chunk_bytes=chunk, keep_bytes=0)
            (advantages * (out.logprobs + (out.entropy if "entropy" in of else 0))).sum().backward()
    of_hidden, of_weight = hidden.numel() * dtype.itemsize, 4 * V * D if trainable else 0
    rounded = V * D * dtype.itemsize if trainable and dtype != torch.float32 else 0
    expected = of_hidden + of_weight + max(chunk, rounded)
    assert chunk < memory.peak < 1.1 * expected, memory.peak / expected


@pytest.mark.parametrize("of", ["loss", "callable", "logprobs"])
def test_a_part_of_longer_sequences_is_not_copied_whole(of: str, generator: torch.Generator) -> None:
    """A model that is asked for its last logits gives its head a view."""
    longer = torch.randn(B, T + 9, 8 * D, generator=generator)
    hidden = longer[:, 8:].detach().requires_grad_()
    weight, ids = torch.randn(V, 8 * D, generator=generator) * 0.1, torch.randint(V, (B, T), generator=generator)
    assert not hidden.is_contiguous()
    chunk = 16 * V * 4
    head = torch.nn.Linear(8 * D, V, bias=False).requires_grad_(False) if of == "callable" else weight
    gc.collect()
    with Peak() as memory:
        if of == "logprobs":
            out = gf.linear_token_logprobs(hidden, head, ids, chunk_bytes=chunk).logprobs.sum()
        else:
            out = gf.linear_grpo_loss(hidden, head, ids, torch.ones(B), chunk_bytes=chunk).loss
        out.backward()
    assert hidden.grad is not None
    expected = hidden.numel() * 4 + chunk * (3 if of == "callable" else 1)
    assert memory.peak < 1.1 * expected, memory.peak / expected


def test_the_limit_of_a_container_is_seen(tmp_path: Path) -> None:
    assert memory._free_of_container(tmp_path) == sys.maxsize
    version_1 = tmp_path / "memory"
    version_1.mkdir()
    for folder, names in ((version_1, ("limit_in_bytes", "usage_in_bytes")), (tmp_path, ("max", "current"))):
        for name, value in zip(names, ("8000", "6000"), strict=True):
            (folder / f"memory.{name}").write_text(f"{value}\n")
        (folder / "memory.stat").write_text("anon 5000\ninactive_file 700\n" + ("total_inactive_file 900\n" if folder == version_1 else ""))
        assert memory._free_of_container(tmp_path) == (2900 if folder == version_1 else 2700)
    (tmp_path / "memory.current").write_text("9000\n")
    assert memory._free_of_container(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    (version_1 / "memory.limit_in_bytes").unlink()
    assert memory._free_of_container(tmp_path) == sys.maxsize
    assert 0 < memory.free_bytes(torch.device("cpu")) <= memory._free_of_machine() < sys.maxsize


def test_without_gradient_no_memory_is_kept(generator: torch.Generator) -> None:
    hidden, weight = torch.randn(B, T, D, generator=generator), torch.randn(V, D, generator=generator).requires_grad_()
    token_ids = torch.randint(V, (B, T), generator=generator)
    gc.collect()
    with torch.no_grad(), Peak() as memory:
        out = gf.linear_token_logprobs(hidden, weight, token_ids, chunk_bytes=ROWS * V * 4)
        gc.collect()
        left = sum(memory.alive.values())
    assert memory.peak < 1.1 * ROWS * V * 4
    assert left < 20 * out.logprobs.numel() * 4


def test_saved_tensors_fit_into_keep_bytes(generator: torch.Generator) -> None:
    hidden, weight = (torch.randn(*shape, generator=generator).requires_grad_() for shape in ((B, T, D), (V, D)))
    token_ids = torch.randint(V, (B, T), generator=generator)
    for number in (0, 3, B * T // ROWS):
        gc.collect()
        with Peak() as memory:
            out = gf.linear_token_logprobs(hidden, weight, token_ids, chunk_bytes=ROWS * V * 4, keep_bytes=number * ROWS * V * 4)
            gc.collect()
            kept = sum(memory.alive.values())
        assert number * ROWS * V * 4 <= kept < (number + 0.2) * ROWS * V * 4
        del out
