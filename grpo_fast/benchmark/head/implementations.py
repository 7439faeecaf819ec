"""What is compared: each is made for a case and returns its loss, differentiable in the hidden states and, if trainable, the weight."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import grpo_fast as gf
from grpo_fast.benchmark.eager import CONFIG, eager_logprobs, eager_loss
from grpo_fast.benchmark.harness.gate import UnavailableError
from grpo_fast.benchmark.head.cases import TEMPERATURE, HeadCase, Step, arguments

__all__ = ["COMPILED", "IMPLEMENTATIONS", "LABELS", "make"]

LABELS = {
    "roofline": "the bare products",
    "ours": "grpo_fast, fused head",
    "full": "full logits, grpo_fast's loss in place",
    "eager": "full logits, PyTorch eager",
    "trl": "TRL ChunkedLogProbFunction",
    "liger": "Liger fused linear GRPO",
    "cce": "cut-cross-entropy (torch.compile)",
}
IMPLEMENTATIONS = tuple(LABELS)
COMPILED = ("liger", "cce")  # by torch.compile, for each number of tokens


def make(name: str, case: HeadCase) -> Step:
    """The implementation of that name for the hidden states and the weight of this case.

    Raises:
        UnavailableError: its package is not installed, or cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _MAKE[name](case)
    except Exception as error:  # an import may fail in any way
        raise UnavailableError(f"{LABELS.get(name, name)}: {type(error).__name__}: {error}") from error


def _clipped(case: HeadCase, logprobs: Tensor) -> Tensor:
    return eager_loss(logprobs.view(case.token_ids.shape), case.old_logprobs, case.advantages[:, None], case.mask)


def _roofline(case: HeadCase) -> Step:
    flat, weight = case.hidden.flatten(0, 1), case.weight
    shapes = {"logits": (flat.shape[0], weight.shape[0]), "d_hidden": flat.shape, "d_weight": weight.shape}
    memory = {name: flat.new_full(shape, 1.0) for name, shape in shapes.items()}  # touched before, unlike that of the others

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


def _ours(case: HeadCase) -> Step:
    return lambda hidden, weight: gf.linear_grpo_loss(hidden, weight, case.token_ids, case.advantages, **arguments(case)).loss


def _full(case: HeadCase) -> Step:
    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return gf.grpo_loss(logits, case.token_ids, case.advantages, inplace=True, **arguments(case)).loss

    return step


def _eager(case: HeadCase) -> Step:
    return lambda hidden, weight: _clipped(case, eager_logprobs(F.linear(hidden, weight).float(), case.token_ids, TEMPERATURE)[0])


def _trl(case: HeadCase) -> Step:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        tokens = case.token_ids.flatten()
        out = ChunkedLogProbFunction.apply(hidden.flatten(0, 1), weight, None, tokens, TEMPERATURE, 4096, None, 1.0, ())
        return _clipped(case, out[0])

    return step


def _fused_linear_grpo_loss(module: Callable[..., Any], case: HeadCase, **options: Any) -> Step:
    """A LigerFusedLinearGRPOLoss: Liger's, or the one that replaces it."""
    epsilons = {"epsilon_low": CONFIG.epsilon_low, "epsilon_high": CONFIG.epsilon_high}
    loss = module(beta=0.0, use_ref_model=False, temperature=TEMPERATURE, **epsilons, **options)
    return lambda hidden, weight: loss(hidden, weight, case.token_ids, case.mask, case.advantages, old_per_token_logps=case.old_logprobs)[0]


def _liger(case: HeadCase) -> Step:
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    return _fused_linear_grpo_loss(LigerFusedLinearGRPOLoss, case, loss_type="bnpo")


def _liger_drop_in(case: HeadCase) -> Step:
    from grpo_fast.integrations.liger import LigerFusedLinearGRPOLoss

    return _fused_linear_grpo_loss(LigerFusedLinearGRPOLoss, case, loss_type="bnpo")


def _cce(case: HeadCase) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        scaled = hidden / TEMPERATURE  # it has no temperature
        return _clipped(case, -linear_cross_entropy(scaled, weight, case.token_ids, reduction="none", impl="torch_compile"))

    return step


def _verl(case: HeadCase) -> Step:
    """Its fused head in PyTorch, which is what its configuration takes unless told otherwise; the entropy is computed and not used."""
    path = Path(sys.prefix, "peers", "verl", "utils", "experimental", "torch_functional.py")  # the package needs Ray, this file does not
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    if spec is None or spec.loader is None or not path.exists():
        raise UnavailableError(f"there is no {path}. Fix: pip install --no-deps --target {sys.prefix}/peers verl==0.9.1")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = module.FusedLinearForPPO()
    return lambda hidden, weight: _clipped(case, function(hidden, weight, case.token_ids, TEMPERATURE)[0])


def _verl_drop_in(case: HeadCase) -> Step:
    from grpo_fast.integrations.verl import linear_cross_entropy

    return lambda hidden, weight: _clipped(case, linear_cross_entropy(hidden, weight, case.token_ids, TEMPERATURE)[0])


_MAKE: dict[str, Callable[[HeadCase], Step]] = {
    "roofline": _roofline,
    "ours": _ours,
    "full": _full,
    "eager": _eager,
    "trl": _trl,
    "liger": _liger,
    "liger_drop_in": _liger_drop_in,
    "cce": _cce,
    "verl": _verl,
    "verl_drop_in": _verl_drop_in,
}
