"""What is compared: each is made for a case, and returns its loss with gradients in hidden.grad and, for a trainable head, weight.grad."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import grpo_fast as gf
from grpo_fast.benchmark.contestants import UnavailableError, readable_loss
from grpo_fast.benchmark.data import CONFIG
from grpo_fast.benchmark.head.case import TEMPERATURE, Case, arguments

__all__ = ["COMPILED", "CONTESTANTS", "LABELS", "make"]

Step = Callable[[Tensor, Tensor], Tensor]  # (hidden, weight) -> loss, differentiable

LABELS = {
    "floor": "the bare products",
    "ours": "grpo_fast, fused head",
    "full": "full logits, grpo_fast's loss in place",
    "eager": "full logits, PyTorch eager",
    "trl": "TRL ChunkedLogProbFunction",
    "liger": "Liger fused linear GRPO",
    "cce": "cut-cross-entropy (torch.compile)",
}
CONTESTANTS = tuple(LABELS)
COMPILED = ("liger", "cce")  # by torch.compile, for each number of tokens


def make(name: str, case: Case) -> Step:
    """The contestant of that name for hidden states and weight of this case.

    Raises:
        UnavailableError: its package is not installed, or cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _MAKE[name](case)
    except Exception as error:  # an import that broke, in whatever way, is a contestant that is not there
        raise UnavailableError(f"{LABELS[name]}: {type(error).__name__}: {error}") from error


def _clipped(case: Case, logprobs: Tensor) -> Tensor:
    """TRL's formula for loss_type="dapo" of one process, in eager PyTorch."""
    return readable_loss(logprobs.view(case.token_ids.shape), case.old_logprobs, case.advantages[:, None], case.mask)


def _floor(case: Case) -> Step:
    flat, weight = case.hidden.flatten(0, 1), case.weight
    shapes = {"logits": (flat.shape[0], weight.shape[0]), "d_hidden": flat.shape, "d_weight": weight.shape}
    memory = {name: flat.new_full(shape, 1.0) for name, shape in shapes.items()}  # touched before, as no contestant's is

    class Products(torch.autograd.Function):
        """Logits, and what each gradient costs, with nothing in between: the products of the whole batch at once."""

        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(hidden, weight)
            return torch.mm(hidden, weight.T, out=memory["logits"])[0, 0].float()

        @staticmethod
        def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor | None]:
            hidden, weight = ctx.saved_tensors
            d_weight = torch.mm(memory["logits"].T, hidden, out=memory["d_weight"]) if ctx.needs_input_grad[1] else None
            return torch.mm(memory["logits"], weight, out=memory["d_hidden"]), d_weight

    return lambda hidden, weight: Products.apply(hidden.flatten(0, 1), weight)


def _ours(case: Case) -> Step:
    return lambda hidden, weight: gf.linear_grpo_loss(hidden, weight, case.token_ids, case.advantages, **arguments(case)).loss


def _full(case: Case) -> Step:
    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return gf.grpo_loss(logits, case.token_ids, case.advantages, inplace=True, **arguments(case)).loss

    return step


def _eager(case: Case) -> Step:
    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float() / TEMPERATURE
        return _clipped(case, logits.log_softmax(-1).gather(-1, case.token_ids[..., None]).squeeze(-1))

    return step


def _trl(case: Case) -> Step:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        tokens = case.token_ids.flatten()
        out = ChunkedLogProbFunction.apply(hidden.flatten(0, 1), weight, None, tokens, TEMPERATURE, 4096, None, 1.0, ())
        return _clipped(case, out[0])

    return step


def _liger(case: Case) -> Step:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        epsilon_low=CONFIG.epsilon_low,
        epsilon_high=CONFIG.epsilon_high,
        loss_type="bnpo",
        temperature=TEMPERATURE,
    )

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        value, _ = loss(hidden, weight, case.token_ids, case.mask, case.advantages, old_per_token_logps=case.old_logprobs)
        return value

    return step


def _cce(case: Case) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        scaled = hidden / TEMPERATURE  # it knows no temperature
        return _clipped(case, -linear_cross_entropy(scaled, weight, case.token_ids, reduction="none", impl="torch_compile"))

    return step


_MAKE: dict[str, Callable[[Case], Step]] = {
    "floor": _floor,
    "ours": _ours,
    "full": _full,
    "eager": _eager,
    "trl": _trl,
    "liger": _liger,
    "cce": _cce,
}
