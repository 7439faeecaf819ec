"""Bad arguments of the fused head: the error names the argument, what it was, what was expected and the fix, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grpo_fast as gf

B, T, D, V, R = 2, 3, 4, 7, 2


def right() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden": normal(B, T, D).requires_grad_(),
        "weight": normal(V, D).requires_grad_(),
        "token_ids": torch.randint(V, (B, T), generator=generator),
        "bias": normal(V),
        "adapter": (normal(B, T, R), normal(V, R)),
    }


def changed(name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    arguments = right()
    return {**arguments, name: change(arguments.get(name))}


CASES: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "hidden-none": (changed("hidden", lambda x: None), TypeError, ("hidden is a NoneType", "input of a model's LM head")),
    "hidden-1d": (
        {**changed("hidden", lambda x: x[0, 0]), "adapter": None},
        ValueError,
        ("hidden has shape [4]", "[B, T, D]", "packed [N, D]"),
    ),
    "hidden-int": (changed("hidden", lambda x: x.detach().int()), TypeError, ("hidden has dtype torch.int32", "hidden.float()")),
    "hidden-too-long": (
        {**changed("hidden", lambda x: torch.randn(B, T + 2, D)), "adapter": None},
        ValueError,
        ("token_ids has shape [2, 3]", "hidden [B, T, D]"),
    ),
    "weight-none": (changed("weight", lambda x: None), TypeError, ("weight is a NoneType", "torch.Tensor [V, D]", "callable")),
    "weight-shape": (changed("weight", lambda x: x.T), ValueError, ("weight has shape [4, 7]", "[V, D] = [V, 4]", "torch.nn.Linear")),
    "weight-1d": (changed("weight", lambda x: x[0]), ValueError, ("weight has shape [4]", "[V, D]")),
    "weight-int": (changed("weight", lambda x: x.detach().int()), TypeError, ("weight has dtype torch.int32", "weight.float()")),
    "weight-device": (changed("weight", lambda x: x.to("meta")), ValueError, ("weight is on meta, hidden is on cpu", "Move it")),
    "weight-one-row": (
        {**right(), "weight": torch.randn(1, D), "bias": None, "adapter": None},
        ValueError,
        ("weight has a vocabulary of 1", "at least 2"),
    ),
    "bias-shape": (changed("bias", lambda x: x[:-1]), ValueError, ("bias has shape [6]", "[V] = [7]")),
    "bias-type": (changed("bias", lambda x: 1.0), TypeError, ("bias is a float", "torch.Tensor")),
    "bias-device": (changed("bias", lambda x: x.to("meta")), ValueError, ("bias is on meta, hidden is on cpu",)),
    "adapter-type": (changed("adapter", lambda x: x[0]), TypeError, ("adapter is", "pair of tensors (adapted, adapter_weight)")),
    "adapter-three": (changed("adapter", lambda x: (*x, x[0])), TypeError, ("adapter is", "pair of tensors")),
    "adapter-rank": (changed("adapter", lambda x: (x[0][..., :1], x[1])), ValueError, ("adapter[0] has shape [2, 3, 1]", "[2, 3, 2]")),
    "adapter-0d": (changed("adapter", lambda x: (x[0], x[1][0, 0])), ValueError, ("adapter[1] has shape []", "[V, R] = [7, R]")),
    "adapter-1d": (changed("adapter", lambda x: (x[0], x[1][0])), ValueError, ("adapter[1] has shape [2]", "[V, R] = [7, R]")),
    "adapter-vocabulary": (changed("adapter", lambda x: (x[0], x[1][1:])), ValueError, ("adapter[1] has shape [6, 2]", "[V, R] = [7, 2]")),
    "token-too-large": (changed("token_ids", lambda x: x.fill_(V)), ValueError, ("token_ids[0, 0] is 7", "0 <= id < 7", "the head")),
    "token-negative": (changed("token_ids", lambda x: x.fill_(-100)), ValueError, ("token_ids[0, 0] is -100", "mask")),
    "token-int32": (changed("token_ids", lambda x: x.int()), TypeError, ("token_ids has dtype torch.int32", "long()")),
    "chunk-zero": ({**right(), "chunk_bytes": 0}, ValueError, ("chunk_bytes is 0", "at least 1", "Leave it out")),
    "chunk-float": ({**right(), "chunk_bytes": 1e9}, TypeError, ("chunk_bytes is 1000000000.0 (float)", "an int")),
    "chunk-bool": ({**right(), "chunk_bytes": True}, TypeError, ("chunk_bytes is True (bool)",)),
    "temperature": ({**right(), "temperature": 0.0}, ValueError, ("temperature is 0.0", "> 0", "greedy")),
    "softcap": ({**right(), "softcap": -1.0}, ValueError, ("softcap is -1.0", "Pass None")),
    "module-trainable": (
        {**right(), "weight": nn.Linear(D, V), "bias": None, "adapter": None},
        ValueError,
        ("trainable parameters (weight, bias)", "weight=module.weight", "requires_grad_(False)"),
    ),
    "module-scalar": (
        {**right(), "weight": lambda x: x.sum(), "bias": None, "adapter": None},
        ValueError,
        ("weight is a callable that returned a number for hidden states [1, 4]", "logits [1, V]", "model's head"),
    ),
    "module-list": (
        {**right(), "weight": lambda x: x.tolist(), "bias": None, "adapter": None},
        ValueError,
        ("weight is a callable that returned a list",),
    ),
    "module-bias": (
        {**right(), "weight": nn.Linear(D, V).requires_grad_(False), "adapter": None},
        ValueError,
        ("bias was given with a callable", "expected None"),
    ),
}


@pytest.mark.parametrize("what", ["loss", "logprobs"])
@pytest.mark.parametrize("name", CASES)
def test_bad_arguments(name: str, what: str) -> None:
    arguments, error, pieces = CASES[name]
    arguments = dict(arguments)
    before = {key: x.detach().clone() for key, x in arguments.items() if isinstance(x, Tensor) and x.device.type == "cpu"}
    first = (arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("token_ids"))
    with pytest.raises(error) as caught:
        if what == "loss":
            gf.linear_grpo_loss(*first, torch.ones(B), **arguments)
        else:
            gf.linear_token_logprobs(*first, **arguments)
    for piece in pieces:
        assert piece in str(caught.value), str(caught.value)
    for key, x in zip(("hidden", "weight", "token_ids"), first, strict=True):
        if key in before:
            assert torch.equal(x, before[key])


@pytest.mark.parametrize("head", [lambda x: (x @ torch.ones(D, V)).int(), lambda x: x[0] @ torch.ones(D, V)], ids=["int", "one row"])
def test_what_a_callable_makes(head: Callable[[Tensor], Tensor]) -> None:
    arguments = right()
    with pytest.raises(
        ValueError, match=r"weight is a callable that returned torch.* for hidden states \[6, 4\]; .* logits \[n, V\] = \[6, 7\]"
    ):
        gf.linear_grpo_loss(arguments["hidden"], head, arguments["token_ids"], torch.ones(B))


def test_a_group_that_is_none() -> None:
    arguments = right()
    first = arguments["hidden"], arguments["weight"], arguments["token_ids"]
    logits = torch.randn(B, T, V)
    for call in (
        lambda: gf.linear_grpo_loss(*first, torch.ones(B), process_group="tp"),  # type: ignore[arg-type]
        lambda: gf.linear_token_logprobs(*first, process_group="tp"),  # type: ignore[arg-type]
        lambda: gf.grpo_loss(logits, first[2], torch.ones(B), process_group="tp"),  # type: ignore[arg-type]
        lambda: gf.token_logprobs(logits, first[2], process_group="tp"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"process_group is a str; expected a ProcessGroup"):
            call()


@pytest.mark.parametrize("value", [-1, 0.5])
def test_keep_bytes(value: Any) -> None:
    arguments = right()
    with pytest.raises((ValueError, TypeError), match="keep_bytes is"):
        gf.linear_token_logprobs(arguments["hidden"], arguments["weight"], arguments["token_ids"], keep_bytes=value)


def test_the_arguments_that_grpo_loss_checks_are_checked_here_too() -> None:
    arguments = right()
    first = (arguments["hidden"], arguments["weight"], arguments["token_ids"])
    for wrong, piece in (
        ({"config": gf.LossConfig(beta=0.1)}, "ref_logprobs is None"),
        ({"metrics_on": "some"}, "metrics_on is 'some'"),
        ({"old_logprobs": torch.zeros(B, T + 1)}, "old_logprobs has shape"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "expected packed input"),
        ({"loss_scale": float("nan")}, "loss_scale is nan"),
    ):
        with pytest.raises(ValueError, match=piece):
            gf.linear_grpo_loss(*first, torch.ones(B), **wrong)


def test_a_weight_that_deepspeed_has_partitioned_is_refused() -> None:
    arguments = right()
    weight = nn.Parameter(torch.empty(0))
    weight.ds_id = 3  # type: ignore[attr-defined]  # as DeepSpeed marks its own
    with pytest.raises(ValueError, match="partitioned by DeepSpeed ZeRO-3; expected the full weight"):
        gf.linear_grpo_loss(arguments["hidden"], weight, arguments["token_ids"], torch.ones(B))
