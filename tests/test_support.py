"""gf.Support: how it is built and checked, and the loss over its sets where the random cases of cases.py do not look."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from test_linear_memory import Peak
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import grpo_fast as gf
from grpo_fast.head import kept
from grpo_fast.loss import reference

B, T, D, V = 3, 5, 16, 200


def lists(support: gf.Support) -> list[list[int]]:
    bounds, ids = support.offsets.tolist(), support.token_ids.tolist()
    return [ids[begin:end] for begin, end in itertools.pairwise(bounds)]


# ---- construction


def test_from_lists_and_back() -> None:
    sets: list[list[int] | None] = [[5, 2, 9], [], None, [7]]
    support = gf.Support.from_lists(sets)
    assert support.token_ids.dtype == torch.int32 and support.offsets.dtype == torch.int64
    assert lists(support) == [[5, 2, 9], [], [], [7]] and len(support) == 4 and support.sizes.tolist() == [3, 0, 0, 1]
    assert lists(support.take(torch.tensor([3, 0, 0]))) == [[7], [5, 2, 9], [5, 2, 9]]
    assert lists(support.take(support.sizes == 0)) == [[], []]
    assert lists(gf.Support.concatenate([support, gf.Support.unrestricted(2), support])) == [*lists(support), [], [], *lists(support)]
    assert support.dense(10).sum(1).tolist() == [3, 10, 10, 1] and support.to("cpu") is support
    assert lists(copy.deepcopy(support)) == lists(support)


def test_from_a_mask() -> None:
    kept_mask = torch.tensor([[[True, False, True], [True, True, True]], [[False, False, False], [False, True, False]]])
    assert lists(gf.Support.from_mask(kept_mask)) == [[0, 2], [], [], [1]]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(5, None, None), (None, 0.8, None), (None, None, 0.1), (20, 0.7, 0.05), (1, None, None)]
)
def test_from_logits_keeps_what_transformers_keeps(top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 300, 50, generator=generator)  # more rows than are sorted at once
    logits[0, 0, :30] = 2.0  # ties at the k-th
    warpers = [(TopKLogitsWarper, top_k), (TopPLogitsWarper, top_p), (MinPLogitsWarper, min_p)]
    processors = LogitsProcessorList([make(value) for make, value in warpers if value is not None])
    kept_mask = processors(torch.zeros(600, 1, dtype=torch.long), logits.flatten(0, 1) / 0.7) > -torch.inf
    support = gf.Support.from_logits(logits, temperature=0.7, top_k=top_k, top_p=top_p, min_p=min_p)
    differ = (support.dense(50) != kept_mask).any(1)
    tied = torch.arange(600) == 0  # among equal logits at the cut of top_p, transformers takes any
    assert not (differ & ~tied).any()
    if top_p is None:
        assert not differ.any()
    sizes = support.sizes
    assert sizes.min() >= 1 and sizes.max() < 50


def test_the_order_of_the_rules() -> None:
    """min_p first, as in vLLM, leaves top_p a distribution in which fewer tokens reach it."""
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    assert lists(gf.Support.from_logits(logits, top_p=0.6, min_p=0.35, order="vllm")) == [[0]]  # 0.5 / 0.7 is more than 0.6
    assert lists(gf.Support.from_logits(logits, top_p=0.6, min_p=0.35)) == [[0, 1]]


def test_of_equal_logits_the_larger_ids_are_kept() -> None:
    assert lists(gf.Support.from_logits(torch.zeros(1, 4), top_p=0.5)) == [[2, 3]]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: gf.Support(torch.tensor([1]), torch.tensor([0, 1])), TypeError, "support.token_ids has dtype torch.int64"),
        (lambda: gf.Support(torch.tensor([1]).int(), torch.tensor([0, 1]).int()), TypeError, "support.offsets has dtype torch.int32"),
        (lambda: gf.Support([1], torch.tensor([0, 1])), TypeError, "support.token_ids is a list"),  # type: ignore[arg-type]
        (lambda: gf.Support(torch.tensor([1]).int(), torch.tensor([0, 2])), ValueError, "end with 2; expected .* K = 1"),
        (lambda: gf.Support(torch.tensor([1, 2]).int(), torch.tensor([0, 2, 1, 2])), ValueError, "never to decrease"),
        (lambda: gf.Support(torch.tensor([[1]]).int(), torch.tensor([0, 1])), ValueError, "expected \\[K\\] and \\[N \\+ 1\\]"),
        (lambda: gf.Support(torch.tensor([1, -1]).int(), torch.tensor([0, 2])), ValueError, "support.token_ids\\[1\\] is -1"),
        (lambda: gf.Support.from_lists([[1], [3, 4, 3]]), ValueError, "position 1 in support holds id 3 twice"),
        (lambda: gf.Support.from_lists([[1.0]]), TypeError, "position 0 holds 1.0 \\(float\\)"),  # type: ignore[list-item]
        (lambda: gf.Support.from_lists([[True]]), TypeError, "position 0 holds True \\(bool\\)"),
        (lambda: gf.Support.from_lists([[1], [2**31]]), ValueError, "position 1 holds id 2147483648"),
        (lambda: gf.Support.from_mask(torch.ones(2, 3)), TypeError, "kept has dtype torch.float32"),
        (lambda: gf.Support.from_logits(torch.zeros(2, 3), top_k=0), ValueError, "top_k is 0"),
        (lambda: gf.Support.from_logits(torch.zeros(2, 3), top_k=1.5), TypeError, "top_k is 1.5"),  # type: ignore[arg-type]
        (lambda: gf.Support.from_logits(torch.zeros(2, 3), top_p=0.0), ValueError, "top_p is 0.0"),
        (lambda: gf.Support.from_logits(torch.zeros(2, 3), min_p=1.1), ValueError, "min_p is 1.1"),
        (lambda: gf.Support.from_logits(torch.zeros(2, 3), temperature=0.0), ValueError, "temperature is 0"),
        (lambda: gf.Support.from_logits(torch.zeros(2, 3), order="trl"), ValueError, "order is 'trl'"),
        (lambda: gf.Support.concatenate([]), ValueError, "parts is empty"),
    ],
)
def test_what_is_refused(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def call(support: Any, **changed: Any) -> gf.GRPOOutput:
    given = {"token_ids": torch.tensor([[1, 2], [3, 4]]), "advantages": torch.ones(2), **changed}
    return gf.grpo_loss(torch.zeros(2, 2, 10), support=support, **given)


@pytest.mark.parametrize(
    ("support", "kind", "message"),
    [
        ([[1], [2], [3], [4]], TypeError, "support is a list; expected a grpo_fast.Support"),
        (gf.Support.from_lists([[1], [2], [3]]), ValueError, "support has 3 positions; expected 4"),
        (gf.Support.from_lists([[1], [2], [3], [4, 10]]), ValueError, "holds the id 10; expected ids below 10"),
        (gf.Support.from_lists([[1], [2], [4, 5], [4]]), ValueError, "token_ids\\[1, 0\\] is 3, which is not among the 2 ids"),
    ],
)
def test_what_a_call_refuses(support: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(support)


def test_a_masked_position_may_have_any_set() -> None:
    call(gf.Support.from_lists([[1], [2], [4, 5], [4]]), mask=torch.tensor([[1, 1], [0, 1]]))


# ---- the policy over the sets


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(B, T, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) * 0.5).to(dtype)
    return hidden, weight, torch.randint(V, (B, T), generator=generator)


def sets_of(ids: Tensor, size: int) -> gf.Support:
    """Sets of one size with the sampled token in the middle."""
    generator = torch.Generator().manual_seed(size)
    sets = []
    for y in ids.flatten().tolist():
        others = [x for x in torch.randperm(V, generator=generator).tolist() if x != y][: size - 1]
        sets.append([*others[: size // 2], y, *others[size // 2 :]])
    return gf.Support.from_lists(sets)


def test_a_set_of_one_token_is_certain_and_has_no_gradient() -> None:
    hidden, weight, ids = tensors()
    logits = (hidden @ weight.T).requires_grad_()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    config, support = gf.LossConfig(entropy_coef=0.1), sets_of(ids, 1)
    for out, wanted in (
        (gf.grpo_loss(logits, ids, torch.ones(B), config=config, support=support), [logits]),
        (gf.linear_grpo_loss(leaves[0], leaves[1], ids, torch.ones(B), config=config, support=support), leaves),
    ):
        assert (out.logprobs == 0).all() and (out.entropy == 0).all()
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(out.loss, wanted))


@pytest.mark.parametrize("by_themselves", [True, False])
def test_the_set_of_all_tokens_is_the_vocabulary(by_themselves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_themselves:
        monkeypatch.setitem(kept.LARGEST_SHARES, torch.float32, 1)
    hidden, weight, ids = tensors()
    found = []
    for support in (None, sets_of(ids, V)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = gf.linear_grpo_loss(leaves[0], leaves[1], ids, torch.tensor([1.0, -1.0, 0.5]), temperature=0.7, support=support)
        found.append([out.loss, out.logprobs, out.entropy, *torch.autograd.grad(out.loss, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_almost_certain_tokens_and_16_bit_operands_keep_their_digits(dtype: torch.dtype) -> None:
    """Products of 16-bit operands are summed in float32 and not rounded."""
    hidden, weight, ids = tensors(dtype)
    weight[ids[0, 0]] = (40 * hidden[0, 0] / hidden[0, 0].float().square().sum()).to(dtype)
    support = sets_of(ids, 6)
    dense = reference.kept_sets(support.token_ids, support.offsets, V).view(B, T, V)
    truth, entropy = reference.token_statistics(hidden.double() @ weight.double().T, ids, kept=dense)
    found = gf.linear_token_logprobs(hidden, weight, ids, support=support)
    assert -1e-9 < truth[0, 0].item() < -1e-20
    assert abs(found.logprobs[0, 0].item() / truth[0, 0].item() - 1) < 2e-5  # of logits of some 40 in float32
    assert (found.logprobs - truth).abs().max() < 1e-5 and (found.entropy - entropy).abs().max() < 1e-5


def test_logits_outside_of_the_sets_are_not_read() -> None:
    hidden, weight, ids = tensors()
    logits, support = hidden @ weight.T, sets_of(ids, 7)
    poisoned = torch.where(support.dense(V).view(B, T, V), logits, torch.nan)
    gradients = []
    for z, inplace in ((logits, False), (poisoned, False), (poisoned, True)):
        leaf = z.clone().requires_grad_()
        gf.grpo_loss(leaf * 1, ids, torch.ones(B), support=support, inplace=inplace).loss.backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_the_weight_of_ids_outside_of_the_sets_is_not_read() -> None:
    hidden, weight, ids = tensors()
    support = sets_of(ids, 6)
    held = torch.zeros(V, dtype=torch.bool)
    held[support.token_ids.long()] = True
    assert not held.all()
    poisoned = torch.where(held.unsqueeze(1), weight, torch.nan).requires_grad_()
    out = gf.linear_grpo_loss(hidden.requires_grad_(), poisoned, ids, torch.ones(B), support=support)
    out.loss.backward()
    assert torch.isfinite(out.loss) and hidden.grad is not None and torch.isfinite(hidden.grad).all()
    assert poisoned.grad is not None and (poisoned.grad[~held] == 0).all() and (poisoned.grad[held] != 0).any()


def test_a_token_has_the_same_bits_whatever_stands_beside_it() -> None:
    hidden, weight, ids = tensors()
    support = sets_of(ids, 6)
    whole = gf.linear_token_logprobs(hidden, weight, ids, support=support).logprobs.flatten()
    for n in range(B * T):
        alone = gf.linear_token_logprobs(
            hidden.view(-1, D)[n : n + 1], weight, ids.view(-1)[n : n + 1], support=support.take(torch.tensor([n]))
        )
        assert torch.equal(alone.logprobs[0], whole[n])


@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_nothing_of_the_size_of_the_logits_is_allocated(trainable: bool) -> None:
    tokens, vocabulary = 512, 40_000
    hidden, weight = torch.randn(tokens, D, requires_grad=True), torch.randn(vocabulary, D, requires_grad=trainable)
    ids = torch.randint(vocabulary, (tokens,))
    sets = [[y, (y + 1) % vocabulary, (y + 7) % vocabulary] for y in ids.tolist()]
    support, config = gf.Support.from_lists(sets), gf.LossConfig(loss_type="dapo")
    with Peak() as memory:
        out = gf.linear_grpo_loss(hidden, weight, ids, torch.randn(tokens), config=config, support=support, mask=torch.ones(tokens))
        out.loss.backward()
        lp = gf.linear_token_logprobs(hidden, weight, ids, support=support)
        (lp.logprobs.sum() + lp.entropy.sum()).backward()
    gradients = 4 * (tokens * D + trainable * vocabulary * D)
    assert memory.peak < 4 * gradients + (1 << 20) < tokens * vocabulary  # bytes: less than one byte a logit


def test_compiled_without_graph_breaks() -> None:
    hidden, weight, ids = tensors()
    logits, support = hidden @ weight.T, sets_of(ids, 4)

    def total(z: Tensor, h: Tensor, w: Tensor, sets: gf.Support) -> Tensor:
        config = gf.LossConfig(entropy_coef=0.1)
        loss = gf.grpo_loss(z, ids, torch.ones(B), config=config, support=sets).loss
        return loss + gf.linear_grpo_loss(h, w, ids, torch.ones(B), config=config, support=sets).loss

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    results = []
    for function in (total, compiled):
        leaves = [x.clone().requires_grad_() for x in (logits, hidden, weight)]
        value = function(leaves[0], leaves[1], leaves[2], support)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_opcheck() -> None:
    hidden, weight, ids = tensors()
    support, logits = sets_of(ids, 3), (hidden @ weight.T).requires_grad_()
    rows = (ids, torch.ones(B, T, dtype=torch.bool), support.token_ids, support.offsets, torch.full((B, 1), 0.7), 1.0, 2.0, 0.5, 0, 0)
    operators = torch.ops.grpo_fast
    torch.library.opcheck(operators.kept_token_logprobs.default, (logits, *rows))
    statistics = operators.kept_token_logprobs(logits.detach(), *rows)
    for operator in (operators.kept_token_logprobs_backward, operators.kept_token_logprobs_backward_):
        torch.library.opcheck(operator.default, (torch.randn(B, T), torch.randn(B, T), logits.detach(), *rows, *statistics))
    columns, gradient, flat = torch.randint(-1, V, (B * T, 4)), torch.randn(B * T, 4), hidden.view(-1, D)
    torch.library.opcheck(operators.kept_logits.default, (flat, weight, columns))
    torch.library.opcheck(operators.kept_hidden_gradient.default, (gradient, weight, columns))
    torch.library.opcheck(operators.add_kept_weight_gradient_.default, (torch.zeros(V, D), gradient, flat, columns))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden", lambda x: x[:, :3]),
        ("hidden", lambda x: x.double()),
        ("hidden", lambda x: x[0]),
        ("weight", lambda x: x.T),
        ("weight", lambda x: x[:5]),
        ("columns", lambda x: x.int()),
        ("columns", lambda x: x[:2]),
        ("columns", lambda x: x + V),
        ("columns", lambda x: x.T.contiguous().T),
        ("gradient", lambda x: x[:, :1]),
        ("gradient", lambda x: x.bfloat16()),
    ],
)
def test_operators_called_directly_check_what_they_read(name: str, change: Any) -> None:
    columns = torch.arange(B * 4).view(B, 4)
    given = {"hidden": torch.randn(B, D), "weight": torch.randn(V, D), "columns": columns, "gradient": torch.randn(B, 4)}
    given[name] = change(given[name])
    operators = torch.ops.grpo_fast
    calls = [
        lambda: operators.kept_logits(given["hidden"], given["weight"], given["columns"]),
        lambda: operators.kept_hidden_gradient(given["gradient"], given["weight"], given["columns"]),
        lambda: operators.add_kept_weight_gradient_(torch.zeros(12, D), given["gradient"], given["hidden"], given["columns"]),
    ]
    reads = {"hidden": (0, 2), "weight": (0, 1), "columns": (0, 1, 2), "gradient": (1, 2)}[name]
    for i in reads:
        with pytest.raises(RuntimeError, match="grpo_fast: "):
            calls[i]()
