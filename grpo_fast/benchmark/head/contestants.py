"""What is compared: each takes a case and returns its loss with gradients in hidden.grad and, for a trainable head, weight.grad."""

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

Step = Callable[[Case, Tensor, Tensor], Tensor]  # (case, hidden, weight) -> loss, differentiable

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


def make(name: str) -> Step:
    """The contestant of that name.

    Raises:
        UnavailableError: its package is not installed, or cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _MAKE[name]()
    except Exception as error:  # an import that broke, in whatever way, is a contestant that is not there
        raise UnavailableError(f"{LABELS[name]}: {type(error).__name__}: {error}") from error


def _clipped(case: Case, logprobs: Tensor) -> Tensor:
    """TRL's formula for loss_type="dapo" of one process, in eager PyTorch."""
    return readable_loss(logprobs.view(case.token_ids.shape), case.old_logprobs, case.advantages[:, None], case.mask)


def _floor() -> Step:
    memory: dict[str, Tensor] = {}  # touched before, as no contestant's is

    def product(name: str, a: Tensor, b: Tensor) -> Tensor:
        if name not in memory:
            memory[name] = a.new_zeros(a.shape[0], b.shape[1])
        return torch.mm(a, b, out=memory[name])

    class Products(torch.autograd.Function):
        """Logits, and what each gradient costs, with nothing in between: the products of the whole batch at once."""

        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(hidden, weight)
            return product("logits", hidden, weight.T)[0, 0].float()

        @staticmethod
        def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor | None]:
            hidden, weight = ctx.saved_tensors
            logits = memory["logits"]
            d_weight = product("d_weight", logits.T, hidden) if ctx.needs_input_grad[1] else None
            return product("d_hidden", logits, weight), d_weight

    return lambda case, hidden, weight: Products.apply(hidden.flatten(0, 1), weight)


def _ours() -> Step:
    return lambda case, hidden, weight: gf.linear_grpo_loss(hidden, weight, case.token_ids, case.advantages, **arguments(case)).loss


def _full() -> Step:
    def step(case: Case, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return gf.grpo_loss(logits, case.token_ids, case.advantages, inplace=True, **arguments(case)).loss

    return step


def _eager() -> Step:
    def step(case: Case, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float() / TEMPERATURE
        return _clipped(case, logits.log_softmax(-1).gather(-1, case.token_ids[..., None]).squeeze(-1))

    return step


def _trl() -> Step:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def step(case: Case, hidden: Tensor, weight: Tensor) -> Tensor:
        tokens = case.token_ids.flatten()
        out = ChunkedLogProbFunction.apply(hidden.flatten(0, 1), weight, None, tokens, TEMPERATURE, 4096, None, 1.0, ())
        return _clipped(case, out[0])

    return step


def _liger() -> Step:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        epsilon_low=CONFIG.epsilon_low,
        epsilon_high=CONFIG.epsilon_high,
        loss_type="bnpo",
        temperature=TEMPERATURE,
    )

    def step(case: Case, hidden: Tensor, weight: Tensor) -> Tensor:
        value, _ = loss(hidden, weight, case.token_ids, case.mask, case.advantages, old_per_token_logps=case.old_logprobs)
        return value

    return step


def _cce() -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def step(case: Case, hidden: Tensor, weight: Tensor) -> Tensor:
        scaled = hidden / TEMPERATURE  # it knows no temperature
        return _clipped(case, -linear_cross_entropy(scaled, weight, case.token_ids, reduction="none", impl="torch_compile"))

    return step


_MAKE: dict[str, Callable[[], Step]] = {
    "floor": _floor,
    "ours": _ours,
    "full": _full,
    "eager": _eager,
    "trl": _trl,
    "liger": _liger,
    "cce": _cce,
}
