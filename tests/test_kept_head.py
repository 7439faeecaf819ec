"""The head over kept sets: how often it waits for a device, and how much work the tokens beside the sets are."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from support_cases import *  # noqa: F403
from test_support import B, T, V, lists, sets_of, tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_fast as gf
from grpo_fast.head import kept, loss
from grpo_fast.head.matrix_products import HeadTensors
from grpo_fast.head.operators import compiled_logprobs
from grpo_fast.head.precision import Precision
from grpo_fast.loss.token_rows import TokenRows

TWO_TOKENS = 4 * 2 * V  # bytes of the logits of two tokens: of a chunk


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU: reading values, and shapes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = function.overloadpacket.__name__ in ("index", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        self.count += by_mask or function.overloadpacket.__name__ in self.NAMES
        return function(*args, **(kwargs or {}))

    def during(self, call: Any) -> int:
        tolist = Tensor.tolist

        def counted(x: Tensor) -> Any:  # on a CPU it calls no operator
            self.count += 1
            return tolist(x)

        with mock.patch.object(Tensor, "tolist", counted), self:
            call()
        return self.count


def mixed_support(ids: Tensor, *sizes: int) -> gf.Support:
    """Sets of these sizes in turn; 0: no restriction."""
    of_size: list[list[list[int]]] = [lists(sets_of(ids, size)) if size else [[]] * (B * T) for size in sizes]
    return gf.Support.from_lists([of_size[n % len(sizes)][n] for n in range(B * T)])


def rows_of(support: gf.Support, ids: Tensor) -> TokenRows:
    mask = torch.ones(1, B * T, dtype=torch.bool)
    return TokenRows(ids.view(1, -1), mask, None, 1.0, 0.0, 1.0, sets=support.kept_sets, largest_kept_set=V // 32)


def test_a_backward_pass_reads_no_more_from_the_device_than_it_must() -> None:
    """Compiled, it counts the tokens once and the sizes of the sets once; eagerly it has what the forward pass counted."""
    hidden, weight, ids = tensors()
    support = mixed_support(ids, 1, 6, 0)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    precision = Precision.of(torch.float32, "float32", False)
    compiled, _ = compiled_logprobs(HeadTensors(*leaves), rows_of(support, ids), precision=precision, length=T, chunk_bytes=TWO_TOKENS)
    eager, _ = gf.linear_token_logprobs(hidden, weight, ids, support=support, chunk_bytes=TWO_TOKENS)
    gradients: list[tuple[Tensor, ...]] = []
    for logprobs, reads in ((compiled, 2), (eager, 0)):
        assert Reads().during(lambda x=logprobs: gradients.append(torch.autograd.grad(x.sum(), leaves))) == reads
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("set_ids", "is_nan"), [([3, 150], [False, False]), ([150, 3, 2], [True, False]), ([3, 200], [True, True])])
def test_a_shard_says_that_a_set_is_not_valid(set_ids: list[int], is_nan: list[bool]) -> None:
    """The processes that hold ids 0 ... 99 and 100 ... 199, of which the first holds the sampled token 3, or 1 that is in no set."""
    token = 1 if len(set_ids) == 3 else 3
    for begin, nan in zip((0, 100), is_nan, strict=True):
        arguments = (
            torch.tensor([[token]]),
            torch.ones(1, 1, dtype=torch.bool),
            torch.tensor(set_ids).int(),
            torch.tensor([0, len(set_ids)]),
        )
        logits = torch.randn(1, 1, 100)
        logprobs, _, _ = torch.ops.grpo_fast.kept_token_logprobs(logits, *arguments, None, 1.0, 0.0, 1.0, begin, 200)
        assert logprobs.isnan().item() == nan


def test_a_shard_without_any_id_of_the_set_but_with_the_token_is_not_valid() -> None:
    arguments = (torch.tensor([[3]]), torch.ones(1, 1, dtype=torch.bool), torch.tensor([150]).int(), torch.tensor([0, 1]))
    assert torch.ops.grpo_fast.kept_token_logprobs(torch.randn(1, 1, 100), *arguments, None, 1.0, 0.0, 1.0, 0, 200)[0].isnan()


def test_the_gradient_of_logits_reads_the_sizes_of_the_sets_once() -> None:
    hidden, weight, ids = tensors()
    logits = (hidden @ weight.T).requires_grad_()
    logprobs, _ = gf.token_logprobs(logits, ids, support=mixed_support(ids, 1, 6, 0, 50))
    assert Reads().during(lambda: logprobs.sum().backward()) == 1


def test_a_plan_knows_the_tokens_that_are_in_no_chunk() -> None:
    _, _, ids = tensors()
    for sizes, single, apart, sets in (((6,), False, True, False), ((0, 1), False, True, False), ((0, 50), True, False, True)):
        rows = rows_of(mixed_support(ids, *sizes), ids)
        planned = kept.plan_rows(rows, rows.mask, 512)
        assert planned.plan.is_single_piece == single
        assert (planned.apart is not None) == apart and (planned.in_chunks.sets is not None) == sets
    rows = rows_of(mixed_support(ids, 0, 1), ids)  # tokens apart that get no gradient add nothing to that of the chunks
    assert kept.plan_rows(rows, torch.arange(B * T).unsqueeze(0) % 2 == 0, 512).plan.is_single_piece


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_coefficients_are_computed_once_per_token_and_not_per_chunk(loss_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the tokens of each chunk, and once for all tokens where some have small sets."""
    computed: list[int] = []
    coefficients = loss._coefficients

    def counted(statistics: Any, *arguments: Any) -> Any:
        computed.append(statistics.logprobs.numel())
        return coefficients(statistics, *arguments)

    monkeypatch.setattr(loss, "_coefficients", counted)
    hidden, weight, ids = tensors()
    results = []
    for chunk_bytes in (TWO_TOKENS, None):
        computed.clear()
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        options: Any = {"config": gf.LossConfig(loss_type=loss_type), "old_logprobs": torch.full((B, T), -3.0), "chunk_bytes": chunk_bytes}
        advantages = torch.tensor([1.0, -1.0, 0.5])
        value = gf.linear_grpo_loss(leaves[0], leaves[1], ids, advantages, support=mixed_support(ids, 0, 1, 6, 50), **options).loss
        results.append([value, *torch.autograd.grad(value, leaves)])
        assert B * T < sum(computed) <= 2 * B * T
        assert len(computed) > 2 or chunk_bytes is None
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
