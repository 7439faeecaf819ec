"""The loss and its metrics from log-probabilities, as tensor operations that autograd differentiates.

It serves the cases that the one-pass kernels do not: ratios of whole sequences, processes that share the vocabulary, and losses over
log-probabilities that the caller has computed. Only the elementwise ``surrogate`` and ``clipped_tokens`` come from the specification (a new
loss type is written once in PyTorch); the C++ and Triton kernels have their own, and the tests compare them with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_fast.loss.importance import gmpo_log_ratio, importance_log_ratio, vespo_phi
from grpo_fast.loss.inputs import LossInputs
from grpo_fast.loss.reference import clipped_tokens, surrogate

__all__ = ["kl_penalty", "policy_loss", "policy_metrics", "token_losses"]


def policy_loss(logprobs: Tensor, entropy: Tensor, inputs: LossInputs, computed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, 0-d and differentiable, and its metrics.

    Args:
        logprobs, entropy: ``[B, T]``, read only where ``computed`` is True.
        computed: bool ``[B, T]``: all unmasked tokens, or the active ones alone; the loss is the same.
    """
    loss, ratio, kl = token_losses(logprobs, inputs, computed, entropy)
    entropy = torch.where(computed, entropy, 0).to(logprobs.dtype)
    total = (inputs.weights * loss).sum()
    if inputs.config.entropy_coef != 0:
        total = total - inputs.config.entropy_coef * (inputs.entropy_weights * entropy).sum()
    advantages, logprobs = (torch.where(computed, x, 0).to(logprobs.dtype) for x in (inputs.advantages, logprobs.detach()))
    old_logprobs = logprobs if inputs.old_logprobs is None else torch.where(computed, inputs.old_logprobs, 0).to(logprobs.dtype)
    clipped = clipped_tokens(ratio, advantages, logprobs, old_logprobs, inputs.config)
    return total * inputs.loss_scale, policy_metrics(ratio, kl, entropy, clipped, inputs, computed)


def token_losses(logprobs: Tensor, inputs: LossInputs, computed: Tensor, entropy: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each token before the weights (0 where not computed), its importance ratio and its KL estimate.

    The factors are in TRL's order: rollout weights multiply the surrogate and not the KL penalty, which is added afterwards.

    Args:
        entropy: like logprobs, for a custom surrogate; None: not known.
    """
    config, sequences, clamp = inputs.config, inputs.sequences, inputs.config.log_ratio_clamp

    def select(x: Tensor) -> Tensor:  # before any arithmetic: 0 * inf and 0 * nan are nan
        return torch.where(computed, x, 0).to(logprobs.dtype)

    logprobs, advantages = select(logprobs), select(inputs.advantages)
    rollout_weights = None if inputs.rollout_weights is None else select(inputs.rollout_weights)

    old_logprobs = logprobs.detach() if inputs.old_logprobs is None else select(inputs.old_logprobs)
    both_impossible = (logprobs == old_logprobs) & logprobs.isinf()  # probability 0 under both policies: inf - inf would be NaN
    log_ratio = torch.where(both_impossible, 0, logprobs - old_logprobs)

    def ratio_of(x: Tensor) -> Tensor:
        return importance_log_ratio(x, computed, sequences, config.level).clamp(-clamp, clamp).exp()

    ratio = ratio_of(log_ratio)
    clipped = ratio_of(gmpo_log_ratio(log_ratio, advantages, config)) if config.surrogate == "gmpo" else ratio
    phi = None
    if config.surrogate == "vespo":
        phi = vespo_phi(log_ratio, advantages, inputs.log_rollout(computed), sequences, config)

    if config.custom is not None:
        given = {
            "ratio": ratio,
            "advantages": advantages,
            "logprobs": logprobs,
            "old_logprobs": old_logprobs,
            "ref_logprobs": None if inputs.ref_logprobs is None else select(inputs.ref_logprobs),
            "rollout_weights": torch.ones_like(ratio) if rollout_weights is None else rollout_weights,
            "entropy": None if entropy is None else select(entropy),
            **{name: select(x) for name, x in inputs.surrogate_inputs.items()},
        }
        loss = config.custom.losses(given, computed, skips_zero_advantages=config.skips_zero_advantages)
    else:
        loss = surrogate(clipped, advantages, logprobs, old_logprobs, phi, config)
    if rollout_weights is not None and not config.surrogate_weighs:
        loss = torch.where(rollout_weights == 0, 0, loss * rollout_weights)
    kl = torch.zeros_like(logprobs)
    if inputs.ref_logprobs is not None:
        kl = kl_penalty(logprobs, select(inputs.ref_logprobs), config.kl_estimator, clamp)
    if config.beta != 0:
        loss = loss + config.beta * (kl * ratio if config.bias_corrected_kl else kl)
    if config.squared_log_ratio_coef != 0:
        loss = loss + config.squared_log_ratio_coef * log_ratio.clamp(-clamp, clamp).square()
    return select(loss), ratio, kl


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, clamp: float) -> Tensor:
    """Return the estimate of KL(policy || reference) of each token (http://joschu.net/blog/kl-approx.html).

    Args:
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        clamp: bound of the log-ratio that k3 exponentiates.
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio * log_ratio / 2
    log_ratio = log_ratio.clamp(-clamp, clamp)
    return torch.expm1(log_ratio) - log_ratio


@torch.no_grad()
def policy_metrics(
    ratio: Tensor, kl: Tensor, entropy: Tensor, clipped: tuple[Tensor, Tensor], inputs: LossInputs, computed: Tensor
) -> dict[str, Tensor]:
    """Return means over the computed tokens as 0-d float32 tensors; the docstring of GRPOOutput defines them.

    Args:
        clipped: the two masks of ``clipped_tokens``.
    """
    clip_low, clip_high = clipped

    def mean(x: Tensor, over: Tensor) -> Tensor:
        return (torch.where(over, x, 0).sum(dtype=torch.float64) / over.sum().clamp(min=1)).float()

    ratio_max = torch.where(computed, ratio, 0).amax() if computed.numel() else torch.zeros((), device=computed.device)
    return {
        "kl": mean(kl, computed),
        "entropy": mean(entropy, computed),
        "ratio_mean": mean(ratio, computed),
        "ratio_max": ratio_max.float(),
        "clip_low": mean(clip_low.float(), computed),
        "clip_high": mean(clip_high.float(), computed),
        "clip_region": mean((clip_low | clip_high).float(), computed),
        "active_fraction": inputs.active_fraction(),
    }
