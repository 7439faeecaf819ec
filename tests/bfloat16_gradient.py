"""A check of the operators that overwrite float32 logits with a bfloat16 gradient, for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import grpo_fast as gf
from grpo_fast.loss.kernel_settings import loss_settings
from grpo_fast.ops.rounding import first_half


def check_bfloat16_gradient(device: str, softcap: float) -> None:
    """It is the float32 gradient rounded once, in the first half of each row; masked rows and the last position are 0."""
    vocabulary = 1003
    logits = 3 * torch.randn(2, 4, vocabulary).to(device)
    logits[1, 2] = math.nan
    ids, mask = torch.randint(vocabulary, (2, 3), device=device), torch.tensor([[True, False, True], [True, True, True]], device=device)
    advantages, weight = torch.randn(2, 1).to(device), torch.tensor(0.2, device=device)
    scoring, operators = (None, 0.7, softcap, 1.0), torch.ops.grpo_fast
    settings = (1.0, loss_settings(gf.LossConfig(entropy_coef=0.1)), False)
    calls: list[Callable[..., None]] = [
        lambda x, *last: operators.grpo_loss_(x, ids, mask, advantages, weight, weight, None, None, None, *scoring, *settings, *last),
    ]
    statistics = operators.token_logprobs(logits, ids, mask, *scoring)
    calls.append(
        lambda x, *last: operators.token_logprobs_backward_(advantages.expand(2, 3), advantages, x, ids, mask, *scoring, *statistics, *last)
    )
    for call in calls:
        exact, rounded = logits.clone(), torch.empty(2, 4, vocabulary + 5, device=device)[..., :vocabulary].copy_(logits)
        call(exact)
        call(rounded, True)
        found = first_half(rounded, torch.bfloat16)
        assert torch.equal(found.nan_to_num(7.0), exact.to(torch.bfloat16).nan_to_num(7.0))
        assert found[1, 2].isnan().any() and (found[0, 1] == 0).all() and (found[:, 3] == 0).all() and (found[0, 0] != 0).any()
