"""Kept sets that are not valid, where values may not be read beforehand, as on a GPU: the token and the loss become NaN, nothing is read
outside of the tensors, and the other tokens stay as they are.

These tests are for the backend in force: test_kept_head.py runs them for the C++ kernels, triton_interpreter.py for Triton.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grpo_fast as gf
from grpo_fast.loss import checks
from grpo_fast.loss.support import Support
from grpo_fast.ops import kept_logprobs

TOKENS, VOCABULARY = torch.tensor([3, 7, 70]), 400
VALID = ([3, 5], [2, 7, 9], [*range(60, 90)])  # of 400 / 32 ids or fewer, and of more: computed over the whole vocabulary
WRONG = {
    "without the token": [2, 6, 9],
    "an id outside of the vocabulary": [2, 7, VOCABULARY],
    "a negative id": [7, -1],
    "an id twice": [9, 7, 9],
    "the token twice": [7, 9, 7],
    "large, without the token": [*range(8, 60)],
    "large, with an id twice": [*range(60), 58],
}


def unchecked(*sets: list[int]) -> Support:
    offsets = torch.tensor([0, *(len(s) for s in sets)]).cumsum(0)
    return Support._of(torch.tensor([x for s in sets for x in s], dtype=torch.int32), offsets)


def results(support: Support, over_logits: bool) -> tuple[list[Any], list[Any]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 16, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, 16, generator=generator)
    options: dict[str, Any] = {"support": support, "old_logprobs": torch.full((3,), -1.0)}
    if over_logits:
        out = gf.grpo_loss(hidden @ weight.T, TOKENS, torch.ones(3), **options)
    else:
        out = gf.linear_grpo_loss(hidden, weight, TOKENS, torch.ones(3), **options)
    out.loss.backward()
    assert hidden.grad is not None
    return [out.loss, out.logprobs[1], out.entropy[1]], [*out.logprobs[::2], hidden.grad[::2]]


@pytest.mark.parametrize("over_logits", [True, False], ids=["logits", "head"])
def test_sets_that_are_not_valid_turn_the_loss_into_nan(over_logits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "value_checks_wanted", lambda tensor: False)
    monkeypatch.setattr(kept_logprobs, "DUPLICATES_ARE_REFUSED", ())
    valid, others = results(unchecked(*VALID), over_logits)
    assert all(x.isfinite().all() for x in (*valid, *others))
    for name, wrong in WRONG.items():
        found, beside = results(unchecked(VALID[0], wrong, VALID[2]), over_logits)
        assert all(x.isnan() for x in found), name
        for a, b in zip(beside, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offsets", [[0, 2, 9, 9], [-3, 2, 3, 4]], ids=["too far", "negative"])
def test_offsets_that_are_not_valid_turn_the_loss_into_nan(offsets: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "value_checks_wanted", lambda tensor: False)
    support = Support._of(torch.tensor([3, 5, 7, 70], dtype=torch.int32), torch.tensor(offsets))
    for over_logits in (True, False):
        assert results(support, over_logits)[0][0].isnan()
