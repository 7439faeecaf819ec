"""The data of one case with their truth in float64, what is compared on them, and the measurement of a loss with its gradients.

Each implementation is made for a case; its step returns the loss, differentiable in the hidden states and, if trainable, the weight.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import grpo_fast as gf
from grpo_fast.benchmark.eager import CONFIG, eager_logprobs, eager_loss
from grpo_fast.benchmark.harness.gate import UnavailableError, Verdict, row_error
from grpo_fast.benchmark.harness.measure import Measurement, Record, measure

__all__ = ["COMPILED", "IMPLEMENTATIONS", "LABELS", "SEQUENCES", "TEMPERATURE", "Gradients", "HeadCase", "Step", "Truth"]
__all__ += ["arguments", "compare_with_truth", "make", "make_cases", "measure_gradients"]

LABELS = {
    "roofline": "the bare products",
    "roofline_float32": "the bare products in float32",
    "ours": "grpo_fast, fused head",
    "input": "grpo_fast, logits in the operands' type",
    "invariant": "grpo_fast, batch_invariant()",
    "full": "full logits, grpo_fast's loss in place",
    "eager": "full logits, PyTorch eager",
    "trl": "TRL ChunkedLogProbFunction",
    "liger": "Liger fused linear GRPO",
    "cce": "cut-cross-entropy (torch.compile)",
}
IMPLEMENTATIONS = tuple(LABELS)
COMPILED = ("liger", "cce")  # by torch.compile, for each number of tokens
SEQUENCES = 8
TEMPERATURE = 0.9
SAMPLED = 32  # rows of the gradients that are compared
_AT_ONCE = 64  # tokens whose float64 logits are there together
# Errors that pass: of the loss (whose tokens are about 1), and of a sampled row of a gradient, see row_error.
TOLERANCE = {"float32": (1e-5, 1e-3), "bfloat16": (2e-2, 6e-2)}

Step = Callable[[Tensor, Tensor], Tensor]  # (hidden [B, T, D], weight [V, D]) -> loss, differentiable


class Truth(NamedTuple):
    """In float64."""

    loss: float
    tokens: Tensor  # int64 [SAMPLED]
    d_hidden: Tensor  # [SAMPLED, D] of these tokens
    entries: Tensor  # int64 [SAMPLED], of the vocabulary
    d_weight: Tensor  # [SAMPLED, D] of these


@dataclass(frozen=True)
class HeadCase:
    """What every implementation gets."""

    hidden: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    token_ids: Tensor  # int64 [B, T]
    advantages: Tensor  # [B], 0 for the sequences that cannot change the gradient
    old_logprobs: Tensor  # [B, T]
    mask: Tensor  # int64 [B, T]
    truth: Truth


class Gradients(NamedTuple):
    """What a step computes: the loss, and its gradients for a trainable head or a frozen one."""

    loss: float
    d_hidden: Tensor  # [N, D]
    d_weight: Tensor | None  # [V, D]


def make_cases(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, shares: Sequence[float], seed: int, sequences: int = SEQUENCES
) -> list[HeadCase]:
    """For each share of active tokens the same random states and weights, whose logits have a standard deviation of about 1.5, and the same
    old log-probabilities, which straddle the clip band. Inactive are whole sequences, which have no advantage, as in groups whose rewards
    are all equal; what is missing to the share is masked at the end of one."""
    generator = torch.Generator().manual_seed(seed)
    length = tokens // sequences
    hidden = torch.randn(sequences, length, width, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) * 1.5 / width**0.5).to(dtype)
    token_ids = torch.randint(vocabulary, (sequences, length), generator=generator)
    advantages = torch.randn(sequences, generator=generator)
    logprobs, lse = _exact_logprobs(hidden, weight, token_ids)
    old_logprobs = (logprobs + torch.randn(token_ids.shape, generator=generator) * 0.2).float()
    cases = []
    for share in shares:
        active = round(share * tokens)
        alive = -(-active // length)
        mask = torch.ones_like(token_ids)
        mask[alive - 1, active - (alive - 1) * length :] = 0
        of_case = torch.where(torch.arange(sequences) < alive, advantages, 0)
        loss_of = (old_logprobs.double(), of_case.double()[:, None], mask)
        cases.append(
            HeadCase(hidden, weight, token_ids, of_case, old_logprobs, mask, _truth(hidden, weight, token_ids, logprobs, lse, loss_of))
        )
    return cases


def _exact_logprobs(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens [B, T], and the log-sum-exp [N], in float64."""
    flat, ids, w = hidden.flatten(0, 1).double(), token_ids.flatten(), weight.double()
    lse, target = torch.empty_like(flat[:, 0]), torch.empty_like(flat[:, 0])
    for some in torch.arange(ids.numel()).split(_AT_ONCE):
        logits = flat[some] @ w.T / TEMPERATURE
        lse[some], target[some] = logits.logsumexp(-1), logits.gather(-1, ids[some, None]).squeeze(-1)
    return (target - lse).view(token_ids.shape), lse


def _truth(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, logprobs: Tensor, lse: Tensor, loss_of: tuple[Tensor, Tensor, Tensor]
) -> Truth:
    flat, ids, w = hidden.flatten(0, 1).double(), token_ids.flatten(), weight.double()
    entries = torch.cat([ids[: SAMPLED // 2], torch.arange(SAMPLED - SAMPLED // 2) * 31 % w.shape[0]])
    tokens = torch.linspace(0, ids.numel() - 1, SAMPLED).long()
    leaf = logprobs.clone().requires_grad_()
    loss = eager_loss(leaf, *loss_of)
    g = torch.autograd.grad(loss, leaf)[0].flatten() / TEMPERATURE

    def d_logits(some: Tensor, columns: Tensor) -> Tensor:
        p = (flat[some] @ w[columns].T / TEMPERATURE - lse[some, None]).exp()
        return g[some, None] * ((columns == ids[some, None]).double() - p)

    d_hidden = d_logits(tokens, torch.arange(w.shape[0])) @ w
    return Truth(loss.item(), tokens, d_hidden, entries, d_logits(torch.arange(ids.numel()), entries).T @ flat)


def arguments(case: HeadCase) -> Record:
    """Of linear_grpo_loss and grpo_loss."""
    return {"config": CONFIG, "old_logprobs": case.old_logprobs, "mask": case.mask, "temperature": TEMPERATURE}


def measure_gradients(step: Step, case: HeadCase, trainable: bool, threads: int) -> Measurement[Gradients]:
    """One loss and its gradients, from hidden states that are there."""
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_(trainable)

    def run() -> Gradients:
        loss = step(hidden, weight)
        loss.backward()
        assert hidden.grad is not None, "backward gave the hidden states no gradient"
        return Gradients(loss.item(), hidden.grad.flatten(0, -2), weight.grad)

    return measure(run, threads)


def compare_with_truth(found: Gradients, truth: Truth, dtype: torch.dtype) -> Verdict:
    """How far a result is from the truth."""
    loss, gradient = TOLERANCE[str(dtype).removeprefix("torch.")]
    errors: dict[str, float | None] = {"loss": abs(found.loss - truth.loss)}
    errors["d_hidden"] = row_error(found.d_hidden[truth.tokens], truth.d_hidden)
    if found.d_weight is not None:
        errors["d_weight"] = row_error(found.d_weight[truth.entries], truth.d_weight)
    return Verdict(errors, {"loss": loss, "d_hidden": gradient, "d_weight": gradient})


# The implementations -------------------------------------------------------------------------------------------------------------------


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


def _ours(case: HeadCase, invariant: bool = False, **options: Any) -> Step:
    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        with gf.batch_invariant(invariant):
            return gf.linear_grpo_loss(hidden, weight, case.token_ids, case.advantages, **arguments(case), **options).loss

    return step


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
    "roofline_float32": _roofline,
    "ours": _ours,
    "input": partial(_ours, logits_dtype="input"),
    "invariant": partial(_ours, invariant=True),
    "full": _full,
    "eager": _eager,
    "trl": _trl,
    "liger": _liger,
    "liger_drop_in": _liger_drop_in,
    "cce": _cce,
    "verl": _verl,
    "verl_drop_in": _verl_drop_in,
}
