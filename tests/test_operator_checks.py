"""Operators that are called directly check shapes, dtypes and strides before they read memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_fast as gf
from grpo_fast.loss.kernel_settings import loss_settings
from grpo_fast.ops import extension

pytestmark = pytest.mark.skipif(not extension.load(), reason=f"the extension is not loaded: {extension.status().why}")

B, T, V = 2, 3, 7
FLOATS = ("advantages", "weights", "entropy_weights", "old_logprobs", "ref_logprobs", "rollout_weights", "temperatures")


def arguments() -> dict[str, Any]:
    found: dict[str, Any] = {
        "logits": torch.randn(B, T, V),
        "token_ids": torch.randint(V, (B, T)),
        "mask": torch.ones(B, T, dtype=torch.bool),
    }
    found |= {name: torch.rand(B, T) + 0.5 for name in FLOATS}
    numbers = {"temperature": 1.0, "softcap": 0.0, "logit_scale": 1.0, "loss_scale": 1.0}
    return found | numbers | {"settings": loss_settings(gf.LossConfig()), "only_active": False}


def loss(inplace: bool, **changed: Any) -> Any:
    given = arguments() | changed
    operator = torch.ops.grpo_fast.grpo_loss_ if inplace else torch.ops.grpo_fast.grpo_loss
    return operator(*given.values(), *([] if inplace else [True]))


def logprobs(**changed: Any) -> Any:
    given = arguments() | changed
    names = ("logits", "token_ids", "mask", "temperatures", "temperature", "softcap", "logit_scale")
    return torch.ops.grpo_fast.token_logprobs(*(given[name] for name in names))


def logprobs_backward(inplace: bool, **changed: Any) -> Any:
    given = arguments() | {name: torch.rand(B, T) for name in ("g", "h", "logprobs", "entropy", "lse")} | changed
    first = ("g", "h", "logits", "token_ids", "mask", "temperatures", "temperature", "softcap", "logit_scale", "logprobs", "entropy", "lse")
    operators = torch.ops.grpo_fast
    operator = operators.token_logprobs_backward_ if inplace else operators.token_logprobs_backward
    return operator(*(given[name] for name in first))


def longer(x: Tensor) -> Tensor:
    return x.repeat(1, 50)


WRONG: list[tuple[str, Any, str]] = [
    ("token_ids", lambda x: x.repeat(50, 1), "token_ids"),
    ("token_ids", longer, "token_ids"),
    ("token_ids", lambda x: x.int(), "token_ids"),
    ("token_ids", lambda x: x[0], "token_ids"),
    ("mask", lambda x: x[:1, :2], "mask"),
    ("mask", lambda x: x.long(), "mask"),
    ("mask", lambda x: x.flatten(), "mask"),
    ("temperatures", lambda x: x[:, :2], "temperatures"),
    ("temperatures", lambda x: x.double(), "temperatures"),
    ("temperatures", lambda x: x.unsqueeze(-1), "temperatures"),
    ("logits", lambda x: x[0], "logits"),
    ("logits", lambda x: x.repeat(1, 3, 1), "logits"),
    ("logits", lambda x: x.double(), "logits"),
    ("logits", lambda x: x.unsqueeze(0), "logits"),
]


@pytest.mark.parametrize(("name", "change", "named"), WRONG)
@pytest.mark.parametrize("call", [logprobs, lambda **k: logprobs_backward(False, **k), lambda **k: logprobs_backward(True, **k)])
def test_token_logprobs_rejects_invalid_arguments(call: Any, name: str, change: Any, named: str) -> None:
    call()
    with pytest.raises(RuntimeError, match=named):
        call(**{name: change(arguments()[name])})


@pytest.mark.parametrize("name", ["g", "h", "logprobs", "entropy", "lse"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_backward_refuses_wrong_gradients_and_statistics(name: str, inplace: bool) -> None:
    for wrong in (torch.rand(B, T - 1), torch.rand(B + 1, T), torch.rand(B, T).half(), torch.rand(B * T)):
        with pytest.raises(RuntimeError, match=r"grpo_fast: \w+ has the wrong"):
            logprobs_backward(inplace, **{name: wrong})


@pytest.mark.parametrize(("name", "change", "named"), WRONG)
@pytest.mark.parametrize("inplace", [False, True])
def test_grpo_loss_rejects_invalid_arguments(inplace: bool, name: str, change: Any, named: str) -> None:
    loss(inplace)
    with pytest.raises(RuntimeError, match=named):
        loss(inplace, **{name: change(arguments()[name])})


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_loss_refuses_wrong_numbers_per_token(name: str, inplace: bool) -> None:
    for wrong in (torch.rand(B, T - 1), torch.rand(B + 1, T), torch.rand(B, T).double(), torch.rand(B)):
        with pytest.raises(RuntimeError, match=f"{name} has the wrong"):
            loss(inplace, **{name: wrong})
    loss(inplace, **{name: torch.rand(1, 1) + 0.5})
    loss(inplace, **{name: torch.rand(()) + 0.5})


def test_a_wrong_number_of_settings_is_refused() -> None:
    with pytest.raises(RuntimeError, match="1 settings given"):
        loss(False, settings=[0.0])
