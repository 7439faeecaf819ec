"""The random calls of cases.py with a head in front: hidden states and a weight whose product has a signal."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import random_case
from torch import Tensor

import grpo_fast as gf

D = 24


def operands(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, seed: int = 0, std: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight with which logits have this standard deviation, and token ids."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(tokens, width, generator=generator), torch.randn(vocabulary, width, generator=generator)
    return hidden.to(dtype), (weight * std / width**0.5).to(dtype), torch.randint(vocabulary, (tokens,), generator=generator)


@dataclass
class LinearCase:
    """The arguments of one call of linear_grpo_loss, and what autograd gives for it."""

    tensors: dict[str, Tensor]  # hidden, weight, and bias, adapted, adapter_weight where there are any
    token_ids: Tensor
    advantages: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def logits(self) -> Tensor:
        """In float64."""
        x = {name: tensor.double() for name, tensor in self.tensors.items()}
        logits = torch.nn.functional.linear(x["hidden"], x["weight"], x.get("bias"))
        return logits + x["adapted"] @ x["adapter_weight"].T if "adapted" in x else logits

    def run(self, dtype: torch.dtype | None = None, **changed: Any) -> tuple[gf.GRPOOutput, dict[str, Tensor]]:
        """Forward and backward; returns the output and the gradients."""
        leaves = {name: x.to(dtype or x.dtype).detach().clone().requires_grad_() for name, x in self.tensors.items()}
        options = {**self.options, **changed}
        for name in options.pop("frozen", ()):
            leaves[name].requires_grad_(False)
        given: dict[str, Any] = dict(leaves)
        if "adapted" in given:
            options["adapter"] = (given.pop("adapted"), given.pop("adapter_weight"))
        out = gf.linear_grpo_loss(given.pop("hidden"), given.pop("weight"), self.token_ids, self.advantages, **given, **options)
        out.loss.backward()
        return out, {name: x.grad for name, x in leaves.items() if x.grad is not None}


def random_linear_case(seed: int, dtype: torch.dtype) -> LinearCase:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    case = random_case(seed, torch.float32, largest_vocabulary=600)
    vocabulary = case.logits.shape[-1]
    for name in ("strided", "inplace"):
        case.options.pop(name, None)
    leading = case.logits.shape[:-1]

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    tensors = {"hidden": normal(*leading, D), "weight": normal(vocabulary, D, std=rng.choice([0.2, 0.5]))}
    if rng.random() < 0.4:
        tensors["bias"] = normal(vocabulary, std=0.5)
    if rng.random() < 0.4:
        tensors |= {"adapted": normal(*leading, 3), "adapter_weight": normal(vocabulary, 3, std=0.3)}

    mask = case.options.get("mask")
    tokens = case.token_ids.shape
    computed = torch.ones(tokens, dtype=torch.bool) if mask is None else mask.bool()
    if tokens != leading:  # [B, T + 1, D]
        computed = torch.cat([computed, torch.zeros(tokens[0], 1, dtype=torch.bool)], 1)
    true_ids = torch.where(computed, torch.nn.functional.pad(case.token_ids, (0, leading[-1] - tokens[-1])), 0)
    # Some tokens almost certain: their hidden states point where their token's weight does.
    sure = (torch.rand(leading, generator=generator) < 0.2).unsqueeze(-1)
    pull = tensors["weight"][true_ids].float()
    tensors["hidden"] = torch.where(sure, 12 * pull / pull.square().sum(-1, keepdim=True), tensors["hidden"].float()).to(dtype)

    # Old and reference log-probabilities near the policy's, as in cases.py.
    logits = LinearCase(tensors, case.token_ids, case.advantages).logits()
    scoring = {name: case.options[name] for name in ("temperature", "softcap", "logit_scale", "mask", "support") if name in case.options}
    logprobs = gf.token_logprobs(logits, case.token_ids, **scoring).logprobs.float()
    for name, std in (("old_logprobs", 0.3), ("ref_logprobs", 0.5)):
        if name in case.options:
            case.options[name] = torch.where(case.options[name].isnan(), float("nan"), logprobs + normal(*tokens, std=std).float())
    if mask is not None:
        poison = (float("nan"), float("inf"))[seed % 2]
        for name in ("hidden", "adapted"):
            if name in tensors:
                tensors[name] = torch.where(computed.unsqueeze(-1), tensors[name], torch.tensor(poison, dtype=dtype))
    case.options["chunk_bytes"] = rng.choice([None, 1, 4 * vocabulary * dtype.itemsize, 11 * vocabulary * dtype.itemsize])
    if rng.random() < 0.3:
        case.options["frozen"] = rng.choice([("weight",), ("hidden",), ("weight", "hidden")])
        if "bias" not in tensors and "adapted" not in tensors and len(case.options["frozen"]) == 2:
            case.options["frozen"] = ("weight",)
    return LinearCase(tensors, case.token_ids, case.advantages, case.options)
